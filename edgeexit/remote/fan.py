"""
The same work on many boards at once: a row for each as it ends, and one exit code for all.

A board that fails never stops the others; `canary` and `max_failures` only stop new ones from
being started. Importable on a board: no ssh is needed here.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import DeviceError, EdgeExitError, UsageError, printable
from edgeexit.remote.hosts import Host

LIMIT = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What work on a board came to: *facts* for the row; whether it *changed* anything there."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One board's line: *status* is done, unchanged, failed or skipped (never begun).

    *error*, *hint* and *exit_code* (0 unless failed) tell a failure; *seconds* is wall time.
    """

    host: str
    status: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    hint: str | None = None
    exit_code: int = 0
    seconds: float = 0.0


def failures_allowed(text: str, boards: int) -> int:
    """How many of *boards* may fail by "3" or "10%" (rounded down)."""
    number = text.removesuffix("%")
    is_share = number != text
    if not number.isascii() or not number.isdigit() or (is_share and int(number) > 100):
        raise UsageError(f"{text[:40]!r}: expected a count such as 3, or a share such as 10%")
    return boards * int(number) // 100 if is_share else int(number)


async def fan_out(
    hosts: Sequence[Host],
    work: Callable[[Host], Awaitable[Outcome]],
    *,
    limit: int = LIMIT,
    canary: int = 0,
    max_failures: int | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """
    The rows of *work* on every board, in the order of *hosts*; *on_row* gets each as it ends.

    At most *limit* boards are worked on at a time. The first *canary* boards must all succeed
    before another begins; none begins any more once more than *max_failures* have failed. When
    cancelled, the work under way is cancelled and waited for.
    """
    rows: dict[str, Row] = {}
    failures = 0

    def ended(row: Row) -> None:
        nonlocal failures
        rows[row.host] = row
        failures += row.status == "failed"
        if on_row is not None:
            on_row(row)

    async def share(waiting: deque[Host], allowed: int | None) -> None:
        while waiting and (allowed is None or failures <= allowed):
            ended(await _row(waiting.popleft(), work))

    first = canary if canary < len(hosts) else 0
    for group, allowed in ((hosts[:first], 0), (hosts[first:], max_failures)):
        if first and failures:
            break  # a canary fell
        waiting = deque(group)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(limit, len(group))):
                    tasks.create_task(share(waiting, allowed))
        except ExceptionGroup as found:
            # Of *on_row*, such as a closed pipe: it means what it means elsewhere.
            raise found.exceptions[0] from None
    for host in hosts:
        if host.name not in rows:
            ended(Row(host=host.name, status="skipped"))
    return [rows[host.name] for host in hosts]


async def _row(host: Host, work: Callable[[Host], Awaitable[Outcome]]) -> Row:
    began = time.monotonic()
    try:
        outcome = await work(host)
    except EdgeExitError as error:
        return _failed(host, str(error), error.hint, error.exit_code, began)
    except Exception as error:
        # One board's strange answer must not take the others' rows along.
        text = f"{host.name}: a bug in edgeexit: {type(error).__name__}: {error}"
        return _failed(host, text, "please report it with this line", 1, began)
    return Row(
        host=host.name,
        status="done" if outcome.changed else "unchanged",
        facts=dict(outcome.facts),
        seconds=time.monotonic() - began,
    )


def _failed(host: Host, error: str, hint: str | None, code: int, began: float) -> Row:
    return Row(
        host=host.name,
        status="failed",
        error=error,
        hint=hint,
        exit_code=code,
        seconds=time.monotonic() - began,
    )


def exit_code(rows: Sequence[Row]) -> int:
    """0 if no board failed, the common code if all failures share one, else 5."""
    codes = {row.exit_code for row in rows if row.status == "failed"}
    return codes.pop() if len(codes) == 1 else DeviceError.exit_code if codes else 0


def to_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as one JSON document."""
    boards = [{**vars(row), "seconds": round(row.seconds, 3)} for row in rows]
    return {"format": 1, "exit_code": exit_code(rows), "boards": boards}


def line(row: Row, width: int = 0) -> str:
    """One row as a line of text, the name padded to *width*."""
    facts = ", ".join(f"{key} {value}".strip() for key, value in row.facts.items())
    said = row.error.removeprefix(f"{row.host}: ") if row.error is not None else facts
    shown = f"{row.host.ljust(width)}  {row.status:9}  {row.seconds:6.1f} s  {said}"
    return printable(" ".join(shown.splitlines()).rstrip())
