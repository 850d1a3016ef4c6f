"""Every way of choosing thresholds keeps to the same rules, and does what its paper says."""

import itertools

import numpy as np
import pytest
from populations import SYNTHETIC_COSTS, redrawn, synthetic

from edgeexit import families
from edgeexit.decision import Costs, Family, Record
from edgeexit.errors import UsageError
from edgeexit.families import METHODS, Goal, Method

GOAL = Goal(level=0.01, delta=0.05, samples=2000)
TUNING, CERTIFICATE = synthetic(2000, 1), synthetic(2000, 2)
EVERY = {**METHODS, "fixed": families.fixed((0.95, 0.9, 0.8))}


def last(method: Method, tuning: Record, certificate: Record, goal: Goal = GOAL) -> int | None:
    family = method.family(tuning, SYNTHETIC_COSTS, goal)
    return method.rule(family, certificate, tuning, goal)


def net(confidence: list[list[float]], right: list[list[int]]) -> Record:
    """Samples of class 1; an exit that is wrong says 0."""
    predicted = np.array(right)
    return Record(
        confidence=np.array(confidence, np.float32),
        predicted=predicted,
        label=np.ones(len(predicted), np.int64),
        ids=np.arange(len(predicted)),
    )


@pytest.mark.parametrize("name", EVERY)
def test_the_full_network_comes_first_and_something_is_saved_on_an_easy_population(
    name: str,
) -> None:
    method = EVERY[name]
    family = method.family(TUNING, SYNTHETIC_COSTS, GOAL)
    found = method.rule(family, CERTIFICATE, TUNING, GOAL)

    assert np.isinf(family.thresholds[0]).all()
    assert found is not None
    costs = family.mean_costs(family.tally(CERTIFICATE), SYNTHETIC_COSTS)[: found + 1]
    assert costs.min() < (0.95 if name == "fixed" else 0.85) * SYNTHETIC_COSTS.full


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("pareto", "fixed")])
def test_along_a_family_thresholds_only_fall(name: str) -> None:
    rows = EVERY[name].family(TUNING, SYNTHETIC_COSTS, GOAL).thresholds

    assert len(rows) > 20
    assert (rows[1:] <= rows[:-1]).all()


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_samples_and_the_names_of_classes_change_nothing(name: str) -> None:
    def stirred(record: Record, seed: int) -> Record:
        other = record.take(np.random.default_rng(seed).permutation(len(record)))
        names = np.random.default_rng(9).permutation(10)
        return Record(
            confidence=other.confidence,
            predicted=names[other.predicted],
            label=names[other.label],
            ids=other.ids,
        )

    method = EVERY[name]
    one = method.family(TUNING, SYNTHETIC_COSTS, GOAL)
    two = method.family(stirred(TUNING, 1), SYNTHETIC_COSTS, GOAL)

    assert np.array_equal(one.thresholds, two.thresholds)
    assert last(method, TUNING, CERTIFICATE) == last(
        method, stirred(TUNING, 1), stirred(CERTIFICATE, 2)
    )


@pytest.mark.parametrize("name", EVERY)
def test_what_cannot_be_shown_with_so_few_labels_is_not_claimed(name: str) -> None:
    assert not last(EVERY[name], TUNING, CERTIFICATE.take(np.arange(40)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "odd",
    [
        TUNING.take(np.zeros(30, np.int64)),  # one sample, over and over: constant confidences
        TUNING.take(np.flatnonzero(TUNING.label == 3)),  # one class
        synthetic(1, 5),
    ],
    ids=["constant", "one class", "one sample"],
)
def test_odd_tuning_samples_give_a_family_and_nothing_false(name: str, odd: Record) -> None:
    goal = Goal(level=0.01, delta=0.05, samples=2000)
    method = EVERY[name]
    family = method.family(odd, SYNTHETIC_COSTS, goal)
    found = method.rule(family, CERTIFICATE, odd, goal)

    if found is not None:
        assert family.tally(CERTIFICATE).drop[found] <= goal.level


@pytest.mark.parametrize("name", [name for name in EVERY if name != "fixed"])
def test_a_network_with_one_exit_has_nothing_to_choose(name: str) -> None:
    single = Record(
        confidence=TUNING.confidence[:, -1:],
        predicted=TUNING.predicted[:, -1:],
        label=TUNING.label,
        ids=TUNING.ids,
    )
    costs = Costs(backbone=np.ones(1), head=np.zeros(1), handover=np.zeros(1))

    assert EVERY[name].family(single, costs, GOAL).thresholds.shape == (1, 0)


def test_a_reference_that_is_better_than_the_network_stops_the_test_at_once() -> None:
    """The full network itself may lose more than the level against another reference."""
    worse = Record(
        confidence=CERTIFICATE.confidence,
        predicted=CERTIFICATE.predicted,
        label=CERTIFICATE.label,
        ids=CERTIFICATE.ids,
        reference_correct=np.ones(len(CERTIFICATE), np.bool_),
    )
    for name in ("shared", "ltt", "crc", "ucb"):
        assert last(EVERY[name], TUNING, worse) is None


def test_shared_has_one_threshold_and_fixed_those_it_was_given() -> None:
    shared = EVERY["shared"].family(TUNING, SYNTHETIC_COSTS, GOAL).thresholds
    fixed = EVERY["fixed"].family(TUNING, SYNTHETIC_COSTS, GOAL).thresholds

    assert (shared == shared[:, :1]).all()
    assert fixed[1:].tolist() == [[0.95, 0.9, 0.8]]
    with pytest.raises(UsageError, match=r"2 given, expected 3"):
        families.fixed((0.9, 0.8)).family(TUNING, SYNTHETIC_COSTS, GOAL)


def test_pcee_stops_where_both_exits_are_as_accurate_as_wanted() -> None:
    """The second exit is surer of itself than it is right: its confidences are read lower."""
    ladder = [0.1 * k for k in range(10)]
    confidence = [[c, c + 1.0, 1.0] for c in ladder for _ in range(10)]
    right = [[int(k < 1 + step), int(k < step), 1] for step in range(10) for k in range(10)]
    family = EVERY["pcee"].family(net(confidence, right), SYNTHETIC_COSTS, GOAL)

    # Accuracy (1 + step) / 10 at the first exit, step / 10 at the second.
    for row in family.thresholds[1:]:
        if np.isfinite(row).all() and row[1] > 1.15:
            assert row[1] - 1.0 == pytest.approx(row[0] + 0.1, abs=1e-6)
    assert [0.9, np.inf] == pytest.approx(family.thresholds[1].tolist())


def test_equal_confidences_are_never_parted_in_an_accuracy_map() -> None:
    confidence = np.repeat([0.2, 0.5, 0.9], [300, 400, 5])
    right = np.r_[np.zeros(300, bool), np.tile([True, False], 200), np.ones(5, bool)]
    limits, accuracy = families._accuracy_map(confidence, right)

    assert limits.tolist() == [0.2, 0.5, 0.9]
    assert accuracy.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_an_accuracy_map_is_the_closest_rising_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.permutation(60).astype(float)
    right = rng.random(60) < confidence / 60
    limits, accuracy = families._accuracy_map(confidence, right)
    fitted = accuracy[np.searchsorted(limits, confidence, side="right") - 1]

    assert (np.diff(accuracy) > 0).all()
    ordered = right[np.argsort(confidence)].astype(float)
    # The min-max formula of isotonic regression.
    means = {
        (i, j): ordered[i : j + 1].mean()
        for i, j in itertools.combinations_with_replacement(range(60), 2)
    }
    formula = [max(min(means[i, j] for j in range(k, 60)) for i in range(k + 1)) for k in range(60)]
    assert fitted[np.argsort(confidence)] == pytest.approx(formula)


def test_class_asks_more_of_an_answer_that_is_wrong_more_often() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random((4000, 2)).astype(np.float32)
    label = rng.integers(0, 2, 4000)
    answer = rng.integers(0, 2, 4000)
    # Answer 0 is right above 0.3, answer 1 only above 0.7.
    sure = confidence[:, 0] > np.where(answer == 0, 0.3, 0.7)
    first = np.where(sure, answer, 1 - answer)
    label = np.where(sure, answer, label)
    record = Record(
        confidence=confidence,
        predicted=np.column_stack([answer, first]),
        label=label,
        ids=np.arange(4000),
    )
    costs = Costs(backbone=np.ones(2), head=np.zeros(2), handover=np.zeros(2))
    goal = Goal(level=0.01, delta=0.05, samples=4000)
    family = EVERY["class"].family(record, costs, goal)

    offsets = family.class_offsets
    assert offsets is not None
    assert offsets.shape == (1, 2)
    assert offsets[0, 1] - offsets[0, 0] > 0.2


def test_pareto_goes_from_the_least_risky_to_the_cheapest_and_keeps_no_other() -> None:
    family = EVERY["pareto"].family(TUNING, SYNTHETIC_COSTS, GOAL)
    tally = family.tally(TUNING)
    cost = family.mean_costs(tally, SYNTHETIC_COSTS)

    assert (np.diff(tally.harmful) >= 0).all()
    assert (np.diff(cost) < 0).all()


def test_only_crc_promises_no_more_than_an_average() -> None:
    weaker = [name for name, method in EVERY.items() if method.promise != families.PROBABLY]

    assert weaker == ["crc"]


def test_crc_takes_more_than_ltt_and_ltt_no_more_than_the_exact_test() -> None:
    tuning, certificate = redrawn(TUNING, 1500, 1), redrawn(CERTIFICATE, 1500, 2)
    found = [last(METHODS[name], tuning, certificate) for name in ("crc", "shared", "ltt")]
    crc, shared, ltt = [0 if place is None else place for place in found]

    assert crc > shared >= ltt > 0


def test_a_family_is_a_family() -> None:
    for method in EVERY.values():
        assert isinstance(method.family(TUNING, SYNTHETIC_COSTS, GOAL), Family)
