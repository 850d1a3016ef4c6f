"""
Train a multi-exit network by a recipe, or a checkpoint further, and write a checkpoint.

Callers see train() and Choices. Hidden here: the state file beside the output that lets the same
command go on after an interruption. An interrupted and resumed training computes what an
uninterrupted one does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import check_output, digest_of, json_bytes, write_file
from edgeexit.host.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_again,
    save_checkpoint,
)
from edgeexit.host.factories import build_network
from edgeexit.host.fit import HEAD_INITS, REGIMES, Fit, accelerated, holdout_accuracies
from edgeexit.host.fit import Step as Step
from edgeexit.host.material import Origin, gather
from edgeexit.host.purpose import Purpose
from edgeexit.host.recipe import Augmentation, DataPart, ModelPart, TrainingPart, read_recipe
from edgeexit.host.statefile import UNSOUND, read_state, state_bytes, unsound
from edgeexit.names import choose
from edgeexit.overlap import Bloom, sample_digests

JOB = "training"
MOST_FALSE_HITS = 0.1


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


@dataclass(frozen=True, kw_only=True)
class Choices:
    """
    What the command says about training a checkpoint; None: as FROM_CHECKPOINT, or as before.

    *data* is a folder of class folders, an .npz or an MNIST-like folder; *calibration* the name
    of the set that shall go with the network.
    """

    regime: str | None = None
    data: str | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    holdout: int | None = None
    seed: int | None = None
    flip: bool | None = None
    shift: int | None = None
    calibration: str | None = None


# What a checkpoint is trained with unless told otherwise. Heads alone cannot spoil the backbone,
# but pooled ones have many inputs and diverge above 0.05. What moves a trained backbone starts
# lower than a recipe from scratch. Attached heads that were never trained start at their class
# means.
FROM_CHECKPOINT: dict[str, TrainingPart] = {
    "frozen": TrainingPart(regime="frozen", epochs=10, learning_rate=0.05, weight_decay=1e-4),
    "joint": TrainingPart(
        regime="joint",
        epochs=20,
        learning_rate=0.02,
        weight_decay=5e-4,
        equilibrium=True,
        distillation=0.5,
    ),
    "mixed": TrainingPart(
        regime="mixed",
        epochs=30,
        learning_rate=0.05,
        weight_decay=5e-4,
        equilibrium=True,
        distillation=0.5,
    ),
    # Goermez et al. 2021 (arXiv 2103.01148): the nearest class mean, nothing is trained.
    "prototypes": TrainingPart(
        regime="frozen", epochs=0, batch=2, learning_rate=1.0, head_init="class-means"
    ),
}


def train(
    source: Path,
    out: Path | None = None,
    *,
    arch: str | None = None,
    again: bool = False,
    choices: Choices | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Training:
    """
    Train by the recipe *source* (.toml), or train the checkpoint *source* further.

    The result is a checkpoint: by default the recipe's path with suffix .pt, or NAME-trained.pt
    beside the checkpoint. *choices* are for a checkpoint; a recipe makes its own. A training that
    was interrupted goes on after its last whole epoch; one that is finished is not redone unless
    *again*. A recipe or checkpoint that names code outside edgeexit needs that name as *arch*
    too. UsageError, BadFile or Unsupported for a recipe, checkpoint or data that will not do, or
    a loss that becomes NaN; StorageError if the state or the checkpoint cannot be written.
    """
    if source.suffix == ".toml":
        if choices is not None and choices != Choices():
            raise UsageError(
                f"{source}: a recipe says itself what its data and training are",
                hint="change the recipe, or name a checkpoint",
            )
        job = _job_of_recipe(source, arch)
        out = source.with_suffix(".pt") if out is None else out
    else:
        job = _job_of_checkpoint(source, choices or Choices(), arch)
        out = source.with_name(f"{source.stem}-trained.pt") if out is None else out
    check_output(out, source, job.network, job.data.path)
    done = None if again else _finished(out, job, arch)
    if done is not None:
        return done
    choose(job.training.regime, REGIMES, "training regime")
    session = _Session(job, arch)
    state_path = out.with_name(out.name + ".state")
    with accelerated(session.model):
        fit = session.begin()
        if state_path.exists() and not again:
            session.resume(state_path)
        if not job.training.epochs:
            session.set_prototypes()
        while not fit.is_done:
            fit.run_epoch(on_step)
            write_file(state_path, state_bytes(JOB, job.digest, {"fit": fit.state()}))
    session.save(out)
    state_path.unlink(missing_ok=True)
    return Training(
        path=out,
        accuracies=fit.best_accuracies,
        best_epoch=fit.best_epoch,
        epochs=fit.epoch,
        was_done=False,
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """
    What is to be done, wherever it was said; *where* names that place.

    *start* is a net to build, or a checkpoint that was read; *digest* that of the whole task.
    """

    where: str
    digest: str
    start: ModelPart | Checkpoint
    data: DataPart
    augmentation: Augmentation | None
    training: TrainingPart
    has_fresh_heads: bool = False
    network: Path | None = None  # the file that weights are read from, if a recipe names one


def _job_of_recipe(path: Path, arch: str | None) -> _Job:
    recipe = read_recipe(path)
    start: ModelPart | Checkpoint
    if isinstance(recipe.model, Path):
        start = _loaded(recipe.model, arch, recipe.data.calibration_set)
        digest = digest_of((recipe.digest + start.digest).encode())
        data = replace(recipe.data, class_names=start.class_names)
    else:
        start, digest, data = recipe.model, recipe.digest, recipe.data
    return _Job(
        where=str(path),
        digest=digest,
        start=start,
        data=data,
        augmentation=recipe.augmentation,
        training=recipe.training,
        network=recipe.model if isinstance(recipe.model, Path) else recipe.model.initial_weights,
    )


def _loaded(path: Path, arch: str | None, calibration: str | None) -> Checkpoint:
    """The checkpoint at *path*; the set *calibration* says what a plain state_dict is for."""
    purpose = None if calibration is None else Purpose.of_set(calibration)
    return load_checkpoint(path, arch=arch, purpose=purpose)


def _job_of_checkpoint(path: Path, choices: Choices, arch: str | None) -> _Job:
    regime = choices.regime or "joint"
    training = choose(regime, FROM_CHECKPOINT, "training regime")
    said = {key: value for key, value in asdict(choices).items() if value is not None}
    start = _loaded(path, arch, choices.calibration)
    digest = digest_of(json_bytes({"checkpoint": start.digest, "regime": regime, "said": said}))
    numbers = ("epochs", "learning_rate", "batch", "seed")
    given = {key: said[key] for key in numbers if key in said}
    if not training.epochs and not given.keys() <= {"seed"}:
        raise UsageError(
            f"--regime {regime}: found {', '.join(given)}, but nothing is trained",
            hint="--regime frozen starts from the same heads and trains them",
        )
    training = replace(training, **given)
    before = Origin.of(start.metadata, str(path)).augmentation or Augmentation()
    judged = start.metadata.get("holdout_accuracies")
    return _Job(
        where=str(path),
        digest=digest,
        start=start,
        data=DataPart(
            path=choices.data,
            holdout=choices.holdout,
            class_names=start.class_names,
            calibration_set=choices.calibration,
        ),
        augmentation=replace(before, **{k: said[k] for k in ("flip", "shift") if k in said}),
        training=training,
        # attach takes the record of the plain network away.
        has_fresh_heads=start.attached is not None
        and not (isinstance(judged, dict) and set(start.exits) <= set(judged)),
    )


def _finished(out: Path, job: _Job, arch: str | None) -> Training | None:
    """The result that *out* already holds, or None if there is no such file."""
    if not out.exists():
        return None
    metadata = load_checkpoint(out, arch=arch).metadata
    if metadata.get("recipe_digest") != job.digest:
        raise UsageError(
            f"{out}: is there already and was not made by this recipe",
            hint="name another file with -o, or replace it with --again",
        )
    try:
        return Training(
            path=out,
            accuracies=dict(metadata["holdout_accuracies"]),
            best_epoch=int(metadata["best_epoch"]),
            epochs=int(metadata["epochs"]),
            was_done=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{out}: metadata is damaged ({type(error).__name__})") from error


class _Session:
    """One training under way: the job's network, a Fit of it, and its state file."""

    def __init__(self, job: _Job, arch: str | None) -> None:
        start, seed = job.start, job.training.seed
        self.job = job
        self.material, self.origin = gather(
            job.data,
            job.augmentation,
            preprocess=start.preprocess,
            input_shape=start.input_shape,
            before=Origin.of(start.metadata, job.where) if isinstance(start, Checkpoint) else None,
            seed=seed,
        )
        torch.manual_seed(seed)
        if isinstance(start, Checkpoint):
            model = start.model
        else:
            model = build_network(start.arch, start.kwargs, f"{job.where}: model", arch=arch)
            if start.initial_weights is not None:
                _take_weights(model, start.initial_weights, job.where, arch)
        self.model = model

    def begin(self) -> Fit:
        """A Fit of the network, where that lies now."""
        job, part = self.job, self.job.training
        labels = self.material.data.labels[self.material.training]
        if job.has_fresh_heads and len(set(labels)) == len(self.material.data.class_names):
            part = replace(part, head_init="class-means")
        self.fit = Fit(self.model, self.material, part, where=job.where)
        return self.fit

    def set_prototypes(self) -> None:
        """Make class means of the early heads' last layers, and judge them."""
        fit = self.fit
        if len(fit.exits) < 2:
            raise UsageError(
                f"{self.job.where}: the network has no early exit",
                hint="give it exits first (edgeexit attach)",
            )
        HEAD_INITS["class-means"](fit)
        fit.best_accuracies = holdout_accuracies(fit.model, fit.material)

    def resume(self, path: Path) -> None:
        """Go on from the state file *path*, which must belong to this very job."""
        state = read_state(path, JOB, self.job.digest)
        try:
            self.fit.load(state["fit"])
        except UNSOUND as error:
            raise unsound(path, JOB, error) from error

    def save(self, out: Path) -> None:
        """Write the best weights as a checkpoint."""
        start, material, fit = self.job.start, self.material, self.fit
        metadata = {
            "recipe_digest": self.job.digest,
            "regime": self.job.training.regime if fit.epoch else "prototypes",
            "seed": self.job.training.seed,
            "epochs": fit.epoch,
            "best_epoch": fit.best_epoch,
            "holdout": len(material.holdout),
            "holdout_accuracies": fit.best_accuracies,
            "torch": torch.__version__.partition("+")[0],
            **self.origin.to_metadata(),
        }
        if isinstance(start, Checkpoint):
            save_again(
                out,
                start,
                fit.model,
                calibration_set=self.job.data.calibration_set or start.calibration_set,
                training_digests=seen(material.data.samples, start.training_bloom),
                metadata={**metadata, "trained_from": start.digest},
            )
            return
        save_checkpoint(
            out,
            model=fit.model,
            arch=start.arch,
            kwargs=start.kwargs,
            input_shape=start.input_shape,
            class_names=material.data.class_names,
            preprocess=start.preprocess,
            calibration_set=self.job.data.calibration_set,
            training_digests=seen(material.data.samples, None),
            metadata=metadata,
        )


def _take_weights(model: nn.Module, path: Path, where: str, arch: str | None) -> None:
    initial = load_checkpoint(path, arch=arch)
    try:
        model.load_state_dict(initial.model.state_dict())
    except RuntimeError as error:
        raise UsageError(
            f"{where}: model.initial_weights: {path} holds another network ({initial.arch})"
        ) from error


def seen(samples: NDArray[Any], before: bytes | None) -> bytes:
    """The bytes of a filter of *samples* and of what the one *before* knows, if it has room."""
    digests = sample_digests(samples)
    if before is None:
        return Bloom.of(digests).to_bytes()
    bloom = Bloom.from_bytes(before)
    new = digests[bloom.testable(digests) & ~bloom.hits(digests)]
    if len(new):
        bloom.add(new)
    if bloom.false_positive_rate > MOST_FALSE_HITS:
        # Full: it would find nothing any more. The new samples alone are better than that.
        bloom = Bloom.of(digests)
    return bloom.to_bytes()
