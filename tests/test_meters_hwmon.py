"""The INA family behind hwmon: exact watts, and the shunt that the driver has wrong."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import find_meters, open_meter
from edgeexit.meters.hwmon import PARTS, Ina
from edgeexit.meters.sysfs import Shunt
from tests.trees import put, tree

RPI4 = find_device("rpi4")
PLACE = "sys/class/hwmon/hwmon3"
# 5.10 V and 0.62 A through 100 mOhm, while the driver believes in 10 mOhm: ten times too much.
FILES = {
    "name": "ina219",
    "in0_input": "62",
    "in1_input": "5100",
    "curr1_input": "6200",
    "power1_input": "31620000",
    "shunt_resistor": "10000",
}


def wired(
    folder: Path, place: str = PLACE, i2c: str | None = "1-0040", **files: str | None
) -> Machine:
    """A Raspberry Pi 4 with one chip more."""
    laid = {f"{place}/{name}": text for name, text in {**FILES, **files}.items()}
    if i2c:
        laid[f"sys/bus/i2c/devices/{i2c}/hwmon/{place.rpartition('/')[2]}/name"] = FILES["name"]
    return tree(folder, "rpi4", files={k: v for k, v in laid.items() if v is not None})


def opened(spec: str, machine: Machine) -> Ina:
    meter = open_meter(spec, machine, RPI4)
    assert isinstance(meter, Ina)
    return meter


def test_power_is_what_the_driver_says_in_microwatts(tmp_path: Path) -> None:
    machine = wired(tmp_path, shunt_resistor="100000", power1_input="3162000", curr1_input="620")
    meter = opened("ina219:0x40,shunt=0.1", machine)

    assert meter.read() == 3162.0
    assert meter.info.label == "external"
    assert "warning" not in meter.info.details


def test_a_driver_that_has_the_shunt_wrong_is_corrected_and_it_is_said(tmp_path: Path) -> None:
    meter = opened("ina219:0x40,shunt=0.1", wired(tmp_path))

    assert meter.read() == 3162.0
    assert meter.info.details["rescaled_by"] == 0.1
    assert meter.info.details["warning"] == (
        "the driver believes in a shunt of 0.01 Ohm, you stated 0.1 Ohm: "
        "its readings are multiplied by 0.1"
    )


def test_the_shunt_must_be_stated_and_the_refusal_says_what_the_driver_believes(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=r"not stated; the driver believes in 0.01 Ohm") as refusal:
        opened("ina219:0x40", wired(tmp_path))

    assert "ina219:0x40,shunt=0.1" in str(refusal.value.hint)


@given(st.integers(0, 10**9), st.integers(10, 10**7), st.integers(1, 1000))
def test_a_reading_scales_with_the_shunts_exactly(value: int, believed: int, factor: int) -> None:
    """A stated shunt that is k times the believed one makes every reading k times smaller."""
    right = Shunt(stated_uohm=believed, believed_uohm=believed)
    wrong = Shunt(stated_uohm=believed * factor, believed_uohm=believed)

    assert right.scaled(value * factor) == pytest.approx(factor * right.scaled(value), rel=1e-15)
    assert wrong.scaled(value * factor) == pytest.approx(right.scaled(value), rel=1e-15)


def test_without_a_power_file_it_is_millivolts_times_milliamperes(tmp_path: Path) -> None:
    machine = wired(tmp_path, power1_input=None)

    assert opened("ina219,shunt=0.1", machine).read() == 5100 * 6200 / 10 / 1000


def test_a_shunt_that_is_wired_backwards_reads_the_same(tmp_path: Path) -> None:
    machine = wired(tmp_path, power1_input=None, curr1_input="-6200")

    assert opened("ina219,shunt=0.1", machine).read() == 3162.0


def test_an_ina260_has_its_own_shunt(tmp_path: Path) -> None:
    machine = wired(tmp_path, name="ina260", power1_input="3160000", curr1_input="620")
    meter = opened("ina260:0x40", machine)

    assert meter.read() == 3160.0
    assert meter.info.details["most_ma"] == 15000
    assert meter.info.details["step_mw"] == pytest.approx(10)
    with pytest.raises(UsageError, match="has its own shunt"):
        opened("ina260:0x40,shunt=0.1", machine)


@pytest.mark.parametrize(
    ("chip", "shunt", "most_ma", "step_mw"),
    [
        ("ina219", "0.1", 3200, 2.0),
        ("ina226", "0.1", 819.2, 0.625),
        ("ina226", "0.002", 40960, 31.25),
        ("ina238", "0.01", 16384, 0.1),
    ],
)
def test_full_scale_and_steps_are_the_data_sheets(
    chip: str, shunt: str, most_ma: float, step_mw: float, tmp_path: Path
) -> None:
    machine = wired(tmp_path, name=chip, curr1_input="62", in0_input="0.62")
    details = opened(f"{chip},shunt={shunt}", machine).info.details

    assert details["most_ma"] == pytest.approx(most_ma)
    assert details["step_mw"] == pytest.approx(step_mw)


def test_a_reading_at_full_scale_is_refused(tmp_path: Path) -> None:
    """An INA226 with 100 mOhm clips at 0.8192 A, which a Raspberry Pi exceeds."""
    machine = wired(
        tmp_path,
        name="ina226",
        shunt_resistor="100000",
        curr1_input="500",
        power1_input="2550000",
        update_interval="35",
    )
    meter = opened("ina226:0x40,shunt=0.1", machine)
    assert meter.read() == 2550.0
    put(machine, {f"{PLACE}/curr1_input": "819\n", f"{PLACE}/power1_input": "4176900\n"})

    with pytest.raises(DeviceError, match=r"full scale \(819 mA\): what it reads is clipped"):
        meter.read()


def test_the_rate_is_not_above_the_chips_own_pace(tmp_path: Path) -> None:
    slow = wired(tmp_path, name="ina226", update_interval="140", curr1_input="62")

    assert opened("ina226,shunt=0.1", slow).info.rate_hz == pytest.approx(1000 / 140)
    assert opened("ina226,shunt=0.1,rate=5", slow).info.rate_hz == 5


# ---------------------------------------------------------------- energy in the chip


def ina228(tmp_path: Path, **files: str | None) -> Machine:
    return wired(
        tmp_path,
        name="ina228",
        shunt_resistor=None,
        in0_input="62",
        curr1_input="6200",
        energy1_input="7000000",
        **files,
    )


def test_an_ina228_counts_energy_itself(tmp_path: Path) -> None:
    machine = ina228(tmp_path)
    meter = opened("ina228:0x40,shunt=0.1", machine)

    assert meter.is_counter
    assert meter.read() == 700.0
    put(machine, {f"{PLACE}/energy1_input": "7000010"})
    assert meter.read() == 700.001
    assert next(iter(meter.samples())).energy_mj == 700.001


def test_a_counter_that_falls_is_a_reset_chip(tmp_path: Path) -> None:
    machine = ina228(tmp_path)
    meter = opened("ina228:0x40,shunt=0.1", machine)
    meter.read()
    put(machine, {f"{PLACE}/energy1_input": "5"})

    with pytest.raises(DeviceError, match="counter fell"):
        meter.read()


@pytest.mark.parametrize(
    ("curr1", "believed"), [("6200", 0.01), ("24800", 0.0025), ("620", 0.1), ("24100", 0.0025)]
)
def test_what_the_ina238_driver_believes_shows_in_voltage_over_current(
    curr1: str, believed: float, tmp_path: Path
) -> None:
    machine = ina228(tmp_path)
    put(machine, {f"{PLACE}/curr1_input": curr1})

    details = opened("ina228,shunt=0.1", machine).info.details

    assert details["driver_shunt_ohm"] == believed


@pytest.mark.parametrize(("in0", "curr1"), [("0", "0"), ("2", "200"), ("62", "500"), (None, "1")])
def test_a_belief_that_nobody_can_tell_must_be_stated(
    in0: str | None, curr1: str, tmp_path: Path
) -> None:
    machine = ina228(tmp_path)
    put(machine, {f"{PLACE}/curr1_input": curr1, f"{PLACE}/in0_input": in0})

    with pytest.raises(DeviceError, match="does not tell which shunt") as refusal:
        opened("ina228,shunt=0.1", machine)
    assert "believed=0.01" in str(refusal.value.hint)
    stated = opened("ina228,shunt=0.1,believed=0.0025", machine)
    assert stated.info.details["driver_shunt_ohm"] == 0.0025


def test_two_candidates_that_are_close_are_not_guessed_between(tmp_path: Path) -> None:
    machine = ina228(tmp_path)
    put(machine, {f"{PLACE}/curr1_input": "28000"})  # 2.2 mOhm: 2.5 or the stated 2?

    with pytest.raises(DeviceError, match="does not tell"):
        opened("ina228,shunt=0.002", machine)


def test_the_device_tree_says_what_the_driver_believes(tmp_path: Path) -> None:
    machine = ina228(tmp_path)
    cells = machine.path(f"{PLACE}/device/of_node/shunt-resistor")
    cells.parent.mkdir(parents=True)
    cells.write_bytes(struct.pack(">I", 15000))

    assert opened("ina228,shunt=0.015", machine).info.details["driver_shunt_ohm"] == 0.015
    with pytest.raises(UsageError, match=r"the driver itself says 0\.015 Ohm"):
        opened("ina228,shunt=0.015,believed=0.01", machine)


# ---------------------------------------------------------------- which chip


def test_a_chip_is_found_by_its_address_whatever_its_number(tmp_path: Path) -> None:
    machine = wired(tmp_path)
    other = {f"sys/class/hwmon/hwmon11/{k}": v for k, v in FILES.items()}
    other["sys/class/hwmon/hwmon11/power1_input"] = "10000000"
    other["sys/bus/i2c/devices/10-0041/hwmon/hwmon11/name"] = "ina219"
    put(machine, other)

    assert opened("ina219:0x40,shunt=0.1", machine).read() == 3162.0
    assert opened("ina219:0x41,shunt=0.1", machine).read() == 1000.0
    assert opened("ina219:10-0041,shunt=0.1", machine).read() == 1000.0
    with pytest.raises(UsageError, match=r"several \(ina219:1-0040, ina219:10-0041\)"):
        opened("ina219,shunt=0.1", machine)
    with pytest.raises(DeviceError, match=r"no such chip .* \(have: ina219:1-0040"):
        opened("ina219:1-0041,shunt=0.1", machine)


def test_on_a_board_the_address_is_where_the_link_leads(tmp_path: Path) -> None:
    machine = wired(tmp_path, i2c=None)
    client = machine.path("sys/devices/platform/soc/i2c-1/1-0045")
    client.mkdir(parents=True)
    machine.path(f"{PLACE}/device").symlink_to(client)

    assert opened("ina219:0x45,shunt=0.1", machine).info.details["i2c"] == "1-0045"


@pytest.mark.parametrize("address", ["40", "0x", "0x400", "x", "1-40", "-0040", "0x40/..", "1-"])
def test_what_is_no_address_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected an i2c address"):
        opened(f"ina219:{address},shunt=0.1", wired(tmp_path))


@pytest.mark.parametrize("shunt", ["0", "-0.1", "nan", "0.1Ohm", "1000", "", "0.00000001"])
def test_a_shunt_that_cannot_be_is_refused(shunt: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shunt"):
        opened(f"ina219,shunt={shunt}", wired(tmp_path))


def test_a_chip_on_a_rail_may_be_called_partial(tmp_path: Path) -> None:
    assert opened("ina219,shunt=0.1,label=partial", wired(tmp_path)).info.label == "partial"
    with pytest.raises(UsageError, match="no label of the meter"):
        opened("ina219,shunt=0.1,label=modelled", wired(tmp_path))


@pytest.mark.parametrize("chip", PARTS)
def test_every_chip_is_listed_with_what_to_type(chip: str, tmp_path: Path) -> None:
    found = find_meters(wired(tmp_path, name=chip, curr1_input="620"), RPI4)
    ours = next(one for one in found if one.spec.startswith(f"{chip}:1-0040"))

    if chip == "ina260":
        assert ours.info
        assert ours.info.kind == chip
    else:
        assert ours.spec == f"{chip}:1-0040,shunt=OHM"
        assert "driver believes in 0.01 Ohm" in str(ours.reason)


def test_a_chip_that_is_unplugged_is_named(tmp_path: Path) -> None:
    machine = wired(tmp_path)
    meter = opened("ina219:0x40,shunt=0.1", machine)
    stream = meter.samples()
    next(stream)
    put(machine, {PLACE: None})

    with pytest.raises(DeviceError, match="hwmon3/power1_input"):
        next(stream)
