"""
A machine made of numbers, with a clock of its own: blocks of calls whose length is known.

`collect` measures it as it measures real processes. What a machine is like is a Nature; what
befalls it is a list of events, each at a time of the machine's own clock.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from profiles import DIGEST, MACHINE

from edgeexit import series
from edgeexit.blocks import Block, Case, Mode, Process
from edgeexit.collect import Limits, collect
from edgeexit.profile import Profile
from edgeexit.sitting import Sitting
from edgeexit.state import Reading
from edgeexit.verdict import judge

SHARED_BY_YARDSTICK = 0.31  # seen: the network 80 % slower, the yardstick beside it 20 %
_CLOCK_MHZ, _CORES = 1800.0, 4
_STARTING_S = 0.3
_TURNS = 9


@dataclass(frozen=True, kw_only=True)
class Nature:
    """
    What a machine is like when nothing befalls it.

    call_ns are the calls of the cases: what half of all blocks of all processes stay below. The
    rest are shares of it: *luck* is the deviation between processes (of its variance, *common* is
    shared by all cases), *odd* the chance that a process is 5 to 80 % slower than its luck,
    *spread* the scatter of blocks and *jitter* that of single calls (both skewed to the right),
    *drift* what a process loses within ten seconds, *spikes* the chance that a call takes 20
    times as long.
    """

    call_ns: tuple[float, ...] = (400e3, 900e3)
    luck: float = 0.01
    common: float = 0.5
    odd: float = 0.0
    spread: float = 0.006
    jitter: float = 0.05
    drift: float = 0.0
    spikes: float = 0.0
    yardstick_ns: float = 250e3
    singles: int = 20


@dataclass(frozen=True, kw_only=True)
class Slower:
    """From *at_s* to *until_s* everything takes *factor* as long; the yardstick less so."""

    at_s: float
    until_s: float = 1e9
    factor: float


@dataclass(frozen=True, kw_only=True)
class ClockFall:
    """From *at_s* the cores run at *share* of their clock, and the firmware says so."""

    at_s: float
    until_s: float = 1e9
    share: float


@dataclass(frozen=True, kw_only=True)
class Hog:
    """Another program wants our core from *at_s* to *until_s* and gets half of it."""

    at_s: float
    until_s: float


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Somebody stops the process at *at_s* for *length_s*."""

    at_s: float
    length_s: float


Event = Slower | ClockFall | Hog | Pause


class SimulatedMachine:
    """One machine; processes opened on it see its clock go on and its events happen."""

    def __init__(self, nature: Nature, seed: int = 0, events: Sequence[Event] = ()) -> None:
        self.nature = nature
        self.rng = np.random.default_rng(seed)
        self.now_s = 0.0
        self._events = tuple(events)
        self._pauses = [event for event in events if isinstance(event, Pause)]
        self._busy_ms, self._own_ms, self._last_s = 5e6, 900.0, 0.0
        self._boot_s = 1000.0

    def clock_ns(self) -> int:
        """The machine's own time."""
        return round((self._boot_s + self.now_s) * 1e9)

    def active(self, kind: type) -> list:
        """What of one kind is going on just now."""
        return [
            event
            for event in self._events
            if isinstance(event, kind) and event.at_s <= self.now_s < event.until_s
        ]

    def slowness(self) -> tuple[float, float, float]:
        """By what factors calls (wall clock, CPU time) and the yardstick are slower now."""
        wall = cpu = yardstick = 1.0
        if not self._events:
            return wall, cpu, yardstick
        for event in self.active(Slower):
            wall, cpu = wall * event.factor, cpu * event.factor
            yardstick *= event.factor**SHARED_BY_YARDSTICK
        for event in self.active(ClockFall):
            wall, cpu, yardstick = wall / event.share, cpu / event.share, yardstick / event.share
        for _ in self.active(Hog):
            # A turn of the yardstick mostly fits between two of the scheduler's.
            wall, cpu, yardstick = wall * 2, cpu * 1.03, yardstick * 1.03
        return wall, cpu, yardstick

    def spend(self, seconds: float) -> float:
        """Let time pass; the seconds of it that the process was stopped."""
        before, stopped = self.now_s, 0.0
        self.now_s += seconds
        for event in self._pauses:
            if before <= event.at_s < self.now_s:
                self.now_s += event.length_s
                stopped += event.length_s
        return stopped

    def reading(self) -> Reading:
        """What the machine says now."""
        passed_ms, self._last_s = (self.now_s - self._last_s) * 1e3, self.now_s
        hogs = len(self.active(Hog))
        self._busy_ms += passed_ms * (1.01 + hogs)
        self._own_ms += passed_ms / (1 + hogs)
        falls = self.active(ClockFall)
        return Reading(
            at_ns=self.clock_ns(),
            clocks_mhz=(_CLOCK_MHZ * min([fall.share for fall in falls], default=1.0),),
            governors=("performance",),
            temperature_c=55.0 + 25.0 * bool(falls),
            throttled=0x60006 if falls else 0,
            busy_ms=self._busy_ms,
            own_ms=self._own_ms,
            memory_available_mb=3000.0,
        )

    @contextmanager
    def open_bench(self, seed: int) -> Iterator["SimulatedBench"]:
        """A fresh process."""
        self.spend(_STARTING_S)
        yield SimulatedBench(self, seed)

    def measure(
        self, limits: Limits | None = None, seed: int = 0, watched: Sequence[int] | None = None
    ) -> list[Process]:
        """What `collect` makes of this machine."""
        cases = cases_of(self.nature)
        return collect(
            self.open_bench,
            cases,
            range(len(cases)) if watched is None else watched,
            limits or Limits(),
            seed=seed,
            feel=self.reading,
            clock_ns=self.clock_ns,
        )

    def profile(self, limits: Limits | None = None, seed: int = 0) -> Profile:
        """The judged profile of this machine, whose cases are exits and the net without them."""
        limits = limits or Limits()
        before = self.reading()
        processes = self.measure(limits, seed)
        found = Profile(
            device="rpi4",
            bundle_digest=DIGEST,
            bundle_name="simulated",
            exits=exits_of(self.nature),
            mode=Mode(),
            runtime="simulated",
            delegate=None,
            threads=1,
            cores=(),
            seed=seed,
            precision=limits.precision,
            time_cap_s=limits.time_cap_s,
            cases=cases_of(self.nature),
            processes=tuple(processes),
            machine=MACHINE,
            before=before,
            after=self.reading(),
        )
        return Profile(**{**vars(found), "verdict": judge(found)})


class SimulatedBench:
    """One process on a simulated machine, with the luck it was born with."""

    def __init__(self, machine: SimulatedMachine, seed: int) -> None:
        self._machine, self._nature, self._rng = machine, machine.nature, machine.rng
        nature, rng, cases = machine.nature, machine.rng, len(machine.nature.call_ns)
        luck = nature.common**0.5 * rng.standard_normal()
        own = (1 - nature.common) ** 0.5 * rng.standard_normal(cases)
        slow = float(_oddities(nature, rng, 1)[0])
        self._costs_ns = [
            float(cost * math.exp(nature.luck * (luck + its)) * slow / _middle(nature, case))
            for case, (cost, its) in enumerate(zip(nature.call_ns, own, strict=True))
        ]
        mine = np.exp(0.001 * rng.standard_normal()) * slow**SHARED_BY_YARDSTICK
        self._yardstick_ns = nature.yardstick_ns * float(mine)
        self._born_s = machine.now_s
        found = [self.warm_up(case) for case in range(cases)]
        self.sitting = Sitting(
            warmup_ns=tuple(tuple(calls) for calls in found),
            settled=tuple(series.warm_from(calls) for calls in found),
        )

    def warm_up(self, case: int) -> list[int]:
        """Nanoseconds of the first calls: the first opens the segments, a few more are cold."""
        cold = np.array([30.0, 1.6, 1.2, *[1.0] * 9])
        calls = self._costs_ns[case] * cold * self._single(len(cold)) * self._machine.slowness()[0]
        self._machine.spend(float(calls.sum()) / 1e9)
        return [int(call) for call in calls]

    def round(self, order: Sequence[int]) -> list[Block]:
        """One block of each case, in this *order*."""
        return [self.block(case) for case in order]

    def block(self, case: int) -> Block:
        """One block of *case*, the yardstick before it."""
        machine, nature, rng = self._machine, self._nature, self._rng
        wall, cpu, slow = machine.slowness()
        yardstick = self._yardstick_ns * slow * (1.0 + 0.002 * rng.standard_normal())
        machine.spend(_TURNS * yardstick / 1e9)
        cost = self._costs_ns[case]
        calls = _calls(nature, case)
        mean = cost * float(_block_factors(nature, rng, calls))
        mean *= 1.0 + nature.drift * (machine.now_s - self._born_s) / 10.0
        if nature.spikes:
            mean += 20 * cost * rng.binomial(calls, nature.spikes) / calls
        singles = self._single(nature.singles) * mean * wall if nature.singles else ()
        at_ns, worked = machine.clock_ns(), mean * calls * wall / 1e9
        stopped = machine.spend(worked)
        return Block(
            case=case,
            at_ns=at_ns,
            calls=calls,
            mean_ns=mean * wall + stopped * 1e9 / calls,
            cpu_ns=mean * cpu * 0.999,
            yardstick_ns=yardstick,
            calls_ns=tuple(int(value) for value in singles),
        )

    def _single(self, count: int) -> np.ndarray:
        factors = 1.0 + self._nature.jitter * (self._rng.standard_exponential(count) - 1.0)
        return factors + 20.0 * (self._rng.random(count) < self._nature.spikes)


def _calls(nature: Nature, case: int) -> int:
    return max(5, round(Limits().block_ms * 1e6 / nature.call_ns[case]))


def _oddities(nature: Nature, rng: np.random.Generator, count: int) -> np.ndarray:
    return 1.0 + rng.uniform(0.05, 0.8, count) * (rng.random(count) < nature.odd)


def _block_factors(
    nature: Nature, rng: np.random.Generator, calls: int, count: int | None = None
) -> np.ndarray:
    """What makes blocks differ: the mean of so many skewed calls, and what all of them share."""
    of_calls = nature.jitter * (rng.standard_gamma(calls, count) / calls - 1.0)
    return (1.0 + of_calls) * (1.0 + nature.spread * (rng.standard_exponential(count) - 1.0))


@lru_cache(maxsize=64)
def _middle(nature: Nature, case: int, count: int = 100_000) -> float:
    """The factor that half of all blocks of all processes stay below."""
    rng = np.random.default_rng(1)
    lucks = np.exp(nature.luck * rng.standard_normal(count)) * _oddities(nature, rng, count)
    return float(np.median(lucks * _block_factors(nature, rng, _calls(nature, case), count)))


def exits_of(nature: Nature) -> tuple[str, ...]:
    """Names for the exits that the cases but the last one leave at."""
    return tuple(f"exit{k}" for k in range(max(1, len(nature.call_ns) - 1)))


def cases_of(nature: Nature) -> tuple[Case, ...]:
    """Each exit with all kept, then the network without exits; as many as call_ns has."""
    exits = exits_of(nature)
    alone = Case(kept=exits[-1:], exit=exits[-1])
    if len(nature.call_ns) == 1:
        return (alone,)
    return (*(Case(kept=exits, exit=name) for name in exits), alone)
