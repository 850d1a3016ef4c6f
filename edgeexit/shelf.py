"""
An application's folder on a board: what lies there, and how each single thing in it is changed.

Callers see Shelf. Hidden here: names and shapes on the storage, what is no release of ours (links
that lead elsewhere, folders that were altered), and that every change is durable when it returns.
The order of changes is no business of this room.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgeexit.errors import BadFile, EdgeExitError, StorageError, UsageError, storage
from edgeexit.files import (
    json_bytes,
    parse_json,
    point,
    read_bytes,
    sync_folder,
    write_file,
)
from edgeexit.intents import Links, State, is_release
from edgeexit.manifest import RECORD, Manifest

_MAX_STATE_BYTES = 1 << 20
_MAX_RECORD_BYTES = 1 << 20


class Shelf:
    """The folder *path* (HOME/apps/APP) with releases/, current, previous, state.json, lock."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, path / "lock"
        self._store, self._state = path / "releases", path / "state.json"

    # ------------------------------------------------------------ looking

    @property
    def is_there(self) -> bool:
        """Whether anything was ever installed here."""
        return self._store.is_dir()

    def release(self, name: str) -> Path:
        """The folder of a release, be it there or not."""
        return self._store / name

    def names(self) -> list[str]:
        """The releases that are there, oldest first; nothing is verified."""
        found = []
        with suppress(FileNotFoundError):
            for path in self._store.iterdir():
                # Another process may remove one meanwhile.
                with suppress(FileNotFoundError):
                    if is_release(path.name):
                        found.append((path.lstat().st_mtime_ns, path.name))
        return [name for _, name in sorted(found)]

    def links(self) -> Links:
        """What `current` and `previous` name."""
        return Links(current=self._target("current"), previous=self._target("previous"))

    def _target(self, name: str) -> str | None:
        try:
            target = (self.path / name).readlink()
        except OSError:
            return None
        is_ours = str(target.parent) == self._store.name and is_release(target.name)
        return target.name if is_ours else None

    def fault(self, name: str) -> EdgeExitError | None:
        """
        Why the release cannot be run as it lies there, None if it is sound to the byte.

        BadFile if it is altered, StorageError if it cannot be read.
        """
        try:
            self._manifest(name).check_folder(self.release(name))
        except (BadFile, StorageError) as error:
            return error
        return None

    def _manifest(self, name: str) -> Manifest:
        path = self.release(name) / RECORD
        try:
            data = read_bytes(path, limit_bytes=_MAX_RECORD_BYTES)
            found = Manifest.from_document(parse_json(data, str(path)))
        except UsageError as error:
            raise BadFile(f"{path}: missing", hint="deploy it again") from error
        if found.id != name:
            raise BadFile(f"{path}: was altered", hint="deploy it again")
        return found

    def files(self) -> dict[str, Path]:
        """The files of the sound releases, by digest."""
        return {
            entry.sha256: self.release(name) / entry.path
            for name in self.names()
            if self.fault(name) is None
            for entry in self._manifest(name).files
        }

    def state(self) -> tuple[State, str | None]:
        """What state.json says; else what can be known without it, and why it cannot be read."""
        damage = None
        try:
            data = read_bytes(self._state, limit_bytes=_MAX_STATE_BYTES)
            return State.from_document(parse_json(data, str(self._state))), None
        except UsageError:
            pass  # none was written yet
        except BadFile as error:
            damage = str(error)
        links = self.links()
        others = [name for name in self.names() if name not in (links.current, links.previous)]
        return State(staged=others[-1] if others else None), damage

    # ------------------------------------------------------------ changing

    def make(self) -> None:
        """Make the folder; settle() makes it last."""
        with storage(self._store):
            self._store.mkdir(parents=True, exist_ok=True)

    def write(self, state: State) -> State:
        """Write state.json."""
        write_file(self._state, json_bytes(state.to_document()))
        return state

    def point(self, links: Links) -> None:
        """Exchange the two links, one after the other."""
        for name, release in (("previous", links.previous), ("current", links.current)):
            target = None if release is None else f"{self._store.name}/{release}"
            point(self.path / name, target)

    def settle(self) -> None:
        """Wait until what can be seen here is on the storage, whoever put it there."""
        with storage(self.path):
            sync_folder(self._store)
            sync_folder(self.path)
            if not self._state.exists():  # nobody has come as far as to write it: all may be new
                for parent in list(self.path.parents)[:3]:
                    sync_folder(parent)

    def remove(self, names: Sequence[str]) -> None:
        """Remove releases. Needs no free space."""
        for name in names:
            with storage(self.release(name)):
                # Half a release is never seen under its name.
                self.release(name).rename(self._store / f".{name}.old")
        if names:
            with storage(self._store):
                sync_folder(self._store)
        self.sweep()

    def sweep(self) -> None:
        """Remove what was being written, or removed, when somebody was killed."""
        for folder in (self.path, self._store):
            for path in list(folder.glob(".*")):
                with storage(path):
                    is_folder = path.is_dir() and not path.is_symlink()
                    shutil.rmtree(path) if is_folder else path.unlink()
