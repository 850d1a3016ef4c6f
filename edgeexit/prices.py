"""
What it costs to leave at each exit of any set of kept exits: as measured, else worked out.

Callers see Prices. Hidden here: a set that was not timed is priced from the parts of those that
were, and its joules from the power that the same exits drew.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from edgeexit.blocks import Case, Kept
from edgeexit.decision import Costs
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

    def parts_ns(self) -> Costs:
        """
        Backbone, heads and hand-overs in ns, as the search for thresholds wants them.

        The input stage is in the first backbone stage, the final exit's head and hand-over in the
        last. Small parts are differences of large ones: what came out below 0 counts as 0. What
        the profile's paths leave open is spread evenly.
        """
        count, parts = len(self.profile.exits), self.parts
        backbone = parts.smallest_ns[:count].copy()
        head, handover = np.append(parts.smallest_ns[count:], 0.0), np.zeros(count)
        for k, name in enumerate(self.profile.exits):
            passed = parts.handover_ns(name)
            handover[k] = 0.0 if passed is None else passed.value
        backbone[-1] += handover[-1]
        handover[-1] = 0.0
        if parts.input_ns is not None:
            backbone[0] += parts.input_ns.value
        return Costs(*(np.maximum(part, 0.0) for part in (backbone, head, handover)))

    def parts_mj(self) -> Costs:
        """The parts in mJ: the times at the mean power of the paths whose joules were measured."""
        energy, profile, powers = self.profile.energy, self.profile, []
        for place in () if energy is None else energy.cases:
            assert energy is not None
            powers.append(energy.gross_mj(place).value / profile.value_ns(profile.cases[place]))
        mean = float(np.mean(powers)) if powers else 0.0
        parts = self.parts_ns()
        return Costs(parts.backbone * mean, parts.head * mean, parts.handover * mean)

    def energy_mj(self, kept: Kept, exit: str) -> float:
        """Millijoules to leave at *exit* of *kept*, as energy() counts them; NaN if unknown."""
        if exit not in kept:
            return math.nan
        costs = self.costs_ns(kept)
        if costs is None:
            return math.nan
        found = self.energy(
            dict(zip(kept, costs, strict=True)), {n: float(n == exit) for n in kept}
        )
        return float(found.get("mean_mj", math.nan))

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
