"""
How this machine feels: clocks, temperature, throttling, load, and whether it is emulated.

Callers see Reading and read_state. Hidden here: which of several files or commands a board
speaks through, and that on a Raspberry Pi the kernel's clock is a wish while the firmware
knows the real one.
"""

import os
import re
import time
from dataclasses import dataclass

from edgeexit.machine import Machine, finite

_POLICIES = "sys/devices/system/cpu/cpufreq/policy*"
# The Raspberry Pi kernel's own file, a hexadecimal number without 0x. Only asked where vcgencmd is
# missing: it shows what a driver saw up to 2 s ago, and its bits 16..19 do not reach back to boot.
_THROTTLED_FILES = "sys/devices/platform/*/soc:firmware/get_throttled"
# Types of thermal zones that are the processor's, wherever it sits; else the hottest zone.
_PROCESSOR_ZONES = re.compile(
    r"cpu|x86_pkg_temp|coretemp|k10temp|bigcore|littlecore|soc[-_]?thermal|main\d", re.IGNORECASE
)
_JIFFY_MS = 10.0


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
    clocks = tuple(khz / 1e3 for khz in found if khz is not None)
    if len(clocks) <= 1:
        # On a Pi scaling_cur_freq is what the kernel asked for, throttled or not.
        measured = _frequency_mhz(machine.run(["vcgencmd", "measure_clock", "arm"]))
        if measured is not None:
            return (measured,)
    if not clocks:
        mhz = finite(_pairs(machine.text("proc/cpuinfo")).get("cpu MHz"))
        return () if mhz is None else (mhz,)
    return clocks


def _frequency_mhz(text: str | None) -> float | None:
    match = re.fullmatch(r"frequency\(\d+\)=(\d{1,12})\s*", text or "")
    return int(match[1]) / 1e6 if match and int(match[1]) else None


def _temperature_c(machine: Machine) -> float | None:
    """The processor's zone if one is called so (of several the hottest), else the hottest."""
    ours, all_zones = [], []
    for name in machine.glob("sys/class/thermal/thermal_zone*/temp"):
        value = machine.number(name)
        if value is None:
            continue
        all_zones.append(value / 1e3)
        if _PROCESSOR_ZONES.search(machine.line(f"{name.removesuffix('temp')}type") or ""):
            ours.append(value / 1e3)
    zones = ours or all_zones
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


def _pairs(text: str | None) -> dict[str, str]:
    """The first value of every "key : value" line."""
    pairs: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs
