"""
Which policies of a fixed family are shown to keep their accuracy, from counts alone.

Callers have a Family that was fixed before the certificate samples were seen, count what it does
to them (Family.tally), and get a p-value of "the mean loss is above the level" for each policy
and the last policy that fixed-sequence testing certifies. Two tests are valid for independent
samples; the tuning samples say which is likely to be the sharper one for a policy:

- exact: the binomial tail of the harmful flips. A mean loss above the level needs a rate of
  harmful flips above it, so this is valid whatever the helpful ones do.
- signed: the tail of harmful less helpful flips, which pay for each other, where helpful ones are
  as frequent as they may at most be (the largest p-value over a confidence set of what is not
  tested: Berger and Boos, JASA 89, 1994, equation 1.2).

Neither minds the order of the samples. Fixed-sequence testing is Angelopoulos et al., "Learn then
test", arXiv 2110.01052: one level for the whole family, and every policy before the first failure
is certified at once.
"""

import math
from functools import lru_cache

import numpy as np

from edgeexit import bounds
from edgeexit.decision import Bools, Costs, Family, Floats, Tally

EXACT, SIGNED = "exact", "signed"

# The share of delta that is spent on how frequent helpful flips may be.
_SPENT = 0.05
# What sums of a Fourier transform may be off by for each sample, generously.
_SLACK = 1e-15
# Deviations of the normal distribution, for guessing which test will be the sharper one.
_TAIL, _FAR_TAIL = 1.7, 3.0


def fewest_samples(level: float, delta: float) -> int:
    """The least n at which no flip at all in n certifies *level* with probability 1 - *delta*."""
    bounds.check_rate(delta)
    return bounds.fewest_samples(level, 1.0 - delta)


def tests(samples: int, prior: Tally | None, policies: int) -> tuple[str, ...]:
    """
    The name of the test for each policy on *samples* samples: EXACT or SIGNED.

    *prior* is the tally of the *policies* on other samples (tuning); None: EXACT for all. The
    level has no part in it, so that a tighter one never passes more.
    """
    if prior is None or samples == 0 or prior.samples == 0:
        return (EXACT,) * policies
    is_signed = _gains_by_sign(samples, prior)
    return tuple(SIGNED if signed else EXACT for signed in is_signed)


def p_values(tally: Tally, level: float, delta: float, prior: Tally | None = None) -> Floats:
    """
    P-values of "the mean loss is above *level*", float64 (S,), one for each policy of *tally*.

    Each is valid by itself: under that hypothesis it is at most u with probability at most u.
    *prior* is the tally of the same family on samples that have no part in *tally* (tuning), by
    which a test is chosen; with *delta*, the level of the later test, it decides nothing else.
    UsageError for shares outside 0..1.
    """
    bounds.check_rate(level)
    bounds.check_rate(delta)
    if tally.samples == 0:
        return np.ones(len(tally.harmful))
    chosen = tests(tally.samples, prior, len(tally.harmful))
    flips = zip(tally.harmful.tolist(), tally.helpful.tolist(), chosen, strict=True)
    return np.array(
        [
            _signed(harmful, helpful, tally.samples, level, _SPENT * delta)
            if test == SIGNED
            else _exact(harmful, tally.samples, level)
            for harmful, helpful, test in flips
        ]
    )


def last_certified(p_values: Floats, delta: float) -> int:
    """Index of the last policy before the first whose p-value is above *delta*; -1 if none."""
    passed = np.asarray(p_values) <= delta
    return (len(passed) if passed.all() else int(passed.argmin())) - 1


def promised_cost(
    family: Family, tally: Tally, costs: Costs, *, level: float, delta: float, samples: int
) -> float:
    """The least mean cost certified if *samples* certificate samples were just like *tally*'s."""
    share = samples / tally.samples
    alike = Tally(
        harmful=np.ceil(tally.harmful * share).astype(np.int64),
        helpful=np.floor(tally.helpful * share).astype(np.int64),
        rates=tally.rates,
        samples=samples,
    )
    last = max(0, last_certified(p_values(alike, level, delta, tally), delta))
    return float(family.mean_costs(tally, costs)[: last + 1].min())


def _gains_by_sign(samples: int, prior: Tally) -> Bools:
    """
    Whether, with the rates of *prior*, the signed test would show a smaller mean loss.

    By normal approximation: it is a guess, any answer is valid.
    """
    harm, help_ = prior.harmful / prior.samples, prior.helpful / prior.samples
    at_most = help_ + _FAR_TAIL * np.sqrt(help_ / samples) + 5.0 / samples
    spread = np.sqrt(np.maximum(0.0, harm - help_ + 2.0 * at_most) / samples)
    shown = harm - help_ + _TAIL * spread
    return np.asarray(shown < harm + _TAIL * np.sqrt(harm / samples))


@lru_cache(maxsize=100_000)
def _exact(harmful: int, samples: int, level: float) -> float:
    return bounds.at_most(harmful, samples, level)


def _signed(harmful: int, helpful: int, samples: int, level: float, spent: float) -> float:
    """
    The p-value of so many flips: *spent*, and the tail where helpful flips are most frequent.

    For a rate g of helpful flips the tail at a mean loss of *level* or more is largest at just
    that. With g it grows as long as it lies below the mode of the difference of one sample less:
    the derivative is samples times the rise of that distribution beyond the tail. The difference
    is a sum of coins (its generating polynomial has real roots while sqrt(g) + sqrt(g + level) is
    at most 1), so its mode is less than 1 from its mean (Darroch, Ann. Math. Stat. 35, 1964).
    """
    difference = harmful - helpful
    if difference + 2 > (samples - 1) * level:
        return 1.0
    most = _most(helpful, samples, spent)
    if math.sqrt(most) + math.sqrt(most + level) > 1.0:
        return 1.0
    tail = _tails(helpful, samples, level, spent)
    # Whatever lies before the first sum is no more likely than that.
    place = max(0, difference + len(tail) // 2)
    return min(1.0, float(tail[place]) + _SLACK * samples + spent)


@lru_cache(maxsize=100_000)
def _most(helpful: int, samples: int, spent: float) -> float:
    return bounds.upper_bound(helpful, samples, 1.0 - spent)


@lru_cache(maxsize=256)
def _tails(helpful: int, samples: int, level: float, spent: float) -> Floats:
    """P(harmful - helpful <= d), float64 (M,), d = -M/2 .. M/2 - 1, on the edge of the level."""
    help_ = _most(helpful, samples, spent)
    harm = help_ + level
    spread = math.sqrt(samples * (harm + help_))
    reach = 2.0 * (samples * level + 30.0 * spread + 60.0)
    size = 2 ** math.ceil(math.log2(reach))
    angles = 2j * np.pi * np.arange(size // 2 + 1) / size
    # The characteristic function of one sample, less 1.
    beyond = harm * np.expm1(-angles) + help_ * np.expm1(angles)
    chances = np.fft.irfft(np.exp(samples * np.log1p(beyond)), size)
    return np.asarray(np.cumsum(np.roll(chances, size // 2)))
