"""
What a board's processor can do and what holds it down: cores, clock, heat and supply.

Callers see CHECKS, as in symptoms. Which fact comes from where, below the machine's root:

processor     proc/cpuinfo: "Features" (ARM) or "flags" (x86)
cores         sys/devices/system/cpu/{present,online,isolated}, cpufreq/policy*/related_cpus
cpu quota     proc/self/cgroup, sys/fs/cgroup/**/cpu.max or cpu.cfs_quota_us
governor      sys/devices/system/cpu/cpufreq/policy*/scaling_governor
clock         policy*/{cpuinfo_max_freq,scaling_max_freq,scaling_cur_freq}; on a Raspberry Pi the
              firmware's own `vcgencmd measure_clock arm`
throttling    `vcgencmd get_throttled` or the kernel's file, sys/class/thermal/cooling_device*
power supply  proc/device-tree/chosen/power/max_current: what a Pi 5 and its supply agreed on
temperature   sys/class/thermal/thermal_zone*/{temp,trip_point_*}; `vcgencmd get_config
              temp_soft_limit`; the limits in the device's TOML
"""

import re
from collections.abc import Iterable

from edgeexit.machine import Machine, finite
from edgeexit.state import THROTTLED, throttle_now, throttle_since_boot
from edgeexit.symptoms import (
    FAILED,
    WARNING,
    Check,
    Finding,
    Patient,
    failed,
    ok,
    quoted,
    shown,
    tee,
    unknown,
    warning,
)

_CPU = "sys/devices/system/cpu"
_POLICIES = f"{_CPU}/cpufreq/policy*"
_MOST_CORES = 4096
_MOST_GROUPS = 64
# A busy core within 5 % of its top runs at its top: governors and PLLs round.
_CLOCK_SHARE = 0.95
_OVERCLOCK = 1.02
_NEAR_LIMIT_C = 10.0
_PI5_SUPPLY_MA = 5000
_OTHER_KERNEL = "take a kernel with CPU_FREQ_GOV_PERFORMANCE, or load cpufreq_performance"


# ---------------------------------------------------------------- the processor, and our share

# What int8 gains, by whether there are dot products. Counted under emulation with -icount: one
# MobileNet v2 int8 takes 113.8 million instructions on an A72 and 49.2 on an A76. Published in
# XNNPACK's README, February 2022, Pi 4 in 64 bit: float 46 ms, int8 17 ms.
_GAINS = {
    True: "; with dotprod MobileNet v2 takes 49 million instructions in int8, without it 114",
    False: ", no dotprod; int8 gains all the same: MobileNet v2 17 ms on a Pi 4, in float 46",
}


def processor(patient: Patient) -> Finding | None:
    """What int8 kernels will find: vector units and dot products."""
    isa = patient.facts["isa"]
    listed = re.search(r"^(Features|flags)\s*:", patient.machine.text("proc/cpuinfo") or "", re.M)
    if not isa:
        return (
            unknown("/proc/cpuinfo lists no features")
            if listed is None
            else failed(
                "no vector unit (NEON, SSE 4.1): the runtime's kernels need one",
                "take a board with a 64-bit ARM processor (Zero 2 W, Pi 3 and later)",
            )
        )
    gain = _GAINS["dotprod" in isa] if "neon" in isa else ""
    return ok(f"{shown(patient.facts['cpu'] or 'unnamed')}: {', '.join(isa)}{gain}")


def core_list(text: str | None) -> tuple[int, ...] | None:
    """The cores that the kernel writes as "0-3,6"; None if *text* is no such list."""
    found: set[int] = set()
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= _MOST_CORES:
            return None
        found.update(range(first, last + 1))
    return tuple(sorted(found)) or None


def _as_list(cores: Iterable[int]) -> str:
    """Cores as the kernel writes them."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def cores(patient: Patient) -> Finding | None:
    """Cores that are there, switched on, and ours to use."""
    machine = patient.machine
    online = core_list(machine.line(f"{_CPU}/online"))
    present = core_list(machine.line(f"{_CPU}/present")) or online
    if online is None or present is None:
        return unknown("the kernel lists no cores")
    off = sorted(set(present) - set(online))
    if off:
        is_jetson = machine.exists("etc/nv_tegra_release")
        return warning(
            f"{len(off)} of {len(present)} cores are switched off: {_as_list(off)}",
            "sudo nvpmodel -m 0"
            if is_jetson
            else tee("1", (f"{_CPU}/cpu{core}/online" for core in off)),
        )
    isolated = set(core_list(machine.line(f"{_CPU}/isolated")) or ())
    usable = set(online) if patient.usable is None else set(patient.usable)
    if set(online) - isolated - usable:
        return warning(
            f"this process may use cores {_as_list(usable)} only, of {_as_list(online)}",
            "start it without taskset, or give the container all cores (--cpuset-cpus)",
        )
    kinds = [f"{_as_list(own)} up to {mhz:.0f} MHz" for own, mhz in _kinds(machine)]
    told = f" ({', '.join(kinds)})" if len(kinds) > 1 else ""
    return ok(f"{len(online)} of {len(present)} online{told}")


def _kinds(machine: Machine) -> list[tuple[set[int], float]]:
    """Cores by their highest clock: a chip of two kinds of cores has two."""
    kinds: dict[float, set[int]] = {}
    for policy in machine.glob(_POLICIES):
        top_khz = machine.number(f"{policy}/cpuinfo_max_freq")
        own = core_list((machine.line(f"{policy}/related_cpus") or "").replace(" ", ","))
        if top_khz is not None and own:
            kinds.setdefault(top_khz / 1e3, set()).update(own)
    return [(own, mhz) for mhz, own in sorted(kinds.items())]


def isolated_cores(patient: Patient) -> Finding | None:
    """Cores that the kernel keeps free of other programs, and whether we are on them."""
    isolated = core_list(patient.machine.line(f"{_CPU}/isolated"))
    if not isolated:
        return None
    listed = _as_list(isolated)
    if patient.usable is not None and set(isolated) <= patient.usable:
        return ok(f"{listed}, and this process may use them")
    return warning(
        f"{listed} are kept free of other programs, but this process is not on them",
        f"taskset -c {listed} edgeexit profile",
    )


def cpu_quota(patient: Patient) -> Finding | None:
    """A container's or a service's share of the processor, after which it must pause."""
    machine = patient.machine
    shares = [share for share in _quotas(machine) if share is not None]
    online = core_list(machine.line(f"{_CPU}/online")) or (0,)
    if not shares or min(shares) >= len(online):
        return ok("none")
    share = min(shares)
    return Finding(
        FAILED if share < 1 else WARNING,
        f"the control group grants {share:.2f} of {len(online)} cores, then pauses us",
        "start the container without --cpus, the service without CPUQuota",
    )


def _quotas(machine: Machine) -> Iterable[float | None]:
    """Cores that each control group above this process grants; None: no limit."""
    for line in (machine.text("proc/self/cgroup") or "0::/").splitlines()[:_MOST_GROUPS]:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = "sys/fs/cgroup" + ("" if number == "0" else f"/{controllers}")
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(min(len(parts), _MOST_GROUPS) + 1):
            folder = "/".join([top, *parts[:depth]])
            if number == "0":
                quota, _, period = (machine.line(f"{folder}/cpu.max") or "").partition(" ")
                granted, of = finite(quota), finite(period)
            else:
                granted = machine.number(f"{folder}/cpu.cfs_quota_us")
                of = machine.number(f"{folder}/cpu.cfs_period_us")
            # "max", and -1 in the first version, mean no limit.
            yield granted / of if granted and of and granted > 0 and of > 0 else None


# ---------------------------------------------------------------- clock, heat, supply


def governor(patient: Patient) -> Finding | None:
    """Who decides about the clock."""
    machine = patient.machine
    places = machine.glob(f"{_POLICIES}/scaling_governor")
    found = {place: machine.line(place) or "" for place in places}
    if not any(found.values()):
        return unknown("no cpufreq: this system does not set its own clock")
    wrong = {place: word for place, word in found.items() if word != "performance"}
    if not wrong:
        return ok(f"performance in {len(found)} clock domain{'s' * (len(found) > 1)}")
    words = list(dict.fromkeys(wrong.values()))
    seen = f"{shown(', '.join(words))}: the clock is not held at its maximum"
    for place in wrong:
        offers = machine.line(place.replace("scaling_", "scaling_available_") + "s")
        if offers is not None and "performance" not in offers.split():
            return warning(f"{seen}, and performance is not offered", _OTHER_KERNEL)
    if len(wrong) == len(found) and len(words) == 1:
        everywhere = f"sudo tee /{_POLICIES}/scaling_governor"
        undo = f"echo {quoted(words[0])} | {everywhere}"
        return warning(seen, f"echo performance | {everywhere}", undo)
    back = [tee(word, [place for place in wrong if wrong[place] == word]) for word in words]
    return warning(seen, tee("performance", wrong), " && ".join(back))


def clock(patient: Patient) -> Finding | None:
    """Whether the processor reaches its highest clock when it computes."""
    machine = patient.machine
    policies = machine.glob(_POLICIES)
    tops = [(machine.number(f"{policy}/cpuinfo_max_freq") or 0) / 1e3 for policy in policies]
    capped = [
        policy
        for policy, top in zip(policies, tops, strict=True)
        if 0 < (machine.number(f"{policy}/scaling_max_freq") or 0) / 1e3 < _CLOCK_SHARE * top
    ]
    if capped:
        top_khz = f"{max(tops) * 1e3:.0f}"
        limit_mhz = (machine.number(f"{capped[0]}/scaling_max_freq") or 0) / 1e3
        return warning(
            f"limited to {limit_mhz:.0f} MHz of {max(tops):.0f} (scaling_max_freq)",
            tee(top_khz, (f"{policy}/scaling_max_freq" for policy in capped)),
            tee(f"{limit_mhz * 1e3:.0f}", (f"{p}/scaling_max_freq" for p in capped)),
        )
    clocks = patient.busy.clocks_mhz
    if not clocks or not any(tops):
        seen = f"{clocks[0]:.0f} MHz, nothing tells its maximum" if clocks else "nothing tells it"
        return unknown(seen)
    if len(clocks) != len(tops):
        clocks = clocks[:1] * len(tops)
    # Only one core computed: the other domains may sleep.
    running, top = max(zip(clocks, tops, strict=True), key=lambda pair: pair[0] / (pair[1] or 1e9))
    is_busy = patient.busy.at_ns > patient.after.at_ns
    if running < _CLOCK_SHARE * top:
        if not is_busy and set(patient.after.governors) != {"performance"}:
            return unknown(f"{running:.0f} MHz of {top:.0f} at rest; under load nobody looked")
        return warning(
            f"{running:.0f} MHz of {top:.0f}" + " while a core computed" * is_busy,
            "mend governor, throttling and temperature first",
        )
    stated = patient.device.clock_mhz
    if stated is not None and running > _OVERCLOCK * stated:
        return warning(
            f"{running:.0f} MHz, above the {stated} MHz of a {patient.device.title}",
            "take arm_freq and over_voltage out of config.txt: others cannot repeat the figures",
        )
    return ok(f"{running:.0f} MHz, its maximum" + ", while a core computed" * is_busy)


_SUPPLY_STEP = (
    "use the board's own power supply and a short thick cable, take USB devices off, then reboot"
)
_COOL_STEP = "give the board a heat sink or a fan, and let it cool down"


def throttling(patient: Patient) -> Finding | None:
    """Whether something slows the processor down now, or has since the start."""
    machine, bits = patient.machine, patient.after.throttled
    cooled = [
        f"{shown(kind)} at {state:.0f}"
        for place in machine.glob("sys/class/thermal/cooling_device*")
        if "cpufreq" in (kind := machine.line(f"{place}/type") or "")
        and (state := machine.number(f"{place}/cur_state") or 0) > 0
    ]
    if bits is None and not cooled:
        return _nothing_tells(patient)
    bits = bits or 0
    now, past = throttle_now(bits), throttle_since_boot(bits)
    if now or cooled:
        told = [*now, *(f"the kernel slows the processor down: {text}" for text in cooled)]
        return failed(
            f"now: {'; '.join(told)}", _SUPPLY_STEP if THROTTLED[0] in now else _COOL_STEP
        )
    if past:
        step = _SUPPLY_STEP if THROTTLED[0] in past else f"{_COOL_STEP}, then reboot"
        return warning(f"since the start: {'; '.join(past)}", step)
    return ok("not now, and not since the start")


def _nothing_tells(patient: Patient) -> Finding:
    machine = patient.machine
    if patient.is_raspberry:
        if machine.exists("usr/bin/vcgencmd"):
            return unknown("vcgencmd refuses", "sudo usermod -aG video $USER, then log in again")
        return unknown("vcgencmd is not there", "sudo apt install raspi-utils")
    if machine.glob("sys/class/thermal/cooling_device*"):
        return ok("no cooling device slows the processor down")
    return unknown("nothing on this machine tells it")


def power_supply(patient: Patient) -> Finding | None:
    """What a Raspberry Pi 5 and its supply agreed on, in mA."""
    place = "proc/device-tree/chosen/power/max_current"
    if not patient.machine.exists(place):
        return None
    data = patient.machine.data(place) or b""
    # A device tree holds numbers with their highest byte first.
    granted_ma = int.from_bytes(data, "big") if len(data) == 4 else 0
    if not 0 < granted_ma <= 20000:
        return unknown("the firmware does not say what it grants")
    if granted_ma < _PI5_SUPPLY_MA:
        return warning(
            f"it grants {granted_ma} mA, a Pi 5 wants {_PI5_SUPPLY_MA}",
            "use a 27 W (5.1 V, 5 A) USB-C supply and its own cable, then reboot",
        )
    return ok(f"it grants {granted_ma} mA")


def temperature(patient: Patient) -> Finding | None:
    """How far it is to the temperature at which the board slows down."""
    now_c = patient.after.temperature_c
    if now_c is None:
        return unknown("no sensor that could be read")
    limit_c = _limit_c(patient)
    if limit_c is None:
        return ok(f"{now_c:.0f} C (the board names no limit)")
    seen = f"{now_c:.0f} C, it slows down at {limit_c:.0f} C"
    if now_c >= limit_c:
        return failed(seen, _COOL_STEP)
    if now_c > limit_c - _NEAR_LIMIT_C:
        return warning(seen, _COOL_STEP)
    return ok(seen)


def _limit_c(patient: Patient) -> float | None:
    machine, device = patient.machine, patient.device
    said = machine.run(["vcgencmd", "get_config", "temp_soft_limit"]) or ""
    match = re.fullmatch(r"temp_soft_limit=(\d{1,3})\s*", said)
    soft_c = float(match[1]) if match and int(match[1]) else device.soft_limit_c
    limits = [limit for limit in (soft_c, device.throttle_c) if limit is not None]
    for place in machine.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        value = machine.number(place.removesuffix("type") + "temp")
        if machine.line(place) == "passive" and value is not None and 30e3 < value < 150e3:
            limits.append(value / 1e3)
    return min(limits) if limits else None


CHECKS: dict[str, Check] = {
    "processor": processor,
    "cores": cores,
    "isolated cores": isolated_cores,
    "cpu quota": cpu_quota,
    "governor": governor,
    "clock": clock,
    "throttling": throttling,
    "power supply": power_supply,
    "temperature": temperature,
}
