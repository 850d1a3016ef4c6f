"""The papers' curves on made-up numbers: sweeps, bands, crossings, savings, the published order."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from seeds import gormez
from seeds.curves import (
    Curve,
    band,
    class_mean,
    common_costs,
    crossings,
    saving,
    sweep,
)

from edgeexit.decision import Record
from edgeexit.errors import UsageError


def made_up(confidence: list[list[float]], predicted: list[list[int]]) -> Record:
    """A record of two classes whose samples 0, 1, ... have the labels 0, 1, 0, ..."""
    count = len(predicted)
    return Record(
        np.array(confidence, np.float32),
        np.array(predicted),
        np.arange(count) % 2,
        np.arange(count),
    )


def test_the_classes_weigh_the_same() -> None:
    labels = np.array([0, 0, 0, 1])
    assert class_mean(np.array([True, True, True, False]), labels) == 0.5


def test_a_sweep_goes_from_the_first_exit_to_the_last() -> None:
    # The first exit is right and sure about samples 0 and 1, wrong and less sure about 2 and 3.
    record = made_up(
        [[0.9, 1.0], [0.8, 1.0], [0.6, 1.0], [0.5, 1.0]], [[0, 0], [1, 1], [1, 0], [0, 1]]
    )
    curve = sweep(record, np.array([1.0, 3.0]), np.array([0.0, 0.55, 0.7, 0.85, np.inf]))
    assert curve.costs.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert curve.accuracies.tolist() == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_curve_tells_the_least_cost_of_an_accuracy() -> None:
    # It falls in between: the final exit is worse than the one before it.
    curve = Curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 0.9, 0.7, 0.95]))
    assert curve.cost_of(0.4) == 1.0
    assert curve.cost_of(0.7) == pytest.approx(1.5)
    assert curve.cost_of(0.9) == 2.0
    assert curve.cost_of(0.92) == pytest.approx(3.88)
    with pytest.raises(UsageError, match=r"reaches 0\.9500, 0\.9900"):
        curve.cost_of(0.99)


def test_costs_that_fall_are_refused() -> None:
    with pytest.raises(UsageError, match="never fall"):
        Curve(np.array([2.0, 1.0]), np.array([0.1, 0.2]))


def test_a_band_holds_what_all_seeds_reach() -> None:
    low, high = (Curve(np.array([k, 3.0 + k]), np.array([0.0, 3.0]) + k) for k in (0.0, 1.0))
    costs = common_costs([low, high], 3)
    assert costs.tolist() == [1.0, 2.0, 3.0]
    found = band([low, high], costs)
    assert (found.low == found.high).all()
    assert found.mean.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match="no cost that all"):
        common_costs([low, Curve(np.array([7.0, 8.0]), np.array([0.0, 1.0]))])


def test_crossings_are_where_the_means_cross() -> None:
    costs = np.linspace(0.0, 4.0, 5)
    straight = band([Curve(costs, costs / 4)], costs)
    # Ahead until 1.5, equal from 2 to 2, behind at 3, ahead at 4.
    other = band([Curve(costs, np.array([0.25, 0.4, 0.5, 0.6, 1.25]))], costs)
    found = crossings(other, straight)
    assert len(found) == 2
    assert found[0] == (pytest.approx(2.0), pytest.approx(0.5))
    assert 3.0 < found[1][0] < 4.0
    assert crossings(straight, straight) == []


def test_a_saving_is_the_largest_share_at_equal_accuracy() -> None:
    # Ours need half as much at 0.5 and the same at 1.0.
    ours = Curve(np.array([0.5, 1.0, 4.0]), np.array([0.0, 0.5, 1.0]))
    theirs = Curve(np.array([0.5, 2.0, 4.0]), np.array([0.0, 0.5, 1.0]))
    found = saving([ours, ours], [theirs, theirs])
    assert found is not None
    assert found.share == pytest.approx(0.5, abs=0.01)
    assert found.accuracy == pytest.approx(0.5, abs=0.01)
    assert found.each == pytest.approx((0.5, 0.5), abs=0.01)
    back = saving([theirs], [ours])
    assert back is not None
    assert back.share == pytest.approx(0.0, abs=1e-9)


def test_without_an_accuracy_that_both_reach_nothing_is_saved() -> None:
    poor = Curve(np.array([1.0, 2.0]), np.array([0.1, 0.2]))
    rich = Curve(np.array([1.0, 2.0]), np.array([0.3, 0.9]))
    assert saving([poor], [rich]) is None


def test_the_published_order_is_checked_exit_by_exit() -> None:
    s1 = [[0.6, 0.8, 0.7], [0.6, 0.7, 0.9]]
    s2 = [[0.5, 0.7, 0.8], [0.5, 0.9, 0.8]]
    rows = gormez.ordering(s1, s2)
    assert [row["published"] for row in rows] == ["s1", "s1", "s2"]
    assert [row["holds_on_average"] for row in rows] == [True, False, True]
    assert [row["holds_in_seeds"] for row in rows] == [2, 1, 1]
    assert rows[2]["lead_of_s1"] == pytest.approx([-0.1, 0.1])


def test_the_published_numbers_are_in_the_published_order() -> None:
    """The paper's own figures pass our check, and its read-off sizes agree."""
    rows = gormez.ordering([gormez.PAPER_ACCURACY["s1"]], [gormez.PAPER_ACCURACY["s2"]])
    assert all(row["holds_on_average"] for row in rows)
    assert len(rows) == gormez.FULL.net.exits == gormez.SMALL.net.exits == 7
