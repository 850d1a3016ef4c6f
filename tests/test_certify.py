"""What certify claims: its p-values are p-values, and the sequence stops at the first failure."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit import bounds, certify
from edgeexit.decision import Tally
from edgeexit.errors import UsageError


def tally(harmful: list[int], helpful: list[int], samples: int) -> Tally:
    rates = np.ones((len(harmful), 1))
    return Tally(harmful=np.array(harmful), helpful=np.array(helpful), rates=rates, samples=samples)


def one(
    harmful: int, helpful: int, samples: int, level: float, prior: Tally | None = None
) -> float:
    return float(certify.p_values(tally([harmful], [helpful], samples), level, 0.05, prior)[0])


@pytest.mark.parametrize(
    ("level", "delta", "labels"),
    [
        (0.02, 0.05, 149),
        (0.01, 0.05, 299),
        (0.005, 0.05, 598),
        (0.01, 0.05 * 6 / math.pi**2, 348),
        (0.005, 0.05 * 6 / math.pi**2, 697),
    ],
)
def test_the_fewest_labels_are_those_at_which_no_harm_certifies(
    level: float, delta: float, labels: int
) -> None:
    assert certify.fewest_samples(level, delta) == labels
    assert one(0, 0, labels, level) <= delta
    assert one(0, 0, labels - 1, level) > delta


@pytest.mark.parametrize("level", [0.0001, 0.0004, 0.0009])
def test_a_level_too_tight_for_the_exact_test_needs_little_more_by_betting(level: float) -> None:
    fewest = certify.fewest_samples(level, 0.05)

    assert certify.test_for(fewest) == certify.BETTING
    assert bounds.fewest_samples(level, 0.95) <= fewest <= 1.15 * bounds.fewest_samples(level, 0.95)


def test_few_samples_are_tested_exactly_and_many_by_betting() -> None:
    names = [certify.test_for(n) for n in range(1, 5000)]

    assert names[999] == certify.EXACT
    assert names[4000] == certify.BETTING
    assert names == sorted(names, reverse=True)


def test_the_exact_p_value_is_the_binomial_tail_of_the_harmful_flips() -> None:
    found = certify.p_values(tally([0, 4, 4, 5, 1000], [9, 0, 7, 0, 0], 1000), 0.01, 0.05)

    tails = [bounds.at_most(k, 1000, 0.01) for k in (0, 4, 4, 5, 1000)]
    assert found.tolist() == tails
    assert tails[2] <= 0.05 < tails[3]


def test_by_betting_helpful_flips_pay_for_harmful_ones() -> None:
    for helpful in (0, 20, 40):
        assert one(60, helpful, 5000, 0.01) > one(60, helpful + 20, 5000, 0.01)
    assert one(60, 60, 5000, 0.01) <= 0.05 < one(60, 0, 5000, 0.01)


@given(
    harmful=st.integers(0, 60),
    helpful=st.integers(0, 60),
    samples=st.integers(121, 20_000),
    level=st.floats(0.001, 0.3),
)
def test_p_values_are_shares_and_one_more_harmful_flip_never_lowers_them(
    harmful: int, helpful: int, samples: int, level: float
) -> None:
    here = one(harmful, helpful, samples, level)

    assert 0.0 <= here <= 1.0
    assert one(harmful + 1, helpful, samples, level) >= here * (1 - 1e-9)
    assert one(harmful, helpful, samples, level * 1.1) <= here * (1 + 1e-9)


def chances(n: int, harm: float, help_: float) -> dict[tuple[int, int], float]:
    """The chance of every (harmful, helpful) in *n* samples."""
    neutral, found = 1.0 - harm - help_, {}
    for h, g in itertools.product(range(n + 1), repeat=2):
        if h + g <= n:
            ways = math.comb(n, h) * math.comb(n - h, g)
            found[h, g] = ways * harm**h * help_**g * neutral ** (n - h - g)
    return found


@settings(max_examples=30, deadline=None)
@given(
    level=st.floats(0.05, 0.5),
    help_=st.floats(0.0, 0.4),
    excess=st.sampled_from([0.0, 0.02, 0.2]),
    prior=st.sampled_from([None, (0, 0), (3, 1), (0, 30), (30, 0)]),
    n=st.sampled_from([8, 40]),
)
def test_a_policy_of_too_great_a_loss_passes_with_probability_delta_at_most(
    level: float, help_: float, excess: float, prior: tuple[int, int] | None, n: int
) -> None:
    """Every outcome of few samples weighed by its chance: no sampling error in the answer."""
    harm = min(level + help_ + excess, 1.0 - help_)
    if harm - help_ < level:
        return
    outcomes = chances(n, harm, help_)
    counts = tally([h for h, _ in outcomes], [g for _, g in outcomes], n)
    size = len(outcomes)
    before = None if prior is None else tally([prior[0]] * size, [prior[1]] * size, 30)
    weights = np.array(list(outcomes.values()))
    for delta in (0.3, 0.1, 0.01):
        for found in (
            certify.p_values(counts, level, delta, before),
            certify._betting(counts, level, delta, before),
        ):
            assert weights[found <= delta].sum() <= delta * (1 + 1e-9)


def test_a_look_at_tuning_sharpens_the_bets_but_a_wrong_one_does_not_ruin_them() -> None:
    harmful, helpful, samples = 60, 50, 5000
    told = one(harmful, helpful, samples, 0.01, tally([24], [18], 2000))
    misled = one(harmful, helpful, samples, 0.01, tally([400], [200], 2000))

    assert told < misled < 0.1


def test_the_sequence_stops_at_the_first_failure_and_keeps_the_one_before() -> None:
    assert certify.last_certified(np.array([0.01, 0.05, 0.06, 0.01]), 0.05) == 1
    assert certify.last_certified(np.array([0.01, 0.02]), 0.05) == 1
    assert certify.last_certified(np.array([0.2, 0.01]), 0.05) == -1


def test_without_samples_nothing_is_shown() -> None:
    assert certify.p_values(tally([0, 0], [0, 0], 0), 0.01, 0.05).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("level", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.01, 0.0), (0.01, 1.0)])
def test_shares_that_are_none_are_refused(level: float, delta: float) -> None:
    with pytest.raises(UsageError):
        certify.p_values(tally([0], [0], 10), level, delta)
    with pytest.raises(UsageError):
        certify.fewest_samples(level, delta)
