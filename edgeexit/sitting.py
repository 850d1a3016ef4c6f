"""
A timing process seen from its parent: what it found at its start, and a handle to order from.

Callers see Sitting and Child. The process is `python -m edgeexit.timing`; it waits, without
working, until it is told what to time next, and ends when its parent does.
"""

import json
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from edgeexit import errors
from edgeexit.blocks import Block, Calls, calls_from, settled_from
from edgeexit.children import command, environment
from edgeexit.dissect import Dissection
from edgeexit.energy import Window
from edgeexit.errors import DeviceError
from edgeexit.files import Table

_END_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """
    What a timing process found before its first round.

    warmup_ns holds for each case its first calls one by one, settled which of them was the first
    warm one; delegate is who computes the graph (interpreter.delegate).
    """

    warmup_ns: tuple[Calls, ...]
    settled: tuple[int, ...]
    dissection: Dissection | None = None
    delegate: str | None = None

    def to_document(self) -> dict[str, Any]:
        """The sitting as a JSON object."""
        dissection = self.dissection
        return {
            "warmup_ns": [list(calls) for calls in self.warmup_ns],
            "settled": list(self.settled),
            "dissection": None if dissection is None else dissection.to_document(),
            "delegate": self.delegate,
        }

    @classmethod
    def from_document(cls, table: Table, cases: int) -> "Sitting":
        """Read what to_document wrote; *cases* is how many cases there are."""
        table.only("warmup_ns", "settled", "dissection", "delegate")
        has_parts = table.values.get("dissection") is not None
        has_delegate = table.values.get("delegate") is not None
        warmup_ns = calls_from(table, "warmup_ns", cases)
        return cls(
            warmup_ns=warmup_ns,
            settled=settled_from(table, warmup_ns),
            dissection=Dissection.from_document(table.table("dissection")) if has_parts else None,
            delegate=table.get("delegate", str) if has_delegate else None,
        )


class Child:
    """
    A timing process; a context manager that starts it with a *plan* and ends it.

    The plan holds folder and digest of the bundle ("bundle"), cases (documents), threads, cores,
    block_ms, rate_hz and dissect, as edgeexit.timing reads them. What the process refuses is raised
    here as it was there; DeviceError if it dies.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._cases = len(plan["cases"])
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            command("-m", "edgeexit.timing"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment(),
        )
        try:
            answer = self._ask(dict(plan), "ready")
            self.sitting = Sitting.from_document(Table(answer, "timing process"), self._cases)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._child.pid

    def round(self, order: Sequence[int]) -> list[Block]:
        """One block of each case, in this *order*."""
        found = self._ask({"round": list(order)}, "round")
        return [Block.from_document(entry, "timing process", self._cases) for entry in found]

    def window(self, case: int, seconds: float) -> Window:
        """Calls of *case* (-1: none) in a row for at least *seconds*."""
        return Window(**self._ask({"window": [case, seconds]}, "window"))

    def heat(self, seconds: float) -> None:
        """Calls of all cases in turn for *seconds*."""
        self._ask({"heat": seconds}, "heated")

    def _ask(self, order: Mapping[str, Any], wanted: str) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
            self._child.stdin.flush()
            line = json.loads(self._child.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise self._died() from error
        if "failed" in line:
            kind, message, hint = line["failed"]
            raise getattr(errors, kind, DeviceError)(message, hint=hint)
        return line[wanted]

    def _died(self) -> DeviceError:
        try:
            code = self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            return DeviceError("the timing process said something that is no answer")
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace").splitlines()
        # The runtime greets on stderr.
        last = [line for line in said if line.strip() and not line.startswith("INFO:")][-1:]
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return DeviceError(
            ": ".join([f"the timing process ended with {how}", *(line[:200] for line in last)]),
            hint="the system kills a process when memory is short; edgeexit doctor looks"
            if code == -signal.SIGKILL
            else None,
        )

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
        self._complaints.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
