"""The INA3221: which channels, mV times mA, and the rails of Jetson boards."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import EnergyMeter, find_meters, open_meter
from edgeexit.meters.ina3221 import Rails
from edgeexit.meters.jetson import OldRails
from tests.trees import put, tree

ORIN = find_device("jetson-orin-nano")
RPI4 = find_device("rpi4")
PLACE = "sys/class/hwmon/hwmon5"


def breakout(folder: Path, **files: str) -> Machine:
    """A bought INA3221 board: nobody labelled its channels."""
    laid = {f"{PLACE}/name": "ina3221"}
    for channel, (volts_mv, current_ma) in {1: (5100, 6200), 2: (0, 0), 3: (3300, 80)}.items():
        laid |= {
            f"{PLACE}/in{channel}_input": f"{volts_mv}",
            f"{PLACE}/curr{channel}_input": f"{current_ma}",
            f"{PLACE}/shunt{channel}_resistor": "10000",
            f"{PLACE}/in{channel}_enable": "1",
        }
    laid |= {f"{PLACE}/{name}": text for name, text in files.items()}
    machine = Machine(folder)
    put(machine, laid)
    return machine


def read(spec: str, machine: Machine) -> float | None:
    meter = open_meter(spec, machine, RPI4)
    assert isinstance(meter, Rails | OldRails)
    value = meter.read()
    meter.close()
    return value


def test_power_is_millivolts_times_milliamperes_of_the_named_channel(tmp_path: Path) -> None:
    machine = breakout(tmp_path)

    assert read("ina3221,rails=1,shunt=0.1", machine) == 5100 * 620 / 1000
    assert read("ina3221,rails=1+3,shunt=0.1", machine) == 5100 * 620 / 1000 + 3300 * 8 / 1000


def test_the_channel_and_its_shunt_must_be_stated(tmp_path: Path) -> None:
    machine = breakout(tmp_path)

    with pytest.raises(UsageError, match=r"which of its channels\? \(1, 2, 3\)"):
        read("ina3221,shunt=0.1", machine)
    with pytest.raises(UsageError, match=r"not stated; the driver believes in 0\.01 Ohm"):
        read("ina3221,rails=1", machine)


def test_a_wrong_belief_is_said_and_the_whole_board_is_external(tmp_path: Path) -> None:
    info = open_meter("ina3221,rails=1,shunt=0.1", breakout(tmp_path), RPI4).info

    assert info.label == "external"
    assert "multiplied by 0.1" in info.details["warning"]


def test_a_channel_that_is_switched_off_is_no_channel(tmp_path: Path) -> None:
    machine = breakout(tmp_path, in2_enable="0", in3_enable="0")

    assert read("ina3221,shunt=0.1", machine) == 3162.0
    with pytest.raises(UsageError, match=r"no single rail '3' \(have: 1\)"):
        read("ina3221,rails=3,shunt=0.1", machine)


@pytest.mark.parametrize("rails", ["", "4", "1+1", "1+", "VDD", "1,2"])
def test_rails_that_are_not_there_or_stand_twice_are_refused(rails: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read(f"ina3221,rails={rails},shunt=0.1", breakout(tmp_path))


def test_full_scale_is_refused(tmp_path: Path) -> None:
    machine = breakout(tmp_path, curr1_input="16380")

    with pytest.raises(DeviceError, match="full scale"):
        read("ina3221,rails=1,shunt=0.1", machine)


@given(
    st.lists(st.tuples(st.integers(0, 26000), st.integers(0, 16000)), min_size=3, max_size=3),
    st.permutations([1, 2, 3]),
)
def test_the_sum_does_not_depend_on_the_order_of_the_rails(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[tuple[int, int]],
    order: list[int],
) -> None:
    files = {}
    for channel, (volts_mv, current_ma) in enumerate(values, 1):
        files |= {f"in{channel}_input": f"{volts_mv}", f"curr{channel}_input": f"{current_ma}"}
    machine = breakout(tmp_path_factory.mktemp("tree"), **files)

    found = read(f"ina3221,rails={'+'.join(map(str, order))},shunt=0.01", machine)

    assert found == pytest.approx(sum(v * i for v, i in values) / 1000, abs=1e-9)


def test_a_bought_board_is_listed_with_what_to_type(tmp_path: Path) -> None:
    specs = [found.spec for found in find_meters(breakout(tmp_path), RPI4)]

    assert "ina3221,rails=1,shunt=OHM" in specs


# ---------------------------------------------------------------- Jetson


def orin(folder: Path, **files: str | None) -> Machine:
    machine = tree(folder, "jetson-orin-nano")
    put(machine, {f"sys/class/hwmon/hwmon1/{name}": text for name, text in files.items()})
    return machine


def test_a_jetson_is_read_at_its_modules_input_alone(tmp_path: Path) -> None:
    """The other rails hang behind VDD_IN: adding them would count them twice."""
    machine = orin(tmp_path)
    meter = open_meter("jetson", machine, ORIN)

    assert read("jetson", machine) == 5080 * 976 / 1000
    assert meter.info.label == "partial"
    assert meter.info.details["rails"] == ["VDD_IN"]
    assert "carrier board" in meter.info.boundary
    assert meter.info.rate_hz == 20


def test_a_jetsons_rails_can_be_chosen(tmp_path: Path) -> None:
    assert read("jetson,rails=VDD_CPU_GPU_CV", orin(tmp_path)) == 5072 * 120 / 1000


def test_a_jetsons_shunt_is_the_device_trees(tmp_path: Path) -> None:
    info = open_meter("jetson", orin(tmp_path), ORIN).info

    assert info.details["shunts_ohm"] == [0.005]
    assert "warning" not in info.details


def test_the_rails_of_an_agx_orin_are_added_up_without_their_children(tmp_path: Path) -> None:
    machine = orin(tmp_path, in1_label="VDD_GPU_SOC", in2_label="VDD_CPU_CV")
    put(machine, {"sys/class/hwmon/hwmon1/in3_label": "VIN_SYS_5V0"})
    second = "sys/class/hwmon/hwmon2"
    put(machine, {f"{second}/name": "ina3221"})
    for channel, label in enumerate(["NC", "VDDQ_VDD2_1V8AO", "NC"], 1):
        put(
            machine,
            {
                f"{second}/in{channel}_label": label,
                f"{second}/in{channel}_input": "5000",
                f"{second}/curr{channel}_input": "100",
                f"{second}/shunt{channel}_resistor": "2000",
            },
        )

    expected = (5080 * 976 + 5072 * 120 + 5080 * 288) / 1000
    assert read("jetson", machine) == pytest.approx(expected, abs=1e-9)


def test_a_jetson_whose_labels_are_unknown_must_be_told_which(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the rails is known as the module's input"):
        read("jetson", orin(tmp_path, in1_label="VDD_MYSTERY"))


def old(folder: Path) -> Machine:
    place = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {}
    for channel, (label, power_mw) in enumerate(
        [("POM_5V_IN", 2875), ("POM_5V_GPU", 40), ("POM_5V_CPU", 610)]
    ):
        files |= {
            f"{place}/rail_name_{channel}": f"{label}\n",
            f"{place}/in_power{channel}_input": f"{power_mw}\n",
        }
    return tree(folder, "rpi4", files=files)


def test_an_old_jetsons_driver_is_read_as_well(tmp_path: Path) -> None:
    machine = old(tmp_path)

    assert read("jetson", machine) == 2875.0
    assert read("jetson,rails=POM_5V_GPU+POM_5V_CPU", machine) == 650.0
    assert "jetson" in [found.spec for found in find_meters(machine, RPI4) if found.info]
    with pytest.raises(UsageError, match="out of POM_5V_IN"):
        read("jetson,rails=VDD_IN", machine)


def test_a_label_with_line_ends_stays_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        read("jetson", orin(tmp_path, in1_label="A\x1b[2J\nB"))

    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_a_sensor_that_vanishes_is_named(tmp_path: Path) -> None:
    machine = orin(tmp_path)
    meter: EnergyMeter = open_meter("jetson", machine, ORIN)
    stream = meter.samples()
    next(stream)
    put(machine, {"sys/class/hwmon/hwmon1/curr1_input": None})

    with pytest.raises(DeviceError, match="hwmon1/curr1_input"):
        next(stream)
