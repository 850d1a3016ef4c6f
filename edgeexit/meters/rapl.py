"""
RAPL: the energy counters inside x86 processors. For PCs and tests; ARM boards have none.

Hidden here: which counters contain others, that they wrap around, and that only root may read
them since 2020.
"""

from edgeexit.device import Device
from edgeexit.errors import DeviceError
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Spec, tried
from edgeexit.meters.sysfs import Kept, Polled

_KIND = "rapl"
_RATE_HZ = 20.0
# Packages only: intel-rapl:0:1 and the like are parts of intel-rapl:0, the domain "psys" holds
# all packages, and intel-rapl-mmio counts the same package by another way.
_ZONES = "sys/class/powercap/intel-rapl:[0-9]*"
_HINT = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (until the next boot)"


class Rapl(Polled):
    """
    Microjoules that the processor packages have taken, counted by the processor itself.

    A counter goes from 0 to max_energy_range_uj and then starts again, at 15 W after hours, at
    200 W after twenty minutes: from one sample to the next its growth is the difference modulo
    range + 1, right as long as it wraps at most once between two samples. It is brought up to
    date about every millisecond. Memory, board and supply are outside.
    """

    is_counter = True

    def __init__(self, machine: Machine, info: MeterInfo, zones: list[tuple[str, int]]) -> None:
        self._zones = [
            (Kept(machine, f"{place}/energy_uj", hint=_HINT), most + 1) for place, most in zones
        ]
        super().__init__(info, *(file for file, _ in self._zones))
        self._last_uj: list[int | None] = [None] * len(zones)
        self._total_uj = 0

    def read(self) -> float | None:
        """Millijoules since the first reading."""
        now_uj = [file.number() for file, _ in self._zones]
        if None in now_uj:
            return None
        for index, (now, (_, modulus)) in enumerate(zip(now_uj, self._zones, strict=True)):
            last = self._last_uj[index]
            assert now is not None
            if last is not None:
                self._total_uj += (now - last) % modulus
        self._last_uj = now_uj
        return self._total_uj / 1000


def open_meter(spec: Spec, machine: Machine, device: Device) -> Rapl:
    """All packages together: `rapl[,rate=HZ]`."""
    spec.only("rate")
    zones = []
    for place, name in _packages(machine):
        most = machine.number(f"{place}/max_energy_range_uj")
        if most is None or most < 1 or most != int(most):
            raise DeviceError(
                f"{machine.path(place)}/max_energy_range_uj: expected where the counter wraps"
            )
        zones.append((place, name, int(most)))
    if not zones:
        raise DeviceError(
            f"meter {spec}: no package domain in {machine.path('sys/class/powercap')}",
            hint="RAPL is for x86 processors, and virtual machines hide it",
        )
    info = MeterInfo(
        kind=_KIND,
        label="partial",
        instrument="RAPL counters of the processor",
        boundary="the processor packages; memory, board and supply losses are not seen",
        rate_hz=spec.rate_hz(_RATE_HZ),
        details={"domains": [name for _, name, _ in zones]},
    )
    return Rapl(machine, info, [(place, most) for place, _, most in zones])


def find(machine: Machine, device: Device) -> list[Found]:
    """The counters, where the processor has them."""
    if not _packages(machine):
        return []
    return [tried(_KIND, "the processor's energy counters", machine, device)]


def _packages(machine: Machine) -> list[tuple[str, str]]:
    found = []
    for place in machine.glob(_ZONES):
        name = machine.line(f"{place}/name") or ""
        if place.count(":") == 1 and name.startswith("package"):
            found.append((place, name))
    return found
