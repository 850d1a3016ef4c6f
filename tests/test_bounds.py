import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit import bounds
from edgeexit.errors import UsageError


@pytest.mark.parametrize(
    ("n", "allowed"), [(298, -1), (299, 0), (500, 1), (1000, 4), (2000, 12), (5000, 38)]
)
def test_published_numbers_of_harmful_flips_at_one_percent(n: int, allowed: int) -> None:
    assert bounds.most_allowed(n, 0.01) == allowed


@pytest.mark.parametrize(("rate", "n"), [(0.02, 149), (0.01, 299), (0.005, 598), (0.002, 1497)])
def test_published_least_numbers_of_labels(rate: float, n: int) -> None:
    assert bounds.fewest_samples(rate) == n


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.data())
def test_sums_equal_the_textbook_formula(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    rate = data.draw(st.floats(0.001, 0.999))
    plain = sum(math.comb(n, j) * rate**j * (1 - rate) ** (n - j) for j in range(k + 1))
    assert bounds.at_most(k, n, rate) == pytest.approx(plain, rel=1e-9, abs=1e-300)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_the_bound_is_where_the_tail_equals_delta(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    upper = bounds.upper_bound(k, n, 0.95)
    assert bounds.at_most(k, n, upper) == pytest.approx(0.05, rel=1e-6)
    assert k / n < upper <= 1.0


def test_most_allowed_is_the_last_whose_bound_is_within_the_rate() -> None:
    for n in (300, 777, 2000):
        k = bounds.most_allowed(n, 0.01)
        assert bounds.upper_bound(k, n) <= 0.01 < bounds.upper_bound(k + 1, n)


def test_known_two_sided_interval() -> None:
    # Clopper and Pearson: 10 of 100 at 95 % is 4.90 % .. 17.62 %.
    low, high = bounds.interval(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0490, 0.1762)
    assert bounds.interval(0, 10)[0] == 0.0
    assert bounds.interval(10, 10)[1] == 1.0


def test_a_million_samples_do_not_underflow() -> None:
    k = bounds.most_allowed(1_000_000, 0.01)
    assert 9_800 < k < 9_860
    assert np.isfinite(bounds.upper_bound(k, 1_000_000))


def test_without_samples_nothing_is_known() -> None:
    assert bounds.upper_bound(0, 0) == 1.0
    assert bounds.most_allowed(0, 0.01) == -1


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_senseless_rate_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="accuracy drop"):
        bounds.most_allowed(1000, rate)
