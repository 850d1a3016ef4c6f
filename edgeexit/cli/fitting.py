"""What the commands that train share: bars, and the comparison at the end."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import progress
from edgeexit.cli.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgeexit.host.assess import Assessment
    from edgeexit.host.comparison import Comparison
    from edgeexit.host.fit import Step
    from edgeexit.host.recipe import DataPart


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
    from edgeexit.host.comparison import comparison

    steps = Steps()
    paths = {"before": before, "after": after}
    with _assessed(paths, data, calibration, arch, steps) as (old, new):
        return comparison(old, new, on_step=lambda done: steps("race", done))


def assessed(
    path: Path, data: "DataPart", calibration: str | None, arch: str | None
) -> "Assessment":
    """The checkpoint as int8 on held-out training samples, its latencies measured here."""
    with _assessed({"": path}, data, calibration, arch, Steps()) as (found,):
        return found


@contextmanager
def _assessed(
    paths: "Mapping[str, Path]",
    data: "DataPart",
    calibration: str | None,
    arch: str | None,
    steps: Steps,
) -> "Iterator[list[Assessment]]":
    """
    The checkpoints, named for the steps shown, judged on one hold-out: the last one's.

    Their bundles are there as long as the context.
    """
    import tempfile

    from edgeexit.host.assess import assess, held_out, ranges_of
    from edgeexit.host.checkpoint import load_checkpoint
    from edgeexit.host.graph import analyse
    from edgeexit.host.prune.engine import training_half
    from edgeexit.host.purpose import Purpose

    purpose = Purpose.of_samples(calibration)
    networks = {
        word: load_checkpoint(path, arch=arch, purpose=purpose) for word, path in paths.items()
    }
    word, last = list(networks.items())[-1]
    material, _ = training_half(last, str(paths[word]), data)
    reals = ranges_of(last, material, calibration)
    samples, labels = held_out(material)
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as folder:
        yield [
            assess(
                network.model,
                graph=analyse(network.model, network.input_shape),
                samples=samples,
                labels=labels,
                preprocess=network.preprocess,
                input_shape=network.input_shape,
                class_names=network.class_names,
                reals=reals,
                folder=Path(folder) / f"net{number}.edgeexit",
                on_step=_named(steps, word),
            )
            for number, (word, network) in enumerate(networks.items())
        ]


def _named(steps: Steps, word: str) -> "Callable[[str, float], None]":
    return lambda name, done: steps(f"{word}: {name}" if word else name, done)
