import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.search import cheapest, leaves_at


def brute(confidence: np.ndarray, harm: np.ndarray, costs: list[float], allowed: int) -> float:
    """Least mean cost over every combination of thresholds."""
    n, exits = confidence.shape
    grids = [[*np.unique(confidence[:, k]).tolist(), math.inf] for k in range(exits)]
    full = np.column_stack([harm, np.zeros(n, bool)])
    best = math.inf
    for thresholds in itertools.product(*grids):
        leaves = leaves_at(confidence, thresholds)
        if full[np.arange(n), leaves].sum() <= allowed:
            best = min(best, float(np.asarray(costs)[leaves].mean()))
    return best


def population(n: int, exits: int, seed: int, levels: int = 0):
    """Confidences that tell right from wrong better at later exits; *levels* makes ties."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(0, 1, n)
    confidence = np.empty((n, exits), np.float32)
    harm = np.empty((n, exits), bool)
    for k in range(exits):
        chance = 1 / (1 + np.exp(-(6.0 + k - 8 * hardness)))
        harm[:, k] = rng.random(n) > chance
        confidence[:, k] = chance + rng.normal(0, 0.05, n)
    if levels:
        confidence = (np.rint(confidence * levels) / levels).astype(np.float32)
    return confidence, harm


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([0, 3]),
    st.integers(0, 10**6),
)
def test_equals_brute_force(n: int, exits: int, allowed: int, levels: int, seed: int) -> None:
    confidence, harm = population(n, exits, seed, levels)
    costs = np.cumsum(np.random.default_rng(seed).uniform(0.1, 1, exits + 1)).tolist()

    found = cheapest(confidence, harm, costs, allowed)

    assert found.proven
    assert found.harmful <= allowed
    assert found.cost == pytest.approx(brute(confidence, harm, costs, allowed), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 6), st.integers(0, 10**6))
def test_thresholds_do_what_was_promised(n: int, exits: int, allowed: int, seed: int) -> None:
    confidence, harm = population(n, exits, seed, levels=7)
    costs = [float(k + 1) for k in range(exits + 1)]

    found = cheapest(confidence, harm, costs, allowed)

    leaves = leaves_at(confidence, found.thresholds)
    full = np.column_stack([harm, np.zeros(n, bool)])
    assert int(full[np.arange(n), leaves].sum()) == found.harmful <= allowed
    assert float(np.asarray(costs)[leaves].mean()) == pytest.approx(found.cost, rel=1e-12)
    for k, threshold in enumerate(found.thresholds):
        assert threshold not in confidence[:, k]


def test_the_lagrangian_part_alone_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large problems get, where the exact search runs out of work: mostly within 1 %."""
    ratios = []
    for seed in range(12):
        confidence, harm = population(1000, 2, seed)
        costs = [1.0, 2.0, 3.0]
        exact = cheapest(confidence, harm, costs, 8)
        with monkeypatch.context() as patch:
            patch.setattr("edgeexit.search._WORK", 0)
            quick = cheapest(confidence, harm, costs, 8)
        assert exact.proven
        assert not quick.proven
        assert quick.harmful <= 8
        ratios.append(quick.cost / exact.cost)
    assert float(np.median(ratios)) <= 1.01
    assert max(ratios) <= 1.15


def test_samples_in_another_order_give_the_same_answer() -> None:
    confidence, harm = population(400, 2, 5, levels=40)
    shuffle = np.random.default_rng(1).permutation(400)
    first = cheapest(confidence, harm, [1.0, 2.0, 3.0], 3)
    second = cheapest(confidence[shuffle], harm[shuffle], [1.0, 2.0, 3.0], 3)
    assert first == second


def test_a_larger_allowance_is_never_dearer() -> None:
    confidence, harm = population(600, 2, 9)
    costs = [cheapest(confidence, harm, [1.0, 2.0, 3.5], a).cost for a in range(8)]
    assert costs == sorted(costs, reverse=True)


def test_exits_that_save_nothing_are_left_out() -> None:
    confidence, harm = population(200, 1, 3)
    assert cheapest(confidence, np.ones_like(harm), [1.0, 2.0], 0).thresholds == (math.inf,)


def test_no_samples_no_exits_no_trouble() -> None:
    none = np.empty((0, 2), np.float32)
    assert cheapest(none, none.astype(bool), [1.0, 2.0, 3.0], 0).thresholds == (math.inf,) * 2


def test_two_thousand_samples_and_four_exits_take_seconds() -> None:
    confidence, harm = population(2000, 3, 0)
    start = time.perf_counter()
    found = cheapest(confidence, harm, [1.0, 2.0, 3.0, 4.0], 12)
    assert time.perf_counter() - start < 20
    assert found.harmful <= 12
