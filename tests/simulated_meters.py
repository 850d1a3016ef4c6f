"""Boards whose power is known exactly, and meters that look at them as badly as real ones do."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit.energy import IDLE, Energy, Trace, Window, window_s
from edgeexit.meters import MeterInfo, Sample

Values = NDArray[np.float64]
START_S = 1000.0


@dataclass(frozen=True)
class Curve:
    """Power that is constant between *edges_s*: its energy is known without any error."""

    edges_s: Values
    power_mw: Values

    def energy_mj(self, at_s: float | Values) -> Values:
        """Millijoules since the first edge."""
        total = np.concatenate(([0.0], np.cumsum(np.diff(self.edges_s) * self.power_mw)))
        return np.interp(at_s, self.edges_s, total)

    def at(self, at_s: Values) -> Values:
        """Milliwatts at those moments."""
        places = np.searchsorted(self.edges_s, at_s, side="right") - 1
        return self.power_mw[np.clip(places, 0, len(self.power_mw) - 1)]

    def mean_mw(self, window: Window) -> float:
        """The true mean power in *window*."""
        began_s, ended_s = window.began_ns / 1e9, window.ended_ns / 1e9
        return float(self.energy_mj(ended_s) - self.energy_mj(began_s)) / (ended_s - began_s)


@dataclass(frozen=True, kw_only=True)
class Load:
    """
    What a board draws while calls of one case run back to back, call_s each.

    ripple is how far the first part of every call lies above the mean, as a share of it.
    """

    power_mw: float
    call_s: float
    ripple: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board that idles and runs cases in interleaved rounds, an idle window before each."""

    idle_mw: float
    loads: Sequence[Load]
    rounds: int = 5
    idle_drift: float = 0.0
    pause_s: float = 0.05

    def run(self, seconds: float, rng: np.random.Generator) -> tuple[Curve, tuple[Window, ...]]:
        """Power over time, and the windows, of *seconds* or a little more each."""
        edges, power, windows = [START_S - 2], [self.idle_mw], []
        now = START_S
        order = [k for _ in range(self.rounds) for k in (IDLE, *rng.permutation(len(self.loads)))]
        total_s = (len(order) + 1) * (seconds + self.pause_s)
        for case in [*map(int, order), IDLE]:
            idle_mw = self.idle_mw * (1 + self.idle_drift * (now - START_S) / total_s)
            edges.append(now)
            power.append(idle_mw)
            now += self.pause_s
            began, calls = now, 0
            if case == IDLE:
                now += seconds
            else:
                load = self.loads[case]
                calls = int(np.ceil(seconds / load.call_s))
                spread = rng.lognormal(0, 0.01, calls) * load.call_s
                starts = now + np.concatenate(([0.0], np.cumsum(spread)))
                high = load.power_mw * (1 + load.ripple)
                low = load.power_mw * (1 - load.ripple * 0.4 / 0.6)
                middle = starts[:-1] + 0.4 * spread
                edges.extend(np.column_stack((starts[:-1], middle)).ravel())
                power.extend(np.tile([high, low], calls))
                now = float(starts[-1])
            windows.append(
                Window(
                    case=case, began_ns=round(began * 1e9), ended_ns=round(now * 1e9), calls=calls
                )
            )
            edges.append(now)
            power.append(idle_mw)
        return Curve(np.array([*edges, now + 5]), np.array(power)), tuple(windows)

    def true_mj(self, curve: Curve, windows: Sequence[Window], case: int) -> tuple[float, float]:
        """Gross and net millijoules a call of *case*, medians over its windows."""
        mine = [w for w in windows if w.case == case]
        idle = [(w.began_ns + w.ended_ns, curve.mean_mw(w)) for w in windows if w.case == IDLE]
        then = np.interp([w.began_ns + w.ended_ns for w in mine], *np.array(idle).T)
        gross = np.array([curve.mean_mw(w) for w in mine])
        each_s = np.array([w.duration_s / w.calls for w in mine])
        return float(np.median(gross * each_s)), float(np.median((gross - then) * each_s))


@dataclass(frozen=True, kw_only=True)
class SimulatedMeter:
    """
    A meter that samples a curve.

    averaging_s: each value is the mean of so long a time; 0: of the moment. lsb: values are
    rounded to it (mW, or mJ of a counter). noise is the standard deviation as a share. jitter_s
    and drop: moments wander, samples get lost. held_s: it renews its value only so often.
    delay_s: values come late and are stamped late. wrap_mj: the counter starts anew there, and
    unwrapped is whether the meter knows that.
    """

    rate_hz: float
    averaging_s: float = 0.0
    lsb: float = 0.0
    noise: float = 0.0
    jitter_s: float = 0.0
    drop: float = 0.0
    held_s: float = 0.0
    delay_s: float = 0.0
    is_counter: bool = False
    wrap_mj: float | None = None
    unwrapped: bool = True
    info: MeterInfo = field(init=False)

    def __post_init__(self) -> None:
        info = MeterInfo(
            kind="simulated",
            label="external",
            instrument="a formula",
            boundary="the whole board",
            rate_hz=self.rate_hz,
        )
        object.__setattr__(self, "info", info)

    def look(self, curve: Curve, rng: np.random.Generator) -> list[Sample]:
        """The samples that this meter takes of *curve*."""
        first, last = float(curve.edges_s[0]), float(curve.edges_s[-1])
        grid = np.arange(first + 1.0, last, 1 / self.rate_hz)
        stamps = grid + rng.uniform(-0.5, 0.5, len(grid)) * min(self.jitter_s, 0.9 / self.rate_hz)
        seen = np.floor(stamps / self.held_s) * self.held_s if self.held_s else stamps
        seen = np.maximum(seen - self.delay_s, first)
        if self.is_counter:
            values = curve.energy_mj(seen)
        elif self.averaging_s:
            begin = np.maximum(seen - self.averaging_s, first)
            values = (curve.energy_mj(seen) - curve.energy_mj(begin)) / np.maximum(
                seen - begin, 1e-9
            )
        else:
            values = curve.at(seen)
        if self.noise:
            _, renewed = np.unique(seen, return_inverse=True)
            values = values * (1 + self.noise * rng.standard_normal(len(values)))[renewed]
        if self.lsb:
            values = np.floor(values / self.lsb + (0 if self.is_counter else 0.5)) * self.lsb
        if self.wrap_mj is not None:
            values = values % self.wrap_mj
            if self.unwrapped:
                values = values + self.wrap_mj * np.concatenate(
                    ([0], np.cumsum(np.diff(values) < 0))
                )
        kept = rng.random(len(stamps)) >= self.drop
        return [
            Sample(at_ns=round(t * 1e9), energy_mj=float(v))
            if self.is_counter
            else Sample(at_ns=round(t * 1e9), power_mw=float(v))
            for t, v in zip(stamps[kept], values[kept], strict=True)
        ]


def measured(
    board: Board,
    meter: SimulatedMeter,
    seed: int,
    *,
    seconds: float | None = None,
) -> tuple[Energy, list[tuple[float, float]]]:
    """What comes of measuring *board* with *meter*, and the truth: (gross, net) of every case."""
    rng = np.random.default_rng(seed)
    curve, windows = board.run(seconds or window_s(meter.rate_hz), rng)
    truth = [board.true_mj(curve, windows, k) for k in range(len(board.loads))]
    trace = Trace.of(meter.look(curve, rng))
    return Energy(info=meter.info, trace=trace, windows=windows), truth
