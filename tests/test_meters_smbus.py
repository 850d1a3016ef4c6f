"""Chips without a kernel driver: registers by the data sheet, on a bus that is not there."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import Spec, open_meter
from edgeexit.meters.smbus import Smbus, opened
from tests.trees import tree

HOST = find_device("host")
# What a data sheet promises after power-up: {register: (bytes, value)}.
POWER_UP = {
    "ina219": {0x00: (2, 0x399F), 0x05: (2, 0)},
    "ina226": {0x00: (2, 0x4127), 0x05: (2, 0), 0xFE: (2, 0x5449), 0xFF: (2, 0x2260)},
    "ina228": {0x00: (2, 0x0000), 0x3E: (2, 0x5449), 0x3F: (2, 0x2281)},
}
# Chip -> registers of shunt and supply, bytes, bits below, volts a step of shunt and supply.
LAYOUT = {
    "ina219": (0x01, 0x02, 2, 0, 3, 10e-6, 4e-3),
    "ina226": (0x01, 0x02, 2, 0, 0, 2.5e-6, 1.25e-3),
    "ina228": (0x04, 0x05, 3, 4, 4, 312.5e-9, 195.3125e-6),
}


class FakeBus:
    """A bus with one chip at 0x40 that can be unplugged; it has no way to be written to."""

    def __init__(self, chip: str) -> None:
        self.chip, self.registers = chip, dict(POWER_UP[chip])
        self.is_closed = self.is_unplugged = False

    def show(self, shunt_v: float, supply_v: float) -> tuple[int, int]:
        """Let the chip convert these voltages; the steps that it rounds them to."""
        shunt, supply, length, low, supply_low, shunt_step, supply_step = LAYOUT[self.chip]
        shunt_raw, supply_raw = round(shunt_v / shunt_step), round(supply_v / supply_step)
        bits = 8 * length
        self.registers[shunt] = (length, (shunt_raw << low) % (1 << bits))
        # The bits below are flags (INA219: conversion ready) or zero.
        flags = 0b010 if self.chip == "ina219" else 0
        self.registers[supply] = (length, (supply_raw << supply_low) | flags)
        return shunt_raw, supply_raw

    def read_i2c_block_data(self, i2c_addr: int, register: int, length: int) -> list[int]:
        if self.is_unplugged or i2c_addr != 0x40:
            raise OSError(121, "Remote I/O error")
        size, value = self.registers[register]
        assert size == length
        return list(value.to_bytes(size, "big"))

    def close(self) -> None:
        self.is_closed = True


def on(bus: FakeBus, chip: str | None = None, shunt_uohm: int = 100_000) -> Smbus:
    spec = Spec(kind="smbus", address="1-0040", options={"chip": chip or bus.chip})
    return opened(spec, lambda _: bus, 1, 0x40, chip or bus.chip, shunt_uohm)


@pytest.mark.parametrize("chip", LAYOUT)
@given(
    shunt_v=st.floats(-0.08, 0.08),
    supply_v=st.floats(0, 25),
    shunt_uohm=st.sampled_from([2_000, 10_000, 100_000]),
)
def test_power_is_what_the_registers_say(
    chip: str, shunt_v: float, supply_v: float, shunt_uohm: int
) -> None:
    bus = FakeBus(chip)
    shunt_raw, supply_raw = bus.show(shunt_v, supply_v)
    *_, shunt_step, supply_step = LAYOUT[chip]

    power_mw = on(bus, shunt_uohm=shunt_uohm).read()

    amperes = abs(shunt_raw) * shunt_step / (shunt_uohm / 1e6)
    assert power_mw == pytest.approx(1e3 * amperes * supply_raw * supply_step, rel=1e-12)


@pytest.mark.parametrize("chip", LAYOUT)
def test_a_known_current_is_read_within_a_step(chip: str) -> None:
    bus = FakeBus(chip)
    bus.show(0.062, 5.1)
    meter = on(bus)

    assert meter.read() == pytest.approx(3162, rel=1e-3)
    assert meter.info.details["i2c"] == "1-0040"


@pytest.mark.parametrize(
    ("chip", "full_v"), [("ina219", 0.32), ("ina226", 0.0819175), ("ina228", 0.1638397)]
)
def test_full_scale_is_refused(chip: str, full_v: float) -> None:
    bus = FakeBus(chip)
    bus.show(full_v, 5.0)

    with pytest.raises(DeviceError, match="full scale"):
        on(bus).read()


@pytest.mark.parametrize("chip", LAYOUT)
@pytest.mark.parametrize("other", LAYOUT)
def test_another_chip_than_stated_is_refused_and_the_bus_given_back(chip: str, other: str) -> None:
    bus = FakeBus(chip)
    for register in (0x00, 0x3E, 0x3F, 0xFE, 0xFF):
        bus.registers.setdefault(register, (2, 0))
    if chip == other:
        on(bus, other)
        return

    with pytest.raises(DeviceError, match=f"is no {other} as it powers up"):
        on(bus, other)
    assert bus.is_closed


def test_a_range_that_somebody_switched_is_refused() -> None:
    bus = FakeBus("ina228")
    bus.registers[0x00] = (2, 0x0010)

    with pytest.raises(DeviceError, match="register 0x00 holds 0x0010"):
        on(bus)


def test_a_chip_that_does_not_answer_names_the_bus() -> None:
    bus = FakeBus("ina219")
    bus.is_unplugged = True

    with pytest.raises(DeviceError, match="/dev/i2c-1, 0x40 does not answer: Remote I/O") as no:
        on(bus)
    assert "ina219:0x40" in str(no.value.hint)


def test_a_chip_that_is_unplugged_is_missed_ten_times() -> None:
    bus = FakeBus("ina226")
    bus.show(0.01, 5)
    meter = on(bus)
    assert meter.read() is not None
    bus.is_unplugged = True
    assert [meter.read() for _ in range(9)] == [None] * 9

    with pytest.raises(DeviceError, match="0x40 does not answer any more"):
        meter.read()


def test_a_bus_that_is_not_there_is_named() -> None:
    def absent(_: int) -> FakeBus:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(DeviceError, match="/dev/i2c-3: No such file") as refusal:
        opened(Spec(kind="smbus"), absent, 3, 0x40, "ina219", 100_000)
    assert "group i2c" in str(refusal.value.hint)


def test_the_package_is_loaded_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = FakeBus("ina219")
    bus.show(0.062, 5.1)
    asked = []
    monkeypatch.setitem(
        sys.modules, "smbus2", SimpleNamespace(SMBus=lambda n: asked.append(n) or bus)
    )

    meter = open_meter("smbus:0x40,chip=ina219,shunt=0.1", Machine("/"), HOST)

    assert asked == [1]
    assert next(iter(meter.samples())).power_mw == pytest.approx(3162, rel=1e-3)
    meter.close()
    assert bus.is_closed


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smbus2", None)

    with pytest.raises(DeviceError, match="smbus2 is not installed") as refusal:
        open_meter("smbus:0x40,chip=ina219,shunt=0.1", Machine("/"), HOST)
    assert refusal.value.hint == 'pip install "edgeexit[smbus]"'


@pytest.mark.parametrize(
    "spec",
    [
        "smbus",
        "smbus:0x40",
        "smbus:0x40,shunt=0.1",
        "smbus:0x40,chip=ina219",
        "smbus:0x40,chip=ina3221,shunt=0.1",
        "smbus:40,chip=ina219,shunt=0.1",
    ],
)
def test_address_chip_and_shunt_must_be_stated(spec: str) -> None:
    with pytest.raises(UsageError):
        open_meter(spec, Machine("/"), HOST)


def test_a_recorded_tree_has_no_bus(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no i2c bus"):
        open_meter("smbus:0x40,chip=ina219,shunt=0.1", tree(tmp_path, "rpi4"), HOST)
