"""The model: idle watts times time, and watts of a core times busy time; never "measured"."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import Device, find_device
from edgeexit.errors import DeviceError
from edgeexit.machine import Machine
from edgeexit.meters import MeterInfo, open_meter
from edgeexit.meters.modelled import Modelled, busy_ticks
from tests.trees import put, tree

RPI4 = find_device("rpi4")


def opened(machine: Machine, device: Device = RPI4) -> Modelled:
    meter = open_meter("modelled", machine, device)
    assert isinstance(meter, Modelled)
    return meter


def test_its_watts_are_the_devices_with_their_source(tmp_path: Path) -> None:
    info = opened(tree(tmp_path, "rpi4")).info

    assert info.label == "modelled"
    assert "nothing is measured" in info.boundary
    assert info.details["idle_w"] == RPI4.idle_w
    assert info.details["core_w"] == RPI4.modelled_core_w
    assert "sbc-reviews" in info.details["sources"]["idle_w"]["source"]


@given(st.integers(0, 10**6), st.integers(0, 10**13))
def test_energy_is_time_at_idle_and_busy_time_on_top(
    tmp_path_factory: pytest.TempPathFactory, ticks: int, passed_ns: int
) -> None:
    """Linear in both, whatever the sampling: it is a counter."""
    now_ns = [7]
    machine = Machine(tmp_path_factory.mktemp("tree"))
    put(machine, {"proc/stat": "cpu  100 5 20 9000 1 2 3 0 0 0\ncpu0 1 2 3 4 5 6 7 0 0 0\n"})
    meter = Modelled(
        machine,
        MeterInfo(kind="modelled", label="modelled", instrument="", boundary="", rate_hz=10),
        idle_w=1.5,
        core_w=0.75,
        clock_ns=lambda: now_ns[0],
    )
    put(machine, {"proc/stat": f"cpu  {100 + ticks} 5 20 9999 9 2 3 77 0 0\n"})
    now_ns[0] += passed_ns

    assert meter.read() == pytest.approx(1500 * passed_ns / 1e9 + 750 * ticks / 100, abs=1e-6)


def test_waiting_and_stolen_time_are_not_busy() -> None:
    assert busy_ticks("cpu  1 2 4 800 1600 8 16 3200 6400 12800\n") == 1 + 2 + 4 + 8 + 16


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu 1 2 3\n", "cpu a b c d e f g h\n", "intr 1"])
def test_a_stat_file_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4")
    meter = opened(machine)
    put(machine, {"proc/stat": text})

    with pytest.raises(DeviceError, match="proc/stat"):
        meter.read()


def test_a_counter_that_steps_back_stands_still(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4")
    meter = opened(machine)
    first = meter.read()
    put(machine, {"proc/stat": "cpu  1 1 1 1 1 1 1 0 0 0\n"})
    second = meter.read()

    assert first is not None
    assert second is not None
    assert second >= first


def test_without_watts_it_says_how_to_state_them(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="nobody has stated the watts of the device host") as no:
        opened(tree(tmp_path, "rpi4"), find_device("host"))

    assert "core_w" in str(no.value.hint)
    assert "--device" in str(no.value.hint)
