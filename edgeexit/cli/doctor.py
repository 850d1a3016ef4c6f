"""`edgeexit doctor`: find what would ruin a run on this machine."""

import click

from edgeexit.errors import DeviceError


@click.command("doctor", short_help="find what would ruin a run, and what mends it")
@click.option(
    "--device", "device_name", metavar="NAME", help="the board you mean (default: what this is)"
)
@click.option("--meter", metavar="SPEC", help="the energy meter you mean to use, or none")
@click.option("--json", "as_json", is_flag=True, help="print one document instead of a table")
@click.option(
    "--quick", is_flag=True, help="leave out what takes seconds: runtime, load, meter's test"
)
def command(device_name: str | None, meter: str | None, as_json: bool, quick: bool) -> None:
    """
    Look for everything that ruins a run: runtime, clock, heat, supply, load, memory, meter.

    \b
    edgeexit doctor
    edgeexit doctor --device rpi5 --meter ina219:0x40,shunt=0.1

    Nothing is changed. Each finding names the one command or step that mends it. The exit code
    is 5 if something failed; warnings do not count.
    """
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
