"""
Make calibration sets: four disjoint, class-balanced splits that share no group.

Callers see make_set, make_fashion_mnist and write_set. Hidden here: samples are put in order by
the SHA-256 of seed and id, not by a random generator, so any version of any library makes the
same splits; exact copies always count as one group; a set appears complete or not at all.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.duplicates import near_duplicates
from edgeexit.errors import BadFile, UsageError, storage
from edgeexit.files import digest_of, new_folder, npz_bytes, read_bytes, read_npz
from edgeexit.labelled import Samples, folder_classes
from edgeexit.overlap import sample_digests
from edgeexit.preprocess import Preprocess
from edgeexit.samples import NAME, SET_FORMAT, SPLITS, CalibrationSet, load_samples

# Ranges saturate early; the certificate's width shrinks with the root of its share.
SHARES = {"ranges": 0.05, "tuning": 0.20, "certificate": 0.50, "report": 0.25}

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_PREPROCESS = Preprocess(
    kind="image",
    size=(28, 28),
    color="gray",
    scale=1 / 255,
    mean=(0.2860,),
    std=(0.3530,),
    layout="nchw",
)
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, kw_only=True)
class MakeReport:
    """
    What make_set made: samples per split, how many groups, and what may still leak.

    near is [(id, id), ...]: pairs in different splits that look almost the same.
    """

    folder: Path
    name: str
    counts: dict[str, int]
    groups: int
    copies: int
    near: list[tuple[str, str]]

    def to_document(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "counts": self.counts,
            "groups": self.groups,
            "exact_copies": self.copies,
            "near_duplicates": [list(pair) for pair in self.near],
        }


def make_set(
    source: Path,
    out: Path,
    *,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] | None = None,
    group_by: str | None = None,
    seed: int = 0,
    origin: str = "",
    license: str = "",
    progress: Callable[[int], object] | None = None,
) -> MakeReport:
    """
    Split *source*, a folder of class subfolders or an npz, into the new set folder *out*.

    *group_by* is a regular expression whose first group names a sample's group within its id, or
    a CSV file of id,group rows; the samples of one group land in one split. *preprocess* is
    needed for folders; for an npz it is told from shape and dtype if None. UsageError if a
    class cannot reach every split.
    """
    name = out.name
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r}: expected a name of letters, digits, '.', '_', '-'")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(
            f"{out}: exists already, expected a new folder",
            hint="choose another name, or remove it first",
        )
    if source.is_dir():
        class_names = tuple(class_names or folder_classes(source))
    elif preprocess is None and source.suffix == ".npz":
        preprocess = npz_preprocess(source)
    samples = load_samples(source, preprocess, class_names, progress=progress)
    if preprocess is None or not samples.is_labelled:
        raise UsageError(f"{source}: a set needs labels and preprocessing")
    class_names = tuple(class_names or map(str, range(int(samples.labels.max()) + 1)))
    groups, copies = group_numbers(samples, group_by)
    chosen = assign_splits(samples, groups, class_names, seed)
    parts = {split: samples[chosen == k] for k, split in enumerate(SPLITS)}
    write_set(
        out,
        name=name,
        parts=parts,
        class_names=class_names,
        preprocess=preprocess,
        origin=origin or f"made from {source.name}",
        license=license,
        rebuild=f"edgeexit calibration make {source.name} -o {name} --seed {seed}"
        + (f" --group-by '{group_by}'" if group_by else ""),
        seed=seed,
    )
    near = near_duplicates(samples.samples, chosen) if preprocess.kind == "image" else []
    return MakeReport(
        folder=out,
        name=name,
        counts={split: len(part) for split, part in parts.items()},
        groups=len(np.unique(groups)),
        copies=copies,
        near=[(str(samples.ids[a]), str(samples.ids[b])) for a, b in near],
    )


def npz_preprocess(path: Path) -> Preprocess:
    """Told from an npz: uint8 pictures get scale 1/255, mean 0 and std 1; numbers stay as is."""
    samples = read_npz(path).get("samples")
    if samples.dtype != np.uint8 or samples.ndim not in (3, 4):
        return Preprocess(kind="array", layout="as-is")
    shape = samples.shape[1:]
    last = len(shape) == 2 or shape[-1] in (1, 3)
    first = len(shape) == 3 and shape[0] in (1, 3)
    if last == first:
        raise BadFile(
            f"{path}: samples: each of shape {shape} may be channels first or last",
            hint="give pictures as (N, H, W, C) or (N, C, H, W) with 1 or 3 channels",
        )
    height, width = shape[:2] if last else shape[1:]
    channels = 1 if len(shape) == 2 else shape[2 if last else 0]
    return Preprocess(
        kind="image",
        size=(int(height), int(width)),
        color="gray" if channels == 1 else "rgb",
        scale=1 / 255,
        layout="nhwc" if last else "nchw",
    )


# ---------------------------------------------------------------- groups and splits


def group_numbers(samples: Samples, group_by: str | None) -> tuple[NDArray[np.int64], int]:
    """
    A group number for each sample, int64 (N,), and how many samples are exact copies from another.

    Groups that share a copied sample become one.
    """
    own = list(map(str, samples.ids)) if group_by is None else _named_groups(samples.ids, group_by)
    numbers = {name: k for k, name in enumerate(dict.fromkeys(own))}
    parent = list(range(len(numbers)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first_seen: dict[bytes, int] = {}
    copies = 0
    for name, digest in zip(own, sample_digests(samples.samples), strict=True):
        number = numbers[name]
        earlier = first_seen.setdefault(digest.tobytes(), number)
        copies += earlier != number
        parent[root(number)] = root(earlier)
    return np.array([root(numbers[name]) for name in own], np.int64), copies


def _named_groups(ids: NDArray[np.str_], group_by: str) -> list[str]:
    if group_by.lower().endswith(".csv"):
        table = _group_table(Path(group_by))
        missing = next((str(i) for i in ids if str(i) not in table), None)
        if missing is not None:
            raise UsageError(f"{group_by}: no row for {missing!r}, expected id,group for each")
        return [table[str(i)] for i in ids]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UsageError(f"--group-by {group_by!r}: {error}") from error
    if pattern.groups < 1:
        raise UsageError(
            f"--group-by {group_by!r}: has no (group)", hint="for example '(subject[0-9]+)_'"
        )
    found = []
    for sample_id in map(str, ids):
        match = pattern.search(sample_id)
        if match is None or match[1] is None:
            raise UsageError(f"--group-by {group_by!r}: does not match {sample_id!r}")
        found.append(match[1])
    return found


def _group_table(path: Path) -> dict[str, str]:
    try:
        text = read_bytes(path).decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFile(f"{path}: not a CSV file: {error}") from error
    if rows and rows[0] == ["id", "group"]:
        rows = rows[1:]
    wrong = next((k for k, row in enumerate(rows) if len(row) != 2), None)
    if wrong is not None:
        raise BadFile(f"{path}: row {wrong + 1}: {len(rows[wrong])} fields, expected id,group")
    return {sample_id: group for sample_id, group in rows}


def assign_splits(
    samples: Samples, groups: NDArray[np.int64], class_names: Sequence[str], seed: int
) -> NDArray[np.int64]:
    """
    The split of each sample as its position in SPLITS, int64 (N,).

    Groups go one by one, largest first and else by the SHA-256 of seed and first id, to the split
    that still lacks the greatest share of its classes. With groups of one and shares that
    divide evenly the splits come out exactly balanced.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups.tolist()):
        members[group].append(index)
    counts = np.bincount(samples.labels, minlength=len(class_names))
    wanted = np.array(list(SHARES.values()))[:, np.newaxis] * np.maximum(counts, 1)
    missing = wanted.copy()
    chosen = np.empty(len(samples), np.int64)

    def order(indices: list[int]) -> tuple[int, bytes]:
        text = f"{seed}:{samples.ids[indices[0]]}"
        return -len(indices), hashlib.sha256(text.encode()).digest()

    for indices in sorted(members.values(), key=order):
        labels = samples.labels[indices]
        need = (missing[:, labels] / wanted[:, labels]).sum(axis=1)
        split = int(need.argmax())
        np.subtract.at(missing[split], labels, 1.0)
        chosen[indices] = split
    for k, name in enumerate(SPLITS):
        there = np.bincount(samples.labels[chosen == k], minlength=len(class_names))
        if (there == 0).any():
            lacking = class_names[int(there.argmin())]
            raise UsageError(
                f"class {lacking!r}: nothing left for split {name!r}",
                hint="each class needs samples from at least four groups",
            )
    return chosen


# ---------------------------------------------------------------- writing


def write_set(
    out: Path,
    *,
    name: str,
    parts: Mapping[str, Samples],
    class_names: Sequence[str],
    preprocess: Preprocess,
    origin: str,
    license: str,
    rebuild: str,
    seed: int,
) -> CalibrationSet:
    """Write set.toml and one npz per split into the new folder *out*; equal input, equal bytes."""
    head = {
        "format": SET_FORMAT,
        "name": name,
        "origin": origin,
        "license": license,
        "rebuild": rebuild,
        "seed": seed,
        "class_names": list(class_names),
    }
    lines = ["# Labelled samples for edgeexit; the keys are explained in calibration/README.md."]
    lines += _toml(head)
    lines += ["", "[preprocess]", *_toml(preprocess.to_document())]
    with new_folder(out) as folder, storage(out):
        for split, part in parts.items():
            # Only as wide as the longest id, whatever array the ids were cut from.
            ids = np.array(part.ids.tolist())
            data = npz_bytes({"samples": part.samples, "labels": part.labels, "ids": ids})
            (folder / f"{split}.npz").write_bytes(data)
            entry = {
                "file": f"{split}.npz",
                "sha256": digest_of(data),
                "count": len(part),
                "digest": part.digest,
            }
            lines += ["", f"[splits.{split}]", *_toml(entry)]
        (folder / "set.toml").write_bytes(("\n".join(lines) + "\n").encode())
    return CalibrationSet.load(out)


def _toml(values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers and flat lists are TOML, but for DEL, which TOML wants escaped.
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for key, value in values.items()
    ]


# ---------------------------------------------------------------- the shipped set


def make_fashion_mnist(source: Path, out: Path) -> CalibrationSet:
    """
    The shipped set: the 10,000 official test images of Fashion-MNIST, found in *source*.

    *source* holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz as the authors publish
    them. Per class: 50 ranges, 200 tuning, 500 certificate, 250 report. Ids are positions.
    """
    images, labels = read_idx(source, "t10k")
    samples = Samples(
        samples=images,
        labels=labels,
        ids=np.array([f"t10k-{k:05d}" for k in range(len(images))]),
        name="fashion-mnist",
    )
    groups, _ = group_numbers(samples, None)
    chosen = assign_splits(samples, groups, FASHION_CLASSES, seed=0)
    return write_set(
        out,
        name="fashion-mnist",
        parts={split: samples[chosen == k] for k, split in enumerate(SPLITS)},
        class_names=FASHION_CLASSES,
        preprocess=FASHION_PREPROCESS,
        origin="The official test half (10,000 images) of Fashion-MNIST by Xiao, Rasul and "
        "Vollgraf, 2017, from Debian's package dataset-fashion-mnist",
        license="MIT, Copyright 2017 Zalando SE",
        rebuild="edgeexit calibration fashion-mnist -o calibration/fashion-mnist",
        seed=0,
    )


def read_idx(folder: Path, half: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 (N, 28, 28, 1) and labels int64 (N,) of *half* "train" or "t10k"."""
    images = _idx(folder / f"{half}-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / f"{half}-labels-idx1-ubyte.gz", 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        raise BadFile(f"{folder}: {images.shape} images, {labels.shape} labels: not Fashion-MNIST")
    return images[..., np.newaxis], labels.astype(np.int64)


def _idx(path: Path, axes: int) -> NDArray[np.uint8]:
    # magic 0, 0, 8 (uint8), axes; then each length as a big-endian uint32; then the bytes.
    try:
        data = gzip.decompress(read_bytes(path))
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(f"{path}: not a sound gzip file: {error}") from error
    start = 4 + 4 * axes
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < start:
        raise BadFile(f"{path}: expected an idx file of uint8 with {axes} axes")
    shape = tuple(np.frombuffer(data, ">u4", axes, 4).tolist())
    if int(np.prod(shape)) != len(data) - start or 0 in shape:
        raise BadFile(f"{path}: shape {shape} does not fit {len(data) - start} bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
