"""`edgeexit doctor`: find what would ruin a run on this machine."""

import click

from edgeexit.cli.fleet import meant
from edgeexit.errors import DeviceError, printable


@click.command("doctor", short_help="find what would ruin a run, and what mends it")
@click.option(
    "--device", "device_name", metavar="NAME", help="the board you mean (default: what this is)"
)
@click.option("--meter", metavar="SPEC", help="the energy meter you mean to use, or none")
@click.option("--host", metavar="HOST", help="ask the doctor of that board, over ssh")
@click.option("--json", "as_json", is_flag=True, help="print one document instead of a table")
@click.option(
    "--quick", is_flag=True, help="leave out what takes seconds: runtime, load, meter's test"
)
def command(
    device_name: str | None, meter: str | None, host: str | None, as_json: bool, quick: bool
) -> None:
    """
    Look for everything that ruins a run: runtime, clock, heat, supply, load, memory, meter.

    \b
    edgeexit doctor
    edgeexit doctor --device rpi5 --meter ina219:0x40,shunt=0.1
    edgeexit doctor --host rpi4

    Nothing is changed. Each finding names the one command or step that mends it. The exit code
    is 5 if something failed; warnings do not count.
    """
    if host is not None:
        _remote(host, device_name, meter, as_json, quick)
        return

    from edgeexit import doctor
    from edgeexit.files import json_bytes
    from edgeexit.machine import this_machine
    from edgeexit.symptoms import FAILED

    found = doctor.examine(this_machine(), device_name, meter, is_quick=quick)
    if as_json:
        click.echo(json_bytes(doctor.to_document(found)), nl=False)
    else:
        click.echo(doctor.table(found))
    if doctor.count(found, FAILED):
        click.get_current_context().exit(DeviceError.exit_code)


def _remote(host: str, device: str | None, meter: str | None, as_json: bool, quick: bool) -> None:
    """Print what the doctor of the board *host* prints; its exit code is ours."""
    import asyncio

    (board,) = meant([host])
    from edgeexit.remote.setup import ask_doctor

    asked = {"--device": device, "--meter": meter}
    words = [word for key, value in asked.items() if value for word in (key, value)]
    flags = {"--json": as_json, "--quick": quick}
    words += [flag for flag, is_set in flags.items() if is_set]
    code, text = asyncio.run(ask_doctor(board, words))
    click.echo("\n".join(map(printable, text.splitlines())))
    if code:
        click.get_current_context().exit(code)
