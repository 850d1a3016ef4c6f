"""
Two profiles beside each other: is B slower than A, where, by how much, and is that sure?

Callers see compare and Comparison. The unit of chance is the process, as everywhere; chances hold
for all exits together. Hidden here: a machine that was slower as a whole slows its yardstick
loop, too, and then ratios to the yardstick tell more than times; what differs besides the
bundle is said aloud, not refused, unless nothing is left to compare.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeexit import intervals
from edgeexit.blocks import CLEAN, Case, Values
from edgeexit.device import HOST
from edgeexit.energy import joules
from edgeexit.errors import UsageError, printable
from edgeexit.intervals import Difference
from edgeexit.profile import Estimate, Profile
from edgeexit.verdict import NO_EXITS, named, watched

# 1: first version.
FORMAT = 1

TIME, YARDSTICK = "time", "yardstick"
# A difference is named if fewer than 1 of 100 pairs of like profiles show one somewhere (a check
# that runs every night must not cry wolf), ...
SIGNIFICANT = 0.01
# ... and if it is more than what a machine does from one day to the next.
LEAST = 0.005
# Wider intervals hide what users ask about.
_VAGUE = 0.05
# Beyond this the machine as a whole was another one; below, the yardstick adds only its noise.
_YARDSTICKS_DIFFER = 0.01
# Facts that make another machine: its yardstick would hide what the comparison is about.
_MACHINE = ("board", "revision", "cpu", "machine")
_SHOWN = 48


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One path in both profiles: the exit *name*, or "without exits".

    *a* and *b* are ns a call; *time* and *yardstick* the ratio B / A of times, and of times in
    turns of the yardstick loop. a_mj and b_mj are gross millijoules a call and *energy* their
    ratio, None where either profile has none.
    """

    name: str
    a: Estimate
    b: Estimate
    time: Difference
    yardstick: Difference
    a_mj: float | None = None
    b_mj: float | None = None
    energy: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    B against A. *basis* names which ratio of a row counts, *why* says the reason; *notes* are
    what else differs or disturbs, a line each; *processes* how many A and B have; joule_labels
    the labels of their joules, empty if they have none in common.
    """

    rows: tuple[Row, ...]
    basis: str
    why: str
    notes: tuple[str, ...]
    processes: tuple[int, int]
    joule_labels: tuple[str, ...] = ()

    def ratio(self, row: Row) -> Difference:
        """The ratio B / A of *row* that counts."""
        return row.time if self.basis == TIME else row.yardstick

    def is_different(self, row: Row) -> bool:
        """Whether *row* differs by more than chance and more than LEAST."""
        return _is_different(self.ratio(row))

    def slower(self, allowed: float) -> list[Row]:
        """The rows in which B is slower for sure, and by more than *allowed* (0.03: 3 %)."""
        return [
            row
            for row in self.rows
            if self.is_different(row) and self.ratio(row).ratio > 1 + allowed
        ]

    def unsure(self, allowed: float) -> list[Row]:
        """The rows in which the data cannot tell whether B is slower by more than *allowed*."""
        return [
            row
            for row in self.rows
            if self.ratio(row).high > 1 + allowed and row not in self.slower(allowed)
        ]

    @property
    def can_tell(self) -> bool:
        """Whether so many processes can show any difference at all."""
        # The rarest of all ways to deal the processes out, and its mirror image.
        return 2 / math.comb(sum(self.processes), self.processes[0]) <= SIGNIFICANT

    def summary(self) -> str:
        """One line: what differs, by how much, and how sure that is."""
        differing = sorted(
            filter(self.is_different, self.rows),
            key=lambda row: -abs(math.log(self.ratio(row).ratio)),
        )
        if differing:
            return "B is " + ", ".join(_told(row.name, self.ratio(row)) for row in differing)
        if not self.can_tell:
            mine, yours = self.processes
            return f"cannot tell: {mine} and {yours} processes are too few to show a difference"
        low = min(self.ratio(row).low for row in self.rows)
        high = max(self.ratio(row).high for row in self.rows)
        if low > 1 - _VAGUE and high < 1 + _VAGUE:
            return f"no difference (all ratios lie within {low:.3f} .. {high:.3f})"
        chance = min(self.ratio(row).chance for row in self.rows)
        return (
            f"no difference for sure (least p = {chance:.2g}), but ratios of {low:.3f} .. "
            f"{high:.3f} fit: measure longer"
        )

    def energy_summary(self) -> str | None:
        """The same for joules; None without them."""
        pairs = [(row.name, row.energy) for row in self.rows if row.energy is not None]
        if not pairs:
            return None
        told = [
            f"{found.ratio:.3f}x the joules {_at(name)} (p = {found.chance:.2g})"
            for name, found in pairs
            if _is_different(found)
        ]
        return "B takes " + ", ".join(told) if told else "no difference in joules for sure"

    def to_document(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "format": FORMAT,
            "summary": self.summary(),
            "basis": self.basis,
            "why": self.why,
            "notes": list(self.notes),
            "processes": list(self.processes),
            "joule_labels": list(self.joule_labels),
            "exits": [_document(row) for row in self.rows],
        }


def compare(a: Profile, b: Profile) -> Comparison:
    """
    *b* against *a*, for each exit with all exits kept and for the network without exits.

    Exits are matched by name. UsageError if none is in both.
    """
    pairs = _pairs(a, b)
    if not pairs:
        raise UsageError(
            f"nothing to compare: A has the exits {_listed(a.exits)}, B has {_listed(b.exits)}",
            hint="compare profiles of bundles whose exits have the same names",
        )
    times = intervals.differences(
        [b.blocks_ns(case) for _, _, case in pairs], [a.blocks_ns(case) for _, case, _ in pairs]
    )
    turns = intervals.differences(
        [_ratios(b, case) for _, _, case in pairs], [_ratios(a, case) for _, case, _ in pairs]
    )
    energies = _energies(a, b, pairs)
    rows = tuple(
        Row(
            name=name,
            a=a.latency(mine),
            b=b.latency(yours),
            time=time,
            yardstick=turn,
            **energies.get(name, {}),
        )
        for (name, mine, yours), time, turn in zip(pairs, times, turns, strict=True)
    )
    basis, why = _basis(a, b)
    labels: tuple[str, ...] = ()
    if energies and a.energy is not None and b.energy is not None:
        labels = tuple(dict.fromkeys([a.energy.label, b.energy.label]))
    return Comparison(
        rows=rows,
        basis=basis,
        why=why,
        notes=tuple(_notes(a, b)),
        processes=(len(a.processes), len(b.processes)),
        joule_labels=labels,
    )


Pair = tuple[str, Case, Case]


def _pairs(a: Profile, b: Profile) -> list[Pair]:
    """What is in both: the name, the path in A and the path in B."""
    theirs = {named(b, case): case for case in watched(b)}
    found = [(named(a, case), case, theirs.get(named(a, case))) for case in watched(a)]
    same_final = a.exits[-1] == b.exits[-1]
    return [
        (name, mine, yours)
        for name, mine, yours in found
        if yours is not None and (mine != a.full or same_final)
    ]


def _ratios(profile: Profile, case: Case) -> list[Values]:
    place = profile.cases.index(case)
    return [process.ratios(place) for process in profile.processes]


def _basis(a: Profile, b: Profile) -> tuple[str, str]:
    is_other = any(a.machine.get(what) != b.machine.get(what) for what in _MACHINE)
    share = b.yardstick_ns / a.yardstick_ns - 1
    if is_other or (a.device != b.device and HOST not in (a.device, b.device)):
        return TIME, "A and B are from different machines"
    if a.mode != b.mode:
        return TIME, "A and B were measured in different modes, and the yardstick with them"
    if abs(share) > _YARDSTICKS_DIFFER:
        change = f"{abs(share):.1%} {'slower' if share > 0 else 'faster'}"
        return YARDSTICK, f"the yardstick loop was {change} in B: the whole machine was"
    return TIME, f"the yardstick loops agree within {max(abs(share), 1e-4):.1%}"


def _energies(a: Profile, b: Profile, pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """For each name that has joules in both: the fields of a Row."""
    found = [(name, _window_mj(a, mine), _window_mj(b, yours)) for name, mine, yours in pairs]
    both = [(name, mine, yours) for name, mine, yours in found if mine and yours]
    if not both:
        return {}
    # Every path has its own number of windows; the test takes as many of each.
    fewest = [min(len(entry[k]) for entry in both) for k in (1, 2)]
    mines, theirs = ([entry[k][: fewest[k - 1]] for entry in both] for k in (1, 2))
    return {
        name: {
            "a_mj": intervals.pooled_median(mine),
            "b_mj": intervals.pooled_median(yours),
            "energy": difference,
        }
        for (name, mine, yours), difference in zip(
            both, intervals.differences(theirs, mines), strict=True
        )
    }


def _window_mj(profile: Profile, case: Case) -> list[list[float]]:
    """Gross millijoules a call of each window of *case*; empty without joules above 0."""
    energy, place = profile.energy, profile.cases.index(case)
    if energy is None:
        return []
    windows = [window for window in energy.windows if window.case == place]
    found = [[joules(energy.trace, window) / window.calls] for window in windows]
    return found if all(value > 0 for (value,) in found) else []


# ---------------------------------------------------------------- what else differs


def _facts(a: Profile, b: Profile) -> Iterator[tuple[str, Any, Any]]:
    """What differs between the two besides their times: its name, and what it is in A and B."""
    for what, of in _FACTS.items():
        if of(a) != of(b):
            yield what, of(a), of(b)
    for what in dict.fromkeys([*a.machine, *b.machine]):
        if a.machine.get(what) != b.machine.get(what):
            yield what, a.machine.get(what), b.machine.get(what)


_FACTS: dict[str, Callable[[Profile], Any]] = {
    "bundle": lambda profile: f"{profile.bundle_name} {profile.bundle_digest[:12]}",
    "device": lambda profile: profile.device,
    "mode": lambda profile: str(profile.mode),
    "threads": lambda profile: profile.threads,
    "pinned to": lambda profile: list(profile.cores),
    "runtime": lambda profile: profile.runtime,
    "delegate": lambda profile: profile.delegate,
    "meter": lambda profile: profile.energy and profile.energy.info.instrument,
}


def _notes(a: Profile, b: Profile) -> Iterator[str]:
    for name, profile in (("A", a), ("B", b)):
        if profile.verdict.status != CLEAN:
            kinds = dict.fromkeys(reason.kind for reason in profile.verdict.reasons)
            yield f"{name} is {profile.verdict.status.upper()} ({_listed(list(kinds))})"
    for what, mine, yours in _facts(a, b):
        yield f"{_shown(what)} differs: {_shown(mine)} in A, {_shown(yours)} in B"
    for name, mine, yours in (("A", a.exits, b.exits), ("B", b.exits, a.exits)):
        alone = [exit for exit in mine if exit not in yours]
        if alone:
            yield f"only in {name}: {_listed(alone)}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else printable(str(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(_shown, names[:10])) + more


def _is_different(found: Difference) -> bool:
    return found.chance < SIGNIFICANT and abs(found.ratio - 1) > LEAST


def _told(name: str, found: Difference) -> str:
    change = "slower" if found.ratio > 1 else "faster"
    times = found.ratio if found.ratio > 1 else 1 / found.ratio
    return f"{times:.3f}x {change} {_at(name)} (p = {found.chance:.2g})"


def _at(name: str) -> str:
    return name if name == NO_EXITS else f"at {_shown(name)}"


def _document(row: Row) -> dict[str, Any]:
    document: dict[str, Any] = {"exit": row.name, "a_ns": asdict(row.a), "b_ns": asdict(row.b)}
    for key, found in (("time", row.time), ("yardstick", row.yardstick), ("energy", row.energy)):
        document[key] = None if found is None else asdict(found)
    # A single process has no interval; JSON has no infinity.
    for entry in filter(None, (document[key] for key in list(document)[1:])):
        for key, value in entry.items():
            entry[key] = value if math.isfinite(value) else None
    return {**document, "a_mj": row.a_mj, "b_mj": row.b_mj}
