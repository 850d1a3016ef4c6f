"""
A path of policies from the full network to the loosest, learned on the tuning samples alone.

Callers see learn. Along the path thresholds only fall, so whoever leaves early under one policy
leaves at least as early under every later one. The path follows the best policies as the price of
a harmful flip falls (edgeexit.search), with steps between them (PATH-FST: an order learned on
other samples, as in Pareto Testing, arXiv 2210.07913, for the fixed-sequence test of Learn then
Test, arXiv 2110.01052). Hidden here: some thousand tuning samples hold so few harmful flips that
the best cuts for them are not the best for others. The path takes the middle between the best one
threshold for all exits and the best cuts for smoothed flips (edgeexit.flips), unless the best cuts
themselves, learned on one half of the samples and judged on the other, promise clearly less. Paths
over fewer exits are learned, too, and the one is taken that promises the cheapest policy.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from edgeexit import certify
from edgeexit.decision import Bools, Costs, Family, Floats, Ints, Record, Tally
from edgeexit.flips import chances
from edgeexit.search import Problem, by_content, midway

# The prices of a harmful flip, in full networks: at the highest one flip in thousands is too dear,
# at the lowest hardly anyone gets past the first exit.
_PRICES = np.geomspace(2000.0, 0.25, 36)
# Policies from one price to the next, the latter's among them.
_STEPS = 6
# An exit enters the path at this share of the tuning samples.
_ENTRY = 0.001
# Of more tuning samples, so many are searched, and fewer still to choose between sets of exits.
_SEARCHED, _SCOUTED = 100_000, 5_000
# Policies with one threshold for all exits.
_SHARED = 120
# A path without an exit must promise a mean cost this much lower than the one with it, and one of
# the best cuts themselves than one of the middle.
_BETTER, _SURELY = 0.995, 0.98


def learn(tuning: Record, costs: Costs, *, level: float, samples: int, delta: float) -> Family:
    """
    The family "path" for a certificate of *samples* samples at *level* and *delta*.

    Pure and deterministic; the order of the samples and the names of the classes do not matter.
    *level*, *samples* and *delta* only choose the way the path is made and the exits it may use.
    """
    early = tuning.exits - 1
    if len(tuning) == 0 or early == 0:
        return _family(np.full((1, early), np.inf))
    return _lesson(tuning, costs).family(_Goal(level, samples, delta))


class _Goal(NamedTuple):
    """What the certificate is to show, and with how many samples."""

    level: float
    samples: int
    delta: float


class _Part:
    """Samples that paths are learned on, each path once."""

    def __init__(self, record: Record, costs: Costs) -> None:
        self.record, self.costs = record, costs
        self._made: dict[tuple[_Way, bytes], Family] = {}

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.record, self.costs)

    @cached_property
    def smoothed(self) -> Problem:
        """The same with the chance of a flip in place of the flip."""
        problem = self.problem
        return problem.weighed(chances(problem.confidence, problem.harm))

    @cached_property
    def ranked(self) -> Floats:
        """The confidences of each early exit, float64 (E - 1, N), in rising order."""
        return np.sort(self.problem.confidence, axis=1).astype(np.float64)

    def family(self, way: "_Way", kept: Bools) -> Family:
        """The path that *way* makes of these samples with the early exits *kept* (E - 1,)."""
        key = (way, kept.tobytes())
        if key not in self._made:
            self._made[key] = _family(way(self, kept))
        return self._made[key]

    def leaving(self, cuts: Floats) -> Ints:
        """How many samples, int64 (E - 1,), are as sure at each exit as *cuts* ask."""
        pairs = zip(self.ranked, cuts, strict=True)
        return np.array([len(row) - int(np.searchsorted(row, cut)) for row, cut in pairs])

    def rows(self, leaving: list[Ints]) -> Floats:
        """Thresholds that only fall, from all inf on, by way of those that let so many out."""
        entry = max(1, round(_ENTRY * len(self.record)))
        counts = [np.zeros(len(self.ranked), np.int64)]
        for wanted in leaving:
            before, after = counts[-1], np.maximum(counts[-1], wanted)
            if (after > before).any():
                counts += _between(before, after, entry)
        rows = [
            [_threshold(values, int(n)) for values, n in zip(self.ranked, row, strict=True)]
            for row in counts
        ]
        return np.array([row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]])


_Way = Callable[[_Part, Bools], Floats]


def _best(part: _Part, kept: Bools) -> Floats:
    """The best cuts for every price of a flip, one path."""
    return part.rows(_along(part, part.problem.restricted(kept)))


def _shared(part: _Part, kept: Bools) -> Floats:
    """One threshold for all exits *kept*."""
    if not kept.any():
        return np.full((1, len(kept)), np.inf)
    pooled = np.sort(part.ranked[kept], axis=None)
    counts = np.unique(np.linspace(1, len(pooled), _SHARED).round().astype(np.int64))
    limits = np.unique([_threshold(pooled, int(count)) for count in counts])[::-1]
    return np.where(kept, np.append(np.inf, limits)[:, None], np.inf)


def _middle(part: _Part, kept: Bools) -> Floats:
    """As many leave as halfway between smoothed flips' best cuts and the best shared threshold."""
    shared = part.family(_shared, kept)
    tally = shared.tally(part.record)
    means = shared.mean_costs(tally, part.costs)
    lost = tally.harmful / tally.samples
    leaving = []
    for price, smooth in zip(
        _prices(part), _along(part, part.smoothed.restricted(kept)), strict=True
    ):
        best = int((means + price * lost).argmin())
        leaving.append((smooth + part.leaving(shared.thresholds[best])) // 2)
    return part.rows(leaving)


def _prices(part: _Part) -> Floats:
    return np.asarray(_PRICES * part.costs.full)


def _along(part: _Part, problem: Problem) -> list[Ints]:
    """How many samples, int64 (E - 1,), the best cuts let out at each price."""
    cuts = np.full(problem.early, np.inf)
    leaving = []
    for price in _prices(part):
        cuts = problem.descend(cuts, float(price))
        leaving.append(part.leaving(cuts))
    return leaving


class _Lesson:
    """All that is learned on one tuning split: for every goal the best way and the best exits."""

    def __init__(self, tuning: Record, costs: Costs) -> None:
        self.costs = costs
        self.searched = _Part(_evenly(tuning, _SEARCHED), costs)
        scouted = _evenly(self.searched.record, _SCOUTED)
        self.scouted = self.searched if len(scouted) == len(tuning) else _Part(scouted, costs)
        order = by_content(scouted)
        halves = [scouted.take(np.sort(order[start::2])) for start in (0, 1)]
        self.halves = [_Part(half if len(half) else scouted, costs) for half in halves]
        self._tallies: dict[tuple[int, int], Tally] = {}

    def family(self, goal: _Goal) -> Family:
        is_sure = self._judged(_best, goal) < _SURELY * self._judged(_middle, goal)
        way = _best if is_sure else _middle
        return self.searched.family(way, self._exits(way, goal))

    def _judged(self, way: _Way, goal: _Goal) -> float:
        """What paths of each half promise on the other."""
        every = np.ones(self.scouted.problem.early, np.bool_)
        pairs = (self.halves, self.halves[::-1])
        return sum(self._promised(one.family(way, every), other, goal) for one, other in pairs)

    def _exits(self, way: _Way, goal: _Goal) -> Bools:
        """The early exits, bool (E - 1,), that the path should use."""
        early = self.scouted.problem.early
        kept = np.ones(early, np.bool_)

        def promised(kept: Bools) -> float:
            return self._promised(self.scouted.family(way, kept), self.scouted, goal)

        least = promised(kept)
        while kept.any():
            fewer = [kept & (np.arange(early) != k) for k in np.flatnonzero(kept)]
            means = [promised(exits) for exits in fewer]
            place = int(np.argmin(means))
            if means[place] >= _BETTER * least:
                break
            kept, least = fewer[place], means[place]
        return kept

    def _promised(self, family: Family, judge: _Part, goal: _Goal) -> float:
        key = (id(family), id(judge))  # both live as long as this lesson
        if key not in self._tallies:
            self._tallies[key] = family.tally(judge.record)
        return certify.promised_cost(family, self._tallies[key], self.costs, **goal._asdict())


# Records and costs do not change, and one split is asked about for many goals.
_lesson = lru_cache(maxsize=4)(_Lesson)


def _family(rows: Floats) -> Family:
    return Family(name="path", thresholds=rows)


def _evenly(record: Record, most: int) -> Record:
    """At most *most* samples of *record*, evenly from an order that its contents fix."""
    if len(record) <= most:
        return record
    places = np.linspace(0, len(record) - 1, most).round().astype(np.int64)
    return record.take(by_content(record)[places])


def _between(before: Ints, after: Ints, entry: int) -> list[Ints]:
    start = np.where(before == 0, np.minimum(after, entry), before)
    steps = np.arange(1, _STEPS + 1) / _STEPS
    return [np.rint(start + (after - start) * step).astype(np.int64) for step in steps]


def _threshold(ranked: Floats, count: int) -> float:
    """What lets the *count* surest of *ranked* (and their equals) out: between two of them."""
    if count == 0:
        return float("inf")
    cut = ranked[-count]
    below = int(np.searchsorted(ranked, cut)) - 1
    return midway(float(cut), float(ranked[below]) if below >= 0 else -np.inf)
