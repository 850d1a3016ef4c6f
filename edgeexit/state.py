"""
What a machine is and how it feels: clocks, temperature, throttling, load; and whether it is real.

Callers see Reading and read_state (how it feels now), machine_facts (what it is), emulation (why
its times would mean nothing) and the words for throttle bits. Hidden here: which of several files
or commands a board speaks through, and that on a Raspberry Pi the kernel's clock is a wish while
the firmware knows the real one. Serial numbers, addresses and host names are never read.
"""

import os
import platform
import re
import struct
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeexit import __version__
from edgeexit.device import board_model
from edgeexit.machine import ENVIRONMENT, Machine, finite

_ONLINE = "sys/devices/system/cpu/online"
_POLICIES = "sys/devices/system/cpu/cpufreq/policy*"
# The Raspberry Pi kernel's own file, a hexadecimal number without 0x. Only asked where vcgencmd is
# missing: it shows what a driver saw up to 2 s ago, and its bits 16..19 do not reach back to boot.
_THROTTLED_FILES = "sys/devices/platform/*/soc:firmware/get_throttled"
THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_SINCE_BOOT = 16
# Types of thermal zones, and names of hwmon chips, that are the processor's.
_ZONES = re.compile(
    r"cpu|x86_pkg_temp|bigcore|littlecore|package|soc[-_]?thermal|main\d", re.IGNORECASE
)
_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
# The unit of /proc/stat, USER_HZ, is 1/100 s on every Linux that edgeexit runs on.
_JIFFY_MS = 10.0

# Of /proc/cpuinfo's words those that decide which int8 kernels can run.
_ISA = {
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sse4_1": "sse4.1",
    "avx2": "avx2",
    "avx512bw": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "vnni",
}
# "CPU part" where "CPU implementer" is 0x41 (Arm), as in the kernel's cputype.h.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
# Families of processors: e_machine of the ELF files that they run, how uname names them.
_FAMILIES = {
    "x86": ((3, 62), ("x86_64", "i386", "i486", "i586", "i686")),
    "arm": ((40, 183), ("aarch64", "arm")),
    "riscv": ((243,), ("riscv",)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """
    How the machine feels at one moment; None (or an empty tuple) where it does not say.

    at_ns is time.monotonic_ns(). clocks_mhz and governors hold one entry for each cpufreq
    policy, in order of policies. throttled are the bits of `vcgencmd get_throttled` (0..3 now:
    under-voltage, frequency capped, throttled, soft temperature limit; 16..19 the same since
    boot). busy_ms and steal_ms are what all cores together have spent since boot on programs
    (user, nice, system, interrupts) and lost to a hypervisor; own_ms is what the calling process
    and its ended children have. pressure_us is "some total" of /proc/pressure/cpu.
    """

    at_ns: int
    clocks_mhz: tuple[float, ...] = ()
    governors: tuple[str, ...] = ()
    temperature_c: float | None = None
    throttled: int | None = None
    load_1m: float | None = None
    busy_ms: float | None = None
    steal_ms: float | None = None
    own_ms: float | None = None
    pressure_us: float | None = None
    memory_available_mb: float | None = None
    swap_used_mb: float | None = None


def read_state(machine: Machine) -> Reading:
    """How *machine* feels now. Costs about a millisecond, on a Pi two runs of vcgencmd more."""
    at_ns = time.monotonic_ns()
    meminfo = _pairs(machine.text("proc/meminfo"))
    swap_total, swap_free = _megabytes(meminfo, "SwapTotal"), _megabytes(meminfo, "SwapFree")
    busy_ms, steal_ms = _processor_times_ms(machine)
    loads = (machine.line("proc/loadavg") or "").split()
    own = os.times()
    return Reading(
        at_ns=at_ns,
        clocks_mhz=_clocks_mhz(machine),
        governors=_governors(machine),
        temperature_c=_temperature_c(machine),
        throttled=_throttled(machine),
        load_1m=finite(loads[0]) if loads else None,
        busy_ms=busy_ms,
        steal_ms=steal_ms,
        own_ms=1e3 * (own.user + own.system + own.children_user + own.children_system),
        pressure_us=_pressure_us(machine),
        memory_available_mb=_megabytes(meminfo, "MemAvailable"),
        swap_used_mb=None if swap_total is None or swap_free is None else swap_total - swap_free,
    )


def _governors(machine: Machine) -> tuple[str, ...]:
    found = map(machine.line, machine.glob(f"{_POLICIES}/scaling_governor"))
    return tuple(name for name in found if name is not None)


def _clocks_mhz(machine: Machine) -> tuple[float, ...]:
    found = [machine.number(name) for name in machine.glob(f"{_POLICIES}/scaling_cur_freq")]
    clocks = tuple(khz / 1e3 for khz in found if khz is not None and khz > 0)
    if len(clocks) <= 1:
        # On a Pi scaling_cur_freq is what the kernel asked for, throttled or not.
        measured = _frequency_mhz(machine.run(["vcgencmd", "measure_clock", "arm"]))
        if measured is not None:
            return (measured,)
    if not clocks:
        mhz = finite(_pairs(machine.text("proc/cpuinfo")).get("cpu MHz"))
        return (mhz,) if mhz is not None and mhz > 0 else ()
    return clocks


def _frequency_mhz(text: str | None) -> float | None:
    match = re.fullmatch(r"frequency\(\d+\)=(\d{1,12})\s*", text or "")
    return int(match[1]) / 1e6 if match and int(match[1]) else None


def _temperature_c(machine: Machine) -> float | None:
    """The hottest zone or chip that is called the processor's, else the hottest of all zones."""
    ours: list[float] = []
    others: list[float] = []
    for name in machine.glob("sys/class/thermal/thermal_zone*/temp"):
        value = machine.number(name)
        if value is not None:
            kind = machine.line(f"{name.removesuffix('temp')}type") or ""
            (ours if _ZONES.search(kind) else others).append(value / 1e3)
    if not ours:
        for name in machine.glob("sys/class/hwmon/hwmon*/name"):
            if machine.line(name) in _CHIPS:
                inputs = machine.glob(f"{name.removesuffix('name')}temp*_input")
                ours += [v / 1e3 for v in map(machine.number, inputs) if v is not None]
    zones = ours or others
    return max(zones) if zones else None


def _throttled(machine: Machine) -> int | None:
    said = machine.run(["vcgencmd", "get_throttled"]) or ""
    bits = _hexadecimal(said.strip().removeprefix("throttled="))
    if bits is not None:
        return bits
    for name in machine.glob(_THROTTLED_FILES):
        bits = _hexadecimal(machine.line(name))
        if bits is not None:
            return bits
    for name in machine.glob("sys/class/hwmon/hwmon*/name"):
        if machine.line(name) == "rpi_volt":
            alarm = machine.number(f"{name.removesuffix('name')}in0_lcrit_alarm")
            return None if alarm is None else int(alarm != 0)
    return None


def _hexadecimal(text: str | None) -> int | None:
    match = re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,8})", text or "")
    return int(match[1], 16) if match else None


def throttle_now(bits: int) -> tuple[str, ...]:
    """What holds the processor back at this moment, in words."""
    return tuple(word for bit, word in enumerate(THROTTLED) if bits >> bit & 1)


def throttle_since_boot(bits: int) -> tuple[str, ...]:
    """What has held the processor back at least once since boot, in words."""
    return throttle_now(bits >> _SINCE_BOOT)


def _processor_times_ms(machine: Machine) -> tuple[float | None, float | None]:
    """Since boot, all cores: what programs took, what a hypervisor took."""
    first = (machine.text("proc/stat") or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 8 or not all(part.isdigit() for part in first[1:]):
        return None, None
    user, nice, system, _idle, _iowait, irq, softirq, *rest = map(int, first[1:])
    return (user + nice + system + irq + softirq) * _JIFFY_MS, (rest[0] if rest else 0) * _JIFFY_MS


def _pressure_us(machine: Machine) -> float | None:
    match = re.search(
        r"^some .*\btotal=(\d{1,15})\b", machine.text("proc/pressure/cpu") or "", re.M
    )
    return float(match[1]) if match else None


def _megabytes(pairs: dict[str, str], key: str) -> float | None:
    words = pairs.get(key, "").split()
    kilobytes = finite(words[0]) if words else None
    return None if kilobytes is None else round(kilobytes / 1024, 1)


# ---------------------------------------------------------------- what it is


def machine_facts(machine: Machine) -> dict[str, Any]:
    """
    What *machine* is, ready for JSON; null (or an empty list) where it does not say.

    Keys: board (the firmware's model text), revision, cpu, isa (what int8 kernels can use),
    cores, cores_usable, max_clocks_mhz and governors (one for each cpufreq policy), kernel,
    machine (such as aarch64), userland_bits, os, memory_total_mb, swap_total_mb, libc; of the
    software that asks: python, numpy, edgeexit. Nothing that would name one single machine.
    """
    blocks = _blocks(machine.text("proc/cpuinfo"))
    first = blocks[0] if blocks else {}
    meminfo = _pairs(machine.text("proc/meminfo"))
    words = (first.get("Features") or first.get("flags") or "").lower().split()
    clocks = [machine.number(name) for name in machine.glob(f"{_POLICIES}/cpuinfo_max_freq")]
    return {
        "board": board_model(machine),
        "revision": next((b["Revision"] for b in blocks if b.get("Revision")), None),
        "cpu": _processor(blocks),
        "isa": list(dict.fromkeys(_ISA[word] for word in _ISA if word in words)),
        "cores": _cores(machine, blocks),
        "cores_usable": _cores_usable(machine),
        "max_clocks_mhz": [khz / 1e3 for khz in clocks if khz is not None],
        "governors": list(_governors(machine)),
        "kernel": machine.line("proc/sys/kernel/osrelease"),
        "machine": os.uname().machine if machine.is_live else _said(machine, "uname", "-m"),
        "userland_bits": _userland_bits(machine),
        "os": _system(machine),
        "memory_total_mb": _megabytes(meminfo, "MemTotal"),
        "swap_total_mb": _megabytes(meminfo, "SwapTotal"),
        "libc": _libc(machine),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "edgeexit": __version__,
    }


def _processor(blocks: list[dict[str, str]]) -> str | None:
    """Such as "4x Cortex-A55, 4x Cortex-A76", or a PC's model name."""
    parts = Counter(
        _ARM_CORES.get(block["CPU part"].lower(), block["CPU part"])
        if block.get("CPU implementer") == "0x41"
        else f"{block.get('CPU implementer')}/{block['CPU part']}"
        for block in blocks
        if "CPU part" in block
    )
    if parts:
        return ", ".join(f"{count}x {name}" for name, count in parts.items())
    return next((block["model name"] for block in blocks if block.get("model name")), None)


def _cores(machine: Machine, blocks: list[dict[str, str]]) -> int | None:
    online = _listed(machine.line(_ONLINE))
    return len(online) or sum("processor" in block for block in blocks) or None


def _cores_usable(machine: Machine) -> int | None:
    if machine.is_live:
        return len(os.sched_getaffinity(0))
    # The kernel also allows cores that are switched off.
    allowed = _pairs(machine.text("proc/self/status")).get("Cpus_allowed_list")
    return len(_listed(allowed) & _listed(machine.line(_ONLINE))) or None


def _listed(text: str | None) -> set[int]:
    """The numbers of a kernel's list such as "0-3,8"; none if it is no list."""
    found: set[int] = set()
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None:
            return set()
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _userland_bits(machine: Machine) -> int | None:
    if machine.is_live:
        return 8 * struct.calcsize("P")
    said = finite(_said(machine, "getconf", "LONG_BIT"))
    return None if said is None else int(said)


def _libc(machine: Machine) -> str | None:
    if not machine.is_live:
        return _said(machine, "getconf", "GNU_LIBC_VERSION")
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or None
    except (OSError, ValueError):  # another C library
        return None


def _system(machine: Machine) -> str | None:
    for line in (machine.text("etc/os-release") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            return value.strip().strip("\"'") or None
    return None


def _said(machine: Machine, *argv: str) -> str | None:
    return (machine.run(argv) or "").strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- whether it is real


def emulation(machine: Machine) -> str | None:
    """
    Why times taken on *machine* would mean nothing, in words; None if it is a real machine.

    Known are qemu-user and other translators of foreign programs, qemu-system's virt board, and
    a tree instead of the live machine. A virtual machine with the processor's own help (KVM) runs
    at the processor's speed and is real, but qemu does not say which of the two it is.
    """
    translator = _translator(Path("/proc"), os.uname().machine)
    if translator is not None:
        return translator
    if not machine.is_live:
        return f"machine files are read below {ENVIRONMENT} or another tree"
    return _emulator(machine)


def _emulator(machine: Machine) -> str | None:
    """What emulates the whole machine, if anything."""
    compatible = (machine.text("proc/device-tree/compatible") or "").split("\0")
    # Firecracker and others that need KVM call their board so, too, but have no fw-cfg.
    if "linux,dummy-virt" in compatible and machine.glob("proc/device-tree/fw-cfg*"):
        return "qemu-system's virt board (device tree linux,dummy-virt)"
    if "QEMU TCG" in (_pairs(machine.text("proc/cpuinfo")).get("model name") or ""):
        return "qemu-system without the processor's help (TCG)"
    return None


def _translator(proc: Path, architecture: str) -> str | None:
    """
    What translates this process's instructions, if anything.

    qemu-user answers for /proc/self and /proc/PID, and perhaps hands out a made-up cpuinfo; the
    thread's own folder is the kernel's: there the program is the emulator.
    """
    thread = proc / "thread-self"
    try:
        program = (thread / "exe").readlink().name
    except OSError:
        return None
    if program.startswith("qemu-"):
        return f"qemu-user ({program})"
    try:
        with (thread / "exe").open("rb") as file:
            head = file.read(20)
    except OSError:
        return None
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return None
    number = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
    runs = {name for name, (numbers, _) in _FAMILIES.items() if number in numbers}
    claims = {name for name, (_, words) in _FAMILIES.items() if architecture.startswith(words)}
    if runs and claims and runs != claims:
        return f"{program}, a program for {min(runs)}, runs this one, which is for {architecture}"
    return None


def _blocks(text: str | None) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one for each core; a board's own lines come last."""
    blocks = [_pairs(block) for block in re.split(r"\n\s*\n", text or "")]
    return [block for block in blocks if block]


def _pairs(text: str | None) -> dict[str, str]:
    """The first value of every "key : value" line."""
    pairs: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs
