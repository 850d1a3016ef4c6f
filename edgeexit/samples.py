"""
Read labelled samples: a split of a calibration set, a folder of pictures, or an npz.

Callers see Samples, CalibrationSet, find_set and load_samples. Hidden here: the checking of
every digest, and how samples of one size serve a network of another. A set's four splits are
disjoint and each has one purpose: activation ranges, choosing thresholds, the certificate, the
final report.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import (
    MAX_ARRAY_BYTES,
    Arrays,
    Table,
    digest_of,
    json_bytes,
    parse_npz,
    read_bytes,
    read_toml,
)
from edgeexit.labelled import Samples as Samples
from edgeexit.labelled import from_arrays, from_folder
from edgeexit.names import data_folder, unknown
from edgeexit.overlap import Bloom as Bloom
from edgeexit.preprocess import Preprocess, fit_sample

SPLITS = ("ranges", "tuning", "certificate", "report")
SET_FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class SplitFile:
    """One split as set.toml lists it: digest is that of the Samples, sha256 that of the file."""

    file: str
    sha256: str
    count: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """A folder with set.toml and up to four splits; which splits are there may differ."""

    name: str
    folder: Path
    class_names: tuple[str, ...]
    preprocess: Preprocess
    splits: dict[str, SplitFile]
    origin: str
    license: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 over name, classes, preprocessing and the splits' digests; comments are free."""
        document = {
            "name": self.name,
            "class_names": list(self.class_names),
            "preprocess": self.preprocess.to_document(),
            "splits": {name: [split.count, split.digest] for name, split in self.splits.items()},
        }
        return digest_of(json_bytes(document))

    @classmethod
    def load(cls, folder: Path) -> "CalibrationSet":
        """Read *folder*/set.toml. UsageError if it is absent, BadFile if it is wrong."""
        table = read_toml(folder / "set.toml")
        table.expect_format(SET_FORMAT)
        class_names = tuple(table.list_of("class_names", str))
        if not class_names or len(set(class_names)) != len(class_names):
            raise BadFile(f"{table.where}: class_names: expected different names, at least one")
        name = table.get("name", str)
        if not NAME.fullmatch(name):
            raise BadFile(f"{table.where}: name: {name!r}, expected letters, digits, '.', '_', '-'")
        splits = table.table("splits")
        splits.only(*SPLITS)
        return cls(
            name=name,
            folder=folder,
            class_names=class_names,
            preprocess=Preprocess.from_table(table.table("preprocess")),
            splits={s: _split_file(splits.table(s)) for s in SPLITS if s in splits},
            origin=table.find("origin", str, ""),
            license=table.find("license", str, ""),
        )

    def split(self, name: str) -> Samples:
        """The samples of one split, digests checked. UsageError if that split is not here."""
        if name not in self.splits:
            raise unknown(name, self.splits, f"split of {self.name}")
        entry = self.splits[name]
        path = self.folder / entry.file
        if not path.is_file():
            here = [s for s, other in self.splits.items() if (self.folder / other.file).is_file()]
            raise UsageError(
                f"{self.name}:{name}: this split is not installed here "
                f"(installed: {', '.join(here) or 'none'})",
                hint="the source checkout holds all four splits",
            )
        data = read_bytes(path, limit_bytes=MAX_ARRAY_BYTES)
        if digest_of(data) != entry.sha256:
            raise BadFile(f"{path}: altered: its SHA-256 is not the one in set.toml")
        arrays = parse_npz(data, str(path))
        stored = self.preprocess
        if stored.kind == "image":  # a set's own files are always channels last
            stored = replace(stored, layout="nhwc")
        samples = from_arrays(
            arrays, f"{self.name}:{name}", stored, len(self.class_names), None, True
        )
        if len(samples) != entry.count or samples.digest != entry.digest:
            raise BadFile(f"{path}: {len(samples)} samples, not those that set.toml lists")
        return samples


def _split_file(table: Table) -> SplitFile:
    table.only("file", "sha256", "count", "digest")
    name = table.get("file", str)
    if not NAME.fullmatch(name):
        raise BadFile(f"{table.where}.file: expected a plain file name, found {name!r}")
    return SplitFile(
        file=name,
        sha256=table.get("sha256", str),
        count=table.get("count", int),
        digest=table.get("digest", str),
    )


def shipped_sets() -> list[str]:
    """The names of the sets that come with edgeexit."""
    return sorted(path.parent.name for path in data_folder("calibration").glob("*/set.toml"))


def find_set(name: str | Path) -> CalibrationSet:
    """
    The set called *name*: shipped, or a folder here that holds a set.toml.

    A bare name also finds ./calibration/NAME and ./NAME: bundles store a set's name, not its path.
    """
    folder = _set_folder(name)
    if folder is not None:
        return CalibrationSet.load(folder)
    error = unknown(str(name), shipped_sets(), "calibration set")
    raise UsageError(
        str(error),
        hint=error.hint
        or "go to the folder that holds it (or its calibration/), or make a set: "
        "edgeexit calibration make FOLDER -o NAME",
    )


def is_set(text: str | Path) -> bool:
    """Whether *text* names a set as find_set understands it (and not bare samples)."""
    return _set_folder(text) is not None


def _set_folder(name: str | Path) -> Path | None:
    if str(name) in shipped_sets():
        return data_folder("calibration") / name
    # What lies here under that very name comes first: it may be a folder of pictures.
    folder = Path(name) if Path(name).exists() else Path("calibration") / name
    return folder if (folder / "set.toml").is_file() else None


def load_samples(
    text: str | Path,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    labels_required: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Samples:
    """
    The samples that *text* names: "SET:SPLIT", a folder of class subfolders, or FILE.npz.

    They come out fit for *preprocess* (default: the set's own). *class_names* are the network's:
    a set must have the same, subfolders must be among them ("/" in a name is written "_"),
    labels must be below their number. *input_shape* is the network's, batch axis first: an
    npz holds samples of that shape or, for images, channels last. Pictures without labels are
    taken only if *labels_required* is False. *progress* is called with the number of pictures
    read since the last call.
    """
    text = str(text)
    set_name, colon, split = text.rpartition(":")
    if colon and (split in SPLITS or is_set(set_name)):
        return _of_set(find_set(set_name), split, preprocess, class_names, input_shape)
    if is_set(text):
        raise UsageError(
            f"{text}: is a set of {len(SPLITS)} splits, expected one of them",
            hint=f"say for example {text}:tuning",
        )
    path = Path(text)
    if path.is_dir():
        return from_folder(path, preprocess, class_names, labels_required, progress)
    if path.suffix == ".npz":
        arrays = parse_npz(read_bytes(path, limit_bytes=MAX_ARRAY_BYTES), str(path))
        count = None if class_names is None else len(class_names)
        _check_order(arrays, class_names)
        return from_arrays(arrays, path.stem, preprocess, count, input_shape, labels_required)
    if path.exists():
        raise UsageError(
            f"{text}: expected SET:SPLIT, a folder of pictures, or an .npz file",
            hint="numpy.savez(FILE, samples=..., labels=...) writes one",
        )
    known = [f"{name}:{split}" for name in shipped_sets() for split in SPLITS]
    raise unknown(text, known, "samples")


# ---------------------------------------------------------------- a set's split


def _check_order(arrays: Arrays, class_names: Sequence[str] | None) -> None:
    """BadFile if the file says itself what its labels mean, and that is something else."""
    if class_names is None or "class_names" not in arrays:
        return
    found = [str(name) for name in arrays.get("class_names", kinds="US", ndim=1)]
    if found != list(class_names):
        raise BadFile(
            f"{arrays.where}: class_names: found {', '.join(found)[:200]}, expected "
            f"{', '.join(class_names)[:200]}, in this order",
            hint="number the labels in the network's order, or leave class_names out",
        )


def _of_set(
    source: CalibrationSet,
    split: str,
    preprocess: Preprocess | None,
    class_names: Sequence[str] | None,
    input_shape: Sequence[int] | None,
) -> Samples:
    if class_names is not None and tuple(class_names) != source.class_names:
        raise UsageError(_class_difference(source, tuple(class_names)))
    samples = source.split(split)
    if preprocess is None or preprocess == source.preprocess:
        return samples
    if preprocess.kind != source.preprocess.kind:
        raise UsageError(
            f"{samples.name}: holds {source.preprocess.kind}s, the network takes {preprocess.kind}s"
        )
    if preprocess.kind == "array":
        wanted = None if input_shape is None else tuple(input_shape[1:])
        if wanted not in (None, samples.samples.shape[1:]):
            raise UsageError(
                f"{samples.name}: samples of shape {samples.samples.shape[1:]}, "
                f"the network takes {wanted}"
            )
        return samples
    return _refit(samples, source.preprocess, preprocess)


def _class_difference(source: CalibrationSet, wanted: tuple[str, ...]) -> str:
    if len(wanted) != len(source.class_names):
        return f"{source.name}: {len(source.class_names)} classes, the network has {len(wanted)}"
    k = next(k for k, (a, b) in enumerate(zip(source.class_names, wanted, strict=True)) if a != b)
    return f"{source.name}: class {k} is {source.class_names[k]!r}, the network's is {wanted[k]!r}"


def _refit(samples: Samples, old: Preprocess, new: Preprocess) -> Samples:
    """The same pictures in the size and colours of another network."""
    if (old.sample_shape, old.color) == (new.sample_shape, new.color):
        return samples
    pixels = samples.samples
    if (old.color == "bgr") != (new.color == "bgr") and old.channels == 3:
        # fit_sample takes three channels to be in the order of the network.
        pixels = pixels[..., ::-1]
    return Samples(
        samples=np.stack([fit_sample(pixel, new) for pixel in pixels]),
        labels=samples.labels,
        ids=samples.ids,
        name=samples.name,
    )


#
