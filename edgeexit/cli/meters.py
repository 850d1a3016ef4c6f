"""`edgeexit meters`: what measures power here, and whether it sees this board."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import finite
from edgeexit.errors import DeviceError, printable

if TYPE_CHECKING:
    from edgeexit.meters.check import LoadTest

_DEVICE_HELP = "a name from devices/, or a TOML file (default: what this machine is)"


@click.group("meters", invoke_without_command=True, short_help="list and test energy meters")
@click.pass_context
def command(context: click.Context) -> None:
    """
    List the energy meters of this machine, and test one.

    \b
    edgeexit meters                          # what is here, and what to type for it
    edgeexit meters test ina219:0x40,shunt=0.1
    edgeexit meters test command:'my-plug --watts'

    A spec is KIND[:ADDRESS][,key=value...]; `profile --meter SPEC` takes the same.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_meters, device_name=None, as_json=False)


@command.command("list")
@click.option("--device", "device_name", help=_DEVICE_HELP)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def list_meters(device_name: str | None, as_json: bool) -> None:
    """List what could be read here: its spec, label, rate and boundary, or why it cannot be."""
    from edgeexit.device import find_device, this_device
    from edgeexit.files import json_bytes
    from edgeexit.machine import this_machine
    from edgeexit.meters import find_meters

    machine = this_machine()
    device = find_device(device_name or this_device(machine))
    found = find_meters(machine, device)
    if as_json:
        document = {
            "device": device.name,
            "meters": [
                {
                    "spec": one.spec,
                    "title": one.title,
                    "is_usable": one.info is not None,
                    "info": one.info.to_document() if one.info else None,
                    "reason": one.reason,
                }
                for one in found
            ],
        }
        click.echo(json_bytes(document), nl=False)
        return
    for one in found:
        lines = [f"    {one.reason}"]
        state = "not usable as it stands"
        if one.info is not None:
            state = f"{one.info.label}, {one.info.rate_hz:.4g} Hz"
            lines = [f"    sees {one.info.boundary}"]
            lines += [f"    {one.info.details['warning']}"] if "warning" in one.info.details else []
        for line in (f"{one.spec:30}  {state}: {one.title}", *lines):
            click.echo(printable(line))
    if not any(one.info and one.info.label != "modelled" for one in found):
        click.echo("nothing here measures this machine's power as it stands", err=True)
    click.echo(
        "never found, only named: command:'PROGRAM', ssh:HOST/SPEC, replay:FILE, "
        "smbus:1-0040,chip=ina219,shunt=OHM",
        err=True,
    )


@command.command("test")
@click.argument("spec")
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(1, 3600),
    callback=finite,
    help="the whole test: a third idle, a third busy, a third idle",
)
@click.option("--device", "device_name", help=_DEVICE_HELP)
@click.option(
    "-o",
    "--save",
    "output",
    type=click.Path(path_type=Path),
    help="write the readings as CSV, for replay:FILE",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def test(
    spec: str, seconds: float, device_name: str | None, output: Path | None, as_json: bool
) -> None:
    """
    Watch the meter SPEC while this machine is idle, busy on all cores, and idle again.

    Says whether the watts are plausible for this board, how noisy the readings are, how often
    and how regularly they come, and what reading costs. Exit code 5 if they are implausible.
    """
    from edgeexit.device import find_device, this_device
    from edgeexit.files import check_output, json_bytes, write_file
    from edgeexit.machine import this_machine
    from edgeexit.meters import open_meter
    from edgeexit.meters.check import load_test

    machine = this_machine()
    device = find_device(device_name or this_device(machine))
    if output is not None:
        check_output(output)
    meter = open_meter(spec, machine, device)
    try:
        found = load_test(meter, device, seconds=seconds)
    finally:
        meter.close()
    if output is not None:
        rows = "".join(f"{at_ms:.3f},{power_mw:.3f}\n" for at_ms, power_mw in found.samples)
        write_file(output, f"at_ms,power_mw\n{rows}".encode())
        click.echo(f"wrote {output}", err=True)
    click.echo(json_bytes(found.to_document()) if as_json else _table(spec, found), nl=False)
    bad = [finding.text for finding in found.findings if finding.is_bad]
    if bad:
        raise DeviceError(
            f"meter {spec}: implausible: {bad[0]}",
            hint=next((one.text for one in found.findings if one.kind == "load"), None),
        )


def _table(spec: str, found: "LoadTest") -> str:
    power_w = {name: power_mw / 1e3 for name, power_mw in found.power_mw.items()}
    lines = [
        f"{spec}: {found.info.instrument}",
        f"  label      {found.info.label}",
        f"  sees       {found.info.boundary}",
        f"  idle       {power_w['idle']:.3f} W, afterwards {power_w['after']:.3f} W",
        f"  busy       {power_w['busy']:.3f} W on all cores: {found.step_mw / 1e3:+.3f} W",
        f"  noise      {found.noise_mw:.1f} mW in a single reading",
        f"  rate       {found.rate_hz:.1f} Hz (stated: {found.info.rate_hz:.4g} Hz), "
        f"jitter {found.jitter_ms:.2f} ms, {found.missing:.0%} missing",
        f"  cost       {found.cost:.2%} of one core",
        *(f"  {'wrong' if one.is_bad else 'note':9}  {one.text}" for one in found.findings),
        f"  verdict    {'plausible' if found.is_plausible else 'implausible'}",
    ]
    return "\n".join(map(printable, lines)) + "\n"
