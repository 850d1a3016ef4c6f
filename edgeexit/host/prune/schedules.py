"""
When how much goes, and when to stop: shares removed over the steps, patience, stability.

Callers see planned and SCHEDULES (a name gives the cumulative share removed after each step),
and a stop rule. The surprise: the published hybrid code subtracts its first shot but goes on
from the whole network, and misses its target; here every plan ends on the target exactly.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import UsageError
from edgeexit.names import choose

# EPI's thresholds for structures picked by magnitude and by gradient (arXiv 2110.12007).
TAU = {"magnitude": 0.983, "gradient": 0.944}


def one_shot(total: float, steps: int = 1) -> list[float]:
    """Everything in the first and only step, whatever *steps* says."""
    _check(total, steps)
    return [total]


def constant(total: float, steps: int) -> list[float]:
    """Equal parts of the whole network: total / steps each."""
    _check(total, steps)
    return _ending([total * n / steps for n in range(1, steps + 1)], total)


def geometric(total: float, steps: int) -> list[float]:
    """
    Equal parts of what is left: s = 1 - (1 - total)^(1 / steps), s (1 - s)^(n - 1) at step n.

    One-Shot vs Iterative (arXiv 2508.13836), as in its code; 20 steps of 10 % remove 0.878.
    """
    _check(total, steps)
    return _ending([1 - (1 - total) ** (n / steps) for n in range(1, steps + 1)], total)


def hybrid(total: float, steps: int, *, first: float = 0.7) -> list[float]:
    """
    The share *first* of the target in one shot, the rest in *steps* - 1 geometric steps.

    arXiv 2508.13836: first = 0.6 to 0.8, and later steps get a twentieth of the first one's
    patience. Here the later steps count from what the shot left.
    """
    _check(total, steps)
    if steps < 2:
        raise UsageError(f"schedule hybrid: expected 2 steps or more, found {steps}")
    if not 0 < first < 1:
        raise UsageError(f"schedule hybrid: first: expected a share between 0 and 1, found {first}")
    shot = first * total
    left = 1 - shot
    later = geometric(1 - (1 - total) / left, steps - 1)
    return _ending([shot, *(1 - left * (1 - gone) for gone in later)], total)


def exponential(total: float, steps: int) -> list[float]:
    """
    FORCE's density k_t = exp(t / T * log k) with k = 1 - total (arXiv 2006.09081).

    The same curve as geometric, under the name that its paper gives it.
    """
    return geometric(total, steps)


Schedule = Callable[..., list[float]]

SCHEDULES: dict[str, Schedule] = {
    "one-shot": one_shot,
    "constant": constant,
    "geometric": geometric,
    "hybrid": hybrid,
    "exponential": exponential,
}


def planned(name: str, total: float, steps: int, options: Mapping[str, Any]) -> list[float]:
    """
    The cumulative share removed after each step of the schedule *name*; the last is *total*.

    0 < *total* < 1. UsageError for an unknown schedule or option, or a number out of range.
    """
    schedule = choose(name, SCHEDULES, "schedule")
    known = list(inspect.signature(schedule).parameters)[2:]
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"schedule {name}: takes {known or 'no options'}, found {option!r}")
        if type(value) not in (int, float):
            raise UsageError(f"schedule {name}: {option}: expected a number, found {value!r}")
    return schedule(total, steps, **options)


def _check(total: float, steps: int) -> None:
    if not 0 < total < 1:
        raise UsageError(f"share to remove: expected more than 0 and less than 1, found {total}")
    if steps < 1:
        raise UsageError(f"steps: expected at least 1, found {steps}")


def _ending(shares: list[float], total: float) -> list[float]:
    # The last share is the target itself, and rounding lets no earlier one pass it.
    return [*(min(share, total) for share in shares[:-1]), total]


# ---------------------------------------------------------------- when to begin


Structure = Mapping[str, int]


def similarity(one: Structure, other: Structure) -> float:
    """
    Psi = 1 - mean_l |n1 - n2| / (n1 + n2) over the layers' units: 1 = equal, 0 = disjoint.

    Shen et al. 2022 (arXiv 2110.12007, eqs 4-5). A layer that is empty in both is equal.
    """
    if one.keys() != other.keys() or not one:
        raise UsageError("similarity: expected two structures with the same layers")
    gaps = [
        abs(units - other[name]) / (units + other[name]) if units + other[name] else 0.0
        for name, units in one.items()
    ]
    return 1 - sum(gaps) / len(gaps)


@dataclass
class StructureStability:
    """
    The early pruning indicator: the structure that pruning would pick no longer changes.

    EPI_t = mean_{j=1..window} Psi(N_t, N_{t-j}); stable when EPI_t > *tau* and no earlier EPI of
    the last *window* is higher (arXiv 2110.12007, eq. 6). *structures* holds the last ones seen
    (name -> units that would stay), *indicators* their EPI.
    """

    tau: float = TAU["magnitude"]
    window: int = 5
    structures: list[dict[str, int]] = field(default_factory=list)
    indicators: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1 or self.window < 1:
            raise UsageError(
                f"stability: tau {self.tau}, window {self.window}: expected 0 <= tau < 1 and "
                "a window of 1 or more"
            )

    def take(self, structure: Structure) -> float | None:
        """Note the structure that pruning would pick now; its EPI, None before a whole window."""
        found = None
        if len(self.structures) == self.window:
            seen = [similarity(structure, earlier) for earlier in self.structures]
            found = sum(seen) / len(seen)
            self.indicators = [*self.indicators, found][-self.window - 1 :]
        self.structures = [*self.structures, dict(structure)][-self.window :]
        return found

    @property
    def is_stable(self) -> bool:
        """Whether the last structure was stable."""
        return bool(self.indicators) and self.indicators[-1] > max(
            self.tau, *(value - 1e-12 for value in self.indicators)
        )

    def state(self) -> dict[str, Any]:
        """Plain values for resume."""
        return {"structures": [dict(s) for s in self.structures], "indicators": self.indicators[:]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from state()."""
        self.structures = [dict(structure) for structure in state["structures"]]
        self.indicators = [float(value) for value in state["indicators"]]
