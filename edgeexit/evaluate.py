"""
What a bundle makes of labelled samples: records of every exit's logits, and evaluations.

Callers see Record, record, evaluate and Evaluation. A record holds the stored integers of all
exits for each sample, so any confidence measure can be computed from it later, on any machine,
to the same bit; it is what tune works on and comes from nowhere else. An evaluation is what a
user sees: one policy, run as `run` runs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, bounds
from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, UsageError, hinting
from edgeexit.files import Arrays, npz_bytes, read_npz, write_file
from edgeexit.interpreter import runtime_name
from edgeexit.policy import Policy
from edgeexit.runtime import Runner
from edgeexit.samples import Samples
from edgeexit.tflite import TensorSpec

# 1: first version.
FORMAT = 1
UNSPLIT = "unsplit"
_AGAIN = "make it again with: edgeexit evaluate BUNDLE SET:tuning+certificate --record FILE.npz"

_ON_STEP_EVERY = 50

Step = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Record:
    """
    The logits of every exit for N samples.

    logits (N, E, C) are stored integers, or float32 for a float bundle; specs holds one
    TensorSpec for each exit. labels int64 (N,), ids text (N,), digests uint8 (N, 16) of the raw
    samples, splits text (N,): "tuning", "certificate", ... or "unsplit". set_name and set_digest
    name the calibration set, "" if the samples came from none.
    """

    logits: NDArray[Any]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_]
    digests: NDArray[np.uint8]
    splits: NDArray[np.str_]
    exits: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    bundle_digest: str
    set_name: str = ""
    set_digest: str = ""
    runtime: str = ""
    made_by: str = __version__

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Positions of the samples of one *split*."""
        return np.flatnonzero(self.splits == split)

    def correct(self) -> NDArray[np.bool_]:
        """Whether each exit is right about each sample, bool (N, E)."""
        return np.asarray(self.logits.argmax(axis=2) == self.labels[:, None])

    def to_bytes(self) -> bytes:
        """The npz file; equal records give equal bytes."""
        return npz_bytes(
            {
                "format": np.array(FORMAT),
                "made_by": np.array(self.made_by),
                "runtime": np.array(self.runtime),
                "bundle": np.array(self.bundle_digest),
                "set_name": np.array(self.set_name),
                "set_digest": np.array(self.set_digest),
                "exits": np.array(self.exits),
                "tensors": np.array([spec.name for spec in self.specs]),
                "scales": np.array([spec.scale for spec in self.specs], np.float64),
                "zero_points": np.array([spec.zero_point for spec in self.specs], np.int64),
                "logits": self.logits,
                "labels": self.labels,
                "ids": self.ids,
                "digests": self.digests,
                "splits": self.splits,
            }
        )

    def save(self, path: Path | str) -> None:
        """Write the record durably to the npz file *path*."""
        write_file(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> "Record":
        """Read what save wrote. UsageError if absent, BadFile if truncated, altered, misfit."""
        with hinting(_AGAIN):
            return cls._read(Path(path))

    @classmethod
    def _read(cls, path: Path) -> "Record":
        arrays = read_npz(path)
        number = _scalar(arrays, "format", "iu")
        if number != str(FORMAT):
            raise BadFile(f"{arrays.where}: format {number}, this version reads {FORMAT}")
        logits = arrays.get("logits", kinds="if", ndim=3)
        count, exits, classes = logits.shape
        shapes = {
            "labels": ("iu", (count,)),
            "ids": ("U", (count,)),
            "digests": ("u", (count, 16)),
            "splits": ("U", (count,)),
            "exits": ("U", (exits,)),
            "tensors": ("U", (exits,)),
            "scales": ("f", (exits,)),
            "zero_points": ("iu", (exits,)),
        }
        found = {}
        for name, (kinds, shape) in shapes.items():
            found[name] = arrays.get(name, kinds=kinds, ndim=len(shape))
            if found[name].shape != shape:
                raise BadFile(
                    f"{arrays.where}: {name}: shape {found[name].shape}, expected {shape}"
                )
        if logits.dtype.name not in ("int8", "int16", "float32") or 0 in (exits, classes):
            raise BadFile(f"{arrays.where}: logits: {logits.dtype} {logits.shape}")
        if not (np.isfinite(logits).all() and np.isfinite(found["scales"]).all()):
            raise BadFile(f"{arrays.where}: logits or scales: NaN or infinite")
        labels = found["labels"].astype(np.int64)
        if count and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise BadFile(f"{arrays.where}: labels: expected 0 .. {classes - 1}")
        specs = zip(found["tensors"], found["scales"], found["zero_points"], strict=True)
        return cls(
            logits=logits,
            labels=labels,
            ids=found["ids"],
            digests=found["digests"].astype(np.uint8),
            splits=found["splits"],
            exits=tuple(map(str, found["exits"])),
            specs=tuple(
                TensorSpec(
                    name=str(name),
                    shape=(1, classes),
                    dtype=logits.dtype.name,
                    scale=float(scale),
                    zero_point=int(zero_point),
                )
                for name, scale, zero_point in specs
            ),
            bundle_digest=_scalar(arrays, "bundle", "U"),
            set_name=_scalar(arrays, "set_name", "U"),
            set_digest=_scalar(arrays, "set_digest", "U"),
            runtime=_scalar(arrays, "runtime", "U"),
            made_by=_scalar(arrays, "made_by", "U"),
        )


def _scalar(arrays: Arrays, name: str, kinds: str) -> str:
    return str(arrays.get(name, kinds=kinds, ndim=0)[()])


def split_of(samples: Samples) -> str:
    """The split that *samples* are: what stands behind the colon of their name."""
    return samples.name.rpartition(":")[2] if ":" in samples.name else UNSPLIT


def record(
    bundle: Bundle,
    samples_list: Sequence[Samples],
    *,
    set_name: str = "",
    set_digest: str = "",
    threads: int = 1,
    on_step: Step | None = None,
) -> Record:
    """
    Run every exit of *bundle* on all samples of *samples_list*.

    *on_step* is called now and then with the number of samples done since. UsageError if there
    are no samples or they have no labels.
    """
    for samples in samples_list:
        check_labels(bundle, samples)
    rows: list[NDArray[Any]] = []
    with Runner(bundle, policy=None, threads=threads) as runner:
        for samples in samples_list:
            for sample in samples.samples:
                rows.append(runner.raw_logits(sample))
                if on_step is not None and len(rows) % _ON_STEP_EVERY == 0:
                    on_step(_ON_STEP_EVERY)
    return Record(
        logits=np.stack(rows),
        labels=np.concatenate([samples.labels for samples in samples_list]),
        ids=np.concatenate([samples.ids for samples in samples_list]),
        digests=np.concatenate([samples.digests() for samples in samples_list]),
        splits=np.concatenate([np.full(len(s), split_of(s)) for s in samples_list]),
        exits=bundle.exits,
        specs=bundle.logits,
        bundle_digest=bundle.digest,
        set_name=set_name,
        set_digest=set_digest,
        runtime=runtime_name(),
    )


def check_labels(bundle: Bundle, samples: Samples) -> None:
    """Refuse (UsageError) samples that are none, unlabelled, or of classes the bundle has not."""
    if len(samples) == 0:
        raise UsageError(f"{samples.name}: no samples in it")
    if not samples.is_labelled:
        raise UsageError(f"{samples.name}: no labels", hint="edgeexit run classifies without them")
    if int(samples.labels.max()) >= len(bundle.class_names):
        raise UsageError(
            f"{samples.name}: label {int(samples.labels.max())}, "
            f"the bundle has {len(bundle.class_names)} classes"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    One policy on N labelled samples.

    accuracy is the share of right answers with its exact 95 % interval; per_class the same for
    each class's own samples (None without any); confusion[true][answered] counts; exit_rates
    stand in the bundle's order and sum to 1; latencies are of Runner.__call__.
    """

    samples: int
    correct: int
    interval: tuple[float, float]
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    exits: tuple[str, ...]
    exit_rates: tuple[float, ...]
    mean_ms: float
    p95_ms: float
    class_names: tuple[str, ...]
    policy: str
    data: str
    bundle_digest: str

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.correct / self.samples

    def to_document(self) -> dict[str, Any]:
        """The object that `edgeexit evaluate --json` prints."""
        return {
            "data": self.data,
            "policy": self.policy,
            "bundle": self.bundle_digest,
            "samples": self.samples,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.interval),
            "per_class": dict(zip(self.class_names, self.per_class, strict=True)),
            "confusion": [list(row) for row in self.confusion],
            "exits": list(self.exits),
            "exit_rates": list(self.exit_rates),
            "mean_ms": self.mean_ms,
            "p95_ms": self.p95_ms,
        }


def evaluate(
    bundle: Bundle,
    samples: Samples,
    policy: Policy | Path | str | None = "auto",
    *,
    threads: int = 1,
    on_step: Step | None = None,
) -> Evaluation:
    """
    Classify *samples* with *policy* (as Runner takes it), timing each call.

    One unrecorded call comes first: opening the segments is no part of a latency.
    """
    check_labels(bundle, samples)
    classes = len(bundle.class_names)
    confusion = np.zeros((classes, classes), np.int64)
    leaves = np.zeros(len(bundle.exits), np.int64)
    latency_ns = np.empty(len(samples), np.int64)
    with Runner(bundle, policy=policy, threads=threads, preload=True) as runner:
        origin = runner.policy_origin
        runner(samples.samples[0])
        for k, sample in enumerate(samples.samples):
            found = runner(sample)
            latency_ns[k] = found.latency_ns
            leaves[found.exit] += 1
            confusion[samples.labels[k], found.label] += 1
            if on_step is not None and (k + 1) % _ON_STEP_EVERY == 0:
                on_step(_ON_STEP_EVERY)
    count, correct = len(samples), int(confusion.trace())
    totals = confusion.sum(axis=1)
    return Evaluation(
        samples=count,
        correct=correct,
        interval=bounds.interval(correct, count),
        per_class=tuple(
            float(confusion[c, c] / totals[c]) if totals[c] else None for c in range(classes)
        ),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        exits=bundle.exits,
        exit_rates=tuple(float(n / count) for n in leaves),
        mean_ms=float(latency_ns.mean()) / 1e6,
        p95_ms=float(np.percentile(latency_ns, 95)) / 1e6,
        class_names=bundle.class_names,
        policy=origin,
        data=samples.name,
        bundle_digest=bundle.digest,
    )


def joined(parts: Sequence[Samples]) -> Samples:
    """Several lots of samples as one; their names joined with "+"."""
    if len(parts) == 1:
        return parts[0]
    shapes: Mapping[tuple[int, ...], str] = {part.samples.shape[1:]: part.name for part in parts}
    if len(shapes) > 1:
        raise UsageError(f"samples of different shapes: {', '.join(shapes.values())}")
    return Samples(
        samples=np.concatenate([part.samples for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        name="+".join(part.name for part in parts),
    )
