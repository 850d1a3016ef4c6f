"""
INA219, INA226 and INA228 chips on an i2c bus for which the kernel has no driver.

Hidden here: the chips' registers. Needs the package smbus2 and the right to open /dev/i2c-N;
nothing is written to a chip, it stays as it powered up.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import LABELS, Found, MeterInfo, Spec
from edgeexit.meters.sysfs import Polled, i2c_address, ohms, stated_shunt_uohm

_KIND = "smbus"
# Each wake-up took 0.13 ms of a PC's core, and boards are slower: more would disturb.
_RATE_HZ = 25.0
_MOST_MISSES = 10
_TI = 0x5449


class Bus(Protocol):
    """What is used of smbus2.SMBus."""

    def read_i2c_block_data(self, i2c_addr: int, register: int, length: int) -> list[int]:
        """*length* bytes of a register, the highest first."""

    def close(self) -> None:
        """Give the bus back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registers:
    """
    A chip's registers by its data sheet, as they are after power-up.

    *shunt* and *supply* are (register, bytes, bits to drop, step in picovolts); *identity*
    lists (register, mask, what must stand there). full_scale is in raw steps of the shunt.
    """

    shunt: tuple[int, int, int, int]
    supply: tuple[int, int, int, int]
    identity: tuple[tuple[int, int, int], ...]
    full_scale: int


CHIPS = {
    # Shunt 10 uV, +-320 mV (gain 1/8); supply 4 mV in the upper 13 bits. It has no identity, but
    # after power-up (and with the kernel's driver) bits 13..11 of its configuration are 111.
    "ina219": Registers(
        shunt=(0x01, 2, 0, 10_000_000),
        supply=(0x02, 2, 3, 4_000_000_000),
        identity=((0x00, 0x3800, 0x3800),),
        full_scale=32_000,
    ),
    # Shunt 2.5 uV, +-81.92 mV; supply 1.25 mV.
    "ina226": Registers(
        shunt=(0x01, 2, 0, 2_500_000),
        supply=(0x02, 2, 0, 1_250_000_000),
        identity=((0xFE, 0xFFFF, _TI), (0xFF, 0xFFF0, 0x2260)),
        full_scale=32_767,
    ),
    # 20 bits: shunt 312.5 nV, +-163.84 mV while ADCRANGE (bit 4) is 0; supply 195.3125 uV.
    "ina228": Registers(
        shunt=(0x04, 3, 4, 312_500),
        supply=(0x05, 3, 4, 195_312_500),
        identity=((0x3E, 0xFFFF, _TI), (0x3F, 0xFFF0, 0x2280), (0x00, 0x0010, 0)),
        full_scale=524_287,
    ),
}


class Smbus(Polled):
    """
    Supply voltage times the voltage across the shunt over its resistance.

    Both are read as the chip last converted them, one after the other (0.5 ms apart on a bus of
    100 kHz); its own current and power registers need a calibration that is lost at power-down,
    so they are not used. At full scale the chip clips, which is a DeviceError.
    """

    def __init__(self, info: MeterInfo, bus: Bus, address: int, chip: str, shunt_uohm: int):
        super().__init__(info)
        self._bus, self._address, self._chip = bus, address, CHIPS[chip]
        self._shunt_uohm, self._misses = shunt_uohm, 0
        steps_pv2 = self._chip.shunt[3] * self._chip.supply[3]
        # pV x pV / uOhm = 1e-18 W; milliwatts are 1e-3 W.
        self._mw_divisor = shunt_uohm * 10**15
        self._steps = steps_pv2

    def read(self) -> float | None:
        """Milliwatts now."""
        try:
            shunt = _signed(_register(self._bus, self._address, self._chip.shunt), self._chip.shunt)
            supply = _register(self._bus, self._address, self._chip.supply)
        except OSError as error:
            self._misses += 1
            if self._misses >= _MOST_MISSES:
                raise DeviceError(
                    f"meter {_KIND}: 0x{self._address:02x} does not answer any more: "
                    f"{error.strerror or error}",
                    hint="is it still plugged in?",
                ) from error
            return None
        self._misses = 0
        if abs(shunt) >= self._chip.full_scale:
            raise DeviceError(
                f"meter {_KIND}: 0x{self._address:02x} is at full scale: what it reads is clipped",
                hint="a smaller shunt measures larger currents",
            )
        return abs(shunt) * supply * self._steps / self._mw_divisor

    def close(self) -> None:
        """Give the bus back; may be called twice."""
        with suppress(OSError):
            self._bus.close()


def open_meter(spec: Spec, machine: Machine, device: Device) -> Smbus:
    """The chip on a bus: `smbus:1-0040,chip=ina219,shunt=0.1` (0x40 alone: bus 1)."""
    spec.only("chip", "shunt", "rate", "label", address=True)
    found = i2c_address(spec)
    if found is None or "chip" not in spec.options:
        raise UsageError(
            f"meter {spec}: expected an address and a chip",
            hint="smbus:1-0040,chip=ina219,shunt=0.1",
        )
    if not machine.is_live:
        raise DeviceError(f"meter {spec}: a recorded tree has no i2c bus")
    chip = spec.choice("chip", tuple(CHIPS), "")
    shunt_uohm = stated_shunt_uohm(spec)
    number, address = found
    return opened(spec, _smbus2(), 1 if number is None else number, address, chip, shunt_uohm)


def opened(
    spec: Spec,
    open_bus: Callable[[int], Bus],
    number: int,
    address: int,
    chip: str,
    shunt_uohm: int,
) -> Smbus:
    """The *chip* at *address* of bus *number*, once it has shown that it is one."""
    place = f"/dev/i2c-{number}, 0x{address:02x}"
    try:
        bus = open_bus(number)
    except OSError as error:
        raise DeviceError(
            f"meter {spec}: /dev/i2c-{number}: {error.strerror or error}",
            hint="enable i2c (on a Raspberry Pi: raspi-config), and join the group i2c",
        ) from error
    label = spec.choice("label", LABELS[:2], "external")
    info = MeterInfo(
        kind=_KIND,
        label=label,
        instrument=f"{chip.upper()} with a shunt of {ohms(shunt_uohm)}, over smbus2",
        boundary="what flows through the shunt: the whole board, if it sits in the board's "
        "supply line; not the supply's own losses"
        if label == "external"
        else "what flows through the shunt: one rail of the board",
        rate_hz=spec.rate_hz(_RATE_HZ),
        details={
            "chip": chip,
            "i2c": f"{number}-00{address:02x}",
            "shunt_ohm": shunt_uohm / 1e6,
            "most_ma": CHIPS[chip].full_scale * CHIPS[chip].shunt[3] / shunt_uohm / 1e3,
        },
    )
    meter = Smbus(info, bus, address, chip, shunt_uohm)
    try:
        for register, mask, wanted in CHIPS[chip].identity:
            said = _register(bus, address, (register, 2, 0, 0))
            if said & mask != wanted:
                raise DeviceError(  # noqa: TRY301
                    f"meter {spec}: {place} is no {chip} as it powers up: register "
                    f"0x{register:02x} holds 0x{said:04x}"
                )
    except (OSError, DeviceError) as error:
        meter.close()
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(
            f"meter {spec}: {place} does not answer: {error.strerror or error}",
            hint="i2cdetect -y shows what does; 'busy' means that a kernel driver holds it: "
            f"then use {chip}:0x{address:02x}",
        ) from error
    return meter


def find(machine: Machine, device: Device) -> list[Found]:
    """Nothing: asking around on a bus can upset what hangs on it."""
    return []


def _register(bus: Bus, address: int, where: tuple[int, int, int, int]) -> int:
    register, length, dropped, _ = where
    data = bus.read_i2c_block_data(address, register, length)
    return int.from_bytes(bytes(data), "big") >> dropped


def _signed(raw: int, where: tuple[int, int, int, int]) -> int:
    bits = 8 * where[1] - where[2]
    return raw - (1 << bits) if raw >> (bits - 1) else raw


def _smbus2() -> Callable[[int], Bus]:
    try:
        module: Any = importlib.import_module("smbus2")
    except ImportError as error:
        raise DeviceError(
            "meter smbus: the package smbus2 is not installed",
            hint='pip install "edgeexit[smbus]"',
        ) from error
    bus: Callable[[int], Bus] = module.SMBus
    return bus
