"""
Labelled samples out of an npz or a folder of pictures.

Callers see Samples, from_arrays and from_folder. Hidden here: which axis of an npz is which, told
by shape alone and never guessed, and which subfolder is which class.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Arrays
from edgeexit.names import unknown
from edgeexit.overlap import sample_digests
from edgeexit.pictures import SUFFIXES
from edgeexit.preprocess import Preprocess, load_image

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Samples:
    """
    N samples with their labels, all fit for one network.

    samples is uint8 (N, H, W, C) for images, float32 (N, ...) for arrays. labels is int64 (N,),
    all -1 if there are none. ids is text (N,): the picture's path in its folder, or what the npz
    says, else the position. name says where they came from ("fashion-mnist:report"), never a path.
    """

    samples: NDArray[Any]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_]
    name: str

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def is_labelled(self) -> bool:
        """Whether the labels mean anything."""
        return len(self.labels) > 0 and int(self.labels[0]) != UNLABELLED

    def digests(self) -> NDArray[np.uint8]:
        """One digest a sample, uint8 (N, 16); what Bloom filters and records keep."""
        return sample_digests(self.samples)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the samples' digests and labels, in hexadecimal."""
        whole = hashlib.sha256(self.digests().tobytes())
        whole.update(self.labels.astype("<i8").tobytes())
        return whole.hexdigest()

    def __getitem__(self, chosen: Any) -> "Samples":
        """The samples at *chosen*: a slice, a mask, or positions."""
        return Samples(
            samples=self.samples[chosen],
            labels=self.labels[chosen],
            ids=self.ids[chosen],
            name=self.name,
        )


# ---------------------------------------------------------------- a folder of pictures


def pictures_in(folder: Path) -> list[Path]:
    """All pictures below *folder* in a fixed order; hidden files and folders are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def from_folder(
    folder: Path,
    preprocess: Preprocess | None,
    class_names: Sequence[str] | None,
    labels_required: bool,
    progress: Callable[[int], object] | None,
) -> Samples:
    """
    Every picture below *folder* as load_image makes it; the first subfolder is the class.

    Without *class_names* the classes are the sorted subfolders. Without *labels_required*
    loose pictures or foreign subfolders leave all samples unlabelled.
    """
    if preprocess is None or preprocess.kind != "image":
        raise UsageError(f"{folder}: a folder of pictures needs a network for images")
    paths = pictures_in(folder)
    if not paths:
        raise BadFile(
            f"{folder}: holds no pictures",
            hint=f"expected class subfolders with {', '.join(SUFFIXES)} files",
        )
    labels = _folder_labels(folder, paths, class_names, labels_required)
    samples = np.empty((len(paths), *preprocess.sample_shape), np.uint8)
    for index, path in enumerate(paths):
        samples[index] = load_image(path, preprocess)
        if progress is not None:
            progress(1)
    return Samples(
        samples=samples,
        labels=labels,
        ids=np.array([_printable(path.relative_to(folder)) for path in paths]),
        name=_printable(Path(folder.resolve().name)),
    )


def _printable(path: Path) -> str:
    # File names need not be UTF-8; ids must be.
    return path.as_posix().encode(errors="surrogateescape").decode(errors="replace")


def folder_classes(folder: Path) -> tuple[str, ...]:
    """The sorted names of the subfolders of *folder* that hold pictures."""
    parts = [path.relative_to(folder).parts for path in pictures_in(folder)]
    return tuple(sorted({part[0] for part in parts if len(part) > 1}))


def _folder_labels(
    folder: Path, paths: list[Path], class_names: Sequence[str] | None, labels_required: bool
) -> NDArray[np.int64]:
    parts = [path.relative_to(folder).parts for path in paths]
    found = sorted({part[0] for part in parts if len(part) > 1})
    loose = next((part[0] for part in parts if len(part) == 1), None)
    if loose is not None:
        if labels_required or found:
            raise BadFile(f"{folder}/{loose}: not in a class subfolder")
        return np.full(len(paths), UNLABELLED, np.int64)
    known = {name.replace("/", "_"): k for k, name in enumerate(class_names or found)}
    stranger = next((name for name in found if name not in known), None)
    if stranger is not None and labels_required:
        raise unknown(stranger, known, f"class (a subfolder of {folder})")
    if stranger is not None:
        return np.full(len(paths), UNLABELLED, np.int64)
    return np.array([known[part[0]] for part in parts], np.int64)


# ---------------------------------------------------------------- an npz


def from_arrays(
    arrays: Arrays,
    name: str,
    preprocess: Preprocess | None,
    class_count: int | None,
    input_shape: Sequence[int] | None,
    labels_required: bool,
) -> Samples:
    """
    The arrays `samples`, `labels` and, if there, `ids` of an npz, checked.

    Images (uint8) stand in the layout of *preprocess* or channels last. Anything else must have
    the shape of *input_shape* after the batch axis and becomes float32; without *preprocess*
    uint8 stays as it is. Wrong content is BadFile.
    """
    where = arrays.where
    samples = arrays.get("samples")
    if samples.ndim < 2 or 0 in samples.shape:
        raise BadFile(f"{where}: samples: shape {samples.shape}, expected (N, ...) with N > 0")
    if preprocess is not None and preprocess.kind == "image":
        samples = _channels_last(samples, preprocess, input_shape, where)
    else:
        samples = _plain_arrays(samples, preprocess, input_shape, where)
    if "labels" not in arrays and not labels_required:
        labels = np.full(len(samples), UNLABELLED, np.int64)
    else:
        labels = _labels(arrays, len(samples), class_count)
    return Samples(samples=samples, labels=labels, ids=_ids(arrays, len(samples)), name=name)


def _channels_last(
    samples: NDArray[Any], preprocess: Preprocess, input_shape: Sequence[int] | None, where: str
) -> NDArray[np.uint8]:
    if samples.dtype != np.uint8:
        raise BadFile(
            f"{where}: samples: {samples.dtype}, expected uint8 pixels (0 to 255)",
            hint="scaling, mean and std are applied by edgeexit; float samples need kind 'array'",
        )
    height, width, channels = last = preprocess.sample_shape
    first = (channels, height, width)
    own = first if preprocess.layout == "nchw" else last
    if input_shape is not None and tuple(input_shape[1:]) != own:
        raise UsageError(
            f"network input {tuple(input_shape)}: its preprocessing makes {own}, "
            f"layout {preprocess.layout}"
        )
    found = samples.shape[1:]
    if own == first == last == found:
        raise BadFile(
            f"{where}: samples: shape {found} may be channels first or last",
            hint="give a folder of pictures, or a network whose layout is nhwc",
        )
    if found == last:
        return np.ascontiguousarray(samples)
    if found == own:
        return np.ascontiguousarray(np.moveaxis(samples, 1, 3))
    if channels == 1 and found == (height, width):
        return np.ascontiguousarray(samples[..., np.newaxis])
    wanted = " or ".join(str(shape) for shape in dict.fromkeys((own, last)))
    raise BadFile(
        f"{where}: samples: each of shape {found}, expected {wanted}",
        hint="pictures of other sizes: give them as a folder",
    )


def _plain_arrays(
    samples: NDArray[Any],
    preprocess: Preprocess | None,
    input_shape: Sequence[int] | None,
    where: str,
) -> NDArray[Any]:
    if samples.dtype.kind not in "iuf":
        raise BadFile(f"{where}: samples: {samples.dtype}, expected numbers")
    if input_shape is not None and samples.shape[1:] != tuple(input_shape[1:]):
        raise BadFile(
            f"{where}: samples: each of shape {samples.shape[1:]}, "
            f"expected {tuple(input_shape[1:])}"
        )
    if preprocess is None and samples.dtype == np.uint8:
        return np.ascontiguousarray(samples)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(samples, np.float32)
    flat = np.isfinite(single.reshape(len(single), -1)).all(axis=1)
    if not flat.all():
        raise BadFile(
            f"{where}: samples[{int(flat.argmin())}]: NaN or infinity, expected finite numbers"
        )
    return single


def _labels(arrays: Arrays, count: int, class_count: int | None) -> NDArray[np.int64]:
    labels = arrays.get("labels", kinds="iu", ndim=1)
    if len(labels) != count:
        raise BadFile(f"{arrays.where}: {len(labels)} labels for {count} samples")
    limit = (1 << 31) if class_count is None else class_count
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        k = int(wrong.argmax())
        raise BadFile(
            f"{arrays.where}: labels[{k}]: {int(labels[k])}, expected 0 to {limit - 1}",
            hint="labels count from 0 in the order of the class names, which the network, a set or "
            f"--labels gives: there are {class_count}"
            if class_count
            else "labels count from 0 in the order of the class names",
        )
    return np.asarray(labels, np.int64)


def _ids(arrays: Arrays, count: int) -> NDArray[np.str_]:
    if "ids" not in arrays:
        return np.array([str(k) for k in range(count)])
    ids = arrays.get("ids", kinds="Uiu", ndim=1).astype(np.str_)
    if len(ids) != count:
        raise BadFile(f"{arrays.where}: {len(ids)} ids for {count} samples")
    distinct, times = np.unique(ids, return_counts=True)
    if len(distinct) != count:
        raise BadFile(f"{arrays.where}: ids: {str(distinct[times.argmax()])!r} stands twice")
    return np.asarray(ids)
