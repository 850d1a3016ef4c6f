"""
INA chips behind the industrial-I/O driver ina2xx-adc, which some kernels build instead of hwmon.

Hidden here: values are raw integers with a scale beside them, and the scale holds what the
driver believes of the shunt.
"""

from fractions import Fraction

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import LABELS, Found, MeterInfo, Spec
from edgeexit.meters.hwmon import PARTS
from edgeexit.meters.sysfs import Kept, Polled, Shunt, exact, ohms, stated_shunt_uohm

# Each wake-up took 0.13 ms of a PC's core, and boards are slower: more would disturb.
_RATE_HZ = 25.0
_FOLDER = "sys/bus/iio/devices"
# in_power2 is the chip's own product; in_voltage1 is the supply's side, in_current3 the shunt's,
# in_voltage0 what lies across the shunt.
_ACROSS = "in_voltage0"
_POWER = "in_power2"
_VOLTS = "in_voltage1"
_CURRENT = "in_current3"


class Iio(Polled):
    """
    raw x scale: milliwatts for power, millivolts and milliamperes (together microwatts) else.

    Scales are decimals and are taken exactly. A raw current is the voltage across the shunt in
    steps of the chip; the scale divides by the shunt that the driver believes in. At full scale
    the chip clips without a word, so the raw voltage across the shunt is read as well.
    """

    def __init__(
        self, machine: Machine, place: str, info: MeterInfo, scale: Fraction, files: list[str]
    ) -> None:
        self._scale = scale
        self._raw = [Kept(machine, f"{place}/{file}_raw") for file in files]
        across = f"{place}/{_ACROSS}_raw"
        self._across = Kept(machine, across) if machine.exists(across) else None
        super().__init__(info, *self._raw, *([self._across] if self._across else []))
        part = PARTS.get(info.details["chip"], PARTS["ina219"])
        self._most = part.full_scale_uv * 1000 // part.step_nv

    def read(self) -> float | None:
        """Milliwatts now."""
        product = 1
        for file in self._raw:
            raw = file.number()
            if raw is None:
                return None
            product *= raw
        across = self._across.number() if self._across else None
        if across is not None and abs(across) >= self._most - 1:
            raise DeviceError(
                f"meter {self.info.kind}: {self.info.details['place']} is at full scale: what it "
                "reads is clipped",
                hint="a smaller shunt measures larger currents",
            )
        return float(abs(product * self._scale))


def open_meter(spec: Spec, machine: Machine, device: Device) -> Iio:
    """The chip that *spec* means: `iio:2,shunt=0.1`, or `iio,shunt=0.1` if there is only one."""
    spec.only("shunt", "rate", "label", address=True)
    place, name = _choose(machine, spec)
    believed = exact(machine.line(f"{place}/in_shunt_resistor"))
    if believed is None or believed <= 0:
        raise DeviceError(
            f"{machine.path(place)}/in_shunt_resistor: expected the driver's shunt in Ohm"
        )
    believed_uohm = round(believed * 1_000_000)
    stated = stated_shunt_uohm(spec, f"; the driver believes in {ohms(believed_uohm)}")
    shunt = Shunt(stated_uohm=stated, believed_uohm=believed_uohm)
    has_power = machine.exists(f"{place}/{_POWER}_raw")
    files = [_POWER] if has_power else [_VOLTS, _CURRENT]
    scale = Fraction(shunt.believed_uohm, shunt.stated_uohm * (1 if has_power else 1000))
    for file in files:
        said = exact(machine.line(f"{place}/{file}_scale"))
        if said is None or said <= 0:
            raise DeviceError(f"{machine.path(place)}/{file}_scale: expected a positive number")
        scale *= said
    label = spec.choice("label", LABELS[:2], "external")
    info = MeterInfo(
        kind=spec.kind,
        label=label,
        instrument=f"{name.upper()} with a shunt of {ohms(stated)}, Linux IIO",
        boundary="what flows through the shunt: the whole board, if it sits in the board's "
        "supply line; not the supply's own losses"
        if label == "external"
        else "what flows through the shunt: one rail of the board",
        rate_hz=spec.rate_hz(_RATE_HZ),
        details={"chip": name, "place": place.rpartition("/")[2], **shunt.details()},
    )
    return Iio(machine, place, info, scale, files)


def find(machine: Machine, device: Device) -> list[Found]:
    """The INA chips that have an IIO driver."""
    return [
        Found(
            spec=f"iio:{number},shunt=OHM",
            title=f"{name.upper()} power chip, iio:device{number}",
            reason=f"state its shunt in Ohm; the driver believes in "
            f"{machine.line(f'{place}/in_shunt_resistor')} Ohm (R100 on the resistor is 0.1)",
        )
        for number, place, name in _devices(machine)
    ]


def _devices(machine: Machine) -> list[tuple[int, str, str]]:
    found = []
    for file in machine.glob(f"{_FOLDER}/iio:device*/name"):
        place = file.removesuffix("/name")
        number = place.rpartition("device")[2]
        # Until 2023 the driver named itself by its i2c client: "1-0040".
        name = machine.line(file) or ""
        is_ours = name in PARTS or machine.exists(f"{place}/in_shunt_resistor")
        if number.isdigit() and is_ours:
            found.append((int(number), place, name if name in PARTS else "ina2xx"))
    return found


def _choose(machine: Machine, spec: Spec) -> tuple[str, str]:
    found = _devices(machine)
    if spec.address is not None:
        if not (spec.address.isascii() and spec.address.isdigit()):
            raise UsageError(f"meter {spec}: expected the device's number, as in iio:2")
        found = [one for one in found if one[0] == int(spec.address)]
    if not found:
        have = ", ".join(f"iio:{number}" for number, _, _ in _devices(machine)) or "none"
        raise DeviceError(
            f"meter {spec}: no such INA chip in {machine.path(_FOLDER)} (have: {have})",
            hint="edgeexit meters list",
        )
    if len(found) > 1:
        have = ", ".join(f"iio:{number}" for number, _, _ in found)
        raise UsageError(f"meter {spec}: there are several ({have})", hint="name one")
    return found[0][1], found[0][2]
