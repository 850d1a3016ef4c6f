"""
What a kind of board is, which one this machine is, and how it feels just now.

Callers see find_device, this_device and environment. A board is one TOML in devices/ (its
README holds the schema); this machine is the board whose pattern matches the firmware's model
text, else "host". Everything is read below an injectable root, so that the files of a real
board can be replayed elsewhere. A file that is not there is a null in the environment, never
a guess.
"""

import os
import platform
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from edgeexit import __version__
from edgeexit.errors import BadFile
from edgeexit.files import Table, read_toml
from edgeexit.names import data_folder, unknown

N = TypeVar("N", int, float)

HOST = "host"
_ROOT = Path("/")
_MODEL = "proc/device-tree/model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """Where a group of facts comes from; *verified* says that somebody read it there."""

    source: str
    verified: bool


@dataclass(frozen=True, kw_only=True)
class Device:
    """
    One kind of board, as described by its TOML.

    *models* are shell patterns for the text in /proc/device-tree/model. Watts are the whole
    board's at its supply, idle and with all cores busy; None where nobody published them.
    *facts* says for each group (cpu, memory, power) where its values come from.
    """

    name: str
    title: str
    models: tuple[str, ...]
    soc: str | None = None
    cores: tuple[str, ...] = ()
    clock_mhz: int | None = None
    isa: tuple[str, ...] = ()
    ram_mb: tuple[int, ...] = ()
    idle_w: float | None = None
    busy_w: float | None = None
    facts: dict[str, Fact]

    @classmethod
    def from_table(cls, table: Table) -> "Device":
        """The device that *table* describes. BadFile if a key is missing, unknown or wrong."""
        table.only("format", "name", "title", "models", "cpu", "memory", "power")
        table.expect_format(1)
        facts: dict[str, Fact] = {}
        cpu, memory, power = (
            _group(table, "cpu", facts, "soc", "cores", "clock_mhz", "isa"),
            _group(table, "memory", facts, "ram_mb"),
            _group(table, "power", facts, "idle_w", "busy_w"),
        )
        return cls(
            name=table.get("name", str),
            title=table.get("title", str),
            models=tuple(table.list_of("models", str)),
            soc=cpu.get("soc", str) if cpu else None,
            cores=tuple(cpu.list_of("cores", str)) if cpu else (),
            clock_mhz=_positive(cpu, "clock_mhz", int) if cpu else None,
            isa=tuple(cpu.list_of("isa", str)) if cpu else (),
            ram_mb=tuple(memory.list_of("ram_mb", int)) if memory else (),
            idle_w=_positive(power, "idle_w", float) if power else None,
            busy_w=_positive(power, "busy_w", float) if power else None,
            facts=facts,
        )


def _group(table: Table, key: str, facts: dict[str, Fact], *known: str) -> Table | None:
    if key not in table:
        return None
    group = table.table(key)
    group.only(*known, "source", "verified")
    facts[key] = Fact(source=group.get("source", str), verified=group.get("verified", bool))
    return group


def _positive(table: Table, key: str, kind: type[N]) -> N:
    value = table.get(key, kind)
    # Written so that a NaN, which TOML can spell, is refused too.
    if not 0 < value < 1e9:
        raise BadFile(f"{table.where}.{key}: expected a positive number, found {value}")
    return value


def device_names() -> list[str]:
    """The names of all kinds of boards that edgeexit knows, sorted."""
    return sorted(path.stem for path in data_folder("devices").glob("*.toml"))


def find_device(name: str) -> Device:
    """
    The device called *name*, or described by the TOML file *name*.

    UsageError with the nearest name if there is none, BadFile if its description is wrong.
    """
    if name.endswith(".toml"):
        return Device.from_table(read_toml(Path(name)))
    known = device_names()
    if name not in known:
        raise unknown(name, known, "device")
    path = data_folder("devices") / f"{name}.toml"
    device = Device.from_table(read_toml(path))
    if device.name != name:
        raise BadFile(
            f"{path}: name: expected {name!r} as in the file's name, found {device.name!r}"
        )
    return device


def board_model(root: Path = _ROOT) -> str | None:
    """The firmware's text for this board's model, such as "Raspberry Pi 4 Model B Rev 1.4"."""
    # The kernel ends the text with a NUL.
    text = _text(root / _MODEL)
    return text.strip("\0 \n") if text else None


def this_device(root: Path = _ROOT) -> str:
    """The name of the device that this machine is: a known board's, else "host"."""
    model = board_model(root)
    if model is None:
        return HOST
    for name in device_names():
        if any(fnmatchcase(model, pattern) for pattern in find_device(name).models):
            return name
    return HOST


def environment(root: Path = _ROOT) -> dict[str, object]:
    """
    What this machine is and how it feels now, ready for JSON; null where it does not say.

    Keys: edgeexit, python, numpy, kernel, machine (versions and architecture), board, cpu,
    cores, cores_usable, governor, clock_mhz, temperature_c, load_1m, memory_total_mb,
    memory_available_mb.
    """
    import numpy as np

    cpuinfo = _pairs(root / "proc/cpuinfo")
    meminfo = _pairs(root / "proc/meminfo")
    policy = root / "sys/devices/system/cpu/cpufreq/policy0"
    clock_khz = _number(policy / "scaling_cur_freq")
    loads = (_text(root / "proc/loadavg") or "").split()
    return {
        "edgeexit": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "board": board_model(root),
        "cpu": cpuinfo.get("model name") or cpuinfo.get("CPU part"),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "governor": (_text(policy / "scaling_governor") or "").strip() or None,
        "clock_mhz": clock_khz / 1e3 if clock_khz is not None else _float(cpuinfo.get("cpu MHz")),
        "temperature_c": _temperature_c(root),
        "load_1m": _float(loads[0]) if loads else None,
        "memory_total_mb": _megabytes(meminfo.get("MemTotal")),
        "memory_available_mb": _megabytes(meminfo.get("MemAvailable")),
    }


def _temperature_c(root: Path) -> float | None:
    """The hottest zone: boards differ in which one is the processor's."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    readings = [value for value in map(_number, zones) if value is not None]
    return max(readings) / 1e3 if readings else None


def _text(path: Path) -> str | None:
    # Sensors vanish, refuse and time out; all of it means "does not say".
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    return _float(_text(path))


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e15 else None


def _megabytes(text: str | None) -> float | None:
    kilobytes = _float(text.split()[0]) if text and text.split() else None
    return None if kilobytes is None else round(kilobytes / 1024)


def _pairs(path: Path) -> dict[str, str]:
    """The first value of every "key : value" line."""
    pairs: dict[str, str] = {}
    for line in (_text(path) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs
