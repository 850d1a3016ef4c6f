"""
What it costs on one machine to leave at each exit: the raw values, and what follows from them.

Callers see Profile and Estimate. A profile holds what was timed, block by block and process by
process, with what the machine was like meanwhile; edgeexit.instrument makes it and
edgeexit.verdict judges it. Medians, intervals and ratios are computed when asked for and never
stored instead of the values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit import __version__, intervals
from edgeexit.blocks import (
    NOT_CONVERGED,
    Case,
    Kept,
    Mode,
    Process,
    Values,
    Verdict,
    reading_document,
    reading_from,
)
from edgeexit.energy import Energy
from edgeexit.errors import BadFile, UsageError, hinting
from edgeexit.files import Table, json_bytes, read_json, write_file
from edgeexit.state import Reading

# 1: first version: medians of blocks, nothing about the machine but before and after.
# 2: processes with warm-up, single calls, yardstick, CPU time, readings; mode, energy, verdict.
# 3: dissections time decoding a picture.
FORMAT = 3

_LACKS = {1: "says nothing about the machine", 2: "does not tell what decoding a picture takes"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A latency in ns, an energy in mJ, or a ratio, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width as a share of the value (0.01: plus or minus 1 %)."""
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True, kw_only=True)
class Profile:
    """
    Measured costs of one bundle on one device, with what the machine was like.

    *runtime* is the TFLite runtime and version, *delegate* whether XNNPACK took the graph (None
    if it does not say), *cores* those the processes were pinned to (empty: not pinned).
    *precision* is the half-width that was asked for. *machine* holds facts of this machine,
    before and after its state. *emulated* says why times mean nothing for the device.
    """

    device: str
    bundle_digest: str
    bundle_name: str
    exits: tuple[str, ...]
    mode: Mode
    runtime: str
    delegate: str | None
    threads: int
    cores: tuple[int, ...]
    seed: int
    precision: float
    time_cap_s: float
    cases: tuple[Case, ...]
    processes: tuple[Process, ...]
    machine: Mapping[str, Any]
    before: Reading
    after: Reading
    emulated: str | None = None
    energy: Energy | None = None
    energy_failure: str | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(status=NOT_CONVERGED))
    measured_at: str = ""
    made_by: str = __version__

    def case(self, kept: Sequence[str], exit: str) -> Case | None:
        """The case that leaves at *exit* of the *kept* exits, None if it was not measured."""
        return self._places.get((tuple(kept), exit))

    @cached_property
    def _places(self) -> dict[tuple[Kept, str], Case]:
        return {pair: case for case in self.cases for pair in case.stands_for}

    def kept_sets(self) -> list[Kept]:
        """All sets of kept exits of which every exit was measured, largest first."""
        found: dict[Kept, set[str]] = {}
        for kept, exit in self._places:
            found.setdefault(kept, set()).add(exit)
        whole = [kept for kept, exits in found.items() if exits == set(kept)]
        order = {name: k for k, name in enumerate(self.exits)}
        return sorted(whole, key=lambda kept: (-len(kept), [order[name] for name in kept]))

    def costs_ns(self, kept: Sequence[str]) -> list[float] | None:
        """Nanoseconds to leave at each of the *kept* exits, None if one was not measured."""
        found = [self.case(kept, name) for name in kept]
        return None if None in found else [self.value_ns(case) for case in found if case]

    @property
    def full(self) -> Case:
        """The same network without exits: uncut, the heads of all but the final exit removed."""
        found = self.case(self.exits[-1:], self.exits[-1])
        if found is None:
            raise BadFile(f"profile of {self.bundle_name}: the final exit alone was not measured")
        return found

    def blocks_ns(self, case: Case) -> list[Values]:
        """Nanoseconds a call of the blocks of *case*, one array for each process."""
        place = self.cases.index(case)
        return [process.values(place) for process in self.processes]

    def value_ns(self, case: Case) -> float:
        """Nanoseconds a call: the median of block means, every process weighing the same."""
        return intervals.pooled_median(self.blocks_ns(case))

    def latency(self, case: Case) -> Estimate:
        """Nanoseconds a call of *case*."""
        low, high = self._interval(self._replicates[self.cases.index(case)])
        return Estimate(value=self.value_ns(case), low=low, high=high)

    def replicates(self, case: Case) -> Values:
        """
        Bootstrap replicates of value_ns, float64 (1000,); those of two cases go together.

        Which processes each replicate draws is what `default_rng(seed).integers` says first.
        """
        return np.asarray(self._replicates[self.cases.index(case)])

    def share(self, case: Case, of: Case) -> Estimate:
        """The cost of *case* as a share of that of *of*, paired process by process."""
        ours, theirs = (self._replicates[self.cases.index(which)] for which in (case, of))
        low, high = self._interval(ours / theirs)
        return Estimate(value=self.value_ns(case) / self.value_ns(of), low=low, high=high)

    @cached_property
    def yardstick_ns(self) -> float:
        """Nanoseconds of a turn of the yardstick loop: the median, as of a case."""
        return intervals.pooled_median(
            [[block.yardstick_ns for block in process.blocks] for process in self.processes]
        )

    def in_yardsticks(self, case: Case) -> float:
        """The cost of *case* in turns of the yardstick loop that ran beside it."""
        place = self.cases.index(case)
        return intervals.pooled_median([process.ratios(place) for process in self.processes])

    def tail(self, case: Case, quantile: float) -> Estimate | None:
        """The *quantile* (0.95, 0.99) of single calls in ns; None if there are too few."""
        place = self.cases.index(case)
        calls = [
            [call for block in process.blocks if block.case == place for call in block.calls_ns]
            for process in self.processes
        ]
        found = intervals.quantile_interval(calls, quantile)
        return None if found is None else Estimate(value=found[0], low=found[1], high=found[2])

    @cached_property
    def _replicates(self) -> Values:
        """Bootstrap replicates of each case, float64 (cases, replicates), drawn together."""
        return intervals.replicates([self.blocks_ns(case) for case in self.cases], seed=self.seed)

    def _interval(self, replicates: Values) -> tuple[float, float]:
        return intervals.interval(replicates, len(self.processes))

    def to_document(self) -> dict[str, Any]:
        """The profile as a JSON object."""
        return {
            "format": FORMAT,
            "made_by": self.made_by,
            "measured_at": self.measured_at,
            "device": self.device,
            "bundle": self.bundle_digest,
            "bundle_name": self.bundle_name,
            "exits": list(self.exits),
            "verdict": self.verdict.to_document(),
            "mode": asdict(self.mode),
            "runtime": self.runtime,
            "delegate": self.delegate,
            "threads": self.threads,
            "cores": list(self.cores),
            "seed": self.seed,
            "precision": self.precision,
            "time_cap_s": self.time_cap_s,
            "emulated": self.emulated,
            "machine": dict(self.machine),
            "before": reading_document(self.before),
            "after": reading_document(self.after),
            "cases": [case.to_document() for case in self.cases],
            "processes": [process.to_document() for process in self.processes],
            "energy": None if self.energy is None else self.energy.to_document(),
            "energy_failure": self.energy_failure,
        }

    @classmethod
    def from_document(cls, table: Table) -> "Profile":
        """Read what to_document wrote. BadFile names the key that is wrong."""
        found = table.get("format", int)
        if found in _LACKS:
            raise BadFile(
                f"{table.where}: format: {found} {_LACKS[found]}, expected {FORMAT}",
                hint="measure again with: edgeexit profile",
            )
        table.expect_format(FORMAT)
        table.only(*_KEYS)
        cases = tuple(Case.from_document(entry) for entry in table.tables("cases"))
        energy, mode = table.values.get("energy"), table.table("mode")
        mode.only("name", "rate_hz")
        profile = cls(
            device=table.get("device", str),
            bundle_digest=table.get("bundle", str),
            bundle_name=table.get("bundle_name", str),
            exits=tuple(table.list_of("exits", str)),
            mode=_mode(mode),
            runtime=table.get("runtime", str),
            delegate=_optional(table, "delegate"),
            threads=table.get("threads", int),
            cores=tuple(table.list_of("cores", int)),
            seed=table.get("seed", int),
            precision=table.get("precision", float),
            time_cap_s=table.get("time_cap_s", float),
            cases=cases,
            processes=tuple(
                Process.from_document(entry, len(cases)) for entry in table.tables("processes")
            ),
            machine=table.table("machine").values,
            before=reading_from(table.table("before")),
            after=reading_from(table.table("after")),
            emulated=_optional(table, "emulated"),
            energy=None if energy is None else Energy.from_document(table.table("energy")),
            energy_failure=_optional(table, "energy_failure"),
            verdict=Verdict.from_document(table.table("verdict")),
            measured_at=table.get("measured_at", str),
            made_by=table.get("made_by", str),
        )
        profile._check(table.where)
        return profile

    def _check(self, where: str) -> None:
        pairs = [pair for case in self.cases for pair in case.stands_for]
        strange = [kept for kept, _ in pairs if kept != tuple(n for n in self.exits if n in kept)]
        alone = (self.exits[-1:], self.exits[-1]) if self.exits else None
        if strange or alone not in pairs or len(set(pairs)) < len(pairs):
            raise BadFile(f"{where}: cases: do not fit the exits {list(self.exits)}")
        if self.energy is not None and max(self.energy.cases) >= len(self.cases):
            raise BadFile(f"{where}: energy: windows of a case that is not there")
        if not self.processes:
            raise BadFile(f"{where}: processes: expected at least one")
        if not 0 <= self.seed < 1 << 32 or self.threads < 1 or not 0 < self.precision < 1:
            raise BadFile(f"{where}: seed, threads or precision: out of range")

    def save(self, path: Path | str) -> None:
        """Write the profile durably to the JSON file *path*."""
        write_file(Path(path), json_bytes(self.to_document()))

    @classmethod
    def load(cls, path: Path | str) -> "Profile":
        """The profile in the JSON file *path*. UsageError if absent, BadFile if wrong."""
        with hinting("measure again with: edgeexit profile"):
            return cls.from_document(read_json(Path(path)))


_KEYS = (
    *("format", "made_by", "measured_at", "device", "bundle", "bundle_name", "exits"),
    *("verdict", "mode", "runtime", "delegate", "threads", "cores", "seed", "precision"),
    *("time_cap_s", "emulated", "machine", "before", "after", "cases", "processes"),
    *("energy", "energy_failure"),
)


def _optional(table: Table, key: str) -> str | None:
    return None if table.values.get(key) is None else table.get(key, str)


def _mode(table: Table) -> Mode:
    rate = None if table.values.get("rate_hz") is None else table.get("rate_hz", float)
    try:
        return Mode(name=table.get("name", str), rate_hz=rate)
    except UsageError as error:
        raise BadFile(f"{table.where}: {error}") from error
