"""RAPL: package counters that wrap around, without counting their parts twice."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError
from edgeexit.machine import Machine
from edgeexit.meters import open_meter
from edgeexit.meters.rapl import Rapl
from tests.trees import put, tree

HOST = find_device("host")
ZONE = "sys/class/powercap/intel-rapl:0"


def opened(machine: Machine) -> Rapl:
    meter = open_meter("rapl", machine, HOST)
    assert isinstance(meter, Rapl)
    return meter


def test_it_counts_what_the_package_takes_from_the_first_reading_on(tmp_path: Path) -> None:
    machine = tree(tmp_path, "host")
    meter = opened(machine)

    assert meter.read() == 0.0
    put(machine, {f"{ZONE}/energy_uj": f"{121342432154 + 15_000_001}"})
    assert meter.read() == 15000.001
    assert meter.info.label == "partial"


@given(
    st.integers(1, 10**12),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=30),
    st.floats(0, 1, exclude_max=True),
)
def test_the_growth_is_the_truth_as_long_as_it_wraps_once_at_most(
    tmp_path_factory: pytest.TempPathFactory,
    most_uj: int,
    shares: list[float],
    start: float,
) -> None:
    """Any growth below the whole range, from any start: the sum of differences is exact."""
    truth_uj = int(start * (most_uj + 1))
    machine = Machine(tmp_path_factory.mktemp("tree"))
    put(
        machine,
        {
            f"{ZONE}/name": "package-0\n",
            f"{ZONE}/max_energy_range_uj": f"{most_uj}\n",
            f"{ZONE}/energy_uj": f"{truth_uj}\n",
        },
    )
    meter = opened(machine)
    first_uj = truth_uj
    assert meter.read() == 0.0
    file = machine.path(f"{ZONE}/energy_uj")

    for share in shares:
        truth_uj += int(share * (most_uj + 1))
        file.write_text(f"{truth_uj % (most_uj + 1)}\n")
        assert meter.read() == (truth_uj - first_uj) / 1000
    meter.close()


def test_parts_of_a_package_and_other_views_of_it_are_not_added(tmp_path: Path) -> None:
    """Only packages add up: not core and dram, not the whole platform, not the mmio twin."""
    more = {}
    for zone, name in {
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }.items():
        more |= {
            f"sys/class/powercap/{zone}/name": f"{name}\n",
            f"sys/class/powercap/{zone}/energy_uj": "1000\n",
            f"sys/class/powercap/{zone}/max_energy_range_uj": "262143328850\n",
        }
    machine = tree(tmp_path, "host", files=more)
    meter = opened(machine)
    meter.read()
    for name in machine.glob("sys/class/powercap/*/energy_uj"):
        put(machine, {name: f"{int(machine.line(name) or 0) + 1000}"})

    assert meter.info.details["domains"] == ["package-0", "package-1"]
    assert meter.read() == 2.0


def test_a_counter_that_may_not_be_read_says_how_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, real = tree(tmp_path, "host"), os.open

    def refuse(path: Path, *rest: int) -> int:
        if Path(path).name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeviceError, match=r"energy_uj: may not be read by this user") as refusal:
        opened(machine)
    assert "sudo chmod a+r /sys/class/powercap" in str(refusal.value.hint)


@pytest.mark.parametrize("most", [None, "0", "-5", "nan", "1.5"])
def test_a_counter_without_a_sound_range_is_refused(most: str | None, tmp_path: Path) -> None:
    machine = tree(tmp_path, "host", files={f"{ZONE}/max_energy_range_uj": most})

    with pytest.raises(DeviceError, match="where the counter wraps"):
        opened(machine)


def test_a_machine_without_counters_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no package domain"):
        opened(tree(tmp_path, "rpi4"))


def test_a_counter_that_vanishes_is_named(tmp_path: Path) -> None:
    machine = tree(tmp_path, "host")
    stream = opened(machine).samples()
    assert next(stream).energy_mj == 0.0
    put(machine, {f"{ZONE}/energy_uj": None})

    with pytest.raises(DeviceError, match="intel-rapl:0/energy_uj"):
        next(stream)
