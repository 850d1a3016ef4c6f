"""Series of times: resemblance of neighbours, warm-up, drifts and steps."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit import series

times_ns = st.floats(min_value=1e3, max_value=1e9)
ragged = st.lists(st.lists(times_ns, min_size=1, max_size=6), min_size=1, max_size=6)


def measured(
    seed: int = 0, processes: int = 10, blocks: int = 8, luck: float = 0.01, spread: float = 0.01
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    levels = np.exp(luck * rng.normal(size=processes))
    return [1e6 * level * np.exp(spread * rng.normal(size=blocks)) for level in levels]


# ---------------------------------------------------------------- autocorrelation


def test_independent_blocks_are_not_correlated_however_few_and_lucky() -> None:
    for blocks in (3, 10):
        cases = [measured(seed, blocks=blocks, luck=0.1) for seed in range(150)]
        found = [series.autocorrelation(case) for case in cases]
        values = [pair[0] for pair in found if pair is not None]

        assert np.mean(values) == pytest.approx(0, abs=0.03)


def test_blocks_that_wander_are_correlated_and_those_that_alternate_against() -> None:
    rng = np.random.default_rng(4)
    wandering = [1 + 1e-3 * np.cumsum(rng.normal(size=30)) for _ in range(10)]
    alternating = [1 + 0.01 * (-1.0) ** np.arange(20) for _ in range(5)]

    for blocks, sign in ((wandering, 1), (alternating, -1)):
        found = series.autocorrelation(blocks)
        assert found is not None
        assert sign * found[0] > 0.6
        assert abs(found[0]) > 3 * found[1]


def test_a_spike_is_no_correlation() -> None:
    blocks = measured(blocks=20)
    before = series.autocorrelation(blocks)
    blocks[3][7] *= 100
    after = series.autocorrelation(blocks)

    assert before is not None
    assert after is not None
    assert after[0] == pytest.approx(before[0], abs=0.1)


def test_what_is_too_short_or_constant_has_no_correlation() -> None:
    assert series.autocorrelation([[1.0, 2.0]] * 10) is None
    assert series.autocorrelation([[5.0] * 9]) is None


# ---------------------------------------------------------------- warm-up


def warm_calls(count: int, seed: int = 0, jitter: float = 0.02) -> np.ndarray:
    return 1e6 * np.exp(jitter * np.random.default_rng(seed).exponential(size=count))


@given(st.lists(st.integers(0, 10**12), max_size=60))
def test_at_most_half_of_the_first_calls_are_cold(calls: list[int]) -> None:
    assert 0 <= series.warm_from(calls) <= len(calls) // 2


@pytest.mark.parametrize("cold", [1, 3, 8])
def test_the_first_warm_call_is_found(cold: int) -> None:
    found = []
    for seed in range(40):
        calls = warm_calls(50, seed)
        calls[:cold] *= 1.5
        calls[0] *= 8
        found.append(series.warm_from(calls))

    assert np.median(found) == cold
    assert np.quantile(found, 0.9) <= cold + 3


def test_one_spike_after_the_start_moves_nothing() -> None:
    calls = warm_calls(50)
    calls[0] *= 8
    before = series.warm_from(calls)
    for place in range(1, 50):
        spiked = calls.copy()
        spiked[place] *= 20
        # Right behind the cold call it may look like one of them.
        assert series.warm_from(spiked) == before or place < 3


def test_calls_that_slowly_get_faster_are_warm_when_they_stay() -> None:
    calls = warm_calls(60) * (1 + np.exp(-np.arange(60) / 5))

    assert 8 <= series.warm_from(calls) <= 20


def test_equal_calls_are_warm_from_the_first() -> None:
    assert series.warm_from([1000] * 20) == 0


# ---------------------------------------------------------------- trends


def yardstick(count: int, seed: int = 0, noise: float = 0.004) -> np.ndarray:
    return 250e3 * np.exp(noise * np.random.default_rng(seed).normal(size=count))


def trend_of(values: np.ndarray) -> series.Trend:
    found = series.trend(values, np.arange(len(values)))
    assert found is not None
    return found


QUIET: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: 0.004 * rng.normal(size=n),
    "skewed": lambda rng, n: 0.01 * rng.exponential(size=n),
    "spiked": lambda rng, n: 0.004 * rng.normal(size=n) + 0.3 * (rng.random(n) < 0.02),
    "lucky processes": lambda rng, n: (
        0.004 * rng.normal(size=n) + np.repeat(0.003 * rng.normal(size=10), n // 10)
    ),
}


@pytest.mark.parametrize("kind", QUIET)
def test_none_of_a_hundred_quiet_series_shows_a_trend(kind: str) -> None:
    rng = np.random.default_rng(1)
    found = [trend_of(np.exp(QUIET[kind](rng, 40))) for _ in range(100)]

    assert not [one for one in found if one.drifts() or one.steps()]


def test_a_lasting_step_is_found_with_its_size_and_place() -> None:
    values = yardstick(300)
    values[180:] *= 1.05
    found = trend_of(values)

    assert found.steps()
    assert found.step == pytest.approx(0.05, abs=0.005)
    assert found.began == pytest.approx(180, abs=5)
    assert found.ended == 299


def test_a_passing_step_is_found_with_its_size_and_place() -> None:
    values = yardstick(300)
    values[100:140] *= 0.9
    found = trend_of(values)

    assert found.steps()
    assert not found.drifts()
    assert found.step == pytest.approx(-0.1, abs=0.005)
    assert (found.began, found.ended) == (pytest.approx(100, abs=5), pytest.approx(139, abs=5))


def test_a_drift_is_found_with_its_size() -> None:
    found = trend_of(yardstick(300) * (1 + 0.06 * np.arange(300) / 300))

    assert found.drifts()
    assert found.drift == pytest.approx(0.04, abs=0.004)


def test_a_real_but_tiny_step_is_none() -> None:
    values = yardstick(600)
    values[300:] *= 1.01
    found = trend_of(values)

    assert not found.steps()
    assert found.steps(least=0.005)


def test_times_decide_the_order_of_a_series() -> None:
    values, rng = yardstick(200), np.random.default_rng(0)
    values[120:] *= 1.1
    mixed = rng.permutation(200)

    assert series.trend(values[mixed], mixed) == trend_of(values)


def test_a_series_that_never_changes_has_no_trend() -> None:
    found = trend_of(np.full(100, 7.0))

    assert (found.drift, found.step) == (0, 0)
    assert not found.drifts(0)
    assert not found.steps(0)


def test_eleven_values_are_no_series() -> None:
    assert series.trend(np.ones(11), np.arange(11)) is None


def test_a_step_is_found_in_a_series_that_hardly_varies() -> None:
    found = trend_of(np.repeat([100.0, 120.0], [500, 100]))
    assert found.steps()
    assert found.step == pytest.approx(0.2)
