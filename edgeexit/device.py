"""
What a kind of board is, and which one this machine is.

Callers see Device, find_device, this_device and identify. A board is one TOML in devices/ (its
README holds the schema); this machine is the board whose pattern matches the firmware's model
text, else "host". Every fact carries its source and whether somebody read it there. Nothing here
says how fast a board is: that is measured.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from edgeexit import machine as machines
from edgeexit.errors import BadFile
from edgeexit.files import Table, read_toml
from edgeexit.machine import Machine
from edgeexit.names import data_folder, unknown

N = TypeVar("N", int, float)

HOST = "host"
NO_METER = "none"
# 1: groups of facts, one source each. 2: one source for each fact; what measuring needs.
FORMAT = 2
_CORES = re.compile(r"([1-9]\d{0,2})x (\S.*)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}")
_METER = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MOST_THREADS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """
    One thing that is known of a board: its *value*, where it comes from, and a *note* or "".

    *verified* says that somebody read the value in that source.
    """

    value: Any
    source: str
    verified: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Device:
    """
    One kind of board, as described by its TOML; what nobody stated is None or empty.

    *models* are shell patterns for the firmware's model text. *cores* lists kinds of cores in the
    order of their numbers ("4x Cortex-A55", then "4x Cortex-A76"). Watts are the whole board's at
    its supply: idle, with all cores busy, and what one more busy core adds. At *soft_limit_c* the
    firmware lowers the clock a little, at *throttle_c* for good. *meter* is the kind of energy
    sensor on the board, "none" if it has none. *pin* are the cores to measure on (empty: any) and
    *threads* how many to use unless told otherwise. *facts* holds the source of every value.
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
    core_w: float | None = None
    soft_limit_c: float | None = None
    throttle_c: float | None = None
    meter: str | None = None
    pin: tuple[int, ...] = ()
    threads: int = 1
    notes: tuple[str, ...] = ()
    facts: dict[str, Fact] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Table) -> "Device":
        """The device that *table* describes. BadFile if a key is missing, unknown or wrong."""
        table.expect_format(FORMAT)
        table.only(*("format", "name", "title", "models", "notes", "measure", "sources", "facts"))
        facts = _facts(table)
        values = {key: fact.value for key, fact in facts.items()}
        measure = table.table("measure") if "measure" in table else Table({}, table.where)
        measure.only("pin", "threads")
        device = cls(
            name=table.get("name", str),
            title=table.get("title", str),
            models=tuple(table.list_of("models", str)),
            notes=tuple(table.list_of("notes", str)) if "notes" in table else (),
            pin=tuple(measure.list_of("pin", int)) if "pin" in measure else (),
            threads=measure.find("threads", int, 1),
            facts=facts,
            **values,
        )
        _check(device, table.where)
        return device

    def matches(self, model: str) -> bool:
        """Whether the firmware's text *model* is one of this board's."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    @property
    def core_count(self) -> int | None:
        """How many cores the board has, all kinds together."""
        return sum(int(text.partition("x")[0]) for text in self.cores) or None

    @property
    def modelled_core_w(self) -> float | None:
        """
        Watts that one busy core adds: as stated, else the step from idle to busy by all cores.

        Of a board with two kinds of cores that is the mean of both kinds.
        """
        if self.core_w is not None:
            return self.core_w
        if self.idle_w is None or self.busy_w is None or self.core_count is None:
            return None
        return (self.busy_w - self.idle_w) / self.core_count

    @property
    def verified(self) -> int:
        """How many of the facts somebody read in their source."""
        return sum(fact.verified for fact in self.facts.values())

    def to_document(self) -> dict[str, Any]:
        """The device as a JSON object."""
        return {
            "name": self.name,
            "title": self.title,
            "models": list(self.models),
            "measure": {"pin": list(self.pin), "threads": self.threads},
            "facts": {
                key: {
                    "value": list(fact.value) if isinstance(fact.value, tuple) else fact.value,
                    "source": fact.source,
                    "verified": fact.verified,
                    "note": fact.note,
                }
                for key, fact in self.facts.items()
            },
            "notes": list(self.notes),
        }


# ---------------------------------------------------------------- reading a TOML


def _text(table: Table) -> str:
    return table.get("value", str)


def _texts(table: Table) -> tuple[str, ...]:
    return tuple(table.list_of("value", str))


def _cores(table: Table) -> tuple[str, ...]:
    kinds = _texts(table)
    for kind in kinds:
        if not _CORES.fullmatch(kind):
            raise BadFile(f"{table.where}.value: expected such as '4x Cortex-A72', found {kind!r}")
    return kinds


def _meter(table: Table) -> str:
    kind = _text(table)
    if not _METER.fullmatch(kind):
        raise BadFile(f"{table.where}.value: expected a kind of meter or 'none', found {kind!r}")
    return kind


def _positive(value: N, where: str) -> N:
    # Written so that a NaN, which TOML can spell, is refused too.
    if not 0 < value < 1e9:
        raise BadFile(f"{where}: expected a positive number, found {value}")
    return value


def _whole(table: Table) -> int:
    return _positive(table.get("value", int), f"{table.where}.value")


def _wholes(table: Table) -> tuple[int, ...]:
    return tuple(_positive(n, f"{table.where}.value") for n in table.list_of("value", int))


def _number(table: Table) -> float:
    return _positive(table.get("value", float), f"{table.where}.value")


_FACTS: dict[str, Callable[[Table], Any]] = {
    "soc": _text,
    "cores": _cores,
    "clock_mhz": _whole,
    "isa": _texts,
    "ram_mb": _wholes,
    "idle_w": _number,
    "busy_w": _number,
    "core_w": _number,
    "soft_limit_c": _number,
    "throttle_c": _number,
    "meter": _meter,
}


def _facts(table: Table) -> dict[str, Fact]:
    if "facts" not in table:
        return {}
    listed = table.table("facts")
    listed.only(*_FACTS)
    sources = table.table("sources") if "sources" in table else Table({}, table.where)
    facts = {}
    for key in listed.values:
        entry = listed.table(key)
        entry.only("value", "source", "verified", "note")
        value = _FACTS[key](entry)
        source = entry.get("source", str)
        if source not in sources:
            have = ", ".join(sources.values) or "none"
            raise BadFile(f"{entry.where}.source: {source!r} is not among [sources] (has: {have})")
        facts[key] = Fact(
            value=value,
            source=sources.get(source, str),
            verified=entry.get("verified", bool),
            note=entry.find("note", str, ""),
        )
    return facts


def _check(device: Device, where: str) -> None:
    # Profiles and policies are files that are called so.
    if not _NAME.fullmatch(device.name):
        raise BadFile(f"{where}: name: expected letters, digits, + . _ -, found {device.name!r}")
    if not 1 <= device.threads <= _MOST_THREADS:
        raise BadFile(f"{where}: measure.threads: expected 1 to {_MOST_THREADS}")
    cores = device.core_count
    if len(set(device.pin)) != len(device.pin) or any(
        n < 0 or (cores is not None and n >= cores) for n in device.pin
    ):
        raise BadFile(f"{where}: measure.pin: expected different numbers of cores, from 0")
    if device.idle_w is not None and device.busy_w is not None and device.busy_w <= device.idle_w:
        raise BadFile(f"{where}: facts.busy_w: expected more than idle_w, {device.idle_w}")


# ---------------------------------------------------------------- finding one


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Which device a machine is: by which *pattern* its *model* text was known, if by any."""

    name: str
    model: str | None
    pattern: str | None

    @property
    def why(self) -> str:
        """The reason, in words."""
        if self.model is None:
            return "this machine has no model text"
        if self.pattern is None:
            return f"no board's pattern matches its model text, {self.model!r}"
        return f"its model text, {self.model!r}, matches {self.pattern!r}"


def identify(machine: Machine | None = None) -> Identity:
    """Which known board *machine* (default: this machine) is, and why; "host" if none."""
    model = board_model(machines.this_machine() if machine is None else machine)
    if model is not None:
        for name in device_names():
            for pattern in find_device(name).models:
                if fnmatchcase(model, pattern):
                    return Identity(name=name, model=model, pattern=pattern)
    return Identity(name=HOST, model=model, pattern=None)


def this_device(machine: Machine | None = None) -> str:
    """The name of the device that *machine* (default: this machine) is, "host" if none."""
    return identify(machine).name


def board_model(machine: Machine) -> str | None:
    """The firmware's text for the board, such as "Raspberry Pi 4 Model B Rev 1.4"; a PC's name."""
    text = machine.line("proc/device-tree/model")
    if text is None:
        # Containers hide the device tree; a Pi's kernel says it here, too.
        found = re.search(r"^Model\s*: (.*\S)", machine.text("proc/cpuinfo") or "", re.MULTILINE)
        text = found[1] if found else None
    if text is None:
        maker = machine.line("sys/class/dmi/id/sys_vendor")
        product = machine.line("sys/class/dmi/id/product_name")
        text = " ".join(filter(None, [maker, product])) or None
    return text
