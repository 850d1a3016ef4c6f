"""
Numbers in sysfs that are read again and again, and the power chips that show them.

Callers see Kept (a number whose file stays open), Polled (a meter that is asked), Shunt and
the chips of an i2c bus. Hidden here: a number costs one pread; a bus error now and then is a
missing sample while a file that is gone, or silent for long, is a DeviceError that names it;
and hwmon numbers are handed out anew at every boot, so that chips are found by name and address.
"""

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import MeterInfo, Sample, Spec, paced

_GONE = (errno.ENODEV, errno.ENOENT, errno.EBADF, errno.ENXIO)
# So many refusals in a row are no hiccup of the bus any more.
_MOST_MISSES = 10
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_ADDRESS = re.compile(r"(?:([0-9]{1,3})-)?(?:0x([0-9a-fA-F]{1,2})|00([0-9a-fA-F]{2}))")
_I2C = re.compile(r"([0-9]{1,3})-00([0-9a-f]{2})")


class Kept:
    """The text of the file *name* of *machine*, kept open. Opening is a DeviceError if it fails."""

    def __init__(self, machine: Machine, name: str, *, hint: str | None = None) -> None:
        self._path, self._hint, self._misses = machine.path(name), hint, 0
        self._fd = self._open()

    def text(self) -> str | None:
        """What the file says now; None if it refuses just now. DeviceError once it is gone."""
        try:
            if os.fstat(self._fd).st_nlink == 0:
                # A file of a tree that was replaced; sysfs answers ENODEV instead.
                self.close()
                self._fd = self._open()
            raw = os.pread(self._fd, 4096, 0)
        except OSError as error:
            self._misses += 1
            if error.errno in _GONE or self._misses >= _MOST_MISSES:
                raise DeviceError(
                    f"{self._path}: the sensor does not answer any more: {error.strerror}",
                    hint="is it still plugged in?",
                ) from error
            return None
        self._misses = 0
        return raw.decode(errors="replace")

    def number(self) -> int | None:
        """The whole number in the file; None if it refuses just now."""
        text = self.text()
        if text is None:
            return None
        if not _WHOLE.fullmatch(text.strip()):
            raise DeviceError(f"{self._path}: expected a whole number, found {text[:40]!r}")
        return int(text)

    def close(self) -> None:
        """Close the file; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise DeviceError(
                f"{self._path}: may not be read by this user",
                hint=self._hint or f"sudo chmod a+r {self._path}",
            ) from error
        except OSError as error:
            raise DeviceError(f"{self._path}: cannot be read: {error.strerror}") from error


class Polled(ABC):
    """
    A meter that is asked at a steady rate: whoever derives from it says read().

    read() returns milliwatts, or with *is_counter* millijoules counted; None for a missing
    sample.
    """

    is_counter = False

    def __init__(self, info: MeterInfo, *files: Kept) -> None:
        self._info, self._files = info, files

    @property
    def info(self) -> MeterInfo:
        """What this meter is."""
        return self._info

    @abstractmethod
    def read(self) -> float | None:
        """One reading."""

    def samples(self) -> Iterator[Sample]:
        """Samples at the meter's rate. DeviceError when the sensor vanishes."""
        return paced(self.read, self._info.rate_hz, is_counter=self.is_counter)

    def close(self) -> None:
        """Close the files; may be called twice."""
        for file in self._files:
            file.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Shunt:
    """
    The resistor that a current is measured with, in micro-ohms: what it is, what the driver thinks.

    A chip measures the voltage across the shunt; its driver divides by the resistance that it
    believes in. If that is not the *stated* one, currents and powers are wrong by exactly
    believed/stated, silently: the drivers' default is 10 mOhm, common boards carry 100 mOhm.
    """

    stated_uohm: int
    believed_uohm: int

    def scaled(self, value: int) -> float:
        """A driver's *value* (of a current, power or energy), in thousandths, as it really is."""
        return value * self.believed_uohm / (self.stated_uohm * 1000)

    def details(self) -> dict[str, object]:
        """For MeterInfo.details; with a warning if the driver believes something else."""
        found: dict[str, object] = {
            "shunt_ohm": self.stated_uohm / 1e6,
            "driver_shunt_ohm": self.believed_uohm / 1e6,
        }
        if self.stated_uohm != self.believed_uohm:
            factor = self.believed_uohm / self.stated_uohm
            found["rescaled_by"] = factor
            found["warning"] = (
                f"the driver believes in a shunt of {ohms(self.believed_uohm)}, you stated "
                f"{ohms(self.stated_uohm)}: its readings are multiplied by {factor:.6g}"
            )
        return found


def ohms(uohm: int) -> str:
    """*uohm* micro-ohms as people write it: "0.1 Ohm"."""
    return f"{uohm / 1e6:.6g} Ohm"


def stated_shunt_uohm(spec: Spec, believed: str = "") -> int:
    """The option "shunt" of *spec* in micro-ohms; UsageError if it was not given."""
    stated = spec.number("shunt", "0.00001", "100")
    if stated is None:
        raise UsageError(
            f"meter {spec}: its shunt is not stated{believed}",
            hint=f"read it off the resistor (R100 is 0.1 Ohm, R010 0.01 Ohm): {spec},shunt=0.1",
        )
    uohm = stated * 1_000_000
    if uohm.denominator != 1:
        raise UsageError(f"meter {spec}: shunt: expected whole micro-ohms, found {float(stated)}")
    return uohm.numerator


def exact(text: str | None) -> Fraction | None:
    """The decimal number *text*, exactly; None if it is none."""
    if text is None or not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,15})?", text):
        return None
    return Fraction(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A hwmon chip: its *place* in sysfs and, where known, its i2c name, such as "1-0040"."""

    name: str
    place: str
    i2c: str | None

    @property
    def address(self) -> str:
        """How a spec names it: ":1-0040", or "" if it cannot be told from its kin."""
        return "" if self.i2c is None else f":{self.i2c}"


def chips(machine: Machine, *names: str) -> list[Chip]:
    """The hwmon chips of *machine* that are called one of *names*."""
    found = []
    for file in machine.glob("sys/class/hwmon/hwmon*/name"):
        name = machine.line(file)
        if name in names:
            place = file.removesuffix("/name")
            found.append(Chip(name=name, place=place, i2c=_i2c_name(machine, place)))
    return found


def choose_chip(machine: Machine, spec: Spec, found: list[Chip]) -> Chip:
    """The chip among *found* that *spec* means. DeviceError if there is none, or several."""
    wanted = i2c_address(spec)
    matching = [chip for chip in found if wanted is None or _is_at(chip, *wanted)]
    if len(matching) == 1:
        return matching[0]
    have = ", ".join(f"{chip.name}{chip.address}" for chip in found) or "none"
    if not matching:
        raise DeviceError(
            f"meter {spec}: no such chip in {machine.path('sys/class/hwmon')} (have: {have})",
            hint="does the kernel know it? edgeexit meters list; without a driver: smbus",
        )
    raise UsageError(f"meter {spec}: there are several ({have})", hint="name one by its address")


def i2c_address(spec: Spec) -> tuple[int | None, int] | None:
    """The (bus or None, address) that *spec* names; None if it names none."""
    if spec.address is None:
        return None
    match = _ADDRESS.fullmatch(spec.address)
    if match is None:
        raise UsageError(
            f"meter {spec}: expected an i2c address such as 0x40 or 1-0040, found {spec.address!r}"
        )
    return int(match[1]) if match[1] else None, int(match[2] or match[3], 16)


def _is_at(chip: Chip, bus: int | None, address: int) -> bool:
    match = _I2C.fullmatch(chip.i2c or "")
    return match is not None and int(match[2], 16) == address and bus in (None, int(match[1]))


def _i2c_name(machine: Machine, place: str) -> str | None:
    # On a board hwmonN/device is a link to the client; a tree may hold the client's folder only.
    link = os.path.basename(os.path.realpath(machine.path(f"{place}/device")))  # noqa: PTH119
    if _I2C.fullmatch(link):
        return link
    number = place.rpartition("/")[2]
    for other in machine.glob(f"sys/bus/i2c/devices/*/hwmon/{number}"):
        name = other.split("/")[-3]
        if _I2C.fullmatch(name):
            return name
    return None
