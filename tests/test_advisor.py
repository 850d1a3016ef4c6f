"""What more labels would buy: a curve that is reproducible, honest about predictions, and rises."""

import numpy as np
import pytest
from populations import SYNTHETIC_COSTS, synthetic

from edgeexit.advisor import Advice, Point, advise
from edgeexit.decision import Record
from edgeexit.errors import UsageError
from edgeexit.families import METHODS, Goal

GOAL = Goal(level=0.01, delta=0.05, samples=0)
TUNING, CERTIFICATE = synthetic(1000, 1), synthetic(1000, 2)


def advice_on(certificate: Record = CERTIFICATE, **given: object) -> Advice:
    return advise(METHODS["shared"], TUNING, certificate, SYNTHETIC_COSTS, GOAL, **given)


def point(samples: int, saved: float, *, predicted: bool = False) -> Point:
    return Point(
        samples=samples, saved=saved, low=saved, high=saved, draws=1, is_predicted=predicted
    )


def test_more_labels_certify_more_and_too_few_certify_nothing() -> None:
    points = advice_on(sizes=[100, 500, 10_000]).points

    assert [p.samples for p in points] == [100, 500, 1000, 10_000]
    assert points[0].saved == points[0].high == 0.0  # 299 are needed
    assert points[0].saved < points[1].saved < points[3].saved
    assert all(0.0 <= p.low <= p.saved <= p.high < 1.0 for p in points)


def test_what_is_at_hand_is_taken_whole_and_what_is_not_is_marked_predicted() -> None:
    advice = advice_on(sizes=[500, 2000], draws=3)

    assert [(p.samples, p.draws, p.is_predicted) for p in advice.points] == [
        (500, 3, False),
        (1000, 1, False),
        (2000, 3, True),
    ]
    method, goal = METHODS["shared"], Goal(level=0.01, delta=0.05, samples=1000)
    family = method.family(TUNING, SYNTHETIC_COSTS, goal)
    last = method.rule(family, CERTIFICATE, TUNING, goal)
    means = family.mean_costs(family.tally(TUNING.joined(CERTIFICATE)), SYNTHETIC_COSTS)
    assert last is not None
    assert advice.now.saved == pytest.approx(
        1 - float(means[: last + 1].min()) / SYNTHETIC_COSTS.full
    )


def test_neither_the_order_of_samples_nor_a_second_run_changes_anything() -> None:
    order = np.random.default_rng(0).permutation(len(CERTIFICATE))

    assert advice_on() == advice_on(CERTIFICATE.take(order)) == advice_on()
    assert advice_on(seed=1) != advice_on()


def test_the_curve_ends_at_ten_times_the_labels_at_hand() -> None:
    assert advice_on(draws=2).points[-1].samples == 10_000


def test_the_sentence_names_the_fewest_labels_that_get_most_of_it() -> None:
    advice = Advice(
        points=(
            point(1000, 0.20),
            point(2000, 0.25, predicted=True),
            point(5000, 0.29, predicted=True),
            point(10_000, 0.30, predicted=True),
        ),
        present=1000,
    )

    assert "with 4,000 more labels" in advice.sentence
    assert "29.0% instead of 20.0% (predicted" in advice.sentence
    assert advice.to_document()["sentence"] == advice.sentence


def test_the_luckiest_point_is_not_what_is_claimed() -> None:
    advice = Advice(
        points=(
            point(1000, 0.20),
            point(2000, 0.32, predicted=True),
            point(5000, 0.25, predicted=True),
        ),
        present=1000,
    )

    assert "with 1,000 more labels" in advice.sentence
    assert "25.0% instead of 20.0%" in advice.sentence


def test_the_sentence_says_so_when_labels_are_not_what_is_missing() -> None:
    advice = Advice(points=(point(1000, 0.2), point(5000, 0.205, predicted=True)), present=1000)

    assert advice.sentence.startswith("more labels would hardly help: 1,000 certify")


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(UsageError, match="no samples"):
        advice_on(CERTIFICATE.take(np.array([], int)))
    with pytest.raises(UsageError, match="expected 1 or more"):
        advice_on(sizes=[0])
