"""`edgeexit run`: classify pictures or arrays, or run the bundle's self-test."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import finite, show_error
from edgeexit.errors import EdgeExitError, UsageError, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeexit.bundle import Bundle
    from edgeexit.runtime import Prediction, Runner
    from edgeexit.slide import Slider


@click.command("run", short_help="classify, stopping at the first exit that is sure enough")
@click.argument("inputs", nargs=-1)
@click.option("--bundle", type=click.Path(path_type=Path), help="default: the only *.edgeexit here")
@click.option("--policy", default="auto", show_default=True, help="auto, none, or a policy file")
@click.option("--device", help="whose policy `auto` takes; default: the kind of board this is")
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--preload", is_flag=True, help="open all segments at start (streams always do)")
@click.option("--top", type=click.IntRange(min=1), help="also list the K likeliest classes")
@click.option(
    "--min-confidence", type=float, callback=finite, help="below this the class is `unsure`"
)
@click.option(
    "--log", type=click.Path(path_type=Path), help="append answers as JSON Lines; rotates"
)
@click.option("--annotate", type=click.Path(path_type=Path), help="folder for labelled pictures")
@click.option("--all-exits", is_flag=True, help="stop nowhere, give the logits of every exit")
@click.option(
    "--slide",
    metavar="BY",
    help="move along the certified policies: battery[=20..80], temperature[=60..80], latency=8ms",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def command(
    inputs: tuple[str, ...],
    bundle: Path | None,
    policy: str,
    device: str | None,
    threads: int,
    preload: bool,
    top: int | None,
    min_confidence: float | None,
    log: Path | None,
    annotate: Path | None,
    all_exits: bool,
    slide: str | None,
    as_json: bool,
) -> None:
    """
    Classify INPUTS: pictures, folders, patterns, .npy or .npz files, or - for frames on stdin.

    \b
    edgeexit run image.png another.png    # the only bundle here
    edgeexit run fashion.edgeexit photos/
    edgeexit run                          # no input: the bundle's self-test
    edgeexit run photos/ --slide latency=8ms

    A bad input is reported and the others go on; the exit code is then the first one's (3 for
    a bad file). A summary goes to stderr at the end and on SIGUSR1. A frame is a 4-byte
    little-endian length and an encoded picture or .npy file.

    --slide looks at the board between inputs and takes a stricter or looser policy of those that
    tune certified together: low battery (percent), heat (degrees Celsius) or slow answers (mean
    latency) make it leave earlier, never beyond what was certified.
    """
    from edgeexit.bundle import load_bundle
    from edgeexit.names import only_bundle_here

    names = list(inputs)
    if bundle is None and names and names[0].rstrip("/").endswith(".edgeexit"):
        bundle = Path(names.pop(0))
    loaded = load_bundle(only_bundle_here() if bundle is None else bundle)
    wanted = None
    if slide is not None:
        from edgeexit.slide import parse_slide

        wanted = parse_slide(slide)
        if not names:
            raise UsageError(
                "--slide moves a policy between inputs: none given, and the self-test has none",
                hint="edgeexit run photos/ --slide latency=8ms",
            )
        if all_exits or policy == "none":
            raise UsageError(
                "--slide moves a policy, and "
                + ("--all-exits" if all_exits else "--policy none")
                + " runs without one",
                hint="leave one of them out",
            )
    if not names:
        _selftest(loaded, threads, as_json)
        return

    from edgeexit.runtime import Runner

    if all_exits and policy not in ("auto", "none"):
        raise UsageError("--all-exits stops nowhere: leave --policy out")
    chosen = None if all_exits or policy == "none" else policy
    if device is not None:
        from edgeexit.device import find_device

        device = find_device(device).name
    at_once = preload or "-" in names or wanted is not None
    with Runner(loaded, chosen, threads, at_once, device=device) as runner:
        if runner.notice:
            click.echo(f"Note: {runner.notice}", err=True)
        options = _Options(loaded, top, min_confidence, annotate, all_exits, as_json)
        slider = None
        if wanted is not None:
            from edgeexit.slide import Slider

            slider = Slider(runner, wanted)
        code = _classify(runner, names, options, log, slider)
    if code:
        raise click.exceptions.Exit(code)


def _selftest(bundle: "Bundle", threads: int, as_json: bool) -> None:
    from edgeexit.selftest import run_selftest

    report = run_selftest(bundle, threads)
    if as_json:
        _echo_json(report.to_document())
        return
    click.echo(
        f"self-test ok: {report.samples} samples, all {len(bundle.exits)} exits, {report.runtime}"
    )
    if report.differing:
        click.echo(
            f"{report.differing} of {report.numbers} logits differ from the converting machine's, "
            f"by at most {report.largest:g} (other kernels round differently)"
        )


class _Options:
    """How an answer is shown."""

    def __init__(
        self,
        bundle: "Bundle",
        top: int | None,
        min_confidence: float | None,
        annotate: Path | None,
        all_exits: bool,
        as_json: bool,
    ) -> None:
        self.bundle, self.top, self.min_confidence = bundle, top, min_confidence
        self.annotate, self.all_exits, self.as_json = annotate, all_exits, as_json
        if annotate is not None and bundle.preprocess.kind != "image":
            raise UsageError("--annotate draws on pictures, this bundle takes arrays")

    def answer(self, name: str, prediction: "Prediction") -> dict[str, Any]:
        low = self.min_confidence
        is_unsure = low is not None and prediction.confidence < low
        return {
            "input": name,
            "label": prediction.label,
            "class": "unsure" if is_unsure else prediction.class_name,
            "confidence": prediction.confidence,
            "exit": prediction.exit,
            "latency_ms": prediction.latency_ns / 1e6,
        }


def _classify(
    runner: "Runner",
    names: list[str],
    options: _Options,
    log: Path | None,
    slider: "Slider | None",
) -> int:
    """Answer all inputs; the exit code of the first that failed, or 0."""
    import io
    import os
    import signal
    import sys

    from edgeexit.inputs import STDIN, read_inputs
    from edgeexit.journal import Journal, Summary

    if STDIN in names and sys.stdin is None:
        raise UsageError("-: standard input is closed, expected frames")
    stdin = io.BytesIO() if sys.stdin is None else sys.stdin.buffer
    bundle = runner.bundle
    summary = Summary(bundle.exits)
    journal = Journal(log) if log is not None else None
    # os.write: the handler may come in the middle of a print.
    previous = signal.signal(
        signal.SIGUSR1, lambda *_: os.write(2, f"{summary.text()}\n".encode()) and None
    )
    code = 0
    positions: set[int] = set()
    try:
        for name, sample in read_inputs(names, bundle.preprocess, bundle.input.shape[1:], stdin):
            try:
                if isinstance(sample, EdgeExitError):
                    raise sample
                if slider is not None:
                    slider.move()
                prediction = runner(sample)
            except EdgeExitError as error:
                place = "" if name in str(error) else f"{name}: "
                show_error(f"{place}{error}")
                summary.failed += 1
                code = code or error.exit_code
                continue
            summary.add(prediction)
            answer = options.answer(name, prediction)
            if slider is not None:
                answer["position"] = slider.position
                positions.add(slider.position)
                slider.note(prediction.latency_ns)
            if journal is not None:
                journal.write(answer)
            if options.all_exits:
                answer["logits"] = runner.logits(sample).tolist()
            if options.top is not None:
                answer["top"] = _top(prediction, bundle.class_names, options.top)
            _show(answer, bundle, options.as_json)
            if options.annotate is not None:
                _annotate(sample, answer, bundle, options.annotate, summary.count)
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGUSR1, previous)
        if journal is not None:
            journal.close()
    if summary.count + summary.failed != 1:
        click.echo(summary.text(), err=True)
    if slider is not None and positions:
        ends = slider.track.positions
        click.echo(
            f"slide: positions {min(positions)}..{max(positions)} of {ends[0]}..{ends[-1]} "
            "(the highest leaves earliest)",
            err=True,
        )
    return code


def _echo_json(document: dict[str, Any]) -> None:
    import json

    from edgeexit.files import encoded_json

    click.echo(encoded_json(json.dumps(document, ensure_ascii=False, allow_nan=False)))


def _show(answer: dict[str, Any], bundle: "Bundle", as_json: bool) -> None:
    if as_json:
        _echo_json(answer)
        return
    click.echo(
        f"{printable(answer['input'])}: {answer['class']}  {answer['confidence']:.3f}  "
        f"{bundle.exits[answer['exit']]}  {answer['latency_ms']:.3f} ms"
    )
    for entry in answer.get("top", ()):
        click.echo(f"    {entry['probability']:.3f}  {entry['class']}")
    for name, row in zip(bundle.exits, answer.get("logits", ()), strict=False):
        click.echo(f"    {name}  " + " ".join(f"{value:.2f}" for value in row))


def _top(prediction: "Prediction", names: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    import numpy as np

    logits = np.nan_to_num(prediction.logits.astype(np.float64))
    weights = np.exp(logits - logits.max())
    shares = weights / weights.sum()
    order = np.argsort(-shares, kind="stable")[:count]
    return [
        {"label": int(k), "class": names[k], "probability": round(float(shares[k]), 6)}
        for k in order
    ]


def _annotate(
    sample: "NDArray[Any]", answer: dict[str, Any], bundle: "Bundle", folder: Path, number: int
) -> None:
    import numpy as np
    from PIL import Image, ImageDraw

    from edgeexit.errors import storage
    from edgeexit.preprocess import fit_sample

    pixels = fit_sample(sample, bundle.preprocess)
    if bundle.preprocess.color == "bgr":
        pixels = pixels[..., ::-1]
    pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture = Image.fromarray(pixels).convert("RGB")
    factor = max(1, 224 // picture.width)
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    canvas = Image.new("RGB", (picture.width, picture.height + 16))
    canvas.paste(picture, (0, 0))
    text = f"{answer['class']} {answer['confidence']:.2f} {bundle.exits[answer['exit']]}"
    # Pillow's built-in bitmap font knows Latin-1 only.
    text = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(canvas).text((2, picture.height + 2), text, fill="white")
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(answer["input"]).stem)
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        canvas.save(folder / f"{number:06d}-{stem[:80]}.png")
