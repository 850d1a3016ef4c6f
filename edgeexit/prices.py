"""
What it costs to leave at each exit of any set of kept exits: as measured, else worked out.

Callers see Prices. Hidden here: a set that was not timed is priced from the parts of those that
were, and its joules from the power that the same exits drew.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from edgeexit.blocks import Case, Kept
from edgeexit.parts import Parts, fit
from edgeexit.profile import Profile

MEASURED, FITTED = "measured", "fitted"


class Prices:
    """The prices of one *profile*."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @cached_property
    def parts(self) -> Parts:
        """The parts of the network, fitted from all paths of the profile."""
        return fit(self.profile)

    def costs_ns(self, kept: Kept) -> list[float] | None:
        """Nanoseconds for each of the *kept* exits, None if the profile does not tell."""
        found = self.profile.costs_ns(kept)
        return self.parts.predict(kept) if found is None else found

    def origin(self, kept: Kept) -> dict[str, Any]:
        """Where the costs of *kept* come from, as JSON values."""
        if self.profile.costs_ns(kept) is not None:
            return {"origin": MEASURED, "kept": list(kept)}
        return {
            "origin": FITTED,
            "kept": list(kept),
            "paths": len(self.parts.used),
            "worst_residual": self.parts.worst_residual,
        }

    def energy(self, costs_ns: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, Any]:
        """
        Millijoules a sample, if leaving at the exits in *costs_ns* at these *rates*, as JSON.

        Also those of the network without exits, what the joules are (their label) and where they
        come from. Idling meanwhile is included. Joules are measured with all exits kept: a
        smaller set takes its time at the power that the same exit drew there ("fitted"). Empty
        if the profile does not tell.
        """
        energy, kept = self.profile.energy, tuple(costs_ns)
        full = self._joules(self.profile.exits[-1:], self.profile.exits[-1])
        if energy is None or full is None:
            return {}
        origin, mean_mj = MEASURED, 0.0
        for name, cost in costs_ns.items():
            found = self._joules(kept, name)
            if found is not None:
                mj = found[1]
            else:
                origin, found = FITTED, self._joules(self.profile.exits, name)
                # At a pace the board mostly waits: its joules do not follow the latency.
                if found is None or energy.pace_hz is not None:
                    return {}
                mj = found[1] * cost / self.profile.value_ns(found[0])
            mean_mj += rates[name] * mj
        return {
            "mean_mj": mean_mj,
            "full_mj": full[1],
            "energy_label": energy.label,
            "energy_origin": origin,
        }

    def _joules(self, kept: Kept, exit: str) -> tuple[Case, float] | None:
        """The path's case and millijoules a call, None if they were not measured."""
        case, energy = self.profile.case(kept, exit), self.profile.energy
        if case is None or energy is None:
            return None
        place = self.profile.cases.index(case)
        return (case, energy.gross_mj(place).value) if place in energy.cases else None
