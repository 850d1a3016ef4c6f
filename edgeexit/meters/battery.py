"""
A battery's own gauge, as laptops and UPS HATs show it.

Hidden here: some gauges show power, others voltage and current; currents have either sign.
"""

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Spec, tried
from edgeexit.meters.sysfs import Kept, Polled

_KIND = "battery"
_FOLDER = "sys/class/power_supply"
# Gauges refresh every 1 to 60 s; asking more often would only repeat old values.
_RATE_HZ = 0.5


class Battery(Polled):
    """
    power_now in uW, else voltage_now (uV) times current_now (uA), as the gauge last measured.

    Only while the battery discharges is that what the machine takes: on a charger the gauge
    shows what flows into the cell. The gauge refreshes every 1 to 60 s, so a window around an
    exit holds a sample or none: good for an hour's average, refused for exits.
    """

    def __init__(self, machine: Machine, info: MeterInfo, place: str, has_power: bool) -> None:
        self._status = Kept(machine, f"{place}/status")
        names = ("power_now",) if has_power else ("voltage_now", "current_now")
        self._values = [Kept(machine, f"{place}/{name}") for name in names]
        self._place = machine.path(place)
        super().__init__(info, self._status, *self._values)

    def read(self) -> float | None:
        """Milliwatts when the gauge last measured."""
        status = self._status.text()
        if status is None:
            return None
        if status.strip() != "Discharging":
            raise DeviceError(
                f"{self._place}: status is {status.strip()[:40]!r}, expected 'Discharging'",
                hint="unplug the charger: while it charges, the gauge sees what enters the cell",
            )
        product = 1
        for file in self._values:
            value = file.number()
            if value is None:
                return None
            product *= value
        return abs(product) / (1e3 if len(self._values) == 1 else 1e9)


def open_meter(spec: Spec, machine: Machine, device: Device) -> Battery:
    """The battery that *spec* means: `battery`, or `battery:BAT1` if there are several."""
    spec.only("rate", address=True)
    found = batteries(machine)
    if spec.address is not None:
        found = [place for place in found if place.rpartition("/")[2] == spec.address]
    names = ", ".join(place.rpartition("/")[2] for place in batteries(machine)) or "none"
    if not found:
        raise DeviceError(
            f"meter {spec}: no such battery in {machine.path(_FOLDER)} (have: {names})"
        )
    if len(found) > 1:
        raise UsageError(
            f"meter {spec}: there are several ({names})", hint=f"battery:{names.split(',')[0]}"
        )
    place = found[0]
    has_power = machine.number(f"{place}/power_now") is not None
    info = MeterInfo(
        kind=_KIND,
        label="external",
        instrument=f"the gauge of {place.rpartition('/')[2]}",
        boundary="everything that the battery feeds: with screen, radios and disks",
        rate_hz=spec.rate_hz(_RATE_HZ, "1"),
        details={"reads": "power_now" if has_power else "voltage_now x current_now"},
    )
    meter = Battery(machine, info, place, has_power)
    try:
        meter.read()
    except DeviceError:
        meter.close()
        raise
    return meter


def find(machine: Machine, device: Device) -> list[Found]:
    """The batteries that feed this machine."""
    found = []
    for place in batteries(machine):
        name = place.rpartition("/")[2]
        found.append(tried(f"{_KIND}:{name}", f"the gauge of {name}", machine, device))
    return found


def batteries(machine: Machine) -> list[str]:
    """The folders of the batteries that feed *machine*, not of those in its mice and pens."""
    places = [name.removesuffix("/type") for name in machine.glob(f"{_FOLDER}/*/type")]
    return [
        place
        for place in places
        if machine.line(f"{place}/type") == "Battery"
        # A mouse's or a pen's battery says "Device".
        and machine.line(f"{place}/scope") != "Device"
    ]
