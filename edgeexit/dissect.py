"""
What stands around an answer: loading, memory, hand-over, the input stage, decoding a picture.

Callers see dissect and Dissection. It runs in the timing process before anything else has opened
a segment, because opening, first calls and memory can be seen only once in a process.
"""

import io
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter_ns
from typing import Any, TypeVar

from PIL import Image

from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, DeviceError
from edgeexit.files import Table
from edgeexit.preprocess import InputStage, Preprocess, fit_sample, load_image
from edgeexit.runtime import Runner, Segment, runtime_name

_T = TypeVar("_T", int, float)
_MOST_NS = 1e15
_MOST_BYTES = 1 << 50
_IDLE_S = 0.2
_BLOCKS, _BLOCK_NS = 7, 1_000_000


@dataclass(frozen=True, kw_only=True)
class SegmentCost:
    """
    One segment of the chain of all exits.

    load_ns: reading, checking and opening its file; that of the first one also sets the runtime
    up, once in a process (as does its memory). first_ns: the first call behind that, boundary
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

    jpeg_ns and png_ns: making a sample of a file's bytes, a picture of the network's own size; None
    for networks that see no pictures. No timed path includes it; each includes the input stage.
    """

    preprocess_ns: float
    after_idle_ns: int
    segments: tuple[SegmentCost, ...]
    jpeg_ns: float | None = None
    png_ns: float | None = None

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
            jpeg_ns=_nanoseconds_or_none(table, "jpeg_ns"),
            png_ns=_nanoseconds_or_none(table, "png_ns"),
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


def _nanoseconds_or_none(table: Table, key: str) -> float | None:
    is_null = key in table and table.values[key] is None
    return None if is_null else _nanoseconds(table, key, float)


# ---------------------------------------------------------------- measuring


def dissect(bundle: Bundle, samples: Sequence[Any], threads: int = 1) -> Dissection:
    """
    Open the chain of all exits of *bundle* segment by segment and watch; takes under a second.

    Call it before this process has opened any segment. *samples* fit the bundle's input stage,
    as for a Runner. DeviceError if the runtime fails.
    """
    name = runtime_name()  # loads the runtime, which is no segment's cost
    with Runner(bundle, None, threads) as runner:
        runner.input_tensor(samples[0])  # what the first segment will fetch
        try:
            segments = tuple(map(_watch, runner.segments))
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise DeviceError(f"{bundle.path}: {name} failed: {why}") from error
        time.sleep(_IDLE_S)
        start = perf_counter_ns()
        runner(samples[0])
        after_idle_ns = perf_counter_ns() - start
    spec = bundle.input
    stage = InputStage(bundle.preprocess, spec.shape, spec.dtype, spec.scale, spec.zero_point)
    return Dissection(
        preprocess_ns=_block_ns(lambda: stage(samples[0])),
        after_idle_ns=after_idle_ns,
        segments=segments,
        jpeg_ns=_decode_ns(samples[0], bundle.preprocess, "JPEG"),
        png_ns=_decode_ns(samples[0], bundle.preprocess, "PNG"),
    )


def _decode_ns(sample: Any, preprocess: Preprocess, kind: str) -> float | None:
    """Nanoseconds from the bytes of *sample* as a picture file to the sample; None for arrays."""
    if preprocess.kind != "image":
        return None
    pixels = fit_sample(sample, preprocess)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, kind)
    data = file.getvalue()
    return _block_ns(lambda: load_image(data, preprocess))


def _watch(segment: Segment) -> SegmentCost:
    before = private_bytes()
    start = perf_counter_ns()
    segment.open()
    opened = perf_counter_ns()
    segment.advance()
    ran = perf_counter_ns()
    after = private_bytes()

    def hand_over() -> None:
        segment.fetch()
        segment.read(segment.logits)

    return SegmentCost(
        exit=segment.name,
        load_ns=opened - start,
        first_ns=ran - opened,
        memory_bytes=None if before is None or after is None else after - before,
        handover_ns=_block_ns(hand_over),
    )


def _block_ns(step: Callable[[], object]) -> float:
    """Nanoseconds a call of *step*: the median over blocks of about a millisecond."""
    step()
    start = perf_counter_ns()
    step()
    calls = min(10_000, max(1, _BLOCK_NS // max(1, perf_counter_ns() - start)))
    found = []
    for _ in range(_BLOCKS):
        start = perf_counter_ns()
        for _ in range(calls):
            step()
        found.append((perf_counter_ns() - start) / calls)
    return statistics.median(found)


def private_bytes() -> int | None:
    """
    Memory that this process has written and shares with no other, None if the system hides it.

    From smaps_rollup where the kernel has it (since 4.14), else resident less shared pages. Pages
    of libraries do not count: whether they are shared depends on who else runs them just now.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        lines = []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")]
    if kilobytes:
        return sum(kilobytes) * 1024
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * resource.getpagesize()
