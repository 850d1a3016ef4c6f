"""What tune works on, found in files or made now: a profile, a record, a rival."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import progress
from edgeexit.errors import BadFile, UsageError, printable

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.evaluate import Record
    from edgeexit.profile import Profile
    from edgeexit.tune import Challenger


def load_profile(path: Path, device: str, accept_disturbed: bool) -> "Profile":
    """The profile in *path*; its verdict is told unless it is clean. Disturbed if not accepted."""
    from edgeexit.blocks import CLEAN
    from edgeexit.profile import Profile
    from edgeexit.request import check_verdict

    if not path.exists():
        raise UsageError(
            f"{path}: no profile", hint=f"make it with: edgeexit profile --device {device}"
        )
    profile = Profile.load(path)
    verdict = check_verdict(profile, accept_disturbed=accept_disturbed)
    if verdict.status != CLEAN:
        click.echo(f"warning: {path}: {printable(str(verdict))}", err=True)
    return profile


def find_record(
    bundle: "Bundle", path: Path | None, calibration: str | None
) -> "tuple[Path, Record]":
    """
    The record that was named, that lies here for this very bundle, or a new one, saved.

    A record of another bundle (or with *calibration* of another set) that lies here is kept under
    another name.
    """
    from edgeexit.evaluate import Record
    from edgeexit.files import digest_of, read_bytes, write_file

    if path is not None:
        return path, Record.load(path)
    path = Path(f"{bundle.path.resolve().stem}-record.npz")
    kept = None
    if path.exists():
        try:
            found = Record.load(path)
        except BadFile as error:
            raise BadFile(
                str(error),
                hint="remove it, and it is made anew; or name another one with --record FILE.npz",
            ) from error
        wanted = None if calibration is None else bundle.calibration_set
        is_of_set = wanted is None or found.set_digest == wanted["digest"]
        if found.bundle_digest == bundle.digest and is_of_set:
            click.echo(f"record: {path}", err=True)
            return path, found
        kept = read_bytes(path)
    made = fresh_record(bundle, calibration)
    if kept is not None:
        aside = path.with_name(f"{path.stem}-{digest_of(kept)[:12]}.npz")
        write_file(aside, kept)
        click.echo(f"note: {path} is of another bundle or set: kept as {aside}", err=True)
    made.save(path)
    click.echo(f"wrote {path}", err=True)
    return path, made


def fresh_record(bundle: "Bundle", calibration: str | None) -> "Record":
    """Run the tuning and certificate splits of the set that the bundle names."""
    from edgeexit.evaluate import record
    from edgeexit.request import CERTIFICATE, TUNING
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
        for split in (TUNING, CERTIFICATE)
    ]
    with progress(length=sum(map(len, parts)), label="record") as bar:
        return record(
            bundle, parts, set_name=found.name, set_digest=found.digest, on_step=bar.update
        )


def challenger(
    rival: Path, profile_path: Path, calibration: str | None, accept_disturbed: bool
) -> "Challenger":
    """The bundle *rival* with its profile, and its answers to the samples of the set."""
    from edgeexit.bundle import load_bundle
    from edgeexit.tune import Challenger

    bundle = load_bundle(rival)
    profile = load_profile(profile_path, "DEVICE", accept_disturbed)
    if (profile.bundle_digest, profile.exits) != (bundle.digest, bundle.exits):
        raise UsageError(
            f"{profile_path}: not the profile of {rival}",
            hint=f"make it with: edgeexit profile {rival}",
        )
    return Challenger(name=bundle.name, profile=profile, answers=fresh_record(bundle, calibration))
