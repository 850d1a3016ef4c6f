"""
The rails that an NVIDIA Jetson measures of itself.

Hidden here: which of the labels is the module's input and which are fed by it, and that old
L4T kernels show the same chip by another driver, in another place.
"""

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError, printable
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Spec, tried
from edgeexit.meters.ina3221 import (
    NAME,
    RATE_HZ,
    Rail,
    Rails,
    choose_rails,
    rails_of,
    update_hz,
)
from edgeexit.meters.sysfs import Kept, Polled, Shunt, chips

_KIND = "jetson"
# Sets of rails that together are a module's whole input, the first that is there counts. All
# other rails hang behind these and would count twice. Orin NX and Nano, Xavier NX, TX2: VDD_IN.
# Nano: POM_5V_IN. AGX Orin has no single one: its 5 V input beside the two that the high-voltage
# input feeds.
_INPUTS = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
)
_OLD = "sys/bus/i2c/drivers/ina3221x/*/iio*device*"
_OUTSIDE = "the carrier board, what hangs on its ports, fan and supply losses are not seen"


class OldRails(Polled):
    """
    The same chip under old L4T kernels (Nano, TX2, Xavier): in_powerN_input in milliwatts.

    The driver multiplies voltage and current itself; steps are those of the INA3221.
    """

    def __init__(self, machine: Machine, info: MeterInfo, names: list[str]) -> None:
        self._powers = [Kept(machine, name) for name in names]
        super().__init__(info, *self._powers)

    def read(self) -> float | None:
        """Milliwatts of all rails together."""
        total_mw = 0
        for power in self._powers:
            power_mw = power.number()
            if power_mw is None:
                return None
            total_mw += abs(power_mw)
        return float(total_mw)


def open_meter(spec: Spec, machine: Machine, device: Device) -> Rails | OldRails:
    """The module's input; `jetson,rails=VDD_CPU_GPU_CV` reads others instead."""
    spec.only("rails", "rate")
    labelled = [rail for rail in rails_of(machine, *chips(machine, NAME)) if rail.label]
    if labelled:
        chosen = _chosen(spec, labelled)
        shunts = [
            Shunt(stated_uohm=rail.believed_uohm, believed_uohm=rail.believed_uohm)
            for rail in chosen
        ]
        if any(shunt.stated_uohm < 1 for shunt in shunts):
            raise DeviceError(f"meter {spec}: no sound shuntN_resistor in {chosen[0].chip.place}")
        rate_hz = spec.rate_hz(min(update_hz(machine, rail.chip) for rail in chosen))
        details: dict[str, object] = {"shunts_ohm": [shunt.stated_uohm / 1e6 for shunt in shunts]}
        info = _info([rail.name for rail in chosen], rate_hz, "Linux hwmon", details)
        return Rails(machine, info, list(zip(chosen, shunts, strict=True)))
    old = _old_rails(machine)
    if not old:
        raise DeviceError(
            f"meter {spec}: no INA3221 with labelled rails in {machine.path('sys')}",
            hint="this kind is for NVIDIA Jetson boards; see: edgeexit meters list",
        )
    names = _named(spec, list(old))
    return OldRails(
        machine,
        _info(names, spec.rate_hz(RATE_HZ), "L4T's own driver", {}),
        [old[name] for name in names],
    )


def find(machine: Machine, device: Device) -> list[Found]:
    """The module's input, if this is a Jetson."""
    labels = [rail.label for rail in rails_of(machine, *chips(machine, NAME)) if rail.label]
    if not labels and not _old_rails(machine):
        return []
    return [tried(_KIND, "the rails that a Jetson module measures", machine, device)]


def _info(names: list[str], rate_hz: float, driver: str, details: dict[str, object]) -> MeterInfo:
    is_input = tuple(names) in _INPUTS
    return MeterInfo(
        kind=_KIND,
        label="partial",
        instrument=f"INA3221 of the Jetson, {' + '.join(names)}, {driver}",
        boundary=("the module's whole input" if is_input else f"the rails {', '.join(names)}")
        + f"; {_OUTSIDE}",
        rate_hz=rate_hz,
        details={"rails": names, **details},
    )


def _chosen(spec: Spec, rails: list[Rail]) -> list[Rail]:
    if "rails" in spec.options:
        return choose_rails(spec, rails)
    names = _named(spec, [rail.name for rail in rails])
    return [next(rail for rail in rails if rail.name == name) for name in names]


def _named(spec: Spec, names: list[str]) -> list[str]:
    """What "rails" names among *names*, else the module's input."""
    have = ", ".join(names)
    if "rails" in spec.options:
        wanted = spec.options["rails"].split("+")
        if len(set(wanted)) != len(wanted) or not set(wanted) <= set(names):
            raise UsageError(f"meter {spec}: expected rails out of {have}, each once")
        return wanted
    for group in _INPUTS:
        if set(group) <= set(names):
            return list(group)
    raise UsageError(
        f"meter {spec}: none of the rails is known as the module's input (have: {have})",
        hint=f"name those to add up: jetson,rails={names[0]}",
    )


def _old_rails(machine: Machine) -> dict[str, str]:
    """Rail -> the file of its power, under the old driver."""
    found: dict[str, str] = {}
    for place in machine.glob(_OLD):
        for channel in range(3):
            label = printable(machine.line(f"{place}/rail_name_{channel}") or "")
            power = f"{place}/in_power{channel}_input"
            if label and machine.exists(power):
                found.setdefault(label, power)
    return found
