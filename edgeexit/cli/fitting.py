"""What the commands that train share: bars, and the comparison at the end."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import progress
from edgeexit.cli.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeexit.host.comparison import Comparison
    from edgeexit.host.fit import Step
    from edgeexit.host.recipe import DataPart

RANGES_SAMPLES = 500


class Bars:
    """One bar for each epoch, one line when it ends; *whole_epochs* have ended."""

    def __init__(self) -> None:
        self._bar: Any = None
        self.whole_epochs = 0

    def __call__(self, step: "Step", what: str = "") -> None:
        """Show *step* of the training *what*."""
        label = f"{what}  epoch {step.epoch}/{step.epochs} ({step.phase})".strip()
        if step.accuracies is not None:
            self.close()
            self.whole_epochs = step.epoch
            figures = "  ".join(f"{k} {100 * v:.2f} %" for k, v in step.accuracies.items())
            best = "  (best so far)" if step.is_best else ""
            click.echo(f"{label}  {figures}{best}", err=True)
            return
        if self._bar is None:
            self._bar = progress(length=step.batches, label=label, show_pos=True)
            self._bar.__enter__()
        self._bar.update(1)

    def close(self) -> None:
        """End the bar under way, if there is one."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def compared(
    before: Path, after: Path, data: "DataPart", calibration: str | None, arch: str | None
) -> "Comparison":
    """Both checkpoints as int8 on held-out training samples, their latencies raced here."""
    import tempfile

    from edgeexit.host.answers import RealSamples, spread
    from edgeexit.host.assess import assess, held_out
    from edgeexit.host.checkpoint import load_checkpoint
    from edgeexit.host.comparison import comparison
    from edgeexit.host.graph import analyse
    from edgeexit.host.prune.engine import training_half
    from edgeexit.samples import is_set, load_samples

    steps = Steps()
    networks = [load_checkpoint(path, arch=arch) for path in (before, after)]
    material, _ = training_half(networks[1], str(after), data)
    source = calibration or networks[1].calibration_set
    if source is None:
        some = material.training[spread(len(material.training))[:RANGES_SAMPLES]]
        reals = RealSamples(material.data.samples[some], material.preprocess)
    else:
        facts = networks[1]
        name = f"{source}:ranges" if is_set(source) else source
        found = load_samples(
            name, facts.preprocess, facts.class_names, facts.input_shape, labels_required=False
        )
        reals = RealSamples(found.samples, facts.preprocess)
    samples, labels = held_out(material)
    with tempfile.TemporaryDirectory() as folder:
        judged = []
        for word, network in zip(("before", "after"), networks, strict=True):
            judged.append(
                assess(
                    network.model,
                    graph=analyse(network.model, network.input_shape),
                    samples=samples,
                    labels=labels,
                    preprocess=network.preprocess,
                    input_shape=network.input_shape,
                    class_names=network.class_names,
                    reals=reals,
                    folder=Path(folder) / f"{word}.edgeexit",
                    on_step=_named(steps, word),
                )
            )
        return comparison(*judged, on_step=lambda done: steps("race", done))


def _named(steps: Steps, word: str) -> "Callable[[str, float], None]":
    return lambda name, done: steps(f"{word}: {name}", done)
