"""`edgeexit setup`: put edgeexit on boards that have only Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgeexit.cli.fleet import Live, fleet_options, meant, work_on


@click.command("setup", short_help="put edgeexit on a board that has only Python")
@click.argument("names", metavar="HOST...", nargs=-1)
@click.option(
    "--label", "labels", metavar="LABEL", multiple=True, help="all boards with it; again for more"
)
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
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
@fleet_options
def command(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    camera: bool,
    wheels: Path | None,
    refresh: bool,
    again: bool,
    as_json: bool,
    **fleet: Any,
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
    hosts = meant(names, labels)
    from edgeexit.remote.setup import Stock, Wish, set_up

    live = Live(len(hosts))
    stock = Stock(Wish(camera=camera, again=again, refresh=refresh, wheels=wheels))
    work_on(
        hosts,
        lambda host: set_up(host, stock, lambda host, step: live.step(host.name, step)),
        _told,
        live,
        head={},
        as_json=as_json,
        **fleet,
    )


def _told(facts: Mapping[str, Any]) -> str:
    said = [
        f"edgeexit {facts['edgeexit']} with {facts['runtime']}, numpy {facts['numpy']}",
        f"Python {facts['python']}",
        f"self-test {facts['selftest']}",
    ]
    if "doctor" in facts:
        counts = (
            f"{count} {what.removesuffix('s') if count == 1 else what}"
            for what, count in facts["doctor"].items()
        )
        said.append(f"its doctor: {', '.join(counts)}")
    return "; ".join(said)
