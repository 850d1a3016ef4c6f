"""
What a board's files tell about its clock: who sets it, what holds it down, heat and supply.

Callers see CHECKS, as in symptoms. Which fact comes from where, below the machine's root:

governor      sys/devices/system/cpu/cpufreq/policy*/scaling_governor
clock         policy*/{cpuinfo_max_freq,scaling_max_freq,scaling_cur_freq}; on a Raspberry Pi the
              firmware's own `vcgencmd measure_clock arm`
throttling    `vcgencmd get_throttled` or the kernel's file, sys/class/thermal/cooling_device*
power supply  proc/device-tree/chosen/power/max_current: what a Pi 5 and its supply agreed on
temperature   sys/class/thermal/thermal_zone*/{temp,trip_point_*}; `vcgencmd get_config
              temp_soft_limit`; the limits in the device's TOML
"""

import re

from edgeexit.state import THROTTLED, throttle_now, throttle_since_boot
from edgeexit.symptoms import (
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

_POLICIES = "sys/devices/system/cpu/cpufreq/policy*"
# A busy core within 5 % of its top runs at its top: governors and PLLs round.
_CLOCK_SHARE = 0.95
_OVERCLOCK = 1.02
_NEAR_LIMIT_C = 10.0
_PI5_SUPPLY_MA = 5000
_OTHER_KERNEL = "take a kernel with CPU_FREQ_GOV_PERFORMANCE, or load cpufreq_performance"


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
    "governor": governor,
    "clock": clock,
    "throttling": throttling,
    "power supply": power_supply,
    "temperature": temperature,
}
