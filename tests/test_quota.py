import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import UsageError
from edgeexit.quota import exit_rates, family, for_budget, thresholds

SETTINGS = settings(max_examples=25, deadline=None)


def distinct(n: int, exits: int, seed: int, dtype: str = "float32") -> np.ndarray:
    """Confidences of which no two at the same exit are equal; the exits order samples anew."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n) for _ in range(exits)], axis=1).astype(dtype)


def tied(n: int, exits: int, levels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (n, exits)).astype(np.int8)


def shares(exits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(exits))


def counts(confidences: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return np.rint(exit_rates(confidences, limits) * len(confidences)).astype(int)


@SETTINGS
@given(
    st.integers(1, 80),
    st.integers(1, 6),
    st.sampled_from(["float32", "float64", "int8", "int64"]),
    st.integers(0, 10**6),
)
def test_the_requested_shares_leave_to_within_one_sample(
    n: int, exits: int, dtype: str, seed: int
) -> None:
    confidences, asked = distinct(n, exits, seed, dtype), shares(exits, seed)

    got = exit_rates(confidences, thresholds(confidences, asked))

    assert got.sum() == pytest.approx(1.0)
    missing = n * (asked - got)[:-1]
    assert (missing > -1e-6).all()
    assert (missing < 1.0).all()
    # The last takes what the others' floors leave over.
    assert n * (got - asked)[-1] == pytest.approx(missing.sum(), abs=1e-6)


@SETTINGS
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum), st.integers(0, 10**6))
def test_shares_of_whole_samples_are_met_exactly(wanted: list[int], seed: int) -> None:
    n = sum(wanted)
    confidences = distinct(n, len(wanted), seed)

    limits = thresholds(confidences, [count / n for count in wanted])

    assert counts(confidences, limits).tolist() == wanted


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6))
def test_each_threshold_is_a_confidence_counted_off_among_those_still_there(
    n: int, exits: int, levels: int, seed: int
) -> None:
    confidences, asked = tied(n, exits, levels, seed), shares(exits, seed)
    left, expected = list(range(n)), []
    for k in range(exits - 1):
        by_confidence = sorted((int(confidences[i, k]) for i in left), reverse=True)
        wanted = min(math.floor(n * asked[k]), len(left))
        expected.append(by_confidence[wanted - 1] if wanted else math.inf)
        left = [i for i in left if confidences[i, k] < expected[-1]]

    assert thresholds(confidences, asked).tolist() == [*expected, -math.inf]


@SETTINGS
@given(st.integers(1, 60), st.integers(2, 5), st.integers(1, 8), st.integers(0, 10**6))
def test_equal_confidences_leave_together_and_exceed_by_less_than_their_number(
    n: int, exits: int, levels: int, seed: int
) -> None:
    confidences, asked = tied(n, exits, levels, seed), shares(exits, seed)
    limits = thresholds(confidences, asked)
    gone = counts(confidences, limits)

    left = np.ones(n, bool)
    for k in range(exits - 1):
        wanted = min(math.floor(n * asked[k]), int(left.sum()))
        block = int((left & (confidences[:, k] == limits[k])).sum())
        assert wanted <= gone[k] <= wanted + max(0, block - 1)
        left &= confidences[:, k] < limits[k]
    assert gone[-1] == left.sum()


def test_where_all_are_equally_sure_all_leave_at_the_first_exit_that_lets_anybody_out() -> None:
    confidences = np.full((10, 4), 0.7, np.float32)

    limits = thresholds(confidences, [0.05, 0.15, 0.4, 0.4])

    assert counts(confidences, limits).tolist() == [0, 10, 0, 0]
    assert limits.tolist() == [math.inf, float(np.float32(0.7)), math.inf, -math.inf]


def test_an_exit_that_runs_dry_lets_out_all_that_reach_it() -> None:
    # Three tie for the first place; of the four asked for at exit 1 two are left.
    confidences = np.array([[9, 0], [9, 1], [9, 2], [9, 3], [1, 4], [0, 5]])
    confidences = np.column_stack([confidences, np.zeros(6, int)])

    limits = thresholds(confidences, [1 / 6, 4 / 6, 1 / 6])

    assert counts(confidences, limits).tolist() == [4, 2, 0]
    assert limits.tolist() == [9.0, 4.0, -math.inf]


def test_the_last_exit_takes_samples_however_unsure() -> None:
    confidences = distinct(20, 3, 0)
    limits = thresholds(confidences, [0.5, 0.25, 0.25])

    assert exit_rates(confidences - 1e6, limits).tolist() == [0.0, 0.0, 1.0]


@SETTINGS
@given(st.floats(0.01, 50), st.integers(1, 8))
def test_shares_of_the_family_are_a_geometric_row(q: float, exits: int) -> None:
    found = family(q, exits)

    assert found.sum() == pytest.approx(1.0)
    assert found[1:] == pytest.approx(q * found[:-1])


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, [1, 0, 0]), (math.inf, [0, 0, 1]), (1e300, [0, 0, 1])]
)
def test_at_its_ends_the_family_knows_one_exit(q: float, expected: list[float]) -> None:
    assert family(q, 3) == pytest.approx(expected)


@SETTINGS
@given(st.integers(1, 80), st.integers(1, 5), st.floats(0, 1.2), st.integers(0, 10**6))
def test_a_budget_is_met_and_used_up_to_one_sample_an_exit(
    n: int, exits: int, part: float, seed: int
) -> None:
    confidences = distinct(n, exits, seed)
    costs = np.cumsum(np.random.default_rng(seed).uniform(0.1, 1, exits))
    span = float(costs[-1] - costs[0])
    budget = float(costs[0]) + part * span

    found = for_budget(confidences, costs, budget)

    assert found.cost <= budget * (1 + 1e-9)
    assert found.cost >= min(budget, float(costs[-1])) - (exits - 1) * span / n - 1e-9
    assert found.cost == pytest.approx(float(found.rates @ costs))
    assert found.thresholds.tolist() == thresholds(confidences, family(found.q, exits)).tolist()
    assert found.rates.tolist() == exit_rates(confidences, found.thresholds).tolist()


@SETTINGS
@given(st.integers(1, 60), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))
def test_a_budget_is_met_with_ties_and_with_costs_in_any_order(
    n: int, levels: int, part: float, seed: int
) -> None:
    confidences = tied(n, 4, levels, seed)
    costs = np.random.default_rng(seed).uniform(0.1, 1, 4)
    budget = float(costs[0] + part * (costs.max() - costs[0]))

    found = for_budget(confidences, costs, budget)

    assert float(exit_rates(confidences, found.thresholds) @ costs) <= budget * (1 + 1e-9)


def test_with_a_last_exit_cheaper_than_another_the_latest_answers_are_found() -> None:
    found = for_budget(distinct(50, 3, 1), [1.0, 9.0, 2.0], 2.0)

    assert found.q == math.inf
    assert found.rates.tolist() == [0.0, 0.0, 1.0]


def test_a_budget_that_is_crossed_more_than_once_is_used_at_the_latest() -> None:
    # By q the mean goes from 1 over more than 5 at q = 0.7 to 3.3 at q = 2, and to 5 again.
    found = for_budget(distinct(1000, 6, 2), [1.0, 20.0, 0.1, 0.1, 0.1, 5.0], 4.0)

    assert found.q > 2.0
    assert 3.9 < found.cost <= 4.0


def test_a_budget_below_every_answer_is_refused_with_the_least() -> None:
    with pytest.raises(UsageError, match=r"budget 1\.9: expected at least 2,"):
        for_budget(distinct(50, 3, 1), [2.0, 3.0, 4.0], 1.9)


GOOD = np.array([[0.5, 0.1], [0.2, 0.9]])


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[0.5, math.nan], [0.2, 0.9]]),
        np.array([[0.5, math.inf], [0.2, 0.9]]),
        np.array([0.5, 0.2]),
        np.empty((0, 2)),
        np.empty((2, 0)),
        np.array([["a", "b"]]),
        np.array([[True, False]]),
    ],
)
def test_confidences_of_no_use_are_refused(bad: np.ndarray) -> None:
    for ask in (
        lambda: thresholds(bad, [0.5, 0.5]),
        lambda: exit_rates(bad, [0.5, 0.5]),
        lambda: for_budget(bad, [1.0, 2.0], 1.5),
    ):
        with pytest.raises(UsageError, match="confidences"):
            ask()


@pytest.mark.parametrize(
    "bad", [[1.0], [0.5, 0.6], [1.5, -0.5], [math.nan, 0.5], [0.2, 0.3, 0.5], []]
)
def test_shares_of_no_use_are_refused(bad: list[float]) -> None:
    with pytest.raises(UsageError, match="rates"):
        thresholds(GOOD, bad)


def test_other_arguments_of_no_use_are_refused() -> None:
    for costs in ([1.0], [1.0, math.nan], [1.0, math.inf], [-1.0, 2.0]):
        with pytest.raises(UsageError, match="costs"):
            for_budget(GOOD, costs, 1.5)
    for budget in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="budget"):
            for_budget(GOOD, [1.0, 2.0], budget)
    for given_thresholds in ([0.5], [math.nan, 0.5]):
        with pytest.raises(UsageError, match="thresholds"):
            exit_rates(GOOD, given_thresholds)
    for q in (-0.1, math.nan):
        with pytest.raises(UsageError, match="q "):
            family(q, 3)
    with pytest.raises(UsageError, match="0 exits"):
        family(1.0, 0)
