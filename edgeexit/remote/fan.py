"""
The same work on many boards at once: a row for each as it ends, and one exit code for all.

A board that fails never stops the others; `canary` and `max_failures` only stop new ones from
being started.
"""

import asyncio
import time
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
        raise UsageError(f"{text!r}: expected a count such as 3, or a share such as 10%")
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
    before another begins; none begins any more once more than *max_failures* have failed.
    """
    rows: dict[str, Row] = {}

    def ended(row: Row) -> None:
        rows[row.host] = row
        if on_row is not None:
            on_row(row)

    def failures() -> int:
        return sum(row.status == "failed" for row in rows.values())

    async def share(waiting: list[Host]) -> None:
        while waiting and (max_failures is None or failures() <= max_failures):
            ended(await _row(waiting.pop(0), work))

    for group in (hosts[:canary], hosts[canary:]):
        if len(rows) == canary and failures():
            break  # a canary died
        waiting = list(group)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(limit, len(group))):
                tasks.create_task(share(waiting))
    for host in hosts:
        if host.name not in rows:
            ended(Row(host=host.name, status="skipped"))
    return [rows[host.name] for host in hosts]


async def _row(host: Host, work: Callable[[Host], Awaitable[Outcome]]) -> Row:
    began = time.monotonic()
    try:
        outcome = await work(host)
    except EdgeExitError as error:
        return Row(
            host=host.name,
            status="failed",
            error=str(error),
            hint=error.hint,
            exit_code=error.exit_code,
            seconds=time.monotonic() - began,
        )
    return Row(
        host=host.name,
        status="done" if outcome.changed else "unchanged",
        facts=dict(outcome.facts),
        seconds=time.monotonic() - began,
    )


def exit_code(rows: Sequence[Row]) -> int:
    """0 if no board failed, the common code if all failures share one, else 5."""
    codes = {row.exit_code for row in rows if row.status == "failed"}
    if any(row.status == "skipped" for row in rows):
        codes = codes or {DeviceError.exit_code}
    return codes.pop() if len(codes) == 1 else DeviceError.exit_code if codes else 0


def to_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as one JSON document."""
    return {
        "format": 1,
        "exit_code": exit_code(rows),
        "boards": [{**vars(row), "facts": dict(row.facts)} for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text: a line for each board, then what to do about the failures."""
    width = max((len(row.host) for row in rows), default=0)
    return "\n".join(line(row, width) for row in rows)


def line(row: Row, width: int = 0) -> str:
    """One row as a line of text."""
    facts = ", ".join(f"{key} {value}" for key, value in row.facts.items())
    said = row.error if row.error is not None else facts
    shown = f"{row.host.ljust(width)}  {row.status:9}  {row.seconds:6.1f} s  {said}"
    return printable(shown.rstrip())
