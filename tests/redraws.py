"""
Worlds small enough to be known, and what is promised about them counted over many redraws.

A world is a population taken as all there is: splits are drawn from it with replacement, and what
a policy loses on it is known. Without replacement a certificate of most of the population could
not miss, and the count would show nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from populations import SYNTHETIC_COSTS, synthetic

from edgeexit import tune
from edgeexit.choice import learn
from edgeexit.decision import Costs, Family, Policy, Record
from edgeexit.evaluate import Record as RecordFile
from edgeexit.families import METHODS, Goal, Method
from edgeexit.policy import MEASURES
from edgeexit.targets import Target

FASHION = Path(__file__).parent.parent / "examples" / "fashion-record.npz"
# What leaving at each exit costs on a board, roughly: the way there, the head, the decision.
FASHION_COSTS = Costs(
    backbone=np.array([35.0, 100.0, 60.0]),
    head=np.array([3.0, 5.0, 5.0]),
    handover=np.array([2.0, 2.0, 0.0]),
)


@dataclass(frozen=True)
class World:
    """The same population seen through each confidence measure, and what exits cost."""

    views: Mapping[str, Record]
    costs: Costs

    def draw(self, samples: int, seed: int) -> dict[str, Record]:
        """*samples* drawn with replacement, each with a name that no other draw has."""
        some = next(iter(self.views.values()))
        rows = np.random.default_rng([7, seed]).integers(0, len(some), samples)
        ids = seed * 1_000_000 + np.arange(samples)
        return {
            name: Record(
                confidence=view.confidence[rows],
                predicted=view.predicted[rows],
                label=view.label[rows],
                ids=ids,
            )
            for name, view in self.views.items()
        }

    def loss(self, measure: str, policy: Policy) -> float:
        """What *policy* truly loses: the full network's accuracy less its own."""
        view = self.views[measure]
        return float(view.loss[np.arange(len(view)), policy.exits(view)].mean())

    def saving(self, measure: str, policy: Policy) -> float:
        """The share of the full network's cost that *policy* truly saves."""
        cost = policy.mean_cost(self.views[measure], self.costs)
        return 1.0 - cost / self.costs.full


def synthetic_world(samples: int = 50_000) -> World:
    """The synthetic network, with a second measure that is the first one blurred."""
    sharp = synthetic(samples, 1)
    noise = np.random.default_rng(4).normal(0.0, 0.05, sharp.confidence.shape)
    blurred = Record(
        confidence=(sharp.confidence + noise).astype(np.float32),
        predicted=sharp.predicted,
        label=sharp.label,
        ids=sharp.ids,
    )
    return World({"sharp": sharp, "blurred": blurred}, SYNTHETIC_COSTS)


def recorded_world(path: Path = FASHION, costs: Costs = FASHION_COSTS) -> World:
    """All samples of a record file, through every measure there is."""
    record = RecordFile.load(path)
    rows = np.arange(len(record))
    return World({name: tune.seen_through(record, name, rows) for name in MEASURES}, costs)


# (tuning, certificate, costs, level, delta) -> measure, policy
Chosen = tuple[str, Policy]
Way = Callable[[Mapping[str, Record], Mapping[str, Record], Costs, float, float], Chosen]


def ours(name: str, *, is_measure_searched: bool = True) -> Way:
    """tune's way: the measure (the first one, or the best) by tuning alone, then choose."""
    method = _remembering(METHODS[name]) if name != "path" else METHODS[name]

    def way(
        tuning: Mapping[str, Record],
        certificate: Mapping[str, Record],
        costs: Costs,
        level: float,
        delta: float,
    ) -> Chosen:
        samples = len(next(iter(certificate.values())))
        measure = next(iter(tuning))
        if is_measure_searched:
            target = Target(max_accuracy_drop=level, confidence=1.0 - delta)
            tune.check_feasible(samples, target, delta)
            measure, _ = learn(tuning, costs, target, delta, samples, method=method)
        policy = tune.choose(
            tuning[measure],
            certificate[measure],
            costs,
            max_accuracy_drop=level,
            confidence=1.0 - delta,
            method=method,
        )
        return measure, policy

    return way


def _remembering(method: Method) -> Method:
    """*method*, whose families are the same for every goal, so that each is made once only."""

    @lru_cache(maxsize=4)
    def made(tuning: Record, costs: Costs) -> Family:
        return method.family(tuning, costs, Goal(0.01, 0.05, len(tuning)))

    return replace(method, family=lambda tuning, costs, goal: made(tuning, costs))


def best_on_calibration(
    tuning: Mapping[str, Record],
    certificate: Mapping[str, Record],
    costs: Costs,
    level: float,
    delta: float,
) -> Chosen:
    """Common practice, and invalid: the cheapest shared threshold that looks good enough."""
    del tuning, delta
    best: tuple[float, str, Policy] | None = None
    for measure, seen in certificate.items():
        family = METHODS["shared"].family(seen, costs, Goal(level, 0.5, len(seen)))
        tally = family.tally(seen)
        means = np.where(tally.drop <= level, family.mean_costs(tally, costs), np.inf)
        place = int(means.argmin())
        if best is None or means[place] < best[0]:
            best = (float(means[place]), measure, family.policy(place))
    assert best is not None
    return best[1], best[2]


def greedy(
    tuning: Mapping[str, Record],
    certificate: Mapping[str, Record],
    costs: Costs,
    level: float,
    delta: float,
) -> Chosen:
    """
    The search of earlyon (sohams25/earlyon, core/thresholds.py) on the certificate samples.

    Exit after exit, the lowest of a fixed list of probabilities with which accuracy on these
    samples has fallen by at most the level.
    """
    del tuning, costs, delta
    measure = next(iter(certificate))
    seen = certificate[measure]
    chosen = [np.inf] * (seen.exits - 1)
    for k in range(len(chosen)):
        for threshold in (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5):
            tried = Policy(thresholds=(*chosen[:k], threshold, *chosen[k + 1 :]))
            lost = seen.loss[np.arange(len(seen)), tried.exits(seen)].mean()
            if lost <= level and threshold < chosen[k]:
                chosen[k] = threshold
    return measure, Policy(thresholds=tuple(chosen))
