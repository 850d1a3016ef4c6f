"""
What a board says of itself before anything of ours is on it.

Callers see SCRIPT (one shell program that needs sh and, if there is one, python3), and Board and
parse: what it printed. Hidden here: banners and noise around the answer, and boards that answer
nonsense. Nothing here talks to a board; what fits to it is judged in `fitting`.
"""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import (
    BadFile,
    DeviceError,
    EdgeExitError,
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
