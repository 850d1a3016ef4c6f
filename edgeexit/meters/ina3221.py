"""
The INA3221: three shunts on one chip, as on most boards that measure their own rails.

Callers see open_meter, find and, for the board's own rails, Rail, rails_of and Rails. Hidden
here: the driver shows no power, a channel may be switched off, and two readings of one channel
are not taken at the same instant.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError, printable
from edgeexit.machine import Machine
from edgeexit.meters import LABELS, Found, MeterInfo, Spec
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

NAME = "ina3221"
RATE_HZ = 20.0
_CHANNELS = (1, 2, 3)
# 4095 steps of 40 uV across the shunt; beyond, the chip clips.
_FULL_SCALE_UV = 163_800


@dataclass(frozen=True, kw_only=True, slots=True)
class Rail:
    """One channel of a chip: its label (None if nobody gave it one) and what is believed of it."""

    chip: Chip
    channel: int
    label: str | None
    believed_uohm: int

    @property
    def name(self) -> str:
        """The label, else the channel's number: what the option "rails" takes."""
        return self.label or str(self.channel)


def rails_of(machine: Machine, *found: Chip) -> list[Rail]:
    """The channels of the chips *found* that are switched on."""
    rails = []
    for chip in found:
        for channel in _CHANNELS:
            if machine.line(f"{chip.place}/in{channel}_enable") == "0":
                continue
            if not machine.exists(f"{chip.place}/curr{channel}_input"):
                continue
            label = printable(machine.line(f"{chip.place}/in{channel}_label") or "") or None
            believed = machine.number(f"{chip.place}/shunt{channel}_resistor") or 0
            # "NC" is what NVIDIA's device trees call a channel that is not connected.
            if label != "NC":
                rails.append(
                    Rail(
                        chip=chip,
                        channel=channel,
                        label=label,
                        believed_uohm=round(believed),
                    )
                )
    return rails


class Rails(Polled):
    """
    Channels of INA3221 chips, added up: in mV at the load's side of a shunt times curr in mA.

    mV x mA = uW. The current is quantised to 40 uV across the shunt (8 mA with 5 mOhm), both
    readings are averages of the chip's own pace, and current and voltage are read one after the
    other, a millisecond apart. A rail that feeds another one of the list would count twice:
    whoever chooses the rails sees to that.
    """

    def __init__(self, machine: Machine, info: MeterInfo, rails: Sequence[tuple[Rail, Shunt]]):
        self._rails = [
            (
                Kept(machine, f"{rail.chip.place}/in{rail.channel}_input"),
                Kept(machine, f"{rail.chip.place}/curr{rail.channel}_input"),
                rail,
                shunt,
            )
            for rail, shunt in rails
        ]
        super().__init__(info, *(file for one in self._rails for file in one[:2]))

    def read(self) -> float | None:
        """Milliwatts of all rails together."""
        total_mw = 0.0
        for volts, current, rail, shunt in self._rails:
            volts_mv, current_ma = volts.number(), current.number()
            if volts_mv is None or current_ma is None:
                return None
            if abs(current_ma) * shunt.believed_uohm >= _FULL_SCALE_UV * 1000:
                raise DeviceError(
                    f"meter {NAME}{rail.chip.address}: {rail.name} is at full scale: clipped",
                    hint="a smaller shunt measures larger currents",
                )
            total_mw += shunt.scaled(abs(volts_mv * current_ma))
        return total_mw


def choose_rails(spec: Spec, rails: list[Rail]) -> list[Rail]:
    """What the option "rails" (`VDD_IN`, or `1+3`) names among *rails*."""
    chosen = []
    for word in spec.options["rails"].split("+"):
        matching = [rail for rail in rails if word in (rail.label, str(rail.channel))]
        if len(matching) != 1:
            have = ", ".join(rail.name for rail in rails) or "none"
            raise UsageError(f"meter {spec}: no single rail {word!r} (have: {have})")
        if matching[0] in chosen:
            raise UsageError(f"meter {spec}: the rail {word!r} stands twice")
        chosen.append(matching[0])
    return chosen


def open_meter(spec: Spec, machine: Machine, device: Device) -> Rails:
    """Channels of the chip that *spec* means: `ina3221:0x40,rails=1,shunt=0.1`."""
    spec.only("rails", "shunt", "rate", "label", address=True)
    chip = choose_chip(machine, spec, chips(machine, NAME))
    rails = rails_of(machine, chip)
    if "rails" in spec.options:
        rails = choose_rails(spec, rails)
    elif len(rails) != 1:
        have = ", ".join(rail.name for rail in rails) or "none is switched on"
        raise UsageError(
            f"meter {spec}: which of its channels? ({have})",
            hint=f"{spec},rails={'+'.join(rail.name for rail in rails[:2]) or '1'}",
        )
    # Labels come from the board's maker, and then so does the shunt; else it is a user's wiring.
    is_own = all(rail.label for rail in rails)
    label = spec.choice("label", LABELS[:2], "partial" if is_own else "external")
    pairs = [(rail, _shunt(spec, rail)) for rail in rails]
    names = " + ".join(rail.name for rail in rails)
    details: dict[str, object] = {
        "chip": NAME,
        "rails": [rail.name for rail in rails],
        "shunts_ohm": [shunt.stated_uohm / 1e6 for _, shunt in pairs],
    }
    if chip.i2c:
        details["i2c"] = chip.i2c
    warnings = [shunt.details().get("warning") for _, shunt in pairs]
    if any(warnings):
        details["warning"] = next(text for text in warnings if text)
        details["rescaled_by"] = [shunt.believed_uohm / shunt.stated_uohm for _, shunt in pairs]
    info = MeterInfo(
        kind=NAME,
        label=label,
        instrument=f"INA3221, {names}, Linux hwmon",
        boundary=f"the board's rails {names}; all others are not seen"
        if is_own
        else f"what flows through the shunts of channels {names}: the whole board, if they sit "
        "in its supply line",
        rate_hz=spec.rate_hz(update_hz(machine, chip)),
        details=details,
    )
    return Rails(machine, info, pairs)


def find(machine: Machine, device: Device) -> list[Found]:
    """Chips whose channels nobody labelled; those with labels are the kind "jetson"."""
    found = []
    for chip in chips(machine, NAME):
        rails = rails_of(machine, chip)
        if rails and not any(rail.label for rail in rails):
            found.append(
                Found(
                    spec=f"{NAME}{chip.address},rails={rails[0].name},shunt=OHM",
                    title=f"INA3221 power chip, {chip.place.rpartition('/')[2]}",
                    reason=f"state the channel and its shunt in Ohm; the driver believes in "
                    f"{ohms(rails[0].believed_uohm)} (R100 on the resistor is 0.1)",
                )
            )
    return found


def update_hz(machine: Machine, chip: Chip) -> float:
    """How often there is news: update_interval is the time for all channels, in ms."""
    interval_ms = machine.number(f"{chip.place}/update_interval")
    return min(RATE_HZ, 1e3 / interval_ms) if interval_ms and interval_ms > 0 else RATE_HZ


def _shunt(spec: Spec, rail: Rail) -> Shunt:
    if rail.believed_uohm < 1:
        raise DeviceError(
            f"meter {spec}: {rail.name}: no sound shunt{rail.channel}_resistor in {rail.chip.place}"
        )
    if rail.label and "shunt" not in spec.options:
        return Shunt(stated_uohm=rail.believed_uohm, believed_uohm=rail.believed_uohm)
    stated = stated_shunt_uohm(spec, f"; the driver believes in {ohms(rail.believed_uohm)}")
    return Shunt(stated_uohm=stated, believed_uohm=rail.believed_uohm)
