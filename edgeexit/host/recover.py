"""
Bring back what int8 costs: even out channels, correct biases, then fine-tune a little.

Callers see recover (a network in memory), recover_checkpoint (a file), and two of the remedies:
bias_correct and quantization_aware. Hidden here: what counts is the real int8 file. Each remedy
is tried on a copy, turned into that file and judged by its answers to held-out training samples;
what makes them no better is thrown away.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.files import check_output
from edgeexit.host.answers import RealSamples
from edgeexit.host.assess import (
    float_accuracies,
    held_out,
    int8_accuracies,
    int8_bundle,
    ranges_of,
)
from edgeexit.host.checkpoint import load_checkpoint, save_again
from edgeexit.host.equalise import equalise
from edgeexit.host.fakequant import Simulated
from edgeexit.host.feed import to_input
from edgeexit.host.fit import Fit, Material, Step, holdout_accuracies
from edgeexit.host.graph import analyse
from edgeexit.host.material import Origin
from edgeexit.host.prune.engine import training_half
from edgeexit.host.recipe import Augmentation, DataPart, TrainingPart
from edgeexit.host.train import seen
from edgeexit.preprocess import real_values
from edgeexit.report import text_table

THRESHOLD = 0.01
CUTS = (1.0, 0.1, 0.01)
MOST_INPUTS = 256
MOST_VALUES = 1 << 22  # of all inputs together: 256 of a thumbnail, 32 of 224x224x3


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """
    One remedy, or "as it is": the int8 file's held-out accuracy of each exit, and its fate.

    No accuracies: the remedy did not apply to this network, or even simulated it was no better.
    """

    name: str
    accuracies: Mapping[str, float]
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """
    What was tried: *floats* are the untouched network's accuracies on the same *samples*.

    *attempts* begin with the network as it is; its biggest loss decides whether more follow.
    """

    floats: Mapping[str, float]
    samples: int
    threshold: float
    attempts: tuple[Attempt, ...]

    @property
    def best(self) -> Attempt:
        """The attempt whose weights the network now has."""
        return next(attempt for attempt in reversed(self.attempts) if attempt.is_kept)

    def loss(self, attempt: Attempt) -> float:
        """The most that any exit loses by int8 after *attempt*, as a share of the samples."""
        return max(self.floats[name] - found for name, found in attempt.accuracies.items())

    def text(self) -> str:
        """A table: what each attempt's int8 file answers right, and what came of it."""
        exits = list(self.floats)
        rows = [["float", *(f"{self.floats[name]:.2%}" for name in exits), ""]]
        for attempt in self.attempts:
            found = attempt.accuracies
            shares = [f"{found[name]:.2%}" if name in found else "-" for name in exits]
            fate = "kept" if attempt.is_kept else "no better"
            rows.append([f"int8, {attempt.name}", *shares, fate])
        return (
            f"Right of {self.samples} held-out training samples:\n\n"
            + text_table(["", *exits, ""], rows)
            + f"\n\nint8 costs at most {100 * max(self.loss(self.best), 0):.2f} points now "
            f"({100 * max(self.loss(self.attempts[0]), 0):.2f} before)."
        )

    def to_document(self) -> dict[str, Any]:
        """The result as plain values, for --json and a checkpoint's metadata."""
        return {
            "samples": self.samples,
            "threshold": self.threshold,
            "float_accuracies": dict(self.floats),
            "attempts": [
                {"name": a.name, "int8_accuracies": dict(a.accuracies), "kept": a.is_kept}
                for a in self.attempts
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What recover_checkpoint wrote to *path*, and how it came to be."""

    path: Path
    recovery: Recovery

    def to_document(self) -> dict[str, Any]:
        """The result as plain values, for --json."""
        return {"checkpoint": str(self.path), **self.recovery.to_document()}


# Little is to be learnt anew, and nothing forgotten.
FINE_TUNE = TrainingPart(epochs=3, batch=64, learning_rate=1e-3, distillation=0.5)


def recover_checkpoint(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    again: bool = False,
    data: DataPart | None = None,
    moves: Mapping[str, Any] | None = None,
    part: TrainingPart = FINE_TUNE,
    calibration: str | None = None,
    on_attempt: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Recovered:
    """
    Recover the checkpoint *source* and write *out*, also where there was nothing to recover.

    *data* names the training samples where the checkpoint does not, *moves* are changes of its
    augmentation, *calibration* is as for convert.
    UsageError if *out* is there and not *again*, or for data that will not do; otherwise as
    load_checkpoint and recover. Nothing is written unless all went well.
    """
    check_output(out, source, None if data is None else data.path)
    if out.exists() and not again:
        raise UsageError(
            f"{out}: is there already", hint="name another file with -o, or replace it with --again"
        )
    checkpoint = load_checkpoint(source, arch=arch)
    before = Origin.of(checkpoint.metadata, str(source)).augmentation or Augmentation()
    material, origin = training_half(
        checkpoint, str(source), data or DataPart(), replace(before, **(moves or {}))
    )
    recovery = recover(
        checkpoint.model,
        material,
        part,
        ranges_of(checkpoint, material, calibration),
        input_shape=checkpoint.input_shape,
        where=str(source),
        on_attempt=on_attempt,
        on_step=on_step,
    )
    save_again(
        out,
        checkpoint,
        checkpoint.model,
        training_digests=seen(material.data.samples, checkpoint.training_bloom),
        metadata={
            "recovered_from": checkpoint.digest,
            "recovery": recovery.to_document(),
            "holdout_accuracies": holdout_accuracies(checkpoint.model, material),
            **origin.to_metadata(),
        },
    )
    return Recovered(path=out, recovery=recovery)


def typical(reals: RealSamples) -> torch.Tensor:
    """Up to 256 of *reals*, spread over all, as the network takes them: float32 (N, ...)."""
    each = max(1, int(np.prod(reals.samples.shape[1:])))
    some = reals.first(max(32, min(MOST_INPUTS, MOST_VALUES // each)))
    values = to_input(real_values(some.samples, reals.preprocess), reals.preprocess)
    return values.contiguous()


def bias_correct(model: nn.Module, reals: RealSamples, *, ranges: str = "minmax") -> int:
    """
    Shift the biases of *model* in place so that int8 keeps each layer's mean output.

    See Simulated.correct_biases; *reals* are samples as for activation ranges, *ranges* is how
    the int8 file reads them (ranges.RANGES). Returns how many layers were shifted.
    """
    return Simulated(model, typical(reals), ranges).correct_biases()


def quantization_aware(
    model: nn.Module,
    material: Material,
    part: TrainingPart,
    reals: RealSamples,
    *,
    where: str,
    ranges: str = "minmax",
    on_step: Callable[[Step], None] | None = None,
) -> bool:
    """
    Fine-tune *model* in place while it is computed as int8 (Jacob et al. 2018, section 3).

    Trained by *part* (all weights, whatever its regime) as Fit does; the rounding lets gradients
    pass, ranges are taken anew before each epoch, batch norms keep their statistics, and the
    epoch is kept that is best on held-out samples as simulated int8. A learning rate at which
    nothing gets better, or a loss, weight or range becomes infinite, is cut to a tenth, twice at
    most: where channels differ much, steps must be small. Returns whether the simulated network
    got better; if not, *model* is as it was. Errors as Fit for a *part* that does not fit.
    """
    inputs = typical(reals)
    before = copy.deepcopy(model.state_dict())
    judged = _mean(holdout_accuracies(Simulated(model, inputs, ranges), material))
    for cut in CUTS:
        simulated = Simulated(model, inputs, ranges)
        # All weights move together: rounding in one place is made up for in another.
        joint = replace(
            part, regime="joint", phase_shares=(), learning_rate=part.learning_rate * cut
        )
        fit = Fit(simulated, material, joint, where=where)
        try:
            while not fit.is_done:
                simulated.calibrate()
                fit.run_epoch(on_step)
        except (UsageError, BadFile):  # what diverging raises; Fit has checked part already
            fit.best_accuracies = {}
        if fit.best_accuracies and _mean(fit.best_accuracies) > judged:
            model.eval()
            return True
        model.load_state_dict(before)
    model.eval()
    return False


def recover(
    model: nn.Module,
    material: Material,
    part: TrainingPart,
    reals: RealSamples,
    *,
    input_shape: Sequence[int],
    where: str,
    threshold: float = THRESHOLD,
    on_attempt: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Recovery:
    """
    Give *model*, in place, the weights whose int8 file answers best; its layers stay as they are.

    As long as int8 costs some exit more than *threshold* (a share of the held-out samples, of
    which up to 2,000 judge), the next remedy is tried: channels are evened out, biases
    corrected, and last the network is fine-tuned as int8, by *part*. A remedy stays only if the
    mean over the exits of the real int8 file's accuracy rises. *reals* give activation ranges.
    *on_attempt* hears a remedy's name before it is tried. Errors as int8_bundle and Fit.
    """
    samples, labels = held_out(material)

    def judged(candidate: nn.Module, name: str) -> tuple[Attempt, str]:
        with tempfile.TemporaryDirectory(prefix="edgeexit-") as folder:
            bundle = int8_bundle(
                candidate,
                input_shape=input_shape,
                preprocess=material.preprocess,
                class_names=material.data.class_names,
                reals=reals,
                folder=Path(folder) / "recover",
            )
            found = int8_accuracies(bundle, samples, labels)
            chosen = str(bundle.provenance["ranges"]["chosen"])
        is_kept = not attempts or _mean(found) > _mean(attempts[kept].accuracies)
        return Attempt(name=name, accuracies=found, is_kept=is_kept), chosen

    def even_out(candidate: nn.Module, _ranges: str) -> bool:
        try:
            graph = analyse(candidate, input_shape)
        except Unsupported:
            return False
        return bool(equalise(candidate, graph, typical(reals)))

    def tune(candidate: nn.Module, ranges: str) -> bool:
        return quantization_aware(
            candidate, material, part, reals, where=where, ranges=ranges, on_step=on_step
        )

    remedies: dict[str, Callable[[nn.Module, str], bool]] = {
        "equalise channels": even_out,
        "correct biases": lambda net, ranges: bias_correct(net, reals, ranges=ranges) > 0,
        "fine-tune as int8": tune,
    }
    attempts: list[Attempt] = []
    kept = 0
    tell = on_attempt or (lambda name: None)
    tell("as it is")
    floats = float_accuracies(model, samples, labels, material.preprocess)
    first, ranges = judged(model, "as it is")
    attempts.append(first)
    for name, remedy in remedies.items():
        now = attempts[kept].accuracies
        if max(floats[exit] - now[exit] for exit in floats) <= threshold:
            break
        tell(name)
        candidate = copy.deepcopy(model)
        if not remedy(candidate, ranges):
            attempts.append(Attempt(name=name, accuracies={}, is_kept=False))
            continue
        attempt, chosen = judged(candidate, name)
        attempts.append(attempt)
        if attempt.is_kept:
            kept, ranges = len(attempts) - 1, chosen
            model.load_state_dict(candidate.state_dict())
    return Recovery(
        floats=floats, samples=len(labels), threshold=threshold, attempts=tuple(attempts)
    )


def _mean(accuracies: Mapping[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)
