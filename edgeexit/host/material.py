"""
Training samples with their hold-out, and how to find them again.

Callers see Material, gather and Origin. Hidden here: what a checkpoint remembers of its samples.
A network that is trained further, or pruned, is judged by the samples that were held out when it
was made; drawing them anew would judge it by samples that it has learnt.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.host.feed import TrainingSet, recognised, split_holdout, to_input, training_samples
from edgeexit.host.recipe import Augmentation, DataPart, augmentation_part
from edgeexit.preprocess import Preprocess, real_values

MOST_HELD_OUT = 5000


@dataclass(frozen=True, kw_only=True)
class Material:
    """Samples to train on and to judge by: *training* and *holdout* are disjoint indices."""

    data: TrainingSet
    training: NDArray[np.int64]
    holdout: NDArray[np.int64]
    preprocess: Preprocess
    augmentation: Augmentation

    def inputs(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """The samples *indices* as the network takes them, unchanged: float32 (N, ...)."""
        return to_input(real_values(self.data.samples[indices], self.preprocess), self.preprocess)

    def labels(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """The labels of the samples *indices*, int64 (N,)."""
        return torch.from_numpy(self.data.labels[indices])


@dataclass(frozen=True, kw_only=True)
class Origin:
    """
    Where a checkpoint's training samples came from, as its metadata "data" records it:
    *holdout* of the *count* samples were drawn by *seed*. Nothing is None in what gather
    returns; much may be in what an old checkpoint says.
    """

    kind: str | None = None
    path: str | None = None
    count: int | None = None
    holdout: int | None = None
    seed: int | None = None
    augmentation: Augmentation | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: str) -> "Origin":
        """What the *metadata* of the checkpoint *where* say. BadFile if they say nonsense."""
        if not isinstance(metadata.get("data"), dict):
            # Written before there was "data", or by somebody else.
            holdout, seed = metadata.get("holdout"), metadata.get("seed")
            if type(holdout) is int and type(seed) is int and holdout > 0 and seed >= 0:
                return cls(holdout=holdout, seed=seed)
            return cls()
        table = Table(metadata, f"{where}: metadata").table("data")
        numbers = {key: table.get(key, int) for key in ("count", "holdout", "seed")}
        if min(numbers.values()) < 0:
            raise BadFile(f"{table.where}: found {numbers}, expected no negative numbers")
        return cls(
            kind=table.get("kind", str),
            path=table.get("path", str),
            augmentation=augmentation_part(table.table("augmentation"), "image"),
            **numbers,
        )

    def to_metadata(self) -> dict[str, Any]:
        """What `of` reads, under the key "data"."""
        return {"data": asdict(self)}


def gather(
    data: DataPart,
    augmentation: Augmentation | None,
    *,
    preprocess: Preprocess,
    input_shape: tuple[int, ...],
    before: Origin | None = None,
    seed: int = 0,
) -> tuple[Material, Origin]:
    """
    Read and split the samples of *data*; also say what was done, for the checkpoint.

    What *data* leaves open is as *before*: samples held out once are held out again, as long as
    there are as many samples as then. Else a tenth, at most 5000, is held out, drawn by *seed*.
    """
    before = before or Origin()
    if data.path is None:
        data = replace(data, path=before.path, kind=data.kind or before.kind)
    found = training_samples(data, preprocess, input_shape)
    count = len(found.labels)
    is_same = before.count == count or (before.count is None and (before.holdout or 0) < count)
    known = before if is_same else Origin(augmentation=before.augmentation)
    holdout = data.holdout or known.holdout or max(1, min(count // 10, MOST_HELD_OUT))
    first = next(s for s in (data.seed, known.seed, seed) if s is not None)
    if not 0 < holdout < count:
        raise UsageError(f"{data.path}: {count} samples, cannot hold out {holdout} of them")
    moves = augmentation or known.augmentation or Augmentation()
    if preprocess.kind != "image" and replace(moves, noise=0.0) != Augmentation():
        raise UsageError("augmentation: arrays can only be given noise")
    training, held = split_holdout(count, holdout, first)
    material = Material(
        data=found, training=training, holdout=held, preprocess=preprocess, augmentation=moves
    )
    return material, Origin(
        kind=data.kind or recognised(Path(str(data.path))),
        path=data.path,
        count=count,
        holdout=holdout,
        seed=first,
        augmentation=moves,
    )
