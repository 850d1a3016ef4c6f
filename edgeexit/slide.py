"""
Move along a certified path while running: stricter or looser, as the board feels.

Callers see parse_slide, Track and Slider. All policies of the path up to the certificate's stop
were certified at once, so any of them may answer any sample, as long as what picks it never
looks at that sample: hence the battery, the temperature, or the latencies of answers already
given. Hidden here: the exits that are computed stay those of the policy, so a row that would
need another one is left out, and an exit that a row does not use is computed but never taken.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from edgeexit.errors import BadFile, DeviceError, UsageError, hinting
from edgeexit.files import Table
from edgeexit.machine import Machine, this_machine
from edgeexit.meters.battery import batteries
from edgeexit.policy import ALWAYS, DROPPED, NEVER, Policy, limits_from
from edgeexit.runtime import Runner
from edgeexit.state import read_state

Sensor = Callable[[Machine], float | None]

# Sensors are slow to read and slow to change.
LOOK_EVERY_S = 2.0
# Answers whose mean latency decides on one step.
WINDOW = 16
# Below this share of the latency budget there is room for a stricter policy.
ROOM = 0.85

_NUMBER = r"\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_LATENCY = re.compile(rf"({_NUMBER})(us|ms|s)")
_NS = {"us": 1e3, "ms": 1e6, "s": 1e9}


def battery_percent(machine: Machine) -> float | None:
    """How full the emptiest battery of *machine* is, 0..100; None without a battery."""
    found = (machine.number(f"{place}/capacity") for place in batteries(machine))
    return min((value for value in found if value is not None), default=None)


def temperature_c(machine: Machine) -> float | None:
    """The processor's temperature; None without a sensor."""
    return read_state(machine).temperature_c


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """
    Something that a board says of itself: at *strict* and beyond the strictest policy answers,
    at *loose* and beyond the loosest (both in *unit*), in between one in between.
    """

    what: str
    read: Sensor
    strict: float
    loose: float
    unit: str

    def share(self, value: float) -> float:
        """How far along the path *value* leads: 0 the strictest, 1 the loosest."""
        share = (value - self.strict) / (self.loose - self.strict)
        return min(1.0, max(0.0, share))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A mean latency that is kept if the certified path allows it."""

    latency_ns: float


GAUGES: Mapping[str, Gauge] = {
    "battery": Gauge(
        what="battery gauge", read=battery_percent, strict=80.0, loose=20.0, unit="percent"
    ),
    "temperature": Gauge(
        what="temperature sensor", read=temperature_c, strict=60.0, loose=80.0, unit="degrees"
    ),
}


def parse_slide(text: str) -> Gauge | Budget:
    """What *text* asks for: battery[=LOW..HIGH], temperature[=LOW..HIGH] or latency=8ms."""
    name, equals, value = text.partition("=")
    latency = _LATENCY.fullmatch(value)
    if name == "latency" and latency and float(latency[1]) > 0:
        return Budget(latency_ns=float(latency[1]) * _NS[latency[2]])
    if name in GAUGES and not equals:
        return GAUGES[name]
    ends = _RANGE.fullmatch(value)
    if name in GAUGES and ends and float(ends[1]) < float(ends[2]):
        low, high = float(ends[1]), float(ends[2])
        gauge = GAUGES[name]
        if gauge.strict < gauge.loose:
            return replace(gauge, strict=low, loose=high)
        return replace(gauge, strict=high, loose=low)
    raise UsageError(
        f"--slide: {text[:40]!r}, expected battery, temperature or latency",
        hint="battery=20..80 (percent, the lower end first), temperature=60..80 (degrees Celsius), "
        "latency=8ms",
    )


@dataclass(frozen=True)
class Track:
    """
    The certified policies that a runner of one policy can change between, strictest first.

    *positions* are rows of the certificate's path, rising; *policies* the same in full, all with
    the measure and kept exits of the policy they were made from; *start* is that policy's place
    among them.
    """

    positions: tuple[int, ...]
    policies: tuple[Policy, ...]
    start: int

    @classmethod
    def of(cls, policy: Policy) -> "Track":
        """
        The track of *policy*. UsageError if its certificate has no path or the policy takes no
        early exit, BadFile if certificate and policy contradict each other.
        """
        where = f"policy for {policy.device}: certificate"
        table = Table(policy.certificate, where)
        if table.values.get("path") is None:
            raise UsageError(
                f"{where}: no path of policies that were certified together",
                hint="make one with: edgeexit tune --method path",
            )
        names = [f"path[{place}]" for place in range(len(table.get("path", list)))]
        rows = Table(dict(zip(names, table.get("path", list), strict=True)), where)
        path = [limits_from(rows, name) for name in names]
        certified, start = table.get("certified", int), table.get("position", int)
        if any(len(row) != len(policy.thresholds) for row in path):
            raise BadFile(f"{where}: path: expected rows of {len(policy.thresholds)} thresholds")
        if not 0 <= start <= certified < len(path):
            raise BadFile(
                f"{where}: position {start}, certified {certified}, {len(path)} rows in path: "
                "expected them to rise"
            )
        if path[start] != policy.thresholds:
            raise BadFile(f"{where}: row {start} of path holds not the policy's thresholds")
        places = [
            place
            for place, row in enumerate(path[: certified + 1])
            if place == start or _is_served(row, policy)
        ]
        if not _uses(policy.thresholds, policy) & set(policy.kept):
            raise UsageError(
                f"policy for {policy.device}: takes no early exit, there is nothing to slide",
                hint="run it without --slide",
            )
        return cls(
            positions=tuple(places),
            policies=tuple(_at(place, path[place], policy) for place in places),
            start=places.index(start),
        )


def _uses(row: tuple[float, ...], policy: Policy) -> set[str]:
    """The exits at which some sample may leave early by *row*."""
    return {name for name, limit in zip(policy.exits, row, strict=False) if limit < NEVER}


def _is_served(row: tuple[float, ...], policy: Policy) -> bool:
    """Whether the kept exits alone answer as *row* does, and some of them early."""
    last = policy.kept[-1]
    used = _uses(row, policy)
    has_end = last == policy.exits[-1] or row[policy.exits.index(last)] == ALWAYS
    return has_end and bool(used) and used <= set(policy.kept)


def _at(place: int, row: tuple[float, ...], policy: Policy) -> Policy:
    pairs = zip(policy.exits, row, strict=False)
    thresholds = tuple(
        min(limit, NEVER) if name in policy.kept else DROPPED for name, limit in pairs
    )
    certificate = {**policy.certificate, "position": place}
    return replace(policy, thresholds=thresholds, certificate=certificate)


class Slider:
    """
    Lets *runner* answer with the policy of its track that suits the board.

    Call move() before each answer, note() after it. *position* is the row of the certificate's
    path that answers now. A sensor that says nothing for a while changes nothing. UsageError as
    Track.of or if the runner has no policy, DeviceError if the machine has no such sensor.
    """

    def __init__(
        self,
        runner: Runner,
        slide: Gauge | Budget,
        *,
        machine: Machine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if runner.policy_origin == "none":
            raise UsageError(
                f"{runner.bundle.path}: no policy to slide along",
                hint="edgeexit tune makes one"
                if len(runner.bundle.exits) > 1
                else "a network of one exit always takes it: leave --slide out",
            )
        self._runner, self._slide, self._clock = runner, slide, clock
        with hinting("make the policy again with: edgeexit tune"):
            self.track = Track.of(runner.policy)
        self._place = self.track.start
        self._look: Callable[[], float | None] | None = None
        self._next_look_s = clock()
        # The first answer warms caches up: it tells nothing of those to come.
        self._is_warm = False
        self._latencies_ns: deque[int] = deque(maxlen=WINDOW)
        if isinstance(slide, Gauge):
            machine = this_machine() if machine is None else machine
            self._look = partial(slide.read, machine)
            if self._look() is None:
                raise DeviceError(
                    f"this machine has no {slide.what}", hint="slide by another thing: latency=8ms"
                )

    @property
    def position(self) -> int:
        """The row of the certificate's path that answers now."""
        return self.track.positions[self._place]

    def move(self) -> None:
        """Take the policy for the next answer, before its sample is looked at."""
        last = len(self.track.positions) - 1
        if isinstance(self._slide, Gauge):
            now_s = self._clock()
            if self._look is None or now_s < self._next_look_s:
                return
            self._next_look_s = now_s + LOOK_EVERY_S
            value = self._look()
            if value is not None:
                self._go(round(self._slide.share(value) * last))
            return
        if len(self._latencies_ns) < WINDOW:
            return
        mean_ns = sum(self._latencies_ns) / WINDOW
        if mean_ns > self._slide.latency_ns:
            # Late answers hurt now: fast towards loose, slowly back.
            self._go(min(last, self._place + max(1, last // 8)))
        elif mean_ns < ROOM * self._slide.latency_ns:
            self._go(max(0, self._place - 1))
        self._latencies_ns.clear()

    def note(self, latency_ns: int) -> None:
        """Say how long the answer took."""
        if self._is_warm:
            self._latencies_ns.append(latency_ns)
        self._is_warm = True

    def _go(self, place: int) -> None:
        if place != self._place:
            self._runner.adopt(self.track.policies[place])
            self._place = place
