"""
What a board says of itself before anything of ours is on it, and what can be put on it.

Callers see SCRIPT (one shell program that needs sh and, if there is one, python3), Board (what it
printed) and plan (which Python, which runtime, which wheels; or plainly why nothing fits).
Hidden here: banners and noise around the answer, boards that answer nonsense, and the table of
what the runtimes' wheels were built for. Nothing here talks to a board.
"""

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import (
    BadFile,
    DeviceError,
    EdgeExitError,
    StorageError,
    Unsupported,
    printable,
)
from edgeexit.files import Table, parse_json

BEGIN, END = "@edgeexit-probe-1", "@edgeexit-probe-end"
_MOST_CHARS, _MOST_PYTHONS, _SHOWN = 256_000, 16, 100

# Python 2 must be able to read this far; no single quotes, it stands within them.
_PYTHON = """
import json, os, struct, sys
def line(path, *heads):
    try:
        for text in open(path, errors="replace"):
            for head in heads:
                if text.lower().startswith(head):
                    return text.split(":", 1)[1].strip()[:2000]
    except Exception:
        pass
def has(name):
    try:
        import importlib.util
        return importlib.util.find_spec(name) is not None
    except Exception:
        return False
def version(name):
    try:
        from importlib import metadata
        return metadata.version(name)
    except Exception:
        return None
said = {
    "path": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "version": list(sys.version_info[:3]),
    "implementation": getattr(getattr(sys, "implementation", None), "name", "?"),
    "flags": getattr(sys, "abiflags", ""),
    "bits": 8 * struct.calcsize("P"),
    "venv": has("venv"),
    "system": {},
}
for name in ("numpy", "pillow", "psutil", "picamera2"):
    found = version(name)
    if found:
        said["system"][name] = found
try:
    said["libc"] = os.confstr("CS_GNU_LIBC_VERSION")
except Exception:
    said["libc"] = None
try:
    room = os.statvfs(sys.argv[1])
    said["free_bytes"] = room.f_bavail * room.f_frsize
    said["files"] = room.f_files
    said["free_files"] = room.f_favail
except Exception:
    pass
said["memory"] = line("/proc/meminfo", "memtotal")
said["features"] = line("/proc/cpuinfo", "features", "flags")
print("python=" + json.dumps(said))
"""

# POSIX sh. It changes nothing but for one file that it makes, runs and removes again.
SCRIPT = (
    f"""\
echo; echo "{BEGIN}"
say() {{ printf '%s=%s\\n' "$1" "$(printf '%s' "$2" | tr '\\n\\r' '  ')"; }}
say system "$(uname -s 2>/dev/null)"
say machine "$(uname -m 2>/dev/null)"
say os "$(sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2>/dev/null)"
say clock "$(date -u +%s 2>/dev/null)"
home=${{EDGEEXIT_HOME:-$HOME/.local/share/edgeexit}}
say home "$home"
place=$home
while [ ! -d "$place" ]; do
  case $place in */*) up=${{place%/*}} ;; *) up=. ;; esac
  place=${{up:-/}}
done
say place "$place"
trial=$place/.edgeexit-probe-$$
why=$( {{ printf '#!/bin/sh\\nexit 42\\n' > "$trial" && chmod 700 "$trial"; }} 2>&1 ) \
  && say writable yes || say writable "no $why"
[ -f "$trial" ] && {{ "$trial" >/dev/null 2>&1; say runs $?; }}
rm -f "$trial" 2>/dev/null
say current "$(cat "$home/env/current/setup.json" 2>/dev/null | tr -d '\\n')"
seen=:
for name in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
  found=$(command -v "$name" 2>/dev/null) || continue
  real=$(readlink -f "$found" 2>/dev/null) || real=$found
  case $seen in *":$real:"*) continue ;; esac
  seen=$seen$real:
  "$found" -I -c '"""
    + _PYTHON
    + f"""' "$place" 2>/dev/null </dev/null
done
echo "{END}"
"""
)


@dataclass(frozen=True, kw_only=True)
class Python:
    """
    One Python of a board: *libc* as (2, 36), None if it is not glibc; *bits* of its pointers.

    *system* holds the versions of those packages that an environment with the system's packages
    would see; *has_venv* tells if it can make environments at all.
    """

    path: str = "/usr/bin/python3"
    version: tuple[int, int, int] = (3, 11, 2)
    implementation: str = "cpython"
    flags: str = ""
    bits: int = 64
    libc: tuple[int, int] | None = (2, 36)
    has_venv: bool = True
    system: Mapping[str, str] = field(default_factory=dict)

    @property
    def minor(self) -> str:
        """The version as in "3.11"."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True, kw_only=True)
class Board:
    """
    What a board says of itself; None where it does not say.

    *machine* is the kernel's word for the processor, *home* the folder that will be ours, below
    which *place* is what exists already. *refusal* is what the system said when a file was made
    there (None: it was made), *can_run* whether programs there may be run. *clock_s* counts from
    1970. *current* is the setup.json of the environment in use.
    """

    system: str = "Linux"
    machine: str = "aarch64"
    os: str = "an unnamed system"
    clock_s: float | None = None
    home: str = "/home/pi/.local/share/edgeexit"
    place: str = "/home/pi"
    refusal: str | None = None
    can_run: bool = True
    free_bytes: int | None = None
    free_files: int | None = None
    memory_mb: float | None = None
    features: frozenset[str] = frozenset()
    pythons: tuple[Python, ...] = (Python(),)
    current: Mapping[str, Any] | None = None


# ---------------------------------------------------------------- reading the answer


def parse(text: str) -> Board:
    """The Board in what SCRIPT printed, noise around it skipped; DeviceError if it is none."""
    text = text[:_MOST_CHARS]
    _, begin, rest = text.partition(f"\n{BEGIN}")
    body, end, _ = rest.partition(f"\n{END}")
    if not begin or not end:
        last = printable(" ".join(text.split())[-_SHOWN:])
        raise DeviceError(
            f"the board does not answer as a Linux shell would: {last or 'it said nothing'}",
            hint="does `ssh HOST uname -a` print one line? edgeexit needs sh on the board",
        )
    said: dict[str, str] = {}
    pythons: list[Python] = []
    facts: dict[str, Any] = {}
    for line in body.splitlines():
        key, equals, value = line.partition("=")
        if key == "python" and len(pythons) < _MOST_PYTHONS:
            found = _python(value)
            if found is not None:
                pythons.append(found[0])
                facts = facts or found[1]
        elif equals:
            said.setdefault(key, value.strip())
    return Board(
        system=_shown(said.get("system", "")) or "?",
        machine=_shown(said.get("machine", "")) or "?",
        os=_shown(said.get("os", "").strip("\"'")) or "an unnamed system",
        clock_s=float(said["clock"]) if re.fullmatch(r"\d{1,12}", said.get("clock", "")) else None,
        home=posixpath.normpath(said["home"]) if said.get("home") else "",
        place=_shown(said.get("place", "")),
        refusal=_refusal(said.get("writable", "")),
        can_run=said.get("runs") == "42",
        free_bytes=_count(facts.get("free_bytes")),
        # File systems without a fixed number of files (btrfs) tell 0 of 0.
        free_files=_count(facts.get("free_files")) if facts.get("files") else None,
        memory_mb=_megabytes(facts.get("memory")),
        features=frozenset(str(facts.get("features") or "").split()[:200]),
        pythons=tuple(pythons),
        current=_document(said.get("current", "")),
    )


def _shown(text: str) -> str:
    return printable(" ".join(text[: 4 * _SHOWN].split()))[:_SHOWN]


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def _megabytes(value: object) -> float | None:
    match = re.fullmatch(r"(\d{1,12}) kB", str(value))
    return int(match[1]) / 1024 if match else None


def _refusal(said: str) -> str | None:
    if said == "yes":
        return None
    # "sh: 12: cannot create /x/.edgeexit-probe-1: Read-only file system"
    return _shown(said.removeprefix("no").rpartition(":")[2]) or "it cannot be written"


def _document(text: str) -> Mapping[str, Any] | None:
    try:
        return parse_json(text.encode(), "setup.json").values if text else None
    except (BadFile, UnicodeError):
        return None


def _python(text: str) -> tuple[Python, dict[str, Any]] | None:
    """One Python and what it told of the machine; None if the line is not what ours prints."""
    try:
        table = parse_json(text.encode(), "python")
        version = table.list_of("version", int, length=3)
        system = {k: _shown(v) for k, v in table.get("system", dict).items() if type(v) is str}
        path = table.get("path", str)
        if not path.startswith("/") or not path.isprintable() or len(path) > 1000:
            return None
        python = Python(
            path=path,
            version=(version[0], version[1], version[2]),
            implementation=_shown(table.get("implementation", str)),
            flags=_shown(table.get("flags", str)),
            bits=table.get("bits", int),
            libc=_libc(table),
            has_venv=table.get("venv", bool),
            system=system,
        )
    except (EdgeExitError, UnicodeError):
        return None
    return python, dict(table.values)


def _libc(table: Table) -> tuple[int, int] | None:
    match = re.fullmatch(r"glibc (\d{1,3})\.(\d{1,3}).*", str(table.values.get("libc")))
    return (int(match[1]), int(match[2])) if match else None


# ---------------------------------------------------------------- what fits


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """
    One TFLite runtime and what its wheels were built for (as on PyPI, by their tags).

    *machines* maps the kernel's word to the wheels' one. *borrowed* are packages that no wheel
    exists for: they must be the system's own.
    """

    name: str
    requirement: str
    machines: Mapping[str, str]
    bits: int
    pythons: tuple[tuple[int, int], tuple[int, int]]
    libc: tuple[int, int]
    numpy: str
    borrowed: tuple[str, ...] = ()


# Best first. edgeexit itself asks for Python 3.11.
RUNTIMES = (
    Runtime(
        name="ai-edge-litert",
        requirement="ai-edge-litert>=2.1,<2.4",
        machines={"aarch64": "aarch64", "x86_64": "x86_64"},
        bits=64,
        pythons=((3, 11), (3, 14)),
        libc=(2, 27),
        numpy="numpy>=1.24",
    ),
    # The last one with 32-bit wheels; PyPI has neither numpy, pillow nor psutil for armv7l.
    Runtime(
        name="tflite-runtime",
        requirement="tflite-runtime==2.14.0",
        machines={"aarch64": "armv7l", "armv7l": "armv7l", "armv8l": "armv7l"},
        bits=32,
        pythons=((3, 11), (3, 11)),
        libc=(2, 34),
        numpy="numpy>=1.24,<2",
        borrowed=("numpy", "pillow", "psutil"),
    ),
)
_APT = {"numpy": "python3-numpy", "pillow": "python3-pil", "psutil": "python3-psutil"}
_FEATURES = {"aarch64": "asimd", "armv7l": "neon", "x86_64": "sse4_1"}
_64 = "install a 64-bit system (Raspberry Pi OS 64-bit, bookworm or newer)"
_OLD = "install a newer system (Raspberry Pi OS bookworm has Python 3.11, trixie 3.13)"
# Packed and unpacked wheels, side by side, and room to spare (measured: 38 MB and 122 MB).
NEEDED_BYTES, NEEDED_FILES = 300_000_000, 6000
# No board's clock is right that is further away from this machine's.
_CLOCK_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What to put on a board: *machine* and *libc* as wheels spell them, *requirements* as pip does.

    The environment sees the system's packages if *sees_system*; those in *borrowed* are only
    there. *notes* are told to the user.
    """

    python: Python
    runtime: str
    machine: str
    libc: tuple[int, int]
    requirements: tuple[str, ...]
    borrowed: tuple[str, ...] = ()
    sees_system: bool = False
    notes: tuple[str, ...] = ()


def plan(board: Board, *, camera: bool = False, now_s: float | None = None) -> Plan:
    """
    What fits to *board*: the best runtime, and the first of its Pythons that this one takes.

    *camera*: the environment sees the system's packages, for picamera2. *now_s* is this machine's
    clock. Unsupported if nothing fits, StorageError if its folder takes nothing, each with the
    step that mends it.
    """
    if board.system != "Linux":
        raise Unsupported(f"{board.system}: boards are Linux", hint="run Linux on it")
    if not board.pythons:
        raise Unsupported(
            f"no Python 3 on this board ({board.os})",
            hint="sudo apt install -y python3, on the board",
        )
    reasons: list[_Misfit] = []
    for runtime in RUNTIMES:
        for python in board.pythons:
            found = _fits(board, python, runtime)
            if found is None:
                _check_folder(board)
                return _planned(board, python, runtime, camera=camera, now_s=now_s)
            reasons.append(found)
    # The nearest miss says most: what passed most of the tests.
    raise max(reasons, key=lambda reason: reason.passed)


class _Misfit(Unsupported):
    """Why a Python of a board does not take a runtime, and how many tests it *passed* before."""

    def __init__(self, passed: int, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.passed = passed


def _fits(board: Board, python: Python, runtime: Runtime) -> _Misfit | None:
    for passed, test in enumerate(_TESTS):
        told = test(board, python, runtime)
        if told is not None:
            return _Misfit(passed, *told)
    return None


Told = tuple[str, str] | None


def _processor(board: Board, python: Python, runtime: Runtime) -> Told:
    if board.machine in runtime.machines:
        return None
    return f"no runtime is built for {board.machine}", "take an aarch64 or x86_64 board"


def _bits(board: Board, python: Python, runtime: Runtime) -> Told:
    if python.bits == runtime.bits:
        return None
    if python.bits == 32 and board.machine in ("aarch64", "x86_64"):
        return f"32-bit programs on a 64-bit kernel ({board.os})", _64
    return f"a {python.bits}-bit Python on {board.machine}", _64


def _libc_fits(board: Board, python: Python, runtime: Runtime) -> Told:
    wanted = f"{runtime.name} needs glibc {runtime.libc[0]}.{runtime.libc[1]}"
    if python.libc is None:
        return (
            f"{board.os} has no glibc (musl?); {wanted}",
            "install a glibc system (Raspberry Pi OS, Debian, Ubuntu, Armbian)",
        )
    if python.libc < runtime.libc:
        return f"glibc {python.libc[0]}.{python.libc[1]}; {wanted}", _OLD
    return None


def _version(board: Board, python: Python, runtime: Runtime) -> Told:
    first, last = runtime.pythons
    said = f"{python.implementation} {'.'.join(map(str, python.version))}{python.flags}"
    wanted = ".".join(map(str, first))
    if last != first:
        wanted += f" to {'.'.join(map(str, last))}"
    if python.implementation != "cpython" or python.flags:
        return f"{said}; {runtime.name} needs plain CPython {wanted}", "sudo apt install -y python3"
    if first <= python.version[:2] <= last:
        return None
    if runtime.bits == 32:
        return f"32-bit Python {python.minor}; {runtime.name} has only {wanted}", _64
    too_old = python.version[:2] < first
    return f"Python {python.minor}; edgeexit needs {wanted}", _OLD if too_old else (
        f"install Python {'.'.join(map(str, last))} beside it"
    )


def _vectors(board: Board, python: Python, runtime: Runtime) -> Told:
    wanted = _FEATURES[runtime.machines[board.machine]]
    # Arm's 64-bit kernels list "asimd" for 32-bit programs as "neon".
    if not board.features or wanted in board.features or "asimd" in board.features:
        return None
    return f"the processor has no {wanted}, which {runtime.name} computes with", _64


def _environments(board: Board, python: Python, runtime: Runtime) -> Told:
    if python.has_venv:
        return None
    return f"{python.path} has no module venv", "sudo apt install -y python3-venv, on the board"


def _loans(board: Board, python: Python, runtime: Runtime) -> Told:
    absent = [name for name in runtime.borrowed if name not in python.system]
    if not absent:
        return None
    names = " ".join(_APT[name] for name in absent)
    return (
        f"a 32-bit system without {', '.join(absent)}, of which no 32-bit wheels exist",
        f"sudo apt install -y {names}, on the board; or {_64}",
    )


_TESTS: tuple[Callable[[Board, Python, Runtime], Told], ...] = (
    _processor,
    _bits,
    _libc_fits,
    _version,
    _vectors,
    _environments,
    _loans,
)


def _check_folder(board: Board) -> None:
    """StorageError if the folder that will be ours takes nothing."""
    elsewhere = (
        "name a folder that can be written in EDGEEXIT_HOME on the board (in /etc/environment)"
    )
    home = board.home
    if not home.startswith("/") or not home.isprintable() or "/../" in f"{home}/":
        raise StorageError(f"{_shown(home) or 'HOME'}: is no absolute path", hint=elsewhere)
    full = "remove what is not needed (du -xh --max-depth=2 / shows what is large)"
    if board.refusal is not None:
        raise StorageError(
            f"{board.place}: cannot write: {board.refusal}",
            hint=full if "space" in board.refusal else elsewhere,
        )
    if not board.can_run:
        raise StorageError(
            f"{board.place}: programs there may not be run (mounted noexec?)", hint=elsewhere
        )
    if board.current is not None:
        return
    if board.free_bytes is not None and board.free_bytes < NEEDED_BYTES:
        raise StorageError(
            f"{home}: {board.free_bytes / 1e6:.0f} MB free, expected {NEEDED_BYTES / 1e6:.0f}",
            hint=f"{full}, or {elsewhere}",
        )
    if board.free_files is not None and board.free_files < NEEDED_FILES:
        raise StorageError(
            f"{home}: room for {board.free_files} more files, expected {NEEDED_FILES}", hint=full
        )


def _planned(
    board: Board, python: Python, runtime: Runtime, *, camera: bool, now_s: float | None
) -> Plan:
    numpy, notes = runtime.numpy, []
    if runtime is not RUNTIMES[0]:
        notes.append(f"{runtime.name}: no longer made, and computes int8 without XNNPACK")
    if camera:
        numpy = _numpy_of(python, numpy)
    if board.clock_s is not None and now_s is not None and abs(board.clock_s - now_s) > _CLOCK_S:
        days = (board.clock_s - now_s) / _CLOCK_S
        notes.append(
            f"the board's clock is {abs(days):.0f} days {'ahead' if days > 0 else 'behind'}: "
            "sudo timedatectl set-ntp true"
        )
    return Plan(
        python=python,
        runtime=runtime.name,
        machine=runtime.machines[board.machine],
        libc=python.libc or runtime.libc,
        requirements=(runtime.requirement, numpy),
        borrowed=runtime.borrowed,
        sees_system=camera or bool(runtime.borrowed),
        notes=tuple(notes),
    )


def _numpy_of(python: Python, numpy: str) -> str:
    """
    The numpy that works with the system's picamera2.

    Its helpers were compiled for the system's numpy: those for 1.x fail under 2.x with "numpy.dtype
    size changed", those for 2.x do not exist for Pythons that 1.x was made for.
    """
    if "picamera2" not in python.system:
        raise Unsupported(
            f"{python.path} has no picamera2, which --camera is for",
            hint="sudo apt install -y --no-install-recommends python3-picamera2, on the board",
        )
    is_new = python.system.get("numpy", "1").partition(".")[0] not in ("0", "1")
    return "numpy>=2" if is_new else "numpy>=1.24,<2"
