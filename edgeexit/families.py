"""
The ways of choosing thresholds, all behind one door: a family from tuning, a rule for the rest.

Callers look a name up in METHODS and get a Method: family makes policies, strictest first, from
the tuning samples alone; rule says with the certificate samples which is the last that may be
taken; promise says in what sense. path is the way of this package; the others are for users who
want them and for comparison:

- shared: one threshold for all exits; fixed: a list of thresholds that the user gives;
- quota: shares of the samples for each exit (MSDNet, Huang et al., arXiv 1703.09844);
- pcee: stop where the exit's accuracy, as a monotone map of its confidence, reaches a common
  level (PCEE, arXiv 2412.19325, with an isotonic map);
- class: another threshold for each answer, at equal accuracy (after class-based thresholds,
  arXiv 2210.15621, of which only the idea is taken), all moved together;
- crc, ucb, ltt: the shared threshold with the rules of edgeexit.risk;
- pareto: the best combinations of a grid on tuning, tested from the least risky one on
  (Pareto Testing, Laufer-Goldshtein et al., arXiv 2210.07913).

Hidden here: all but crc, ucb and ltt end in the same fixed-sequence test.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit import certify, nested, quota, risk
from edgeexit.decision import Costs, Family, Floats, Record
from edgeexit.errors import UsageError

PROBABLY = (
    "with the stated confidence over the draw of the certificate samples, the accuracy drop on "
    "samples drawn like them is at most the stated level"
)
ON_AVERAGE = (
    "on average over draws of the certificate samples, the rate of harmful flips on samples drawn "
    "like them is at most the stated level (no confidence attached)"
)

# Policies in a family of one parameter.
_STEPS = 120
# Bins of equal mass in which the accuracy of an exit is looked at.
_BINS = 200
# An answer given less often on tuning has the threshold of all answers together.
_FEWEST_ANSWERS = 50
# Combinations of thresholds that pareto looks at.
_COMBINATIONS = 600


@dataclass(frozen=True)
class Goal:
    """
    What is to be shown: a mean loss of at most *level* with probability 1 - *delta*.

    samples is how many certificate samples there are.
    """

    level: float
    delta: float
    samples: int


@dataclass(frozen=True)
class Method:
    """
    A way of choosing thresholds.

    family(tuning, costs, goal) must not see the certificate samples; rule(family, certificate,
    tuning, goal) gives the index of the last policy that may be taken, None if there is none.
    """

    family: Callable[[Record, Costs, Goal], Family]
    rule: Callable[[Family, Record, Record, Goal], int | None]
    promise: str = PROBABLY

    @property
    def is_tested(self) -> bool:
        """Whether the rule is the sequence of tests of edgeexit.certify."""
        return self.rule is _fixed_sequence


def fixed(thresholds: Sequence[float]) -> Method:
    """The method that tests one list of *thresholds* (E - 1), inf for a dropped exit."""

    def family(tuning: Record, costs: Costs, goal: Goal) -> Family:
        if len(thresholds) != tuning.exits - 1:
            raise UsageError(
                f"thresholds: {len(thresholds)} given, expected {tuning.exits - 1}: one for each "
                "exit but the final one"
            )
        return _family("fixed", [np.asarray(thresholds, np.float64)], tuning)

    return Method(family, _fixed_sequence)


# ---------------------------------------------------------------- families


def _path(tuning: Record, costs: Costs, goal: Goal) -> Family:
    return nested.learn(tuning, costs, level=goal.level, samples=goal.samples, delta=goal.delta)


def _shared(tuning: Record, costs: Costs, goal: Goal) -> Family:
    limits = _falling(tuning.confidence[:, :-1].ravel())
    return _family("shared", np.repeat(limits[:, None], tuning.exits - 1, axis=1), tuning)


def _quota(tuning: Record, costs: Costs, goal: Goal) -> Family:
    if len(tuning) == 0:
        return _family("quota", [], tuning)
    places = np.linspace(1.0, 0.0, _STEPS, endpoint=False)[1:]
    rows = [
        quota.thresholds(tuning.confidence, quota.family(place / (1.0 - place), tuning.exits))[:-1]
        for place in places
    ]
    # Floors and ties let a threshold rise now and then on its way down.
    return _family("quota", np.minimum.accumulate(rows, axis=0), tuning)


def _pcee(tuning: Record, costs: Costs, goal: Goal) -> Family:
    maps = [
        _accuracy_map(tuning.confidence[:, k], tuning.correct[:, k])
        for k in range(tuning.exits - 1)
    ]
    wanted = _falling(np.concatenate([accuracy for _, accuracy in maps] or [np.empty(0)]))
    rows = [[_reaching(found, accuracy) for found in maps] for accuracy in wanted]
    return _family("pcee", np.array(rows).reshape(len(wanted), len(maps)), tuning)


def _by_class(tuning: Record, costs: Costs, goal: Goal) -> Family:
    early = tuning.exits - 1
    seen = int(tuning.predicted.max()) + 1 if len(tuning) else 1
    offsets = np.zeros((early, max(1, seen)))
    base = np.zeros(early)
    wanted = float(tuning.correct[:, -1].mean()) if len(tuning) else 1.0
    excess = [np.empty(0)]
    for k in range(early):
        confidence, right = tuning.confidence[:, k].astype(np.float64), tuning.correct[:, k]
        base[k] = _reached(confidence, right, wanted)
        for answer in range(offsets.shape[1]):
            given = tuning.predicted[:, k] == answer
            if given.sum() >= _FEWEST_ANSWERS:
                own = _reached(confidence[given], right[given], wanted)
                offsets[k, answer] = own - base[k]
        excess.append(confidence - base[k] - offsets[k, tuning.predicted[:, k]])
    moves = _falling(np.concatenate(excess))
    return _family("class", base[None, :] + moves[:, None], tuning, offsets)


def _pareto(tuning: Record, costs: Costs, goal: Goal) -> Family:
    early = tuning.exits - 1
    if len(tuning) == 0 or early == 0:
        return _family("pareto", [], tuning)
    # As many values for each exit as the number of combinations allows, "dropped" among them.
    values = max(2, int(_COMBINATIONS ** (1.0 / early)))
    grids = [
        np.append(np.inf, _quantiles(tuning.confidence[:, k], values - 1)) for k in range(early)
    ]
    rows = np.array(list(itertools.islice(itertools.product(*grids), 1, 4 * _COMBINATIONS)))
    tried = Family(name="pareto", thresholds=np.vstack([np.full((1, early), np.inf), rows]))
    tally = tried.tally(tuning)
    cost, risky = tried.mean_costs(tally, costs), tally.harmful
    frontier, least = [], np.inf
    for place in np.lexsort((cost, risky)):
        if cost[place] < least:
            frontier.append(int(place))
            least = cost[place]
    return _family("pareto", tried.thresholds[[s for s in frontier if s > 0]], tuning)


def _family(
    name: str, rows: Sequence[Floats] | Floats, tuning: Record, offsets: Floats | None = None
) -> Family:
    """The full network first, then *rows* (S, E - 1)."""
    early = tuning.exits - 1
    found = np.asarray(rows, np.float64).reshape(len(rows) if early else 0, early)
    return Family(
        name=name, thresholds=np.vstack([np.full((1, early), np.inf), found]), class_offsets=offsets
    )


def _falling(values: NDArray[np.floating]) -> Floats:
    """At most _STEPS quantiles of *values* (any shape), each once, the greatest first."""
    return _quantiles(values, _STEPS)


def _quantiles(values: NDArray[np.floating], steps: int) -> Floats:
    if len(values) == 0:
        return np.empty(0)
    kept = np.unique(values.astype(np.float64))
    if len(kept) > steps:
        ordered = np.sort(values.astype(np.float64))
        places = np.linspace(0, len(ordered) - 1, steps).round().astype(np.int64)
        kept = np.unique(ordered[places])
    return kept[::-1]


def _accuracy_map(
    confidence: NDArray[np.floating], right: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """
    Accuracy as a rising step function of confidence: lowest confidences and accuracies (B,).

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955) over bins of about equal
    mass; equal confidences are never parted.
    """
    order = np.argsort(confidence, kind="stable")
    values, hits = confidence[order].astype(np.float64), right[order]
    is_start = np.append(True, values[1:] != values[:-1])[: len(values)]
    starts = np.flatnonzero(is_start)
    if len(starts) > _BINS:
        wanted = np.linspace(0, len(values), _BINS, endpoint=False)
        starts = np.unique(starts[np.searchsorted(starts, wanted).clip(max=len(starts) - 1)])
        starts[0] = 0
    pools: list[list[float]] = []  # [lowest confidence, hits, samples]
    ends = np.append(starts[1:], len(values))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        pools.append([float(values[start]), float(hits[start:end].sum()), float(end - start)])
        while len(pools) > 1 and pools[-2][1] * pools[-1][2] >= pools[-1][1] * pools[-2][2]:
            _, more, samples = pools.pop()
            pools[-1][1] += more
            pools[-1][2] += samples
    found = np.array(pools).reshape(-1, 3)
    return found[:, 0], found[:, 1] / np.maximum(found[:, 2], 1.0)


def _reaching(found: tuple[Floats, Floats], accuracy: float) -> float:
    """The least confidence whose accuracy is at least *accuracy*, inf if none is."""
    place = int(np.searchsorted(found[1], accuracy, side="left"))
    return float(found[0][place]) if place < len(found[0]) else float(np.inf)


def _reached(confidence: Floats, right: NDArray[np.bool_], accuracy: float) -> float:
    """The same, and the greatest confidence if none reaches it."""
    limit = _reaching(_accuracy_map(confidence, right), accuracy)
    if np.isfinite(limit):
        return limit
    return float(confidence.max()) if len(confidence) else 0.0


# ---------------------------------------------------------------- rules


def _fixed_sequence(family: Family, certificate: Record, tuning: Record, goal: Goal) -> int | None:
    found = certify.p_values(
        family.tally(certificate), goal.level, goal.delta, family.tally(tuning)
    )
    last = certify.last_certified(found, goal.delta)
    return last if last >= 0 else None


def _crc(family: Family, certificate: Record, tuning: Record, goal: Goal) -> int | None:
    if len(certificate) == 0:
        return None
    harmful = np.maximum(family.losses(certificate), 0)
    return risk.crc(np.maximum.accumulate(harmful, axis=1), goal.level)


def _ucb(family: Family, certificate: Record, tuning: Record, goal: Goal) -> int | None:
    if len(certificate) == 0:
        return None
    # An order that neither losses nor the order in the file have a part in.
    order = np.argsort(certificate.ids, kind="stable")
    order = order[np.random.default_rng(0).permutation(len(order))]
    return risk.ucb(family.losses(certificate)[order], goal.level, goal.delta)


def _ltt(family: Family, certificate: Record, tuning: Record, goal: Goal) -> int | None:
    if len(certificate) == 0:
        return None
    return risk.ltt(family.losses(certificate), goal.level, goal.delta)


METHODS: dict[str, Method] = {
    "path": Method(_path, _fixed_sequence),
    "shared": Method(_shared, _fixed_sequence),
    "quota": Method(_quota, _fixed_sequence),
    "pcee": Method(_pcee, _fixed_sequence),
    "class": Method(_by_class, _fixed_sequence),
    "crc": Method(_shared, _crc, ON_AVERAGE),
    "ucb": Method(_shared, _ucb),
    "ltt": Method(_shared, _ltt),
    "pareto": Method(_pareto, _fixed_sequence),
}
