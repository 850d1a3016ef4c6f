"""
No sensor: watts computed from how busy the cores are and what was published of this board.

Hidden here: how the kernel counts time, and where a board's watts come from.
"""

import os
import re
import time
from collections.abc import Callable

from edgeexit.device import Device
from edgeexit.errors import DeviceError
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Spec, tried
from edgeexit.meters.sysfs import Kept, Polled

_KIND = "modelled"
STAT = "proc/stat"
_RATE_HZ = 10.0
_MOST_HZ = "20"
_CORES = re.compile(r"^cpu[0-9]+ ", re.MULTILINE)


class Modelled(Polled):
    """
    Millijoules = idle watts x time + watts of a core x time that cores were busy.

    A straight line between two published numbers, idle and all cores busy, read as a counter so
    that no time is lost between samples. It knows nothing of clocks, of what the cores compute
    (a NEON kernel takes more than a shell script), of memory or of temperature; the kernel
    counts busy time in steps of 10 ms a core. It tells runs of different length apart, nothing
    else. Time that a hypervisor took (steal) is not busy.
    """

    is_counter = True

    def __init__(
        self,
        machine: Machine,
        info: MeterInfo,
        *,
        idle_w: float,
        core_w: float,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._stat = Kept(machine, STAT)
        super().__init__(info, self._stat)
        self._idle_w, self._core_w, self._clock_ns = idle_w, core_w, clock_ns
        self._began_ns = clock_ns()
        self._last_ticks = self._first_ticks = self._ticks() or 0

    def read(self) -> float | None:
        """Millijoules since the meter was opened."""
        ticks = self._ticks()
        if ticks is None:
            return None
        # Some counters of /proc/stat have been seen to step back by a tick.
        self._last_ticks = max(self._last_ticks, ticks)
        busy_s = (self._last_ticks - self._first_ticks) / os.sysconf("SC_CLK_TCK")
        passed_s = (self._clock_ns() - self._began_ns) / 1e9
        return 1e3 * (self._idle_w * passed_s + self._core_w * busy_s)

    def _ticks(self) -> int | None:
        text = self._stat.text()
        return None if text is None else busy_ticks(text)


def busy_ticks(text: str) -> int:
    """Ticks that all cores have spent on programs and interrupts, by the text of /proc/stat."""
    words = text.partition("\n")[0].split()
    if words[:1] != ["cpu"] or len(words) < 8 or not all(w.isdigit() for w in words[1:]):
        raise DeviceError(f"/{STAT}: expected a first line 'cpu' with counters")
    user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])
    return user + nice + system + irq + softirq


def open_meter(spec: Spec, machine: Machine, device: Device) -> Modelled:
    """The model of *device*: `modelled[,rate=HZ]`."""
    spec.only("rate")
    core_w = device.modelled_core_w
    if device.idle_w is None or core_w is None:
        raise DeviceError(
            f"meter {spec}: nobody has stated the watts of the device {device.name}",
            hint=f"copy devices/{device.name}.toml, add the facts idle_w and core_w (or busy_w) "
            "with their source, and name the copy with --device",
        )
    cores = len(_CORES.findall(machine.text(STAT) or ""))
    if not cores:
        raise DeviceError(f"{machine.path(STAT)}: lists no cores")
    sources = {
        key: {"source": fact.source, "verified": fact.verified}
        for key, fact in device.facts.items()
        if key in ("idle_w", "busy_w", "core_w")
    }
    info = MeterInfo(
        kind=_KIND,
        label="modelled",
        instrument=f"a model: {device.idle_w:g} W idle and {core_w:.4g} W for each busy core",
        boundary="the whole board at its supply, as far as the model goes; nothing is measured",
        rate_hz=spec.rate_hz(_RATE_HZ, _MOST_HZ),
        details={
            "device": device.name,
            "idle_w": device.idle_w,
            "core_w": core_w,
            "cores": cores,
            "sources": sources,
        },
    )
    return Modelled(machine, info, idle_w=device.idle_w, core_w=core_w)


def find(machine: Machine, device: Device) -> list[Found]:
    """The model, or what is missing for it."""
    return [tried(_KIND, f"a model of {device.title}", machine, device)]
