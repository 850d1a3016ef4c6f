"""
The notebook of a measurement under way: whatever is finished stands in it, whatever happens.

Callers see Notebook. It is a file of JSON lines beside the profile to be: a head that says what
is measured, then openings of processes, rounds, ends and windows as they come, each written out
at once. A line cut short by a crash or a full disk ends what is read back; a process without an
end counts with the rounds that it has.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeexit.blocks import Block, Process, moment, reading_document, reading_from, seed_from
from edgeexit.errors import BadFile, StorageError, UsageError, storage
from edgeexit.files import Table, parse_json, read_bytes
from edgeexit.locks import hold
from edgeexit.sitting import Sitting
from edgeexit.state import Reading

# 1: first version.
# 2: dissections time decoding a picture.
FORMAT = 2


@dataclass(kw_only=True)
class _Pages:
    """What a notebook holds of one process."""

    seed: int
    began_ns: int
    sitting: Sitting
    blocks: list[Block] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    ended_ns: int | None = None

    def process(self, cases: int) -> Process | None:
        """The process, None if it has not timed every case."""
        if len({block.case for block in self.blocks}) < cases:
            return None
        last = self.blocks[-1]
        ended_ns = self.ended_ns or last.at_ns + int(last.calls * last.mean_ns)
        return Process(
            seed=self.seed,
            began_ns=self.began_ns,
            ended_ns=ended_ns,
            warmup_ns=self.sitting.warmup_ns,
            settled=self.sitting.settled,
            dissection=self.sitting.dissection,
            blocks=tuple(self.blocks),
            readings=tuple(self.readings),
        )


class Notebook:
    """
    The notebook *path* of the measurement that *plan* describes, for *cases* cases.

    A context manager that holds a lock on it (Busy if another measurement does). With *resume*
    what stands in it is read back into `finished`, `delegate`, `before` and `energy_lines`, and
    more is appended; UsageError if there is none or it is of another plan. Without, an existing
    one is refused (UsageError): it may be all that is left of an hour of measuring.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, Any], cases: int, *, resume: bool = False
    ) -> None:
        self.path, self._plan, self._cases, self._resume = path, dict(plan), cases, resume
        self.finished: tuple[Process, ...] = ()
        self.energy_lines: tuple[Table, ...] = ()
        self.delegate: str | None = None
        self.before: Reading | None = None
        self._stack = ExitStack()
        self._handle = -1

    def __enter__(self) -> "Notebook":
        with ExitStack() as stack:
            lock = self.path.with_name(f".{self.path.name}.lock")
            stack.enter_context(hold(lock, "this measurement"))
            stack.callback(lock.unlink, missing_ok=True)
            length = self._read() if self._resume else self._refuse_existing()
            with storage(self.path):
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
                self._handle = os.open(self.path, flags, 0o666)
                stack.callback(os.close, self._handle)
                os.ftruncate(self._handle, length)
                os.lseek(self._handle, length, os.SEEK_SET)
            if not self._resume:
                self._begin()
            self._stack = stack.pop_all()
        return self

    def _begin(self) -> None:
        try:
            self._write({"notebook": FORMAT, "plan": self._plan})
        except StorageError:
            self.path.unlink(missing_ok=True)  # a torn head is good for nothing
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def opened(self, seed: int, began_ns: int, sitting: Sitting) -> None:
        """A process has started."""
        self._write({"seed": seed, "began_ns": began_ns, "sitting": sitting.to_document()})

    def round(self, blocks: list[Block], reading: Reading | None) -> None:
        """A round of blocks is finished."""
        state = None if reading is None else reading_document(reading)
        self._write({"round": [block.to_document() for block in blocks], "reading": state})

    def ended(self, ended_ns: int) -> None:
        """The process is finished."""
        self._write({"ended_ns": ended_ns})
        with storage(self.path):
            os.fsync(self._handle)

    def started(self, before: Reading) -> None:
        """The machine's state before everything."""
        self._write({"before": reading_document(before)})

    def energy(self, document: Mapping[str, Any]) -> None:
        """A piece of the energy part is finished."""
        self._write({"energy": dict(document)})

    def remove(self) -> None:
        """Nothing in it is needed any longer."""
        with storage(self.path):
            self.path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        # One write for each line: what a killed process has written stays in the system's hands.
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with storage(self.path):
            while data:
                data = data[os.write(self._handle, data) :]

    def _refuse_existing(self) -> int:
        if self.path.exists() and not self.path.is_file():
            # Opening a pipe that nobody reads would wait for ever.
            raise UsageError(
                f"{self.path}: is no plain file, and the notebook of this measurement goes there",
                hint="remove it, or name another file with -o",
            )
        if self.path.exists() and self.path.stat().st_size:
            raise UsageError(
                f"{self.path}: a measurement that was not finished",
                hint="--resume goes on with it; delete the file to begin anew",
            )
        return 0

    def _read(self) -> int:
        """Read back what is there; the length of what could be read."""
        if not self.path.exists():
            raise UsageError(
                f"{self.path}: no unfinished measurement to go on with",
                hint="measure without --resume",
            )
        length = 0
        pages: list[_Pages] = []
        lines: list[Table] = []
        energy: list[Table] = []
        for number, text in enumerate(read_bytes(self.path).splitlines(keepends=True)):
            if not text.endswith(b"\n"):
                break
            lines.append(parse_json(text, f"{self.path}: line {number + 1}"))
            length += len(text)
        if not lines:
            raise BadFile(f"{self.path}: empty, expected a notebook", hint="delete it")
        self._check_head(lines[0])
        for table in lines[1:]:
            if "seed" in table:
                table.only("seed", "began_ns", "sitting")
                sitting = Sitting.from_document(table.table("sitting"), self._cases)
                self.delegate = sitting.delegate
                began_ns = moment(table, "began_ns")
                pages.append(_Pages(seed=seed_from(table), began_ns=began_ns, sitting=sitting))
            elif "before" in table:
                self.before = reading_from(table.table("before"))
            elif "energy" in table:
                energy.append(table.table("energy"))
            else:
                self._turn(table, pages)
        found = [page.process(self._cases) for page in pages]
        self.finished = tuple(process for process in found if process is not None)
        self.energy_lines = tuple(energy)
        return length

    def _turn(self, table: Table, pages: list[_Pages]) -> None:
        if not pages:
            raise BadFile(f"{table.where}: expected the opening of a process first")
        if "ended_ns" in table:
            pages[-1].ended_ns = moment(table, "ended_ns", pages[-1].began_ns)
            return
        table.only("round", "reading")
        for k, entry in enumerate(table.list_of("round", list)):
            place = f"{table.where}: round[{k}]"
            pages[-1].blocks.append(Block.from_document(entry, place, self._cases))
        if table.values.get("reading") is not None:
            pages[-1].readings.append(reading_from(table.table("reading")))

    def _check_head(self, head: Table) -> None:
        if head.values.get("notebook") != FORMAT:
            raise BadFile(
                f"{head.where}: not a notebook of format {FORMAT}",
                hint="delete the file to begin anew",
            )
        plan = head.table("plan").values
        # Through JSON: tuples are lists there.
        wanted = json.loads(json.dumps(self._plan))
        other = sorted(key for key in {*plan, *wanted} if plan.get(key) != wanted.get(key))
        if other:
            raise UsageError(
                f"{self.path}: of a measurement with other {', '.join(other)}",
                hint="give the same options again, or delete the file to begin anew",
            )
