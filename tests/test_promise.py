"""
The promise, counted: how often a policy loses more than was promised, over whole populations.

Splits are drawn with replacement from a population that is known, the measure search included;
bench/promise.py does the same at length. Bounds are those that a true rate of delta would pass
in all but one of ten thousand runs of this file.
"""

import numpy as np
import pytest
from redraws import Way, World, best_on_calibration, ours, recorded_world, synthetic_world

from edgeexit import bounds, certify
from edgeexit.families import METHODS, Goal

LEVEL, DELTA = 0.01, 0.05
TUNING = 2000
REDRAWS = 20


@pytest.fixture(scope="module", params=["synthetic", "fashion"])
def world(request: pytest.FixtureRequest) -> World:
    return synthetic_world() if request.param == "synthetic" else recorded_world()


def broken(way: Way, world: World, samples: int, redraws: int) -> tuple[int, float]:
    """How many of the redraws break the promise, and the mean share of the cost saved."""
    count, saved = 0, 0.0
    for draw in range(redraws):
        tuning, certificate = world.draw(TUNING, 2 * draw), world.draw(samples, 2 * draw + 1)
        measure, policy = way(tuning, certificate, world.costs, LEVEL, DELTA)
        count += world.loss(measure, policy) > LEVEL
        saved += world.saving(measure, policy) / redraws
    return count, saved


def most_broken(redraws: int, rate: float) -> int:
    """As many as a true *rate* exceeds once in ten thousand times."""
    return next(k for k in range(redraws) if bounds.at_most(k, redraws, rate) > 1 - 1e-4)


@pytest.mark.parametrize("samples", [1000, 3000])
def test_the_path_keeps_its_promise_with_the_measure_search_on(world: World, samples: int) -> None:
    count, saved = broken(ours("path"), world, samples, REDRAWS)

    assert count <= most_broken(REDRAWS, DELTA)
    assert saved > 0.2


def test_what_looks_best_on_the_calibration_samples_breaks_it(world: World) -> None:
    """The count can tell: without a test, more than one redraw in three loses too much."""
    count, _ = broken(best_on_calibration, world, 1000, 100)

    assert count > 33


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("shared", 800),
        ("shared", 4000),
        ("pcee", 4000),
        ("class", 4000),
        ("quota", 4000),
        ("ltt", 800),
        ("ucb", 800),
    ],
)
def test_a_rule_on_a_fixed_family_breaks_it_as_seldom_as_it_says(
    world: World, name: str, samples: int
) -> None:
    """A loose delta, so that a rule that is only nearly valid is found out."""
    delta, redraws = 0.2, 100
    measure, method = next(iter(world.views)), METHODS[name]
    goal = Goal(LEVEL, delta, samples)
    tuning = world.draw(TUNING, 0)[measure]
    family = method.family(tuning, world.costs, goal)
    truth = family.tally(world.views[measure]).drop
    count = 0
    for draw in range(redraws):
        certificate = world.draw(samples, 1 + draw)[measure]
        last = method.rule(family, certificate, tuning, goal)
        # All up to the stop are certified at once.
        count += last is not None and bool((truth[: last + 1] > LEVEL).any())

    assert count <= most_broken(redraws, delta)


def test_both_tests_are_at_work_here(world: World) -> None:
    tuning = world.draw(2000, 0)
    view = next(iter(tuning.values()))
    family = METHODS["path"].family(view, world.costs, Goal(LEVEL, DELTA, 3000))

    assert set(certify.tests(3000, family.tally(view), len(family))) == {"exact", "signed"}


def test_the_populations_hold_policies_on_both_sides_of_the_level(world: World) -> None:
    """Where every policy is harmless, nothing can be broken."""
    view = next(iter(world.views.values()))
    family = METHODS["shared"].family(view, world.costs, Goal(LEVEL, DELTA, 1000))
    drop = family.tally(view).drop

    assert drop.min() <= LEVEL / 2
    assert drop.max() >= 1.5 * LEVEL
    assert np.isfinite(drop).all()
