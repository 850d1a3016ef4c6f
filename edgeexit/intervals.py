"""
What measured times say, and how surely: pure statistics on arrays.

The value of a case is the median of its block means over all processes, each process weighing
the same. Blocks of one process resemble each other far more than blocks of two, so that every
interval and every test here treats the process, not the block, as the unit of chance. Hidden
here: weighted medians of thousands of bootstrap samples at once, what small numbers of
processes cost in confidence, and the few distributions that a statistics library would bring.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeexit.bounds import log_terms

Values = NDArray[np.float64]

REPLICATES = 1000
_CONFIDENCE = 0.95
_PERMUTATIONS = 9999
_NORMAL = NormalDist()

# ---------------------------------------------------------------- the value and its interval


def pooled_median(blocks: Sequence[ArrayLike]) -> float:
    """The median of all blocks (one array for each process), each process weighing the same."""
    values, weights = _pooled(blocks)
    return float(_weighted_medians(values, weights[:, None])[0])


def replicates(
    cases: Sequence[Sequence[ArrayLike]], seed: int = 0, count: int = REPLICATES
) -> Values:
    """
    Bootstrap replicates of each case's pooled_median, float64 (cases, count).

    *cases* holds for each case one array of blocks for each process. Processes are drawn with
    replacement, then blocks within each drawn one. All cases see the same draws (block j of
    process i of one case goes with block j of process i of another, as they were measured side
    by side): one row divided by another holds the replicates of their ratio.
    """
    processes = len(cases[0])
    sizes = [tuple(len(np.atleast_1d(blocks)) for blocks in case) for case in cases]
    if any(len(each) != processes or min(each) < 1 for each in sizes):
        raise ValueError("every case needs the same number of processes, none without blocks")
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, processes, (count, processes))
    chance = rng.random((count, processes, max(map(max, sizes))), dtype=np.float32)
    weights: dict[tuple[int, ...], Values] = {}
    found = np.empty((len(cases), count))
    for row, (case, size) in enumerate(zip(cases, sizes, strict=True)):
        if size not in weights:
            weights[size] = _drawn_weights(size, picked, chance)
        found[row] = _weighted_medians(_pooled(case)[0], weights[size])
    return found


def interval(
    draws: ArrayLike, processes: int, confidence: float = _CONFIDENCE
) -> tuple[float, float]:
    """
    The interval (low, high) that *draws*, bootstrap replicates, speak for.

    Percentiles, moved outwards for few processes as Hesterberg advises ("What Teachers Should
    Know About the Bootstrap", The American Statistician 69, 2015): plain percentiles of five
    processes hold the true value in 87 % of cases instead of 95 %. One process alone says
    nothing about the next: its interval is endless.
    """
    if processes < 2:
        return -math.inf, math.inf
    return _percentiles(draws, processes - 1, processes / (processes - 1), confidence)


def _percentiles(
    draws: ArrayLike, freedom: int, widening: float, confidence: float
) -> tuple[float, float]:
    reach = math.sqrt(widening) * _student(0.5 + confidence / 2, freedom)
    tail = _NORMAL.cdf(-reach)
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def _pooled(blocks: Sequence[ArrayLike]) -> tuple[Values, Values]:
    """All blocks in one array, and a weight for each: one over the blocks of its process."""
    arrays = [np.atleast_1d(np.asarray(each, dtype=np.float64)) for each in blocks]
    weights = np.concatenate([np.full(len(each), 1.0 / len(each)) for each in arrays])
    return np.concatenate(arrays), weights


def _drawn_weights(
    sizes: tuple[int, ...], picked: NDArray[np.int64], chance: NDArray[np.float32]
) -> Values:
    """The weight of each block in each replicate, float64 (blocks, replicates)."""
    count, total = len(picked), sum(sizes)
    size, first = np.asarray(sizes), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    widest = max(sizes)
    chosen = (chance[:, :, :widest] * size[picked][:, :, None]).astype(np.int64)
    # A chance just below 1 may round up to 1 when multiplied.
    np.minimum(chosen, size[picked][:, :, None] - 1, out=chosen)
    chosen += (first[picked] + np.arange(count)[:, None] * total)[:, :, None]
    if min(sizes) < widest:
        chosen = chosen[np.arange(widest) < size[picked][:, :, None]]
    drawn = np.bincount(chosen.ravel(), minlength=count * total).reshape(count, total)
    return np.ascontiguousarray((drawn / np.repeat(size, size)).T)


def _weighted_medians(values: Values, weights: Values) -> Values:
    """For each column of *weights* (values, columns): the median of *values* so weighted."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    below = np.cumsum(weights[order], axis=0)
    half = 0.5 * below[-1]
    # Sums of fractions end a hair off one half; no true step is that small.
    slack = 1e-9 * below[-1]
    left = (below < half - slack).sum(axis=0)
    right = (below < half + slack).sum(axis=0)
    found: Values = 0.5 * (ordered[left] + ordered[right])
    return found


# ---------------------------------------------------------------- slow calls


def quantile_interval(
    calls: Sequence[ArrayLike], q: float, confidence: float = _CONFIDENCE
) -> tuple[float, float, float] | None:
    """
    The *q* quantile of single calls (one array for each process), with its interval.

    (value, low, high) by order statistics: no shape of the distribution is assumed. None if the
    calls are too few for the interval to have an upper end (p95 takes 72 independent calls, p99
    368; half the risk lies on either side). Calls of a process resemble each other: Korn and
    Graubard's effective number of calls (Survey Methodology 24, 1998) takes that into account as
    far as the processes show it, and the bounds of the share are carried over to the quantile as
    by Woodruff (JASA 47, 1952). One process alone counts as independent calls of that process.
    """
    arrays = [np.atleast_1d(np.asarray(each, dtype=np.float64)) for each in calls]
    arrays = [each for each in arrays if each.size]
    if not arrays:
        return None
    pooled = np.sort(np.concatenate(arrays))
    n = len(pooled)
    value = float(np.quantile(pooled, q, method="inverted_cdf"))
    effective = _effective_calls(arrays, value, q)
    ranks = _quantile_ranks(effective, q, 0.5 * (1.0 - confidence))
    if ranks is None:
        return None
    low = pooled[max(1, math.floor(ranks[0] * n / effective)) - 1]
    high = pooled[min(n, math.ceil(ranks[1] * n / effective)) - 1]
    return value, float(low), float(high)


def _effective_calls(arrays: Sequence[Values], value: float, q: float) -> int:
    """How many independent calls say as much about the share of calls up to *value*."""
    n, clusters = sum(map(len, arrays)), len(arrays)
    if clusters < 2:
        return n
    apart = sum((float((each <= value).sum()) - q * len(each)) ** 2 for each in arrays)
    variance = apart / n**2 * clusters / (clusters - 1)
    if variance * n <= q * (1 - q):
        return n
    freedom = _student(0.975, n - 1) / _student(0.975, clusters - 1)
    return max(1, min(n, int(q * (1 - q) / variance * freedom**2)))


def _quantile_ranks(n: int, q: float, side: float) -> tuple[int, int] | None:
    """Ranks (from 1) of the order statistics below and above the quantile, None if none is."""
    up_to = np.cumsum(np.exp(log_terms(n, q, n - 1)))  # P(Bin(n, q) <= 0 .. n - 1)
    high = int(np.searchsorted(up_to, 1.0 - side)) + 1
    low = int(np.searchsorted(up_to, side, side="right"))
    return (low, high) if low >= 1 and high <= n else None


# ---------------------------------------------------------------- two profiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """
    A case of one profile against the same of another: *ratio* ours / theirs, its interval, and
    the *chance* (family-wise over all cases) of ranks so far apart if the two do not differ.
    """

    ratio: float
    low: float
    high: float
    chance: float


def differences(
    ours: Sequence[Sequence[ArrayLike]],
    theirs: Sequence[Sequence[ArrayLike]],
    seed: int = 0,
    confidence: float = _CONFIDENCE,
) -> list[Difference]:
    """
    Compare the same cases (one array of blocks for each process) of two profiles.

    A rank-sum test of the processes' medians, its chances from permutations of whole processes
    (all of them if they are few, else 9,999), stepped down over the cases after Westfall and
    Young ("Resampling-Based Multiple Testing", 1993): Holm's order, but knowing that a process
    that is slow at one exit is slow at the others, where Holm assumes the worst. Assumed: had
    nothing changed, any process could as well have been one of the other profile.
    """
    if len(ours) != len(theirs):
        raise ValueError("two profiles of the same cases are needed")
    ratios = replicates(ours, seed) / replicates(theirs, seed + 1)
    mine, yours = len(ours[0]), len(theirs[0])
    medians = [
        [float(np.median(np.asarray(blocks, dtype=np.float64))) for blocks in (*a, *b)]
        for a, b in zip(ours, theirs, strict=True)
    ]
    chances = _family_wise(_ranks(np.array(medians).T), mine, seed)
    found = []
    for a, b, draws, chance in zip(ours, theirs, ratios, chances, strict=True):
        low, high = -math.inf, math.inf
        fewer = min(mine, yours)
        if fewer >= 2:
            freedom = mine + yours - 2
            low, high = _percentiles(draws, freedom, fewer / (fewer - 1), confidence)
        found.append(
            Difference(
                ratio=pooled_median(a) / pooled_median(b),
                low=low,
                high=high,
                chance=float(chance),
            )
        )
    return found


def _family_wise(ranks: Values, mine: int, seed: int) -> Values:
    """Step-down chances (cases,) that *ranks* (processes, cases) of the first *mine* differ."""
    spread = ranks.std(axis=0)
    scores = (ranks - ranks.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    observed = np.abs(scores[:mine].sum(axis=0))
    order = np.argsort(-observed, kind="stable")
    drawn = np.abs(_labels(len(ranks), mine, seed) @ scores)[:, order]
    # The most different case competes with the largest of all, the next with the rest's.
    largest = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
    stepped = [chance(observed[k], largest[:, j]) for j, k in enumerate(order)]
    chances = np.empty(len(observed))
    chances[order] = np.maximum.accumulate(stepped)
    return chances


@lru_cache(maxsize=4)
def _labels(total: int, mine: int, seed: int) -> Values:
    """Ways of naming *mine* of *total* processes ours, one a row, without the one that is."""
    if math.comb(total, mine) <= _PERMUTATIONS + 1:
        rows = np.array(list(itertools.combinations(range(total), mine))[1:], dtype=np.int64)
    else:
        rng = np.random.default_rng(seed)
        rows = rng.permuted(np.tile(np.arange(total), (_PERMUTATIONS, 1)), axis=1)[:, :mine]
    labels = np.zeros((len(rows), total))
    np.put_along_axis(labels, rows.reshape(len(rows), mine), 1.0, axis=1)
    return labels


def chance(observed: float | Values, drawn: Values) -> float:
    """The share of permutations, the observed one included, that are at least as extreme."""
    return float((1 + (drawn >= observed - 1e-9).sum()) / (1 + len(drawn)))


def _ranks(values: Values) -> Values:
    """Ranks within each column, from 0; equal values share the mean of theirs."""
    found = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, which, times = np.unique(values[:, column], return_inverse=True, return_counts=True)
        found[:, column] = (np.cumsum(times) - (times + 1) / 2)[which]
    return found


# ---------------------------------------------------------------- Student's t


def _student_up_to(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t, t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = math.sin(angle) * (cosine if odd else 1.0)
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    within = 2 / math.pi * (angle + total) if odd else total
    return 0.5 * (1 + within)


@lru_cache(maxsize=256)
def _student(share: float, freedom: int) -> float:
    """The quantile of Student's t at *share* (above one half)."""
    if freedom > 300:  # within 0.002 of the normal's by then
        freedom = 300
    low, high = 0.0, 1.0
    while _student_up_to(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _student_up_to(middle, freedom) < share:
            low = middle
        else:
            high = middle
    return high
