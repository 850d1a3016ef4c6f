"""`edgeexit profile`: measure what each exit costs on this machine."""

from pathlib import Path

import click

from edgeexit.cli import finite, progress


@click.command("profile", short_help="measure the latency of each exit on a device")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--device", "device_name", help="a name from devices/ (default: what this machine is)"
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256))
@click.option("--processes", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option(
    "--time-cap",
    "time_cap_s",
    default=20.0,
    show_default=True,
    type=click.FloatRange(0.1, 86400),
    callback=finite,
    help="seconds of measuring, all processes together",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="default: ./profile-DEVICE.json"
)
@click.option("--json", "as_json", is_flag=True, help="print the profile instead of a table")
def command(
    bundle_path: Path | None,
    device_name: str | None,
    threads: int,
    processes: int,
    time_cap_s: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """
    Measure what it costs to leave at each exit of BUNDLE (default: the only one here).

    \b
    edgeexit profile --device host
    edgeexit profile fashion.edgeexit --threads 2 --processes 10 --time-cap 60

    Every set of exits that could be kept is cut out and timed through the call that `run`
    makes; raw values go to ./profile-DEVICE.json. Leave the machine alone meanwhile.
    """
    from edgeexit import device, names, profile, report
    from edgeexit.bundle import load_bundle
    from edgeexit.files import json_bytes

    name = profile.check_device(device_name or device.this_device()).name
    bundle = load_bundle(bundle_path or names.only_bundle_here())
    done = 0
    with progress(length=1000, label="profile") as bar:

        def on_step(share: float) -> None:
            nonlocal done
            bar.update(int(share * 1000) - done)
            done = int(share * 1000)

        found = profile.measure(
            bundle,
            name,
            threads=threads,
            processes=processes,
            rounds=max(40, int(2 * time_cap_s)),
            time_cap_s=time_cap_s,
            on_step=on_step,
        )
    path = output or Path(f"profile-{name}.json")
    found.save(path)
    if as_json:
        click.echo(json_bytes(found.to_document()), nl=False)
        return
    click.echo(report.profile_table(found))
    click.echo(f"wrote {path}", err=True)
