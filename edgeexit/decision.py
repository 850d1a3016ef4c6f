"""
Who leaves where, how often that is wrong, and what it costs: on arrays alone.

Callers see Record (what every exit says about N samples), Costs (what the way to every exit
costs), Policy (one threshold for each exit) and Family (policies in an order that was fixed
before the samples of a test were seen). Hidden here: a family whose thresholds only fall is
counted in one pass over the samples, however many policies it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import UsageError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Record:
    """
    What E exits say about N labelled samples, seen through one confidence measure.

    confidence float32 (N, E), higher = surer; predicted int (N, E); label int (N,); ids (N,),
    text or integers; reference_correct bool (N,): whether the reference network is right, None if
    the final exit is the reference. UsageError for other shapes or kinds, NaN and infinities.
    """

    confidence: NDArray[Any]
    predicted: NDArray[Any]
    label: NDArray[Any]
    ids: NDArray[Any]
    reference_correct: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        arrays = {
            "confidence": (np.asarray(self.confidence), "f", 2),
            "predicted": (np.asarray(self.predicted), "iu", 2),
            "label": (np.asarray(self.label), "iu", 1),
            "ids": (np.asarray(self.ids), "iuUS", 1),
        }
        if self.reference_correct is not None:
            arrays["reference_correct"] = (np.asarray(self.reference_correct), "b", 1)
        count, exits = len(arrays["label"][0]), 0
        for name, (array, kinds, ndim) in arrays.items():
            if array.ndim != ndim or array.dtype.kind not in kinds or len(array) != count:
                raise UsageError(
                    f"record: {name}: {array.dtype} {array.shape}, expected {ndim} axes and "
                    f"{count} samples of kind {kinds!r}"
                )
            if ndim == 2:
                exits = exits or array.shape[1]
                if array.shape[1] != exits or exits == 0:
                    raise UsageError(f"record: {name}: {array.shape[1]} exits, expected {exits}")
            object.__setattr__(self, name, array)
        if not np.isfinite(self.confidence).all():
            bad = int(np.flatnonzero(~np.isfinite(self.confidence).all(axis=1))[0])
            raise UsageError(f"record: confidence: sample {bad} has NaN or infinity")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def exits(self) -> int:
        """How many exits there are."""
        return int(self.confidence.shape[1])

    @cached_property
    def correct(self) -> Bools:
        """Whether each exit is right about each sample, bool (N, E)."""
        return np.asarray(self.predicted == self.label[:, None])

    @cached_property
    def reference(self) -> Bools:
        """Whether the reference is right about each sample, bool (N,)."""
        if self.reference_correct is None:
            return np.asarray(self.correct[:, -1])
        return np.asarray(self.reference_correct)

    @cached_property
    def loss(self) -> NDArray[np.int8]:
        """int8 (N, E): 1 a harmful flip (only the reference is right), -1 a helpful one, else 0."""
        return np.asarray(self.reference[:, None].astype(np.int8) - self.correct.astype(np.int8))

    def take(self, rows: NDArray[Any]) -> "Record":
        """The samples *rows* (positions or bool) alone; rows may repeat."""
        reference = None if self.reference_correct is None else self.reference_correct[rows]
        return Record(
            *(self.confidence[rows], self.predicted[rows], self.label[rows], self.ids[rows]),
            reference_correct=reference,
        )

    def joined(self, other: "Record") -> "Record":
        """The samples of both."""
        if (self.reference_correct is None) != (other.reference_correct is None):
            raise UsageError("records with and without a reference do not join")
        reference = None
        if self.reference_correct is not None and other.reference_correct is not None:
            reference = np.concatenate([self.reference_correct, other.reference_correct])
        return Record(
            np.concatenate([self.confidence, other.confidence]),
            np.concatenate([self.predicted, other.predicted]),
            np.concatenate([self.label, other.label]),
            np.concatenate([self.ids, other.ids]),
            reference_correct=reference,
        )


@dataclass(frozen=True, eq=False)
class Costs:
    """
    The parts of what an answer costs, float64 (E,) each, in one unit (ns or mJ).

    head[k] is what only exit k's logits need, backbone[k] everything else up to there;
    handover[k] confidence, decision and dispatch after kept, non-final exit k (0 for the final).
    UsageError for other shapes, NaN, infinities, or a part below 0.
    """

    backbone: NDArray[Any]
    head: NDArray[Any]
    handover: NDArray[Any]

    def __post_init__(self) -> None:
        count = len(np.atleast_1d(np.asarray(self.backbone)))
        for name in ("backbone", "head", "handover"):
            array = np.asarray(getattr(self, name), np.float64)
            if array.shape != (count,) or count == 0:
                raise UsageError(f"costs: {name}: shape {array.shape}, expected ({count},)")
            if not np.isfinite(array).all() or (array < 0).any():
                raise UsageError(f"costs: {name}: expected finite numbers of 0 or more")
            object.__setattr__(self, name, array)

    def at(self, kept: NDArray[Any]) -> Floats:
        """What leaving at each exit costs, float64 (..., E), if *kept*, bool (..., E), run."""
        extra = np.where(kept, self.head + self.handover, 0.0)
        return np.asarray(np.cumsum(self.backbone + extra, axis=-1))

    @property
    def full(self) -> float:
        """What the network without early exits costs."""
        return float(self.backbone.sum() + self.head[-1] + self.handover[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """
    When to stop, as thresholds alone; edgeexit.policy.Policy adds what `run` needs to know.

    thresholds has E - 1 floats: exit k is taken when confidence >= thresholds[k], inf for a
    dropped exit. With class_offsets float64 (E - 1, C) an answer of class c needs
    thresholds[k] + class_offsets[k, c]; one of none of the C classes has offset 0. certificate
    says what is promised about it and why.
    """

    thresholds: tuple[float, ...]
    class_offsets: Floats | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Bools:
        """Which exits are computed, bool (E,); the final one always."""
        return np.append(np.isfinite(self.thresholds) | (np.array(self.thresholds) < 0), True)

    def exits(self, record: Record) -> Ints:
        """The exit, int64 (N,), that each sample of *record* leaves at."""
        return leaves(record, np.array(self.thresholds), self.class_offsets)

    def mean_cost(self, record: Record, costs: Costs) -> float:
        """The mean cost of the samples of *record*."""
        return float(costs.at(self.kept)[self.exits(record)].mean())


def leaves_at(
    confidence: NDArray[np.floating], thresholds: Sequence[float] | Sequence[NDArray[Any]] | Floats
) -> Ints:
    """
    The exit each sample leaves at, int64 (N,): the first whose threshold it reaches.

    confidence (N, M) or wider; with M thresholds, each one number or (N,), the exits are 0 .. M.
    """
    found = np.full(len(confidence), len(thresholds), np.int64)
    for k in reversed(range(len(thresholds))):
        # A bare float would be rounded to the kind of float that the confidences are.
        found[confidence[:, k] >= np.asarray(thresholds[k], np.float64)] = k
    return found


def leaves(record: Record, thresholds: Floats, class_offsets: Floats | None = None) -> Ints:
    """The first exit, int64 (N,), whose threshold (E - 1,) each sample reaches, else the final."""
    if class_offsets is None:
        return leaves_at(record.confidence, thresholds)
    limits = [
        limit + _offsets_of(offsets, record.predicted[:, k])
        for k, (limit, offsets) in enumerate(zip(thresholds, class_offsets, strict=True))
    ]
    return leaves_at(record.confidence, limits)


def _offsets_of(offsets: Floats, answers: NDArray[Any]) -> Floats:
    has_one = (answers >= 0) & (answers < len(offsets))
    return np.where(has_one, offsets[np.where(has_one, answers, 0)], 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """
    What S policies do to N samples: how many flips are harmful and helpful, and who leaves where.

    harmful and helpful int64 (S,), rates float64 (S, E) (rows sum to 1), samples N.
    """

    harmful: Ints
    helpful: Ints
    rates: Floats
    samples: int

    @property
    def drop(self) -> Floats:
        """Mean loss, float64 (S,): the reference's accuracy less the policy's."""
        return np.asarray((self.harmful - self.helpful) / max(1, self.samples))


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """
    Policies from the strictest to the loosest, fixed before a test's samples are seen.

    thresholds float64 (S, E - 1), row 0 all inf: the full network. class_offsets as in Policy,
    shared by all. name says how it was made.
    """

    name: str
    thresholds: Floats
    class_offsets: Floats | None = None

    def __post_init__(self) -> None:
        rows = np.asarray(self.thresholds, np.float64)
        if rows.ndim != 2 or len(rows) == 0 or np.isnan(rows).any() or (rows[0] < np.inf).any():
            raise UsageError(f"family {self.name}: expected thresholds (S, E - 1), row 0 all inf")
        object.__setattr__(self, "thresholds", rows)

    def __len__(self) -> int:
        return len(self.thresholds)

    @property
    def kept(self) -> Bools:
        """Which exits each policy computes, bool (S, E); the final one always."""
        return np.hstack([self.thresholds < np.inf, np.ones((len(self), 1), np.bool_)])

    def policy(self, place: int) -> Policy:
        """The policy at *place*."""
        row = tuple(map(float, self.thresholds[place]))
        return Policy(thresholds=row, class_offsets=self.class_offsets)

    def leaves(self, record: Record) -> Iterator[Ints]:
        """For each policy in turn the exit, int64 (N,), that each sample leaves at."""
        for row in self.thresholds:
            yield leaves(record, row, self.class_offsets)

    def losses(self, record: Record) -> NDArray[np.int8]:
        """The loss of each sample under each policy, int8 (N, S)."""
        rows = np.arange(len(record))
        return np.stack([record.loss[rows, found] for found in self.leaves(record)], axis=1)

    def mean_costs(self, tally: Tally, costs: Costs) -> Floats:
        """The mean cost of each policy, float64 (S,), at the rates of *tally*."""
        return np.asarray((tally.rates * costs.at(self.kept)).sum(axis=1))

    def tally(self, record: Record) -> Tally:
        """What the policies do to *record*; linear in samples where thresholds only fall."""
        is_nested = bool((self.thresholds[1:] <= self.thresholds[:-1]).all())  # inf = inf: a stay
        counted = self._in_one_pass if is_nested else self._one_by_one
        counts = counted(record)  # (S, E, 3): leaving, harmful, helpful
        return Tally(
            harmful=counts[:, :, 1].sum(axis=1),
            helpful=counts[:, :, 2].sum(axis=1),
            rates=counts[:, :, 0] / max(1, len(record)),
            samples=len(record),
        )

    def _one_by_one(self, record: Record) -> Ints:
        rows, found = np.arange(len(record)), []
        for taken in self.leaves(record):
            loss = record.loss[rows, taken]
            found.append(
                [
                    np.bincount(taken[chosen], minlength=record.exits)
                    for chosen in (slice(None), loss > 0, loss < 0)
                ]
            )
        return np.array(found, np.int64).transpose(0, 2, 1)

    def _in_one_pass(self, record: Record) -> Ints:
        # Along the path sample i passes exit k from row first[i, k] on, and for ever.
        count, size = len(record), len(self)
        changes = np.zeros((size + 1, record.exits, 3), np.int64)
        gone = np.full(count, size)  # the row from which on an earlier exit takes the sample
        for k in range(record.exits):
            if k == record.exits - 1:
                first = np.zeros(count, np.int64)
            else:
                need = record.confidence[:, k].astype(np.float64)
                if self.class_offsets is not None:
                    first = self._first_by_class(record, k, need)
                else:
                    first = np.searchsorted(-self.thresholds[:, k], -need, side="left")
            here = first < gone
            for what, chosen in enumerate(
                (here, here & (record.loss[:, k] > 0), here & (record.loss[:, k] < 0))
            ):
                changes[:, k, what] += np.bincount(first[chosen], minlength=size + 1)
                changes[:, k, what] -= np.bincount(gone[chosen], minlength=size + 1)
            gone = np.minimum(gone, first)
        return np.asarray(np.cumsum(changes, axis=0)[:-1])

    def _first_by_class(self, record: Record, k: int, need: Floats) -> Ints:
        assert self.class_offsets is not None
        first = np.searchsorted(-self.thresholds[:, k], -need, side="left")
        for c, offset in enumerate(self.class_offsets[k]):
            chosen = record.predicted[:, k] == c
            limits = -(self.thresholds[:, k] + offset)
            first[chosen] = np.searchsorted(limits, -need[chosen], side="left")
        return first
