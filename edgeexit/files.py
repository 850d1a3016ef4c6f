"""
Read TOML, JSON and npz with errors that name file and key; write durably, whole or not at all.

Callers see Table (typed getters over a parsed document), Arrays (typed getters over an npz),
and the writers. Hidden here: duplicate keys and NaN are refused in JSON, no pickle is ever
loaded, an npz's headers are checked before memory is taken for it, and a new file or folder
appears by rename after fsync.
"""

import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from edgeexit.errors import (
    BadFile,
    EdgeExitError,
    StorageError,
    Unsupported,
    UsageError,
    from_os_error,
    storage,
)

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 256 << 20
MAX_ARRAY_BYTES = 8 << 30


def read_bytes(path: Path, *, limit_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of *path*, as open_file; BadFile if it is larger than the limit."""
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit_bytes:
                raise BadFile(f"{path}: {size} bytes, expected at most {limit_bytes}")
            return file.read()
        except OSError as error:
            raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error


def open_file(path: Path) -> IO[bytes]:
    """
    The plain file *path*, opened for reading.

    UsageError if it is absent or a folder, pipe or device, StorageError if it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            # A pipe that nobody writes to would hang, /dev/zero never ends.
            raise UsageError(
                f"{path}: is a pipe or device, expected a plain file",
                hint="save it to a file first; only edgeexit run reads frames from -",
            )
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, expected a file") from error
    except OSError as error:
        refusal = from_os_error(error, path)
        if isinstance(refusal, UsageError):
            raise refusal from error
        raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error


def digest_of(data: bytes) -> str:
    """SHA-256 of *data* in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of the file *path* in hexadecimal; errors as open_file."""
    found = hashlib.sha256()
    with open_file(path) as file:
        try:
            while part := file.read(1 << 20):
                found.update(part)
            return found.hexdigest()
        except OSError as error:
            raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error


class Table:
    """
    A parsed TOML or JSON object that remembers where it came from.

    Errors are BadFile and name file and key: "set.toml: preprocess.size: missing".
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def _place(self, key: str) -> str:
        return f"{self.where}: {key}" if ": " not in self.where else f"{self.where}.{key}"

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: type[T]) -> T:
        """The value of *key*, which must be there and be a *kind* (an integer passes as float)."""
        place = self._place(key)
        if key not in self.values:
            raise BadFile(f"{place}: missing")
        value = self.values[key]
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise BadFile(f"{place}: {_short(value)} is too large a number") from None
        if type(value) is not kind:
            raise BadFile(f"{place}: expected {kind.__name__}, found {_short(value)}")
        return value

    def find(self, key: str, kind: type[T], default: T) -> T:
        """Like get, but *default* if *key* is absent."""
        return self.get(key, kind) if key in self.values else default

    def list_of(self, key: str, kind: type[T], *, length: int | None = None) -> list[T]:
        """The list at *key*, every item a *kind*; exactly *length* items if that is given."""
        place = self._place(key)
        items = Table({str(i): v for i, v in enumerate(self.get(key, list))}, place)
        if length is not None and len(items.values) != length:
            raise BadFile(f"{place}: expected {length} items, found {len(items.values)}")
        return [items.get(index, kind) for index in items.values]

    def table(self, key: str) -> "Table":
        """The object at *key*."""
        return Table(self.get(key, dict), self._place(key))

    def tables(self, key: str) -> "list[Table]":
        """The list of objects at *key*."""
        place = self._place(key)
        return [Table(v, f"{place}[{i}]") for i, v in enumerate(self.list_of(key, dict))]

    def only(self, *known: str) -> None:
        """Refuse keys that are not *known*: a misspelt key must not pass unseen."""
        for key in self.values:
            if key not in known:
                raise BadFile(
                    f"{self._place(key)}: unknown key, expected one of {', '.join(known)}"
                )

    def expect_format(self, *supported: int) -> int:
        """The document's format number, which must be one of *supported*."""
        number = self.get("format", int)
        if number not in supported:
            wanted = " or ".join(map(str, supported))
            raise BadFile(
                f"{self._place('format')}: found {number}, this version reads {wanted}",
                hint="made by a newer edgeexit? upgrade, or make the file again",
            )
        return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} twice in one object")
        seen[key] = value
    return seen


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def parse_json(data: bytes, where: str) -> Table:
    """One JSON object. Duplicate keys, NaN, Infinity, 1e999 and bad UTF-8 are BadFile."""
    try:
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadFile(f"{where}: expected a JSON object, found {_short(values)}")
    return Table(values, where)


def read_json(path: Path) -> Table:
    """The JSON object in *path*."""
    return parse_json(read_bytes(path), str(path))


def read_toml(path: Path) -> Table:
    """The TOML document in *path*."""
    try:
        return Table(tomllib.loads(read_bytes(path).decode("utf-8")), str(path))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not valid TOML: {error}") from error


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a machine-written JSON file: indented, key order kept, no NaN."""
    return encoded_json(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def encoded_json(text: str) -> bytes:
    """
    JSON *text* as UTF-8, whatever the locale.

    A file name's bytes that are no UTF-8 (lone surrogates in Python) become JSON's own escapes.
    """
    return text.encode(errors="backslashreplace")


class Arrays:
    """The arrays of one npz file, read without pickle, with errors that name file and array."""

    def __init__(self, arrays: Mapping[str, Any], where: str) -> None:
        self._arrays, self.where = arrays, where

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def names(self) -> list[str]:
        """The arrays' names, in file order."""
        return list(self._arrays)

    def get(self, name: str, *, kinds: str | None = None, ndim: int | None = None) -> Any:
        """
        The ndarray *name*.

        *kinds* are numpy kind letters ("iu" any integer, "f" float, "U" text), *ndim* the
        number of axes. Anything else is BadFile.
        """
        if name not in self._arrays:
            have = ", ".join(self._arrays) or "nothing"
            raise BadFile(f"{self.where}: array {name!r} is missing (has: {have})")
        array = self._arrays[name]
        if kinds is not None and array.dtype.kind not in kinds:
            raise BadFile(f"{self.where}: {name}: unexpected dtype {array.dtype}")
        if ndim is not None and array.ndim != ndim:
            raise BadFile(f"{self.where}: {name}: expected {ndim} axes, found shape {array.shape}")
        return array


def parse_npz(data: bytes, where: str) -> Arrays:
    """The arrays in the bytes of an npz file; object arrays, bombs and truncation are BadFile."""
    import numpy as np

    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                _check_entry(entry, name in arrays, where)
                with archive.open(entry) as member:
                    _check_header(member, entry.file_size, f"{where}: {entry.filename}")
                with archive.open(entry) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except EdgeExitError:
        raise
    except Exception as error:
        # The one door to zipfile's and numpy's parsers: hostile bytes raise almost anything.
        raise BadFile(
            f"{where}: not a sound npz file: {error}",
            hint="write it with numpy.savez; pickled (object) arrays are not read",
        ) from error
    return Arrays(arrays, where)


def parse_npy(data: bytes, where: str) -> Any:
    """The array in the bytes of an npy file; objects, forged sizes and truncation are BadFile."""
    import numpy as np

    try:
        _check_header(io.BytesIO(data), len(data), where)
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except EdgeExitError:
        raise
    except Exception as error:
        raise BadFile(f"{where}: not a sound .npy file: {error}") from error


def _check_entry(entry: zipfile.ZipInfo, is_known: bool, where: str) -> None:
    if is_known:
        raise BadFile(f"{where}: {entry.filename} stands twice")
    if entry.file_size > MAX_ARRAY_BYTES:
        raise BadFile(f"{where}: {entry.filename}: {entry.file_size} bytes unpacked")


def _check_header(member: Any, size_bytes: int, where: str) -> None:
    # A forged header may claim petabytes: compare it with the entry's size before reading.
    from numpy.lib import format as npy

    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise BadFile(f"{where}: npy version {version}, expected 1.0 or 2.0")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    count = 1
    for length in shape:
        count *= int(length)
    if dtype.hasobject:
        raise BadFile(
            f"{where}: holds pickled objects, expected plain numbers",
            hint="write it with numpy.savez from arrays of numbers or text",
        )
    # Numbers of no bytes at all (dtype V0, U0) could claim any count.
    if count * max(1, dtype.itemsize) > size_bytes:
        raise BadFile(f"{where}: shape {shape} does not fit into {size_bytes} bytes")


def read_npz(path: Path, *, limit_bytes: int = MAX_ARRAY_BYTES) -> Arrays:
    """The arrays of the npz file *path*."""
    return parse_npz(read_bytes(path, limit_bytes=limit_bytes), str(path))


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """The bytes of a compressed npz; equal arrays give equal bytes (entries carry no time)."""
    import numpy as np

    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise Unsupported(f"array {name!r} holds objects, expected numbers or text")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))
    return buffer.getvalue()


def check_output(path: Path, *inputs: Path | str | None) -> None:
    """
    Refuse *path* before hours go into what shall be written there and to its state file.

    UsageError if it is no name of a file, or if writing would replace one of *inputs*;
    StorageError if the folder takes no file.
    """
    if not path.name or path.is_dir():
        raise UsageError(f"{path}: is a folder, expected a file", hint="name a file with -o")
    _refuse_device(path)
    state = path.with_name(path.name + ".state")
    for other in (Path(name) for name in inputs if name):
        for mine in (path, state):
            if mine.exists() and other.exists() and mine.samefile(other):
                raise UsageError(
                    f"{mine}: is what is read here, and would be overwritten",
                    hint="name another file with -o",
                )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with (
        storage(path),
        tempfile.NamedTemporaryFile(prefix=f".{state.name}.", suffix=".part", dir=folder),
    ):
        pass


def _refuse_device(path: Path) -> None:
    # A rename would put a plain file in the place of /dev/null.
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no plain file, expected a file", hint="name a file with -o")


def write_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """
    Write *path* durably: temporary neighbour, fsync, rename, fsync of the folder.

    A symbolic link is followed; UsageError for a folder, pipe or device. The file gets *mode*
    less the umask.
    """
    with storage(path):
        _refuse_device(path)
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode & ~_umask())
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path, *, keep: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """
    Yield a temporary folder that becomes *path* when the block ends well, else vanishes.

    An existing folder at *path* is swapped out and removed after the new one stands; *keep*
    (old, new) may carry things over before the swap.
    """
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        with storage(path):
            if keep is not None and path.is_dir():
                keep(path, temporary)
            temporary.chmod(0o777 & ~_umask())
            for child in sorted(temporary.rglob("*")):
                _sync(child)
            sync_folder(temporary)
            old = None
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
            temporary.rename(path)
            sync_folder(path.parent)
            if old is not None:
                is_folder = old.is_dir() and not old.is_symlink()
                shutil.rmtree(old) if is_folder else old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def point(path: Path, target: str | None) -> None:
    """
    Make *path* a symbolic link to *target*, durably: it is the old one or the new one at any time.

    None removes it.
    """
    with storage(path):
        if target is None:
            path.unlink(missing_ok=True)
        else:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
            temporary.symlink_to(target)
            try:
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder *path* are on the storage."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
