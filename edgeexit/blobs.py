"""
What was uploaded to a board and waits to become a folder: one file for each digest.

Callers see Blobs. Hidden here: a folder made of blobs appears complete or not at all, and whatever
is taken is verified on the way; a blob that was altered is removed, so that it is sent again.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgeexit.errors import BadFile, storage
from edgeexit.files import json_bytes, new_folder
from edgeexit.manifest import RECORD, Entry, Manifest, digest_in

# What an upload under way needs must not be collected.
MAX_AGE_S = 3600.0
_AGAIN = "deploy again: it is sent again"


class Blobs:
    """The uploaded files below the board's folder *home*; `.part` is added while one comes."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "blobs"

    def path(self, sha256: str) -> Path:
        """Where the file of this digest lies, or would lie."""
        return self.folder / sha256

    def missing(self, manifest: Manifest) -> list[Entry]:
        """The files of *manifest* that have not come, each content once."""
        first = {entry.sha256: entry for entry in reversed(manifest.files)}
        return [entry for entry in first.values() if not self._is_here(entry)]

    def _is_here(self, entry: Entry) -> bool:
        path = self.path(entry.sha256)
        return path.is_file() and path.stat().st_size == entry.size_bytes

    def add(self, entry: Entry, source: Path) -> None:
        """Copy the file *source* of this very machine; BadFile if it is not what *entry* says."""
        target = self.path(entry.sha256)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        with storage(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                _copy(entry, source, part, os.O_TRUNC)
                # Not synced: whoever takes it looks at every byte.
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)

    def build(
        self, manifest: Manifest, target: Path, *, others: Mapping[str, Path] | None = None
    ) -> None:
        """
        Make the folder *target*, with a record of its manifest, durably and complete or not at all.

        *others* maps digests to sound files that need no blob. A folder at *target* is replaced.
        BadFile if a file has not come, or is not what it should be.
        """
        with new_folder(target) as folder, storage(target):
            for below in sorted(manifest.folders):
                (folder / below).mkdir()
            for entry in manifest.files:
                source = self.path(entry.sha256)
                if not self._is_here(entry):
                    source = (others or {}).get(entry.sha256, source)
                try:
                    _copy(entry, source, folder / entry.path, os.O_EXCL, mode=0o444)
                except BadFile:
                    self.path(entry.sha256).unlink(missing_ok=True)
                    raise
            (folder / RECORD).write_bytes(json_bytes(manifest.to_document()))

    def collect(self) -> list[str]:
        """Remove what came more than an hour ago; the names of what was removed."""
        removed = []
        for path in sorted(self.folder.glob("*")):
            with storage(path), suppress(FileNotFoundError):
                # Boards without a clock wake up in 1970: a time to come is old, too.
                if abs(time.time() - path.stat().st_mtime) > MAX_AGE_S:
                    path.unlink()
                    removed.append(path.name)
        return removed


def _copy(entry: Entry, source: Path, target: Path, flags: int, mode: int = 0o666) -> None:
    if not source.is_file():
        raise BadFile(f"{entry.path}: has not come ({entry.sha256[:12]})", hint=_AGAIN)
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, mode)
    try:
        found = digest_in(source, handle)
    finally:
        os.close(handle)
    if found != (entry.size_bytes, entry.sha256):
        raise BadFile(f"{source}: altered, expected {entry.path}", hint=_AGAIN)
