"""Whole populations to draw samples from, so that what a method promises can be counted."""

from math import sqrt
from statistics import NormalDist

import numpy as np

from edgeexit.decision import Costs, Record

ACCURACIES = (0.72, 0.84, 0.92, 0.96)
SYNTHETIC_COSTS = Costs(
    backbone=np.array([1.0, 1.0, 1.0, 1.0]),
    head=np.array([0.10, 0.08, 0.06, 0.03]),
    handover=np.array([0.03, 0.03, 0.03, 0.0]),
)
# What the best thresholds save of the whole network where the true risk is known, at a mean
# accuracy drop of one percent: measured with edgeexit.search on 400,000 samples.
ORACLE_SAVING = 0.387

_CLASSES = 10
_OWN = 0.35  # how much an exit's margin differs from what the sample's hardness says
_BLUR = 0.68  # how much the confidence differs from the margin
_SLOPES = (1.0, 1.15, 1.3, 1.5)  # later exits are surer of themselves


def synthetic(n: int, seed: int, shift: float = 0.0) -> Record:
    """
    *n* samples of a network with four exits, 72, 84, 92 and 96 % right, for SYNTHETIC_COSTS.

    An exit is right where its margin (a skill, less the sample's hardness, plus its own noise)
    is above 0; its confidence is a logistic function of a blurred margin. *shift* is added to
    every margin: 0.4 makes a tuning split that looks too easy, as training data does.
    """
    rng = np.random.default_rng([20210, seed])
    spread = sqrt(1.0 + _OWN**2)
    skill = np.array([NormalDist(sigma=spread).inv_cdf(share) for share in ACCURACIES])
    shape = (n, len(ACCURACIES))
    margin = skill + shift + rng.normal(size=(n, 1)) + _OWN * rng.normal(size=shape)
    seen = margin + _BLUR * rng.normal(size=shape)
    label = rng.integers(0, _CLASSES, n)
    wrong = (label[:, None] + rng.integers(1, _CLASSES, shape)) % _CLASSES
    return Record(
        confidence=(1.0 / (1.0 + np.exp(-np.array(_SLOPES) * seen))).astype(np.float32),
        predicted=np.where(margin > 0.0, label[:, None], wrong),
        label=label,
        ids=np.arange(n),
    )


def redrawn(population: Record, n: int, seed: int) -> Record:
    """*n* samples of *population*, with replacement: as if it were the whole world."""
    return population.take(np.random.default_rng([30310, seed]).integers(0, len(population), n))
