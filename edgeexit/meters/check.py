"""
Does a meter see this board? A short test with a known load: idle, all cores busy, idle again.

Callers see load_test and LoadTest. Hidden here: the processes that keep the cores busy (they end
with this one, whatever happens to it), and which readings would be implausible.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

from edgeexit.device import Device
from edgeexit.errors import DeviceError
from edgeexit.meters import EnergyMeter, MeterInfo, Sample
from edgeexit.meters.modelled import STAT, busy_ticks

PARTS = ("idle", "busy", "after")
FEWEST = 3
# The start of a part is left out: processes start, regulators and slow meters settle.
_SETTLE = 0.25
_LEAST_RATE = 0.8
_MOST_MISSING = 0.1
_MOST_DRIFT = 0.05
_MOST_OTHER_LOAD = 0.2
_MOST_COST = 0.01
# How far a sound reading may lie from the published watts of a board: other boards of the kind,
# other peripherals, a load that is not the published one. A shunt wrong by ten is outside.
_IDLE_RATIO = (1 / 3, 3.0)
_STEP_RATIO = (0.2, 2.5)
_MOST = 1e15
_ANY_BOARD_MW = (20.0, 500_000.0)
# Ends by itself once its parent is gone or its time is over.
_SPIN = (
    "import os,sys,time\n"
    "parent,end=int(sys.argv[1]),time.monotonic()+float(sys.argv[2])\n"
    "while os.getppid()==parent and time.monotonic()<end:\n"
    " for _ in range(20000): pass\n"
)

Load = Callable[[float], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something worth saying about a meter; *is_bad* if its readings cannot be right."""

    kind: str
    text: str
    is_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """
    What a meter showed: *watts* of each of PARTS (mean), and how it behaved.

    noise_mw is the standard deviation of single readings while idle, step_mw what the load
    added. missing is the share of samples that did not come, jitter_ms what 95 % of the
    distances between samples stay within of the usual one, cost the share of one core that
    reading took while idle, other_load the share of all cores that was busy then. samples are
    raw: (milliseconds since the first, milliwatts).
    """

    info: MeterInfo
    power_mw: dict[str, float]
    noise_mw: float
    rate_hz: float
    jitter_ms: float
    missing: float
    cost: float
    other_load: float
    samples: tuple[tuple[float, float], ...]
    findings: tuple[Finding, ...] = ()

    @property
    def step_mw(self) -> float:
        """What the load added, against the idle parts on both sides."""
        return self.power_mw["busy"] - (self.power_mw["idle"] + self.power_mw["after"]) / 2

    @property
    def is_plausible(self) -> bool:
        """Whether nothing speaks against the readings."""
        return not any(finding.is_bad for finding in self.findings)

    def to_document(self) -> dict[str, Any]:
        """The test as a JSON object."""
        return {
            "verdict": "plausible" if self.is_plausible else "implausible",
            "findings": [
                {"kind": found.kind, "is_bad": found.is_bad, "text": found.text}
                for found in self.findings
            ],
            "meter": self.info.to_document(),
            "power_mw": self.power_mw,
            "step_mw": self.step_mw,
            "noise_mw": self.noise_mw,
            "rate_hz": self.rate_hz,
            "jitter_ms": self.jitter_ms,
            "missing": self.missing,
            "cost": self.cost,
            "other_load": self.other_load,
            "samples": [list(sample) for sample in self.samples],
        }


@contextmanager
def busy_cores(most_s: float) -> Iterator[None]:
    """Keep every core that this process may use busy, at most *most_s* seconds."""
    argv = [sys.executable, "-I", "-S", "-c", _SPIN, str(os.getpid()), str(most_s)]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for _ in os.sched_getaffinity(0):
            children.append(
                subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        yield
    finally:
        for child in children:
            with suppress(OSError):
                child.kill()
        for child in children:
            child.wait()


def machine_busy_s() -> float:
    """Seconds that all cores of this machine together have been busy since it started."""
    with open(f"/{STAT}", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        return busy_ticks(file.readline()) / os.sysconf("SC_CLK_TCK")


def load_test(
    meter: EnergyMeter,
    device: Device,
    *,
    seconds: float,
    load: Load = busy_cores,
    busy_s: Callable[[], float] = machine_busy_s,
) -> LoadTest:
    """
    Read *meter* for *seconds*: a third idle, a third under *load*, a third idle again.

    DeviceError if the meter fails meanwhile, or is too slow for so short a test.
    """
    part_ns = round(seconds / 3 * 1e9)
    stream = iter(meter.samples())
    parts: list[list[Sample]] = []
    cost = other_load = 0.0
    last: Sample | None = None
    for name in PARTS:
        with load(seconds) if name == "busy" else _idle():
            before_s, busy_before_s = _own_s(), busy_s()
            part: list[Sample] = []
            for sample in stream:
                _refuse_nonsense(meter.info, last, sample)
                part.append(sample)
                last = sample
                if sample.at_ns - part[0].at_ns >= part_ns:
                    break
            else:
                raise DeviceError(f"meter {meter.info.kind}: it ended during the test")
            if name == "idle":
                passed_s = (part[-1].at_ns - part[0].at_ns) / 1e9
                cost = (_own_s() - before_s) / passed_s
                other_load = (busy_s() - busy_before_s) / passed_s / (os.cpu_count() or 1)
        parts.append(part)
    return judged(
        meter.info, parts, device, cost=cost, other_load=min(1.0, other_load), seconds=seconds
    )


def judged(
    info: MeterInfo,
    parts: Sequence[Sequence[Sample]],
    device: Device,
    *,
    cost: float,
    other_load: float = 0.0,
    seconds: float,
) -> LoadTest:
    """What the samples of the three *parts* say about the meter. Pure."""
    everything = [sample for part in parts for sample in part]
    settled = [_powers(_settled(part)) for part in parts]
    fewest = min(map(len, settled))
    if fewest < FEWEST:
        passed_s = (everything[-1].at_ns - everything[0].at_ns) / 1e9
        usual_s = passed_s / (len(everything) - 1)
        # What settles, the ends of a part and a counter's first reading come on top.
        needed_s = ceil(len(PARTS) * usual_s * (FEWEST / (1 - _SETTLE) + 3))
        raise DeviceError(
            f"meter {info.kind}: {fewest} readings in a third of {seconds:g} s, expected at "
            f"least {FEWEST}",
            hint=f"a slow meter needs a longer test: --seconds {needed_s}",
        )
    power_mw = {
        name: statistics.fmean(value for _, value in powers)
        for name, powers in zip(PARTS, settled, strict=True)
    }
    # Not from one part to the next: there processes start and end.
    steps_ms = [(b.at_ns - a.at_ns) / 1e6 for part in parts for a, b in pairwise(part)]
    usual_ms = statistics.median(steps_ms)
    lost = sum(round(step / usual_ms) - 1 for step in steps_ms if step > 1.5 * usual_ms)
    off_ms = sorted(abs(step - usual_ms) for step in steps_ms)
    first_ns = everything[0].at_ns
    test = LoadTest(
        info=info,
        power_mw=power_mw,
        noise_mw=statistics.pstdev(value for _, value in settled[0]),
        rate_hz=len(steps_ms) / (sum(steps_ms) / 1e3),
        jitter_ms=off_ms[int(0.95 * (len(off_ms) - 1))],
        missing=lost / (lost + len(everything)),
        cost=cost,
        other_load=other_load,
        samples=tuple(((at_ns - first_ns) / 1e6, value) for at_ns, value in _powers(everything)),
    )
    return replace(test, findings=tuple(_findings(test, device, settled)))


def _findings(
    test: LoadTest, device: Device, settled: Sequence[Sequence[tuple[int, float]]]
) -> list[Finding]:
    found = []

    def say(kind: str, text: str, *, is_bad: bool = False) -> None:
        found.append(Finding(kind=kind, text=text, is_bad=is_bad))

    idle_mw, after_mw = test.power_mw["idle"], test.power_mw["after"]
    error_mw = (
        sum(
            statistics.pvariance([value for _, value in powers]) / len(powers) for powers in settled
        )
        ** 0.5
    )
    if test.step_mw < max(3 * error_mw, 0.02 * abs(idle_mw)):
        say(
            "no step",
            f"all cores busy: {test.power_mw['busy'] / 1e3:.3f} W after {idle_mw / 1e3:.3f} W "
            "idle; expected clearly more: other load, a meter of something else, or a stuck one",
            is_bad=True,
        )
    if test.other_load > _MOST_OTHER_LOAD:
        say(
            "load",
            f"{test.other_load:.0%} of the cores were busy while this machine should have been "
            "idle; stop other programs and test again",
        )
    if test.info.label != "modelled":
        found += _against_device(test, device)
    if test.rate_hz < _LEAST_RATE * test.info.rate_hz:
        say("slow", f"{test.rate_hz:.1f} samples a second, expected {test.info.rate_hz:.1f}")
    if test.missing > _MOST_MISSING:
        say("gaps", f"{test.missing:.0%} of the samples did not come")
    if abs(after_mw - idle_mw) > _MOST_DRIFT * abs(idle_mw):
        say(
            "drift",
            f"idle power went from {idle_mw / 1e3:.3f} to {after_mw / 1e3:.3f} W; more than "
            f"{_MOST_DRIFT:.0%} disturbs a measurement",
        )
    if test.cost > _MOST_COST:
        say("cost", f"reading it takes {test.cost:.1%} of a core; expected at most 1 %")
    warning = test.info.details.get("warning")
    if warning:
        say("shunt", str(warning))
    return found


def _against_device(test: LoadTest, device: Device) -> list[Finding]:
    """What the board's published watts say, or those of any board."""
    idle_mw, step_mw = test.power_mw["idle"], test.step_mw
    is_whole = test.info.label == "external"
    low_mw, high_mw = _ANY_BOARD_MW
    source = "any board"
    if device.idle_w is not None:
        low_mw, high_mw = (ratio * device.idle_w * 1e3 for ratio in _IDLE_RATIO)
        source = f"a {device.name}, which takes {device.idle_w:g} W idle"
    found = []
    # Some rails may take next to nothing; more than the whole board they cannot take.
    if idle_mw > high_mw or (is_whole and idle_mw < low_mw):
        found.append(
            Finding(
                kind="watts",
                text=f"{idle_mw / 1e3:.3f} W idle; expected {low_mw / 1e3 if is_whole else 0:.2f} "
                f"to {high_mw / 1e3:.2f} W for {source}; is the shunt right?",
                is_bad=True,
            )
        )
    if device.idle_w is None or device.busy_w is None:
        return found
    published_mw = (device.busy_w - device.idle_w) * 1e3
    low_mw, high_mw = (ratio * published_mw for ratio in _STEP_RATIO)
    if step_mw > high_mw or (is_whole and 0 < step_mw < low_mw):
        found.append(
            Finding(
                kind="watts",
                text=f"all cores busy add {step_mw / 1e3:.3f} W; expected "
                f"{low_mw / 1e3 if is_whole else 0:.2f} to {high_mw / 1e3:.2f} W for a "
                f"{device.name} ({published_mw / 1e3:g} W published); is the shunt right?",
                is_bad=True,
            )
        )
    return found


def _refuse_nonsense(info: MeterInfo, before: Sample | None, sample: Sample) -> None:
    """What no meter can mean; plug-ins and other hosts may send anything."""
    if before is not None and sample.at_ns <= before.at_ns:
        raise DeviceError(f"meter {info.kind}: a sample is not after the one before it")
    value = sample.energy_mj if sample.power_mw is None else sample.power_mw
    if value is None or not abs(value) < _MOST:
        raise DeviceError(f"meter {info.kind}: a sample says {value}, expected a number")


def _settled(part: Sequence[Sample]) -> Sequence[Sample]:
    if not part:
        return part
    began_ns, ended_ns = part[0].at_ns, part[-1].at_ns
    return [s for s in part if s.at_ns >= began_ns + _SETTLE * (ended_ns - began_ns)]


def _powers(samples: Sequence[Sample]) -> list[tuple[int, float]]:
    """(ns, mW): as read, or of a counter the growth between two samples, in their middle."""
    found = [(s.at_ns, s.power_mw) for s in samples if s.power_mw is not None]
    for a, b in pairwise(samples):
        if a.energy_mj is not None and b.energy_mj is not None and b.at_ns > a.at_ns:
            seconds = (b.at_ns - a.at_ns) / 1e9
            found.append(((a.at_ns + b.at_ns) // 2, (b.energy_mj - a.energy_mj) / seconds))
    return found


def _own_s() -> float:
    """Seconds of processor time that this process and its ended children have taken."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@contextmanager
def _idle() -> Iterator[None]:
    yield
