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


def test_the_test_is_chosen_by_tuning_and_never_by_the_level() -> None:
    without, with_many = tally([20], [0], 2000), tally([20], [20], 2000)

    assert certify.tests(5000, None, 3) == (certify.EXACT,) * 3
    assert certify.tests(5000, without, 1) == (certify.EXACT,)
    assert certify.tests(5000, with_many, 1) == (certify.SIGNED,)
    assert certify.tests(300, with_many, 1) == (certify.EXACT,)
    assert certify.tests(100_000, tally([0], [0], 10), 1) == (certify.EXACT,)


def test_the_exact_p_value_is_the_binomial_tail_of_the_harmful_flips() -> None:
    found = certify.p_values(tally([0, 4, 4, 5, 1000], [9, 0, 7, 0, 0], 1000), 0.01, 0.05)

    tails = [bounds.at_most(k, 1000, 0.01) for k in (0, 4, 4, 5, 1000)]
    assert found.tolist() == tails
    assert tails[2] <= 0.05 < tails[3]


def test_by_the_signed_test_helpful_flips_pay_for_harmful_ones() -> None:
    prior = tally([24], [24], 2000)
    for helpful in (0, 20, 40):
        less, more = (one(60, count, 5000, 0.01, prior) for count in (helpful, helpful + 20))
        assert more < less
    assert one(60, 60, 5000, 0.01, prior) <= 0.05 < one(60, 0, 5000, 0.01, prior)
    # By the normal approximation of the difference, with twice as many helpful flips as seen.
    assert one(60, 60, 50_000, 0.001, prior) == pytest.approx(0.0013, rel=2.0)


@pytest.mark.parametrize(("samples", "level"), [(100, 0.1), (150, 0.05)])
@pytest.mark.parametrize("helpful", [0, 2, 4])
def test_the_signed_tail_is_the_sum_over_all_outcomes(
    samples: int, level: float, helpful: int
) -> None:
    spent = 0.002
    help_ = bounds.upper_bound(helpful, samples, 1.0 - spent)
    outcomes = chances(samples, help_ + level, help_)
    for harmful in range(helpful, helpful + int((samples - 1) * level) - 2):
        tail = sum(chance for (h, g), chance in outcomes.items() if h - g <= harmful - helpful)
        found = certify._signed(harmful, helpful, samples, level, spent)
        assert found == pytest.approx(tail + spent, abs=1e-10)
        # No rarer helpful flips make so small a difference more likely.
        for rarer in np.linspace(0.0, help_, 5)[:-1]:
            others = chances(samples, rarer + level, rarer)
            less = sum(chance for (h, g), chance in others.items() if h - g <= harmful - helpful)
            assert less <= tail + 1e-12


def test_beyond_what_is_proven_of_the_signed_tail_nothing_is_shown() -> None:
    # The tail must end two below the mean of one sample less, 9.9 here.
    assert certify._signed(7, 0, 100, 0.1, 0.002) < 1.0
    assert certify._signed(8, 0, 100, 0.1, 0.002) == 1.0
    # Helpful flips at a rate of 0.22 and harmful ones at 0.52 are no sum of coins.
    assert certify._signed(0, 0, 100, 0.3, 0.002) < 1.0
    assert certify._signed(10, 10, 100, 0.3, 0.002) == 1.0


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no longer floats here")
@pytest.mark.parametrize("samples", [1000, 100_000, 1_000_000])
@pytest.mark.parametrize("level", [0.03, 0.3])
@pytest.mark.parametrize("deviations", [1, 2, 5])
def test_the_signed_p_value_is_not_below_its_tail_in_longer_floats(
    samples: int, level: float, deviations: int
) -> None:
    helpful, spent = samples // 20, 0.002
    help_ = bounds.upper_bound(helpful, samples, 1.0 - spent)
    spread = math.sqrt(samples * (2 * help_ + level))
    difference = int(samples * level - deviations * spread)

    found = certify._signed(helpful + difference, helpful, samples, level, spent)
    tail = long_tail(samples, np.longdouble(help_) + level, np.longdouble(help_), difference)
    assert 0.0 <= found - spent - tail <= 1e-14 * samples


def long_tail(n: int, harm: np.longdouble, help_: np.longdouble, most: int) -> np.longdouble:
    """P(harmful - helpful <= most): the characteristic function summed over half a circle."""
    size = 1 << (4 * most + 2000).bit_length()
    half = np.arctan2(np.longdouble(0), np.longdouble(-1)) / size * np.arange(1, size // 2 + 1)
    real = -2 * (harm + help_) * np.sin(half) ** 2
    imag = (harm - help_) * np.sin(2 * half)
    height = np.exp(n / np.longdouble(2) * np.log1p(2 * real + real**2 + imag**2))
    turn = n * np.arctan2(imag, 1 + real) + half * (size // 2 - most)
    count = most + size // 2 + 1
    terms = 2 * height * np.cos(turn) * np.sin(count * half) / np.sin(half)
    return (count + terms[:-1].sum() + terms[-1] / 2) / size


def test_many_helpful_flips_take_little_memory() -> None:
    helpful, spent = 100_000, 0.0025

    assert certify._signed(0, helpful, 1_000_000, 0.01, spent) == pytest.approx(spent)
    assert certify._signed(helpful, helpful, 1_000_000, 0.01, spent) == pytest.approx(spent)
    assert certify._tails(helpful, 1_000_000, 0.01, spent).nbytes < 2**20


@given(
    harmful=st.integers(0, 60),
    helpful=st.integers(0, 60),
    samples=st.integers(121, 20_000),
    level=st.floats(0.001, 0.3),
    prior=st.sampled_from([None, (30, 30), (30, 0)]),
)
def test_p_values_are_shares_and_one_more_harmful_flip_never_lowers_them(
    harmful: int, helpful: int, samples: int, level: float, prior: tuple[int, int] | None
) -> None:
    before = None if prior is None else tally([prior[0]], [prior[1]], 2000)
    here = one(harmful, helpful, samples, level, before)

    assert 0.0 <= here <= 1.0
    assert one(harmful + 1, helpful, samples, level, before) >= here * (1 - 1e-9)
    assert one(harmful, helpful, samples, level * 1.1, before) <= here * (1 + 1e-9)


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
        signed = [certify._signed(h, g, n, level, delta / 20) for h, g in outcomes]
        for found in (certify.p_values(counts, level, delta, before), np.array(signed)):
            assert weights[found <= delta].sum() <= delta * (1 + 1e-9)


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
