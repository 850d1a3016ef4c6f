"""
A path of policies from the full network to the loosest, learned on the tuning samples alone.

Callers see learn. Along the path thresholds only fall, so whoever leaves early under one policy
leaves at least as early under every later one. The path follows the best policies as the price of
a harmful flip falls (edgeexit.search), with steps between them (PATH-FST: an order learned on
other samples, as in Pareto Testing, arXiv 2210.07913, for the fixed-sequence test of Learn then
Test, arXiv 2110.01052), or one threshold for all exits: on few samples fewer parameters may do
better, so both are learned on one half of the tuning samples and judged on the other. Hidden here:
paths over fewer exits are learned, too, and the one is taken that promises the cheapest policy.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeexit import certify
from edgeexit.decision import Bools, Costs, Family, Floats, Ints, Record, Tally
from edgeexit.search import Problem, by_content

# The prices of a harmful flip, in full networks: at the highest one flip in thousands is too dear,
# at the lowest hardly anyone gets past the first exit.
_PRICES = np.geomspace(2000.0, 0.25, 36)
# Policies from one price to the next, the latter's among them.
_STEPS = 6
# An exit enters the path at this share of the tuning samples.
_ENTRY = 0.001
# Of more tuning samples, so many are searched, and fewer still to choose between sets of exits.
_SEARCHED, _SCOUTED = 100_000, 10_000
# Policies of a path with one threshold for all exits.
_SHARED = 120
# A path without an exit must promise a mean cost this much lower than the one with it.
_BETTER = 0.995


def learn(tuning: Record, costs: Costs, *, level: float, samples: int, delta: float) -> Family:
    """
    The family "path" for a certificate of *samples* samples at *level* and *delta*.

    Pure and deterministic; the order of the samples and the names of the classes do not matter.
    *level*, *samples* and *delta* only choose which exits the path may use.
    """
    early = tuning.exits - 1
    if len(tuning) == 0 or early == 0:
        return Family(name="path", thresholds=np.full((1, early), np.inf))
    searched = _evenly(tuning, _SEARCHED)
    scouted = _evenly(searched, _SCOUTED)
    goal = (level, samples, delta)
    halves = _halves(scouted)
    ways = [_Way(_path), _Way(_shared)]
    # Learned on one half, judged on the other: more parameters look better than they are.
    way = min(ways, key=lambda way: sum(way.judged(*pair, costs, goal) for pair in halves))
    kept = way.exits(scouted, costs, goal)
    return Family(name="path", thresholds=way.rows(Problem(searched, costs, may_keep=kept)))


@dataclass(frozen=True)
class _Way:
    """One way to make a path: rows(problem) are thresholds, float64 (S, E - 1), that only fall."""

    rows: Callable[[Problem], Floats]

    def judged(
        self, learned: Record, judge: Record, costs: Costs, goal: tuple[float, int, float]
    ) -> float:
        """What a path that was learned on one record promises on another."""
        family = Family(name="path", thresholds=self.rows(Problem(learned, costs)))
        return _promised(family, family.tally(judge), costs, goal)

    def exits(self, record: Record, costs: Costs, goal: tuple[float, int, float]) -> Bools:
        """The early exits, bool (E - 1,), that a path on *record* should use."""
        problem = Problem(record, costs)
        early = record.exits - 1

        def promised(rows: Floats) -> float:
            family = Family(name="path", thresholds=rows)
            return _promised(family, family.tally(record), costs, goal)

        kept = np.ones(early, np.bool_)
        least = promised(self.rows(problem))
        while kept.any():
            fewer = [kept & (np.arange(early) != k) for k in np.flatnonzero(kept)]
            means = [promised(self.rows(problem.restricted(exits))) for exits in fewer]
            place = int(np.argmin(means))
            if means[place] >= _BETTER * least:
                break
            kept, least = fewer[place], means[place]
        return kept


def _halves(record: Record) -> list[tuple[Record, Record]]:
    """Both halves of *record*, either way round, as its contents say."""
    order = by_content(record)
    if len(record) < 2:
        return [(record, record)]
    parts = [record.take(np.sort(order[start::2])) for start in (0, 1)]
    return [(parts[0], parts[1]), (parts[1], parts[0])]


def _shared(problem: Problem) -> Floats:
    """One threshold for all exits that may be kept."""
    if not problem.may_keep.any():
        return np.full((1, problem.early), np.inf)
    pooled = np.sort(problem.confidence[problem.may_keep], axis=None)
    counts = np.unique(np.linspace(1, len(pooled), _SHARED).round().astype(np.int64))
    limits = np.unique([_threshold(pooled, int(count)) for count in counts])[::-1]
    falling = np.append(np.inf, limits)
    return np.where(problem.may_keep, falling[:, None], np.inf)


def _evenly(record: Record, most: int) -> Record:
    """At most *most* samples of *record*, evenly from an order that its contents fix."""
    if len(record) <= most:
        return record
    places = np.linspace(0, len(record) - 1, most).round().astype(np.int64)
    return record.take(by_content(record)[places])


def _promised(family: Family, tally: Tally, costs: Costs, goal: tuple[float, int, float]) -> float:
    """The mean cost to be certified if the certificate samples were exactly like tuning's."""
    level, samples, delta = goal
    share = samples / tally.samples
    alike = Tally(
        harmful=np.ceil(tally.harmful * share).astype(np.int64),
        helpful=np.floor(tally.helpful * share).astype(np.int64),
        rates=tally.rates,
        samples=samples,
    )
    passed = certify.p_values(alike, level, delta, tally)
    last = max(0, certify.last_certified(passed, delta))
    return float(family.mean_costs(tally, costs)[: last + 1].min())


def _path(problem: Problem) -> Floats:
    """Thresholds, float64 (S, E - 1), that only fall, from all inf on."""
    cuts = np.full(problem.early, np.inf)
    ranked = np.sort(problem.confidence, axis=1)
    leaving = [np.zeros(problem.early, np.int64)]  # how many samples each exit would take
    for price in _PRICES * problem.costs.full:
        cuts = problem.descend(cuts, float(price))
        taken = [
            problem.samples - int(np.searchsorted(row, row.dtype.type(cut)))
            for row, cut in zip(ranked, cuts, strict=True)
        ]
        leaving.append(np.maximum(leaving[-1], taken))
    counts = [leaving[0]]
    for before, after in itertools.pairwise(leaving):
        if (after > before).any():
            counts += _between(before, after, max(1, round(_ENTRY * problem.samples)))
    rows = [
        [_threshold(values, int(n)) for values, n in zip(ranked, row, strict=True)]
        for row in counts
    ]
    return np.array([row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]])


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
    if below < 0:
        return float(np.nextafter(cut, cut.dtype.type(-np.inf)))
    return 0.5 * (float(cut) + float(ranked[below]))
