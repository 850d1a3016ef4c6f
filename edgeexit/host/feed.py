"""
Training samples: where they come from, and how they are changed at random.

Callers see training_samples (a source of any kind -> arrays), split_holdout and batches.
Hidden here: the idx format of the MNIST family, and that flips and shifts are one gather over
the whole batch. Every random choice comes from (seed, epoch), so a resumed training sees
exactly what an uninterrupted one would have seen.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import read_bytes
from edgeexit.host.recipe import Augmentation, DataPart
from edgeexit.names import choose
from edgeexit.preprocess import Preprocess, real_values

MAX_IDX_BYTES = 4 << 30
IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """*samples* (N, ...) as a calibration set holds them, *labels* int64 (N,)."""

    samples: NDArray[Any]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def to_input(real: NDArray[np.float32], preprocess: Preprocess) -> torch.Tensor:
    """Real numbers (N, H, W, C) or (N, ...) as the network's input, contiguous in its layout."""
    tensor = torch.from_numpy(real)
    if preprocess.layout != "nchw":
        return tensor
    # contiguous() would keep the strides of one-channel pictures, which say channels last.
    return tensor.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def training_samples(
    data: DataPart, preprocess: Preprocess, input_shape: tuple[int, ...]
) -> TrainingSet:
    """Read the source that *data* names. UsageError, or BadFile if its contents are not sound."""
    if data.path is None:
        raise UsageError(
            "where are the training samples?", hint="say --data PATH, or data.path in the recipe"
        )
    kind = recognised(Path(data.path)) if data.kind is None else data.kind
    found = choose(kind, SOURCES, "kind of training data")(data, preprocess, input_shape)
    if found.labels.min() < 0 or found.labels.max() >= len(found.class_names):
        raise BadFile(
            f"{data.path}: labels {found.labels.min()} to {found.labels.max()}, "
            f"expected 0 to {len(found.class_names) - 1}"
        )
    return found


def recognised(path: Path) -> str:
    """The kind of source at *path*, a key of SOURCES. UsageError if it is none."""
    if path.suffix == ".npz" and path.is_file():
        return "npz"
    if path.is_dir():
        names = {child.name.removesuffix(".gz") for child in path.iterdir()}
        return "idx" if names & set(IDX_STEMS) else "folder"
    if path.exists():
        raise UsageError(
            f"{path}: expected a folder of class folders, an .npz, or an MNIST-like folder"
        )
    raise UsageError(
        f"{path}: no such file or folder", hint="where the training samples are: --data PATH"
    )


def _from_idx(data: DataPart, preprocess: Preprocess, input_shape: tuple[int, ...]) -> TrainingSet:
    """The training half of an MNIST-like folder; the test half is never opened."""
    images, labels = (_read_idx(Path(str(data.path)) / stem) for stem in IDX_STEMS)
    if preprocess.kind != "image" or (*images.shape[1:], 1) != preprocess.sample_shape:
        raise UsageError(
            f"{data.path}: gray pictures of {images.shape[1:]}, the recipe's [preprocess] or "
            "the checkpoint asks for something else"
        )
    if labels.shape != images.shape[:1]:
        raise BadFile(f"{data.path}: {len(images)} pictures but {len(labels)} labels")
    names = data.class_names or tuple(map(str, range(int(labels.max(initial=0)) + 1)))
    return TrainingSet(
        samples=images[..., np.newaxis], labels=labels.astype(np.int64), class_names=names
    )


def _read_idx(stem: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, plain or gzipped: 0 0 8 axes, then big-endian lengths."""
    packed = stem.with_name(stem.name + ".gz")
    try:
        raw = read_bytes(packed) if packed.exists() else read_bytes(stem, limit_bytes=MAX_IDX_BYTES)
        if packed.exists():
            unpacker = zlib.decompressobj(wbits=31)
            raw = unpacker.decompress(raw, MAX_IDX_BYTES)
            if not unpacker.eof:
                raise BadFile(f"{packed}: truncated, or more than {MAX_IDX_BYTES} bytes unpacked")
    except (zlib.error, gzip.BadGzipFile) as error:
        raise BadFile(f"{packed}: not a sound gzip file: {error}") from error
    axes = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">u4", axes, 4).tolist()) if len(raw) >= 4 + 4 * axes else ()
    count = int(np.prod(shape, dtype=object)) if shape else 0
    if not count or len(raw) != 4 + 4 * axes + count:
        raise BadFile(f"{stem}: not a sound idx file of unsigned bytes")
    return np.frombuffer(raw, np.uint8, count, 4 + 4 * axes).reshape(shape)


def _from_samples(
    data: DataPart, preprocess: Preprocess, input_shape: tuple[int, ...]
) -> TrainingSet:
    """A folder of class folders, or an npz, through the reader that all commands share."""
    from edgeexit.samples import load_samples

    path = Path(str(data.path))
    if not path.exists():  # SET:SPLIT is no path: calibration sets are not for training
        raise UsageError(f"{path}: no such file or folder")
    if any((folder / "set.toml").is_file() for folder in (path, path.parent)):
        raise UsageError(
            f"{path}: belongs to a calibration set, whose samples judge networks: they are not "
            "for training",
            hint="name other samples, with --data or in the recipe",
        )
    names = data.class_names or _class_folders(path)
    if names is None:
        raise UsageError(f"{path}: data.class_names is missing from the recipe")
    found = load_samples(path, preprocess, names, input_shape)
    return TrainingSet(
        samples=found.samples, labels=found.labels.astype(np.int64), class_names=names
    )


def _class_folders(path: Path) -> tuple[str, ...] | None:
    if not path.is_dir():
        return None
    return tuple(sorted(child.name for child in path.iterdir() if child.is_dir()))


SOURCES: dict[str, Callable[[DataPart, Preprocess, tuple[int, ...]], TrainingSet]] = {
    "idx": _from_idx,
    "folder": _from_samples,
    "npz": _from_samples,
}


def split_holdout(count: int, holdout: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Indices (training, held out) of *count* samples, drawn by *seed*."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    return np.sort(order[holdout:]), np.sort(order[:holdout])


def batches(
    data: TrainingSet,
    indices: NDArray[Any],
    preprocess: Preprocess,
    augmentation: Augmentation,
    *,
    batch: int,
    seed: int,
    epoch: int,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """
    One epoch over *indices* in random order: real numbers (B, ...) NHWC, and labels (B,).

    A last batch that is not full is left out (its samples come up in other epochs): batch
    norm would weigh it like a full one.
    """
    random = np.random.default_rng([seed, 1, epoch])
    order = random.permutation(indices)
    for start in range(0, len(order) - batch + 1, batch):
        chosen = order[start : start + batch]
        yield augment(data.samples[chosen], preprocess, augmentation, random), data.labels[chosen]


def augment(
    samples: NDArray[Any],
    preprocess: Preprocess,
    augmentation: Augmentation,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """The real numbers of *samples* (B, ...), each changed at random; borders are repeated."""
    if augmentation.flip or augmentation.shift:
        samples = _moved(samples, augmentation, random)
    real = real_values(samples, preprocess)
    if augmentation.erase:
        _erase(real, augmentation.erase, random)
    if augmentation.noise:
        real += random.standard_normal(real.shape, np.float32) * np.float32(augmentation.noise)
    return real


def _moved(
    samples: NDArray[Any], augmentation: Augmentation, random: np.random.Generator
) -> NDArray[Any]:
    count, height, width = samples.shape[:3]
    most = augmentation.shift
    down, right = random.integers(-most, most + 1, (2, count, 1))
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    if augmentation.flip:
        turned = random.random((count, 1)) < 0.5
        columns = np.where(turned, width - 1 - columns, columns)
    moved: NDArray[Any] = samples[
        np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return moved


def _erase(real: NDArray[np.float32], share: float, random: np.random.Generator) -> None:
    """Set a rectangle of 1/5 to 1/2 of each side to the set's mean (0) in *share* of the batch."""
    count, height, width = real.shape[:3]
    sides = random.uniform(0.2, 0.5, (2, count)) * [[height], [width]]
    corners = random.uniform(0, 1, (2, count)) * ([[height], [width]] - sides)
    top, left = corners[:, :, None]
    bottom, right = (corners + sides)[:, :, None]
    rows, columns = np.arange(height), np.arange(width)
    in_rows: NDArray[np.bool_] = (rows >= top) & (rows < bottom)
    in_columns: NDArray[np.bool_] = (columns >= left) & (columns < right)
    chosen: NDArray[np.bool_] = np.less(random.random(count), share)
    inside = in_rows[:, :, None] & in_columns[:, None, :] & chosen[:, None, None]
    real[inside] = 0.0
