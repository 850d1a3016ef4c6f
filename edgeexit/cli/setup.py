"""`edgeexit setup`: put edgeexit on boards that have only Python."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import one_line

if TYPE_CHECKING:
    from edgeexit.remote.fan import Row
    from edgeexit.remote.hosts import Host


@click.command("setup", short_help="put edgeexit on a board that has only Python")
@click.argument("names", metavar="HOST...", nargs=-1)
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="all boards that carry it")
@click.option(
    "--camera",
    is_flag=True,
    help="see the system's packages, for picamera2 (which comes only from apt)",
)
@click.option(
    "--wheels",
    type=click.Path(path_type=Path),
    help="a folder of wheels to take instead of the registry",
)
@click.option("--refresh", is_flag=True, help="ask the registry for newer versions")
@click.option("--again", is_flag=True, help="make the environment anew although it stands")
@click.option("--limit", type=click.IntRange(1, 64), default=8, show_default=True, help="at a time")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    camera: bool,
    wheels: Path | None,
    refresh: bool,
    again: bool,
    limit: int,
    as_json: bool,
) -> None:
    """
    Make HOST (a name in hosts.toml, or user@address) run this edgeexit.

    \b
    edgeexit setup rpi4
    edgeexit setup --label lab
    edgeexit setup pi@192.168.0.17 --camera

    Needs Python 3.11 or newer there and nothing else: the wheels are fetched by this machine and
    sent over ssh. They go into an environment of their own below ~/.local/share/edgeexit; it is
    used only once its self-test has passed on the board. A second call changes nothing.
    """
    import asyncio

    from edgeexit.files import json_bytes
    from edgeexit.remote import fan
    from edgeexit.remote.hosts import chosen
    from edgeexit.remote.setup import Stock, Wish, set_up

    hosts = chosen(names, labels)
    status = Status()
    width = max(len(host.name) for host in hosts)

    def ended(row: "Row") -> None:
        status.clear()
        if not as_json:
            show(row, width)

    async def work() -> "list[Row]":
        stock = Stock(Wish(camera=camera, again=again, refresh=refresh, wheels=wheels))
        return await fan.fan_out(
            hosts, lambda host: set_up(host, stock, status.say), limit=limit, on_row=ended
        )

    rows = asyncio.run(work())
    if as_json:
        click.echo(json_bytes(fan.to_document(rows)), nl=False)
    code = fan.exit_code(rows)
    if code:
        raise click.exceptions.Exit(code)


def show(row: "Row", width: int) -> None:
    """Print the line of one board as soon as it ends; what is to be noted goes to stderr."""
    from edgeexit.remote import fan

    facts = dict(row.facts)
    notes = facts.pop("notes", [])
    click.echo(fan.line(replace(row, facts=facts), width))
    for note in notes:
        click.echo(f"Note: {row.host}: {one_line(note)}", err=True)
    if row.hint:
        click.echo(f"Hint: {row.host}: {one_line(row.hint)}", err=True)


class Status:
    """What is being done just now, on one line of a terminal that is written over; else silent."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr is not None and sys.stderr.isatty()

    def say(self, host: "Host", step: str) -> None:
        """Show *step* of *host* in the place of what stood there."""
        if self._is_shown:
            click.echo(f"\r\x1b[K{one_line(f'{host.name}: {step}')[:79]}", err=True, nl=False)

    def clear(self) -> None:
        """Leave the line empty."""
        if self._is_shown:
            click.echo("\r\x1b[K", err=True, nl=False)
