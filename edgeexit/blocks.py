"""
The values that a profile is made of: cases, blocks of calls, processes, mode and verdict.

Callers see the classes and their documents. Each of them is one JSON object (a block one JSON
list) both in a profile and in the journal of a measurement under way; reading refuses, with the
place, whatever cannot have been measured.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.dissect import Dissection
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.names import choose
from edgeexit.state import Reading

BURST, SUSTAINED, PACED = "burst", "sustained", "paced"
MODES = {
    BURST: "from a cold start, back to back",
    SUSTAINED: "back to back after heating up to a steady state",
    PACED: "one input at a time, as a camera gives them",
}
CLEAN, DISTURBED, NOT_CONVERGED, EMULATED = "clean", "disturbed", "not converged", "emulated"
STATUSES = {
    CLEAN: "nothing was seen that would make the figures doubtful",
    DISTURBED: "the machine was not itself meanwhile",
    NOT_CONVERGED: "the intervals are wider than was asked for",
    EMULATED: "times mean nothing for the device",
}
_MOST_NS = _MOST = 1e15
_MOST_MHZ = 1e7
_CLOCK_ENDS_NS = 1 << 62

Kept = tuple[str, ...]
Values = NDArray[np.float64]
Calls = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    One timed path: leaving at *exit* of the bundle cut down to the *kept* exits.

    *also* are further (kept, exit) whose files up to that exit are byte for byte the same.
    """

    kept: Kept
    exit: str
    also: tuple[tuple[Kept, str], ...] = ()

    @property
    def stands_for(self) -> tuple[tuple[Kept, str], ...]:
        """All (kept, exit) that this path was timed for."""
        return ((self.kept, self.exit), *self.also)

    def to_document(self) -> dict[str, Any]:
        """The case as a JSON object."""
        also = [[list(kept), exit] for kept, exit in self.also]
        return {"kept": list(self.kept), "exit": self.exit, "also": also}

    @classmethod
    def from_document(cls, table: Table) -> "Case":
        """Read what to_document wrote."""
        table.only("kept", "exit", "also")
        also = []
        for index, entry in enumerate(table.list_of("also", list)):
            pair = dict(zip(("kept", "exit"), entry, strict=False))
            inner = Table(pair, f"{table.where}.also[{index}]")
            also.append((tuple(inner.list_of("kept", str)), inner.get("exit", str)))
        case = cls(
            kept=tuple(table.list_of("kept", str)), exit=table.get("exit", str), also=tuple(also)
        )
        for kept, exit in case.stands_for:
            if exit not in kept:
                raise BadFile(f"{table.where}: exit: {exit!r} is not among the kept exits")
        return case


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """
    Calls of one case in a row.

    *case* is its place in Profile.cases; at_ns the monotonic clock at the beginning; mean_ns and
    cpu_ns wall-clock and the process's CPU time for each of *calls* calls; yardstick_ns one turn
    of the yardstick loop just before; calls_ns some single calls, evenly spread over the block.
    """

    case: int
    at_ns: int
    calls: int
    mean_ns: float
    cpu_ns: float
    yardstick_ns: float
    calls_ns: Calls = ()

    def to_document(self) -> list[Any]:
        """The block as a JSON list of its fields, in their order."""
        return [
            *(self.case, self.at_ns, self.calls),
            *(round(value, 1) for value in (self.mean_ns, self.cpu_ns, self.yardstick_ns)),
            list(self.calls_ns),
        ]

    @classmethod
    def from_document(cls, entry: Sequence[Any], where: str, cases: int) -> "Block":
        """Read what to_document wrote; *cases* is how many cases there are."""
        names = [field.name for field in fields(cls)]
        if len(entry) != len(names):
            raise BadFile(f"{where}: expected {len(names)} values, found {len(entry)}")
        table = Table(dict(zip(names, entry, strict=True)), where)
        block = cls(
            case=table.get("case", int),
            at_ns=moment(table, "at_ns"),
            calls=table.get("calls", int),
            mean_ns=table.get("mean_ns", float),
            cpu_ns=table.get("cpu_ns", float),
            yardstick_ns=table.get("yardstick_ns", float),
            calls_ns=tuple(table.list_of("calls_ns", int)),
        )
        if not 0 <= block.case < cases:
            raise BadFile(f"{where}: case: expected 0 .. {cases - 1}, found {block.case}")
        if not 0 < block.calls < 1 << 40:
            raise BadFile(f"{where}: calls: expected at least 1, found {block.calls}")
        # cpu_ns may be 0 on a system whose CPU clock is coarse.
        times = [block.mean_ns, block.yardstick_ns, *block.calls_ns]
        if not all(0 < t < _MOST_NS for t in times) or not 0 <= block.cpu_ns < _MOST_NS:
            raise BadFile(f"{where}: expected nanoseconds, each more than 0")
        return block


@dataclass(frozen=True, kw_only=True)
class Process:
    """
    What one fresh process measured.

    warmup_ns holds for each case its first calls one by one, settled which of them was the first
    warm one; blocks are in the order of time; readings are the machine's state between rounds.
    """

    seed: int
    began_ns: int
    ended_ns: int
    warmup_ns: tuple[Calls, ...]
    settled: tuple[int, ...]
    blocks: tuple[Block, ...]
    dissection: Dissection | None = None
    readings: tuple[Reading, ...] = ()

    def values(self, case: int) -> Values:
        """Nanoseconds a call of each block of *case*, in the order of time."""
        return np.array([block.mean_ns for block in self.blocks if block.case == case])

    def ratios(self, case: int) -> Values:
        """The same, each in turns of the yardstick loop beside it."""
        pairs = ((b.mean_ns, b.yardstick_ns) for b in self.blocks if b.case == case)
        return np.array([mean / yardstick for mean, yardstick in pairs])

    def to_document(self) -> dict[str, Any]:
        """The process as a JSON object."""
        dissection = self.dissection
        return {
            "seed": self.seed,
            "began_ns": self.began_ns,
            "ended_ns": self.ended_ns,
            "warmup_ns": [list(calls) for calls in self.warmup_ns],
            "settled": list(self.settled),
            "dissection": None if dissection is None else dissection.to_document(),
            "readings": [reading_document(reading) for reading in self.readings],
            "blocks": [block.to_document() for block in self.blocks],
        }

    @classmethod
    def from_document(cls, table: Table, cases: int) -> "Process":
        """Read what to_document wrote; *cases* is how many cases there are."""
        table.only(
            *("seed", "began_ns", "ended_ns", "warmup_ns", "settled"),
            *("dissection", "readings", "blocks"),
        )
        place = table.where
        warmup_ns = calls_from(table, "warmup_ns", cases)
        began_ns = moment(table, "began_ns")
        process = cls(
            seed=seed_from(table),
            began_ns=began_ns,
            ended_ns=moment(table, "ended_ns", began_ns),
            warmup_ns=warmup_ns,
            settled=settled_from(table, warmup_ns),
            blocks=tuple(
                Block.from_document(entry, f"{place}.blocks[{k}]", cases)
                for k, entry in enumerate(table.list_of("blocks", list))
            ),
            dissection=None
            if table.values.get("dissection") is None
            else Dissection.from_document(table.table("dissection")),
            readings=tuple(reading_from(entry) for entry in table.tables("readings")),
        )
        absent = set(range(cases)) - {block.case for block in process.blocks}
        if absent:
            raise BadFile(f"{place}: blocks: none of case {min(absent)}")
        return process


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How inputs come: a name in MODES, and for "paced" how many a second."""

    name: str = BURST
    rate_hz: float | None = None

    def __post_init__(self) -> None:
        choose(self.name, MODES, "mode")
        if (self.rate_hz is not None) != (self.name == PACED):
            raise UsageError(f"mode {self.name!r}: a rate belongs to {PACED!r}, and only to it")
        if self.rate_hz is not None and not 0.01 <= self.rate_hz <= 1000:
            raise UsageError(f"rate: expected 0.01 .. 1000 inputs a second, found {self.rate_hz}")

    def __str__(self) -> str:
        return self.name if self.rate_hz is None else f"{self.name} at {self.rate_hz:g} Hz"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a profile is not clean: *kind* is one word for machines, *text* a clause to read."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a profile can be trusted: one of STATUSES, and why it is not clean."""

    status: str
    reasons: tuple[Reason, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        return {"status": self.status, "reasons": [asdict(reason) for reason in self.reasons]}

    @classmethod
    def from_document(cls, table: Table) -> "Verdict":
        """Read what to_document wrote."""
        table.only("status", "reasons")
        status = table.get("status", str)
        if status not in STATUSES:
            raise BadFile(f"{table.where}: status: expected one of {list(STATUSES)}")
        reasons = []
        for entry in table.tables("reasons"):
            entry.only("kind", "text")
            reasons.append(Reason(kind=entry.get("kind", str), text=entry.get("text", str)))
        return cls(status=status, reasons=tuple(reasons))

    def __str__(self) -> str:
        why = "; ".join(reason.text for reason in self.reasons)
        return f"{self.status.upper()}: {why}" if why else self.status


# ---------------------------------------------------------------- readings


def reading_document(reading: Reading) -> dict[str, Any]:
    """A reading as a JSON object; what the machine does not say is left out."""
    return {name: value for name, value in asdict(reading).items() if value not in (None, ())}


def reading_from(table: Table) -> Reading:
    """Read what reading_document wrote."""
    table.only(*(field.name for field in fields(Reading)))
    numbers = {
        name: table.get(name, float)
        for name in table.values
        if name not in ("at_ns", "throttled", "clocks_mhz", "governors")
    }
    clocks_mhz = table.list_of("clocks_mhz", float) if "clocks_mhz" in table else []
    throttled = table.get("throttled", int) if "throttled" in table else None
    beyond = [name for name, value in numbers.items() if not abs(value) < _MOST]
    if not all(0 < mhz < _MOST_MHZ for mhz in clocks_mhz):
        beyond.append("clocks_mhz")
    if throttled is not None and not 0 <= throttled < 1 << 32:
        beyond.append("throttled")
    if beyond:
        raise BadFile(f"{table.where}: {beyond[0]}: found a value that no machine has")
    return Reading(
        at_ns=moment(table, "at_ns"),
        clocks_mhz=tuple(clocks_mhz),
        governors=tuple(table.list_of("governors", str)) if "governors" in table else (),
        throttled=throttled,
        **numbers,
    )


def moment(table: Table, key: str, least: int = 0) -> int:
    """The ns of the monotonic clock at *key*, not before *least*."""
    value = table.get(key, int)
    if not least <= value < _CLOCK_ENDS_NS:
        raise BadFile(f"{table.where}: {key}: expected nanoseconds from {least}, found {value}")
    return value


def seed_from(table: Table) -> int:
    """The seed of a process."""
    seed = table.get("seed", int)
    if not 0 <= seed < 1 << 32:
        raise BadFile(f"{table.where}: seed: expected 0 .. 2**32 - 1")
    return seed


def settled_from(table: Table, warmup_ns: Sequence[Calls]) -> tuple[int, ...]:
    """The list "settled": for each case which of its first calls *warmup_ns* was warm."""
    settled = tuple(table.list_of("settled", int, length=len(warmup_ns)))
    if not all(0 <= k <= len(calls) for k, calls in zip(settled, warmup_ns, strict=True)):
        raise BadFile(f"{table.where}: settled: expected places in warmup_ns")
    return settled


def calls_from(table: Table, key: str, cases: int) -> tuple[Calls, ...]:
    """The list at *key*: nanoseconds of single calls, a list for each of *cases* cases."""
    rows = []
    for index, row in enumerate(table.list_of(key, list, length=cases)):
        place = f"{table.where}.{key}[{index}]"
        values = Table({"values": row}, place).list_of("values", int)
        if not values or not all(0 < value < _MOST_NS for value in values):
            raise BadFile(f"{place}: expected nanoseconds, each more than 0")
        rows.append(tuple(values))
    return tuple(rows)
