"""
How bold an early-exit rule may be for its risk to stay within a level, on arrays alone.

For choosing one number that moves all thresholds together: callers have a grid of settings
from the safest to the boldest and, for every calibration sample and setting, the loss, e.g.
1 where the early answer is wrong and the full network's right. They get the last setting that
can be taken. Follows "Fast yet Safe" (Jazbec et al., arXiv 2405.20915), which brought these
procedures to early-exit networks. Two kinds of statements, about samples drawn like these:

- crc: the risk is at most the level on average over calibration sets (conformal risk control,
  Angelopoulos et al., arXiv 2208.02814, theorem 1);
- ucb, ltt: with probability 1 - delta over calibration sets the risk is at most the level
  (Bates et al., arXiv 2101.02703; Angelopoulos et al., arXiv 2110.01052).

All start at the safe end and stop at the first setting that does not pass, so that a lucky
setting beyond an unlucky one is never reached. None as an answer means that no setting passed:
take the full network. The grid must be fixed before the losses are seen, and thresholds
fitted on these samples are not; nothing is said about samples drawn otherwise.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import bounds
from edgeexit.errors import UsageError

Floats = NDArray[np.float64]

_HALVINGS = 50


def crc(losses: NDArray[Any], level: float, bound: float = 1.0) -> int | None:
    """
    Index of the boldest setting whose risk is at most *level* on average, None if there is none.

    losses float, int or bool (n, grid) in -bound..bound, columns from safest to boldest. Column
    after column passes while its mean is at most ((n + 1) level - bound) / n; the index is that
    of the last before the first that does not.
    Assumed: exchangeable samples, a fallback without loss, and that every sample's loss rises
    along the grid or stays; for losses of 0 and 1 and independent samples it is enough that
    their mean does. Where neither is sure, numpy.maximum.accumulate(losses, axis=1) makes the
    first true and the answer more careful. UsageError for NaN and infinite numbers, another
    shape, no samples or settings, losses outside -bound..bound, and a level outside 0..1.
    """
    if not 0.0 < bound < math.inf:
        raise UsageError(f"bound {bound}: expected a finite number above 0")
    values = _checked(losses, bound)
    _check_share("level", level)
    n = len(values)
    # Sums of 0 and 1 are exact; the level times n + 1 may fall short of a whole number.
    allowed = (n + 1) * level - bound
    return _last_before_failure(values.sum(axis=0) <= allowed + 1e-12 * n * bound)


def ucb(losses: NDArray[Any], level: float, delta: float) -> int | None:
    """
    Index of the boldest setting whose risk is at most *level* with probability 1 - *delta*.

    losses float, int or bool (n, grid) in -1..1, columns from safest to boldest. Settings pass
    while their upper_bounds are at most *level*. Assumed: independent samples in an order that
    has nothing to do with their losses; not that the risk rises along the grid, since the first
    setting of too high a risk would have to pass before any other such could.
    None and UsageError as in crc; a delta outside 0..1 is refused too.
    """
    values = _checked(losses, 1.0)
    _check_share("level", level)
    _check_share("delta", delta)
    shown = _log_capital(values, _bets(values, delta), np.full(values.shape[1], level))
    return _last_before_failure(shown >= -math.log(delta))


def ltt(losses: NDArray[Any], level: float, delta: float) -> int | None:
    """
    Index of the last setting that fixed-sequence testing certifies ("learn then test").

    losses as in ucb, but negative ones count as 0. Setting after setting is tested for a risk
    above *level*, each at the whole *delta*, and is certified while p_value is at most *delta*;
    the index is that of the last certified setting, not of the one where testing stopped.
    Assumed: independent samples; not that the risk rises along the grid.
    None and UsageError as in ucb.
    """
    values = np.maximum(_checked(losses, 1.0), 0.0)
    _check_share("level", level)
    _check_share("delta", delta)
    n = len(values)
    certified = -1
    for total in values.sum(axis=0).tolist():
        if p_value(total, n, level) > delta:
            break
        certified += 1
    return certified if certified >= 0 else None


def upper_bounds(losses: NDArray[Any], delta: float) -> Floats:
    """
    Upper bound of each setting's risk, float64 (grid,) in 0..1, each valid with 1 - *delta*.

    losses as in ucb. The betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686): with
    mu_i = (1/2 + sum x_j) / (i + 1), s_i^2 = (1/4 + sum (x_j - mu_j)^2) / (i + 1) over j <= i and
    nu_i = min(1, sqrt(2 log(1/delta) / (n s_(i-1)^2))), it is the mu at which
    max_i sum_(j <= i) log(1 - nu_j (x_j - mu)) = log(1/delta): a gambler against a mean of mu
    or more would have multiplied the stake by 1/delta. 1 where no mu reaches that.
    """
    values = _checked(losses, 1.0)
    _check_share("delta", delta)
    bets = _bets(values, delta)
    low, high = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        is_shown = _log_capital(values, bets, middle) >= -math.log(delta)
        low, high = np.where(is_shown, low, middle), np.where(is_shown, middle, high)
    return high


def p_value(total: float, n: int, level: float) -> float:
    """
    Hoeffding-Bentkus p-value of "the risk is above *level*" for n losses in 0..1 that sum to total.

    The smaller of exp(-n h(min(m, level), level)), m = total / n and h the relative entropy of
    two coins, and e P(Bin(n, level) <= ceil(total)), the latter exact (Bates et al., arXiv
    2101.02703; Angelopoulos et al., arXiv 2110.01052). For losses of 0 and 1 alone the tail
    without e is valid too and sharper: bounds.most_allowed. UsageError for a total outside
    0..n, n below 1, and a level outside 0..1.
    """
    _check_share("level", level)
    if n < 1 or not 0.0 <= total <= n:
        raise UsageError(f"a total loss of {total} over {n} samples: expected 0 to 1 a sample")
    mean = min(total / n, level)
    entropy = (1.0 - mean) * math.log((1.0 - mean) / (1.0 - level))
    if mean > 0.0:
        entropy += mean * math.log(mean / level)
    bentkus = math.e * bounds.at_most(math.ceil(total), n, level)
    return min(1.0, math.exp(-n * max(0.0, entropy)), bentkus)


def _checked(losses: NDArray[Any], bound: float) -> Floats:
    array = np.asarray(losses)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"losses: shape {array.shape}, expected (samples, grid), not empty")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise UsageError(f"losses: {array.dtype}, expected finite numbers")
    values = array.astype(np.float64)
    if np.abs(values).max() > bound:
        worst = values.flat[np.abs(values).argmax()]
        raise UsageError(f"losses: {worst:g} found, expected -{bound:g} to {bound:g}")
    return values


def _check_share(what: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise UsageError(f"{what} {share}: expected more than 0 and less than 1 (0.01 = 1 %)")


def _last_before_failure(passes: NDArray[np.bool_]) -> int | None:
    certified = len(passes) if passes.all() else int(passes.argmin())
    return certified - 1 if certified else None


def _bets(values: Floats, delta: float) -> Floats:
    """nu, float64 (n, grid): what is bet before each sample, from those before it alone."""
    n = len(values)
    weight = np.arange(2, n + 2, dtype=np.float64)[:, None]
    means = (0.5 + np.cumsum(values, axis=0)) / weight
    variances = (0.25 + np.cumsum((values - means) ** 2, axis=0)) / weight
    before = np.vstack([np.full((1, values.shape[1]), 0.25), variances[:-1]])
    bets: Floats = np.minimum(1.0, np.sqrt(2.0 * -math.log(delta) / (n * before)))
    return bets


def _log_capital(values: Floats, bets: Floats, means: Floats) -> Floats:
    """Highest logarithm of the capital on the way, float64 (grid,); means (grid,) above 0."""
    # Losses of at most 1 against bets of at most 1 leave the mean or more; log(0) is a mean
    # too small to be told from 0.
    with np.errstate(divide="ignore"):
        capital: Floats = np.cumsum(np.log1p(-bets * (values - means)), axis=0).max(axis=0)
    return capital
