"""What the commands for boards share: whom they mean, rows as boards end, one exit code."""

import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeexit.cli import StatusLine, one_line, require_remote
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.remote.fan import Outcome, Row
    from edgeexit.remote.hosts import Host

Work = Callable[["Host"], Awaitable["Outcome"]]
Words = Callable[[Mapping[str, Any]], str]

_MOST_NAMED = 8


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


F = TypeVar("F", bound=Callable[..., Any])


def board_options(command: F) -> F:
    """--host, --label and --here, as the parameters that *meant* takes."""
    for option in (
        click.option("--here", "is_here", is_flag=True, help="this machine itself"),
        click.option("--label", "labels", multiple=True, help="all boards with it; again for more"),
        click.option(
            *("--host", "names"),
            multiple=True,
            help="a name of hosts.toml, or USER@ADDRESS[:PORT]; again for more",
        ),
    ):
        command = option(command)
    return command


def fleet_options(command: F) -> F:
    """--limit, --canary and --max-failures, as the parameters that *work_on* takes."""
    for option in (
        click.option(
            "--max-failures", metavar="N", help="begin no board after more: 3, or 10% of them"
        ),
        click.option(
            "--canary",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="the first N must succeed before the others begin",
        ),
        click.option(
            "--limit",
            type=click.IntRange(1, 256),
            default=8,
            show_default=True,
            help="boards at a time",
        ),
    ):
        command = option(command)
    return command


def meant(names: Sequence[str], labels: Sequence[str] = (), is_here: bool = False) -> "list[Host]":
    """The boards that the options name; with *is_here* this machine, called "here"."""
    from edgeexit.remote.hosts import Host, chosen

    if not is_here:
        require_remote(click.get_current_context().command_path)
        return chosen(names, labels)
    if names or labels:
        raise UsageError("--here is this machine: leave --host and --label out")
    # asyncio's own handler waits for the work's next await, and work on this machine has none.
    previous = signal.signal(signal.SIGINT, _interrupt)
    click.get_current_context().call_on_close(lambda: signal.signal(signal.SIGINT, previous))
    return [Host(name="here", address="localhost")]


def work_on(
    hosts: "Sequence[Host]",
    work: Work,
    words: Words,
    live: "Live",
    *,
    head: Mapping[str, Any],
    as_json: bool,
    limit: int,
    canary: int = 0,
    max_failures: str | None = None,
) -> None:
    """
    Do *work* on all *hosts*; a row for each as it ends, or with *as_json* one document at the end.

    *words* tells a row's facts, *head* stands in front of the document. Exits with the rows' code.
    """
    import asyncio

    from edgeexit.files import json_bytes
    from edgeexit.remote import fan

    width = max(len(host.name) for host in hosts)
    allowed = None if max_failures is None else fan.failures_allowed(max_failures, len(hosts))
    told: dict[str, tuple[str, list[str]]] = {}

    async def put_into_words(host: "Host") -> "Outcome":
        # Here, where it fails for this board alone if the board's answer is a strange one.
        outcome = await work(host)
        warnings = [one_line(str(warning)) for warning in outcome.facts.get("warnings", ())]
        told[host.name] = words(outcome.facts) if outcome.facts else "", warnings
        return outcome

    def ended(row: "Row") -> None:
        live.ended(row.host)
        text, warnings = told.get(row.host, ("", []))
        if not as_json:
            click.echo(fan.line(replace(row, facts={"": text}), width))
        for warning in warnings:
            click.echo(f"warning: {row.host}: {warning}", err=True)

    with live:
        rows = asyncio.run(
            fan.fan_out(
                hosts,
                put_into_words,
                limit=limit,
                canary=canary,
                max_failures=allowed,
                on_row=ended,
            )
        )
    if as_json:
        document = fan.to_document(rows)
        boards = document.pop("boards")
        click.echo(json_bytes({**document, **head, "boards": boards}), nl=False)
    _advise(rows)
    if code := fan.exit_code(rows):
        raise click.exceptions.Exit(code)


def _advise(rows: "Sequence[Row]") -> None:
    """What to do about the boards that failed, once for each reason; how many there were."""
    hints: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "failed" and row.hint:
            hints.setdefault(row.hint, []).append(row.host)
    for hint, names in hints.items():
        shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        click.echo(f"Hint: {shown}: {one_line(hint)}", err=True)
    counts = Counter(row.status for row in rows)
    if len(rows) > 1:
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        click.echo(f"{len(rows)} boards: {told}", err=True)


class Live:
    """One line on the terminal that tells what goes on where; silent elsewhere."""

    def __init__(self, boards: int) -> None:
        self._boards, self._done, self._line = boards, 0, StatusLine()
        self._steps: dict[str, str] = {}

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self._line.wipe()

    def step(self, host: str, text: str) -> None:
        """*host* is at *text* now."""
        self._steps[host] = text
        at_work = ", ".join(f"{name}: {step}" for name, step in self._steps.items())
        self._line.show(f"{self._done}/{self._boards} boards  {at_work}")

    def ended(self, host: str) -> None:
        """*host* is through; its row comes now."""
        self._steps.pop(host, None)
        self._done += 1
        self._line.wipe()
