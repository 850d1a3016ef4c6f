"""
What a path costs, taken apart: backbone stages, heads and hand-overs, and any other path's price.

Callers see fit and Parts. Nothing can be timed within a segment, so parts come from differences
of paths that were timed whole: leaving at an exit costs the input stage, the backbone up to it,
and a head with its hand-over for every kept exit on the way, its own included. Two parts always
come together: the final exit's head is in its backbone stage (no path goes there without it),
and the call of the runtime for one more segment is in that exit's head. Hand-over and input
stage are what the dissection timed; without one they are in the head and in the first stage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit import intervals
from edgeexit.blocks import Case, Kept
from edgeexit.errors import UsageError
from edgeexit.names import unknown
from edgeexit.profile import Estimate, Profile

Values = NDArray[np.float64]

_REPLICATES = 1000
_CLOSE = 1e-7


@dataclass(frozen=True, kw_only=True)
class Parts:
    """
    The parts of one network on one machine, in ns, each with its 95 % interval over processes.

    *exits* are all exits, *used* the paths that the parts were fitted from. *worst_residual* is
    the largest share by which the fit misses one of those: how well costs add up here, where
    there are more paths than parts (else it is 0). A part that the paths do not determine is
    None. Small parts are differences of large costs, and may come out below 0.
    """

    exits: tuple[str, ...]
    used: tuple[tuple[Kept, str], ...]
    worst_residual: float
    _model: "_Model" = field(repr=False, compare=False)

    def backbone_ns(self, exit: str) -> Estimate | None:
        """The stage from the exit before (from the input) to *exit*; the final one has its head."""
        wanted = np.zeros(self._model.width)
        wanted[self._place(exit)] = 1
        return self._model.estimate(wanted, known=False)

    def head_ns(self, exit: str) -> Estimate | None:
        """The head of *exit*, with the call of its segment; None for the final one."""
        place = self._place(exit)
        if place == len(self.exits) - 1:
            return None
        wanted = np.zeros(self._model.width)
        wanted[len(self.exits) + place] = 1
        return self._model.estimate(wanted, known=False)

    def handover_ns(self, exit: str) -> Estimate | None:
        """Copying the segment's inputs and reading its confidence; None without a dissection."""
        place = self._place(exit)
        return self._model.seen(1 + place) if self._model.is_dissected else None

    @property
    def input_ns(self) -> Estimate | None:
        """The input stage; None without a dissection."""
        return self._model.seen(0) if self._model.is_dissected else None

    def price(self, kept: Sequence[str], exit: str) -> Estimate | None:
        """Leaving at *exit* of the *kept* exits; None if the fitted paths do not determine it."""
        return self._model.estimate(_row(self.exits, kept, exit), known=True)

    def replicates(self, kept: Sequence[str], exit: str) -> Values | None:
        """Bootstrap replicates of price, float64 (1000,), of the processes Profile's are of."""
        return self._model.replicates(_row(self.exits, kept, exit))

    def predict(self, kept: Sequence[str]) -> list[float] | None:
        """Nanoseconds to leave at each of the *kept* exits, None if one is not determined."""
        found = [self.price(kept, name) for name in kept]
        return None if None in found else [price.value for price in found if price is not None]

    @property
    def smallest_ns(self) -> Values:
        """
        Backbone stages (E,) and then heads (E - 1,): the smallest parts that fit the paths best.

        Where the paths do not determine every part, what they leave open is spread evenly.
        """
        return self._model.parts

    def _place(self, exit: str) -> int:
        if exit not in self.exits:
            raise unknown(exit, self.exits, "exit")
        return self.exits.index(exit)


def fit(profile: Profile, using: Iterable[tuple[Sequence[str], str]] | None = None) -> Parts:
    """
    The parts of *profile*'s network, from the paths (kept, exit) in *using* (None: all measured).

    Least squares on relative deviations. Processes differ by far more than paths within one, so
    each path is first compared with the others of its process; intervals come from drawing
    processes anew. UsageError for a path that was not measured, or none.
    """
    cases = list(profile.cases) if using is None else _named(profile, using)
    if not cases:
        raise UsageError("no path to fit from, expected at least one")
    medians = np.array(
        [[float(np.median(values)) for values in profile.blocks_ns(case)] for case in cases]
    ).T
    level = np.exp(np.log(medians).mean(axis=1))
    apart = medians / level[:, None]
    value = np.median(apart, axis=0)
    # On the whole the fit stands at the profile's own level.
    stands_at = np.exp(np.mean([np.log(profile.value_ns(case)) for case in cases]))
    measured = value * stands_at / np.exp(np.log(value).mean())
    rng = np.random.default_rng(profile.seed)
    drawn = rng.integers(0, len(medians), (_REPLICATES, len(medians)))
    levels = np.median(level[drawn], axis=1) * (stands_at / np.median(level))
    redrawn = np.median(apart[drawn], axis=1)
    redrawn *= (levels / np.exp(np.log(redrawn).mean(axis=1)))[:, None]
    design = np.array([_row(profile.exits, case.kept, case.exit) for case in cases])
    model = _Model(design, measured, redrawn, _dissected(profile), drawn)
    paths = tuple((case.kept, case.exit) for case in cases)
    return Parts(exits=profile.exits, used=paths, worst_residual=model.worst_residual, _model=model)


def _named(profile: Profile, using: Iterable[tuple[Sequence[str], str]]) -> list[Case]:
    found: dict[Case, None] = {}
    for kept, exit in using:
        case = profile.case(kept, exit)
        if case is None:
            raise UsageError(f"leaving at {exit!r} of {list(kept)} was not measured")
        found[case] = None
    return list(found)


def _row(exits: Sequence[str], kept: Sequence[str], exit: str) -> Values:
    """Which parts a path has: a backbone stage for each exit, a head for each but the final."""
    for name in (exit, *kept):
        if name not in exits:
            raise unknown(name, exits, "exit")
    if exit not in kept:
        raise unknown(exit, kept, "kept exit")
    count, last = len(exits), exits.index(exit)
    row = np.zeros(2 * count - 1)
    row[: last + 1] = 1
    for place, name in enumerate(exits[: min(last + 1, count - 1)]):
        row[count + place] = name in kept
    return row


def _dissected(profile: Profile) -> Values | None:
    """For each process the input stage and each exit's hand-over in ns; None if any lacks them."""
    rows = []
    for process in profile.processes:
        seen = process.dissection
        if seen is None or tuple(cost.exit for cost in seen.segments) != profile.exits:
            return None
        rows.append([seen.preprocess_ns, *(cost.handover_ns for cost in seen.segments)])
    return np.array(rows)


class _Model:
    """A weighted least squares fit: of the measured costs, and of each bootstrap replicate."""

    def __init__(
        self,
        design: Values,
        measured: Values,
        redrawn: Values,
        dissected: Values | None,
        drawn: NDArray[np.int64],
    ) -> None:
        self.width = design.shape[1]
        self.is_dissected = dissected is not None
        self._exits = (self.width + 1) // 2
        self._processes = drawn.shape[1]
        if dissected is None:
            dissected = np.zeros((self._processes, 1 + self._exits))
        self._seen = np.median(dissected, axis=0)
        self._seen_redrawn = np.median(dissected[drawn], axis=1)
        weights = 1 / measured
        weighted = design * weights[:, None]
        inverse = np.linalg.pinv(weighted, rcond=1e-10)
        known = np.array([self._known(row) for row in design])
        self.parts = inverse @ ((measured - known @ self._seen) * weights)
        self._redrawn = ((redrawn - self._seen_redrawn @ known.T) * weights) @ inverse.T
        self._span = inverse @ weighted
        fitted = design @ self.parts + known @ self._seen
        self.worst_residual = float(np.abs(fitted / measured - 1).max())

    def replicates(self, wanted: Values) -> Values | None:
        """Replicates of the sum of the *wanted* parts with what was dissected on that path."""
        if not self._tells(wanted):
            return None
        return np.asarray(self._redrawn @ wanted + self._seen_redrawn @ self._known(wanted))

    def estimate(self, wanted: Values, *, known: bool) -> Estimate | None:
        """The sum of the *wanted* parts; with *known* also what was dissected on that path."""
        if not self._tells(wanted):
            return None
        seen = self._known(wanted) if known else np.zeros(1 + self._exits)
        value = wanted @ self.parts + seen @ self._seen
        return self._between(float(value), self._redrawn @ wanted + self._seen_redrawn @ seen)

    def seen(self, place: int) -> Estimate:
        """A part that was dissected: 0 the input stage, k + 1 the hand-over of exit k."""
        return self._between(float(self._seen[place]), self._seen_redrawn[:, place])

    def _tells(self, wanted: Values) -> bool:
        return bool(np.allclose(wanted @ self._span, wanted, atol=_CLOSE))

    def _known(self, row: Values) -> Values:
        """What a path has of the dissected: the input stage, and hand-overs of its exits."""
        last = int(row[: self._exits].sum()) - 1
        crossed = np.zeros(self._exits)
        crossed[:-1] = row[self._exits :]
        crossed[-1] = last == self._exits - 1
        return np.concatenate([[1.0], crossed])

    def _between(self, value: float, redrawn: Values) -> Estimate:
        low, high = intervals.interval(redrawn, self._processes)
        return Estimate(value=value, low=min(low, value), high=max(high, value))
