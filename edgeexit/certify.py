"""
Which policies of a fixed family are shown to keep their accuracy, from counts alone.

Callers have a Family that was fixed before the certificate samples were seen, count what it does
to them (Family.tally), and get a p-value of "the mean loss is above the level" for each policy
and the last policy that fixed-sequence testing certifies. Two tests are valid for independent
samples; which of them is taken depends on the number of samples alone:

- exact: the binomial tail of the harmful flips. A mean loss above the level needs a rate of
  harmful flips above it, so this is valid whatever the helpful ones do.
- betting: Markov's inequality for the capital of gamblers against "the mean loss is above the
  level", who also win by helpful flips. Bets are fixed beforehand, so the order of the samples
  does not matter and counts suffice (the betting test of Waudby-Smith and Ramdas, arXiv
  2010.09686, with constant bets, and the mean over gamblers in place of the predictable bet).

Fixed-sequence testing is Angelopoulos et al., "Learn then test", arXiv 2110.01052: one level for
the whole family, and every policy before the first failure is certified at once.
"""

import math

import numpy as np

from edgeexit import bounds
from edgeexit.decision import Floats, Tally

EXACT, BETTING = "exact", "betting"

# From so many samples on the betting test is the sharper one on most populations tried.
_MANY = 3000
# What the gambler who looked at the tuning samples owns of the stake; the others share the rest.
_SHARE = 0.8
# Constant bets of the others. None depends on the level, so that a tighter one never passes more.
_BETS = np.geomspace(0.005, 1.0, 20)


def fewest_samples(level: float, delta: float) -> int:
    """
    The least n at which no flip at all in n certifies *level* with probability 1 - *delta*.

    Above 10,000 to 0.01 %, on the safe side.
    """
    bounds.check_rate(level)
    bounds.check_rate(delta)
    n = max(1, math.ceil(math.log(delta) / math.log1p(-level)) - 1)
    while _lossless(n, level, delta) > delta:
        n += 1 + n // 10_000
    return n


def test_for(samples: int) -> str:
    """The name of the test for so many certificate samples: EXACT for few, BETTING for many."""
    return BETTING if samples >= _MANY else EXACT


def p_values(tally: Tally, level: float, delta: float, prior: Tally | None = None) -> Floats:
    """
    P-values of "the mean loss is above *level*", float64 (S,), one for each policy of *tally*.

    Each is valid by itself: under that hypothesis it is at most u with probability at most u.
    *prior* is the tally of the same family on samples that have no part in *tally* (tuning);
    with *delta*, the level of the later test, it only says how to bet. UsageError for shares
    outside 0..1.
    """
    bounds.check_rate(level)
    bounds.check_rate(delta)
    if tally.samples == 0:
        return np.ones(len(tally.harmful))
    if test_for(tally.samples) == EXACT:
        return _exact(tally, level)
    return _betting(tally, level, delta, prior)


def last_certified(p_values: Floats, delta: float) -> int:
    """Index of the last policy before the first whose p-value is above *delta*; -1 if none."""
    passed = np.asarray(p_values) <= delta
    return (len(passed) if passed.all() else int(passed.argmin())) - 1


def _exact(tally: Tally, level: float) -> Floats:
    counts, place = np.unique(tally.harmful, return_inverse=True)
    tails = [bounds.at_most(int(count), tally.samples, level) for count in counts]
    return np.array(tails)[place]


def _betting(tally: Tally, level: float, delta: float, prior: Tally | None) -> Floats:
    # A gambler who bets b multiplies the capital by 1 - b (loss - level) at each sample: on
    # average by at most 1 if the mean loss is at least the level.
    lead = 0.0 if prior is None else _SHARE
    stakes = [(bet, (1.0 - lead) / len(_BETS)) for bet in _BETS]
    capitals = [_log_capital(tally, bet, level) + math.log(stake) for bet, stake in stakes]
    if prior is not None:
        bets = _bets(prior, delta, tally.samples)
        capitals.append(_log_capital(tally, bets, level) + math.log(lead))
    return np.asarray(np.exp(-np.maximum(np.logaddexp.reduce(capitals, axis=0), 0.0)))


def _log_capital(tally: Tally, bet: Floats | float, level: float) -> Floats:
    neutral = tally.samples - tally.harmful - tally.helpful
    return np.asarray(
        tally.harmful * np.log1p(-bet * (1.0 - level))
        + neutral * np.log1p(bet * level)
        + tally.helpful * np.log1p(bet * (1.0 + level))
    )


def _bets(prior: Tally, delta: float, samples: int) -> Floats:
    """
    The bet, float64 (S,), with which the largest mean loss passes at *delta*, for each policy.

    As in Waudby-Smith and Ramdas: sqrt(2 log(1 / delta) / (samples variance)), at most 1. The
    variance of the loss is about the rate of flips of either kind, read off *prior* with half a
    flip more, so that a policy without any on tuning is not taken for a sure thing.
    """
    flips = (prior.harmful + prior.helpful + 0.5) / (prior.samples + 1.0)
    return np.asarray(np.minimum(1.0, np.sqrt(-2.0 * math.log(delta) / (samples * flips))))


def _lossless(samples: int, level: float, delta: float) -> float:
    """The p-value of a policy that changes no answer, on tuning neither."""
    none = np.zeros(1, np.int64)
    tally = Tally(harmful=none, helpful=none, rates=np.ones((1, 1)), samples=samples)
    return float(p_values(tally, level, delta, tally)[0])
