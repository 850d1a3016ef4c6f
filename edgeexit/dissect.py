"""
What each segment costs besides its answer: loading, memory, hand-over, the input stage.

Callers see dissect and Dissection. It runs in the timing process before anything else has opened
a segment, because opening, first calls and memory can be seen only once in a process.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from edgeexit.errors import BadFile
from edgeexit.files import Table

_T = TypeVar("_T", int, float)
_MOST_NS = 1e15
_MOST_BYTES = 1 << 50


@dataclass(frozen=True, kw_only=True)
class SegmentCost:
    """
    One segment of the chain of all exits.

    load_ns: reading, checking and opening its file. first_ns: the first call behind that, boundary
    bytes included. memory_bytes: how much private resident memory (pages that no other process
    shares) the process grew by over both; None where the system does not say. handover_ns: copying
    its boundary bytes in and reading its exit's confidence, which is what a cut adds to a call.
    """

    exit: str
    load_ns: int
    first_ns: int
    memory_bytes: int | None
    handover_ns: float


@dataclass(frozen=True, kw_only=True)
class Dissection:
    """
    What one process saw: the input stage in ns a call, one call of the whole chain after an idle
    fifth of a second, and the segments of all exits, earliest first.
    """

    preprocess_ns: float
    after_idle_ns: int
    segments: tuple[SegmentCost, ...]

    def to_document(self) -> dict[str, Any]:
        """The dissection as a JSON object."""
        document = asdict(self)
        document["segments"] = [asdict(segment) for segment in self.segments]
        return document

    @classmethod
    def from_document(cls, table: Table) -> "Dissection":
        """Read what to_document wrote."""
        table.only(*(field.name for field in fields(cls)))
        segments = tuple(map(_segment, table.tables("segments")))
        names = [segment.exit for segment in segments]
        if len(set(names)) < len(names):
            raise BadFile(f"{table.where}: segments: an exit stands twice")
        return cls(
            preprocess_ns=_nanoseconds(table, "preprocess_ns", float),
            after_idle_ns=_nanoseconds(table, "after_idle_ns", int),
            segments=segments,
        )


def _segment(table: Table) -> SegmentCost:
    table.only(*(field.name for field in fields(SegmentCost)))
    memory = None
    if table.values.get("memory_bytes") is not None:
        memory = table.get("memory_bytes", int)
        # Memory may shrink: opening can make the allocator give pages back.
        if not -_MOST_BYTES < memory < _MOST_BYTES:
            raise BadFile(f"{table.where}: memory_bytes: found {memory}, which no process has")
    return SegmentCost(
        exit=table.get("exit", str),
        load_ns=_nanoseconds(table, "load_ns", int),
        first_ns=_nanoseconds(table, "first_ns", int),
        memory_bytes=memory,
        handover_ns=_nanoseconds(table, "handover_ns", float),
    )


def _nanoseconds(table: Table, key: str, kind: type[_T]) -> _T:
    value = table.get(key, kind)
    if not 0 < value < _MOST_NS:
        raise BadFile(f"{table.where}: {key}: expected nanoseconds, more than 0, found {value}")
    return value
