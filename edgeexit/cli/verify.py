"""`edgeexit verify`: recompute a policy and its certificate from the files."""

from pathlib import Path

import click

from edgeexit.errors import BadFile, UsageError, printable

_LISTED = 20


@click.command("verify", short_help="recompute a policy and its certificate from the files")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    help="default: BUNDLE/policies/DEVICE.json of this machine, or the only one there",
)
@click.option(
    "--record",
    "record_path",
    type=click.Path(path_type=Path),
    help="default: ./BUNDLE-record.npz",
)
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    help="default: ./profile-DEVICE.json, of the policy's device",
)
@click.option(
    "--reference",
    "reference_path",
    type=click.Path(path_type=Path),
    help="the record that accuracy is lost against, if tune was given one",
)
@click.option(
    "--ledger",
    "ledger_path",
    type=click.Path(path_type=Path),
    help="where uses of the certificate samples were counted (default: beside the set)",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(
    bundle_path: Path | None,
    policy_path: Path | None,
    record_path: Path | None,
    profile_path: Path | None,
    reference_path: Path | None,
    ledger_path: Path | None,
    as_json: bool,
) -> None:
    """
    Check that BUNDLE's policy (default: the only bundle here) is what its files give.

    \b
    edgeexit verify
    edgeexit verify fashion.edgeexit --policy policies/rpi4.json --record fashion-record.npz

    Everything is computed anew: search, certificate and what is to be expected. Prints what holds,
    or every difference, one a line, and exits 3. Neither the ledger nor the policy is written.
    """
    from edgeexit import device, names
    from edgeexit.bundle import load_bundle
    from edgeexit.files import json_bytes
    from edgeexit.policy import Policy
    from edgeexit.verify import verify

    bundle = load_bundle(bundle_path or names.only_bundle_here())
    if policy_path is None:
        here, found = device.this_device(), bundle.policy_devices()
        policy_path = bundle.policy_path(found[0] if len(found) == 1 else here)
    if not policy_path.exists():
        raise UsageError(
            f"{policy_path}: no policy to verify",
            hint="edgeexit tune makes one"
            if len(bundle.exits) > 1
            else "a network of one exit has none: verify its parent's",
        )
    device_name = Policy.load(policy_path).device
    record_path = record_path or Path(f"{bundle.path.resolve().stem}-record.npz")
    profile_path = profile_path or Path(f"profile-{device_name}.json")
    for option, path in (("--record", record_path), ("--profile", profile_path)):
        if not path.exists():
            raise UsageError(
                f"{path}: no such file, expected the one that tune worked on",
                hint=f"name it with {option}; the policy of a bundle that was cut out belongs to "
                "its parent: edgeexit verify PARENT --policy CHILD/policies/DEVICE.json",
            )
    outcome = verify(
        policy_path,
        bundle.path,
        record_path=record_path,
        profile_path=profile_path,
        reference_path=reference_path,
        ledger_path=ledger_path,
    )
    if as_json:
        click.echo(json_bytes(outcome.to_document()), nl=False)
    elif outcome.holds:
        click.echo(f"{printable(str(policy_path))}: {outcome.sentence}")
    else:
        for line in outcome.differences[:_LISTED]:
            click.echo(printable(line))
        if len(outcome.differences) > _LISTED:
            click.echo(f"... and {len(outcome.differences) - _LISTED} more")
    if not outcome.holds:
        raise BadFile(
            f"{policy_path}: not what its files give (places that differ: "
            f"{len(outcome.differences)})",
            hint="give the very files it was made from (--record, --profile, --reference and "
            "--ledger as tune had them), or make it anew with: edgeexit tune",
        )
