"""
A path of policies from the full network to the loosest, learned on the tuning samples alone.

Callers see learn. Along the path thresholds only fall, so whoever leaves early under one policy
leaves at least as early under every later one. The path follows the best policies as the price of
a harmful flip falls (edgeexit.search), with steps between them (PATH-FST,
../shared/research/anchors.md §5.2, step 2). Hidden here: paths over fewer exits are learned, too,
and the one is taken that on tuning promises the cheapest certified policy.
"""

import itertools

import numpy as np

from edgeexit import certify
from edgeexit.decision import Costs, Family, Floats, Ints, Record, Tally
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
    problem = Problem(scouted, costs)

    def promised(rows: Floats) -> float:
        family = Family(name="path", thresholds=rows)
        return _promised(family, family.tally(scouted), costs, (level, samples, delta))

    kept = np.ones(early, np.bool_)
    best = _path(problem)
    least = promised(best)
    while kept.any():
        fewer = [kept & (np.arange(early) != k) for k in np.flatnonzero(kept)]
        paths = [_path(problem.restricted(exits)) for exits in fewer]
        means = [promised(rows) for rows in paths]
        place = int(np.argmin(means))
        if means[place] >= _BETTER * least:
            break
        kept, best, least = fewer[place], paths[place], means[place]
    if searched is not scouted:
        best = _path(Problem(searched, costs, may_keep=kept))
    return Family(name="path", thresholds=best)


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
