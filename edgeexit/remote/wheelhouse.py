"""
The wheels that a board gets: its runtime, what that needs, and edgeexit itself.

Callers see Target, Wheel, Wheelhouse and wheels_for. Hidden here: pip downloads on this machine
for another one, so that the board never touches the internet; a set once downloaded is kept below
the cache folder with the sha256 of every file, and the next board gets the same bytes; edgeexit's
own wheel is built from the checkout, or packed again from what its installation recorded.
"""

import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import edgeexit
from edgeexit.errors import (
    BadFile,
    DeviceError,
    EdgeExitError,
    StorageError,
    UsageError,
    printable,
    storage,
)
from edgeexit.files import digest_of, file_digest, json_bytes, new_folder, read_json

FORMAT = 1
# What unpacks wheels on the board, run from its own wheel there.
INSTALLER = "installer"
_INSTALLER_REQUIREMENT = "installer>=0.7,<2"
_OURS = "edgeexit"
_LIST = "wheels.json"
_TIMEOUT_S = 1800.0
_OLDEST_MINOR = 5
_OLD_TAGS = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
_DISCONNECTED = re.compile(
    r"connection|timed out|timeout|name or service|temporary failure|unreachable|ssl|proxy",
    re.IGNORECASE,
)
# The zip format's first day: equal files give equal wheels.
_DAY = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    What wheels are wanted for: CPython *python* ("3.11"), glibc *libc*, *machine* as in tags.

    *requirements* replace those of edgeexit that name the same package; packages in *borrowed*
    are on the board already and left out.
    """

    python: str
    machine: str
    libc: tuple[int, int]
    requirements: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()

    @property
    def platforms(self) -> list[str]:
        """The platform tags that the board takes, newest first."""
        minor = self.libc[1]
        tags = [f"manylinux_2_{n}_{self.machine}" for n in range(minor, _OLDEST_MINOR - 1, -1)]
        tags += [f"{name}_{self.machine}" for name, needed in _OLD_TAGS.items() if needed <= minor]
        return [*tags, f"linux_{self.machine}"]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One wheel on this machine; *name* is its file's name."""

    path: Path
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The file's name, which tells package, version and platform."""
        return self.path.name

    @property
    def package(self) -> str:
        """The package's name, normalized."""
        return _normal(self.name.partition("-")[0])

    @property
    def version(self) -> str:
        """The package's version."""
        return self.name.split("-")[1]


@dataclass(frozen=True, kw_only=True)
class Wheelhouse:
    """All wheels for one board: those to be *installed*, and the *installer* that does it."""

    installed: tuple[Wheel, ...]
    installer: Wheel

    @property
    def all(self) -> tuple[Wheel, ...]:
        """Every file that the board needs."""
        return (*self.installed, self.installer)

    def version(self, package: str) -> str | None:
        """The version of *package* in here, None if it is not."""
        return next((w.version for w in self.installed if w.package == _normal(package)), None)


def cache_folder() -> Path:
    """Where wheels are kept: $XDG_CACHE_HOME/edgeexit/wheels, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    home = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return home / "edgeexit" / "wheels"


def wheels_for(
    target: Target,
    *,
    source: Path | None = None,
    refresh: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> Wheelhouse:
    """
    The wheels for *target*, all of them on this machine.

    *source*: a folder of wheels to take instead of the registry. *refresh*: ask the registry for
    newer versions although a set is kept. *on_step* hears what is being done. DeviceError if the
    registry cannot be reached or has no such wheels, UsageError if *source* lacks one.
    """
    ours = own_wheel(on_step)
    wanted = _requirements(ours, target)
    listed = None if source is None else _listing(source)
    document = {
        "python": target.python,
        "platforms": target.platforms,
        "requirements": wanted,
        "source": listed,
    }
    folder = cache_folder() / digest_of(json_bytes(document))[:16]
    wheels = None if refresh else _kept(folder)
    if wheels is None:
        on_step(f"fetching wheels for Python {target.python} on {target.machine}")
        with new_folder(folder) as fresh:
            _download(target, wanted, source, fresh)
            _record(fresh, document)
        wheels = _kept(folder)
    if wheels is None:
        raise StorageError(f"{folder}: wheels do not stay as they were written")
    tools = [wheel for wheel in wheels if wheel.package == INSTALLER]
    rest = tuple(wheel for wheel in wheels if wheel.package != INSTALLER)
    return Wheelhouse(installed=(*rest, ours), installer=tools[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(ours: Wheel, target: Target) -> list[str]:
    """What edgeexit's own wheel asks for on a board, as *target* would have it."""
    with zipfile.ZipFile(ours.path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    asked = [
        line.partition(";")[0].strip()
        for line in metadata.get_all("Requires-Dist") or []
        if "extra ==" not in line
    ]
    replaced = {_package(line) for line in target.requirements}
    # Without a runtime of the target's own choice edgeexit's stays.
    if any("runtime" in name or "litert" in name for name in replaced):
        replaced.add("ai-edge-litert")
    kept = [line for line in asked if _package(line) not in replaced]
    wanted = [*kept, *target.requirements]
    borrowed = {_normal(name) for name in target.borrowed}
    return sorted([*(w for w in wanted if _package(w) not in borrowed), _INSTALLER_REQUIREMENT])


def _package(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return _normal(match[0] if match else requirement)


def _listing(source: Path) -> list[list[Any]]:
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder of wheels")
    return sorted([path.name, path.stat().st_size] for path in source.glob("*.whl"))


# ---------------------------------------------------------------- fetching, keeping


def _download(target: Target, wanted: Sequence[str], source: Path | None, folder: Path) -> None:
    version = target.python.replace(".", "")
    options = ["--only-binary", ":all:", "--implementation", "cp"]
    options += ["--python-version", target.python]
    for abi in (f"cp{version}", "abi3", "none"):
        options += ["--abi", abi]
    for platform in target.platforms:
        options += ["--platform", platform]
    if source is not None:
        options += ["--no-index", "--find-links", str(source.absolute())]
    if target.borrowed:
        # What is on the board already cannot be resolved here, and must not be fetched.
        options.append("--no-deps")
    _pip(["download", "--quiet", "--dest", str(folder), *options], wanted, source, target)


def _pip(
    arguments: Sequence[str], wanted: Sequence[str], source: Path | None, target: Target
) -> None:
    if find_spec("pip") is None:
        raise UsageError(
            f"no pip in {sys.prefix}, which fetches the board's wheels",
            hint="python3 -m ensurepip, or uv pip install pip",
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    command += wanted
    done = _run(command, "pip")
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.partition(":")[2].strip() for line in lines if line.startswith("ERROR:")]
    said = printable((errors or lines or ["it said nothing"])[0])[:300]
    by_hand = _by_hand(target, wanted)
    offline = f"where there is internet: {by_hand}; then edgeexit setup NAME --wheels DIR"
    if source is not None:
        raise UsageError(f"{source}: {said}", hint=f"add what is missing; {offline}")
    if any(_DISCONNECTED.search(line) for line in lines):
        raise DeviceError(f"the package registry cannot be reached: {said}", hint=offline)
    raise DeviceError(
        f"no wheels for Python {target.python} on {target.machine}, "
        f"glibc {target.libc[0]}.{target.libc[1]}: {said}",
        hint="does the registry that pip uses here have them? PyPI does",
    )


def _by_hand(target: Target, wanted: Sequence[str]) -> str:
    """The command that fills a folder for *source*, with the platforms that wheels are made for."""
    usual = [tag for tag in target.platforms if re.search(r"_2_(17|27|28|34)_|manylinux2014", tag)]
    words = ["pip", "download", "-d", "DIR", "--only-binary", ":all:"]
    words += ["--python-version", target.python]
    words += [word for tag in usual for word in ("--platform", tag)]
    words += ["--no-deps"] if target.borrowed else []
    return shlex.join([*words, *wanted])


def _run(
    command: Sequence[str], what: str, folder: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{what} still ran after {_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise DeviceError(f"{what} cannot be started: {error.strerror}") from error


def _record(folder: Path, document: dict[str, Any]) -> None:
    paths = sorted(folder.glob("*.whl"))
    if not any(_normal(path.name.partition("-")[0]) == INSTALLER for path in paths):
        raise DeviceError(f"pip left no wheel of {INSTALLER}")
    files = [
        {"name": p.name, "sha256": file_digest(p), "size_bytes": p.stat().st_size} for p in paths
    ]
    data = json_bytes({"format": FORMAT, **document, "files": files})
    with storage(folder):
        (folder / _LIST).write_bytes(data)


def _kept(folder: Path) -> tuple[Wheel, ...] | None:
    """The wheels kept in *folder*; None if there are none, or not as they were written."""
    try:
        table = read_json(folder / _LIST)
        table.expect_format(FORMAT)
        wheels = tuple(
            Wheel(
                path=folder / PurePosixPath(entry.get("name", str)).name,
                sha256=entry.get("sha256", str),
                size_bytes=entry.get("size_bytes", int),
            )
            for entry in table.tables("files")
        )
        is_whole = all(
            w.path.stat().st_size == w.size_bytes and file_digest(w.path) == w.sha256
            for w in wheels
        )
    except (EdgeExitError, OSError):
        return None
    return wheels if is_whole and any(w.package == INSTALLER for w in wheels) else None


# ---------------------------------------------------------------- edgeexit's own wheel


def own_wheel(on_step: Callable[[str], None] = lambda step: None) -> Wheel:
    """
    The wheel of the edgeexit that runs here: equal files give an equal wheel.

    BadFile if its installation was changed by hand, DeviceError if a checkout cannot be built.
    """
    package = Path(edgeexit.__file__).resolve().parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file():
        on_step("building edgeexit's wheel")
        return _keep(*_built(checkout))
    return _keep(*_packed(importlib.metadata.distribution(_OURS)))


def _keep(name: str, data: bytes) -> Wheel:
    sha256 = digest_of(data)
    path = cache_folder() / sha256[:16] / name
    if not path.is_file() or path.read_bytes() != data:
        with new_folder(path.parent) as folder, storage(path):
            (folder / name).write_bytes(data)
    return Wheel(path=path, sha256=sha256, size_bytes=len(data))


def _built(checkout: Path) -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="edgeexit-wheel-") as folder:
        if find_spec("hatchling") is not None:
            command = ["-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        else:
            command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, "."]
        done = _run([sys.executable, *command], command[1], checkout)
        found = sorted(Path(folder).glob(f"{_OURS}-*.whl"))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DeviceError(
                f"{checkout}: {command[1]} builds no wheel: {printable(last)[:300]}",
                hint="pip install hatchling",
            )
        return found[0].name, found[0].read_bytes()


def _packed(found: importlib.metadata.Distribution) -> tuple[str, bytes]:
    """The wheel that *found* was installed from, rebuilt from the files that it recorded."""
    buffer, rows = io.BytesIO(), []
    info = f"{_OURS}-{found.version}.dist-info"
    left_out = {
        f"{info}/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    }
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:

        def put(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name, _DAY)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)

        for path in sorted(found.files or [], key=str):
            name = str(path)
            # Scripts and the byte code are made again where the wheel is installed.
            if ".." in path.parts or "__pycache__" in path.parts or name in left_out:
                continue
            try:
                data = Path(str(path.locate())).read_bytes()
            except OSError as error:
                raise BadFile(
                    f"{name}: recorded for edgeexit, and cannot be read: {error.strerror}",
                    hint="pip install --force-reinstall edgeexit",
                ) from error
            sha256 = _recorded(data)
            if path.hash is not None and f"{path.hash.mode}={path.hash.value}" != sha256:
                raise BadFile(
                    f"{name}: is not as it was installed",
                    hint="pip install --force-reinstall edgeexit",
                )
            put(name, data)
            rows.append([name, sha256, str(len(data))])
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*rows, [f"{info}/RECORD", "", ""]])
        put(f"{info}/RECORD", record.getvalue().encode())
    if not any(name == f"{info}/METADATA" for name, *_ in rows):
        raise BadFile(
            "edgeexit's own files were not recorded when it was installed",
            hint="install it with pip, or run from a checkout",
        )
    return f"{_OURS}-{found.version}-py3-none-any.whl", buffer.getvalue()


def _recorded(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
    return f"sha256={digest.rstrip('=')}"
