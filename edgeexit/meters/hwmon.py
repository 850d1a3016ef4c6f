"""
The INA family of power chips behind the kernel's hwmon drivers ina2xx and ina238.

Hidden here: what each chip's full scale and steps are, which files its driver shows, and
that the driver's belief about the shunt is compared with what the user states.
"""

from dataclasses import dataclass
from struct import unpack

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import LABELS, Found, MeterInfo, Spec, tried
from edgeexit.meters.sysfs import (
    Chip,
    Kept,
    Polled,
    Shunt,
    chips,
    choose_chip,
    ohms,
    stated_shunt_uohm,
)

# Each wake-up took 0.13 ms of a PC's core, and boards are slower: more would disturb.
_RATE_HZ = 25.0
# The INA260's own shunt; it is trimmed in the factory, so nobody need state it.
_INSIDE_UOHM = 2000
# What ina238.c takes if the device tree says nothing: today's kernels, and those before.
_INA238_DEFAULTS_UOHM = (2500, 10000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """
    One chip as its driver sets it up; values from the kernel's drivers and the data sheets.

    full_scale_uv across the shunt, one step of the shunt voltage in nanovolts, and how many
    watts one step of power is for each ampere that one step of current is.
    """

    full_scale_uv: int
    step_nv: int
    power_factor: float
    update_hz: float | None = None


_INA219 = Part(full_scale_uv=320_000, step_nv=10_000, power_factor=20)
_INA226 = Part(full_scale_uv=81_920, step_nv=2_500, power_factor=25)
# 16 averages of 1052 us for shunt, bus and temperature: a new value every 50.5 ms.
_INA238 = Part(full_scale_uv=163_840, step_nv=5_000, power_factor=0.2, update_hz=20)
PARTS = {
    "ina219": _INA219,
    "ina220": _INA219,
    "ina226": _INA226,
    "ina230": _INA226,
    "ina231": _INA226,
    # 15 A through its own 2 mOhm; 1.25 mA and 10 mW a step.
    "ina260": Part(full_scale_uv=30_000, step_nv=2_500, power_factor=8),
    "ina228": _INA238,
    "ina237": _INA238,
    "ina238": _INA238,
}


class Ina(Polled):
    """
    A shunt in the supply line; the chip turns the voltage across it into current and power.

    power1_input is in microwatts (power is never negative: a shunt wired backwards reads the
    same); a driver without it shows in1_input (mV at the load's side) and curr1_input (mA), and
    mV x mA = uW. What the driver shows is right for the shunt that it believes in, see Shunt.
    An INA228 also sums energy in the chip (energy1_input, uJ), so that no sample can be missed.

    At full scale the chip clips without a word: on an INA226 with 100 mOhm at 0.82 A. Close to
    it the current is looked at, and a clipped reading is a DeviceError.
    """

    def __init__(self, machine: Machine, chip: Chip, info: MeterInfo, shunt: Shunt) -> None:
        def kept(file: str) -> Kept | None:
            name = f"{chip.place}/{file}"
            return Kept(machine, name) if machine.exists(name) else None

        self._shunt, self._chip = shunt, chip
        self._energy, self._power = kept("energy1_input"), kept("power1_input")
        self._volts, self._current = kept("in1_input"), kept("curr1_input")
        files = (self._energy, self._power, self._volts, self._current)
        super().__init__(info, *(file for file in files if file))
        self.is_counter = self._energy is not None
        self._last_uj = 0
        self._most_ma: float = info.details["most_ma"]
        # Until the voltage is known every reading is looked at.
        self._suspicious_mw = 0.0
        if not self._power and not (self._volts and self._current):
            self.close()
            raise DeviceError(
                f"{machine.path(chip.place)}: neither power1_input nor in1_input and curr1_input"
            )

    def read(self) -> float | None:
        """Milliwatts now, or millijoules so far."""
        power_mw = self._power_mw()
        if power_mw is None:
            return None
        if power_mw >= self._suspicious_mw:
            self._refuse_clipped()
        return power_mw if self._energy is None else self._energy_mj()

    def _power_mw(self) -> float | None:
        if self._power is not None:
            power_uw = self._power.number()
            return None if power_uw is None else self._shunt.scaled(power_uw)
        assert self._volts is not None
        assert self._current is not None
        volts_mv, current_ma = self._volts.number(), self._current.number()
        if volts_mv is None or current_ma is None:
            return None
        return self._shunt.scaled(abs(volts_mv * current_ma))

    def _refuse_clipped(self) -> None:
        if self._current is None or self._volts is None:
            return
        current_ma, volts_mv = self._current.number(), self._volts.number()
        if current_ma is None or volts_mv is None:
            return
        self._suspicious_mw = 0.9 * self._most_ma * volts_mv / 1e3
        if self._shunt.scaled(abs(current_ma) * 1000) >= 0.995 * self._most_ma:
            raise DeviceError(
                f"meter {self._chip.name}{self._chip.address}: at full scale "
                f"({self._most_ma:.0f} mA): what it reads is clipped",
                hint="a smaller shunt measures larger currents",
            )

    def _energy_mj(self) -> float | None:
        assert self._energy is not None
        energy_uj = self._energy.number()
        if energy_uj is None:
            return None
        if energy_uj < self._last_uj:
            # Its 40 bits last for years at 10 W: a fall is no wrap-around.
            raise DeviceError(
                f"meter {self._chip.name}{self._chip.address}: its energy counter fell from "
                f"{self._last_uj} to {energy_uj} uJ: the chip was reset"
            )
        self._last_uj = energy_uj
        return self._shunt.scaled(energy_uj)


def open_meter(spec: Spec, machine: Machine, device: Device) -> Ina:
    """The chip that *spec* means: `ina219:0x40,shunt=0.1[,rate=HZ][,label=partial]`."""
    spec.only("shunt", "believed", "rate", "label", address=True)
    chip = choose_chip(machine, spec, chips(machine, spec.kind))
    part = PARTS[spec.kind]
    shunt = _shunt(machine, spec, chip)
    most_ma = part.full_scale_uv * 1e3 / shunt.stated_uohm
    details: dict[str, object] = {"chip": chip.name, "most_ma": round(most_ma, 3)}
    if chip.i2c:
        details["i2c"] = chip.i2c
    details["step_mw"] = part.step_nv / shunt.stated_uohm * part.power_factor
    details |= shunt.details()
    label = spec.choice("label", LABELS[:2], "external")
    info = MeterInfo(
        kind=spec.kind,
        label=label,
        instrument=f"{chip.name.upper()} with a shunt of {ohms(shunt.stated_uohm)}, Linux hwmon",
        boundary="what flows through the shunt: "
        + (
            "the whole board, if it sits in the board's supply line; not the supply's own losses"
            if label == "external"
            else "one rail of the board"
        ),
        rate_hz=spec.rate_hz(_update_hz(machine, chip, part)),
        details=details,
    )
    return Ina(machine, chip, info, shunt)


def find(machine: Machine, device: Device) -> list[Found]:
    """The chips of the family that have a hwmon driver."""
    found = []
    for chip in chips(machine, *PARTS):
        spec = f"{chip.name}{chip.address}"
        title = f"{chip.name.upper()} power chip, {chip.place.rpartition('/')[2]}"
        if chip.name == "ina260":
            found.append(tried(spec, title, machine, device))
            continue
        found.append(
            Found(
                spec=f"{spec},shunt=OHM",
                title=title,
                reason="state its shunt in Ohm; the driver believes in "
                f"{_belief(machine, chip)} (R100 on the resistor is 0.1)",
            )
        )
    return found


def _update_hz(machine: Machine, chip: Chip, part: Part) -> float:
    interval_ms = machine.number(f"{chip.place}/update_interval")
    if interval_ms is not None and interval_ms > 0:
        return min(_RATE_HZ, 1e3 / interval_ms)
    return part.update_hz or _RATE_HZ


def _belief(machine: Machine, chip: Chip) -> str:
    uohm = _said_uohm(machine, chip)
    return "one that it does not tell" if uohm is None else ohms(uohm)


def _said_uohm(machine: Machine, chip: Chip) -> int | None:
    """What the driver says, or the device tree says to it, about the shunt."""
    said = machine.number(f"{chip.place}/shunt_resistor")
    if said is not None and said >= 1:
        return round(said)
    try:
        cells = machine.path(f"{chip.place}/device/of_node/shunt-resistor").read_bytes()
    except OSError:
        return None
    return int(unpack(">I", cells)[0]) or None if len(cells) == 4 else None


def _shunt(machine: Machine, spec: Spec, chip: Chip) -> Shunt:
    if chip.name == "ina260":
        if "shunt" in spec.options or "believed" in spec.options:
            raise UsageError(
                f"meter {spec}: an INA260 has its own shunt", hint=f"{chip.name}{chip.address}"
            )
        return Shunt(stated_uohm=_INSIDE_UOHM, believed_uohm=_INSIDE_UOHM)
    said = _said_uohm(machine, chip)
    belief = "" if said is None else f"; the driver believes in {ohms(said)}"
    stated = stated_shunt_uohm(spec, belief)
    believed = spec.number("believed", "0.00001", "100")
    if said is not None:
        if believed is not None and believed * 1_000_000 != said:
            raise UsageError(
                f"meter {spec}: believed: the driver itself says {ohms(said)}",
                hint="leave it out",
            )
        return Shunt(stated_uohm=stated, believed_uohm=said)
    if believed is not None:
        return Shunt(stated_uohm=stated, believed_uohm=round(believed * 1_000_000))
    return Shunt(stated_uohm=stated, believed_uohm=_deduced_uohm(machine, spec, chip, stated))


def _deduced_uohm(machine: Machine, spec: Spec, chip: Chip, stated_uohm: int) -> int:
    """The ina238 driver does not tell; the voltage across the shunt over the current does."""
    across_mv = machine.number(f"{chip.place}/in0_input")
    current_ma = machine.number(f"{chip.place}/curr1_input")
    # Both are rounded to whole units: below 3 mV the candidates cannot be told apart.
    if across_mv is not None and current_ma and abs(across_mv) >= 3:
        ratio_uohm = abs(across_mv / current_ma) * 1e6
        near = {
            candidate
            for candidate in (stated_uohm, *_INA238_DEFAULTS_UOHM)
            if 0.83 < ratio_uohm / candidate < 1.2
        }
        if len(near) == 1:
            return near.pop()
    raise DeviceError(
        f"meter {spec}: the driver does not tell which shunt it believes in",
        hint=f"its default is 0.01 Ohm, in newer kernels 0.0025: {spec},believed=0.01",
    )
