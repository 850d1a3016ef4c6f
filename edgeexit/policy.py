"""
How sure an exit is, and when that is sure enough to stop.

Callers see Confidence (logits -> one float, higher = surer) and Policy (which exits are kept,
with which thresholds). Hidden here: confidences of integer logits are computed from integers,
so that one sample, a batch, x86 and ARM agree to the last bit. exp(-scale * d) for a distance
of d steps to the largest logit is rounded once to a multiple of 2**-40; sums of such integers
do not depend on their order, and one float64 division and one rounding to float32 follow.
"""

import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, EdgeExitError, UsageError, hinting
from edgeexit.files import Table, json_bytes, read_json, write_file
from edgeexit.names import choose, unknown
from edgeexit.tflite import TensorSpec

# 1: first version.
# 2: class_offsets and certificate.
FORMAT = 2

ALWAYS = -math.inf  # the threshold of an exit that is taken whatever its confidence
NEVER = sys.float_info.max  # of one that is computed but never taken
DROPPED = math.inf  # of one that is not even computed

_ONE = 2.0**40
# The bits behind the point of a weight that is being computed, and half of a weight's last one.
_FRACTION = 192
_HALF = 1 << (_FRACTION - 41)
_SINGLE = struct.Struct("f")
# From here on numpy's fixed cost per call is less than a Python loop over the classes.
_MANY_CLASSES = 32


# ---------------------------------------------------------------- confidence


@lru_cache(maxsize=64)
def _weights(scale: float, levels: int) -> tuple[int, ...]:
    """
    rint(exp(-scale * d) * 2**40) for d = 0 .. levels - 1.

    In integers, which every machine multiplies alike: libm's exp differs between them in the last
    bit. Only exp(-scale) itself is taken in decimal arithmetic; after 65,535 products of 192 bits
    the error is below 2**-135. Ends early in zeros, where exp falls below 2**-41.
    """
    context = Context(prec=80)
    factor = context.multiply(context.exp(Decimal(-scale)), Decimal(2**_FRACTION))
    ratio, value, found = int(factor.to_integral_value()), 1 << _FRACTION, []
    for _ in range(levels):
        weight = (value + _HALF) >> (_FRACTION - 40)
        if weight == 0:
            break
        found.append(weight)
        value = value * ratio >> _FRACTION
    return (*found, *(0,) * (levels - len(found)))


def _round(value: float) -> float:
    """*value* rounded to float32, as a Python float."""
    single: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    return single


class Measure(Protocol):
    """
    One way to turn an exit's logits into a confidence.

    one and many see integer logits: one as a list, many as int64 (N, C); both must agree to
    the last bit. real sees the float64 logits (C,) of a float model, all finite. Results are
    float64; the caller rounds. With a single class every answer is sure: that case never gets
    here.
    """

    def one(self, logits: list[int], weights: Sequence[int], scale: float) -> float:
        """The confidence of one sample."""
        ...

    def many(
        self, logits: NDArray[np.int64], weights: NDArray[np.int64], scale: float
    ) -> NDArray[np.float64]:
        """The confidences (N,) of N samples."""
        ...

    def real(self, logits: NDArray[np.float64]) -> float:
        """The confidence of one sample of a float model."""
        ...


class _MaxProb:
    """The softmax probability of the likeliest class: 1/classes .. 1."""

    def one(self, logits: list[int], weights: Sequence[int], scale: float) -> float:
        top = max(logits)
        return _ONE / sum([weights[top - q] for q in logits])

    def many(
        self, logits: NDArray[np.int64], weights: NDArray[np.int64], scale: float
    ) -> NDArray[np.float64]:
        top = logits.max(axis=1, keepdims=True)
        total = weights[top - logits].sum(axis=1)
        return np.asarray(_ONE / total.astype(np.float64))

    def real(self, logits: NDArray[np.float64]) -> float:
        return 1.0 / float(np.exp(logits - logits.max()).sum())


class _Margin:
    """The likeliest class's softmax probability minus the second's: 0 .. 1."""

    def one(self, logits: list[int], weights: Sequence[int], scale: float) -> float:
        top = max(logits)
        found = sorted(logits)
        return (_ONE - weights[top - found[-2]]) / sum([weights[top - q] for q in logits])

    def many(
        self, logits: NDArray[np.int64], weights: NDArray[np.int64], scale: float
    ) -> NDArray[np.float64]:
        top = logits.max(axis=1, keepdims=True)
        second = np.partition(logits, -2, axis=1)[:, -2]
        total = weights[top - logits].sum(axis=1).astype(np.float64)
        return np.asarray((_ONE - weights[top[:, 0] - second]) / total)

    def real(self, logits: NDArray[np.float64]) -> float:
        weights = np.sort(np.exp(logits - logits.max()))
        return float((weights[-1] - weights[-2]) / weights.sum())


class _Peak:
    """The largest logit minus the mean logit, in the logits' own unit: 0 .. unbounded."""

    def one(self, logits: list[int], weights: Sequence[int], scale: float) -> float:
        count = len(logits)
        return scale * (count * max(logits) - sum(logits)) / count

    def many(
        self, logits: NDArray[np.int64], weights: NDArray[np.int64], scale: float
    ) -> NDArray[np.float64]:
        count = logits.shape[1]
        above = count * logits.max(axis=1) - logits.sum(axis=1)
        return np.asarray(scale * above.astype(np.float64) / count)

    def real(self, logits: NDArray[np.float64]) -> float:
        return float(logits.max() - logits.mean())


MEASURES: dict[str, Measure] = {"max_prob": _MaxProb(), "margin": _Margin(), "peak": _Peak()}


class Confidence:
    """
    The confidence of one exit, whose logits look like *spec*; *measure* is a name in MEASURES.

    read, one and many agree bit for bit. Logits that are NaN or infinite (a float model gone
    wrong) have confidence 0.0, which is the least sure that any measure can be. Several threads
    may share one object.
    """

    def __init__(self, measure: str, spec: TensorSpec) -> None:
        self._measure = choose(measure, MEASURES, "confidence measure")
        self._classes = math.prod(spec.shape)
        self._scale = spec.scale
        integer = np.dtype(spec.dtype).kind in "iu"
        # Above 1e30 a float32 confidence could overflow; no real network comes near.
        if integer and not 0 < spec.scale < 1e30:
            raise BadFile(f"{spec.name}: {spec.dtype} logits with scale {spec.scale}")
        if integer and np.dtype(spec.dtype).itemsize > 2:
            raise BadFile(f"{spec.name}: {spec.dtype} logits, expected int8, int16 or float32")
        levels = 2 ** (8 * np.dtype(spec.dtype).itemsize) if integer else 0
        self._weights = _weights(spec.scale, levels)
        self._table = np.array(self._weights, np.int64)
        self._by_row = not integer or self._classes == 1
        self.read = self._choose(integer)

    def _choose(self, integer: bool) -> Callable[[memoryview], tuple[int, float]]:
        if self._classes == 1:
            return self._read_only_class
        if not integer:
            return self._read_real
        return self._read_few if self._classes < _MANY_CLASSES else self._read_many

    def one(self, logits: NDArray[Any]) -> float:
        """The confidence of the stored logits (C,) of one sample."""
        return self.read(np.ascontiguousarray(logits).data)[1]

    def many(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """The confidences, float32 (N,), of the stored logits (N, C) of N samples."""
        if self._by_row:
            return np.array([self.one(row) for row in logits], np.float32)
        found = self._measure.many(logits.astype(np.int64), self._table, self._scale)
        return found.astype(np.float32)

    # read(memoryview of C stored logits) -> (label, confidence): the hot path. It is one of
    # these, chosen once. The label is the first of the largest logits.

    def _read_few(self, stored: memoryview) -> tuple[int, float]:
        logits = stored.tolist()
        found = self._measure.one(logits, self._weights, self._scale)
        return logits.index(max(logits)), _SINGLE.unpack(_SINGLE.pack(found))[0]

    def _read_many(self, stored: memoryview) -> tuple[int, float]:
        logits = np.asarray(stored).astype(np.int64)
        found = self._measure.many(logits[np.newaxis], self._table, self._scale)
        return int(logits.argmax()), _round(float(found[0]))

    def _read_real(self, stored: memoryview) -> tuple[int, float]:
        logits = np.asarray(stored).astype(np.float64)
        label = int(logits.argmax())
        if not np.isfinite(logits).all():
            return label, 0.0
        with np.errstate(over="ignore"):
            return label, float(np.float32(self._measure.real(logits)))

    def _read_only_class(self, stored: memoryview) -> tuple[int, float]:
        return 0, 1.0


# ---------------------------------------------------------------- policy


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The bundle that another one was cut out of: its digest, and all its exits in order."""

    digest: str
    exits: tuple[str, ...]


class Exits(Protocol):
    """What a policy needs to know of a bundle: its exits, earliest first, and its digest."""

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of bundle.json."""
        ...

    @property
    def parent(self) -> Parent | None:
        """What it was cut out of; None for a bundle that was converted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Policy:
    """
    When to stop, on one kind of device.

    *exits* are all exits of the bundle whose digest is *bundle_digest*; *thresholds* belong to
    all but the final one. Exit k is taken when its confidence >= thresholds[k]: ALWAYS takes
    it whatever happens, NEVER computes it only, DROPPED leaves it out. *class_offsets* may name
    exits with one number for each class: an answer of class c then needs thresholds[k] plus
    number c. *kept* names the exits that are computed, in order (default: those not DROPPED, and
    the final one); it may end before the final exit if the last kept one is taken ALWAYS. target,
    expected and provenance say what the policy was chosen for, certificate what is promised about
    it and why; they are JSON values.
    """

    device: str
    bundle_digest: str
    measure: str
    exits: tuple[str, ...]
    thresholds: tuple[float, ...]
    kept: tuple[str, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    class_offsets: Mapping[str, tuple[float, ...]] | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        choose(self.measure, MEASURES, "confidence measure")
        if not self.exits or len(set(self.exits)) != len(self.exits):
            raise UsageError(f"exits: expected different names, found {list(self.exits)}")
        if len(self.thresholds) != len(self.exits) - 1:
            raise UsageError(
                f"thresholds: {len(self.thresholds)} for {len(self.exits)} exits, "
                f"expected {len(self.exits) - 1} (the final exit has none)"
            )
        for name, threshold in zip(self.exits, self.thresholds, strict=False):
            if math.isnan(threshold):
                raise UsageError(f"thresholds: exit {name!r} has NaN, expected a number")
        if not self.kept:
            pairs = zip(self.exits, (*self.thresholds, ALWAYS), strict=True)
            object.__setattr__(self, "kept", tuple(n for n, t in pairs if t < DROPPED))
        self._check_kept()
        self._check_offsets()

    def _check_kept(self) -> None:
        for name in self.kept:
            if name not in self.exits:
                raise unknown(name, self.exits, "exit")
        if self.kept != tuple(name for name in self.exits if name in self.kept):
            raise UsageError(f"kept: {list(self.kept)} is not in the order of {list(self.exits)}")
        for name in self.kept:
            if self.threshold(name) == DROPPED:
                raise UsageError(f"kept: exit {name!r} is dropped by its threshold (inf)")
        if self.kept[-1] != self.exits[-1] and self.threshold(self.kept[-1]) != ALWAYS:
            raise UsageError(
                f"kept: ends with {self.kept[-1]!r}, which is not the final exit and is not "
                "always taken (threshold -inf)"
            )

    def _check_offsets(self) -> None:
        for name, offsets in (self.class_offsets or {}).items():
            if name not in self.exits[:-1]:
                raise unknown(name, self.exits[:-1], "exit with a threshold")
            if not all(map(math.isfinite, offsets)):
                raise UsageError(f"class_offsets: exit {name!r} has NaN or infinity")

    def threshold(self, exit_name: str) -> float:
        """The confidence from which on *exit_name* is taken; ALWAYS for the final exit."""
        return (*self.thresholds, ALWAYS)[self.exits.index(exit_name)]

    def limits(self, exit_name: str, classes: int) -> tuple[float, ...]:
        """
        The confidence from which on an answer of each class is taken at *exit_name*.

        ALWAYS at the last kept exit. BadFile if class_offsets are for another number of classes.
        """
        threshold = ALWAYS if exit_name == self.kept[-1] else self.threshold(exit_name)
        offsets = (self.class_offsets or {}).get(exit_name)
        if offsets is None:
            return (threshold,) * classes
        if len(offsets) != classes:
            raise BadFile(
                f"policy: class_offsets: {len(offsets)} at exit {exit_name!r}, "
                f"expected one for each of {classes} classes",
                hint="make it again with: edgeexit tune",
            )
        return tuple(threshold + offset for offset in offsets)

    @classmethod
    def full(cls, bundle: Exits, *, device: str = "any") -> "Policy":
        """The policy that computes every exit of *bundle* and answers with the final one."""
        return cls.forced(bundle, exit=bundle.exits[-1], kept=bundle.exits, device=device)

    @classmethod
    def forced(
        cls,
        bundle: Exits,
        exit: str,
        kept: Sequence[str],
        *,
        measure: str = "max_prob",
        device: str = "any",
    ) -> "Policy":
        """
        Answer always with *exit* of the bundle cut down to the *kept* exits.

        Earlier kept exits are computed and decided upon, but never taken: what it costs to
        leave at *exit*. UsageError if *exit* is not kept or not known.
        """
        if exit not in kept:
            raise unknown(exit, kept, "kept exit")
        for name in kept:
            if name not in bundle.exits:
                raise unknown(name, bundle.exits, "exit")
        ordered = tuple(name for name in bundle.exits if name in kept)
        taken = bundle.exits.index(exit)
        thresholds = tuple(
            DROPPED if name not in kept else NEVER if k < taken else ALWAYS
            for k, name in enumerate(bundle.exits[:-1])
        )
        return cls(
            device=device,
            bundle_digest=bundle.digest,
            measure=measure,
            exits=bundle.exits,
            thresholds=thresholds,
            kept=ordered,
        )

    def check_bundle(self, bundle: Exits, where: str = "policy") -> None:
        """
        Refuse (BadFile) to serve any other bundle than the one the policy was made for.

        A bundle that was cut out of that one and holds exactly the kept exits is served too: it
        gives the same answers.
        """
        parent = bundle.parent
        is_cut_out = (
            parent is not None
            and (self.bundle_digest, self.exits) == (parent.digest, parent.exits)
            and self.kept == bundle.exits
        )
        is_own = (self.bundle_digest, self.exits) == (bundle.digest, bundle.exits)
        if not is_own and not is_cut_out:
            raise BadFile(
                f"{where}: made for bundle {self.bundle_digest[:12]}, "
                f"this bundle is {bundle.digest[:12]}",
                hint="make one for this bundle with: edgeexit tune",
            )

    def to_document(self) -> dict[str, Any]:
        """The policy as a JSON object; infinite thresholds become the strings inf and -inf."""
        offsets = self.class_offsets
        return {
            "format": self.format,
            "device": self.device,
            "bundle": self.bundle_digest,
            "measure": self.measure,
            "exits": list(self.exits),
            "kept": list(self.kept),
            "thresholds": [t if math.isfinite(t) else str(t) for t in self.thresholds],
            "class_offsets": None if offsets is None else {n: list(o) for n, o in offsets.items()},
            "target": dict(self.target),
            "expected": dict(self.expected),
            "certificate": dict(self.certificate),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_document(cls, table: Table) -> "Policy":
        """Read what to_document wrote. BadFile names the key that is wrong."""
        if table.values.get("format") == 1:
            raise BadFile(
                f"{table.where}: format: 1 holds no certificate, expected {FORMAT}",
                hint="make the policy again with: edgeexit tune",
            )
        number = table.expect_format(FORMAT)
        table.only(
            *("format", "device", "bundle", "measure", "exits", "kept", "thresholds"),
            *("class_offsets", "target", "expected", "certificate", "provenance"),
        )
        try:
            return cls(
                format=number,
                device=table.get("device", str),
                bundle_digest=table.get("bundle", str),
                measure=table.get("measure", str),
                exits=tuple(table.list_of("exits", str)),
                kept=tuple(table.list_of("kept", str)),
                thresholds=limits_from(table, "thresholds"),
                class_offsets=_class_offsets(table),
                target=table.table("target").values,
                expected=table.table("expected").values,
                certificate=table.table("certificate").values,
                provenance=table.table("provenance").values,
            )
        except UsageError as error:
            raise BadFile(f"{table.where}: {error}", hint=error.hint) from error

    @classmethod
    def load(cls, path: Path | str) -> "Policy":
        """The policy in the JSON file *path*. UsageError if absent, BadFile if wrong."""
        with hinting("make it again with: edgeexit tune"):
            return cls.from_document(read_json(Path(path)))

    def save(self, path: Path | str) -> None:
        """Write the policy durably to the JSON file *path*."""
        try:
            data = json_bytes(self.to_document())
        except ValueError as error:
            raise EdgeExitError(f"{path}: policy holds a number that JSON has not") from error
        write_file(Path(path), data)


def limits_from(table: Table, key: str) -> tuple[float, ...]:
    """The thresholds in the list at *key*: numbers, "inf" and "-inf". BadFile for others."""
    infinite = {"inf": DROPPED, "-inf": ALWAYS}
    found = []
    for index, value in enumerate(table.get(key, list)):
        if isinstance(value, str) and value in infinite:
            found.append(infinite[value])
        elif type(value) in (int, float) and abs(value) <= NEVER:
            found.append(float(value))
        else:
            raise BadFile(
                f"{table.where}: {key}[{index}]: expected a number, 'inf' or '-inf', "
                f"found {str(value)[:40]!r}"
            )
    return tuple(found)


def _class_offsets(table: Table) -> dict[str, tuple[float, ...]] | None:
    if "class_offsets" in table and table.values["class_offsets"] is None:
        return None
    offsets = table.table("class_offsets")
    return {name: tuple(offsets.list_of(name, float)) for name in offsets.values}
