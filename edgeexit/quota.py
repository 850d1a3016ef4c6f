"""
Thresholds that let a wanted share of the samples leave at every exit, on arrays alone.

For spending a budget: callers who know what an answer may cost on average ask for_budget and
get thresholds of a one-parameter family, without looking at labels. It is the budgeted
classification of MSDNet (Huang et al., arXiv 1703.09844) with the parameter of its PyTorch code
(kalviny/MSDNet-PyTorch): exit k is given the share p_k in proportion to q**k, and its threshold
is the confidence of the floor(n p_k)-th most confident sample among those not yet gone. What
the thresholds give on other samples is not said here, nor is what they do to accuracy.
Hidden here: ties, exits that run dry, and that the cost in q moves in steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.decision import leaves_at
from edgeexit.errors import UsageError

Floats = NDArray[np.float64]

# n * p of an intended whole number may fall short of it by rounding.
_SLACK = 1e-9
# Shares are tried between everybody at the first exit and everybody at the last in so many steps.
_STEPS = 40
_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class Quota:
    """
    A member of the family, and what it gives on the samples that it was made of.

    thresholds float64 (exits,), the last -inf; rates float64 (exits,): the shares that leave;
    cost is the mean over samples in the unit of the costs given.
    """

    q: float
    thresholds: Floats
    rates: Floats
    cost: float


def thresholds(confidences: NDArray[Any], rates: Sequence[float] | Floats) -> Floats:
    """
    Thresholds, float64 (exits,), with which a share rates[k] of the samples leaves at exit k.

    confidences is float or int (n, exits), higher = surer, rates (exits,) sums to 1. A sample
    leaves at the first exit whose threshold it reaches; inf lets nobody out, and the last is
    -inf: it takes all that are left, floor's remainders of the other exits among them. At the
    others, floor(n rates[k]) samples leave if no confidence occurs twice among those that get
    there. Equal confidences leave together or not at all: together, so that an exit gives out
    more than its share by less than the size of the block, and the last ones get fewer. An
    exit that fewer samples reach than it should let out lets out all of them.
    UsageError for NaN and infinite numbers, other shapes, no samples, negative shares, and
    shares that do not sum to 1.
    """
    values = _checked(confidences)
    shares = np.asarray(rates, np.float64)
    if shares.shape != values.shape[1:]:
        raise UsageError(f"rates: shape {shares.shape}, expected {values.shape[1:]}: one per exit")
    if not (shares >= 0.0).all() or not abs(float(shares.sum()) - 1.0) <= 1e-6:
        raise UsageError(f"rates {shares.tolist()}: expected shares from 0 to 1 that sum to 1")
    return _thresholds(values, shares)


def exit_rates(confidences: NDArray[Any], thresholds: Sequence[float] | Floats) -> Floats:
    """
    Shares of the samples, float64 (exits,), that leave at each exit with these thresholds.

    confidences (n, exits) and thresholds (exits,) as in thresholds; the last exit takes all that
    reach it. UsageError for NaN and other shapes.
    """
    values = _checked(confidences)
    limits = np.asarray(thresholds, np.float64)
    if limits.shape != values.shape[1:] or np.isnan(limits).any():
        expected = f"{values.shape[1:]} numbers: one per exit"
        raise UsageError(f"thresholds {limits.tolist()}: expected {expected}")
    return _counts(values, limits) / len(values)


def family(q: float, exits: int) -> Floats:
    """
    Shares p_k in proportion to q**k, float64 (exits,), sum 1 (as in MSDNet's code).

    Below 1 most leave early, above 1 late; 0 is everybody at the first exit, inf at the last.
    UsageError for a negative q, NaN, and without exits.
    """
    if not q >= 0.0:
        raise UsageError(f"q {q}: expected 0 or more")
    if exits < 1:
        raise UsageError(f"{exits} exits, expected at least 1")
    k = np.arange(exits)
    # From the larger end, so that no power overflows.
    powers = np.float64(q) ** k if q <= 1.0 else np.float64(1.0 / q) ** k[::-1]
    shares: Floats = powers / powers.sum()
    return shares


def for_budget(confidences: NDArray[Any], costs: Sequence[float] | Floats, budget: float) -> Quota:
    """
    The member of the family that answers as late as a mean cost of *budget* allows.

    confidences as in thresholds; costs (exits,) is what it takes to answer at each exit, all
    before it included (ns, mJ, MACs), budget is in the same unit. The mean is over the samples
    given, and meets the budget to twelve digits. q is tried in 40 steps from everybody at the
    first exit to everybody at the last; between the greatest that meets the budget and the next,
    which does not, bisection finds where the budget is crossed. If costs rise from exit to exit,
    so does their mean with q, but for a few samples that floor moves about, and a budget is
    refused only if even the first exit alone costs more. If they do not, the answer still meets
    the budget, but between two steps a later one may have been missed.
    UsageError as in thresholds, for costs and a budget that are no finite numbers of 0 or more,
    and for a budget that nothing meets.
    """
    values = _checked(confidences)
    prices = np.asarray(costs, np.float64)
    if prices.shape != values.shape[1:]:
        raise UsageError(f"costs: shape {prices.shape}, expected {values.shape[1:]}: one per exit")
    if not (np.isfinite(prices) & (prices >= 0.0)).all():
        raise UsageError(f"costs {prices.tolist()}: expected finite numbers of 0 or more")
    if not 0.0 <= budget < math.inf:
        raise UsageError(f"budget {budget}: expected a finite number of 0 or more")

    def member(place: float) -> Quota:
        """From 0, everybody at the first exit, to 1, everybody at the last."""
        q = place / (1.0 - place) if place < 1.0 else math.inf
        limits = _thresholds(values, family(q, len(prices)))
        counts = _counts(values, limits)
        cost = float(counts @ prices) / len(values)
        return Quota(q=q, thresholds=limits, rates=counts / len(values), cost=cost)

    def is_met(quota: Quota) -> bool:
        return quota.cost <= budget * (1.0 + 1e-12)

    tried = [member(step / _STEPS) for step in range(_STEPS + 1)]
    step = max((i for i, quota in enumerate(tried) if is_met(quota)), default=-1)
    if step < 0:
        least = min(quota.cost for quota in tried)
        raise UsageError(
            f"budget {budget:g}: expected at least {least:g}, the least mean cost found",
            hint="allow more, or start from a network with a cheaper first exit",
        )
    best = tried[step]
    if step == _STEPS:
        return best
    low, high = step / _STEPS, (step + 1) / _STEPS  # met, not met
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        quota = member(middle)
        if is_met(quota):
            low, best = middle, quota
        else:
            high = middle
    return best


def _checked(confidences: NDArray[Any]) -> Floats:
    array = np.asarray(confidences)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"confidences: shape {array.shape}, expected (samples, exits), not empty")
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise UsageError(f"confidences: {array.dtype}, expected finite floats or integers")
    return array.astype(np.float64)


def _thresholds(values: Floats, shares: Floats) -> Floats:
    n, exits = values.shape
    limits = np.full(exits, np.inf)
    limits[-1] = -np.inf
    is_here = np.ones(n, np.bool_)
    for k in range(exits - 1):
        here = values[is_here, k]
        wanted = min(math.floor(n * float(shares[k]) + _SLACK), len(here))
        if wanted > 0:
            limits[k] = np.partition(here, len(here) - wanted)[len(here) - wanted]
            is_here &= values[:, k] < limits[k]
    return limits


def _counts(values: Floats, limits: Floats) -> NDArray[np.int64]:
    leaves = leaves_at(values[:, :-1], limits[:-1].tolist())
    return np.bincount(leaves, minlength=len(limits)).astype(np.int64)
