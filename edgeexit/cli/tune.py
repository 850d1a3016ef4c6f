"""`edgeexit tune`: choose exits and thresholds from a record and a profile."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import progress
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.evaluate import Record


@click.command("tune", short_help="choose exits and thresholds from measurements")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    help="default: ./profile-DEVICE.json",
)
@click.option(
    "--record",
    "record_path",
    type=click.Path(path_type=Path),
    help="default: made now from the bundle's calibration set",
)
@click.option(
    "--calibration",
    metavar="NAME|FOLDER",
    help="the bundle's calibration set, if it does not lie here or in ./calibration",
)
@click.option("--device", "device_name", help="default: the kind of board that this machine is")
@click.option(
    "--max-accuracy-drop",
    type=float,
    default=0.01,
    show_default=True,
    help="share of samples that may become wrong (0.01 = 1 %)",
)
@click.option("--measure", help="confidence measure (default: the cheapest of all)")
@click.option(
    "--accept-disturbed",
    is_flag=True,
    help="take a profile that was disturbed, or measured on an emulated machine",
)
@click.option("--json", "as_json", is_flag=True, help="print the policy instead of tables")
def command(
    bundle_path: Path | None,
    profile_path: Path | None,
    record_path: Path | None,
    calibration: str | None,
    device_name: str | None,
    max_accuracy_drop: float,
    measure: str | None,
    accept_disturbed: bool,
    as_json: bool,
) -> None:
    """
    Choose the cheapest exits and thresholds for BUNDLE (default: the only one here).

    \b
    edgeexit tune --max-accuracy-drop 0.01
    edgeexit tune fashion.edgeexit --device rpi4 --profile profile-rpi4.json

    Chosen on the split `tuning`, then checked once on `certificate`; a failing check writes
    nothing and exits 7. The policy goes to BUNDLE/policies/DEVICE.json. A profile that was
    disturbed is refused (exit 6); one that has not converged gives a warning. Either stands in
    the policy.
    """
    from edgeexit import bounds, device, names, report, tune
    from edgeexit.blocks import CLEAN
    from edgeexit.bundle import load_bundle
    from edgeexit.evaluate import Record
    from edgeexit.files import json_bytes
    from edgeexit.policy import MEASURES
    from edgeexit.profile import Profile

    bounds.check_rate(max_accuracy_drop)
    if measure is not None:
        names.choose(measure, MEASURES, "confidence measure")
    name = device.find_device(device_name or device.this_device()).name
    bundle = load_bundle(bundle_path or names.only_bundle_here())
    source = profile_path or Path(f"profile-{name}.json")
    if not source.exists():
        raise UsageError(
            f"{source}: no profile", hint=f"make it with: edgeexit profile --device {name}"
        )
    profile = Profile.load(source)
    verdict = tune.check_verdict(profile, accept_disturbed=accept_disturbed)
    if verdict.status != CLEAN:
        click.echo(f"warning: {source}: {printable(str(verdict))}", err=True)
    record = Record.load(record_path) if record_path else _fresh_record(bundle, calibration)
    tune.check_inputs(bundle, record, profile, name)
    policy = tune.choose(
        record, profile, max_accuracy_drop, measure, accept_disturbed=accept_disturbed
    )
    path = bundle.policy_path(name)
    policy.save(path)
    if as_json:
        click.echo(json_bytes(policy.to_document()), nl=False)
        return
    click.echo(report.policy_table(policy))
    click.echo(f"wrote {path}", err=True)


def _fresh_record(bundle: "Bundle", calibration: str | None) -> "Record":
    """Run the tuning and certificate splits of the set that the bundle names."""
    from edgeexit import tune
    from edgeexit.errors import BadFile
    from edgeexit.evaluate import record
    from edgeexit.samples import find_set, load_samples

    named = bundle.calibration_set
    if named is None:
        raise UsageError(
            f"{bundle.path}: names no calibration set",
            hint="give --record FILE.npz, made with: edgeexit evaluate BUNDLE DATA --record",
        )
    source = calibration or named["name"]
    found = find_set(source)
    if found.digest != named["digest"]:
        raise BadFile(
            f"calibration set {found.name!r} is another one than the bundle's "
            f"({found.digest[:12]}, expected {named['digest'][:12]})",
            hint="convert again with this set, or give --record",
        )
    parts = [
        load_samples(f"{source}:{split}", bundle.preprocess, bundle.class_names, bundle.input.shape)
        for split in (tune.TUNING, tune.CERTIFICATE)
    ]
    with progress(length=sum(map(len, parts)), label="record") as bar:
        return record(
            bundle, parts, set_name=found.name, set_digest=found.digest, on_step=bar.update
        )
