"""
What a series of times says, in the order in which they came: pure statistics on arrays.

Callers see autocorrelation, warm_from, trend and Trend: whether neighbours resemble each other,
where a process's first calls stop being cold, and whether a level drifts or steps. Hidden here:
what counts as more than chance, and that one spike must decide nothing.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeexit.intervals import Values, chance

LEAST = 0.02  # of a level: smaller drifts and steps of a yardstick are no disturbance
_RARE = 0.004  # twice (drift and step) below 1 of 100
_STRETCHES = 60
_SHUFFLES = 999
_FLOOR = 0.001


def autocorrelation(blocks: Sequence[ArrayLike]) -> tuple[float, float] | None:
    """
    How much a block resembles the one before it: (correlation at lag 1, its standard error).

    Pooled over processes, each around its own median, extremes clipped (a spike says nothing
    about its neighbours) and freed of the bias -1/n that removing a level brings. None if no
    process has three blocks or nothing varies.
    """
    pairs = products = squares = freedom = bias = 0.0
    for each in blocks:
        values = np.asarray(each, dtype=np.float64)
        n = values.size
        if n < 3:
            continue
        values = values / np.median(values) - 1.0
        reach = 5 * 1.4826 * float(np.median(np.abs(values)))
        values = np.clip(values, -reach, reach)
        values -= values.mean()
        products += float(values[1:] @ values[:-1])
        squares += float(values @ values)
        pairs += n - 1
        freedom += n - 1
        bias += (n - 1) / n
    if squares <= 0:
        return None
    return (products / squares * freedom + bias) / pairs, 1 / math.sqrt(pairs)


def warm_from(calls_ns: ArrayLike) -> int:
    """
    The index of the first warm call among a process's first calls; at most half of them.

    As in Barrett and others ("Virtual Machine Warmup Blows Hot and Cold", OOPSLA 2017) the end
    of the series is the steady state: warm is the first of five calls in a row at the level of
    the second half, give or take four of its deviations, at least 5 %. Medians of three
    neighbours are compared, so that one spike moves nothing; the very first call, which opens
    the segments, stands for itself.
    """
    logs = np.log(np.maximum(np.asarray(calls_ns, dtype=np.float64), 1.0))
    half = logs.size // 2
    if half < 3:
        return min(1, half)
    inner = np.median(np.lib.stride_tricks.sliding_window_view(logs, 3), axis=1)
    steady = float(np.median(inner[half - 1 :]))
    scatter = 1.4826 * float(np.median(np.abs(inner[half - 1 :] - steady)))
    smooth = np.concatenate([logs[:1], inner])
    level = np.abs(smooth - steady) <= max(4 * scatter, math.log(1.05))
    return next((k for k in range(half) if level[k : k + 5].all()), half)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """
    Whether a series kept its level: *drift* of the last third of it against the first, and the
    largest *step*, the level from *began* to *ended* against the rest; both as shares (0.2 =
    20 % above). Each comes with its chance: how often a quiet series shows as much.
    """

    drift: float
    drift_chance: float
    step: float
    step_chance: float
    began: float
    ended: float

    def drifts(self, least: float = LEAST) -> bool:
        """The drift is more than *least* and no chance."""
        return abs(self.drift) > least and self.drift_chance <= _RARE

    def steps(self, least: float = LEAST) -> bool:
        """The step is more than *least* and no chance."""
        return abs(self.step) > least and self.step_chance <= _RARE


def trend(values: ArrayLike, times: ArrayLike, seed: int = 0) -> Trend | None:
    """
    Drift and largest step of a yardstick series; None with fewer than 12 values.

    The series is cut into at most 60 stretches of as many values, and their medians are scanned
    for the stretch of time that differs most from the rest: circular binary segmentation
    (Olshen, Venkatraman, Lucito and Wigler, Biostatistics 5, 2004), which finds a lasting step
    and a passing one alike. Chances by permuting the stretches, extremes clipped: no shape of
    the noise is assumed, but that a quiet series keeps no level for longer than a stretch. A
    process's own luck is such a level, and real: hence the least size.
    """
    when, series = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if series.size < 12:
        return None
    order = np.argsort(when, kind="stable")
    when, series = when[order], series[order]
    edges = np.linspace(0, series.size, min(_STRETCHES, series.size) + 1).round().astype(int)
    level = np.array([np.median(series[a:b]) for a, b in itertools.pairwise(edges)])
    third = len(level) // 3
    scores = level - np.median(level)
    # A clock that reads the same most of the time has no spread of its own.
    spread = max(1.4826 * np.median(np.abs(scores)), _FLOOR * np.median(level))
    scores = np.clip(scores, -8 * spread, 8 * spread)
    scores -= scores.mean()
    shuffled = np.random.default_rng(seed).permuted(np.tile(scores, (_SHUFFLES, 1)), axis=1)

    def slope(rows: Values) -> Values:
        found: Values = np.abs(rows[..., -third:].sum(axis=-1) - rows[..., :third].sum(axis=-1))
        return found

    highest, start, stop = _largest_step(scores[None])
    inside = np.zeros(len(level), dtype=bool)
    inside[int(start[0]) : int(stop[0])] = True
    if inside[0] and not inside[-1]:
        inside = ~inside  # what came later differs from what was first
    where = np.flatnonzero(inside)
    return Trend(
        drift=float(np.median(level[-third:]) / np.median(level[:third])) - 1.0,
        drift_chance=chance(slope(scores), slope(shuffled)),
        step=float(np.median(level[inside]) / np.median(level[~inside])) - 1.0,
        step_chance=chance(highest[0], _largest_step(shuffled)[0]),
        began=float(when[edges[where[0]]]),
        ended=float(when[edges[where[-1] + 1] - 1]),
    )


def _largest_step(rows: Values) -> tuple[Values, NDArray[np.int64], NDArray[np.int64]]:
    """For each row (of mean 0): the largest standardised stretch sum, its start and stop."""
    bins = rows.shape[1]
    sums = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(rows, axis=1)], axis=1)
    best = np.full(len(rows), -1.0)
    start, stop = np.zeros((2, len(rows)), dtype=np.int64)
    everyone = np.arange(len(rows))
    for length in range(2, bins - 1):
        apart = np.abs(sums[:, length:] - sums[:, :-length])
        found = apart.argmax(axis=1)
        score = apart[everyone, found] / math.sqrt(length * (bins - length) / bins)
        better = score > best
        best[better], start[better], stop[better] = score[better], found[better], length
    return best, start, start + stop
