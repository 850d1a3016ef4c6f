"""INA chips behind industrial I/O: raw times scale, exactly."""

from pathlib import Path

import pytest

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import find_meters, open_meter
from edgeexit.meters.iio import Iio
from tests.trees import put, tree

RPI4 = find_device("rpi4")
PLACE = "sys/bus/iio/devices/iio:device2"
# An INA226 whose driver believes in 10 mOhm: 0.25 mA and 6.25 mW a step.
FILES = {
    "name": "ina226",
    "in_shunt_resistor": "0.010000000",
    "in_voltage1_raw": "4080",
    "in_voltage1_scale": "1.250000000",
    "in_power2_raw": "506",
    "in_power2_scale": "6.250000000",
    "in_current3_raw": "2480",
    "in_current3_scale": "0.250000000",
}


def wired(folder: Path, **files: str | None) -> Machine:
    laid = {f"{PLACE}/{name}": text for name, text in {**FILES, **files}.items()}
    return tree(folder, "rpi4", files=laid)


def opened(spec: str, machine: Machine) -> Iio:
    meter = open_meter(spec, machine, RPI4)
    assert isinstance(meter, Iio)
    return meter


def test_power_is_raw_times_scale_over_what_the_shunt_really_is(tmp_path: Path) -> None:
    meter = opened("iio:2,shunt=0.1", wired(tmp_path))

    assert meter.read() == 506 * 6.25 / 10
    assert meter.info.details["rescaled_by"] == 0.1
    assert "you stated 0.1 Ohm" in meter.info.details["warning"]


def test_without_power_it_is_voltage_times_current(tmp_path: Path) -> None:
    machine = wired(tmp_path, in_power2_raw=None, in_shunt_resistor="0.100000000")

    assert opened("iio,shunt=0.1", machine).read() == 4080 * 1.25 * 2480 * 0.25 / 1000


def test_a_scale_that_no_float_holds_is_taken_exactly(tmp_path: Path) -> None:
    machine = wired(tmp_path, in_power2_scale="0.333333333", in_power2_raw="3")

    assert opened("iio,shunt=0.01", machine).read() == 0.999999999


def test_the_shunt_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not stated; the driver believes in 0.01 Ohm"):
        opened("iio:2", wired(tmp_path))


@pytest.mark.parametrize("scale", ["", "0.000000000", "nan", "1e5", "six"])
def test_a_scale_that_is_no_number_is_named(scale: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="in_power2_scale: expected a positive number"):
        opened("iio,shunt=0.1", wired(tmp_path, in_power2_scale=scale))


def test_a_driver_without_a_shunt_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="in_shunt_resistor"):
        opened("iio,shunt=0.1", wired(tmp_path, in_shunt_resistor="0.000000000"))


def test_which_of_several_is_named_by_its_number(tmp_path: Path) -> None:
    machine = wired(tmp_path)
    other = "sys/bus/iio/devices/iio:device10"
    put(machine, {f"{other}/{name}": text for name, text in FILES.items()})
    put(machine, {f"{other}/name": "1-0041"})  # an older driver's name
    put(machine, {"sys/bus/iio/devices/iio:device0/name": "bme280"})

    with pytest.raises(UsageError, match=r"several \(iio:2, iio:10\)"):
        opened("iio,shunt=0.1", machine)
    assert opened("iio:10,shunt=0.1", machine).read() == 316.25
    with pytest.raises(DeviceError, match=r"no such INA chip .*have: iio:2, iio:10"):
        opened("iio:0,shunt=0.1", machine)
    with pytest.raises(UsageError, match="expected the device's number"):
        opened("iio:0x40,shunt=0.1", machine)
    specs = [found.spec for found in find_meters(machine, RPI4)]
    assert [spec for spec in specs if "iio" in spec] == ["iio:2,shunt=OHM", "iio:10,shunt=OHM"]


def test_a_chip_that_is_unplugged_is_named(tmp_path: Path) -> None:
    machine = wired(tmp_path)
    stream = opened("iio,shunt=0.1", machine).samples()
    next(stream)
    put(machine, {f"{PLACE}/in_power2_raw": None})

    with pytest.raises(DeviceError, match="iio:device2/in_power2_raw"):
        next(stream)


@pytest.mark.parametrize(
    ("chip", "last_good"), [("ina219", 31998), ("ina226", 32766), ("ina226", -32766)]
)
def test_full_scale_is_refused(chip: str, last_good: int, tmp_path: Path) -> None:
    machine = wired(tmp_path, name=chip, in_voltage0_raw=f"{last_good}")
    meter = opened("iio,shunt=0.1", machine)
    assert meter.read() == 316.25
    put(machine, {f"{PLACE}/in_voltage0_raw": f"{last_good + (2 if last_good > 0 else -2)}"})

    with pytest.raises(DeviceError, match="full scale"):
        meter.read()
