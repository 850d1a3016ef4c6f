"""
A bundle on its way to boards: checked before anything of it is sent.

Callers see Parcel and pack. Hidden here: what a folder may hold that becomes a release, and what a
board is asked with it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit import __version__
from edgeexit.errors import UsageError
from edgeexit.manifest import Manifest
from edgeexit.names import board_home
from edgeexit.releases import Releases

POLICY = "policies/{}.json"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """
    The bundle folder *path*, checked in all its files, and what boards shall call it.

    *devices* are those that it has a policy for.
    """

    path: Path
    app: str
    manifest: Manifest
    devices: tuple[str, ...]

    def order(self, *, keep: int = 1, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
        """
        What deploy is asked: *keep* so many releases besides the one that runs.

        *force* tests and activates what was refused before, or runs already.
        """
        return {
            "app": self.app,
            "manifest": self.manifest.to_document(),
            "keep": keep,
            "force": force,
            "dry_run": dry_run,
            "edgeexit": __version__,
            "clock_s": round(time.time()),
        }


def pack(path: Path, app: str | None = None) -> Parcel:
    """
    The bundle folder *path* as a Parcel; *app* is by default the folder's stem.

    Refuses as load_bundle, and policies that do not fit the bundle: nothing is sent then.
    """
    from edgeexit.bundle import MANIFEST, load_bundle

    name = path.resolve().stem if app is None else app
    Releases(board_home(), name)  # refuses what no board could call it
    bundle = load_bundle(path)
    devices = tuple(bundle.policy_devices())
    for device in devices:
        bundle.policy_for(device)
    manifest = Manifest.from_folder(path)
    known = {MANIFEST, *bundle.files, *(segment.file for segment in bundle.segments)}
    known |= {POLICY.format(device) for device in devices}
    strange = sorted({entry.path for entry in manifest.files} - known)
    if strange:
        raise UsageError(
            f"{path}: {strange[0]} belongs to no bundle",
            hint="boards get every file of the folder: move this one out of it",
        )
    return Parcel(path=path, app=name, manifest=manifest, devices=devices)
