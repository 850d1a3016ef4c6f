"""
Energy meters: what tells how much power a board, or a part of it, takes.

Callers see EnergyMeter, MeterInfo, Sample, open_meter and find_meters. One file of this folder is one kind of
meter; METERS names them. A foreign package adds kinds through the entry-point group
"edgeexit.meters".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """
    One reading: at_ns is time.monotonic_ns() in the middle of the reading, on this machine's clock.

    Exactly one of the two is set: power_mw (all rails of the meter together), or energy_mj, a
    counter that starts anywhere and never falls (wrap-around is the meter's business).
    """

    at_ns: int
    power_mw: float | None = None
    energy_mj: float | None = None


@dataclass(frozen=True, kw_only=True)
class MeterInfo:
    """
    What a meter is and sees; printed beside every joule.

    kind as in METERS. label: "external" (a sensor on the supply of the whole board), "partial"
    (some rails), "modelled" (computed, not measured). boundary says in words what is inside and
    what is not. rate_hz is how many samples a second to expect. details hold what else belongs
    into a profile (shunt, rails, chip, address, driver's belief, a model's source, ...).
    """

    kind: str
    label: str
    instrument: str
    boundary: str
    rate_hz: float
    details: Mapping[str, Any] = field(default_factory=dict)


class EnergyMeter(Protocol):
    """Hands out samples, one after another, at its own pace. One reader at a time."""

    @property
    def info(self) -> MeterInfo:
        """What this meter is."""

    def samples(self) -> Iterator[Sample]:
        """Samples as they come, without end. DeviceError when the sensor vanishes."""

    def close(self) -> None:
        """Give files, processes and connections back; may be called twice."""
