"""A battery's gauge: power or voltage times current, and only while it discharges."""

from pathlib import Path

import pytest

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import find_meters, open_meter
from edgeexit.meters.battery import Battery
from tests.trees import put, tree

HOST = find_device("host")
PLACE = "sys/class/power_supply/BAT0"


def opened(machine: Machine, spec: str = "battery") -> Battery:
    meter = open_meter(spec, machine, HOST)
    assert isinstance(meter, Battery)
    return meter


def test_power_is_the_gauges_own(tmp_path: Path) -> None:
    assert opened(tree(tmp_path, "host")).read() == 6214.0


@pytest.mark.parametrize("current", ["518000", "-518000"])
def test_without_it_voltage_times_current_whatever_its_sign(current: str, tmp_path: Path) -> None:
    files = {f"{PLACE}/power_now": None, f"{PLACE}/current_now": current}

    assert opened(tree(tmp_path, "host", files=files)).read() == 11987000 * 518000 / 1e9


def test_its_rate_says_that_it_is_too_slow_for_exits(tmp_path: Path) -> None:
    info = opened(tree(tmp_path, "host")).info

    assert info.rate_hz == 0.5
    assert info.label == "external"
    with pytest.raises(UsageError, match="rate"):
        opened(tree(tmp_path, "host"), "battery,rate=10")


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown", ""])
def test_on_the_charger_it_tells_nothing_of_the_machine(status: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="expected 'Discharging'") as refusal:
        opened(tree(tmp_path, "host", files={f"{PLACE}/status": f"{status}\n"}))
    assert "unplug the charger" in str(refusal.value.hint)


def test_a_charger_that_is_plugged_in_ends_the_run(tmp_path: Path) -> None:
    machine = tree(tmp_path, "host")
    meter = opened(machine)
    meter.read()
    put(machine, {f"{PLACE}/status": "Charging\n"})

    with pytest.raises(DeviceError, match="'Charging'"):
        meter.read()


def test_a_mouses_battery_is_none_of_the_machines(tmp_path: Path) -> None:
    mouse = "sys/class/power_supply/hid-mouse"
    files = {f"{mouse}/type": "Battery", f"{mouse}/scope": "Device", f"{mouse}/status": "Full"}
    machine = tree(tmp_path, "host", files=files)

    assert opened(machine).read() == 6214.0
    assert not [found for found in find_meters(machine, HOST) if "mouse" in found.spec]


def test_one_of_several_is_named(tmp_path: Path) -> None:
    second = "sys/class/power_supply/BAT1"
    files = {
        f"{second}/type": "Battery\n",
        f"{second}/status": "Discharging\n",
        f"{second}/power_now": "1000000\n",
    }
    machine = tree(tmp_path, "host", files=files)

    assert opened(machine, "battery:BAT1").read() == 1000.0
    with pytest.raises(UsageError, match=r"several \(BAT0, BAT1\)"):
        opened(machine)
    with pytest.raises(DeviceError, match=r"no such battery .*have: BAT0, BAT1"):
        opened(machine, "battery:../BAT0")


def test_a_battery_that_is_taken_out_is_named(tmp_path: Path) -> None:
    machine = tree(tmp_path, "host")
    meter = opened(machine)
    meter.read()
    put(machine, {PLACE: None})

    with pytest.raises(DeviceError, match="BAT0/status"):
        meter.read()
