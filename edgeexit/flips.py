"""
How likely a harmful flip is, given what the exits up to here are sure of.

Callers see chances. A few hundred harmful flips among some thousand samples are too few to follow
every one of them; estimated as a smooth function of the confidences they lead to cuts that hold
for other samples, too. Hidden here: logistic regression (Cox, 1958) on the logits of the ranks of
the confidences, so that any rising change of a confidence measure leaves it as it is.
"""

import numpy as np
from numpy.typing import NDArray

from edgeexit.decision import Bools, Floats

# Ridge: what a coefficient costs; a bend is believed less readily than a slope.
_SLOPE, _BEND, _LEVEL = 1.0, 10.0, 1e-3
# Newton's steps, and how far one may go.
_STEPS, _STRIDE = 15, 2.0
# Finer differences are noise of sums, which another machine may round another way.
_GRAIN = 2.0**20


def chances(confidence: NDArray[np.floating], harm: Bools) -> Floats:
    """
    The chance that each sample, leaving at each exit, is a harmful flip: float64 (E, N) in 0..1.

    confidence (E - 1, N) of the early exits; harm bool (E, N): whether it is one. Exit k's chance
    is fitted on the ranks of the confidences of the early exits up to k, and on the square of the
    last of these; it is 0 where no flip was seen at all.
    """
    ranks = np.array([_rank_logits(row) for row in confidence]).reshape(confidence.shape)
    found = np.zeros(harm.shape)
    for k in np.flatnonzero(harm.any(axis=1)):
        known = ranks[: k + 1]
        seen = np.vstack([known, known[-1:] ** 2, np.ones(harm.shape[1])]).T
        ridge = np.array([_SLOPE] * len(known) + [_BEND] * len(known[-1:]) + [_LEVEL])
        found[k] = np.rint(_fitted(seen, harm[k].astype(np.float64), ridge) * _GRAIN) / _GRAIN
    return found


def _rank_logits(values: NDArray[np.floating]) -> Floats:
    """Logits of the middle ranks, float64 (N,), equals alike, of about unit variance."""
    ranked = np.sort(values)
    below, upto = (np.searchsorted(ranked, values, side=side) for side in ("left", "right"))
    share = (below + upto) / (2.0 * len(values))
    return np.asarray(np.log(share / (1.0 - share)) * (np.sqrt(3.0) / np.pi))


def _fitted(seen: Floats, happened: Floats, ridge: Floats) -> Floats:
    """Chances, float64 (N,), by Newton's method; the last column of *seen* is constant."""
    weights = np.zeros(seen.shape[1])
    mean = float(happened.mean())
    weights[-1] = np.log((mean + 1e-4) / (1.0 - mean + 1e-4))
    for _ in range(_STEPS):
        chance = _logistic(seen @ weights)
        slope = seen.T @ (chance - happened) + ridge * weights
        bend = (seen * (chance * (1.0 - chance))[:, None]).T @ seen + np.diag(ridge)
        step = np.linalg.solve(bend, slope)
        longest = float(np.abs(step).max())
        weights -= step * min(1.0, _STRIDE / max(longest, 1e-12))
        if longest < 1e-9:
            break
    return _logistic(seen @ weights)


def _logistic(values: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -40.0, 40.0))))
