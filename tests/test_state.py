import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trees
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeexit
from edgeexit import state
from edgeexit.machine import Machine
from edgeexit.state import emulation, machine_facts, read_state

STAT = "proc/stat"
RATE = "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq"
SYSFS = "sys/devices/platform/soc/soc:firmware/get_throttled"
CLOCK, THROTTLED = "vcgencmd measure_clock arm", "vcgencmd get_throttled"


def standing(factory: pytest.TempPathFactory, name: str) -> Machine:
    """The board *name*, written once for all examples of a property, which change it."""
    folder = factory.getbasetemp() / "standing" / name
    return Machine(folder) if folder.is_dir() else trees.tree(folder, name)


# ---------------------------------------------------------------- how it feels


def test_a_machine_that_says_nothing_feels_nothing(tmp_path: Path) -> None:
    found = read_state(Machine(tmp_path))
    said = {name: getattr(found, name) for name in found.__dataclass_fields__}
    assert said.pop("at_ns") > 0
    assert said.pop("own_ms") >= 0
    assert set(said.values()) == {None, ()}


def test_this_machine_can_be_asked() -> None:
    before, after = read_state(Machine()), read_state(Machine())
    assert after.at_ns > before.at_ns
    assert after.busy_ms is not None and before.busy_ms is not None
    assert after.busy_ms >= before.busy_ms
    assert (after.own_ms or 0) >= (before.own_ms or 0) > 0


def test_a_pi4_is_read(tmp_path: Path) -> None:
    found = read_state(trees.tree(tmp_path, "rpi4"))
    assert found.clocks_mhz == (1800.457088,)
    assert found.governors == ("ondemand",)
    assert found.temperature_c == 48.686
    assert found.throttled == 0
    assert found.load_1m == 0.08
    assert found.pressure_us == 1234567
    assert found.memory_available_mb == pytest.approx(3884360 * 3 / 4 / 1024, abs=0.1)
    assert found.swap_used_mb == pytest.approx(1.0)
    # user, nice, system, irq and softirq of four cores, in hundredths of a second.
    assert found.busy_ms == 4 * (4000 + 10 + 2000 + 0 + 30) * 10
    assert found.steal_ms == 0


def test_what_a_hypervisor_took_is_not_busy(tmp_path: Path) -> None:
    machine = trees.tree(tmp_path, "host", files={STAT: "cpu  10 0 5 99 7 1 2 40 3 0\n"})
    found = read_state(machine)
    assert (found.busy_ms, found.steal_ms) == (180, 400)


@pytest.mark.parametrize("text", ["", "cpu", "cpu  1 2", "cpu a b c d e f g h", "cpu0 1 2 3 4 5 6"])
def test_a_broken_stat_says_nothing(tmp_path: Path, text: str) -> None:
    found = read_state(trees.tree(tmp_path, "host", files={STAT: text}))
    assert (found.busy_ms, found.steal_ms) == (None, None)


def test_an_old_kernel_has_no_steal(tmp_path: Path) -> None:
    machine = trees.tree(tmp_path, "host", files={STAT: "cpu  10 0 5 99 7 1 2\n"})
    assert read_state(machine).busy_ms == 180


# ---------------------------------------------------------------- clocks


def test_the_firmware_knows_the_real_clock_of_a_pi(tmp_path: Path) -> None:
    """The kernel goes on saying 1400 MHz when a warm 3B+ runs at 1200."""
    machine = trees.tree(tmp_path, "rpi3b+", commands={CLOCK: "frequency(45)=1200000000\n"})
    assert machine.number(RATE) == 1400000
    assert read_state(machine).clocks_mhz == (1200.0,)


@pytest.mark.parametrize("said", [None, "", "error=1", "frequency(0)=0", "frequency(0)=1e9"])
def test_without_the_firmwares_word_the_kernels_counts(tmp_path: Path, said: str | None) -> None:
    machine = trees.tree(tmp_path, "rpi4", commands={CLOCK: said})
    assert read_state(machine).clocks_mhz == (1800.0,)


@pytest.mark.parametrize("text", ["0\n", "-1\n", "<unknown>\n"])
def test_a_clock_that_cannot_be_is_left_out(tmp_path: Path, text: str) -> None:
    machine = trees.tree(tmp_path, "beagleplay", files={RATE: text})
    assert read_state(machine).clocks_mhz == ()


def test_there_is_one_clock_for_each_policy(tmp_path: Path) -> None:
    assert read_state(trees.tree(tmp_path, "rock5b")).clocks_mhz == (1800.0, 2400.0, 2400.0)


def test_a_machine_without_cpufreq_says_its_clock_in_cpuinfo(tmp_path: Path) -> None:
    machine = trees.tree(tmp_path, "host", files={"sys/devices/system/cpu/cpufreq": None})
    assert read_state(machine).clocks_mhz == (1600.0,)
    files = {"sys/devices/system/cpu/cpufreq": None, "proc/cpuinfo": "cpu MHz : 0.000\n"}
    assert read_state(trees.tree(tmp_path / "none", "host", files=files)).clocks_mhz == ()


@pytest.mark.parametrize("name", trees.BOARDS)
@settings(max_examples=20)
@given(mhz=st.integers(100, 5000))
def test_a_falling_clock_is_seen_on_every_board(
    tmp_path_factory: pytest.TempPathFactory, name: str, mhz: int
) -> None:
    machine = standing(tmp_path_factory, name)
    trees.set_clock(machine, mhz)
    assert set(read_state(machine).clocks_mhz) == {float(mhz)}


# ---------------------------------------------------------------- temperature


def zone(number: int, kind: str, text: str) -> dict[str, str | None]:
    place = f"sys/class/thermal/thermal_zone{number}"
    return {f"{place}/type": f"{kind}\n", f"{place}/temp": text}


def test_the_processors_zone_counts_not_the_hottest(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, zone(0, "gpu-thermal", "90000") | zone(1, "cpu-thermal", "50000"))
    assert read_state(machine).temperature_c == 50.0


def test_of_several_processor_zones_the_hottest_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(
        machine, zone(2, "bigcore0-thermal", "61000") | zone(3, "littlecore-thermal", "44000")
    )
    assert read_state(machine).temperature_c == 61.0


def test_if_no_zone_is_the_processors_the_hottest_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, zone(0, "acpitz", "27800") | zone(1, "iwlwifi_1", "39000"))
    assert read_state(machine).temperature_c == 39.0


def test_a_chip_of_the_processor_is_better_than_a_strange_zone(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    chip = {"sys/class/hwmon/hwmon3/name": "k10temp", "sys/class/hwmon/hwmon3/temp1_input": "47250"}
    trees.put(machine, zone(0, "acpitz", "27800") | chip)
    assert read_state(machine).temperature_c == 47.25


def test_a_sleeping_zone_is_left_out(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, zone(0, "cpu-thermal", "garbage") | zone(1, "soc-thermal", "41000"))
    assert read_state(machine).temperature_c == 41.0


# ---------------------------------------------------------------- throttling


@given(bits=st.integers(0, (1 << 20) - 1))
def test_throttle_bits_are_read_and_said_in_words(
    tmp_path_factory: pytest.TempPathFactory, bits: int
) -> None:
    machine = Machine(tmp_path_factory.getbasetemp() / "bits")
    trees.put(machine, commands={THROTTLED: f"throttled={bits:#x}\n"})
    assert read_state(machine).throttled == bits
    now, ever = state.throttle_now(bits), state.throttle_since_boot(bits)
    assert [word in now for word in state.THROTTLED] == [bool(bits >> k & 1) for k in range(4)]
    assert [word in ever for word in state.THROTTLED] == [
        bool(bits >> k & 1) for k in range(16, 20)
    ]


def test_words_for_a_weak_supply() -> None:
    assert state.throttle_now(0x50005) == ("under-voltage", "throttled")
    assert state.throttle_since_boot(0xD0005) == (
        "under-voltage",
        "throttled",
        "soft temperature limit",
    )


@pytest.mark.parametrize("said", [None, "error=1 error_msg=...", "VCHI initialization failed"])
def test_without_vcgencmd_the_kernels_file_is_read(tmp_path: Path, said: str | None) -> None:
    """In hexadecimal, without 0x."""
    machine = trees.tree(
        tmp_path, "rpi4", files={SYSFS: "50005\n"}, commands={THROTTLED: said, CLOCK: said}
    )
    assert read_state(machine).throttled == 0x50005


@pytest.mark.parametrize(("alarm", "bits"), [("0\n", 0), ("1\n", 1), ("", None)])
def test_the_voltage_alarm_is_the_last_to_be_asked(
    tmp_path: Path, alarm: str, bits: int | None
) -> None:
    files = {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": alarm}
    machine = trees.tree(tmp_path, "rpi4", files=files, commands={THROTTLED: None})
    assert read_state(machine).throttled == bits


@pytest.mark.parametrize("name", ["jetson-orin-nano", "rock5b", "beagleplay", "host"])
def test_other_boards_do_not_say_that_they_are_throttled(tmp_path: Path, name: str) -> None:
    assert read_state(trees.tree(tmp_path, name)).throttled is None


# ---------------------------------------------------------------- hostile files


READ = (
    *("proc/cpuinfo", "proc/meminfo", "proc/loadavg", STAT, "proc/pressure/cpu", RATE, SYSFS),
    *("sys/class/thermal/thermal_zone0/temp", "sys/class/thermal/thermal_zone0/type"),
    *("sys/class/hwmon/hwmon0/name", "sys/class/hwmon/hwmon0/temp1_input", "etc/os-release"),
    *("sys/devices/system/cpu/online", "proc/self/status", "proc/device-tree/model"),
    "proc/sys/kernel/osrelease",
)
JUNK = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(
        ["nan", "1e400", "-5", "cpu -1 nan 3 4 5 6 7 8", "0-99999999999", "3-1", ": :"]
    ),
)


@given(name=st.sampled_from(READ), junk=JUNK, said=JUNK)
def test_whatever_a_file_holds_the_answer_is_json(
    tmp_path_factory: pytest.TempPathFactory, name: str, junk: str, said: str
) -> None:
    machine = standing(tmp_path_factory, "rpi4")
    good = trees.BOARDS["rpi4"]()
    commands = dict.fromkeys([CLOCK, THROTTLED, "getconf LONG_BIT"], said)
    trees.put(machine, {name: junk}, commands)
    found = read_state(machine)
    json.dumps([getattr(found, key) for key in found.__dataclass_fields__], allow_nan=False)
    json.dumps(machine_facts(machine), allow_nan=False)
    trees.put(machine, {name: good.get(name)})


# ---------------------------------------------------------------- what it is


KEYS = {
    *("board", "revision", "cpu", "isa", "cores", "cores_usable", "max_clocks_mhz", "governors"),
    *("kernel", "machine", "userland_bits", "os", "memory_total_mb", "swap_total_mb", "libc"),
    *("python", "numpy", "edgeexit"),
}
OWN = {"python", "numpy", "edgeexit"}


def test_facts_have_the_same_keys_everywhere(tmp_path: Path) -> None:
    here, nowhere = machine_facts(Machine()), machine_facts(Machine(tmp_path))
    assert set(here) == set(nowhere) == KEYS
    assert all(not nowhere[key] for key in KEYS - OWN)
    assert here["cores_usable"] == len(os.sched_getaffinity(0))
    assert here["machine"] == os.uname().machine
    assert here["kernel"] == os.uname().release


@pytest.mark.parametrize(
    ("name", "cpu", "isa", "cores"),
    [
        ("rpi3b+", "4x Cortex-A53", ["neon"], 4),
        ("rpi4", "4x Cortex-A72", ["neon"], 4),
        ("rpi5", "4x Cortex-A76", ["neon", "dotprod", "fp16"], 4),
        ("rock5b", "4x Cortex-A55, 4x Cortex-A76", ["neon", "dotprod", "fp16"], 8),
        ("jetson-orin-nano", "6x Cortex-A78AE", ["neon", "dotprod", "fp16"], 6),
        ("host", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", ["sse4.1", "avx2"], 2),
    ],
)
def test_processors_are_called_by_their_names(
    tmp_path: Path, name: str, cpu: str, isa: list[str], cores: int
) -> None:
    found = machine_facts(trees.tree(tmp_path, name))
    assert (found["cpu"], found["isa"], found["cores"]) == (cpu, isa, cores)


def test_the_facts_of_a_board(tmp_path: Path) -> None:
    found = machine_facts(trees.tree(tmp_path, "rpi4"))
    assert found["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["revision"] == "c03114"
    assert found["max_clocks_mhz"] == [1800.0]
    assert found["governors"] == ["ondemand"]
    assert (found["machine"], found["userland_bits"]) == ("aarch64", 64)
    assert found["libc"] == "glibc 2.36"
    assert found["os"] == "Debian GNU/Linux 12 (bookworm)"
    assert found["memory_total_mb"] == pytest.approx(3793.3)


def test_a_container_may_use_fewer_cores_than_there_are(tmp_path: Path) -> None:
    files = {"proc/self/status": "Cpus_allowed_list:\t1-2,9\n"}
    found = machine_facts(trees.tree(tmp_path, "rock5b", files=files))
    assert (found["cores"], found["cores_usable"]) == (8, 2)


def test_a_core_of_another_maker_keeps_its_numbers(tmp_path: Path) -> None:
    text = "processor\t: 0\nCPU implementer\t: 0x61\nCPU part\t: 0x022\n"
    machine = trees.tree(tmp_path, "rpi4", files={"proc/cpuinfo": text})
    assert machine_facts(machine)["cpu"] == "1x 0x61/0x022"


@pytest.mark.parametrize("name", trees.BOARDS)
def test_facts_name_no_single_machine(tmp_path: Path, name: str) -> None:
    text = json.dumps(machine_facts(trees.tree(tmp_path, name)))
    for secret in (trees.SERIAL, trees.MAC, trees.HOST_NAME):
        assert secret not in text


# ---------------------------------------------------------------- whether it is real


def test_the_machine_that_runs_these_tests_translates_nothing() -> None:
    assert state._translator(Path("/proc"), os.uname().machine) is None


def test_a_tree_is_not_real(tmp_path: Path) -> None:
    assert "EDGEEXIT_SYSROOT" in (emulation(Machine(tmp_path)) or "")


VIRT = {"proc/device-tree/compatible": "linux,dummy-virt\0"}
FW_CFG = {"proc/device-tree/fw-cfg@9020000/compatible": "qemu,fw-cfg-mmio\0"}
TCG = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n"}


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (VIRT | FW_CFG, "virt board"),
        (VIRT, None),  # Firecracker: with the processor's help, or not at all
        (FW_CFG, None),
        (TCG, "TCG"),
        ({}, None),
    ],
)
def test_a_machine_that_qemu_emulates_is_seen(
    tmp_path: Path, files: dict[str, str | None], word: str | None
) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, files)
    found = state._emulator(machine)
    assert found is None if word is None else word in (found or "")


@pytest.mark.parametrize("name", trees.BOARDS)
def test_no_real_board_is_taken_for_an_emulator(tmp_path: Path, name: str) -> None:
    assert state._emulator(trees.tree(tmp_path, name)) is None


def program(proc: Path, name: str, number: int, order: str = "little") -> Path:
    """A /proc in which the running thread's program is *name*, an ELF file for *number*."""
    head = b"\x7fELF\x02" + (b"\x01" if order == "little" else b"\x02") + b"\0" * 12
    path = proc / "bin" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(head + number.to_bytes(2, order) + b"\0" * 40)  # type: ignore[arg-type]
    (proc / "thread-self").mkdir()
    (proc / "thread-self/exe").symlink_to(path)
    return proc


@pytest.mark.parametrize(
    ("name", "number", "architecture", "is_translated"),
    [
        ("python3.11", 62, "x86_64", False),
        ("python3.11", 183, "aarch64", False),
        ("python3.11", 40, "aarch64", False),  # a 32-bit userland
        ("python3.11", 40, "armv7l", False),
        ("python3.11", 3, "x86_64", False),
        ("qemu-aarch64-static", 62, "aarch64", True),
        ("qemu-x86_64-static", 62, "x86_64", True),
        ("box64", 183, "x86_64", True),
        ("rosetta", 183, "x86_64", True),
        ("python3.11", 999, "x86_64", False),
        ("python3.11", 62, "loongarch64", False),
    ],
)
def test_a_program_for_another_processor_is_a_translator(
    tmp_path: Path, name: str, number: int, architecture: str, is_translated: bool
) -> None:
    found = state._translator(program(tmp_path, name, number), architecture)
    assert (found is not None) == is_translated
    assert found is None or name in found


def test_the_byte_order_of_a_program_is_its_own(tmp_path: Path) -> None:
    assert state._translator(program(tmp_path, "sh", 183, "big"), "aarch64") is None


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n" * 9])
def test_a_program_that_is_no_elf_file_says_nothing(tmp_path: Path, data: bytes) -> None:
    program(tmp_path, "odd", 62)
    (tmp_path / "bin/odd").write_bytes(data)
    assert state._translator(tmp_path, "x86_64") is None
    assert state._translator(tmp_path / "absent", "x86_64") is None


QEMU = f"qemu-{os.uname().machine}-static"


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"needs {QEMU}")
def test_qemu_user_is_seen_from_inside() -> None:
    """For real: this very Python, its instructions translated."""
    home = Path(edgeexit.__file__).parent.parent
    script = (
        f"import sys; sys.path.insert(0, {str(home)!r})\n"
        "from edgeexit.machine import Machine; from edgeexit.state import emulation\n"
        "print(emulation(Machine()))"
    )
    python = Path(sys.executable).resolve()
    done = subprocess.run(
        [shutil.which(QEMU) or "", "-cpu", "max", str(python), "-I", "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"qemu-user ({QEMU})"
