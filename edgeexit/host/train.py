"""
Train a multi-exit network from a recipe, and write its checkpoint.

Callers see train(). Hidden here: the state file beside the output that lets the same command go
on after an interruption. An interrupted and resumed training computes what an uninterrupted
one does.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import read_bytes, write_file
from edgeexit.host.checkpoint import build_network, load_checkpoint, save_checkpoint
from edgeexit.host.feed import TrainingSet, split_holdout, training_samples
from edgeexit.host.fit import REGIMES, Fit, Material
from edgeexit.host.fit import Step as Step
from edgeexit.host.recipe import Recipe, read_recipe
from edgeexit.names import choose
from edgeexit.overlap import Bloom, sample_digests

# 1: first format. 2: the state of a Fit, with its phases.
STATE_FORMAT = 2
MAX_STATE_BYTES = 4 << 30


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
    choose(recipe.training.regime, REGIMES, "training regime")
    data = training_samples(recipe.data, recipe.preprocess, recipe.model.input_shape)
    session = _Session(recipe, data, arch)
    state_path = out.with_name(out.name + ".state")
    if state_path.exists() and not again:
        session.resume(state_path)
    while not session.fit.is_done:
        session.fit.run_epoch(on_step)
        write_file(state_path, session.state_bytes())
    session.save(out)
    state_path.unlink(missing_ok=True)
    return Training(
        path=out,
        accuracies=session.fit.best_accuracies,
        best_epoch=session.fit.best_epoch,
        epochs=session.fit.epoch,
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
    """One training under way: a Fit of the recipe's network, and its state file."""

    def __init__(self, recipe: Recipe, data: TrainingSet, arch: str | None) -> None:
        part = recipe.training
        self.recipe = recipe
        torch.manual_seed(part.seed)
        model = build_network(
            recipe.model.arch, recipe.model.kwargs, f"{recipe.path}: model", arch=arch
        )
        if recipe.model.initial_weights is not None:
            self._take_weights(model, recipe.model.initial_weights, arch)
        training, holdout = split_holdout(len(data.labels), recipe.data.holdout, part.seed)
        self.material = Material(
            data=data,
            training=training,
            holdout=holdout,
            preprocess=recipe.preprocess,
            augmentation=recipe.augmentation,
        )
        self.fit = Fit(model, self.material, part, where=str(recipe.path))

    def _take_weights(self, model: nn.Module, path: Path, arch: str | None) -> None:
        initial = load_checkpoint(path, arch=arch)
        try:
            model.load_state_dict(initial.model.state_dict())
        except RuntimeError as error:
            raise UsageError(
                f"{self.recipe.path}: model.initial_weights: {path} holds another network "
                f"({initial.arch})"
            ) from error

    def state_bytes(self) -> bytes:
        """Everything that the next epoch needs, as the bytes of the state file."""
        buffer = io.BytesIO()
        head = {"edgeexit_training": STATE_FORMAT, "recipe_digest": self.recipe.digest}
        torch.save(head | {"fit": self.fit.state()}, buffer)
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
            self.fit.load(state["fit"])
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
        data = self.material.data
        seen = Bloom.of(sample_digests(data.samples))
        save_checkpoint(
            out,
            model=self.fit.model,
            arch=recipe.model.arch,
            kwargs=recipe.model.kwargs,
            input_shape=recipe.model.input_shape,
            class_names=data.class_names,
            preprocess=recipe.preprocess,
            calibration_set=recipe.data.calibration_set,
            training_digests=seen.to_bytes(),
            metadata={
                "recipe_digest": recipe.digest,
                "seed": recipe.training.seed,
                "epochs": self.fit.epoch,
                "best_epoch": self.fit.best_epoch,
                "holdout": len(self.material.holdout),
                "holdout_accuracies": self.fit.best_accuracies,
                "torch": torch.__version__.partition("+")[0],
            },
        )
