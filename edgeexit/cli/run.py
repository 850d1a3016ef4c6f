"""`edgeexit run`: classify pictures, arrays or live frames, or run the bundle's self-test."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import finite, one_line, show_error
from edgeexit.cli.answers import Shown, echo_json
from edgeexit.errors import EdgeExitError, UsageError

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.inputs import Item
    from edgeexit.journal import Journal
    from edgeexit.live import Live
    from edgeexit.notify import Notifier
    from edgeexit.serve import Served


@click.command("run", short_help="classify, stopping at the first exit that is sure enough")
@click.argument("inputs", nargs=-1)
@click.option("--bundle", type=click.Path(path_type=Path), help="default: the only *.edgeexit here")
@click.option("--app", metavar="NAME", help="run what was deployed here under NAME")
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
@click.option(
    "--rate", type=click.FloatRange(0.1, 10_000), help="at most so many live frames a second"
)
@click.option("--changes", is_flag=True, help="show and log an answer only if its class is new")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def command(
    inputs: tuple[str, ...],
    bundle: Path | None,
    app: str | None,
    rate: float | None,
    log: Path | None,
    **options: Any,
) -> None:
    """
    Classify INPUTS: pictures, folders, patterns, .npy or .npz files, - for frames on stdin, or
    one live source.

    \b
    edgeexit run image.png another.png    # the only bundle here
    edgeexit run fashion.edgeexit photos/
    edgeexit run                          # no input: the bundle's self-test
    edgeexit run photos/ --slide latency=8ms
    edgeexit run camera: --changes        # the board's camera, by picamera2
    edgeexit run --app fashion v4l2:/dev/video0,size=640x480,fps=30 --rate 5
    edgeexit run clip.mp4                 # every frame of a video
    edgeexit run watch:incoming/          # pictures that come into a folder from now on
    edgeexit run replay:photos/,fps=30    # a folder, array file or video as if it were a camera
    edgeexit run my_sensor:Source         # module:attribute of a package, see docs/formats.md

    A bad input is reported and the others go on; the exit code is then the first one's (3 for
    a bad file). A summary goes to stderr at the end and on SIGUSR1. A frame is a 4-byte
    little-endian length and an encoded picture or .npy file.

    Of a camera the newest frame is answered, older ones are dropped and counted. A camera that
    hangs or goes away is opened anew; one that stays away ends the run with exit code 5. SIGTERM
    ends after the frame (exit code 143). With --app another release that is deployed meanwhile
    is taken up between two frames. v4l2 and videos need ffmpeg.

    --slide looks at the board between inputs and takes a stricter or looser policy of those that
    tune certified together: low battery (percent), heat (degrees Celsius) or slow answers (mean
    latency) make it leave earlier, never beyond what was certified.
    """
    from edgeexit.bundle import load_bundle
    from edgeexit.names import only_bundle_here

    names = list(inputs)
    if bundle is None and names and names[0].rstrip("/").endswith(".edgeexit"):
        bundle = Path(names.pop(0))
    if app is not None and bundle is not None:
        raise UsageError(f"--app {app} names what to run, and so does {bundle}: leave one out")
    wish = _wish(names, rate, options)
    if app is not None:
        from edgeexit.names import board_home
        from edgeexit.releases import Releases

        releases = Releases(board_home(), app, tell=_note)
        if not names:
            _selftest(load_bundle(releases.open()), wish)
            return
        from edgeexit.serve import Served

        served = Served(releases, lambda new: _Station(new, wish), tell=_note, threads=wish.threads)
        with contextlib.closing(served):
            code = _classify(served.now, names, wish, log, served)
    else:
        loaded = load_bundle(only_bundle_here() if bundle is None else bundle)
        if not names:
            _selftest(loaded, wish)
            return
        with contextlib.closing(_Station(loaded, wish)) as station:
            code = _classify(station, names, wish, log)
    if code:
        raise click.exceptions.Exit(code)


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What the command line asks for, whichever bundle answers; *source* if it is a live one."""

    source: str | None
    rate: float | None
    policy: str
    device: str | None
    threads: int
    at_once: bool
    slide: Any
    shown: dict[str, Any]

    @property
    def all_exits(self) -> bool:
        return bool(self.shown["all_exits"])

    @property
    def runners_policy(self) -> str | None:
        """The policy as a Runner takes it."""
        return None if self.all_exits or self.policy == "none" else self.policy


def _wish(names: list[str], rate: float | None, options: dict[str, Any]) -> _Wish:
    from edgeexit.inputs import STDIN
    from edgeexit.sources import find

    slide, policy, device = options["slide"], options["policy"], options["device"]
    wanted = None
    if slide is not None:
        from edgeexit.slide import parse_slide

        wanted = parse_slide(slide)
        if not names:
            raise UsageError(
                "--slide moves a policy between inputs: none given, and the self-test has none",
                hint="edgeexit run photos/ --slide latency=8ms",
            )
        if options["all_exits"] or policy == "none":
            raise UsageError(
                "--slide moves a policy, and "
                + ("--all-exits" if options["all_exits"] else "--policy none")
                + " runs without one",
                hint="leave one of them out",
            )
    if names and options["all_exits"] and policy not in ("auto", "none"):
        raise UsageError("--all-exits stops nowhere: leave --policy out")
    live = [name for name in names if name != STDIN and find(name) is not None]
    if live and len(names) > 1:
        raise UsageError(f"{live[0]}: a live source stands alone, found {len(names)} inputs")
    if rate is not None and not live:
        raise UsageError("--rate is for live sources", hint="edgeexit run camera: --rate 5")
    if device is not None:
        from edgeexit.device import find_device

        device = find_device(device).name
    return _Wish(
        source=live[0] if live else None,
        rate=rate,
        policy=policy,
        device=device,
        threads=options["threads"],
        at_once=options["preload"] or STDIN in names or bool(live) or wanted is not None,
        slide=wanted,
        shown={
            "top": options["top"],
            "min_confidence": options["min_confidence"],
            "annotate": options["annotate"],
            "all_exits": options["all_exits"],
            "as_json": options["as_json"],
            "only_changes": options["changes"],
        },
    )


def _note(text: str) -> None:
    click.echo(f"Note: {one_line(text)}", err=True)


def _selftest(bundle: "Bundle", wish: _Wish) -> None:
    from edgeexit.runtime import Runner
    from edgeexit.selftest import run_selftest

    with Runner(bundle, wish.runners_policy, wish.threads, device=wish.device) as runner:
        policy = None if runner.policy_origin == "none" else runner.policy
    report = run_selftest(bundle, wish.threads, policy)
    if wish.shown["as_json"]:
        echo_json(report.to_document())
        return
    click.echo(
        f"self-test ok: {report.samples} samples, all {len(bundle.exits)} exits, {report.runtime}"
    )
    if report.differing:
        click.echo(str(report))


class _Station:
    """What changes with a release: the runner, the slider on it, how answers look, their sum."""

    def __init__(self, bundle: "Bundle", wish: _Wish) -> None:
        from edgeexit.journal import Summary
        from edgeexit.runtime import Runner

        self.bundle = bundle
        self.shown = Shown(bundle, **wish.shown)
        self.summary = Summary(bundle.exits)
        policy, device = wish.runners_policy, wish.device
        self.runner = Runner(bundle, policy, wish.threads, wish.at_once, device=device)
        self.slider = None
        self.positions: set[int] = set()
        try:
            if wish.slide is not None:
                from edgeexit.slide import Slider

                self.slider = Slider(self.runner, wish.slide)
        except BaseException:
            self.close()
            raise
        if self.runner.notice:
            _note(self.runner.notice)

    def close(self) -> None:
        self.runner.close()

    def answer(self, name: str, sample: Any, live: "Live | None") -> dict[str, Any] | None:
        """Classify and show one sample; the answer if it is news."""
        if self.slider is not None:
            self.slider.move()
        prediction = self.runner(sample)
        self.summary.add(prediction)
        answer = self.shown.answer(name, prediction)
        if live is not None:
            answer |= live.facts()
        if self.slider is not None:
            answer["position"] = self.slider.position
            self.positions.add(self.slider.position)
            self.slider.note(prediction.latency_ns)
        if not self.shown.is_news(answer):
            return None
        told = dict(answer)
        self.shown.show(answer, prediction, self.runner, sample, self.summary.count)
        return told

    def tell_sum(self) -> None:
        """Say on stderr what came of all inputs."""
        if self.summary.count + self.summary.failed != 1:
            click.echo(self.summary.text(), err=True)
        if self.slider is not None and self.positions:
            ends = self.slider.track.positions
            click.echo(
                f"slide: positions {min(self.positions)}..{max(self.positions)} of "
                f"{ends[0]}..{ends[-1]} (the highest leaves earliest)",
                err=True,
            )


def _classify(
    station: _Station,
    names: list[str],
    wish: _Wish,
    log: Path | None,
    served: "Served[_Station] | None" = None,
) -> int:
    """Answer all inputs; the exit code of the first that failed, or 0."""
    import os
    import signal

    from edgeexit.journal import Journal
    from edgeexit.live import Ending, Live, Terminated
    from edgeexit.notify import Notifier

    notifier = Notifier()
    if notifier.is_heard and served is None:  # a release was tested when it was opened
        from edgeexit.selftest import run_selftest

        run_selftest(station.bundle, wish.threads)
    live = None
    if wish.source is not None:
        taken = station.bundle.preprocess, station.bundle.input.shape[1:]
        live = Live(wish.source, *taken, tell=_note, rate_hz=wish.rate)
    work = _Work(station, live, notifier, Journal(log) if log is not None else None)
    # os.write: the handler may come in the middle of a print.
    previous = signal.signal(
        signal.SIGUSR1, lambda *_: os.write(2, f"{work.station.summary.text()}\n".encode()) and None
    )
    try:
        with Ending() as ending:
            notifier.ready(f"{station.bundle.name} answers {' '.join(names)}")
            for item in _read(names, station.bundle) if live is None else live:
                with ending.frame():
                    work.answer(item)
                if served is not None and live is not None and served.renew():
                    work.move_to(served.now)
    except KeyboardInterrupt:
        work.code = 130
    except Terminated as end:
        work.code = end.exit_code
    finally:
        notifier.stopping()
        signal.signal(signal.SIGUSR1, previous)
        work.close()
    return work.code


def _read(names: list[str], bundle: "Bundle") -> "Iterator[Item]":
    import io
    import sys

    from edgeexit.inputs import STDIN, read_inputs

    if STDIN in names and sys.stdin is None:
        raise UsageError("-: standard input is closed, expected frames")
    stdin = io.BytesIO() if sys.stdin is None else sys.stdin.buffer
    return read_inputs(names, bundle.preprocess, bundle.input.shape[1:], stdin)


class _Work:
    """Answers items, and remembers the exit code of the first that failed."""

    def __init__(
        self,
        station: _Station,
        live: "Live | None",
        notifier: "Notifier",
        journal: "Journal | None",
    ) -> None:
        self.station, self.code = station, 0
        self._live, self._notifier, self._journal = live, notifier, journal

    def answer(self, item: "Item | None") -> None:
        """One item: a sample, an error in its place, or None if there is nothing now."""
        if item is not None:
            name, sample = item
            try:
                if isinstance(sample, EdgeExitError):
                    raise sample
                told = self.station.answer(name, sample, self._live)
            except EdgeExitError as error:
                place = "" if name in str(error) else f"{name}: "
                show_error(f"{place}{error}")
                self.station.summary.failed += 1
                self.code = self.code or error.exit_code
                return
            if told is not None and self._journal is not None:
                self._journal.write(told)
        # Only here: a frame was answered, or the source has said that there is none.
        self._notifier.alive()

    def move_to(self, station: _Station) -> None:
        """Let another release answer from the next frame on."""
        self.station.tell_sum()
        self.station = station
        if self._live is not None:
            self._live.refit(station.bundle.preprocess, station.bundle.input.shape[1:])
        self._notifier.status(f"{station.bundle.name} answers")

    def close(self) -> None:
        """Close everything but the station, and say what came of it."""
        try:
            if self._live is not None:
                self._live.close()
        finally:
            if self._journal is not None:
                self._journal.close()
        has_begun = self._live is None or self._live.has_begun
        if has_begun:
            self.station.tell_sum()
        if self._live is not None and has_begun:
            click.echo(self._live.text(), err=True)
