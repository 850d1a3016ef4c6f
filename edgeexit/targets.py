"""
What a policy is chosen for: a cap on the accuracy it loses, and budgets of what it may cost.

Callers see Target and the tests of budgets. Hidden here: a budget is shown, like the accuracy, on
samples that the policies were not made from, and how often a call that is quick in the mean takes
too long all the same is read off the profile's single calls.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import bounds
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.names import choose
from edgeexit.profile import Profile

Floats = NDArray[np.float64]

LATENCY, ENERGY = "latency", "energy"
OBJECTIVES = {LATENCY: "mean milliseconds", ENERGY: "mean millijoules"}

# A latency that 95 % of the samples must keep. Exits count as quick if at most so many of their
# own calls take longer; what is left of the 5 % may leave at other exits.
_SLOW_SHARE, _SLOW_CALLS = 0.05, 0.01
_BETS = np.concatenate([np.geomspace(1e-3, 0.5, 24), [0.6, 0.7, 0.8, 0.9, 0.95]])
_LEAST_MARGIN_SE = 2.3
# A smaller accuracy drop would need billions of labels.
_LEAST_DROP = 1e-9


# Inputs a second: from one in thirty years on, and as fast as no board answers.
_RATES_HZ = (1e-9, 1e6)


def check_rate_hz(rate_hz: float | None) -> None:
    """UsageError for inputs a second that nobody can mean; None is no rate."""
    low, high = _RATES_HZ
    if rate_hz is not None and not low <= rate_hz <= high:
        raise UsageError(
            f"rate: expected {low:g} .. {high:g} inputs a second, found {rate_hz:g}",
            hint="--rate 30 are 30 frames a second",
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    The promise that is asked for, as JSON values.

    max_accuracy_drop is the share of samples that may be lost against the reference (None: any);
    each cap holds with *confidence*. *minimize* is what counts among the policies that keep all
    caps; without max_accuracy_drop it is the accuracy that counts. rate_hz are inputs a second,
    for the joules of a frame. UsageError for what cannot be meant.
    """

    max_accuracy_drop: float | None = None
    latency_budget_ms: float | None = None
    energy_budget_mj: float | None = None
    p95_ms: float | None = None
    confidence: float = 0.95
    minimize: str = LATENCY
    rate_hz: float | None = None

    def __post_init__(self) -> None:
        choose(self.minimize, OBJECTIVES, "objective")
        for field in fields(self):  # whatever kind of float was given, JSON can hold it
            value = getattr(self, field.name)
            if isinstance(value, np.floating):
                object.__setattr__(self, field.name, float(value))
        if self.max_accuracy_drop is not None:
            bounds.check_rate(self.max_accuracy_drop)
            if self.max_accuracy_drop < _LEAST_DROP:
                raise UsageError(
                    f"accuracy drop {self.max_accuracy_drop:g}: expected {_LEAST_DROP:g} or more",
                    hint="no set has the labels to show less",
                )
        # What may be risked must not be rounded to all.
        if not 0.0 < 1.0 - self.confidence < 1.0:
            raise UsageError(
                f"confidence {self.confidence}: expected more than 0 and less than 1 (0.95 = 95 %)"
            )
        check_rate_hz(self.rate_hz)
        for name in ("latency_budget_ms", "energy_budget_mj", "p95_ms"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise UsageError(f"{name}: {value}, expected a finite number above 0")
        if self.caps == 0:
            raise UsageError(
                "no target", hint="give --max-accuracy-drop, --latency-budget, ..., or two of them"
            )
        if (
            self.p95_ms is not None
            and self.latency_budget_ms is not None
            and self.p95_ms * 20 < self.latency_budget_ms
        ):
            raise UsageError(
                f"a p95 of {self.p95_ms:g} ms and a mean of {self.latency_budget_ms:g} ms: "
                "expected budgets that can bind together",
                hint="leave one of them out",
            )

    @property
    def caps(self) -> int:
        """How many statements are promised at once: they share the risk of being wrong."""
        return sum(
            cap is not None
            for cap in (
                *(self.max_accuracy_drop, self.latency_budget_ms),
                *(self.energy_budget_mj, self.p95_ms),
            )
        )

    def to_document(self) -> dict[str, Any]:
        """The target as a JSON object."""
        return asdict(self)

    @classmethod
    def from_document(cls, table: Table) -> "Target":
        """Read what to_document wrote."""
        numbers = ("max_accuracy_drop", "latency_budget_ms", "energy_budget_mj", "p95_ms")
        table.only(*numbers, "confidence", "minimize", "rate_hz")
        try:
            return cls(
                **{
                    name: None if table.values.get(name) is None else table.get(name, float)
                    for name in (*numbers, "rate_hz")
                },
                confidence=table.get("confidence", float),
                minimize=table.get("minimize", str),
            )
        except UsageError as error:
            raise BadFile(f"{table.where}: {error}") from error


def mean_p_values(rates: Floats, samples: int, costs: Floats, budget: float) -> Floats:
    """
    p-values, float64 (S,), of "the mean cost is above *budget*".

    rates (S, E) are the shares of *samples* that leave at each exit, costs (S, E) what that costs.
    A bet against the mean, from counts alone: the product of 1 - b (c - budget) / (most - budget)
    over all samples, averaged over the bets b, is 1 or less in expectation if the mean is above
    the budget, so its reciprocal is a p-value (Waudby-Smith and Ramdas, arXiv 2010.09686, section
    4, with bets that do not move).
    """
    used = np.where(rates > 0, costs, 0.0)
    # An exit that nobody leaves at can be left at by others.
    most = np.nanmax(np.where(np.isfinite(costs), costs, np.nan), axis=1)
    found = np.empty(len(rates))
    for row, (share, cost, worst) in enumerate(zip(rates, used, most, strict=True)):
        if worst <= budget:
            found[row] = 0.0
            continue
        gain = -(cost - budget) / (worst - budget)
        with np.errstate(divide="ignore"):
            logs = np.log1p(np.outer(_BETS, gain))
        capital = (np.where(share > 0, logs, 0.0) * share).sum(axis=1) * samples
        top = float(capital.max())
        found[row] = min(1.0, math.exp(min(700.0, -top)) / float(np.exp(capital - top).mean()))
    return found


def late_p_values(rates: Floats, samples: int, late: Floats) -> Floats:
    """
    p-values, float64 (S,), of "more than 5 % of the samples take longer than the limit".

    late (S, E) bounds from above which share of each exit's calls takes longer. Exits with a share
    of up to 1 % are quick; the worst of those shares is taken off the 5 %, and an exact binomial
    test of the samples that leave elsewhere is made with what remains.
    """
    found = np.empty(len(rates))
    for row, (share, slow) in enumerate(zip(rates, late, strict=True)):
        quick = slow <= _SLOW_CALLS
        allowed = _SLOW_SHARE - float(slow[quick].max(initial=0.0))
        elsewhere = round(float(share[~quick].sum()) * samples)
        if quick.all():
            found[row] = 0.0
            continue
        found[row] = bounds.at_most(elsewhere, samples, allowed)
    return found


def share_later(profile: Profile, kept: Sequence[str], exit: str, limit_ns: float) -> float:
    """
    An upper bound of the share of calls that leave at *exit* later than *limit_ns*; 1 if unknown.

    The larger of the exact 95 % bound over all single calls and a normal one over processes. A set
    of exits that was not timed counts like the one with all exits, which takes longer.
    """
    shares, late, count = [], 0, 0
    for calls in _calls_ns(profile, kept, exit):
        if len(calls):
            shares.append(float((calls > limit_ns).mean()))
            late, count = late + int((calls > limit_ns).sum()), count + len(calls)
    if not shares:
        return 1.0
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else 0.0
    between = float(np.mean(shares)) + _LEAST_MARGIN_SE * spread / math.sqrt(len(shares))
    return max(bounds.upper_bound(late, count), between)


def quantile_ns(profile: Profile, kept: Sequence[str], rates: Floats, share: float) -> float:
    """
    What *share* of all answers take at most, as the single calls of *profile* tell it.

    rates (E,) say who leaves at which of its exits, only at *kept* ones. inf where the profile
    tells too little, nothing is added for what it may be wrong by.
    """
    times, weights = [], []
    for exit, rate in zip(profile.exits, rates.tolist(), strict=True):
        if rate > 0:
            calls = np.concatenate([np.empty(0), *_calls_ns(profile, kept, exit)])
            times.append(calls if len(calls) else np.array([np.inf]))
            weights.append(np.full(len(times[-1]), rate / len(times[-1])))
    ordered = np.argsort(np.concatenate(times))
    below = np.cumsum(np.concatenate(weights)[ordered])
    place = int(np.searchsorted(below, share * below[-1]))
    return float(np.concatenate(times)[ordered[min(place, len(ordered) - 1)]])


def _calls_ns(profile: Profile, kept: Sequence[str], exit: str) -> list[NDArray[np.int64]]:
    """The single calls of each process that left at *exit*, with all exits kept if need be."""
    case = profile.case(tuple(kept), exit) or profile.case(profile.exits, exit)
    if case is None:
        return []
    place = profile.cases.index(case)
    return [
        np.array(
            [call for block in process.blocks if block.case == place for call in block.calls_ns],
            np.int64,
        )
        for process in profile.processes
    ]
