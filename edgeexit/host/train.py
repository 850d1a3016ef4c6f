"""
Train a multi-exit network from a recipe: all exits together, the best epoch kept.

Callers see train(). Hidden here: the one-cycle schedule, the state file beside the output
that lets the same command go on after an interruption, and the rule which epoch is best (the
exits' held-out accuracies, weighted as in the loss). An interrupted and resumed training
computes what an uninterrupted one does.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.files import read_bytes, write_file
from edgeexit.host.checkpoint import build_network, load_checkpoint, save_checkpoint
from edgeexit.host.feed import TrainingSet, batches, split_holdout, training_samples
from edgeexit.host.model import exit_outputs
from edgeexit.host.recipe import Recipe, TrainingPart, read_recipe
from edgeexit.names import choose
from edgeexit.overlap import Bloom, sample_digests
from edgeexit.preprocess import Preprocess, real_values

STATE_FORMAT = 1
MAX_STATE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Step:
    """Progress: *epoch* of *epochs* (from 1), *batch* of *batches*; *accuracies* at its end."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    accuracies: dict[str, float] | None = None
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """What came out: the checkpoint's *path*, held-out accuracy of each exit, the kept epoch."""

    path: Path
    accuracies: dict[str, float]
    best_epoch: int
    epochs: int
    was_done: bool

    def to_document(self) -> dict[str, Any]:
        """The result as plain values, for --json."""
        return {
            "checkpoint": str(self.path),
            "holdout_accuracies": self.accuracies,
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "was_done": self.was_done,
        }


def joint_loss(
    logits: list[torch.Tensor], labels: torch.Tensor, weights: list[float], part: TrainingPart
) -> torch.Tensor:
    """
    The exits' cross entropies, weighted and summed (BranchyNet, Teerapittayanon et al. 2016).

    With *distillation* > 0 each early exit also imitates the final one's probabilities, which
    are not moved by it (Phuong & Lampert 2019): fewer answers of early exits then contradict
    the full network.
    """
    losses = [
        weight * cross_entropy(one, labels, label_smoothing=part.label_smoothing)
        for one, weight in zip(logits, weights, strict=True)
    ]
    if part.distillation:
        teacher = softmax(logits[-1].detach(), dim=1)
        losses += [
            part.distillation * weight * cross_entropy(one, teacher)
            for one, weight in zip(logits[:-1], weights[:-1], strict=True)
        ]
    return torch.stack(losses).sum()


Loss = Callable[[list[torch.Tensor], torch.Tensor, list[float], TrainingPart], torch.Tensor]
REGIMES: dict[str, Loss] = {"joint": joint_loss}


def to_input(real: NDArray[np.float32], preprocess: Preprocess) -> torch.Tensor:
    """Real numbers (N, H, W, C) or (N, ...) as the network's input, without copying."""
    tensor = torch.from_numpy(real)
    return tensor.permute(0, 3, 1, 2) if preprocess.layout == "nchw" else tensor


def holdout_accuracies(
    model: nn.Module, data: TrainingSet, indices: NDArray[Any], preprocess: Preprocess, batch: int
) -> dict[str, float]:
    """Share of right answers of each exit on the samples *indices*, dropout and the like off."""
    right: dict[str, int] = {}
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            inputs = to_input(real_values(data.samples[chosen], preprocess), preprocess)
            labels = torch.from_numpy(data.labels[chosen])
            for name, logits in exit_outputs(model, inputs).items():
                right[name] = right.get(name, 0) + int((logits.argmax(1) == labels).sum())
    return {name: count / len(indices) for name, count in right.items()}


def train(
    recipe_path: Path,
    out: Path | None = None,
    *,
    arch: str | None = None,
    again: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Training:
    """
    Train by the recipe and write a checkpoint (default: the recipe's path with suffix .pt).

    A training that was interrupted goes on after its last whole epoch; one that is finished
    is not redone unless *again*. A recipe that names code outside edgeexit needs that name as
    *arch* too. UsageError, BadFile or Unsupported for a recipe or data that
    will not do; StorageError if the state or the checkpoint cannot be written.
    """
    recipe = read_recipe(recipe_path)
    out = recipe_path.with_suffix(".pt") if out is None else out
    done = None if again else _finished(out, recipe, arch)
    if done is not None:
        return done
    loss = choose(recipe.training.regime, REGIMES, "training regime")
    data = training_samples(recipe.data, recipe.preprocess, recipe.model.input_shape)
    session = _Session(recipe, data, loss, arch)
    state_path = out.with_name(out.name + ".state")
    if state_path.exists() and not again:
        session.resume(state_path)
    while session.epoch < recipe.training.epochs:
        session.run_epoch(on_step)
        write_file(state_path, session.state_bytes())
    session.save(out)
    state_path.unlink(missing_ok=True)
    return Training(
        path=out,
        accuracies=session.best_accuracies,
        best_epoch=session.best_epoch,
        epochs=session.epoch,
        was_done=False,
    )


def _finished(out: Path, recipe: Recipe, arch: str | None) -> Training | None:
    """The result that *out* already holds, or None if there is no such file."""
    if not out.exists():
        return None
    metadata = load_checkpoint(out, arch=arch).metadata
    if metadata.get("recipe_digest") != recipe.digest:
        raise UsageError(
            f"{out}: is there already and was not made by this recipe",
            hint="name another file with -o, or replace it with --again",
        )
    return Training(
        path=out,
        accuracies=dict(metadata["holdout_accuracies"]),
        best_epoch=int(metadata["best_epoch"]),
        epochs=int(metadata["epochs"]),
        was_done=True,
    )


class _Session:
    """One training under way: the network, its optimizer, and the best weights so far."""

    def __init__(self, recipe: Recipe, data: TrainingSet, loss: Loss, arch: str | None) -> None:
        part = recipe.training
        self.recipe, self.data, self.loss = recipe, data, loss
        torch.manual_seed(part.seed)
        self.model = build_network(
            recipe.model.arch, recipe.model.kwargs, f"{recipe.path}: model", arch=arch
        )
        if recipe.model.initial_weights is not None:
            self._take_weights(recipe.model.initial_weights, arch)
        if len(recipe.model.input_shape) == 4:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.names = self._check_model()
        self.weights = list(part.exit_weights) or [1.0] * len(self.names)
        if len(self.weights) != len(self.names):
            raise BadFile(
                f"{recipe.path}: training.exit_weights: found {len(self.weights)}, "
                f"the network has {len(self.names)} exits"
            )
        self.train_indices, self.holdout_indices = split_holdout(
            len(data.labels), recipe.data.holdout, part.seed
        )
        self.batches = len(self.train_indices) // part.batch
        if not self.batches:
            raise UsageError(f"{recipe.path}: training.batch: fewer training samples than that")
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=part.learning_rate,
            momentum=part.momentum,
            nesterov=part.momentum > 0,
            weight_decay=part.weight_decay,
        )
        # One step more than there are: the schedule's last value would stop all learning.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            part.learning_rate,
            total_steps=part.epochs * self.batches + 1,
            pct_start=part.warmup,
            cycle_momentum=False,
        )
        self.epoch = 0
        self.best_epoch = 0
        self.best_accuracies: dict[str, float] = {}
        self.best_state: dict[str, torch.Tensor] = {}

    def _take_weights(self, path: Path, arch: str | None) -> None:
        initial = load_checkpoint(path, arch=arch)
        try:
            self.model.load_state_dict(initial.model.state_dict())
        except RuntimeError as error:
            raise UsageError(
                f"{self.recipe.path}: model.initial_weights: {path} holds another network "
                f"({initial.arch})"
            ) from error

    def _check_model(self) -> list[str]:
        """Names of the exits, after one pass that shows input and classes to fit."""
        self.model.eval()
        try:
            with torch.inference_mode():
                outputs = exit_outputs(self.model, torch.zeros(self.recipe.model.input_shape))
        except RuntimeError as error:
            raise Unsupported(
                f"{self.recipe.path}: model.input_shape: the network refuses "
                f"{list(self.recipe.model.input_shape)}: {error}"
            ) from error
        classes = len(self.data.class_names)
        for name, logits in outputs.items():
            if tuple(logits.shape) != (1, classes):
                raise UsageError(
                    f"{self.recipe.path}: exit {name} gives {list(logits.shape)}, expected "
                    f"[1, {classes}] for the data's {classes} classes"
                )
        return list(outputs)

    def run_epoch(self, on_step: Callable[[Step], None] | None) -> None:
        """Train one epoch, then judge it on the held-out samples."""
        part = self.recipe.training
        tell = on_step or (lambda step: None)
        # Dropout draws from torch's own generator: tie it to the epoch, so resuming is exact.
        torch.manual_seed(part.seed + 1_000_003 * (self.epoch + 1))
        self.model.train()
        feed = batches(
            self.data,
            self.train_indices,
            self.recipe.preprocess,
            self.recipe.augmentation,
            batch=part.batch,
            seed=part.seed,
            epoch=self.epoch,
        )
        for number, (real, labels) in enumerate(feed, start=1):
            outputs = exit_outputs(self.model, to_input(real, self.recipe.preprocess))
            loss = self.loss(list(outputs.values()), torch.from_numpy(labels), self.weights, part)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            tell(self._step(number))
        if not bool(torch.isfinite(loss)):
            raise UsageError(
                f"{self.recipe.path}: the loss became {loss.item()} in epoch {self.epoch + 1}",
                hint="try a smaller training.learning_rate",
            )
        accuracies = holdout_accuracies(
            self.model, self.data, self.holdout_indices, self.recipe.preprocess, 500
        )
        is_best = not self.best_accuracies or self._score(accuracies) > self._score(
            self.best_accuracies
        )
        self.epoch += 1
        if is_best:
            self.best_epoch, self.best_accuracies = self.epoch, accuracies
            self.best_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        tell(self._step(self.batches, accuracies=accuracies, is_best=is_best))

    def _step(
        self, batch: int, accuracies: dict[str, float] | None = None, is_best: bool = False
    ) -> Step:
        return Step(
            epoch=self.epoch + (accuracies is None),
            epochs=self.recipe.training.epochs,
            batch=batch,
            batches=self.batches,
            accuracies=accuracies,
            is_best=is_best,
        )

    def _score(self, accuracies: dict[str, float]) -> float:
        pairs = zip(accuracies.values(), self.weights, strict=True)
        return sum(accuracy * weight for accuracy, weight in pairs)

    def state_bytes(self) -> bytes:
        """Everything that the next epoch needs, as the bytes of the state file."""
        buffer = io.BytesIO()
        torch.save(
            {
                "edgeexit_training": STATE_FORMAT,
                "recipe_digest": self.recipe.digest,
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best_epoch": self.best_epoch,
                "best_accuracies": self.best_accuracies,
                "best_state": self.best_state,
            },
            buffer,
        )
        return buffer.getvalue()

    def resume(self, path: Path) -> None:
        """Go on from the state file *path*, which must belong to this very recipe."""
        data = read_bytes(path, limit_bytes=MAX_STATE_BYTES)
        try:
            state = torch.load(io.BytesIO(data), weights_only=True)
            version, digest = state["edgeexit_training"], state["recipe_digest"]
        except Exception as error:  # torch.load has no narrower contract for damaged files
            raise self._unsound(path, error) from error
        if version != STATE_FORMAT:
            raise BadFile(f"{path}: of another version of edgeexit", hint=f"remove {path}")
        if digest != self.recipe.digest:
            raise UsageError(
                f"{path}: an interrupted training of another recipe",
                hint="undo the change to the recipe to go on, or start anew with --again",
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch = int(state["epoch"])
            self.best_epoch = int(state["best_epoch"])
            self.best_accuracies = dict(state["best_accuracies"])
            self.best_state = dict(state["best_state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._unsound(path, error) from error

    def _unsound(self, path: Path, error: Exception) -> BadFile:
        return BadFile(
            f"{path}: not a sound training state ({type(error).__name__})",
            hint=f"remove {path} to start anew",
        )

    def save(self, out: Path) -> None:
        """Write the best weights as a checkpoint."""
        recipe = self.recipe
        seen = Bloom.of(sample_digests(self.data.samples))
        save_checkpoint(
            out,
            state_dict=self.best_state,
            arch=recipe.model.arch,
            kwargs=recipe.model.kwargs,
            input_shape=recipe.model.input_shape,
            class_names=self.data.class_names,
            preprocess=recipe.preprocess,
            calibration_set=recipe.data.calibration_set,
            training_digests=seen.to_bytes(),
            metadata={
                "recipe_digest": recipe.digest,
                "seed": recipe.training.seed,
                "epochs": self.epoch,
                "best_epoch": self.best_epoch,
                "holdout": len(self.holdout_indices),
                "holdout_accuracies": self.best_accuracies,
                "torch": torch.__version__.partition("+")[0],
            },
        )
