"""
Energy meters: what tells how much power a board, or a part of it, takes.

Callers see EnergyMeter, MeterInfo, Sample, open_meter and find_meters; check holds the test with
a known load, sysfs what several kinds share. Every other file of this folder is one kind of meter
(or a family of chips); METERS names them, and each offers

    open_meter(spec, machine, device) -> EnergyMeter
    find(machine, device) -> list[Found]

A foreign package adds kinds through the entry-point group "edgeexit.meters": an entry's name is
the kind, its object an open_meter. How a spec is spelt stands at parse_spec.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from edgeexit.device import Device
from edgeexit.errors import BadFile, DeviceError, EdgeExitError, UsageError
from edgeexit.files import Table
from edgeexit.machine import Machine
from edgeexit.names import load_attribute, unknown

LABELS = ("external", "partial", "modelled")
_INFO_KEYS = ("kind", "label", "instrument", "boundary", "rate_hz")
GROUP = "edgeexit.meters"
NONE = "none"
_MOST_CHARS = 4096
_WANDER = 0.3
_OPTION = re.compile(r",([A-Za-z_]+)=([^,]*)$")
_QUOTED = re.compile(r""":(["']).*\1""")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# Plain decimals only: an exponent could spell a number that takes all memory.
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{0,12})?|\.[0-9]{1,12}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """
    One reading: at_ns is time.monotonic_ns() in the middle of the reading, on this machine's clock.

    Exactly one of the two is set: power_mw (all rails of the meter together), or energy_mj, a
    counter that starts anywhere and never falls (wrap-around is the meter's business).
    """

    at_ns: int
    power_mw: float | None = None
    energy_mj: float | None = None

    def to_row(self) -> list[Any]:
        """The same as a JSON list."""
        return [self.at_ns, self.power_mw, self.energy_mj]

    @classmethod
    def from_row(cls, row: object) -> "Sample":
        """Read what to_row wrote, perhaps on another machine. DeviceError if it is no sample."""
        match row:
            case [int(at_ns), float() | int() as power_mw, None]:
                value, sample = power_mw, cls(at_ns=at_ns, power_mw=power_mw)
            case [int(at_ns), None, float() | int() as energy_mj]:
                value, sample = energy_mj, cls(at_ns=at_ns, energy_mj=energy_mj)
            case _:
                raise DeviceError(f"meter: expected a sample, found {repr(row)[:60]}")
        # Written so that NaN is refused, too.
        if not (abs(value) < 1e15 and abs(at_ns) < 1 << 62):
            raise DeviceError(f"meter: a sample says {repr(row)[:60]}")
        return sample


@dataclass(frozen=True, kw_only=True)
class MeterInfo:
    """
    What a meter is and sees; printed beside every joule.

    kind as in METERS. label: "external" (a sensor on the supply of the whole board), "partial"
    (some rails), "modelled" (computed, not measured). boundary says in words what is inside and
    what is not. rate_hz is how many samples a second to expect. details hold what else belongs
    into a profile (shunt, rails, chip, address, driver's belief, a model's source, ...), ready
    for JSON; details["warning"], if there, is one sentence that people must read.
    """

    kind: str
    label: str
    instrument: str
    boundary: str
    rate_hz: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {**{key: getattr(self, key) for key in _INFO_KEYS}, "details": dict(self.details)}

    @classmethod
    def from_document(cls, table: Table) -> "MeterInfo":
        """Read what to_document wrote. BadFile names what is wrong."""
        table.only(*_INFO_KEYS, "details")
        label, rate_hz = table.get("label", str), table.get("rate_hz", float)
        if label not in LABELS:
            raise BadFile(f"{table.where}: label: expected one of {', '.join(LABELS)}")
        if not 0 < rate_hz < 1e9:
            raise BadFile(f"{table.where}: rate_hz: expected samples a second, found {rate_hz}")
        return cls(
            kind=table.get("kind", str),
            label=label,
            instrument=table.get("instrument", str),
            boundary=table.get("boundary", str),
            rate_hz=rate_hz,
            details=table.table("details").values,
        )


class EnergyMeter(Protocol):
    """Hands out samples, one after another, at its own pace. One reader at a time."""

    @property
    def info(self) -> MeterInfo:
        """What this meter is."""

    def samples(self) -> Iterator[Sample]:
        """Samples as they come, without end. DeviceError when the sensor vanishes."""

    def close(self) -> None:
        """Give files, processes and connections back; may be called twice."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed spec: the *kind*, its *address* (None if there is none) and its *options*."""

    kind: str
    address: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        address = "" if self.address is None else f":{self.address}"
        return self.kind + address + "".join(f",{k}={v}" for k, v in self.options.items())

    def only(self, *known: str, address: bool = False) -> None:
        """Refuse options that are not *known*, and an address unless the kind takes one."""
        for key in self.options:
            if key not in known:
                raise unknown(key, known, f"option of the meter {self.kind}")
        if self.address is not None and not address:
            raise UsageError(f"meter {self}: {self.kind} takes no address", hint=_HINT)

    def number(self, key: str, low: str, high: str) -> Fraction | None:
        """The option *key* as an exact number from *low* to *high*; None if it is not given."""
        text = self.options.get(key)
        if text is None:
            return None
        if not _DECIMAL.fullmatch(text) or not Fraction(low) <= Fraction(text) <= Fraction(high):
            raise UsageError(
                f"meter {self}: {key}: expected a number from {low} to {high}, found {text!r}"
            )
        return Fraction(text)

    def rate_hz(self, default: float, high: str = "1000") -> float:
        """The option "rate", samples a second, or *default*."""
        stated = self.number("rate", "0.01", high)
        return default if stated is None else float(stated)

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        """The option *key*, which must be one of *known*."""
        word = self.options.get(key, default)
        if word not in known:
            raise unknown(word, known, f"{key} of the meter {self.kind}")
        return word


@dataclass(frozen=True, kw_only=True)
class Found:
    """A meter of this machine: *info* if *spec* opens it as it stands, else why not."""

    spec: str
    title: str
    info: MeterInfo | None = None
    reason: str | None = None


Factory = Callable[[Spec, Machine, Device], EnergyMeter]
Finder = Callable[[Machine, Device], list[Found]]

# Kind -> the module that opens it, imported when that kind is asked for.
_INA2XX = dict.fromkeys(
    ("ina219", "ina220", "ina226", "ina230", "ina231", "ina260", "ina228", "ina237", "ina238"),
    "edgeexit.meters.hwmon",
)
METERS: dict[str, str] = {
    **_INA2XX,
    "ina3221": "edgeexit.meters.ina3221",
    "jetson": "edgeexit.meters.jetson",
    "iio": "edgeexit.meters.iio",
    "pmic": "edgeexit.meters.pmic",
    "rapl": "edgeexit.meters.rapl",
    "battery": "edgeexit.meters.battery",
    "smbus": "edgeexit.meters.smbus",
    "command": "edgeexit.meters.command",
    "ssh": "edgeexit.meters.remote",
    "replay": "edgeexit.meters.replay",
    "modelled": "edgeexit.meters.modelled",
}
# Those whose address is free text, in which a comma is no mistake.
_FREE = ("command", "ssh", "replay")
# Those that can be looked for; the others exist once somebody names them.
_SOUGHT = ("hwmon", "ina3221", "jetson", "iio", "pmic", "rapl", "battery", "modelled")
_HINT = "KIND[:ADDRESS][,key=value...], such as ina219:0x40,shunt=0.1; see: edgeexit meters list"


def parse_spec(text: str) -> Spec:
    """
    What *text*, `KIND[:ADDRESS][,key=value...]`, spells. UsageError if it spells no meter.

    Options are taken off the right end as long as they read ",word=value"; the rest belongs to
    the address, so a program's arguments may hold commas (`command:read-it -a 1,2,unit=mW`). A
    program in quotes is taken as it stands, quotes removed. Everything after `ssh:` is the
    address, because the other host's spec has its own options.
    """
    if len(text) > _MOST_CHARS:
        raise UsageError(f"meter: {len(text)} characters, expected at most {_MOST_CHARS}")
    if not text.isprintable():
        raise UsageError(f"meter {text!r}: expected printable text", hint=_HINT)
    kind = re.split("[:,]", text, maxsplit=1)[0]
    if not _KIND.fullmatch(kind):
        raise UsageError(f"meter {text!r}: expected the name of a kind first", hint=_HINT)
    rest = text.removeprefix(kind)
    options: dict[str, str] = {}
    while kind != "ssh" and not _QUOTED.fullmatch(rest) and (match := _OPTION.search(rest)):
        key, value = match.groups()
        if key in options:
            raise UsageError(f"meter {text!r}: {key} stands twice")
        options[key] = value
        rest = rest[: match.start()]
    if rest and (not rest.startswith(":") or len(rest) == 1):
        raise UsageError(f"meter {text!r}: cannot read {rest!r}", hint=_HINT)
    address = rest[1:] or None
    if address and kind in _FREE:
        address = _unquoted(address, text)
    elif address and "," in address:
        wrong = address.split(",")[1]
        raise UsageError(f"meter {text!r}: expected key=value, found {wrong!r}", hint=_HINT)
    return Spec(kind=kind, address=address, options=dict(reversed(options.items())))


def _unquoted(address: str, text: str) -> str:
    quote = address[0]
    if quote not in "'\"":
        return address
    if len(address) < 3 or address[-1] != quote:
        raise UsageError(f"meter {text!r}: the quote {quote} is not closed", hint=_HINT)
    return address[1:-1]


def open_meter(spec: str, machine: Machine, device: Device) -> EnergyMeter:
    """
    The meter that *spec* names, ready to be read. The caller closes it.

    UsageError for a wrong spec or an unknown kind, DeviceError if the meter is not there or
    cannot be read. "none" is no meter: callers look for it first.
    """
    parsed = parse_spec(spec)
    if parsed.kind == NONE:
        raise UsageError("meter none: is no meter that could be opened", hint=_HINT)
    module = METERS.get(parsed.kind)
    if module is not None:
        return cast(Factory, load_attribute(f"{module}:open_meter", "meter"))(
            parsed, machine, device
        )
    foreign = _foreign()
    if parsed.kind not in foreign:
        raise unknown(parsed.kind, [*METERS, *foreign, NONE], "meter")
    entry = foreign[parsed.kind]
    try:
        return cast(Factory, entry.load())(parsed, machine, device)
    except EdgeExitError:
        raise
    except Exception as error:
        # The one door to other people's meters: what they raise is not ours to know.
        raise DeviceError(
            f"meter {parsed}: {entry.value} failed: {type(error).__name__}: {error}",
            hint="this kind comes from another package, through its entry point",
        ) from error


def find_meters(machine: Machine, device: Device) -> list[Found]:
    """What could be read on *machine*, best label first, with the reason where it cannot be."""
    found: list[Found] = []
    for name in _SOUGHT:
        found += cast(Finder, load_attribute(f"edgeexit.meters.{name}:find", "meter"))(
            machine, device
        )
    for kind, entry in _foreign().items():
        found.append(Found(spec=kind, title=f"{entry.value}, a plug-in", reason="open it to see"))
    return sorted(found, key=lambda f: LABELS.index(f.info.label) if f.info else len(LABELS))


def tried(spec: str, title: str, machine: Machine, device: Device) -> Found:
    """Open *spec* for a look and say what came of it."""
    try:
        meter = open_meter(spec, machine, device)
    except EdgeExitError as error:
        reason = str(error) if error.hint is None else f"{error} ({error.hint})"
        return Found(spec=spec, title=title, reason=reason)
    info = meter.info
    meter.close()
    return Found(spec=spec, title=title, info=info)


def _foreign() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in METERS}


def paced(
    read: Callable[[], float | None],
    rate_hz: float,
    *,
    is_counter: bool = False,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    sleep_s: Callable[[float], object] = time.sleep,
    wander: Callable[[], float] = random.random,
) -> Iterator[Sample]:
    """
    Samples of *read*, *rate_hz* a second, without end: milliwatts, or of a counter millijoules.

    The moments belong to a fixed grid, so that delays do not add up; one that is missed is left
    out, never caught up with. A reading that says None is left out, too. Each moment comes up to
    three tenths of a period late, as *wander* (0..1) says: calls whose length divides the period
    would otherwise be met at the same place every time.
    """
    period_ns = max(1, round(1e9 / rate_hz))
    start_ns = clock_ns()
    tick = 0
    while True:
        began_ns = clock_ns()
        value = read()
        at_ns = (began_ns + clock_ns()) // 2
        if value is not None:
            yield (
                Sample(at_ns=at_ns, energy_mj=value)
                if is_counter
                else Sample(at_ns=at_ns, power_mw=value)
            )
        now_ns = clock_ns()
        tick = max(tick + 1, -(-(now_ns - start_ns) // period_ns))
        late_ns = round(_WANDER * wander() * period_ns)
        sleep_s(max(0, start_ns + tick * period_ns + late_ns - now_ns) / 1e9)
