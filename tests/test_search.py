import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.decision import Costs, Policy, Record, leaves, leaves_at
from edgeexit.search import Found, Problem, by_content, midway

SMALL = st.tuples(
    st.integers(1, 12), st.integers(1, 3), st.sampled_from([0, 3]), st.integers(0, 10**6)
)


def instance(n: int, early: int, levels: int, seed: int) -> tuple[Record, Costs]:
    """Confidences that tell right from wrong better at later exits; *levels* makes ties."""
    rng = np.random.default_rng(seed)
    ease = rng.uniform(0, 1, (n, 1))
    chance = 1 / (1 + np.exp(-(np.arange(early + 1) - 2 + 6 * ease)))
    confidence = chance + rng.normal(0, 0.1, chance.shape)
    if levels:
        confidence = np.rint(confidence * levels) / levels
    label = rng.integers(0, 3, n)
    wrong = rng.random(chance.shape) > chance
    record = Record(
        confidence=confidence.astype(np.float32),
        predicted=(label[:, None] + wrong) % 3,
        label=label,
        ids=np.arange(n),
    )
    parts = rng.uniform(0.2, 1.0, early + 1), rng.uniform(0.0, 0.4, early + 1)
    handover = np.append(rng.uniform(0.0, 0.05, early), 0.0)
    return record, Costs(*parts, handover)


def grids(record: Record) -> list[list[float]]:
    """All that each threshold may be."""
    early = record.confidence[:, :-1].T
    return [[*np.unique(column).astype(float).tolist(), math.inf] for column in early]


def judged(record: Record, costs: Costs, thresholds: tuple[float, ...]) -> tuple[float, int]:
    """Mean cost and harmful flips, counted by the room that decides."""
    policy = Policy(thresholds=thresholds)
    loss = record.loss[np.arange(len(record)), policy.exits(record)]
    return policy.mean_cost(record, costs), int((loss > 0).sum())


def objective(record: Record, costs: Costs, price: float, thresholds: tuple[float, ...]) -> float:
    cost, harmful = judged(record, costs, thresholds)
    return cost + price * harmful / len(record)


def plain(record: Record) -> list[tuple[float, ...]]:
    """Every policy of a single exit and every shared threshold."""
    early = record.exits - 1
    alone = [
        tuple(cut if j == k else math.inf for j in range(early))
        for k, cuts in enumerate(grids(record))
        for cut in cuts
    ]
    return alone + [(cut,) * early for cuts in grids(record) for cut in cuts]


@settings(max_examples=60, deadline=None)
@given(SMALL, st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_what_is_found_is_what_the_thresholds_do(case: tuple, price: float) -> None:
    record, costs = instance(*case)

    found = Problem(record, costs).best(price)

    cost, harmful = judged(record, costs, found.thresholds)
    assert found.cost == pytest.approx(cost, rel=1e-9)
    assert found.harmful == harmful
    for k, threshold in enumerate(found.thresholds):
        assert threshold not in record.confidence[:, k]


@settings(max_examples=40, deadline=None)
@given(SMALL, st.sampled_from([0.1, 1.0, 5.0, 30.0]), st.integers(0, 3))
def test_no_single_exit_and_no_shared_threshold_is_better(
    case: tuple, price: float, allowed: int
) -> None:
    record, costs = instance(*case)
    problem = Problem(record, costs)
    others = [judged(record, costs, thresholds) for thresholds in plain(record)]
    within = [cost for cost, harmful in others if harmful <= allowed]

    best, least = problem.best(price), problem.least(allowed)

    value = objective(record, costs, price, best.thresholds)
    assert value <= min(c + price * h / len(record) for c, h in others) + 1e-9
    assert least.harmful <= allowed
    assert least.cost <= min(within) + 1e-9


def test_within_a_percent_of_brute_force_nearly_always() -> None:
    """Over all thresholds of small instances, for a price and for an allowance."""
    priced, within = [], []
    for seed in range(80):
        record, costs = instance(4 + seed % 7, 1 + seed % 3, (0, 3)[seed % 2], seed)
        every = [judged(record, costs, cuts) for cuts in itertools.product(*grids(record))]
        price, allowed = (1.0, 5.0, 30.0)[seed % 3], seed % 4
        problem = Problem(record, costs)
        value = objective(record, costs, price, problem.best(price).thresholds)
        priced.append(value / min(c + price * h / len(record) for c, h in every))
        within.append(problem.least(allowed).cost / min(c for c, h in every if h <= allowed))

    assert min(priced) >= 1 - 1e-9
    assert np.mean(np.array(priced) <= 1.01) >= 0.95
    assert min(within) >= 1 - 1e-9
    assert np.mean(np.array(within) <= 1.01) >= 0.95


@settings(max_examples=40, deadline=None)
@given(SMALL, st.sampled_from([1.0, 5.0, 30.0]), st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_classes_matter(case: tuple, price: float, random) -> None:
    record, costs = instance(*case)
    rows = random.sample(range(len(record)), len(record))
    shuffled = record.take(np.array(rows))
    names = np.array([7, 1, 4])
    renamed = Record(record.confidence, names[record.predicted], names[record.label], record.ids)

    found = Problem(record, costs).best(price)

    assert Problem(shuffled, costs).best(price) == found
    assert Problem(renamed, costs).best(price) == found


def test_equal_confidences_leave_together_or_not_at_all() -> None:
    """Two of four equals flip: a cut between them would be best, and does not exist."""
    confidence = np.array([[0.9, 1], [0.5, 1], [0.5, 1], [0.5, 1], [0.5, 1]], np.float32)
    predicted = np.array([[0, 0], [0, 0], [1, 0], [0, 0], [1, 0]])
    record = Record(confidence, predicted, np.zeros(5, int), np.arange(5))
    costs = Costs([1.0, 1.0], [0.0, 0.0], [0.0, 0.0])

    assert Problem(record, costs).least(1).thresholds == (pytest.approx(0.7),)
    assert Problem(record, costs).least(2).thresholds[0] < 0.5


def test_an_exit_that_costs_more_than_it_saves_is_dropped() -> None:
    record, _ = instance(200, 2, 0, 1)
    free = Costs([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    dear = Costs([1.0, 1.0, 1.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0])

    assert Problem(record, free).best(5.0).thresholds[0] < math.inf
    found = Problem(record, dear).best(5.0)
    assert found.thresholds[0] == math.inf
    assert found.thresholds[1] < math.inf


def test_a_forbidden_exit_stays_dropped() -> None:
    record, costs = instance(200, 2, 0, 1)

    found = Problem(record, costs, may_keep=[False, True]).best(2.0)

    assert found.thresholds[0] == math.inf
    assert Problem(record, costs).restricted(np.array([False, True])).best(2.0) == found


def test_a_higher_price_never_costs_less_and_a_larger_allowance_never_more() -> None:
    record, costs = instance(600, 2, 0, 9)
    problem = Problem(record, costs)

    prices = (0.5, 2.0, 8.0, 32.0)
    values = [problem.best(price) for price in prices]
    dear = [found.cost + price * found.loss for price, found in zip(prices, values, strict=True)]
    least = [problem.least(allowed).cost for allowed in range(6)]

    assert dear == sorted(dear)
    assert least == sorted(least, reverse=True)


def test_credit_for_helpful_flips_lets_more_leave() -> None:
    record, costs = instance(3000, 2, 0, 4)

    plain_one = Problem(record, costs).best(20.0)
    credited = Problem(record, costs, is_signed=True).best(20.0)

    assert credited.cost <= plain_one.cost
    rows = np.arange(len(record))
    loss = record.loss[rows, leaves(record, np.array(credited.thresholds))]
    assert credited.loss == pytest.approx(float(loss.mean()))


def test_no_samples_no_exits_no_trouble() -> None:
    nobody = Record(
        np.empty((0, 3), np.float32), np.empty((0, 3), int), np.empty(0, int), np.empty(0, int)
    )
    costs = Costs([1.0] * 3, [0.1] * 3, [0.0] * 3)
    assert Problem(nobody, costs).least(0).thresholds == (math.inf, math.inf)

    record, one = instance(5, 0, 0, 0)
    assert Problem(record, one).best(1.0) == Found(
        thresholds=(), cost=pytest.approx(one.full), harmful=0, loss=0.0
    )


def test_the_order_by_content_is_one_of_contents() -> None:
    record, _ = instance(300, 2, 3, 2)
    shuffle = np.random.default_rng(0).permutation(300)
    first = record.take(by_content(record))
    second = record.take(shuffle).take(by_content(record.take(shuffle)))
    assert (first.confidence == second.confidence).all()
    assert (first.loss == second.loss).all()


def test_the_first_exit_that_is_sure_enough_is_taken() -> None:
    confidence = np.array([[0.2, 0.9], [0.8, 0.9], [0.2, 0.3]], np.float32)
    assert leaves_at(confidence, (0.5, 0.5)).tolist() == [1, 0, 2]
    assert leaves_at(confidence, (math.inf, 0.95)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("cut", "below"),
    [
        (0.7, 0.5),
        (1 - 2**-53, 1 - 2**-52),
        (5e-324, 0.0),
        (1.7e308, 1.6e308),
        (1.7e308, -1.7e308),
        (0.5 + 2**-40, -math.inf),
        (-3.4028234663852886e38, -math.inf),
        (-1e300, -math.inf),
    ],
)
def test_a_threshold_lies_above_the_next_lower_confidence(cut: float, below: float) -> None:
    assert -math.inf <= below < midway(cut, below) <= cut < math.inf


def test_the_loosest_threshold_lets_the_lowest_confidence_out() -> None:
    for least in (0.3, -1e300, float(np.finfo(np.float64).min)):
        assert midway(least, -math.inf) < least


def test_the_order_by_content_is_one_of_all_digits_of_float64() -> None:
    rng = np.random.default_rng(0)
    confidence = 0.5 + 1e-15 * rng.random((300, 2))
    record = Record(confidence, np.zeros((300, 2), int), np.zeros(300, int), np.arange(300))
    shuffled = record.take(rng.permutation(300))

    first, second = (one.confidence[by_content(one)] for one in (record, shuffled))
    assert (first == second).all()


def test_where_the_full_network_harms_too_often_a_policy_that_does_not_is_found() -> None:
    """Against another reference: only the first exit keeps to the allowance."""
    record = Record(
        np.array([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5]], np.float32),
        np.array([[1, 0], [1, 0], [0, 0]]),
        np.ones(3, np.int64),
        np.arange(3),
        reference_correct=np.ones(3, np.bool_),
    )
    problem = Problem(record, Costs(np.ones(2), np.ones(2), np.zeros(2)))
    assert problem.least(1).harmful == 1
