"""Schedules end on their target, patience and stability stop when their papers say."""

from itertools import pairwise
from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import UsageError
from edgeexit.host.prune.schedules import (
    SCHEDULES,
    TAU,
    StructureStability,
    exponential,
    geometric,
    hybrid,
    planned,
    similarity,
)

laws = settings(max_examples=25, deadline=None)
shares = st.floats(0.001, 0.999)


@laws
@given(st.sampled_from(list(SCHEDULES)), shares, st.integers(2, 60))
def test_every_schedule_rises_and_ends_on_the_target_exactly(
    name: str, total: float, steps: int
) -> None:
    found = planned(name, total, steps, {})

    assert found[-1] == total
    assert len(found) == (1 if name == "one-shot" else steps)
    assert found[0] > 0
    assert all(one <= other for one, other in pairwise(found))


@laws
@given(shares, st.integers(1, 60))
def test_constant_steps_are_equal(total: float, steps: int) -> None:
    found = [0.0, *planned("constant", total, steps, {})]

    for one, other in pairwise(found):
        assert other - one == pytest.approx(total / steps, rel=1e-6, abs=1e-12)


@laws
@given(shares, st.integers(1, 60))
def test_geometric_steps_are_s_times_one_minus_s_to_the_n_minus_one(
    total: float, steps: int
) -> None:
    found = [0.0, *geometric(total, steps)]
    s = found[1] if steps == 1 else 1 - (1 - total) ** (1 / steps)

    for n in range(1, steps + 1):
        step = s * (1 - s) ** (n - 1)
        assert found[n] - found[n - 1] == pytest.approx(step, rel=1e-6, abs=1e-12)


def test_twenty_steps_of_ten_percent_remove_0_878() -> None:
    total = 0.0
    for _ in range(20):
        total += 0.1 * (1 - total)

    assert total == pytest.approx(0.878, abs=0.001)
    assert geometric(total, 20)[0] == pytest.approx(0.1)
    assert geometric(total, 20)[1] == pytest.approx(0.19)


@laws
@given(shares, st.integers(2, 60), st.floats(0.1, 0.9))
def test_hybrid_shoots_once_and_goes_on_from_what_is_left(
    total: float, steps: int, first: float
) -> None:
    found = hybrid(total, steps, first=first)

    assert found[0] == pytest.approx(first * total)
    left = [1 - share for share in found]
    ratios = [other / one for one, other in pairwise(left)]
    assert ratios == pytest.approx([ratios[0]] * (steps - 1), rel=1e-6)


@laws
@given(shares, st.integers(1, 60))
def test_forces_exponential_densities(total: float, steps: int) -> None:
    expected = [1 - exp(t / steps * log(1 - total)) for t in range(1, steps + 1)]

    assert exponential(total, steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "total", "steps", "options", "words"),
    [
        ("geometrical", 0.5, 2, {}, "no schedule named"),
        ("constant", 0.0, 2, {}, "more than 0"),
        ("constant", 1.0, 2, {}, "less than 1"),
        ("constant", float("nan"), 2, {}, "found nan"),
        ("geometric", 0.5, 0, {}, "steps"),
        ("hybrid", 0.5, 1, {}, "2 steps or more"),
        ("hybrid", 0.5, 2, {"first": 1.0}, "first: expected a share"),
        ("hybrid", 0.5, 2, {"first": "0.7"}, "expected a number"),
        ("constant", 0.5, 2, {"first": 0.7}, "no options"),
    ],
)
def test_a_wrong_plan_is_refused(
    name: str, total: float, steps: int, options: dict, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        planned(name, total, steps, options)


# ---------------------------------------------------------------- stop rules


structures = st.lists(st.integers(0, 50), min_size=3, max_size=3).map(
    lambda units: dict(zip("abc", units, strict=True))
)


@laws
@given(structures, structures)
def test_similarity_is_symmetric_and_one_only_for_equals(one: dict, other: dict) -> None:
    found = similarity(one, other)

    assert 0 <= found <= 1
    assert found == similarity(other, one)
    assert (found == 1) == (one == other)


def test_similarity_is_the_papers() -> None:
    assert similarity({"a": 30, "b": 10}, {"a": 10, "b": 10}) == 1 - (20 / 40 + 0) / 2
    with pytest.raises(UsageError, match="same layers"):
        similarity({"a": 1}, {"b": 1})


def test_a_structure_is_stable_when_it_no_longer_changes() -> None:
    rule = StructureStability(tau=TAU["magnitude"], window=3)
    moving = [{"a": 60 - 10 * k, "b": 8} for k in range(4)]

    found = [rule.take(structure) for structure in moving]

    assert found[:3] == [None] * 3
    expected = sum(similarity(moving[3], moving[j]) for j in range(3)) / 3
    assert found[3] == pytest.approx(expected)
    assert not rule.is_stable
    stable = []
    for _ in range(6):
        rule.take(moving[3])
        stable.append(rule.is_stable)
        again = StructureStability(tau=TAU["magnitude"], window=3)
        again.load(rule.state())
        assert again == rule
    # Only when the whole window shows the same structure.
    assert stable == [False, False, True, True, True, True]


def test_a_falling_indicator_is_not_stable() -> None:
    rule = StructureStability(tau=0.5, window=2)
    for units in (10, 10, 10, 11):
        rule.take({"a": units})

    assert rule.indicators[-1] > 0.5
    assert not rule.is_stable
    with pytest.raises(UsageError, match="tau"):
        StructureStability(tau=1.0)
