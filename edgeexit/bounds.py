"""
Exact binomial bounds, in plain numpy.

Callers ask how high a rate may be when k of n were seen, and how many may be seen for a
rate to be shown. Hidden here: sums of binomial terms in logarithms, so that a million
samples neither underflow nor take a statistics library onto the board. The intervals are
Clopper and Pearson's (Biometrika 26, 1934): they never promise more than they hold.
"""

import math

import numpy as np

from edgeexit.errors import UsageError


def log_terms(n: int, rate: float, last: int) -> np.ndarray:
    """Natural logarithms of P(Bin(n, rate) = 0 .. last), float64 (last + 1,); 0 < rate < 1."""
    k = np.arange(1, last + 1, dtype=np.float64)
    # P(k) / P(k - 1) = (n - k + 1) / k * rate / (1 - rate)
    steps = np.log(n - k + 1) - np.log(k) + (math.log(rate) - math.log1p(-rate))
    terms = np.empty(last + 1, dtype=np.float64)
    terms[0] = n * math.log1p(-rate)
    terms[1:] = terms[0] + np.cumsum(steps)
    return terms


def at_most(k: int, n: int, rate: float) -> float:
    """P(Bin(n, rate) <= k)."""
    if k < 0:
        return 0.0
    if k >= n or rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    terms = log_terms(n, rate, k)
    highest = float(terms.max())
    return min(1.0, math.exp(highest) * float(np.exp(terms - highest).sum()))


def upper_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate of which *k* of *n* cases were seen (1.0 without cases)."""
    if n <= 0 or k >= n:
        return 1.0
    low, high = k / n, 1.0
    # The tail falls as the rate rises; 60 halvings leave less than one float's spacing.
    for _ in range(60):
        middle = 0.5 * (low + high)
        if at_most(k, n, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of a rate of which *k* of *n* cases were seen."""
    side = 0.5 * (1.0 + confidence)
    return 1.0 - upper_bound(n - k, n, side), upper_bound(k, n, side)


def most_allowed(n: int, rate: float, confidence: float = 0.95) -> int:
    """
    The largest k for which *k* of *n* show, with *confidence*, a true rate of at most *rate*.

    -1 if even none in *n* shows it.
    """
    check_rate(rate)
    delta = 1.0 - confidence
    if n <= 0 or at_most(0, n, rate) > delta:
        return -1
    low, high = 0, n  # at_most(low) <= delta < at_most(high) = 1
    while high - low > 1:
        middle = (low + high) // 2
        if at_most(middle, n, rate) <= delta:
            low = middle
        else:
            high = middle
    return low


def fewest_samples(rate: float, confidence: float = 0.95) -> int:
    """The least n for which no case at all in *n* shows a true rate of at most *rate*."""
    check_rate(rate)
    n = max(1, math.ceil(math.log1p(-confidence) / math.log1p(-rate)) - 1)
    while most_allowed(n, rate, confidence) < 0:
        n += 1
    return n


def check_rate(rate: float) -> None:
    """Refuse a target rate outside 0..1 (UsageError); NaN too."""
    if not 0.0 < rate < 1.0:
        raise UsageError(f"accuracy drop {rate}: expected more than 0 and less than 1 (0.01 = 1 %)")
