"""
Does an exit know when it is wrong?

Callers see rankings, which tells for every exit how well its confidence ranks right answers above
wrong ones (what a threshold lives on) and how far it can be taken at its word (what it does not).
Hidden here: equal confidences stay together, so no order of the samples changes a figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import bounds
from edgeexit.errors import UsageError

Floats = NDArray[np.float64]

BINS = 10
PROBABILITY = "max_prob"  # the one measure that says how often it should be right


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """
    Accuracy against confidence in B bins of about equal mass, the least confident first.

    confidence and accuracy are means, float64 (B,); low and high the exact 95 % interval of the
    accuracy; samples int64 (B,). is_probability: whether the confidence claims to be an accuracy.
    """

    confidence: Floats
    accuracy: Floats
    low: Floats
    high: Floats
    samples: NDArray[np.int64]
    is_probability: bool = True

    @property
    def error(self) -> float | None:
        """
        Expected calibration error, 0..1; None if the confidence is no probability.

        Over bins of equal mass (Nguyen and O'Connor, 2015): bins of equal width leave most
        samples of a sure network in one bin.
        """
        if len(self.samples) == 0 or not self.is_probability:
            return None
        apart = np.abs(self.confidence - self.accuracy)
        return float((apart * self.samples).sum() / self.samples.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """
    How well one exit's confidence foretells that it is right.

    auroc is the chance that a right answer is surer than a wrong one, ties counting half (0.5: no
    better than a coin); None if all answers are right, or all wrong.
    """

    exit: str
    samples: int
    accuracy: float
    auroc: float | None
    reliability: Reliability

    def to_document(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "auroc": self.auroc,
            "calibration_error": self.reliability.error,
        }


def rankings(
    confidence: NDArray[Any],
    correct: NDArray[np.bool_],
    exits: Sequence[str],
    measure: str = PROBABILITY,
    *,
    bins: int = BINS,
) -> tuple[Ranking, ...]:
    """
    One Ranking for each exit of float (N, E) *confidence* and bool (N, E) *correct*.

    *measure* names the confidence. UsageError for shapes that differ and for NaN.
    """
    seen, right = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if seen.ndim != 2 or seen.shape != right.shape or seen.shape[1] != len(exits):
        raise UsageError(
            f"confidence {seen.shape} and correct {right.shape}, "
            f"expected (N, {len(exits)}) each, for exits {', '.join(exits)}"
        )
    if np.isnan(seen).any():
        raise UsageError("confidence: found NaN, expected numbers")
    return tuple(
        Ranking(
            exit=name,
            samples=len(seen),
            accuracy=float(right[:, k].mean()) if len(seen) else 0.0,
            auroc=auroc(seen[:, k], right[:, k]),
            reliability=replace(
                reliability(seen[:, k], right[:, k], bins=bins),
                is_probability=measure == PROBABILITY,
            ),
        )
        for k, name in enumerate(exits)
    )


def auroc(confidence: Floats, correct: NDArray[np.bool_]) -> float | None:
    """The chance that a right sample is surer than a wrong one, by ranks; None without both."""
    hits = int(correct.sum())
    misses = len(correct) - hits
    if hits == 0 or misses == 0:
        return None
    _, place, count = np.unique(confidence, return_inverse=True, return_counts=True)
    # Doubled mean ranks: whole numbers, so the sum is exact.
    doubled = 2 * np.cumsum(count) - count + 1
    total = int(doubled[place[correct]].sum())
    return (total - hits * (hits + 1)) / (2 * hits * misses)


def reliability(confidence: Floats, correct: NDArray[np.bool_], *, bins: int = BINS) -> Reliability:
    """At most *bins* bins; samples of equal confidence share one, whatever its mass."""
    values, place, count = np.unique(confidence, return_inverse=True, return_counts=True)
    hits = np.bincount(place[correct], minlength=len(values))
    # A value belongs to the bin that its middle sample falls into.
    middle = np.cumsum(count) - (count + 1) // 2
    own = middle * bins // max(1, len(confidence))
    used = np.unique(own)
    totals = np.array([count[own == b].sum() for b in used], np.int64)
    right = np.array([hits[own == b].sum() for b in used], np.int64)
    means = np.array([np.average(values[own == b], weights=count[own == b]) for b in used])
    ends = [bounds.interval(int(k), int(n)) for k, n in zip(right, totals, strict=True)]
    return Reliability(
        confidence=means.astype(np.float64),
        accuracy=right / np.maximum(totals, 1),
        low=np.array([low for low, _ in ends], np.float64),
        high=np.array([high for _, high in ends], np.float64),
        samples=totals,
    )
