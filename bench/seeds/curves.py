"""
Accuracy against cost when one threshold is swept, on arrays alone; bands over seeds.

Callers see sweep, Curve, band, crossings and saving. A curve runs from "the first exit answers
everything" to "the final exit does". Between two thresholds it is a straight line, which a policy
that draws between the two would walk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgeexit.decision import Record, leaves
from edgeexit.errors import UsageError

Floats = NDArray[np.float64]

# Fixed before any sample is seen: max_prob from "always" over 0.1 .. 0.9999 to "never".
THRESHOLDS: Floats = np.concatenate([[0.0], 1 - np.geomspace(0.9, 1e-4, 98), [np.inf]])
GRID = 201


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean *costs* float64 (S,), which never fall, and the *accuracies* (S,) there."""

    costs: Floats
    accuracies: Floats

    def __post_init__(self) -> None:
        if len(self.costs) < 2 or (np.diff(self.costs) < 0).any():
            raise UsageError("curve: expected two or more points whose costs never fall")

    def at(self, costs: Floats) -> Floats:
        """Accuracies at *costs* within the curve's own."""
        return np.interp(costs, self.costs, self.accuracies)

    def cost_of(self, accuracy: float) -> float:
        """The least cost at which the curve reaches *accuracy*; UsageError if it never does."""
        best = np.maximum.accumulate(self.accuracies)
        place = int(np.searchsorted(best, accuracy, "left"))
        if place == len(best):
            raise UsageError(f"curve: reaches {best[-1]:.4f}, {accuracy:.4f} is asked for")
        if place == 0:
            return float(self.costs[0])
        low, high = self.accuracies[place - 1], self.accuracies[place]
        share = (accuracy - low) / (high - low)
        return float(self.costs[place - 1] + share * (self.costs[place] - self.costs[place - 1]))


def class_mean(correct: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """The mean of the classes' accuracies, each class weighing the same."""
    counts = np.bincount(labels)
    right = np.bincount(labels, weights=correct)
    present = counts > 0
    return float((right[present] / counts[present]).mean())


def sweep(record: Record, costs: Floats, thresholds: Floats = THRESHOLDS) -> Curve:
    """
    The curve of one threshold for all exits of *record*; *costs* (E,) are those of each exit.

    Accuracies are class means.
    """
    rows = np.arange(len(record))
    found = []
    for threshold in np.sort(thresholds):
        taken = leaves(record, np.full(record.exits - 1, threshold))
        accuracy = class_mean(record.correct[rows, taken], np.asarray(record.label))
        found.append((float(costs[taken].mean()), accuracy))
    points = np.array(found)
    return Curve(points[:, 0], points[:, 1])


@dataclass(frozen=True, eq=False)
class Band:
    """Curves of several seeds on one grid of *costs*: mean, least and largest accuracies (S,)."""

    costs: Floats
    mean: Floats
    low: Floats
    high: Floats

    def scaled(self, factor: float) -> "Band":
        """The same with all costs times *factor*."""
        return replace(self, costs=self.costs * factor)


def common_costs(curves: Sequence[Curve], points: int = GRID) -> Floats:
    """Evenly spaced costs that all *curves* cover; UsageError if there are none."""
    low = max(curve.costs[0] for curve in curves)
    high = min(curve.costs[-1] for curve in curves)
    if not low < high:
        raise UsageError("curves: there is no cost that all of them reach")
    return np.linspace(low, high, points)


def band(curves: Sequence[Curve], costs: Floats) -> Band:
    """The *curves* of the seeds at *costs*."""
    rows = np.stack([curve.at(costs) for curve in curves])
    return Band(costs, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))


def crossings(ours: Band, theirs: Band) -> list[tuple[float, float]]:
    """Where the mean curves cross: (cost, accuracy), cheapest first."""
    gap = ours.mean - theirs.mean
    told = np.flatnonzero(gap)  # points at which one of the two is ahead
    found = []
    for left, right in pairwise(told):
        if gap[left] * gap[right] < 0:
            share = gap[left] / (gap[left] - gap[right])
            cost = ours.costs[left] + share * (ours.costs[right] - ours.costs[left])
            found.append((float(cost), float(np.interp(cost, ours.costs, ours.mean))))
    return found


@dataclass(frozen=True, kw_only=True)
class Saving:
    """
    The largest *share* of the cost that ours save against theirs at one *accuracy*.

    Costs are means over the seeds; *each* is the largest share of every seed by itself.
    """

    share: float
    accuracy: float
    each: tuple[float, ...]


def saving(ours: Sequence[Curve], theirs: Sequence[Curve], points: int = GRID) -> Saving | None:
    """The largest saving at an accuracy that every curve reaches; None if there is none."""
    both = [*ours, *theirs]
    low = max(float(curve.accuracies[0]) for curve in both)
    high = min(float(curve.accuracies.max()) for curve in both)
    if not low < high:
        return None
    levels = np.linspace(low, high, points)
    mine, other = (
        np.array([[curve.cost_of(level) for level in levels] for curve in curves])
        for curves in (ours, theirs)
    )
    shares = 1 - mine.mean(axis=0) / other.mean(axis=0)
    best = int(shares.argmax())
    each = tuple(float((1 - a / b).max()) for a, b in zip(mine, other, strict=True))
    return Saving(share=float(shares[best]), accuracy=float(levels[best]), each=each)
