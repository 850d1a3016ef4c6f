"""
How this machine feels: clocks, temperature, throttling, load, and whether it is emulated.
"""

from dataclasses import dataclass

from edgeexit.machine import Machine


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
    """How *machine* feels now. Costs about a millisecond, on a Pi a vcgencmd more."""
    raise NotImplementedError
