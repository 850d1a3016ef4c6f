"""
The thresholds that cost least, where every harmful flip has a price, on arrays alone.

Callers see Problem: the samples and costs, sorted once. best gives the policy with the least mean
of cost + price * loss, least the cheapest one with at most so many harmful flips. A threshold only
matters by whom it lets out, so the search runs over prefixes of the samples sorted by confidence,
a block of equal confidences at a time: with the other thresholds fixed, running sums give the
exact best cut of one exit, and an exit whose head and hand-over cost more than it saves is dropped
(coordinate descent). Hidden here: the samples are put in an order of their contents first, so that
sums round alike whatever order they came in.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.decision import Bools, Costs, Floats, Ints, Record, leaves_at

Scores = NDArray[np.float32] | NDArray[np.float64]

# Rounds of coordinate descent; they nearly always stand still after three.
_PASSES = 5
# Prices at which least looks for a start.
_PRICES = 24
# Shared thresholds that are tried as a start.
_SHARED = 40


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    Thresholds of the exits before the last, inf for a dropped one, and what they give.

    cost is the mean over samples, harmful the number of harmful flips, loss the mean loss that the
    search counted.
    """

    thresholds: tuple[float, ...]
    cost: float
    harmful: int
    loss: float


class Problem:
    """
    The samples of *record* and their *costs*, ready for searching.

    A flip costs its price where it is harmful; with *is_signed* a helpful one earns it. Only
    the exits *may_keep*, bool (E - 1,), are kept; others are dropped whatever they would save.
    """

    def __init__(
        self,
        record: Record,
        costs: Costs,
        *,
        is_signed: bool = False,
        may_keep: Sequence[bool] | Bools | None = None,
    ) -> None:
        self.samples, self.early = len(record), record.exits - 1
        order = by_content(record)
        self.confidence = np.ascontiguousarray(record.confidence.T[: self.early, order])
        signed = record.loss[order].T
        self.harm = np.ascontiguousarray(signed > 0)
        self.loss: NDArray[Any] = np.ascontiguousarray(
            signed if is_signed else np.maximum(signed, 0)
        )
        self.costs = costs
        self.extra = costs.head + costs.handover
        self.may_keep = np.ones(self.early, np.bool_) if may_keep is None else np.array(may_keep)
        # Highest confidence first; sums are only read at the end of a block of equal ones.
        self.order = [np.argsort(-row, kind="stable").astype(np.int32) for row in self.confidence]
        self.is_end = []
        for row, first in zip(self.confidence, self.order, strict=True):
            values = row[first]
            self.is_end.append(np.append(values[1:] != values[:-1], [True] * bool(len(values))))

    def restricted(self, may_keep: Bools) -> "Problem":
        """The same problem where only the exits *may_keep*, bool (E - 1,), may be kept."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__, may_keep=np.asarray(may_keep))
        return other

    def weighed(self, loss: Floats) -> "Problem":
        """The same problem where a sample, leaving at an exit, loses *loss*, float64 (E, N)."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__, loss=loss)
        return other

    # ------------------------------------------------------------ the answer of given cuts

    def leaves(self, cuts: Sequence[float] | Floats) -> Ints:
        """The exit, int64 (N,), at which each sample (in the order of contents) leaves."""
        return leaves_at(self.confidence.T, list(cuts))

    def found(self, cuts: Sequence[float] | Floats) -> Found:
        """What *cuts* give, with thresholds midway to the next lower confidence seen."""
        leaves, count = self.leaves(cuts), max(1, self.samples)
        rows = np.arange(self.samples)
        return Found(
            thresholds=tuple(self.between(k, float(cut)) for k, cut in enumerate(cuts)),
            cost=float(
                np.bincount(leaves, minlength=self.early + 1) @ self._per_exit(cuts) / count
            ),
            harmful=int(self.harm[leaves, rows].sum()),
            loss=float(self.loss[leaves, rows].sum() / count),
        )

    def between(self, k: int, cut: float) -> float:
        """*cut* of exit k moved midway to the next lower confidence, so that none lies on it."""
        if math.isinf(cut):
            return cut
        below = self.confidence[k][self.confidence[k] < cut]
        return midway(cut, float(below.max()) if len(below) else -math.inf)

    def _per_exit(self, cuts: Sequence[float] | Floats) -> Floats:
        return self.costs.at(np.append(np.asarray(cuts, np.float64) < np.inf, True))

    def _objective(self, cuts: Sequence[float] | Floats, price: float) -> float:
        leaves = self.leaves(cuts)
        loss = float(self.loss[leaves, np.arange(self.samples)].sum(dtype=np.float64))
        counts = np.bincount(leaves, minlength=self.early + 1)
        return float(counts @ self._per_exit(cuts)) + price * loss

    # ------------------------------------------------------------ coordinate descent

    def descend(
        self, cuts: Sequence[float] | Floats, price: float, passes: int = _PASSES
    ) -> Floats:
        """Each exit in turn gets its exact best cut until none moves; never worse than *cuts*."""
        cuts = np.where(self.may_keep, cuts, np.inf)
        for _ in range(passes):
            before = cuts.copy()
            self._sweep(cuts, price)
            if (cuts == before).all():
                break
        return cuts

    def _sweep(self, cuts: Floats, price: float) -> None:
        arrived = [np.ones(self.samples, np.bool_)]  # which samples no earlier exit took
        for k in range(self.early - 1):
            arrived.append(arrived[-1] & (self.confidence[k] < cuts[k]))
        last = self.early
        # What a sample costs from here on if it does not leave at exit k.
        onward = price * self.loss[last] + (self.costs.backbone[last] + self.extra[last])
        for k in reversed(range(self.early)):
            here = price * self.loss[k]
            if self.may_keep[k]:
                cuts[k] = self._best_cut(k, onward - here, arrived[k])
            if cuts[k] < np.inf:
                onward = np.where(self.confidence[k] >= cuts[k], here, onward) + self.extra[k]
            onward += self.costs.backbone[k]

    def _best_cut(self, k: int, gains: Floats, arrived: Bools) -> float:
        count = int(np.count_nonzero(arrived))
        if count == 0:
            return math.inf
        order = self.order[k]
        sums = np.cumsum(np.where(arrived, gains, 0.0)[order])
        sums[~self.is_end[k]] = -np.inf
        top = int(sums.argmax())
        # Sums differ from the truth in the last bits, and a tie is not worth an exit.
        slack = 1e-9 * max(self.costs.full, abs(float(sums[top])))
        if sums[top] <= self.extra[k] * count + slack:
            return math.inf
        return float(self.confidence[k][order[top]])

    # ------------------------------------------------------------ whole searches

    def starts(self) -> list[Floats]:
        """Cuts of shared-threshold policies, from the strictest on, none of them searched for."""
        if self.samples == 0 or self.early == 0:
            return []
        seen = np.unique(self.confidence)
        places = np.linspace(0, len(seen) - 1, min(len(seen), _SHARED)).round().astype(np.int64)
        return [
            np.where(self.may_keep, float(cut), np.inf) for cut in np.unique(seen[places])[::-1]
        ]

    def best(self, price: float, starts: Iterable[Sequence[float] | Floats] = ()) -> Found:
        """
        The policy found with the least mean of cost + *price* * loss.

        Never worse than a single exit, a shared threshold among the starts, or *starts*.
        """
        return self.found(self._best_of(price, [*self._plain(price), *starts]))

    def _plain(self, price: float) -> list[Floats]:
        """The full network, each single exit at its best, and the best shared threshold."""
        none = np.full(self.early, np.inf)
        plain = [none]
        for k in range(self.early):
            alone = np.arange(self.early) == k
            plain.append(self.restricted(alone & self.may_keep).descend(none, price, 1))
        shared = self.starts()
        if shared:
            plain.append(min(shared, key=lambda cuts: self._objective(cuts, price)))
        return plain

    def _best_of(self, price: float, starts: Iterable[Sequence[float] | Floats]) -> Floats:
        ends = [self.descend(start, price) for start in starts]
        return min(ends, key=lambda cuts: self._objective(cuts, price))

    def least(self, allowed: int) -> Found:
        """
        The cheapest policy found that makes at most *allowed* harmful flips.

        Never dearer than a single exit or a shared threshold that keeps to the allowance.
        """
        none = np.full(self.early, np.inf)
        best, cost = none, self._cost_within(none, allowed)
        span = float(self.costs.full)
        tried: list[Floats] = []
        if self.samples and span > 0.0:
            cuts = none
            for price in np.geomspace(span * max(10, self.samples), span * 0.05, _PRICES):
                cuts = self.descend(cuts, float(price))
                tried.append(cuts)
        alone = np.eye(self.early, dtype=np.bool_)
        tried += [self.restricted(a & self.may_keep)._tighten(none, allowed) for a in alone]
        shared = sorted(self.starts(), key=lambda cuts: self._cost_within(cuts, allowed))
        for cuts in [*tried, *shared[:1]]:
            for start in (cuts, best):
                tight = self._tighten(start, allowed)
                value = self._cost_within(tight, allowed)
                if value < cost * (1.0 - 1e-9):
                    best, cost = tight, value
        return self.found(best)

    def _harm(self, cuts: Floats) -> int:
        return int(self.harm[self.leaves(cuts), np.arange(self.samples)].sum())

    def _cost_within(self, cuts: Floats, allowed: int) -> float:
        return self._objective(cuts, 0.0) if self._harm(cuts) <= allowed else math.inf

    def _tighten(self, cuts: Floats, allowed: int) -> Floats:
        """Each cut in turn where it costs least within the allowance, the last exit first."""
        cuts = cuts.copy()
        if self._harm(cuts) > allowed:
            return cuts
        for _ in range(2):
            for k in reversed(range(self.early)):
                if not self.may_keep[k]:
                    continue
                arrived = self.leaves(cuts[:k]) == k
                samples = self.order[k][arrived[self.order[k]]]
                if not len(samples):
                    cuts[k] = np.inf
                    continue
                without = cuts.copy()
                without[k] = np.inf
                later = self.leaves(without)[samples]
                per_exit = self._per_exit(without)
                made = self.harm[k][samples].astype(np.int64) - self.harm[later, samples]
                dropped = self._harm(without)
                total = dropped + np.cumsum(made)
                gain = np.cumsum(per_exit[later] - per_exit[k])
                values = self.confidence[k][samples]
                is_end = np.append(values[1:] != values[:-1], True)
                gain = np.where(is_end & (total <= allowed), gain, -np.inf)
                top = int(gain.argmax())
                # Without the exit there may be more harmful flips, not only dearer samples.
                pays = gain[top] > self.extra[k] * len(samples) or dropped > allowed
                cuts[k] = float(values[top]) if pays else np.inf
        return cuts


def midway(cut: float, below: float) -> float:
    """A threshold that *cut* reaches and *below*, the next lower confidence (-inf: none), not."""
    if below == -math.inf:
        with np.errstate(over="ignore"):
            lower = float(np.nextafter(np.float32(cut), np.float32(-np.inf)))
        return lower if lower > -math.inf else math.nextafter(cut, -math.inf)
    middle = 0.5 * cut + 0.5 * below  # of neighbours it may be the lower one
    return middle if middle > below else cut


def by_content(record: Record) -> NDArray[Any]:
    """
    An order of the samples, int (N,), that their confidences and losses alone fix.

    Samples alike in both stand together, in the order they came in; the order is as good as drawn.
    """
    with np.errstate(over="ignore"):
        single = record.confidence.astype(np.float32).T.copy().view(np.uint32)
        key = _mixed([*single, *record.loss.T])
        if record.confidence.dtype.itemsize <= single.itemsize:
            return np.argsort(key, kind="stable")
        # Confidences that float32 does not tell apart.
        double = record.confidence.astype(np.float64).T.copy().view(np.uint64)
        return np.lexsort((_mixed(double), key))


def _mixed(columns: Sequence[NDArray[Any]] | NDArray[Any]) -> NDArray[np.uint64]:
    """A number for each row of *columns* (N,), uint64 (N,), that they all have a part in."""
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        # The last steps of splitmix64, by Sebastiano Vigna (public domain).
        key = (key ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        key ^= key >> np.uint64(31)
    return key
