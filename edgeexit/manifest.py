"""
What a release consists of: every file with its length and digest, and a name made of them.

Callers see Manifest and Entry. Hidden here: which paths a hostile manifest may not name, and what
a folder may not hold besides its files (links, devices, anything that is not listed).
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from edgeexit.errors import BadFile, StorageError, UsageError, printable
from edgeexit.files import Table, digest_of

# 1: first version.
FORMAT = 1

# Where a release keeps its own manifest. Names with a dot in front are no part of a release.
RECORD = ".release.json"

MAX_FILES = 1024
MAX_BYTES = 2**31
_MAX_DEPTH = 4
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,120}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID_LETTERS = 16
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file: its path below the folder ("policies/rpi4.json"), its length and its SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """
    The files of a release, sorted by path.

    BadFile if a path leads anywhere but into the folder, stands twice, is hidden or no plain name,
    or if there are more than MAX_FILES files or MAX_BYTES bytes.
    """

    files: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.files) <= MAX_FILES:
            raise BadFile(f"manifest: {len(self.files)} files, expected 1 to {MAX_FILES}")
        for entry in self.files:
            parts = entry.path.split("/")
            if len(parts) > _MAX_DEPTH or not all(_NAME.fullmatch(part) for part in parts):
                raise BadFile(
                    f"manifest: {printable(entry.path[:80])!r} is not a plain path below a folder",
                    hint="letters, digits and _ . + - make up the names of a bundle's files",
                )
            if not _DIGEST.fullmatch(entry.sha256) or entry.size_bytes < 0:
                raise BadFile(f"manifest: {entry.path}: expected a digest and a length")
        # A folder that the board keeps on a memory stick may not tell a from A.
        names = [entry.path.casefold() for entry in self.files]
        folders = {name.casefold() for name in self.folders}
        if len({*names, *folders}) != len(names) + len(self.folders):
            raise BadFile("manifest: a path stands twice")
        if self.size_bytes > MAX_BYTES:
            raise BadFile(f"manifest: {self.size_bytes} bytes, expected at most {MAX_BYTES}")
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda e: e.path)))

    @cached_property
    def id(self) -> str:
        """The release's name: 16 letters of the SHA-256 over its sorted paths, sizes, digests."""
        lines = (f"{e.path}\0{e.size_bytes}\0{e.sha256}\n" for e in self.files)
        return digest_of("".join(lines).encode())[:_ID_LETTERS]

    @property
    def size_bytes(self) -> int:
        """The length of all files together."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def folders(self) -> set[str]:
        """The folders that the files lie in, besides the release's own."""
        parents = (str(p) for e in self.files for p in PurePosixPath(e.path).parents)
        return {parent for parent in parents if parent != "."}

    @classmethod
    def from_folder(cls, path: Path) -> "Manifest":
        """
        The manifest of the folder *path* as it is; hidden files are left out.

        UsageError if there is no such folder, BadFile for links, devices and odd names.
        """
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder")
        found = []
        for name, entry in _walk(path):
            if entry.is_file(follow_symlinks=False) and not _is_hidden(name):
                size_bytes, sha256 = digest_in(Path(entry.path))
                found.append(Entry(path=name, size_bytes=size_bytes, sha256=sha256))
                if len(found) > MAX_FILES:
                    raise BadFile(f"{path}: more than {MAX_FILES} files, expected a bundle")
        if not found:
            raise BadFile(f"{path}: no files in it")
        return cls(tuple(found))

    @classmethod
    def from_document(cls, table: Table) -> "Manifest":
        """Read what to_document wrote, or what somebody else did."""
        table.expect_format(FORMAT)
        table.only("format", "files")
        found = []
        for entry in table.tables("files"):
            entry.only("path", "size_bytes", "sha256")
            found.append(
                Entry(
                    path=entry.get("path", str),
                    size_bytes=entry.get("size_bytes", int),
                    sha256=entry.get("sha256", str),
                )
            )
        return cls(tuple(found))

    def to_document(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {
            "format": FORMAT,
            "files": [
                {"path": e.path, "size_bytes": e.size_bytes, "sha256": e.sha256} for e in self.files
            ],
        }

    def check_folder(self, path: Path) -> None:
        """BadFile unless *path* holds these files, to the byte, and nothing but its record."""
        hint = "deploy it again"
        expected = {entry.path: entry for entry in self.files}
        missing = {*expected, *self.folders}
        for name, entry in _walk(path):
            if name == RECORD:
                continue
            if name not in missing or entry.is_dir(follow_symlinks=False) != (name not in expected):
                raise BadFile(f"{path}: {printable(name)} does not belong there", hint=hint)
            missing.remove(name)
            # Lengths first: what was blown up to gigabytes need not be read.
            size_bytes = entry.stat(follow_symlinks=False).st_size
            if name in expected and size_bytes != expected[name].size_bytes:
                raise BadFile(f"{path}: {name} was altered", hint=hint)
        if missing:
            raise BadFile(f"{path}: {min(missing)} is missing", hint=hint)
        for name, wanted in expected.items():
            if digest_in(path / name) != (wanted.size_bytes, wanted.sha256):
                raise BadFile(f"{path}: {name} was altered", hint=hint)


def digest_in(path: Path, target_fd: int | None = None) -> tuple[int, str]:
    """
    Length and SHA-256 of the plain file *path*, copied to *target_fd* on the way.

    BadFile if it is no plain file, StorageError if it cannot be read.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise BadFile(f"{path}: is no plain file")
        found, size_bytes = hashlib.sha256(), 0
        while True:
            try:
                part = os.read(source, _CHUNK_BYTES)
            except OSError as error:
                raise _unreadable(path, error) from error
            if not part:
                return size_bytes, found.hexdigest()
            found.update(part)
            size_bytes += len(part)
            while target_fd is not None and part:
                part = part[os.write(target_fd, part) :]
    finally:
        os.close(source)


def _walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file and folder below *folder*; BadFile for whatever is neither."""
    waiting = [(folder, "")]
    while waiting:
        here, prefix = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise _unreadable(here, error) from error
        for entry in found:
            name = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if not is_folder and not entry.is_file(follow_symlinks=False):
                raise BadFile(f"{folder}: {printable(name)} is a link or a device")
            yield name, entry
            if is_folder and not _is_hidden(name):
                waiting.append((Path(entry.path), f"{name}/"))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _unreadable(path: Path, error: OSError) -> BadFile | StorageError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadFile(f"{path}: missing", hint="deploy it again")
    if error.errno == errno.ELOOP:
        return BadFile(f"{path}: is a link, expected a plain file")
    return StorageError(f"{path}: cannot read: {error.strerror or error}")
