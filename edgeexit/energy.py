"""
Joules per call, from what a meter said while calls ran back to back.

Callers see Trace, Window, joules, window_s, Figure and Energy. A board's meter is far slower
than a call, so energy is taken over windows of seconds and divided by the calls in them. Two
sample periods at either end of a window are left out (there the meter still shows the load
before) and the mean power of the rest stands for the whole. What cannot be told from the samples
(a window too short, a meter too slow, a gap) is refused with the window that would do; it is
never averaged away. Pure: no clock, no file, no process.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import Table
from edgeexit.meters import MeterInfo, Sample

# 1: first version.
FORMAT = 1

IDLE = -1
SHORTEST_S = 3.0
FEWEST_SAMPLES = 30
FEWEST_WINDOWS = 5
_MOST_WINDOWS = 5000
_USUAL_S = 3.5
_USUAL_SAMPLES = 40
_GUARD_PERIODS = 2
# Three values lost in a row; in a steady load such gaps hide nothing as long as they are few.
_LONG_GAP_PERIODS = 3.5
_MOST_GAPS = 0.15
_MOST_IDLE_DRIFT = 0.05
# A twenty-fifth of a step in a quarter of a window is one per cent of the step.
_MOST_LAG = 0.04
# On another core it disturbs no latency; this much would be seen in the idle power.
_MOST_SAMPLER_SHARE = 0.05
_LEAST_RATE = 0.8
_REPLICATES = 2000
_MOST_NS = 1 << 62
_MOST = 1e15

T = TypeVar("T")
Values = NDArray[np.float64]
Times = NDArray[np.int64]


def window_s(rate_hz: float) -> float:
    """
    Seconds that a window should last with a meter of *rate_hz* samples a second.

    40 samples, so that 30 are left when one in four is lost, and never below 3.5 s, because a
    window that ends with a call a little early must still last 3 s.
    """
    if not 0 < rate_hz < _MOST:
        raise UsageError(f"meter rate: expected samples a second above 0, found {rate_hz}")
    return max(_USUAL_S, _USUAL_SAMPLES / rate_hz)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """
    A stretch of time on the monotonic clock in which *calls* calls of one case ran.

    *case* counts the profile's cases from 0. In an idle window case is -1 and calls 0.
    """

    case: int
    began_ns: int
    ended_ns: int
    calls: int

    @property
    def duration_s(self) -> float:
        """How long it lasted."""
        return (self.ended_ns - self.began_ns) / 1e9

    def __str__(self) -> str:
        return "idle window" if self.case == IDLE else f"window of case {self.case}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """
    A figure with its 95 % bootstrap interval and the label of the meter that it comes from.

    The label ("external", "partial", "modelled") is to be printed wherever the figure is.
    """

    value: float
    low: float
    high: float
    label: str

    @property
    def half_width(self) -> float:
        """Half the interval's width as a share of the value (0.01: plus or minus 1 %)."""
        return (self.high - self.low) / 2 / abs(self.value) if self.value else math.inf


@dataclass(frozen=True, eq=False)
class Trace:
    """
    The samples of one meter: int64 ns that rise strictly, and mW, or mJ if *is_counter*.

    Values are kept to a thousandth. DeviceError for samples that no meter can have meant.
    """

    at_ns: Times
    values: Values
    is_counter: bool

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Trace":
        """The trace of *samples*, which are all of power or all of one counter."""
        listed = list(samples)
        is_counter = bool(listed) and listed[0].energy_mj is not None
        values = [s.energy_mj if is_counter else s.power_mw for s in listed]
        if None in values:
            raise DeviceError("meter: samples of power and of energy, expected one kind")
        return cls(
            np.array([s.at_ns for s in listed], np.int64),
            # Python's round leaves infinities alone, which are refused below.
            np.array([round(float(value or 0), 3) for value in values], np.float64),
            is_counter,
        )

    def __post_init__(self) -> None:
        what = "energy counter" if self.is_counter else "power"
        if len(self.values) < 2:
            raise DeviceError(f"meter: {len(self.values)} samples, expected a stream of them")
        if not (np.abs(self.values) < _MOST).all():
            wrong = int(np.argmin(np.abs(self.values) < _MOST))
            raise DeviceError(f"meter: sample {wrong}: {what} is {self.values[wrong]}")
        steps_ns = np.diff(self.at_ns)
        if steps_ns.min() <= 0:
            raise DeviceError(f"meter: sample {int(steps_ns.argmin()) + 1} is not after the last")
        if self.is_counter and np.diff(self.values).min() < 0:
            wrong = int(np.diff(self.values).argmin())
            raise DeviceError(
                f"meter: sample {wrong + 1}: {what} fell from {self.values[wrong]} mJ to "
                f"{self.values[wrong + 1]} mJ",
                hint="it wrapped around or started anew; measure again",
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Trace)
            and self.is_counter == other.is_counter
            and np.array_equal(self.at_ns, other.at_ns)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _changed(self) -> Times:
        """Where a value differs from the one before it."""
        return np.flatnonzero(np.diff(self.values) != 0) + 1

    @cached_property
    def _points(self) -> tuple[Values, Values]:
        """Seconds since the first sample, and values; of a counter only where it moved."""
        keep: Any = slice(None)
        if self.is_counter:
            keep = np.concatenate(([0], self._changed))
        return (self.at_ns[keep] - self.at_ns[0]) / 1e9, self.values[keep]

    @cached_property
    def period_s(self) -> float:
        """
        Seconds between two values that the meter really made (the median).

        A meter that is asked more often than it measures repeats itself in runs of nearly equal
        length; then one run is one value.
        """
        seconds, _ = self._points
        if len(seconds) < 2:
            return math.inf
        period_s = float(np.median(np.diff(seconds)))
        runs = np.diff(self._changed)
        if self.is_counter or len(runs) < 10:
            return period_s
        usual = float(np.median(runs))
        is_regular = float(np.mean(np.abs(runs - usual) <= max(1.0, 0.35 * usual))) >= 0.7
        # Longer runs are a load so steady that a coarse meter cannot see it move.
        may_be = 2 <= usual <= FEWEST_SAMPLES and float(np.mean(runs == 1)) <= 0.1
        return period_s * usual if may_be and is_regular else period_s

    def seconds(self, at_ns: int) -> float:
        """Seconds from the first sample to *at_ns*."""
        return (at_ns - int(self.at_ns[0])) / 1e9

    def between(self, began_s: float, ended_s: float) -> Values:
        """When the meter made a value in that stretch (seconds since the first sample)."""
        seconds, _ = self._points
        inside = seconds[np.searchsorted(seconds, began_s) : np.searchsorted(seconds, ended_s)]
        if self.is_counter or len(inside) < 2:
            return inside
        return inside[:: max(1, round(self.period_s / float(np.median(np.diff(seconds)))))]

    def mean_mw(self, began_s: float, ended_s: float) -> float:
        """Mean power in that stretch: trapezoids or the counter's difference, linear at ends."""
        seconds, values = self._points
        edges = np.array([began_s, ended_s])
        at_edges = np.interp(edges, seconds, values)
        if self.is_counter:
            return float(np.diff(at_edges)[0]) / (ended_s - began_s)
        inside = slice(*np.searchsorted(seconds, edges))
        times = np.concatenate((edges[:1], seconds[inside], edges[1:]))
        power_mw = np.concatenate((at_edges[:1], values[inside], at_edges[1:]))
        areas = np.diff(times) * (power_mw[1:] + power_mw[:-1]) / 2
        return float(areas.sum()) / (ended_s - began_s)

    def to_document(self) -> dict[str, Any]:
        """The samples as packed lists: steps in ns from *began_ns*, and values."""
        return {
            "unit": "mJ" if self.is_counter else "mW",
            "began_ns": int(self.at_ns[0]),
            "steps_ns": np.diff(self.at_ns).tolist(),
            "values": self.values.tolist(),
        }

    @classmethod
    def from_document(cls, table: Table) -> "Trace":
        """Read what to_document wrote. BadFile names what is wrong."""
        table.only("unit", "began_ns", "steps_ns", "values")
        unit = table.get("unit", str)
        values = table.list_of("values", float)
        steps = table.list_of("steps_ns", int, length=max(0, len(values) - 1))
        began_ns = table.get("began_ns", int)
        if unit not in ("mW", "mJ"):
            raise BadFile(f"{table.where}: unit: expected mW or mJ, found {unit[:20]!r}")
        if not 0 <= began_ns < _MOST_NS or (steps and min(steps) <= 0):
            raise BadFile(f"{table.where}: samples that do not follow each other in time")
        if began_ns + sum(steps) >= _MOST_NS:
            raise BadFile(f"{table.where}: steps_ns: beyond any clock")
        at_ns = np.cumsum(np.array([began_ns, *steps], np.int64))[: len(values)]
        return _or_bad_file(table, lambda: cls(at_ns, np.array(values, np.float64), unit == "mJ"))


def joules(trace: Trace, window: Window) -> float:
    """
    Millijoules of *window*, all calls together and idling included.

    DeviceError if the window is shorter than 3 s, holds fewer than 30 values of the meter, or has
    gaps (three values lost in a row, or more) over more than 15 % of it.
    """
    _check(trace, window)
    guard_s = _GUARD_PERIODS * trace.period_s
    began_s, ended_s = trace.seconds(window.began_ns), trace.seconds(window.ended_ns)
    return trace.mean_mw(began_s + guard_s, ended_s - guard_s) * window.duration_s


def _check(trace: Trace, window: Window) -> None:
    if window.duration_s < SHORTEST_S:
        raise DeviceError(
            f"energy: {window} lasted {window.duration_s:.3g} s, expected at least {SHORTEST_S:g} s"
        )
    began_s, ended_s = trace.seconds(window.began_ns), trace.seconds(window.ended_ns)
    times = trace.between(began_s, ended_s)
    if len(times) < FEWEST_SAMPLES:
        rate_hz = 1 / trace.period_s
        known = rate_hz > 0 and trace.period_s * FEWEST_SAMPLES < ended_s - began_s
        what = "counter steps" if trace.is_counter else "samples"
        raise DeviceError(
            f"energy: {window} of {window.duration_s:.3g} s holds {len(times)} {what}, expected at "
            f"least {FEWEST_SAMPLES}",
            hint="samples are missing: look at the meter, or take longer windows"
            if known
            else "this meter never moved; take another one"
            if rate_hz == 0
            else f"at this meter's {rate_hz:.3g} a second windows of {window_s(rate_hz):.3g} s "
            "would do; or take a faster meter",
        )
    steps_s = np.diff(np.concatenate(([began_s], times, [ended_s])))
    missing_s = float(steps_s[steps_s > _LONG_GAP_PERIODS * trace.period_s].sum())
    if missing_s > _MOST_GAPS * window.duration_s:
        raise DeviceError(
            f"energy: {window}: no samples during {missing_s:.3g} s of {window.duration_s:.3g} s",
            hint="the meter stops now and then; look at its cable, its load, its output buffer",
        )


@dataclass(frozen=True, kw_only=True)
class Energy:
    """
    What a meter said during the windows of one profile; joules are computed when asked for.

    *windows* holds loaded and idle ones in order of time: at least 5 for each case, and an idle
    one before the first and after the last (one before every round is better: idle power is
    interpolated between them). *sampler_share* is the share of one core that reading the meter
    took, None if unknown. *pace_hz* is the rate of inputs if calls were spread out in time
    instead of back to back. DeviceError if joules cannot be told from this.
    """

    info: MeterInfo
    trace: Trace
    windows: tuple[Window, ...]
    sampler_share: float | None = None
    pace_hz: float | None = None
    _power_mw: Values = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for before, after in zip(self.windows, self.windows[1:], strict=False):
            if after.began_ns < before.ended_ns:
                raise DeviceError(f"energy: {after} begins before the {before} before it ended")
        for window in self.windows:
            if window.case < IDLE or (window.calls < 1) != (window.case == IDLE):
                raise DeviceError(f"energy: {window}: {window.calls} calls do not fit it")
        cases = [window.case for window in self.windows]
        if len(cases) > _MOST_WINDOWS:
            raise DeviceError(f"energy: {len(cases)} windows, expected at most {_MOST_WINDOWS}")
        if not cases or (cases[0], cases[-1]) != (IDLE, IDLE) or len(set(cases)) < 2:
            raise DeviceError("energy: expected windows between an idle one before and one after")
        for case in self.cases:
            if cases.count(case) < FEWEST_WINDOWS:
                raise DeviceError(
                    f"energy: {cases.count(case)} windows of case {case}, expected at least "
                    f"{FEWEST_WINDOWS}"
                )
        power = [joules(self.trace, window) / window.duration_s for window in self.windows]
        object.__setattr__(self, "_power_mw", np.array(power))

    @property
    def label(self) -> str:
        """What kind of joules these are: "external", "partial" or "modelled"."""
        return self.info.label

    @property
    def rate_hz(self) -> float:
        """How many values a second the meter really gave."""
        return 1 / self.trace.period_s

    @property
    def cases(self) -> list[int]:
        """The cases that have windows, sorted."""
        return sorted({window.case for window in self.windows} - {IDLE})

    def gross_mj(self, case: int) -> Figure:
        """
        Millijoules a call of *case*, idling included: the median over its windows.

        At a pace a call's waiting time is included, too.
        """
        return self._median(self._per_call(case, self._power_mw))

    def net_mj(self, case: int) -> Figure:
        """Millijoules a call of *case* beyond what idling in the same time would have taken."""
        return self._median(self._per_call(case, self._power_mw - self._idle_then_mw))

    def replicates(self, case: int, *, net: bool = False) -> Values:
        """Bootstrap replicates over windows of gross_mj, or of net_mj: float64 (2000,)."""
        power_mw = self._power_mw - self._idle_then_mw if net else self._power_mw
        values = self._per_call(case, power_mw)
        return np.asarray(np.median(values[_draws(len(values))], axis=1))

    def power_mw(self, case: int) -> Figure:
        """Mean milliwatts while *case* ran, idling included."""
        return self._median(self._power_mw[self._places(case)])

    def ratio(self, case: int, of: int, *, net: bool = False) -> Figure:
        """The energy of a call of *case* as a share of one of the case *of*, paired by round."""
        power_mw = self._power_mw - self._idle_then_mw if net else self._power_mw
        return self._quotient(self._per_call(case, power_mw), self._per_call(of, power_mw))

    def saving(self, case: int, full: int) -> Figure:
        """
        The share of all energy in equal time that *case* saves against the case *full*.

        Of a paced measurement with an external meter this is the share of the board's energy.
        """
        mine, whole = (self._power_mw[self._places(k)] for k in (case, full))
        ratio = self._quotient(mine, whole)
        return Figure(
            value=1 - ratio.value, low=1 - ratio.high, high=1 - ratio.low, label=self.label
        )

    @property
    def idle_mw(self) -> tuple[float, ...]:
        """Mean milliwatts of every idle window, in order of time."""
        return tuple(self._power_mw[self._places(IDLE)].tolist())

    @property
    def idle_drift(self) -> float:
        """Largest less smallest idle power, as a share of the median one."""
        idle = np.array(self.idle_mw)
        middle = float(np.median(idle))
        return float(np.ptp(idle)) / middle if middle > 0 else math.inf

    @property
    def lag(self) -> float:
        """
        How much of a step of load still shows in the first quarter of the next window, 0..1.

        Fitted over all windows that follow another one; 0 if it cannot be told from noise.
        """
        seen = []
        for k, (before, window) in enumerate(zip(self.windows, self.windows[1:], strict=False)):
            if window.began_ns - before.ended_ns > 1e9:
                continue
            began_s = self.trace.seconds(window.began_ns) + _GUARD_PERIODS * self.trace.period_s
            ended_s = self.trace.seconds(window.ended_ns) - _GUARD_PERIODS * self.trace.period_s
            middle_s = began_s + (ended_s - began_s) / 4
            rest_mw = self.trace.mean_mw(middle_s, ended_s)
            head_mw = self.trace.mean_mw(began_s, middle_s)
            seen.append((self._power_mw[k] - rest_mw, head_mw - rest_mw))
        if len(seen) < FEWEST_WINDOWS:
            return 0.0
        steps, left = np.array(seen).T
        squares = float(steps @ steps)
        if squares <= 0:
            return 0.0
        slope = float(steps @ left) / squares
        noise = math.sqrt(float(np.sum((left - slope * steps) ** 2)) / (len(seen) - 1) / squares)
        return slope if slope > 4 * noise else 0.0

    def reasons(self, case_name: Callable[[int], str] = "case {}".format) -> list[str]:
        """
        What makes these joules doubtful, a sentence each; empty if nothing does.

        *case_name* gives the words for a case's number.
        """
        found = []
        if self.idle_drift > _MOST_IDLE_DRIFT:
            found.append(
                f"idle power drifted between {min(self.idle_mw) / 1e3:.3g} W and "
                f"{max(self.idle_mw) / 1e3:.3g} W ({self.idle_drift:.0%})"
            )
        if self.lag > _MOST_LAG:
            found.append(
                f"the meter lags, or loads did not settle: {self.lag:.0%} of a step of load still "
                "shows in the first quarter of a window"
            )
        if self.rate_hz < _LEAST_RATE * self.info.rate_hz:
            found.append(
                f"the meter gave {self.rate_hz:.3g} values a second, expected "
                f"{self.info.rate_hz:.3g}"
            )
        if self.sampler_share is not None and self.sampler_share > _MOST_SAMPLER_SHARE:
            found.append(f"reading the meter took {self.sampler_share:.1%} of a core")
        under = [k for k in self.cases if self.net_mj(k).value <= 0]
        if under:
            what = case_name(under[0])
            found.append(f"{what} drew no more than idling: was the board idle before?")
        return found

    def to_document(self) -> dict[str, Any]:
        """The energy part of a profile as a JSON object."""
        return {
            "format": FORMAT,
            "label": self.label,
            "meter": self.info.to_document(),
            "sampler_share": self.sampler_share,
            "pace_hz": self.pace_hz,
            "windows": [[w.case, w.began_ns, w.ended_ns, w.calls] for w in self.windows],
            "samples": self.trace.to_document(),
        }

    @classmethod
    def from_document(cls, table: Table) -> "Energy":
        """Read what to_document wrote. BadFile names what is wrong, wrong use included."""
        table.only("format", "label", "meter", "sampler_share", "pace_hz", "windows", "samples")
        table.expect_format(FORMAT)
        info = MeterInfo.from_document(table.table("meter"))
        if table.get("label", str) != info.label:
            raise BadFile(f"{table.where}: label: is not the meter's, {info.label}")
        rows = table.list_of("windows", list)
        places = [
            Table({"window": row}, f"{table.where}: windows[{k}]") for k, row in enumerate(rows)
        ]
        listed = [place.list_of("window", int, length=4) for place in places]
        if any(not -1 <= number < _MOST_NS for row in listed for number in row):
            raise BadFile(f"{table.where}: windows: a number beyond any clock or count")
        windows = tuple(
            Window(case=case, began_ns=began, ended_ns=ended, calls=calls)
            for case, began, ended, calls in listed
        )
        trace = Trace.from_document(table.table("samples"))
        share, pace_hz = _optional(table, "sampler_share"), _optional(table, "pace_hz")
        return _or_bad_file(
            table,
            lambda: cls(
                info=info,
                trace=trace,
                windows=windows,
                sampler_share=share,
                pace_hz=pace_hz,
            ),
        )

    def _places(self, case: int) -> list[int]:
        found = [k for k, window in enumerate(self.windows) if window.case == case]
        if not found:
            raise UsageError(f"energy: case {case} was not measured (have: {self.cases})")
        return found

    def _per_call(self, case: int, power_mw: Values) -> Values:
        places = self._places(case)
        seconds = [self.windows[k].duration_s / self.windows[k].calls for k in places]
        return np.asarray(power_mw[places] * np.array(seconds), np.float64)

    @cached_property
    def _idle_then_mw(self) -> Values:
        middle = np.array([(w.began_ns + w.ended_ns) / 2 for w in self.windows])
        idle = self._places(IDLE)
        return np.asarray(np.interp(middle, middle[idle], self._power_mw[idle]), np.float64)

    def _median(self, values: Values) -> Figure:
        draws = np.median(values[_draws(len(values))], axis=1)
        return self._figure(float(np.median(values)), draws)

    def _quotient(self, over: Values, under: Values) -> Figure:
        if under.min() <= 0:
            raise DeviceError("energy: no share of a case that drew no more than idling")
        count = min(len(over), len(under))
        quotients = over[:count] / under[:count]
        draws = np.median(quotients[_draws(count)], axis=1)
        return self._figure(float(np.median(quotients)), draws)

    def _figure(self, value: float, draws: Values) -> Figure:
        low, high = np.quantile(draws, (0.025, 0.975))
        return Figure(value=value, low=float(low), high=float(high), label=self.label)


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (_REPLICATES, count))


def _optional(table: Table, key: str) -> float | None:
    if table.values.get(key) is None:
        return None
    value = table.get(key, float)
    if not 0 <= value < _MOST:
        raise BadFile(f"{table.where}: {key}: expected a number from 0, found {value}")
    return value


def _or_bad_file(table: Table, make: Callable[[], T]) -> T:
    """What *make* makes; what it refuses is the file's fault here, not a device's."""
    try:
        return make()
    except DeviceError as error:
        raise BadFile(f"{table.where}: {error}", hint=error.hint) from error
