"""
What more labelled samples would buy.

Callers see advise and Advice. The method is run again and again on parts of the certificate
split, and on larger splits drawn from it with replacement: those points are predictions, and are
marked so. Hidden here: which sizes are tried. Nothing in an Advice is a promise, and nothing here
may change what is chosen: the samples were meant for one look.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeexit.decision import Costs, Record
from edgeexit.errors import UsageError
from edgeexit.families import Goal, Method

DRAWS = 15
_MOST_TIMES = 10  # beyond ten times the samples at hand a prediction says nothing
_WORTH_POINTS = 0.01  # less of the whole cost is not worth a sentence


@dataclass(frozen=True, kw_only=True)
class Point:
    """
    What *samples* certificate samples buy: median, least and most over *draws* draws.

    Shares of the cost of the network without early exits, 0..1; is_predicted if there are not so
    many samples.
    """

    samples: int
    saved: float
    low: float
    high: float
    draws: int
    is_predicted: bool


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Certified saving against the number of labels, fewest first; *present* are at hand."""

    points: tuple[Point, ...]
    present: int

    @property
    def now(self) -> Point:
        """What the samples at hand buy."""
        return next(point for point in self.points if point.samples == self.present)

    @property
    def best(self) -> Point:
        """
        The fewest samples that get at least four fifths of what ten times the samples would.

        The greatest median is no measure: it is often the luckiest. More than the last point's
        saving is therefore not claimed.
        """
        most = self.points[-1].saved
        enough = self.now.saved + 0.8 * (most - self.now.saved)
        found = next(p for p in self.points if p.samples >= self.present and p.saved >= enough)
        return replace(found, saved=max(self.now.saved, min(found.saved, most)))

    @property
    def sentence(self) -> str:
        """The advice in one sentence."""
        now, best = self.now, self.best
        if best.saved - now.saved < _WORTH_POINTS:
            return (
                f"more labels would hardly help: {self.present:,} certify a saving of "
                f"{now.saved:.1%} of the full network's cost, and "
                f"{self.points[-1].samples:,} would about as much (predicted)"
            )
        return (
            f"with {best.samples - self.present:,} more labels in certificate the certified saving "
            f"would be about {best.saved:.1%} instead of {now.saved:.1%} (predicted; "
            f"{best.low:.1%} to {best.high:.1%} in {best.draws} draws; of the full network's cost)"
        )

    def to_document(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return {
            "present": self.present,
            "points": [dict(vars(point)) for point in self.points],
            "sentence": self.sentence,
        }


def advise(
    method: Method,
    tuning: Record,
    certificate: Record,
    costs: Costs,
    goal: Goal,
    *,
    sizes: Sequence[int] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    on_step: Callable[[float], object] | None = None,
) -> Advice:
    """
    Certified saving of *method* for *goal* (its samples are replaced) against certificate size.

    *sizes* (default: 1-2-5 steps from what could certify anything up to ten times what is at
    hand) always include all samples of *certificate*, taken once. Deterministic; the order of
    the samples does not matter. *on_step* gets the share done. UsageError if there are none.
    """
    present = len(certificate)
    if present == 0 or len(tuning) == 0:
        raise UsageError("advice: no samples, expected some in tuning and certificate")
    wanted = _sizes(present) if sizes is None else sizes
    if min(wanted, default=1) < 1 or draws < 1:
        raise UsageError(f"advice: sizes {list(wanted)}, {draws} draws, expected 1 or more")
    # Drawing places in the order of the ids makes the order in the file irrelevant.
    ordered = certificate.take(np.argsort(certificate.ids, kind="stable"))
    both = tuning.joined(ordered)
    chosen = sorted({*wanted, present})
    points = []
    for k, size in enumerate(chosen):
        own = replace(goal, samples=size)
        family = method.family(tuning, costs, own)
        means = family.mean_costs(family.tally(both), costs)
        saved = []
        for draw in range(1 if size == present else draws):
            random = np.random.default_rng([seed, size, draw])
            rows = (
                np.arange(present)
                if size == present
                else random.choice(present, size, replace=size > present)
            )
            last = method.rule(family, ordered.take(rows), tuning, own)
            cheapest = float(means[: 1 + max(0, last or 0)].min())
            saved.append(max(0.0, 1.0 - cheapest / costs.full) if costs.full else 0.0)
        points.append(
            Point(
                samples=size,
                saved=float(np.median(saved)),
                low=min(saved),
                high=max(saved),
                draws=len(saved),
                is_predicted=size > present,
            )
        )
        if on_step is not None:
            on_step((k + 1) / len(chosen))
    return Advice(points=tuple(points), present=present)


def _sizes(present: int) -> list[int]:
    """Round numbers 1, 2, 5, 10, ... from a twentieth of *present* up to ten times it."""
    steps = [digit * 10**power for power in range(1, 9) for digit in (1, 2, 5)]
    return [n for n in steps if present / 20 <= n <= present * _MOST_TIMES]
