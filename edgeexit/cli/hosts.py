"""`edgeexit hosts`: the boards that one may name, their pinned keys, and whether they answer."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import require_remote
from edgeexit.cli.fleet import Live, fleet_options, work_on
from edgeexit.errors import DeviceError, EdgeExitError, UsageError, printable

if TYPE_CHECKING:
    from edgeexit.remote.hosts import Host
    from edgeexit.remote.login import Offered


_ON_THE_BOARD = "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"


@click.group("hosts", short_help="name the boards that are reached over ssh, and check them")
def command() -> None:
    """
    Name the boards that are reached over ssh, pin their host keys, check them.

    \b
    edgeexit hosts add rpi4 pi@raspberrypi.local --device rpi4 --label lab
    edgeexit hosts check                   # do they answer, and with what?
    edgeexit hosts list
    edgeexit hosts remove rpi4

    They are kept in ./hosts.toml, or in the file that the environment variable EDGEEXIT_HOSTS
    names. Users, ports, keys and jump hosts of ~/.ssh/config are respected.
    """
    require_remote("hosts")


@command.command("add", short_help="write a board down, its key confirmed")
@click.argument("name")
@click.argument("address", required=False, metavar="[USER@]ADDRESS[:PORT]")
@click.option("--device", help="the kind of board: a name of `edgeexit devices`")
@click.option(
    "--label", "labels", multiple=True, help="a word for groups of boards; again for more"
)
@click.option("--fingerprint", help="the host key's SHA256:..., instead of asking")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def add(
    name: str,
    address: str | None,
    device: str | None,
    labels: tuple[str, ...],
    fingerprint: str | None,
    as_json: bool,
) -> None:
    """
    Write the board NAME into hosts.toml, once you have confirmed its host key.

    \b
    edgeexit hosts add rpi4 pi@raspberrypi.local
    edgeexit hosts add rpi4 pi@10.0.0.7:2222 --fingerprint SHA256:...   # in scripts
    edgeexit hosts add rpi4          # known already: its key (changed?), device, labels anew

    A key that known_hosts has for that address already is taken without asking. The board tells
    its fingerprints: for key in /etc/ssh/ssh_host_*.pub; do ssh-keygen -lf $key;
    done. An ADDRESS may also be a Host of ~/.ssh/config.
    """
    import asyncio

    from edgeexit.files import json_bytes
    from edgeexit.remote import hosts as known

    found = known.Hosts.read()
    host = _meant(found, name, address)
    host = replace(host, device=device or host.device, labels=labels or host.labels)
    _check_device(device)
    known.checked(host)
    from edgeexit.remote.login import offered_key

    offered = asyncio.run(offered_key(host))
    _confirm(host, offered, fingerprint, _typed(name, address, device, labels))
    key = offered.key
    host = replace(host, host_key=key)
    found = found.add(host)
    refusal = asyncio.run(_try(host))
    shown = known.fingerprint(key)
    if as_json:
        document = {
            "format": known.FORMAT,
            "name": host.name,
            "path": str(found.path),
            "fingerprint": shown,
            "login": refusal is None,
            "error": None if refusal is None else str(refusal),
            "hint": None if refusal is None else refusal.hint,
        }
        click.echo(json_bytes(document), nl=False)
    else:
        click.echo(printable(f"{host.name}: written into {found.path}, host key {shown}"))
    if refusal is not None:
        click.echo(f"warning: {printable(str(refusal))}", err=True)
        click.echo(f"Hint: {printable(refusal.hint or '')}", err=True)


def _meant(found: Any, name: str, address: str | None) -> "Host":
    from edgeexit.remote.hosts import Host, parse_address

    is_known = name in (host.name for host in found.all)
    if address is None:
        if not is_known:
            raise UsageError(
                f"{name!r} is not in {found.path} yet: its address is missing",
                hint=f"edgeexit hosts add {name} USER@ADDRESS",
            )
        known: Host = found.find(name)
        return known
    if is_known:
        raise UsageError(
            f"{found.path}: has a host {name} already",
            hint=f"edgeexit hosts add {name} (no address) looks at its key anew; "
            f"edgeexit hosts remove {name} forgets it",
        )
    user, where, port = parse_address(address)
    return Host(name=name, address=where, user=user, port=port)


def _check_device(device: str | None) -> None:
    from edgeexit.device import device_names
    from edgeexit.names import unknown

    if device is not None and device not in device_names():
        raise unknown(device, device_names(), "device")


def _typed(name: str, address: str | None, device: str | None, labels: Sequence[str]) -> str:
    options = [("--device", device), *(("--label", label) for label in labels)]
    words = [f"{option} {value}" for option, value in options if value]
    return " ".join(filter(None, ["edgeexit hosts add", name, address, *words]))


def _confirm(host: "Host", offered: "Offered", expected: str | None, typed: str) -> None:
    """
    Refuse a key that is neither the expected one, nor known already, nor confirmed by the user.

    UsageError if nobody can be asked or the answer is no, DeviceError if another was expected.
    """
    from edgeexit.remote.hosts import fingerprint

    kind, shown = offered.key.partition(" ")[0], fingerprint(offered.key)
    if expected is not None:
        if expected.rstrip("=") != shown:
            raise DeviceError(
                f"{host.name}: its host key is {shown} ({kind}), "
                f"expected {printable(expected)}; nothing was written",
                hint=f"look at it on the board itself: {_ON_THE_BOARD}",
            )
        return
    if offered.key == host.host_key or (host.host_key is None and offered.key in offered.known):
        return
    what = [f"{host.name} ({host.destination}) shows the host key", f"    {kind} {shown}"]
    if host.host_key is not None:
        what.append(f"    until now: {fingerprint(host.host_key)}")
    if offered.known:
        what.append(f"    known_hosts has: {', '.join(map(fingerprint, offered.known))}")
    if not sys.stdin.isatty():
        raise UsageError(
            f"{host.name}: its host key {shown} is not confirmed, and there is no terminal to ask",
            hint=f"if that is its fingerprint: {typed} --fingerprint {shown}",
        )
    click.echo("\n".join(map(printable, what)), err=True)
    click.echo(f"On the board: {_ON_THE_BOARD}", err=True)
    if not click.confirm("Is that what the board says?", err=True):
        raise UsageError(f"{host.name}: its host key was not confirmed; nothing was written")


async def _try(host: "Host") -> EdgeExitError | None:
    """Why we are not let in, if so."""
    from edgeexit.remote.link import connect

    try:
        async with connect(host):
            return None
    except DeviceError as error:
        return error


@command.command("list", short_help="list the boards, connect to none")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def list_hosts(as_json: bool) -> None:
    """List the boards of hosts.toml; nothing is connected to."""
    from edgeexit.files import json_bytes
    from edgeexit.remote.hosts import FORMAT, Hosts, fingerprint
    from edgeexit.report import text_table

    found = Hosts.read()
    prints = {
        host.name: fingerprint(host.host_key) if host.host_key else None for host in found.all
    }
    if as_json:
        boards = [
            {
                "name": host.name,
                "host": host.address,
                "user": host.user,
                "port": host.port,
                "device": host.device,
                "labels": list(host.labels),
                "fingerprint": prints[host.name],
            }
            for host in found.all
        ]
        click.echo(
            json_bytes({"format": FORMAT, "path": str(found.path), "hosts": boards}), nl=False
        )
        return
    if not found.all:
        click.echo(printable(f"{found.path}: no boards yet"), err=True)
        click.echo("Hint: edgeexit hosts add NAME USER@ADDRESS", err=True)
        return
    rows = []
    for host in found.all:
        key = prints[host.name] or "of known_hosts"
        labels = " ".join(host.labels) or "-"
        rows.append((host.name, host.destination, host.device or "-", labels, key))
    click.echo(text_table(("name", "ssh", "device", "labels", "host key"), rows))


@command.command("check", short_help="see whether boards answer")
@click.argument("names", nargs=-1, metavar="[NAME|USER@ADDRESS]...")
@click.option("--label", "labels", multiple=True, help="all boards with it; again for more")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
@fleet_options
def check(names: tuple[str, ...], labels: tuple[str, ...], as_json: bool, **fleet: Any) -> None:
    """
    See whether boards answer, with which key, user, Python and edgeexit; default: all of them.

    \b
    edgeexit hosts check
    edgeexit hosts check rpi4 --json
    edgeexit hosts check --label lab

    A board without edgeexit passes; one without Python 3 does not.
    """
    from edgeexit.remote.hosts import Hosts, chosen
    from edgeexit.remote.visit import look_in

    found = Hosts.read()
    hosts = chosen(names, labels, found) if names or labels or not found.all else list(found.all)
    live = Live(len(hosts))
    work_on(hosts, look_in, _told, live, head={}, as_json=as_json, **fleet)


def _told(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {facts[key] or '-'}" for key in ("user", "key", "python", "edgeexit", "device")
    )


@command.command("remove", short_help="forget boards and their keys")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Take boards out of hosts.toml, and with them the trust in their keys."""
    from edgeexit.remote.hosts import Hosts

    found = Hosts.read()
    for name in names:
        found.find(name)
    for name in names:
        found = found.remove(name)
        click.echo(printable(f"{name}: taken out of {found.path}"))
