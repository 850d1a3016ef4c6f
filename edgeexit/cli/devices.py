"""`edgeexit devices`: the boards that edgeexit knows, which one this is, and recording one."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.device import Device


@click.group(
    "devices", invoke_without_command=True, short_help="list the known boards; which one is this?"
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """
    List the kinds of boards that edgeexit knows.

    \b
    edgeexit devices                       # all of them
    edgeexit devices which                 # which one is this machine, and why
    edgeexit devices show rpi4             # every fact with its source
    edgeexit devices record -o my-pi4.tar.gz

    Facts that nobody looked up yet are marked; none of them is a speed: that is measured.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json: give it after the subcommand")
        return
    _list(as_json)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def list_devices(as_json: bool) -> None:
    """List the kinds of boards that edgeexit knows."""
    _list(as_json)


def _list(as_json: bool) -> None:
    from edgeexit.device import device_names, find_device
    from edgeexit.files import json_bytes

    found = [find_device(name) for name in device_names()]
    if as_json:
        document = {"devices": [device.to_document() for device in found]}
        click.echo(json_bytes(document), nl=False)
        return
    rows = [("name", "board", "cores", "MHz", "int8", "RAM GB", "energy sensor", "verified")]
    for device in found:
        rows.append(
            (
                device.name,
                device.title,
                ", ".join(device.cores) or "-",
                _shown(device.clock_mhz),
                " ".join(device.isa) or "-",
                _gigabytes(device.ram_mb),
                _shown(device.meter),
                f"{device.verified}/{len(device.facts)}" if device.facts else "-",
            )
        )
    click.echo(_table(rows))


@command.command("which")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def which(as_json: bool) -> None:
    """Say which board this machine is and why, and what the machine says beside its facts."""
    from edgeexit.device import find_device, identify
    from edgeexit.files import json_bytes
    from edgeexit.machine import this_machine
    from edgeexit.state import emulation, machine_facts

    machine = this_machine()
    identity = identify(machine)
    device, here, unreal = find_device(identity.name), machine_facts(machine), emulation(machine)
    if as_json:
        document = {
            "device": device.to_document(),
            "why": identity.why,
            "emulated": unreal,
            "machine": here,
        }
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(printable(f"{device.name} ({device.title}): {identity.why}"))
    if unreal is not None:
        click.echo(printable(f"emulated: {unreal}; times taken here mean nothing"))
    rows = [("", "the board", "verified", "this machine")]
    for label, fact, said in _beside(device, here):
        rows.append(
            (
                label,
                _shown(device.facts[fact].value) if fact in device.facts else "-",
                _mark(device, fact),
                said,
            )
        )
    click.echo()
    click.echo(_table(rows))
    for note in device.notes:
        click.echo(printable(f"note: {note}"))


def _beside(device: "Device", here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of what to call it, the board's fact and the machine's word."""
    cpu = here["cpu"] or "-"
    if here["cores"] and not cpu.startswith(tuple("123456789")):
        cpu += f" ({here['cores']} cores)"
    memory = here["memory_total_mb"]
    return [
        ("processor", "cores", cpu),
        ("clock, MHz", "clock_mhz", _shown([round(mhz) for mhz in here["max_clocks_mhz"]])),
        ("int8", "isa", _shown(here["isa"])),
        ("memory, MB", "ram_mb", _shown(None if memory is None else round(memory))),
        ("energy sensor", "meter", "see: edgeexit meters list"),
        ("revision", "", _shown(here["revision"])),
        ("governor", "", _shown(list(dict.fromkeys(here["governors"])))),
        ("cores usable", "", _shown(here["cores_usable"])),
        ("system", "", _shown(here["os"])),
        ("kernel", "", _shown(here["kernel"])),
        ("userland, bits", "", _shown(here["userland_bits"])),
    ]


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def show(name: str, as_json: bool) -> None:
    """Show every fact of the device NAME (or of a TOML file), with its source."""
    from edgeexit.device import find_device
    from edgeexit.files import json_bytes

    device = find_device(name)
    if as_json:
        click.echo(json_bytes(device.to_document()), nl=False)
        return
    patterns = ", ".join(map(repr, device.models)) or "nothing: it is what remains"
    lines = [f"{device.name}: {device.title}", f"recognised by {patterns}"]
    cores = f"pinned to cores {_shown(device.pin)}" if device.pin else "on any cores"
    lines.append(f"measured with {device.threads} thread{'s'[: device.threads != 1]}, {cores}")
    for note in device.notes:
        lines.append(f"note: {note}")
    for key, fact in device.facts.items():
        state = "verified" if fact.verified else "not verified"
        lines += ["", f"{key}: {_shown(fact.value)}  ({state})", f"    {fact.source}"]
        lines += [f"    {fact.note}"] if fact.note else []
    core_w = device.modelled_core_w
    if core_w is not None and device.core_w is None:
        step = f"one busy core adds {core_w:.2f} W: (busy_w - idle_w) / cores, not measured alone"
        lines += ["", step]
    click.echo("\n".join(map(printable, lines)))


@command.command("record")
@click.option(
    *("-o", "--output"),
    required=True,
    type=click.Path(path_type=Path),
    help="a new folder, or a new file that ends in .tar.gz",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def record_machine(output: Path, as_json: bool) -> None:
    """
    Pack what this machine says of itself into a tree that can be replayed and donated.

    Only files and commands on a fixed list are read. Serial numbers, MAC addresses, the machine
    id, host and home folder names are left out. Look into it before you give it away. As root more
    files can be read.
    """
    from edgeexit.files import json_bytes
    from edgeexit.machine import ENVIRONMENT, this_machine
    from edgeexit.recording import REMOVED, record

    made = record(this_machine(), output)
    if as_json:
        document = {
            "path": str(made.path),
            "device": made.device,
            "bytes": made.size_bytes,
            "names": list(made.names),
            "removed": list(REMOVED),
        }
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(f"{made.path}: {len(made.names)} files, {made.size_bytes} bytes, of {made.device}")
    click.echo("left out:")
    for line in REMOVED:
        click.echo(f"  {line}")
    click.echo(f"replay it with {ENVIRONMENT}=FOLDER edgeexit devices which", err=True)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _mark(device: "Device", key: str) -> str:
    if key not in device.facts:
        return ""
    return "yes" if device.facts[key].verified else "no"


def _gigabytes(sizes_mb: Sequence[int]) -> str:
    return "/".join(f"{size / 1024:g}" for size in sizes_mb) or "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns to the left, a line below the heads."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in map(lambda row: tuple(map(printable, row)), rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
