"""Each finding fires where it should and nowhere else; nothing hostile ends the doctor."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import BOARDS, put, tree

from edgeexit import doctor, installation, symptoms, vitals
from edgeexit.cli import entry
from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.installation import Installation, Trial, try_runtime
from edgeexit.machine import Machine
from edgeexit.meters import MeterInfo, Sample
from edgeexit.meters.check import LoadTest, judged
from edgeexit.state import Reading, machine_facts, read_state
from edgeexit.symptoms import FAILED, OK, UNKNOWN, WARNING, Finding, Folder, Patient, Process

WORKS = Trial(
    numpy="2.4.6",
    runtime="ai-edge-litert 2.3.0",
    delegate="XNNPACK",
    selftest="16 samples, 480 logits, 0 differ, by at most 0",
)
SOUND = Installation(
    installed={"ai-edge-litert": "2.3.0", "numpy": "2.4.6", "picamera2": "0.3.12"},
    camera="",
    tags=("cp311-cp311-manylinux_2_27_aarch64",),
    trial=WORKS,
)
CPU = "sys/devices/system/cpu"
POLICY = f"{CPU}/cpufreq/policy0"
THROTTLED = "vcgencmd get_throttled"
SYNCHRONIZED = "run/systemd/timesync/synchronized"


def look(machine: Machine, here: Installation = SOUND, **options: Any) -> dict[str, Finding]:
    """Examine a tree; a bug in a check is a failed test."""
    found = doctor.examine(machine, is_quick=True, here=here, **options)
    for name, finding in found.items():
        assert doctor.BUG not in finding.seen, f"{name}: {finding.seen}"
    return found


def sound(folder: Path, board: str = "rpi5") -> Machine:
    """A board on which nothing is wrong, except that it is a tree."""
    return tree(
        folder,
        board,
        files={
            SYNCHRONIZED: "",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
            **{f"{CPU}/cpufreq/policy{n}/scaling_governor": "performance\n" for n in (0,)},
        },
    )


def test_nothing_is_wrong_with_a_sound_board(tmp_path: Path) -> None:
    found = look(sound(tmp_path))

    statuses = {name: f.status for name, f in found.items() if f.status != OK}
    assert statuses == {"emulation": WARNING}


def test_every_finding_that_is_not_well_says_what_to_do(tmp_path: Path) -> None:
    for board in BOARDS:
        for name, finding in look(tree(tmp_path / board, board), Installation()).items():
            if finding.status in (WARNING, FAILED):
                assert finding.fix, name
            if finding.status == OK:
                assert finding.fix is None, name


# name of the finding, status, what it says, files, commands; all on a sound rpi5
CASES: list[tuple[str, str, str, dict[str, str | None], dict[str, str | None]]] = [
    ("device", WARNING, "no file in devices/", {"proc/device-tree/model": "Banana 9\0"}, {}),
    ("processor", OK, "dotprod", {}, {}),
    ("processor", UNKNOWN, "no features", {"proc/cpuinfo": "processor: 0\n"}, {}),
    ("processor", UNKNOWN, "no features", {"proc/cpuinfo": None}, {}),
    (
        "processor",
        FAILED,
        "no vector unit",
        {"proc/cpuinfo": "processor\t: 0\nFeatures\t: half thumb vfp\n"},
        {},
    ),
    ("cores", UNKNOWN, "lists no cores", {f"{CPU}/online": None, f"{CPU}/present": None}, {}),
    ("cores", WARNING, "1 of 4 cores are switched off: 2", {f"{CPU}/online": "0-1,3\n"}, {}),
    ("isolated cores", WARNING, "2-3 are kept free", {f"{CPU}/isolated": "2-3\n"}, {}),
    ("cpu quota", OK, "none", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, {}),
    ("cpu quota", OK, "none", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, {}),
    ("cpu quota", WARNING, "1.50 of 4", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, {}),
    ("cpu quota", FAILED, "0.50 of 4", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, {}),
    (
        "cpu quota",
        FAILED,
        "0.25 of 4",
        {
            "proc/self/cgroup": "0::/../pod.slice/box\n",
            "sys/fs/cgroup/pod.slice/cpu.max": "25000 100000\n",
            "sys/fs/cgroup/pod.slice/box/cpu.max": "max 100000\n",
        },
        {},
    ),
    (
        "cpu quota",
        WARNING,
        "2.00 of 4",
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/box\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
        {},
    ),
    (
        "cpu quota",
        OK,
        "none",
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        {},
    ),
    ("governor", WARNING, "ondemand: the clock", {f"{POLICY}/scaling_governor": "ondemand\n"}, {}),
    ("governor", UNKNOWN, "no cpufreq", {f"{POLICY}/scaling_governor": None}, {}),
    (
        "governor",
        WARNING,
        "performance is not offered",
        {
            f"{POLICY}/scaling_governor": "schedutil\n",
            f"{POLICY}/scaling_available_governors": "schedutil powersave\n",
        },
        {},
    ),
    (
        "clock",
        WARNING,
        "1500 MHz of 2400",
        {},
        {"vcgencmd measure_clock arm": "frequency(0)=1500000000"},
    ),
    (
        "clock",
        WARNING,
        "limited to 1500 MHz of 2400",
        {f"{POLICY}/scaling_max_freq": "1500000"},
        {},
    ),
    ("clock", UNKNOWN, "nothing tells its maximum", {f"{POLICY}/cpuinfo_max_freq": None}, {}),
    (
        "clock",
        UNKNOWN,
        "1500 MHz of 2400 at rest",
        {f"{POLICY}/scaling_governor": "ondemand\n"},
        {"vcgencmd measure_clock arm": "frequency(0)=1500000000"},
    ),
    (
        "clock",
        WARNING,
        "3000 MHz, above the 2400 MHz of a Raspberry Pi 5",
        {f"{POLICY}/{name}_max_freq": "3000000" for name in ("cpuinfo", "scaling")},
        {"vcgencmd measure_clock arm": "frequency(0)=3000000000"},
    ),
    ("throttling", FAILED, "under-voltage", {}, {THROTTLED: "throttled=0x50005\n"}),
    ("throttling", FAILED, "soft temperature limit", {}, {THROTTLED: "throttled=0x8\n"}),
    (
        "throttling",
        WARNING,
        "since the start: under-voltage",
        {},
        {THROTTLED: "throttled=0x10000\n"},
    ),
    ("throttling", WARNING, "since the start: throttled", {}, {THROTTLED: "throttled=0x40000\n"}),
    (
        "throttling",
        FAILED,
        "cpufreq-cpu0 at 3",
        {
            "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
            "sys/class/thermal/cooling_device0/cur_state": "3\n",
        },
        {},
    ),
    (
        "throttling",
        OK,
        "not now",
        {
            "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
            "sys/class/thermal/cooling_device0/cur_state": "3\n",
        },
        {},
    ),
    (
        "temperature",
        FAILED,
        "83 C, it slows down at 80 C",
        {"sys/class/thermal/thermal_zone0/temp": "83000"},
        {},
    ),
    ("temperature", WARNING, "75 C", {"sys/class/thermal/thermal_zone0/temp": "75000"}, {}),
    (
        "temperature",
        WARNING,
        "49 C, it slows down at 55 C",
        {
            "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
            "sys/class/thermal/thermal_zone0/trip_point_0_temp": "55000\n",
        },
        {},
    ),
    (
        "temperature",
        OK,
        "49 C, it slows down at 70 C",
        {},
        {"vcgencmd get_config temp_soft_limit": "temp_soft_limit=70\n"},
    ),
    ("other load", WARNING, "load 2.50", {"proc/loadavg": "2.50 1.0 1.0 3/180 99\n"}, {}),
    ("pressure", WARNING, "no pressure figures", {"proc/pressure/cpu": None}, {}),
    (
        "memory",
        FAILED,
        "31 MB free",
        {"proc/meminfo": "MemTotal: 400000 kB\nMemAvailable: 32000 kB\n"},
        {},
    ),
    ("memory", WARNING, "98 MB free", {"proc/meminfo": "MemAvailable: 100000 kB\n"}, {}),
    ("memory", UNKNOWN, "does not tell", {"proc/meminfo": None}, {}),
    (
        "swap",
        WARNING,
        "98 MB lie in a disk",
        {
            "proc/meminfo": "SwapTotal: 200000 kB\nSwapFree: 100000 kB\nMemAvailable: 9000000 kB\n",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/var/swap file 200000 100000 -2\n",
        },
        {},
    ),
    (
        "swap",
        WARNING,
        "98 MB lie in zram",
        {
            "proc/meminfo": "SwapTotal: 200000 kB\nSwapFree: 100000 kB\nMemAvailable: 9000000 kB\n",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 2 1 100\n",
        },
        {},
    ),
    ("wall clock", UNKNOWN, "nothing tells", {SYNCHRONIZED: None}, {}),
    (
        "wall clock",
        WARNING,
        "not synchronized",
        {SYNCHRONIZED: None},
        {"timedatectl show -p NTPSynchronized --value": "no\n"},
    ),
    (
        "wall clock",
        OK,
        "synchronized",
        {SYNCHRONIZED: None},
        {"timedatectl show -p NTPSynchronized --value": "yes\n"},
    ),
    ("meter", OK, "pmic", {}, {}),
    ("meter", UNKNOWN, "pmic", {}, {"vcgencmd pmic_read_adc": None}),
]


@pytest.mark.parametrize(("name", "status", "says", "files", "commands"), CASES)
def test_a_sick_board_is_found_out(
    tmp_path: Path,
    name: str,
    status: str,
    says: str,
    files: dict[str, str | None],
    commands: dict[str, str | None],
) -> None:
    machine = sound(tmp_path)
    put(machine, files, commands)

    found = look(machine)[name]

    assert (found.status, says in found.seen) == (status, True), found


def test_every_check_on_files_is_seen_to_fire_and_not_to_fire() -> None:
    fired = {name for name, status, *_ in CASES if status != OK}

    # What is not in the table has tests of its own below.
    assert set(symptoms.CHECKS) | set(vitals.CHECKS) <= fired | {
        "power supply",
        "folder",
        "temporary folder",
    }


def test_the_supply_of_a_pi_5_must_grant_five_ampere(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    assert "power supply" not in look(machine)
    place = machine.path("proc/device-tree/chosen/power/max_current")
    place.parent.mkdir(parents=True)
    expected = {3000: WARNING, 5000: OK, 0: UNKNOWN}
    for granted_ma, status in expected.items():
        place.write_bytes(granted_ma.to_bytes(4, "big"))
        assert look(machine)["power supply"].status == status
    place.write_bytes(b"\1")
    assert look(machine)["power supply"].status == UNKNOWN


def test_without_vcgencmd_a_pi_cannot_tell_that_it_throttles(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    put(machine, dict.fromkeys(machine.glob("sys/class/hwmon/hwmon*/in0_lcrit_alarm")))
    put(machine, commands={THROTTLED: None})

    assert "apt install" in (look(machine)["throttling"].fix or "")
    put(machine, {"usr/bin/vcgencmd": ""})
    assert "usermod" in (look(machine)["throttling"].fix or "")


def test_other_boards_tell_it_by_their_cooling_devices(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rock5b")
    assert look(machine)["throttling"].status == UNKNOWN
    put(machine, {"sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n"})
    assert look(machine)["throttling"].status == OK


def test_the_fix_of_the_governor_can_be_undone(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rock5b")
    everywhere = look(machine)["governor"]
    assert everywhere.fix == f"echo performance | sudo tee /{CPU}/cpufreq/policy*/scaling_governor"
    assert everywhere.undo == f"echo ondemand | sudo tee /{CPU}/cpufreq/policy*/scaling_governor"

    put(machine, {f"{POLICY}/scaling_governor": "performance\n"})
    put(machine, {f"{CPU}/cpufreq/policy4/scaling_governor": "powersave\n"})
    mixed = look(machine)["governor"]
    assert "policy0" not in f"{mixed.fix}{mixed.undo}"
    assert mixed.undo == (
        f"echo powersave | sudo tee /{CPU}/cpufreq/policy4/scaling_governor && "
        f"echo ondemand | sudo tee /{CPU}/cpufreq/policy6/scaling_governor"
    )


def test_pressure_figures_are_switched_on_where_the_firmware_reads_its_line(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    put(machine, {"proc/pressure/cpu": None})
    assert "sed" not in (look(machine)["pressure"].fix or "")
    put(machine, {"boot/firmware/cmdline.txt": "console=tty1\n"})
    assert "/boot/firmware/cmdline.txt" in (look(machine)["pressure"].fix or "")


def test_a_jetson_gets_its_cores_back_by_its_own_tool(tmp_path: Path) -> None:
    machine = tree(tmp_path, "jetson-orin-nano", files={f"{CPU}/online": "0-3\n"})

    assert look(machine)["cores"].fix == "sudo nvpmodel -m 0"


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_that_is_asked_for_must_be_this_one(tmp_path: Path, board: str) -> None:
    machine = tree(tmp_path, board)

    assert look(machine)["device"].status == OK
    assert look(machine, device_name=board)["device"].status == OK
    other = "rpi4" if board != "rpi4" else "rpi5"
    assert look(machine, device_name=other)["device"].status == WARNING


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    with pytest.raises(UsageError, match="no device named 'rpi55'"):
        look(machine, device_name="rpi55")
    with pytest.raises(UsageError, match="no meter named 'ina21'"):
        look(machine, meter="ina21")


def test_a_meter_that_was_named_must_be_there(tmp_path: Path) -> None:
    machine = sound(tmp_path)

    assert look(machine, meter="ina219,shunt=0.1")["meter"].status == FAILED
    assert look(machine, meter="pmic")["meter"].status == OK
    assert look(machine, meter="none")["meter"].status == OK


RAILS = MeterInfo(
    kind="pmic", label="partial", instrument="a chip", boundary="some rails", rate_hz=10.0
)


class Fake:
    """A meter on the desk."""

    def __init__(self, **changes: Any) -> None:
        self.info = dataclasses.replace(RAILS, **changes)
        self.is_closed = False

    def samples(self) -> Iterator[Sample]:
        yield from ()

    def close(self) -> None:
        self.is_closed = True


def readings(idle_mw: float, busy_mw: float, rate_hz: float = 10.0) -> LoadTest:
    parts = [
        [
            Sample(at_ns=round((third * 20 + k) * 1e9 / rate_hz), power_mw=mw + k % 2)
            for k in range(20)
        ]
        for third, mw in enumerate((idle_mw, busy_mw, idle_mw))
    ]
    return judged(RAILS, parts, find_device("rpi5"), cost=0.001, seconds=6.0)


@pytest.mark.parametrize(
    ("test", "status", "says"),
    [
        (readings(2500, 8000), OK, "2.50 W idle, +5.50 W busy"),
        (readings(2500, 2500), FAILED, "all cores busy"),
        (readings(25000, 80000), FAILED, "is the shunt right?"),
        (readings(2500, 8000, rate_hz=2.0), WARNING, "2.0 samples a second"),
    ],
)
def test_a_meter_must_see_the_cores_at_work(
    monkeypatch: pytest.MonkeyPatch, test: LoadTest, status: str, says: str
) -> None:
    fake = Fake()
    monkeypatch.setattr(doctor, "open_meter", lambda *args: fake)
    monkeypatch.setattr(doctor, "load_test", lambda *args, **kwargs: test)

    found = doctor._meter(Machine(), find_device("rpi5"), "pmic", is_quick=False)

    assert (found.status, says in found.seen, fake.is_closed) == (status, True, True), found


def test_a_meter_that_is_too_slow_or_fails_in_its_test_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vanish(*args: Any, **kwargs: Any) -> LoadTest:
        raise DeviceError("it is gone", hint="plug it in")

    slow = Fake(rate_hz=1 / 60)
    monkeypatch.setattr(doctor, "open_meter", lambda *args: slow)
    found = doctor._meter(Machine(), find_device("rpi5"), "battery", is_quick=False)
    assert (found.status, found.fix) == (UNKNOWN, "edgeexit meters test battery --seconds 1080")

    monkeypatch.setattr(doctor, "open_meter", lambda *args: Fake())
    monkeypatch.setattr(doctor, "load_test", vanish)
    found = doctor._meter(Machine(), find_device("rpi5"), "pmic", is_quick=False)
    assert (found.status, found.fix) == (FAILED, "plug it in")


def test_only_a_real_machine_is_not_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = sound(tmp_path)
    assert look(machine)["emulation"].status == WARNING
    monkeypatch.setattr(doctor, "emulation", lambda machine: None)
    assert look(machine)["emulation"].status == OK


# ---------------------------------------------------------------- readings of a live machine


def patient(machine: Machine, **changes: Any) -> Patient:
    reading = read_state(machine)
    return Patient(
        machine=machine,
        device=find_device("rpi5"),
        facts=machine_facts(machine),
        **{
            **dict.fromkeys(("before", "after", "busy"), reading),
            **dict.fromkeys(("folder", "temporary"), Folder(free_bytes=10**10, is_writable=True)),
            "now_s": time.time(),
            **changes,
        },
    )


def second(**changes: Any) -> tuple[Reading, Reading]:
    """Two readings one second apart; by default nothing happened in between."""
    before = Reading(at_ns=0, busy_ms=5000.0, own_ms=200.0, steal_ms=0.0)
    return before, dataclasses.replace(before, at_ns=1_000_000_000, **changes)


def test_a_program_that_takes_a_core_is_named(tmp_path: Path) -> None:
    before, after = second(busy_ms=5900.0)
    hog = Process(pid=77, name="make \x1b[2J", share=0.8)

    found = symptoms.other_load(patient(sound(tmp_path), before=before, after=after, busiest=hog))

    assert found.status == WARNING
    assert "90% of a core" in found.seen
    assert "process 77" in (found.fix or "")
    assert "\x1b" not in found.seen


@given(
    own_ms=st.floats(0, 1000),
    others_ms=st.floats(0, 4000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_own_work_is_no_other_load(tmp_path: Path, own_ms: float, others_ms: float) -> None:
    before, after = second(busy_ms=5000 + own_ms + others_ms, own_ms=200 + own_ms)
    looked = patient(Machine(tmp_path), before=before, after=after)

    found = symptoms.other_load(looked)

    assert found.status == (WARNING if others_ms > 71 else OK) or 69 < others_ms < 71


def test_time_that_a_hypervisor_takes_is_other_load(tmp_path: Path) -> None:
    before, after = second(steal_ms=50.0)

    found = symptoms.other_load(patient(Machine(tmp_path), before=before, after=after))

    assert (found.status, "hypervisor took 5%" in found.seen) == (WARNING, True)


def test_the_clock_is_judged_while_a_core_computes(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    put(machine, {f"{POLICY}/scaling_governor": "ondemand\n"})
    reading = read_state(machine)
    slow, fast = (
        dataclasses.replace(reading, at_ns=reading.at_ns + 1, clocks_mhz=(mhz,))
        for mhz in (1500.0, 2390.0)
    )

    assert vitals.clock(patient(machine, after=reading, busy=slow)).status == WARNING
    assert vitals.clock(patient(machine, after=reading, busy=fast)).status == OK


def test_one_busy_domain_of_several_is_enough_to_see_the_clock(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rock5b")
    reading = read_state(machine)
    busy = dataclasses.replace(reading, at_ns=reading.at_ns + 1, clocks_mhz=(408, 2400, 408))

    assert vitals.clock(patient(machine, after=reading, busy=busy)).status == OK


def test_cores_that_this_process_may_not_use_are_missed(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    here = patient(machine, usable=frozenset({0, 1}))
    assert "0-1 only, of 0-3" in vitals.cores(here).seen
    put(machine, {f"{CPU}/isolated": "2-3\n"})
    assert vitals.cores(here).status == OK
    assert vitals.isolated_cores(here).status == WARNING
    on_them = patient(machine, usable=frozenset({2, 3}))
    assert vitals.isolated_cores(on_them).status == OK


@pytest.mark.parametrize(
    ("seconds", "status"),
    [(0, FAILED), (1.7e9, FAILED), (2e9, OK), (-1e30, FAILED), (1e30, FAILED)],
)
def test_a_board_without_a_clock_is_found_out(tmp_path: Path, seconds: float, status: str) -> None:
    assert symptoms.wall_clock(patient(sound(tmp_path), now_s=seconds)).status == status


@pytest.mark.parametrize(
    ("free_bytes", "is_writable", "status"),
    [
        (10**12, True, OK),
        (50 * 10**6, True, WARNING),
        (10**6, True, FAILED),
        (10**12, False, FAILED),
    ],
)
def test_results_need_a_place(
    tmp_path: Path, free_bytes: int, is_writable: bool, status: str
) -> None:
    place = Folder(free_bytes=free_bytes, is_writable=is_writable)

    assert symptoms.folder(patient(Machine(tmp_path), folder=place)).status == status
    assert symptoms.temporary_folder(patient(Machine(tmp_path), temporary=place)).status == status


def test_a_folder_that_somebody_removed_takes_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, here = sound(tmp_path / "board"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert look(board)["folder"].status == OK
    here.rmdir()
    assert look(board)["folder"].status == FAILED


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_of_cores_are_read_as_the_kernel_writes_them(cores: set[int]) -> None:
    assert vitals.core_list(vitals._as_list(cores)) == tuple(sorted(cores))


@pytest.mark.parametrize(
    "text", ["", "x", "3-1", "3-", "0-99999", "-1", "0--3", "1;2", "9" * 5000, None]
)
def test_what_is_no_list_of_cores_is_none(text: str | None) -> None:
    assert vitals.core_list(text) is None


# ---------------------------------------------------------------- Python and its wheels

DEAD = Trial(numpy="2.4.6", died="was ended by SIGILL")
ABSENT = Trial(numpy="2.4.6", error="no TFLite runtime on this machine")
OLD = {"tflite-runtime": "2.14.0", "numpy": "2.4.6"}

# finding, status, what it says, what is different from a sound installation
# What a module compiled for numpy 1 says under numpy 2 (simplejpeg 1.7.2, numpy 2.4.6).
CLASH = (
    "ValueError: numpy.dtype size changed, may indicate binary incompatibility. "
    "Expected 96 from C header, got 88 from PyObject"
)
PYTHON_CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("userland", FAILED, "darwin", {"system": "darwin"}),
    ("userland", OK, "64 bit, x86_64", {"architecture": "x86_64"}),
    ("userland", FAILED, "riscv64", {"architecture": "riscv64", "trial": ABSENT}),
    (
        "userland",
        FAILED,
        "32-bit programs on a 64-bit kernel",
        {"pointer_bits": 32, "userland_bits": 32, "trial": ABSENT},
    ),
    (
        "userland",
        WARNING,
        "32-bit programs on a 64-bit kernel",
        {"pointer_bits": 32, "userland_bits": 32},
    ),
    (
        "userland",
        FAILED,
        "no runtime is built for 32-bit x86_64",
        {"pointer_bits": 32, "architecture": "x86_64", "trial": ABSENT},
    ),
    (
        "userland",
        FAILED,
        "a 32-bit Python on a 64-bit system",
        {"pointer_bits": 32, "trial": ABSENT},
    ),
    (
        "userland",
        FAILED,
        "a 32-bit system (armv7l)",
        {"pointer_bits": 32, "userland_bits": 32, "architecture": "armv7l", "trial": ABSENT},
    ),
    ("python", OK, "cpython 3.13", {"python": (3, 13)}),
    (
        "python",
        FAILED,
        "wheels exist for CPython 3.11 to 3.14",
        {"python": (3, 15), "trial": ABSENT},
    ),
    ("python", FAILED, "3.10", {"python": (3, 10), "trial": ABSENT}),
    ("python", OK, "3.11", {"pointer_bits": 32}),
    (
        "python",
        FAILED,
        "wheels exist for CPython 3.11",
        {"pointer_bits": 32, "python": (3, 13), "trial": ABSENT},
    ),
    ("python", WARNING, "pypy", {"implementation": "pypy"}),
    ("python", FAILED, "3.13t", {"python": (3, 13), "abi_flags": "t", "trial": ABSENT}),
    ("libc", FAILED, "glibc 2.24, the wheel needs 2.27", {"libc": (2, 24), "trial": ABSENT}),
    ("libc", FAILED, "needs 2.27", {"libc": (2, 24), "tags": (), "trial": ABSENT}),
    (
        "libc",
        WARNING,
        "needs 2.34",
        {"libc": (2, 31), "tags": ("cp311-cp311-manylinux_2_34_aarch64",)},
    ),
    (
        "libc",
        OK,
        "needs 2.17",
        {"libc": (2, 17), "tags": ("a-b-manylinux2014_aarch64.manylinux_2_17_aarch64",)},
    ),
    ("libc", FAILED, "not glibc", {"libc": None, "trial": ABSENT}),
    (
        "libc",
        FAILED,
        "tflite-runtime needs 2.34",
        {"libc": (2, 31), "tags": (), "pointer_bits": 32, "trial": ABSENT},
    ),
    ("runtime", OK, "ai-edge-litert 2.3.0", {}),
    ("runtime", FAILED, "no TFLite runtime", {"installed": {}, "trial": ABSENT}),
    ("runtime", FAILED, "SIGILL", {"trial": DEAD}),
    ("runtime", FAILED, "numpy comes first", {"trial": Trial(died="was ended by SIGSEGV")}),
    ("runtime", FAILED, "none is installed", {"installed": {}, "trial": None}),
    ("runtime", UNKNOWN, "2.3.0 (not tried)", {"trial": None}),
    (
        "runtime",
        WARNING,
        "without XNNPACK",
        {"trial": dataclasses.replace(WORKS, runtime="tflite-runtime 2.14.0")},
    ),
    (
        "runtime",
        OK,
        "tflite-runtime 2.14.0",
        {"pointer_bits": 32, "trial": dataclasses.replace(WORKS, runtime="tflite-runtime 2.14.0")},
    ),
    ("numpy", OK, "2.4.6", {"trial": None}),
    ("numpy", FAILED, "SIGSEGV", {"trial": Trial(died="was ended by SIGSEGV")}),
    ("numpy", FAILED, "not installed", {"trial": None, "installed": {}}),
    ("numpy", FAILED, "built for numpy 1", {"installed": OLD}),
    ("numpy", OK, "1.26.4", {"installed": OLD | {"numpy": "1.26.4"}, "trial": None}),
    ("xnnpack", OK, "all of", {}),
    (
        "xnnpack",
        WARNING,
        "built-in",
        {"trial": dataclasses.replace(WORKS, delegate="built-in kernels")},
    ),
    ("xnnpack", UNKNOWN, "does not say", {"trial": dataclasses.replace(WORKS, delegate=None)}),
    ("xnnpack", UNKNOWN, "nobody tried", {"trial": None}),
    ("self-test", OK, "480 logits", {}),
    ("self-test", UNKNOWN, "nobody tried", {"trial": DEAD}),
    (
        "self-test",
        FAILED,
        "logits differ by 9",
        {"trial": Trial(numpy="2", runtime="x", error="self-test logits differ by 9 here")},
    ),
    ("self-test", FAILED, "SIGSEGV", {"trial": Trial(numpy="2", runtime="x", died="by SIGSEGV")}),
    ("camera", OK, "picamera2 0.3.12", {}),
    ("camera", FAILED, "picamera2 0.3.12 clashes with numpy 2.4.6: ", {"camera": CLASH}),
    ("camera", FAILED, "does not load: No module", {"camera": "No module named 'libcamera'"}),
]


@pytest.mark.parametrize(("name", "status", "says", "changes"), PYTHON_CASES)
def test_a_sick_installation_is_found_out(
    name: str, status: str, says: str, changes: dict[str, Any]
) -> None:
    found = installation.CHECKS[name](dataclasses.replace(SOUND, **changes))

    assert found is not None
    assert (found.status, says in found.seen) == (status, True), found
    assert (found.fix is None) == (status in (OK, UNKNOWN))


def test_where_programs_have_32_bit_every_step_is_one_that_can_be_taken_there() -> None:
    """pip's markers say aarch64 under a 64-bit kernel, but no wheel of LiteRT fits."""
    sick = dataclasses.replace(
        SOUND, pointer_bits=32, userland_bits=32, installed={"numpy": "1.24.2"}, trial=ABSENT
    )
    found = {name: check(sick) for name, check in installation.CHECKS.items()}
    steps = {name: finding.fix for name, finding in found.items() if finding and finding.fix}

    assert set(steps) >= {"userland", "runtime"}
    assert not any("litert" in step for step in steps.values())
    assert "pip install --no-deps tflite-runtime==2.14.0" in steps["runtime"]
    assert steps["userland"].endswith("or install the 64-bit system (Raspberry Pi OS 64-bit)")


def test_every_check_of_the_installation_is_seen_both_ways() -> None:
    assert set(installation.CHECKS) == {name for name, status, *_ in PYTHON_CASES if status != OK}
    found = [check(SOUND) for check in installation.CHECKS.values()]
    assert all(finding is not None and finding.status == OK for finding in found)


def test_a_machine_without_a_cameras_library_hears_nothing_of_it() -> None:
    assert installation.camera(dataclasses.replace(SOUND, camera=None)) is None


@pytest.mark.parametrize(
    ("module", "says"),
    [("", ""), ("raise ValueError('numpy.dtype size changed')", "numpy.dtype size changed")],
)
def test_the_cameras_library_is_tried_in_a_process_of_its_own(
    module: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picamera2.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert says in installation._try_camera()
    assert bool(installation._try_camera()) == bool(says)


def test_a_shell_tells_the_userland_where_getconf_is_missing(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4", commands={"getconf LONG_BIT": None})
    assert installation._userland_bits(machine) is None
    for class_byte, bits in ((b"\1", 32), (b"\2", 64), (b"\3", None)):
        machine.path("bin").mkdir(exist_ok=True)
        machine.path("bin/sh").write_bytes(b"\x7fELF" + class_byte + bytes(range(256)))
        assert installation._userland_bits(machine) == bits


def shadowed(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which the module *name* is *code*."""
    (folder / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("module", "code", "field", "says"),
    [
        ("numpy", "import os; os.kill(os.getpid(), 4)", "died", "SIGILL"),
        ("numpy", "raise ImportError('GLIBC_2.99 not found')", "error", "GLIBC_2.99"),
        ("numpy", "raise ValueError('odd')", "died", "ValueError: odd"),
        ("numpy", "import time; time.sleep(60)", "died", "still ran"),
        ("ai_edge_litert", "import os; os._exit(3)", "died", "code 3"),
        ("ai_edge_litert", "print('{noise'); print('[1]')\nraise ImportError('no')", "error", "no"),
    ],
)
def test_a_broken_wheel_ends_the_child_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    code: str,
    field: str,
    says: str,
) -> None:
    for key, value in shadowed(tmp_path, module, code).items():
        monkeypatch.setenv(key, value)

    # The module must come before the installed one, and the package of the checkout before it.
    trial = try_runtime(timeout_s=1.0 if "sleep" in code else 60.0)

    assert says in (getattr(trial, field) or ""), trial
    assert trial.runtime is None
    assert (trial.numpy is None) == (module == "numpy")


def test_the_runtime_of_this_machine_works() -> None:
    trial = try_runtime()

    assert (trial.error, trial.died) == (None, None)
    assert trial.runtime
    assert "logits" in (trial.selftest or "")


# ---------------------------------------------------------------- hostile boards


def _names() -> list[str]:
    names: set[str] = set()
    for board in BOARDS.values():
        names |= set(board())
    return sorted(
        names
        | {SYNCHRONIZED, "proc/self/cgroup", "sys/fs/cgroup/cpu.max", f"{CPU}/isolated", "bin/sh"}
        | {"proc/device-tree/chosen/power/max_current", "commands/timedatectl", "proc/7/stat"}
        | {"sys/class/thermal/cooling_device0/type", "sys/class/thermal/cooling_device0/cur_state"}
    )


NAMES = _names()


def sparse(path: Path) -> None:
    """8 GiB of nothing."""
    with path.open("wb") as file:
        file.truncate(1 << 33)


JUNK: dict[str, Callable[[Path], object]] = {
    "huge": sparse,
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 3),
    "digits": lambda path: path.write_bytes(b"9" * (1 << 15)),
    "not a number": lambda path: path.write_bytes(b"nan"),
    "infinite": lambda path: path.write_bytes(b"1e999 inf -inf"),
    "negative": lambda path: path.write_bytes(b"-1"),
    "escape codes": lambda path: path.write_bytes(b"\x1b[2J\x9b31m$(reboot); `reboot`\n"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", JUNK)
def test_a_board_of_junk_never_ends_the_doctor(tmp_path: Path, kind: str) -> None:
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            JUNK[kind](path)

    found = look(Machine(tmp_path))

    json.dumps(doctor.to_document(found), allow_nan=False)
    assert doctor.table(found).replace("\n", "").isprintable()


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.one_of(
            st.binary(max_size=40),
            st.from_regex(rb"[-+0-9.eExX,: ]{0,20}\n?", fullmatch=True),
            st.from_regex(rb"(throttled=|frequency\(0\)=|0::/)[0-9a-fx./]{0,20}", fullmatch=True),
        ),
        max_size=8,
    )
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_board_with_odd_files_never_ends_the_doctor(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    folder = tmp_path / "board"
    if not folder.exists():
        sound(folder)
    kept = {
        name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in files
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        found = look(Machine(folder))
    finally:
        for name, data in kept.items():
            if data is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data)

    assert doctor.table(found).replace("\n", "").isprintable()


def test_a_governor_cannot_smuggle_a_command_into_the_undo(tmp_path: Path) -> None:
    machine = sound(tmp_path)
    put(machine, {f"{POLICY}/scaling_governor": "x; sudo rm -rf / #\n"})

    undo = look(machine)["governor"].undo or ""

    assert shlex.split(undo)[:3] == ["echo", "x; sudo rm -rf / #", "|"]


def test_an_empty_machine_is_examined(tmp_path: Path) -> None:
    found = look(Machine(tmp_path))

    assert found["memory"].status == UNKNOWN


def test_a_check_that_goes_wrong_is_one_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(patient: Patient) -> Finding:
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(symptoms.CHECKS, "memory", broken)
    found = doctor.examine(sound(tmp_path), is_quick=True, here=SOUND)
    assert found["memory"].status == UNKNOWN
    assert "a bug in edgeexit: ZeroDivisionError at test_doctor.py" in found["memory"].seen

    monkeypatch.setattr(doctor, "read_state", broken)
    found = doctor.examine(sound(tmp_path), is_quick=True, here=SOUND)
    assert "a bug in edgeexit" in found["machine"].seen
    assert found["runtime"].status == OK


# ---------------------------------------------------------------- the command


def test_the_exit_code_tells_of_what_failed_and_not_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = sound(tmp_path)
    monkeypatch.setenv("EDGEEXIT_SYSROOT", str(tmp_path))

    assert entry(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("0 problems, 1 warning, ")

    put(machine, commands={THROTTLED: "throttled=0x50005\n"})
    assert entry(["doctor", "--quick"]) == 5
    out = capsys.readouterr().out
    assert "[x]   throttling" in out
    assert out.splitlines()[-1].startswith("1 problem, 1 warning, ")

    assert entry(["doctor", "--quick", "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == 1
    throttling = {f["name"]: f for f in document["findings"]}["throttling"]
    assert throttling["status"] == "failed"
    assert "power supply" in throttling["fix"]


def test_wrong_words_end_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["doctor", "--quick", "--device", "rpi55"]) == 2
    assert entry(["doctor", "--quick", "--meter", "nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_this_machine_is_examined_within_ten_seconds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeexit", "doctor", "--json"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 5), done.stderr
    document = json.loads(done.stdout)
    assert {f["status"] for f in document["findings"]} <= {OK, WARNING, FAILED, UNKNOWN}
    assert not [f for f in document["findings"] if doctor.BUG in f["seen"]]
