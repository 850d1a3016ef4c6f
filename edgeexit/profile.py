"""
The measuring instrument: what it costs on this machine to leave at each exit.

Callers see measure, Profile and Estimate. Each case is one set of kept exits and one exit of it,
timed through the very call that `run` makes, in blocks that are interleaved at random, in
several fresh processes. Raw block values are kept and statistics computed when asked for. The
cost of a case is the geometric mean over processes of the median block: the ratio of two cases
is then the mean of ratios within processes, in which a process's luck with memory cancels.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, errors
from edgeexit.bundle import Bundle
from edgeexit.device import Device, environment, find_device, this_device
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import Table, json_bytes, read_json, write_file
from edgeexit.interpreter import runtime_name

# 1: first version.
FORMAT = 1

ALL_SUBSETS_UP_TO = 4
_REPLICATES = 1000
_PACKAGE_HOME = Path(__file__).resolve().parent.parent

Kept = tuple[str, ...]
Step = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A latency in ns (or a ratio) with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    Leaving at *exit* of the bundle cut down to the *kept* exits.

    One entry for each process: blocks_ns holds ns per call of each block, in the order of the
    rounds; warmup_ns the first calls one by one; calls how many calls a block has.
    """

    kept: Kept
    exit: str
    warmup_ns: tuple[tuple[int, ...], ...]
    calls: tuple[int, ...]
    blocks_ns: tuple[tuple[float, ...], ...]

    @cached_property
    def value_ns(self) -> float:
        """Nanoseconds a call: the geometric mean over processes of the median block."""
        return float(np.exp(np.mean([math.log(np.median(b)) for b in self.blocks_ns])))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured costs of one bundle on one device, with what the machine was like."""

    device: str
    bundle_digest: str
    bundle_name: str
    exits: tuple[str, ...]
    runtime: str
    threads: int
    seed: int
    cases: tuple[Case, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    made_by: str = __version__

    def case(self, kept: Sequence[str], exit: str) -> Case | None:
        """The case that leaves at *exit* of the *kept* exits, None if it was not measured."""
        wanted = (tuple(kept), exit)
        return next((c for c in self.cases if (c.kept, c.exit) == wanted), None)

    def kept_sets(self) -> list[Kept]:
        """All sets of kept exits that were measured, in file order."""
        return list(dict.fromkeys(case.kept for case in self.cases))

    def costs_ns(self, kept: Sequence[str]) -> list[float] | None:
        """Nanoseconds to leave at each of the *kept* exits, None if one was not measured."""
        found = [self.case(kept, name) for name in kept]
        return None if None in found else [case.value_ns for case in found if case is not None]

    @property
    def full(self) -> Case:
        """The same network without exits: uncut, the heads of all but the final exit removed."""
        found = self.case(self.exits[-1:], self.exits[-1])
        if found is None:
            raise BadFile(f"profile of {self.bundle_name}: the final exit alone was not measured")
        return found

    def latency(self, case: Case) -> Estimate:
        """Nanoseconds a call of *case*."""
        low, high = np.exp(_interval([_draws([case], self.seed)[0]]))
        return Estimate(value=case.value_ns, low=float(low), high=float(high))

    def share(self, case: Case, of: Case) -> Estimate:
        """The cost of *case* as a share of that of *of*, process by process and round by round."""
        ours, theirs = _draws([case, of], self.seed)
        low, high = np.exp(_interval([ours - theirs]))
        return Estimate(value=case.value_ns / of.value_ns, low=float(low), high=float(high))

    def to_document(self) -> dict[str, Any]:
        """The profile as a JSON object."""
        return {
            "format": FORMAT,
            "made_by": self.made_by,
            "device": self.device,
            "bundle": self.bundle_digest,
            "bundle_name": self.bundle_name,
            "exits": list(self.exits),
            "runtime": self.runtime,
            "threads": self.threads,
            "seed": self.seed,
            "environment": {"before": dict(self.before), "after": dict(self.after)},
            "cases": [
                {
                    "kept": list(case.kept),
                    "exit": case.exit,
                    "calls": list(case.calls),
                    "warmup_ns": [list(values) for values in case.warmup_ns],
                    "blocks_ns": [list(values) for values in case.blocks_ns],
                }
                for case in self.cases
            ],
        }

    @classmethod
    def from_document(cls, table: Table) -> "Profile":
        """Read what to_document wrote. BadFile names the key that is wrong."""
        table.expect_format(FORMAT)
        table.only(
            *("format", "made_by", "device", "bundle", "bundle_name", "exits", "runtime"),
            *("threads", "seed", "environment", "cases"),
        )
        state = table.table("environment")
        profile = cls(
            device=table.get("device", str),
            bundle_digest=table.get("bundle", str),
            bundle_name=table.get("bundle_name", str),
            exits=tuple(table.list_of("exits", str)),
            runtime=table.get("runtime", str),
            threads=table.get("threads", int),
            seed=table.get("seed", int),
            cases=tuple(_case(entry) for entry in table.tables("cases")),
            before=state.table("before").values,
            after=state.table("after").values,
            made_by=table.get("made_by", str),
        )
        known = [kept for kept in profile.kept_sets() if not set(kept) <= set(profile.exits)]
        if (
            not profile.exits
            or known
            or profile.case(profile.exits[-1:], profile.exits[-1]) is None
        ):
            raise BadFile(f"{table.where}: cases: do not fit the exits {list(profile.exits)}")
        if len({len(case.blocks_ns) for case in profile.cases}) != 1 or profile.seed < 0:
            raise BadFile(f"{table.where}: cases: different numbers of processes")
        for process in range(len(profile.cases[0].blocks_ns)):
            if len({len(case.blocks_ns[process]) for case in profile.cases}) != 1:
                raise BadFile(f"{table.where}: cases: different numbers of rounds")
        return profile

    def save(self, path: Path | str) -> None:
        """Write the profile durably to the JSON file *path*."""
        write_file(Path(path), json_bytes(self.to_document()))

    @classmethod
    def load(cls, path: Path | str) -> "Profile":
        """The profile in the JSON file *path*. UsageError if absent, BadFile if wrong."""
        return cls.from_document(read_json(Path(path)))


def _case(table: Table) -> Case:
    table.only("kept", "exit", "calls", "warmup_ns", "blocks_ns")
    blocks = _rows(table, "blocks_ns")
    case = Case(
        kept=tuple(table.list_of("kept", str)),
        exit=table.get("exit", str),
        calls=tuple(table.list_of("calls", int)),
        warmup_ns=tuple(tuple(map(int, row)) for row in _rows(table, "warmup_ns")),
        blocks_ns=blocks,
    )
    if case.exit not in case.kept:
        raise BadFile(f"{table.where}: exit: {case.exit!r} is not among the kept exits")
    if not blocks or not len(blocks) == len(case.calls) == len(case.warmup_ns):
        raise BadFile(f"{table.where}: expected one entry for each process, at least one")
    return case


def _rows(table: Table, key: str) -> tuple[tuple[float, ...], ...]:
    """Lists of positive numbers; 1e999 reads as infinity and is refused."""
    rows = []
    for index, row in enumerate(table.list_of(key, list)):
        place = f"{table.where}.{key}[{index}]"
        values = Table({"values": row}, place).list_of("values", float)
        if not values or not all(0 < value < 1e15 for value in values):
            raise BadFile(f"{place}: expected nanoseconds, each more than 0")
        rows.append(tuple(values))
    return tuple(rows)


# ---------------------------------------------------------------- statistics


def _draws(cases: Sequence[Case], seed: int) -> list[NDArray[np.float64]]:
    """
    Bootstrap replicates, float64 (_REPLICATES,), of the logarithm of each case's value.

    Processes are drawn anew, then rounds within each drawn one; all *cases* see the same draws,
    so that differences of their replicates are paired.
    """
    rng = np.random.default_rng(seed)
    processes = len(cases[0].blocks_ns)
    rounds = [len(blocks) for blocks in cases[0].blocks_ns]
    totals = [np.zeros(_REPLICATES) for _ in cases]
    for _ in range(processes):
        drawn = rng.integers(0, processes, _REPLICATES)
        for process in range(processes):
            mine = np.flatnonzero(drawn == process)
            picks = rng.integers(0, rounds[process], (len(mine), rounds[process]))
            for total, case in zip(totals, cases, strict=True):
                blocks = np.asarray(case.blocks_ns[process])
                total[mine] += np.log(np.median(blocks[picks], axis=1)) / processes
    return totals


def _interval(draws: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.percentile(draws[0], [2.5, 97.5])


# ---------------------------------------------------------------- measuring


def kept_sets(exits: Sequence[str]) -> list[Kept]:
    """
    The sets of kept exits that a profile measures.

    Up to four exits: every subset, those without the final exit being smaller static or
    truncated networks. More exits: all of them, and each single one.
    """
    if len(exits) > ALL_SUBSETS_UP_TO:
        return [tuple(exits), *((name,) for name in exits)]
    sizes = range(len(exits), 0, -1)
    return [kept for size in sizes for kept in itertools.combinations(exits, size)]


def check_device(name: str) -> Device:
    """The device *name*, if this machine is it; "host" fits any. DeviceError otherwise."""
    device = find_device(name)
    here = this_device()
    if device.name not in (here, "host"):
        raise DeviceError(
            f"device {device.name!r}: this machine is {here!r}, and measuring on another machine "
            "is not in this version",
            hint=f"run the same command on the {device.title}, and copy its profile here",
        )
    return device


def measure(
    bundle: Bundle,
    device: str = "host",
    *,
    threads: int = 1,
    processes: int = 3,
    rounds: int = 40,
    block_ms: float = 10.0,
    time_cap_s: float = 20.0,
    seed: int = 0,
    sets: Sequence[Kept] | None = None,
    on_step: Step | None = None,
) -> Profile:
    """
    Measure *bundle* on this machine, which must be the *device*.

    *sets* are the sets of kept exits (default: kept_sets of its exits, which tune needs).
    *rounds* blocks of *block_ms* for each case in each of *processes*; all together stop soon
    after *time_cap_s*, but not before three rounds each. *on_step* is called between rounds with
    the share that is done (0..1). DeviceError if the machine is another or a process fails.
    """
    name = check_device(device).name
    if processes < 1 or rounds < 1 or threads < 1 or not block_ms > 0 or not time_cap_s > 0:
        raise UsageError("processes, rounds, threads, block_ms, time_cap_s: expected above 0")
    wanted = kept_sets(bundle.exits) if sets is None else sets
    cases = [(kept, exit) for kept in wanted for exit in kept]
    plan = {
        "bundle": str(bundle.path.resolve()),
        "cases": [{"kept": kept, "exit": exit} for kept, exit in cases],
        "threads": threads,
        "rounds": rounds,
        "block_ms": block_ms,
        "time_cap_s": time_cap_s / processes,
    }
    before = environment()
    warmups: list[Sequence[Sequence[int]]] = []
    calls: list[Sequence[int]] = []
    blocks: list[list[Sequence[float]]] = []
    for process in range(processes):
        made: list[Sequence[float]] = []
        for line in _child({**plan, "seed": seed + process}):
            if "ready" in line:
                warmups.append(line["ready"]["warmup_ns"])
                calls.append(line["ready"]["calls"])
            else:
                made.append(line["round"])
            if on_step is not None:
                on_step((process + min(1.0, len(made) / rounds)) / processes)
        blocks.append(made)
    return Profile(
        device=name,
        bundle_digest=bundle.digest,
        bundle_name=bundle.name,
        exits=bundle.exits,
        runtime=runtime_name(),
        threads=threads,
        seed=seed,
        cases=tuple(
            Case(
                kept=kept,
                exit=exit,
                warmup_ns=tuple(tuple(w[k]) for w in warmups),
                calls=tuple(c[k] for c in calls),
                blocks_ns=tuple(tuple(row[k] for row in made) for made in blocks),
            )
            for k, (kept, exit) in enumerate(cases)
        ),
        before=before,
        after=environment(),
    )


def _child(plan: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of one fresh timing process; its refusals are raised here."""
    # -P: the current folder's modules must not be imported. A checkout that is not installed is
    # found through PYTHONPATH.
    paths = os.pathsep.join(filter(None, [str(_PACKAGE_HOME), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgeexit.timing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        rounds = 0
        try:
            with child.stdin as pipe:
                pipe.write(json.dumps(plan).encode())
            with child.stdout as lines:
                for text in lines:
                    line = json.loads(text)
                    if "failed" in line:
                        kind, message, hint = line["failed"]
                        raise getattr(errors, kind, DeviceError)(message, hint=hint)
                    rounds += "round" in line
                    yield line
            code = child.wait()
        except (BrokenPipeError, ValueError):
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if code != 0 or rounds == 0:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise DeviceError(f"the timing process ended with code {code}: {''.join(last)[:200]}")
