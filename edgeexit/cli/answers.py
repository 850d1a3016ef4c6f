"""How `edgeexit run` shows its answers: lines of text or JSON, and labelled pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeexit.bundle import Bundle
    from edgeexit.runtime import Prediction, Runner


class Shown:
    """
    How an answer is shown. UsageError if the bundle's samples cannot be drawn on.

    *only_changes* leaves out answers of the class that was shown last.
    """

    def __init__(
        self,
        bundle: "Bundle",
        *,
        top: int | None,
        min_confidence: float | None,
        annotate: Path | None,
        all_exits: bool,
        as_json: bool,
        only_changes: bool,
    ) -> None:
        self.bundle, self.top, self.min_confidence = bundle, top, min_confidence
        self.annotate, self.all_exits, self.as_json = annotate, all_exits, as_json
        self._only_changes = only_changes
        self._last: object = None
        if annotate is not None and bundle.preprocess.kind != "image":
            raise UsageError("--annotate draws on pictures, this bundle takes arrays")

    def answer(self, name: str, prediction: "Prediction") -> dict[str, Any]:
        """What is said of one sample, ready for JSON."""
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

    def is_news(self, answer: dict[str, Any]) -> bool:
        """Whether *answer* is to be shown at all."""
        is_same = self._only_changes and answer["class"] == self._last
        self._last = answer["class"]
        return not is_same

    def show(
        self,
        answer: dict[str, Any],
        prediction: "Prediction",
        runner: "Runner",
        sample: "NDArray[Any]",
        number: int,
    ) -> None:
        """Print *answer*, and draw it if that is wanted."""
        if self.all_exits:
            answer["logits"] = runner.logits(sample).tolist()
        if self.top is not None:
            answer["top"] = _top(prediction, self.bundle.class_names, self.top)
        if self.as_json:
            echo_json(answer)
        else:
            self._echo(answer)
        if self.annotate is not None:
            _annotate(sample, answer, self.bundle, self.annotate, number)

    def _echo(self, answer: dict[str, Any]) -> None:
        click.echo(
            f"{printable(answer['input'])}: {answer['class']}  {answer['confidence']:.3f}  "
            f"{self.bundle.exits[answer['exit']]}  {answer['latency_ms']:.3f} ms"
        )
        for entry in answer.get("top", ()):
            click.echo(f"    {entry['probability']:.3f}  {entry['class']}")
        for name, row in zip(self.bundle.exits, answer.get("logits", ()), strict=False):
            click.echo(f"    {name}  " + " ".join(f"{value:.2f}" for value in row))


def echo_json(document: dict[str, Any]) -> None:
    """Print *document* as one line."""
    import json

    from edgeexit.files import encoded_json

    click.echo(encoded_json(json.dumps(document, ensure_ascii=False, allow_nan=False)))


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
