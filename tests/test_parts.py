"""Parts fitted from paths: exact where costs add up, and honest about what paths cannot tell."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXITS, made_cases, made_profile

from edgeexit.errors import EdgeExitError, UsageError
from edgeexit.parts import fit
from edgeexit.paths import kept_sets
from edgeexit.profile import Profile

NS = st.floats(1e3, 1e7)


@st.composite
def additive(draw: st.DrawFn) -> tuple[Profile, list[float], list[float]]:
    """A profile without noise, its backbone stages and its heads."""
    count = draw(st.integers(2, 6))
    exits = [f"e{k}" for k in range(count)]
    stages = draw(st.lists(NS, min_size=count, max_size=count))
    heads = draw(st.lists(NS, min_size=count, max_size=count))
    return made_profile(stages, heads, exits=exits, blocks=1), stages, heads


def whole_and_alone(exits: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    return [*((exits, name) for name in exits), *(((name,), name) for name in exits)]


def every_path(exits: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    sizes = range(1, len(exits) + 1)
    sets = [kept for size in sizes for kept in itertools.combinations(exits, size)]
    return [(kept, name) for kept in sets for name in kept]


def true_cost(exits, stages, heads, kept, exit) -> float:
    upto = exits.index(exit) + 1
    return sum(stages[:upto]) + sum(
        h for n, h in zip(exits[:upto], heads, strict=False) if n in kept
    )


@settings(max_examples=30, deadline=None)
@given(additive())
def test_without_noise_the_full_set_and_each_exit_alone_price_every_path_exactly(made) -> None:
    profile, stages, heads = made
    parts = fit(profile, whole_and_alone(profile.exits))

    for kept, exit in every_path(profile.exits):
        cost = true_cost(profile.exits, stages, heads, kept, exit)
        assert parts.price(kept, exit).value == pytest.approx(cost, rel=1e-6)
        assert parts.predict(kept)[kept.index(exit)] == parts.price(kept, exit).value
    assert parts.worst_residual < 1e-6


@settings(max_examples=30, deadline=None)
@given(additive())
def test_without_noise_the_parts_are_found_but_for_the_final_head(made) -> None:
    profile, stages, heads = made
    parts = fit(profile)
    scale = sum(stages) + sum(heads)

    for name, stage, head in list(zip(profile.exits, stages, heads, strict=True))[:-1]:
        assert parts.backbone_ns(name).value == pytest.approx(stage, abs=1e-6 * scale)
        assert parts.head_ns(name).value == pytest.approx(head, abs=1e-6 * scale)
    final = parts.backbone_ns(profile.exits[-1])
    assert final.value == pytest.approx(stages[-1] + heads[-1], abs=1e-6 * scale)
    assert parts.head_ns(profile.exits[-1]) is None


def test_noise_of_a_third_between_processes_and_two_percent_within_leaves_three_percent() -> None:
    """The acceptance on simulated costs: every kept set that the fit has not seen."""
    exits = ("a", "b", "c", "d")
    stages, heads = (87e3, 60e3, 52e3, 84e3), (7e3, 8e3, 10e3, 6e3)
    worst = []
    for seed in range(20):
        profile = made_profile(
            *(stages, heads), exits=exits, jitter=0.02, drift=0.005, processes=10, seed=seed
        )
        parts = fit(profile, whole_and_alone(exits))
        worst += [
            abs(found / true_cost(exits, stages, heads, kept, name) - 1)
            for kept in kept_sets(exits)
            for name, found in zip(kept, parts.predict(kept), strict=True)
        ]
    assert np.quantile(worst, 0.99) <= 0.03
    assert np.median(worst) <= 0.01


def test_a_process_that_is_slow_as_a_whole_moves_no_head() -> None:
    calm = made_profile(jitter=0.002, processes=6)
    slow = made_profile(jitter=0.002, processes=6, slow={2: 1.7})

    for name in EXITS[:-1]:
        ours, theirs = fit(slow).head_ns(name), fit(calm).head_ns(name)
        assert ours.value == pytest.approx(theirs.value, rel=0.2)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    stages, heads = (100e3, 80e3, 120e3), (6e3, 9e3, 5e3)
    held = tried = 0
    for seed in range(60):
        profile = made_profile(stages, heads, jitter=0.004, drift=0.01, processes=8, seed=seed)
        parts = fit(profile)
        found = [(parts.backbone_ns("exit0"), stages[0]), (parts.head_ns("exit1"), heads[1])]
        found.append((parts.price(("exit0", "exit2"), "exit2"), sum(stages) + heads[0] + heads[2]))
        for estimate, truth in found:
            tried += 1
            held += estimate.low <= truth <= estimate.high

    assert held / tried >= 0.85


def test_handovers_come_from_the_dissection_and_leave_every_price_as_it_was() -> None:
    plain = fit(made_profile(head=8e3))
    seen = fit(made_profile(head=8e3, handover=3e3))

    assert plain.handover_ns("exit0") is None
    assert plain.input_ns is None
    assert seen.handover_ns("exit0").value == 3e3
    assert seen.head_ns("exit0").value == pytest.approx(5e3, rel=1e-6)
    assert seen.input_ns.value == 2e3
    assert seen.backbone_ns("exit0").value == pytest.approx(98e3, rel=1e-6)
    assert seen.backbone_ns("exit2").value == pytest.approx(105e3, rel=1e-6)
    for kept, exit in every_path(EXITS):
        assert seen.price(kept, exit).value == pytest.approx(plain.price(kept, exit).value)


def test_what_the_paths_do_not_determine_is_none() -> None:
    # As in paced mode: the full set and the final exit alone.
    profile = made_profile(sets=[EXITS, EXITS[-1:]])
    parts = fit(profile)

    assert parts.head_ns("exit0") is None
    assert parts.backbone_ns("exit1") is None
    assert parts.predict(("exit0", "exit2")) is None
    assert parts.predict(EXITS) is not None


def test_one_process_alone_bounds_nothing() -> None:
    price = fit(made_profile(processes=1)).price(("exit1", "exit2"), "exit2")

    assert price.high == float("inf")


def test_costs_that_do_not_add_up_show_in_the_residual() -> None:
    profile = made_profile(surplus={("exit1", "exit2"): 30e3})

    assert fit(profile).worst_residual > 0.02
    assert fit(made_profile()).worst_residual < 1e-9


def test_the_whole_fit_stands_at_the_level_of_the_profile() -> None:
    profile = made_profile(jitter=0.01, drift=0.02, slow={1: 1.3}, processes=7)
    parts = fit(profile)
    ratios = [
        parts.price(case.kept, case.exit).value / profile.value_ns(case) for case in profile.cases
    ]

    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("using", "message"),
    [
        ([], "no path to fit from"),
        ([(("exit0", "exit1"), "exit1")], "was not measured"),
        ([(("nope",), "nope")], "was not measured"),
    ],
)
def test_a_path_that_was_not_measured_is_refused(using, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(made_profile(), using)


@pytest.mark.parametrize(
    ("kept", "exit"),
    [(("exit0", "x"), "exit0"), (("exit0",), "exit1"), ((), "exit0"), (("x",), "x")],
)
def test_unknown_exits_are_refused(kept, exit: str) -> None:
    with pytest.raises(EdgeExitError, match="exit"):
        fit(made_profile()).price(kept, exit)


def test_the_plan_of_paths_determines_every_part_from_two_exits_on() -> None:
    for count in range(1, 9):
        exits = tuple(f"e{k}" for k in range(count))
        profile = made_profile([1e5] * count, exits=exits, blocks=1)
        parts = fit(profile)

        assert len(profile.cases) == len(made_cases(exits))
        assert all(parts.backbone_ns(name) for name in exits)
        assert all(parts.head_ns(name) for name in exits[:-1])
        for kept, _ in every_path(exits)[:200]:
            assert parts.predict(kept) is not None
