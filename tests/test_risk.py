import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit import bounds
from edgeexit.errors import UsageError
from edgeexit.risk import crc, ltt, p_value, ucb, upper_bounds

SETTINGS = settings(max_examples=25, deadline=None)
Simulation = Callable[[np.random.Generator, int], np.ndarray]
Choice = Callable[[np.ndarray], int | None]


# Losses with known risks: the same sample hurt ever more, or every setting for itself.

RISING = np.linspace(0.0, 0.4, 41)
# Bold settings that are all a little too bold: among so many one always looks good.
PLATEAU = np.array([0.01, 0.02, *[0.105] * 60])
# Down again behind a setting that is too bold.
DIP = np.array([0.01, 0.03, 0.13, 0.02, *[0.12] * 30])


def together(rng: np.random.Generator, n: int) -> np.ndarray:
    """0 and 1; a sample once hurt stays hurt."""
    return rng.random((n, 1)) < RISING


def parts(rng: np.random.Generator, n: int) -> np.ndarray:
    """Anything in 0..1, rising."""
    return (rng.random((n, 1)) < 2 * RISING) * rng.random((n, 1))


def apart(risks: np.ndarray) -> Simulation:
    return lambda rng, n: rng.random((n, len(risks))) < risks


def gaps(rng: np.random.Generator, n: int) -> np.ndarray:
    """-1 where only the early answer is right, 1 where only the full network's is."""
    draw = rng.random((n, len(RISING)))
    return (draw < RISING + 0.05).astype(int) - (draw > 0.95)


SIMULATIONS: dict[str, tuple[Simulation, np.ndarray]] = {
    "together": (together, RISING),
    "parts": (parts, RISING),
    "gaps": (gaps, RISING),
    "plateau": (apart(PLATEAU), PLATEAU),
    "dip": (apart(DIP), DIP),
}


def naive(level: float) -> Choice:
    """The boldest setting whose mean loss on the calibration samples is within the level."""
    return lambda losses: max(np.flatnonzero(losses.mean(axis=0) <= level).tolist(), default=None)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_what_the_simulations_call_risk_is_the_mean_of_their_losses(name: str) -> None:
    simulate, risks = SIMULATIONS[name]
    losses = simulate(np.random.default_rng(0), 20_000)

    assert losses.mean(axis=0) == pytest.approx(risks, abs=0.02)


# ---------------------------------------------------------------- on average: CRC


def mean_test_risk(losses: np.ndarray, calibration: int, choose: Choice) -> tuple[float, float]:
    """Mean over 400 random splits of the other part's mean loss, and its standard error."""
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(400):
        order = rng.permutation(len(losses))
        index = choose(losses[order[:calibration]])
        rest = losses[order[calibration:]]
        seen.append(0.0 if index is None else float(rest[:, index].mean()))
    return float(np.mean(seen)), float(np.std(seen) / math.sqrt(len(seen)))


@pytest.mark.parametrize("simulate", [together, parts])
def test_crc_keeps_the_mean_risk_over_random_splits(simulate: Simulation) -> None:
    level = 0.2
    mean, error = mean_test_risk(
        simulate(np.random.default_rng(2), 1020), 20, lambda losses: crc(losses, level)
    )

    assert mean <= level + 3 * error
    assert mean >= level / 2


def test_the_naive_choice_does_not_keep_it_and_crc_gives_little_more_away() -> None:
    level, n = 0.2, 20
    losses = together(np.random.default_rng(2), 1020)

    mean, error = mean_test_risk(losses, n, naive(level))
    assert mean > level + 3 * error
    # At most one sample's worth, and a step of the grid.
    mean, error = mean_test_risk(losses, n, lambda losses: crc(losses, level))
    assert mean >= level - 1 / (n + 1) - 0.01 - 3 * error


@SETTINGS
@given(
    st.integers(1, 60),
    st.floats(0.02, 0.6),
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12).map(sorted),
)
def test_crc_on_zeros_and_ones_needs_only_a_risk_that_rises(
    n: int, level: float, risks: list[float]
) -> None:
    # However the settings hang together, one is reached no more often than it passes itself.
    passing = [bounds.at_most(math.floor((n + 1) * level - 1 + 1e-9), n, risk) for risk in risks]
    steps = np.diff([0.0, *risks])

    assert float(steps @ passing) <= level + 1e-9


@SETTINGS
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.floats(0.01, 0.9),
    st.sampled_from([1.0, 2.0]),
    st.integers(0, 10**6),
)
def test_crc_is_the_last_before_the_first_mean_above_its_limit(
    n: int, grid: int, level: float, bound: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.uniform(-0.2, bound, (n, grid)) * rng.uniform(0, 1, grid)
    limit = ((n + 1) * level - bound) / n
    expected = None
    for index in range(grid):
        if losses[:, index].mean() > limit:
            break
        expected = index

    assert crc(losses, level, bound) == expected


@pytest.mark.parametrize(("n", "level", "most"), [(19, 0.3, 5), (99, 0.29, 28)])
def test_a_mean_that_equals_its_limit_passes(n: int, level: float, most: int) -> None:
    # (n + 1) level - 1 is a whole number, but 100 * 0.29 is less than 29 in floats.
    losses = np.zeros((n, 3), bool)
    losses[:most, 1] = True
    losses[: most + 1, 2] = True

    assert crc(losses, level) == 1


def test_too_few_samples_show_nothing_on_average() -> None:
    assert crc(np.zeros((8, 3)), 0.1) is None
    assert crc(np.zeros((9, 3)), 0.1) == 2


# ---------------------------------------------------------------- with probability: UCB, LTT

LEVEL, DELTA, RUNS, SAMPLES = 0.1, 0.2, 300, 150
# Of so many runs at a violation rate of DELTA no more violate, but for one time in 2,000.
MOST = next(k for k in range(RUNS) if bounds.at_most(k, RUNS, DELTA) >= 0.9995)
CONTROLS: dict[str, Choice] = {
    "ucb": lambda losses: ucb(losses, LEVEL, DELTA),
    "ltt": lambda losses: ltt(losses, LEVEL, DELTA),
}


def chosen(name: str, choose: Choice) -> list[int | None]:
    simulate, _ = SIMULATIONS[name]
    rng = np.random.default_rng(3)
    return [choose(simulate(rng, SAMPLES)) for _ in range(RUNS)]


def violations(name: str, indices: list[int | None]) -> int:
    risks = SIMULATIONS[name][1]
    return sum(index is not None and risks[index] > LEVEL for index in indices)


@pytest.mark.parametrize("name", SIMULATIONS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_risk_above_the_level_is_chosen_no_more_often_than_delta(control: str, name: str) -> None:
    assert violations(name, chosen(name, CONTROLS[control])) <= MOST


@pytest.mark.parametrize("name", SIMULATIONS)
def test_the_naive_choice_violates_more_often(name: str) -> None:
    assert violations(name, chosen(name, naive(LEVEL))) > MOST


@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_given_away_for_certainty_is_bounded(control: str) -> None:
    # 5 % of 150 samples are 7 or 8; a rate of 10 % gives so few once in 40 times.
    indices = chosen("together", CONTROLS[control])

    assert np.median([RISING[index or 0] for index in indices]) >= 0.05


@pytest.mark.parametrize("control", CONTROLS)
def test_nothing_behind_a_setting_that_fails_is_reached(control: str) -> None:
    choose = CONTROLS[control]
    losses = np.zeros((SAMPLES, 4))
    assert choose(losses) == 3

    losses[: SAMPLES // 5, 2] = 1
    assert choose(losses) == 1
    losses[: SAMPLES // 5, 0] = 1
    assert choose(losses) is None


def test_testing_in_turn_returns_the_last_certified_setting_and_not_the_next() -> None:
    rng = np.random.default_rng(4)
    risks = np.array([0.01, 0.03, 0.2, 0.4])
    next_ones = 0
    for _ in range(50):
        losses = rng.random((SAMPLES, 4)) < risks
        index = ltt(losses, LEVEL, DELTA)
        assert index is not None
        values = [p_value(float(total), SAMPLES, LEVEL) for total in losses.sum(axis=0)]
        assert max(values[: index + 1]) <= DELTA < values[index + 1]
        next_ones += bool(risks[index + 1] > LEVEL)
    # The setting where testing stopped would have been wrong nearly always.
    assert next_ones > 50 * (1 - DELTA)


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 6), st.floats(0.05, 0.6), st.integers(0, 10**6))
def test_the_two_controls_are_their_bound_and_their_p_value_in_turn(
    n: int, grid: int, level: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.random((n, grid)) * (rng.random((n, grid)) < rng.uniform(0, 0.3, grid))
    shown = upper_bounds(losses, 0.3) <= level
    tested = [p_value(float(total), n, level) <= 0.3 for total in losses.sum(axis=0)]
    for index, passes in ((ucb(losses, level, 0.3), shown), (ltt(losses, level, 0.3), tested)):
        leading = list(itertools.takewhile(bool, passes))
        assert index == (len(leading) - 1 if leading else None)


def test_gains_help_the_betting_bound_and_count_as_nothing_in_tests() -> None:
    losses = np.zeros((60, 1))
    losses[::6] = 1.0
    with_gains = losses.copy()
    with_gains[1::6] = -1.0

    assert upper_bounds(with_gains, 0.1) < upper_bounds(losses, 0.1)
    assert ltt(with_gains, 0.2, 0.1) == ltt(losses, 0.2, 0.1)


# ---------------------------------------------------------------- the bound and the p-value


def capital(losses: list[float], delta: float, mean: float) -> float:
    """The betting bound's highest logarithm of the capital, step by step as it is written."""
    n, highest, gone = len(losses), -math.inf, 0.0
    total, squares, variance = 0.5, 0.25, 0.25
    for i, loss in enumerate(losses, start=1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (n * variance)))
        gone += math.log(1 - bet * (loss - mean))
        highest = max(highest, gone)
        total += loss
        squares += (loss - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    return highest


@SETTINGS
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0.01, 0.5))
def test_at_the_bound_the_capital_is_one_over_delta(losses: list[float], delta: float) -> None:
    found = float(upper_bounds(np.array(losses)[:, None], delta)[0])
    goal = math.log(1 / delta)

    assert 0.0 < found <= 1.0
    if found < 1.0:
        assert capital(losses, delta, found) >= goal - 1e-6
    if found > 1e-6:
        assert capital(losses, delta, found * (1 - 1e-9)) <= goal + 1e-6


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.3, 1.0), (-1.0, 0.0, 1.0)])
def test_the_bound_is_too_low_with_probability_delta_at_most(
    values: tuple[float, ...], delta: float
) -> None:
    # Exactly: over all rows of losses, weighted by their probabilities.
    length = 11 if len(values) == 2 else 7
    rows = np.array(list(itertools.product(range(len(values)), repeat=length)))
    found = upper_bounds(np.array(values)[rows].T, delta)
    missed = []
    for hurt in (0.1, 0.3, 0.6, 0.9):
        chances = np.array([*[(1 - hurt) / (len(values) - 1)] * (len(values) - 1), hurt])
        mean = float(chances @ values)
        weights = chances[rows].prod(axis=1)
        assert weights.sum() == pytest.approx(1.0)
        missed.append(float(weights[found < mean - 1e-9].sum()))
    assert max(missed) <= delta
    assert max(missed) > 0.0


@SETTINGS
@given(st.integers(1, 200), st.floats(0.01, 0.9), st.floats(0.001, 0.9))
def test_a_p_value_below_u_has_probability_u_at_most(n: int, level: float, u: float) -> None:
    # Exactly, on losses of 0 and 1: the p-value rises with their number.
    values = [p_value(k, n, level) for k in range(n + 1)]
    assert values == sorted(values)
    few = sum(value <= u for value in values)

    assert bounds.at_most(few - 1, n, level) <= u + 1e-9


@SETTINGS
@given(st.integers(1, 40), st.floats(0.05, 0.9), st.just(0.0) | st.floats(1e-6, 1))
def test_the_p_value_is_the_smaller_of_hoeffding_and_bentkus(
    n: int, level: float, mean: float
) -> None:
    total = mean * n
    tail = sum(
        math.comb(n, j) * level**j * (1 - level) ** (n - j) for j in range(math.ceil(total) + 1)
    )
    if mean < level:
        power = (level / mean) ** mean if mean else 1.0
        rest = ((1 - level) / (1 - mean)) ** (1 - mean)
        hoeffding = (power * rest) ** n
    else:
        hoeffding = 1.0

    expected = min(hoeffding, math.e * tail, 1.0)
    assert p_value(total, n, level) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[0.0, math.nan]]),
        np.array([[0.0, -math.inf]]),
        np.array([0.0, 1.0]),
        np.empty((0, 3)),
        np.empty((3, 0)),
        np.array([["a"]]),
        np.array([[1.5]]),
        np.array([[-1.5]]),
    ],
)
def test_losses_of_no_use_are_refused(bad: np.ndarray) -> None:
    for ask in (
        lambda: crc(bad, 0.1),
        lambda: ucb(bad, 0.1, 0.1),
        lambda: ltt(bad, 0.1, 0.1),
        lambda: upper_bounds(bad, 0.1),
    ):
        with pytest.raises(UsageError, match="losses"):
            ask()


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, math.nan, math.inf])
def test_levels_and_deltas_of_no_use_are_refused(bad: float) -> None:
    losses = np.zeros((4, 2))
    for ask in (
        lambda: crc(losses, bad),
        lambda: ucb(losses, bad, 0.1),
        lambda: ltt(losses, bad, 0.1),
        lambda: p_value(0.0, 4, bad),
    ):
        with pytest.raises(UsageError, match="level"):
            ask()
    for ask in (
        lambda: ucb(losses, 0.1, bad),
        lambda: ltt(losses, 0.1, bad),
        lambda: upper_bounds(losses, bad),
    ):
        with pytest.raises(UsageError, match="delta"):
            ask()


def test_other_arguments_of_no_use_are_refused() -> None:
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="bound"):
            crc(np.zeros((4, 2)), 0.1, bound)
    for total, n in ((math.nan, 4), (5.0, 4), (-1.0, 4), (0.0, 0)):
        with pytest.raises(UsageError, match="total"):
            p_value(total, n, 0.1)
