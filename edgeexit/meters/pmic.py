"""
The power-management chip of a Raspberry Pi 5, Compute Module 5 or 500.

Hidden here: its readings come as text from the firmware, in which a rail's current and
voltage carry different indices and may be cut off.
"""

import fcntl
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from edgeexit.device import Device
from edgeexit.errors import DeviceError
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Spec, tried
from edgeexit.meters.sysfs import Polled

_KIND = "pmic"
_COMMAND = "pmic_read_adc"
# A sweep over all rails takes the firmware 23 ms.
_RATE_HZ, _MOST_HZ = 10.0, "40"
_MOST_MISSES = 10
_LINE = re.compile(
    r"([A-Z0-9_]{1,32})_([AV]) (current|volt)\([0-9]{1,3}\)=(-?[0-9]{1,6}\.[0-9]{1,12})([AV])"
)
_UNITS = {"A": "current", "V": "volt"}
_DOORS = ("dev/vcio_gencmd", "dev/vcio")
_HINT = "only a Raspberry Pi 5, CM5 or 500 measures its rails"

# One board, a USB-C power meter at its input, several loads.
INPUT_SLOPE = 1.1451
INPUT_OFFSET_MW = 587.9
INPUT_SOURCE = (
    "github.com/jfikar/RPi5-power: a line through one board's readings and those of a USB-C "
    "power meter at its input; other boards differ"
)


class Unsound(Exception):
    """A sweep's text is cut off or contradicts itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One reading: (amperes, volts) of each rail with both, volts of those with volts only."""

    rails: dict[str, tuple[Decimal, Decimal]]
    volts_only: dict[str, Decimal]

    @property
    def power_mw(self) -> float:
        """The sum over all rails, rounded once."""
        return float(1000 * sum(amperes * volts for amperes, volts in self.rails.values()))


def parse_sweep(text: str) -> Sweep:
    """
    What `vcgencmd pmic_read_adc` printed. DeviceError if it is a refusal, Unsound if it is cut.

    Lines look like "VDD_CORE_A current(7)=0.81262990A" and "VDD_CORE_V volt(15)=0.86065850V":
    only the name in front says which belong together.
    """
    found: dict[str, dict[str, Decimal]] = {"A": {}, "V": {}}
    for line in text.splitlines():
        words = " ".join(line.split())
        if not words:
            continue
        if words.startswith("error="):
            raise DeviceError(f"vcgencmd {_COMMAND}: {words[:120]}", hint=_HINT)
        match = _LINE.fullmatch(words)
        if match is None or _UNITS[match[2]] != match[3] or match[2] != match[5]:
            raise Unsound(f"expected a rail's reading, found {words[:80]!r}")
        name, unit, value = match[1], match[2], Decimal(match[4])
        if name in found[unit]:
            raise Unsound(f"{name}_{unit} stands twice")
        found[unit][name] = value
    currents, volts = found["A"], found["V"]
    lonely = [name for name in currents if name not in volts]
    if lonely:
        raise Unsound(f"{lonely[0]}: a current without its voltage")
    if not currents:
        raise Unsound("no rail at all")
    return Sweep(
        rails={name: (amperes, volts[name]) for name, amperes in currents.items()},
        volts_only={name: value for name, value in volts.items() if name not in currents},
    )


def estimated_input_mw(rails_mw: float) -> float:
    """What the board probably draws if its rails draw *rails_mw*: see INPUT_SOURCE. No reading."""
    return INPUT_SLOPE * rails_mw + INPUT_OFFSET_MW


class Pmic(Polled):
    """
    Twelve rails behind the board's regulators, each volts times amperes, added up.

    The chip measures behind its converters: their losses, everything on 5 V (USB, HATs, NVMe,
    the fan) and the 5 V input's current are outside, so the sum is below what the board draws.
    The memory's rails read 0 A below their offset; that is a reading. A sweep takes the firmware
    23 ms and the rails are measured one after another in it. A sweep whose text is cut off, or
    that lacks a rail of the first, is left out; a board that goes on like that is a DeviceError.
    """

    def __init__(
        self, info: MeterInfo, ask: Callable[[], str | None], rails: frozenset[str], done: list[int]
    ) -> None:
        super().__init__(info)
        self._ask, self._rails, self._descriptors = ask, rails, done
        self._misses = 0

    def read(self) -> float | None:
        """Milliwatts of all rails together."""
        try:
            sweep = _same_rails(self._ask(), self._rails)
        except Unsound as error:
            self._misses += 1
            if self._misses >= _MOST_MISSES:
                raise DeviceError(
                    f"vcgencmd {_COMMAND}: unsound {self._misses} times in a row: {error}"
                ) from error
            return None
        self._misses = 0
        return sweep.power_mw

    def close(self) -> None:
        """Close the firmware's door, if it was opened."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def open_meter(spec: Spec, machine: Machine, device: Device) -> Pmic:
    """
    The rails; `pmic[,rate=HZ][,via=vcgencmd]`.

    Where there is a mailbox the firmware is asked through it, as vcgencmd does it: a process for
    every sweep would cost more than all the rest.
    """
    spec.only("rate", "via")
    has_door = any(map(machine.exists, _DOORS))
    via = spec.choice("via", ("vcgencmd", "vcio"), "vcio" if has_door else "vcgencmd")
    descriptors: list[int] = []
    ask: Callable[[], str | None]
    if via == "vcio":
        descriptors.append(_open_vcio(machine))

        def ask() -> str | None:
            return firmware_text(descriptors[0], _COMMAND)
    else:

        def ask() -> str | None:
            return machine.run(["vcgencmd", _COMMAND])

    try:
        sweep = _same_rails(ask(), None)
    except (Unsound, DeviceError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(
            f"vcgencmd {_COMMAND}: {error}",
            hint=f"{_HINT}; this user must be in the group video",
        ) from error
    info = MeterInfo(
        kind=_KIND,
        label="partial",
        instrument=f"the board's power-management chip, {len(sweep.rails)} rails, {via}",
        boundary="the rails behind the board's regulators; USB, HATs, NVMe, fan and the "
        "regulators' losses are not seen",
        rate_hz=spec.rate_hz(_RATE_HZ, _MOST_HZ),
        details={
            "rails": sorted(sweep.rails),
            "supply_v": float(sweep.volts_only.get("EXT5V", Decimal(0))) or None,
            "input_estimate": {
                "slope": INPUT_SLOPE,
                "offset_mw": INPUT_OFFSET_MW,
                "source": INPUT_SOURCE,
            },
        },
    )
    return Pmic(info, ask, frozenset(sweep.rails), descriptors)


def _same_rails(text: str | None, rails: frozenset[str] | None) -> Sweep:
    if text is None:
        raise Unsound("it fails, takes too long or is not there")
    sweep = parse_sweep(text)
    if rails is not None and sweep.rails.keys() != rails:
        raise Unsound(f"{min(sweep.rails.keys() ^ rails)} came or went")
    return sweep


def find(machine: Machine, device: Device) -> list[Found]:
    """The rails, on any Raspberry Pi: those without say so."""
    model = machine.line("proc/device-tree/model") or ""
    if not model.startswith("Raspberry Pi"):
        return []
    return [tried(_KIND, "the rails that a Raspberry Pi 5 measures", machine, device)]


# ---------------------------------------------------------------- the firmware's mailbox

_TEXT_BYTES = 1024
_GENCMD_TAG = 0x00030080
# _IOWR(100, 0, char *) of a 64-bit system.
_PROPERTY = 0xC0086400
_DONE = 0x80000000


def firmware_text(
    descriptor: int,
    command: str,
    ioctl: Callable[[int, int, bytearray, bool], int] = fcntl.ioctl,
) -> str | None:
    """What the firmware answers to *command* (as vcgencmd does it); None if it refuses."""
    words = command.encode().ljust(_TEXT_BYTES, b"\0")
    size = 4 * 7 + _TEXT_BYTES
    message = bytearray(
        struct.pack("<6I", size, 0, _GENCMD_TAG, _TEXT_BYTES, 0, 0) + words + struct.pack("<I", 0)
    )
    try:
        ioctl(descriptor, _PROPERTY, message, True)
    except OSError:
        return None
    code, error = struct.unpack_from("<I", message, 4)[0], struct.unpack_from("<I", message, 20)[0]
    if code != _DONE or error:
        return None
    return bytes(message[24 : 24 + _TEXT_BYTES]).partition(b"\0")[0].decode(errors="replace")


def _open_vcio(machine: Machine) -> int:
    path = machine.path(next(filter(machine.exists, _DOORS), _DOORS[-1]))
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(
            f"{path}: cannot be opened: {error.strerror}",
            hint=f"{_HINT}; this user must be in the group video",
        ) from error
