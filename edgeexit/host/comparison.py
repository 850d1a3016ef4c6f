"""
A network before and after a change: exit by exit, and beside the small static rival.

Callers see comparison and Comparison. Hidden here: two networks are only compared by runs that
take turns in one process, for machines are noisy and drift; and the question whether the change
was worth it at all, which an early exit of the old network, cut out alone, may answer with no.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import NDArray

from edgeexit.bundle import Bundle
from edgeexit.host.assess import (
    COLUMNS,
    Assessment,
    ExitRow,
    Interval,
    bounds,
    cells,
    legend,
    millions,
    tail_hint,
)
from edgeexit.policy import Policy
from edgeexit.race import Race, race
from edgeexit.report import milliseconds, text_table
from edgeexit.runtime import Runner

RIVAL_SLACK = 0.005  # a rival may be this much worse: half a point
PASSES = (3, 12)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """
    A single exit of the network before, alone: no worse than the new one's best, and faster.

    *speed_up* is over leaving at the new network's best exit, in the same race.
    """

    exit: str
    int8_accuracy: float
    latency_ms: float
    speed_up: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    A network *before* and *after*, and how many times faster it reaches each exit of both.

    *speed_ups* (median, least, most over the passes) and *rival* come out of one race in which
    all took turns; without one (*is_raced* False) both are empty.
    """

    before: Assessment
    after: Assessment
    is_raced: bool
    speed_ups: Mapping[str, Interval]
    rival: Rival | None

    def text(self) -> str:
        """A table with two lines for each exit, before and after, and the verdicts below it."""
        names = dict.fromkeys(row.name for net in (self.before, self.after) for row in net.rows)
        rows = []
        for name in names:
            old, new = self.before.row(name), self.after.row(name)
            if old is not None:
                rows.append([name, "before", *cells(old), ""])
            if new is not None:
                rows.append([name if old is None else "", "after", *cells(new), self._faster(name)])
        hint = tail_hint(self.after)
        return "\n".join(
            [
                text_table(["exit", "", *COLUMNS, "faster"], rows),
                "",
                f"all exits: {millions(self.before.macs)} -> {millions(self.after.macs)} M MACs, "
                f"{self.before.parameters:,} -> {self.after.parameters:,} parameters",
                *legend(self.after),
                *([self._verdict()] if self.is_raced else []),
                *([hint] if hint else []),
            ]
        )

    def _faster(self, name: str) -> str:
        if name not in self.speed_ups:
            return ""
        value, low, high = self.speed_ups[name]
        return f"{value:.2f}x ({low:.2f} .. {high:.2f})"

    def _verdict(self) -> str:
        best = self.after.best
        if self.rival is None:
            return (
                "Static rival: no single exit of the network before, alone, is as accurate "
                f"(within {100 * RIVAL_SLACK:.1f} points) and faster than {best.name!r} now."
            )
        rival = self.rival
        return (
            f"A static {rival.exit} of the network before, alone, is faster: "
            f"{rival.int8_accuracy:.2%} in {milliseconds(rival.latency_ms)} ms, "
            f"{rival.speed_up:.2f}x faster than {best.name!r} now ({best.int8_accuracy:.2%})."
        )

    def to_document(self) -> dict[str, Any]:
        """The comparison as plain values, for --json."""
        return {
            "before": self.before.to_document(),
            "after": self.after.to_document(),
            "speed_ups": {name: bounds(value) for name, value in self.speed_ups.items()},
            "static_rival": None if self.rival is None else asdict(self.rival),
        }


def comparison(
    before: Assessment,
    after: Assessment,
    *,
    is_measured: bool = True,
    seconds: float = 8.0,
    on_step: Callable[[float], object] | None = None,
) -> Comparison:
    """
    Compare two networks, whose bundles must still be there, by one race of about *seconds*.

    Every exit of both runs in turns with the others in this process, so that a ratio is not
    moved by what else the machine does. With them runs the static rival: the cheapest exit of
    *before*, cut out alone, whose int8 accuracy is within half a point of *after*'s best exit.
    """
    if not is_measured:
        return Comparison(before=before, after=after, is_raced=False, speed_ups={}, rival=None)
    candidate = _candidate(before, after)
    runners = {f"before {row.name}": _runner(before.bundle, row.name) for row in before.rows}
    runners |= {f"after {row.name}": _runner(after.bundle, row.name) for row in after.rows}
    if candidate is not None:
        runners["rival"] = _runner(before.bundle, candidate.name, (candidate.name,))
    try:
        found = _race(runners, list(after.raced), seconds, on_step)
    finally:
        for runner in runners.values():
            runner.close()
    common = [row.name for row in after.rows if before.row(row.name) is not None]
    return Comparison(
        before=before,
        after=after,
        is_raced=True,
        speed_ups={name: _speed_up(found, f"after {name}", f"before {name}") for name in common},
        rival=None if candidate is None else _rival(found, candidate, after.best),
    )


def _candidate(before: Assessment, after: Assessment) -> ExitRow | None:
    good = [
        row for row in before.rows if row.int8_accuracy >= after.best.int8_accuracy - RIVAL_SLACK
    ]
    return min(good, key=lambda row: row.macs, default=None)


def _rival(found: Race, candidate: ExitRow, best: ExitRow) -> Rival | None:
    speed_up = found.speed_up("rival", f"after {best.name}")
    if speed_up <= 1.0:
        return None
    return Rival(
        exit=candidate.name,
        int8_accuracy=candidate.int8_accuracy,
        latency_ms=found.latency_ms("rival"),
        speed_up=speed_up,
    )


def _runner(bundle: Bundle, exit: str, kept: tuple[str, ...] | None = None) -> Runner:
    return Runner(bundle, Policy.forced(bundle, exit, kept or bundle.exits), preload=True)


def _race(
    runners: Mapping[str, Runner],
    samples: Sequence[NDArray[Any]],
    seconds: float,
    on_step: Callable[[float], object] | None,
) -> Race:
    """As many passes as fit into *seconds*, of as many samples as leave time for three."""
    trial = race(runners, samples[:4], passes=1)
    each_s = sum(trial.latency_ms(name) for name in runners) / 1e3
    count = max(4, min(len(samples), int(seconds / (PASSES[0] + 1) / each_s)))
    passes = max(PASSES[0], min(PASSES[1], int(seconds / each_s / count) - 1))
    done = 0

    def step(answers: int) -> None:
        nonlocal done
        done += answers
        if on_step is not None:
            on_step(min(1.0, done / (passes * len(samples[:count]) * len(runners))))

    return race(runners, samples[:count], passes=passes, stretch=10, on_step=step)


def _speed_up(found: Race, name: str, rival: str) -> Interval:
    pairs = zip(found.mean_ns[rival], found.mean_ns[name], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return found.speed_up(name, rival), min(ratios), max(ratios)
