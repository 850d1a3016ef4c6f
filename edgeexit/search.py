"""
The cheapest thresholds that make at most so many harmful exits, on arrays alone.

Callers see cheapest. A threshold only matters by whom it lets out, so the search runs over
prefixes of the samples sorted by confidence, a block of equal confidences at a time. Two
searches work together: a Lagrangian one (each threshold in turn gets its exact best cut, for
forty prices of a harmful exit) finds a good answer at any size; a depth-first one proves or
betters it. The latter is small because leaving earlier never costs more: among the prefixes
with equally many harmful exits only the longest can be best, so an exit has no more candidates
than harmful exits are allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32] | NDArray[np.float64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PRICES = 40
_PASSES = 4
# Samples looked at by the depth-first search before it settles for the best so far: 1-2 s.
_WORK = 60_000_000


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    Thresholds of the exits before the last, inf where none leaves, and what they give.

    cost is the mean over samples, harmful the number of harmful exits; proven says that no
    other thresholds on these samples are cheaper.
    """

    thresholds: tuple[float, ...]
    cost: float
    harmful: int
    proven: bool


def leaves_at(confidence: Scores, thresholds: Sequence[float]) -> NDArray[np.int64]:
    """
    The exit each sample leaves at, int64 (N,): the first whose threshold it reaches.

    confidence is float32 (N, M) or wider; with M thresholds the exits are 0 .. M.
    """
    leaves = np.full(len(confidence), len(thresholds), np.int64)
    for k in reversed(range(len(thresholds))):
        leaves[confidence[:, k] >= thresholds[k]] = k
    return leaves


def cheapest(confidence: Scores, harmful: Bools, costs: Sequence[float], allowed: int) -> Found:
    """
    The thresholds with the least mean cost among those with at most *allowed* harmful exits.

    confidence float32 (N, M) and harmful bool (N, M) speak of the exits before the last, which
    itself is never harmful; costs (M + 1) must not fall from exit to exit. Ties in cost go to
    fewer harmful exits. The same arrays in any order of samples give the same answer.
    """
    problem = _Problem(confidence, harmful, np.asarray(costs, np.float64), allowed)
    best = problem.lagrange()
    found, proven = problem.depth_first(best)
    return Found(
        thresholds=problem.thresholds(found.cuts),
        cost=found.cost / max(1, len(confidence)),
        harmful=found.harmful,
        proven=proven,
    )


@dataclass(frozen=True)
class _Answer:
    # cuts[k] is the lowest confidence that leaves at exit k (inf: nobody).
    cuts: tuple[float, ...]
    cost: float
    harmful: int

    def beats(self, other: "_Answer") -> bool:
        # Sums of the same costs in another order differ in the last bits: that is a tie.
        slack = 1e-9 * abs(other.cost)
        if abs(self.cost - other.cost) <= slack:
            return self.harmful < other.harmful
        return self.cost < other.cost


class _Problem:
    def __init__(self, confidence: Scores, harmful: Bools, costs: Floats, allowed: int) -> None:
        self.n, self.exits = confidence.shape
        self.confidence = confidence.astype(np.float64)
        self.costs, self.allowed = costs, allowed
        self.harm = np.column_stack([harmful, np.zeros(self.n, np.bool_)])
        # Highest confidence first; equal ones stand together, so their order does not matter.
        self.order = [np.argsort(-self.confidence[:, k], kind="stable") for k in range(self.exits)]

    def blocks(self, k: int, alive: Bools) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
        """The *alive* samples in exit k's order, their confidences, and the ends of its blocks."""
        samples = self.order[k][alive[self.order[k]]]
        values = self.confidence[samples, k]
        is_end = np.ones(len(values), np.bool_)
        is_end[:-1] = values[1:] != values[:-1]
        return samples, values, np.flatnonzero(is_end) + 1

    def answer(self, cuts: Sequence[float]) -> _Answer:
        leaves = leaves_at(self.confidence, cuts)
        counts = np.bincount(leaves, minlength=self.exits + 1)
        harmful = int(self.harm[np.arange(self.n), leaves].sum())
        return _Answer(tuple(cuts), float(counts @ self.costs), harmful)

    def thresholds(self, cuts: Sequence[float]) -> tuple[float, ...]:
        """Cuts moved midway to the next lower observed confidence, so that none lies on one."""
        moved = []
        for k, cut in enumerate(cuts):
            below = self.confidence[self.confidence[:, k] < cut, k]
            if np.isinf(cut):
                moved.append(float("inf"))
            elif len(below):
                moved.append(0.5 * (cut + float(below.max())))
            else:
                moved.append(float(np.nextafter(np.float32(cut), np.float32(-np.inf))))
        return tuple(moved)

    # Lagrangian: the least of cost + price * harmful, one threshold at a time.

    def lagrange(self) -> _Answer:
        best = self.answer([np.inf] * self.exits)
        span = float(self.costs[-1] - self.costs[0])
        if self.n == 0 or span <= 0.0:
            return best
        cuts = list(best.cuts)
        for price in np.geomspace(span * max(self.n, 10), span * 0.05, _PRICES):
            for _ in range(_PASSES):
                before = list(cuts)
                for k in reversed(range(self.exits)):
                    cuts[k] = self.best_cut(cuts, k, float(price))
                if cuts == before:
                    break
            for start in (self.answer(cuts), best):
                tight = self.tighten(start)
                if tight.harmful <= self.allowed and tight.beats(best):
                    best = tight
        return best

    def best_cut(self, cuts: list[float], k: int, price: float, limit: int | None = None) -> float:
        """The cut of exit k that is best while the others stay; total harm within *limit*."""
        alive = leaves_at(self.confidence, cuts[:k]) == k
        samples, values, ends = self.blocks(k, alive)
        if not len(samples):
            return float("inf")
        later = k + 1 + leaves_at(self.confidence[samples, k + 1 :], cuts[k + 1 :])
        extra = self.harm[samples, k].astype(np.int64) - self.harm[samples, later]
        gain = np.cumsum(self.costs[later] - self.costs[k] - price * extra)[ends - 1]
        if limit is not None:
            harm = self.answer([*cuts[:k], np.inf, *cuts[k + 1 :]]).harmful
            gain = np.where(harm + np.cumsum(extra)[ends - 1] <= limit, gain, -np.inf)
        top = int(gain.argmax())
        return float(values[ends[top] - 1]) if gain[top] > 0.0 else float("inf")

    def tighten(self, start: _Answer) -> _Answer:
        """Each threshold in turn as low as the allowance lets it; a start beyond it stays."""
        if start.harmful > self.allowed:
            return start
        cuts = list(start.cuts)
        for k in reversed(range(self.exits)):
            cuts[k] = self.best_cut(cuts, k, 0.0, self.allowed)
        return self.answer(cuts)

    # Depth first with bounds: exact unless the work runs out.

    def depth_first(self, best: _Answer) -> tuple[_Answer, bool]:
        self.best, self.work = best, 0
        self.descend(0, np.ones(self.n, np.bool_), (), 0.0, 0)
        return self.best, self.work <= _WORK

    def descend(
        self, k: int, alive: Bools, cuts: tuple[float, ...], cost: float, harmful: int
    ) -> None:
        if k == self.exits:
            total = cost + float(self.costs[k]) * int(alive.sum())
            answer = _Answer(cuts, total, harmful)
            if answer.beats(self.best):
                self.best = answer
            return
        self.work += self.n
        if self.work > _WORK:
            return
        samples, values, ends = self.blocks(k, alive)
        made = np.cumsum(self.harm[samples, k])[ends - 1] if len(samples) else ends
        for end, harm in _longest(ends, made, self.allowed - harmful):
            # At best everybody else leaves at the next exit.
            here = cost + float(self.costs[k]) * end
            if here + float(self.costs[k + 1]) * (len(samples) - end) > self.best.cost * (1 + 1e-9):
                break
            left = alive.copy()
            left[samples[:end]] = False
            cut = float(values[end - 1]) if end else float("inf")
            self.descend(k + 1, left, (*cuts, cut), here, harmful + harm)


def _longest(
    ends: NDArray[np.int64], made: NDArray[np.int64], budget: int
) -> list[tuple[int, int]]:
    """(length, harmful) of the longest prefix for each number of harmful ones, longest first."""
    longest = {0: 0}
    for end, harm in zip(ends.tolist(), made.tolist(), strict=True):
        if harm > budget:
            break
        longest[harm] = end
    return [(end, harm) for harm, end in sorted(longest.items(), reverse=True)]
