"""Medians, bootstrap over processes, quantiles, series and differences: pure statistics."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit import bounds, intervals

times_ns = st.floats(min_value=1e3, max_value=1e9)
ragged = st.lists(st.lists(times_ns, min_size=1, max_size=6), min_size=1, max_size=6)


def measured(
    seed: int = 0, processes: int = 10, blocks: int = 8, luck: float = 0.01, spread: float = 0.01
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    levels = np.exp(luck * rng.normal(size=processes))
    return [1e6 * level * np.exp(spread * rng.normal(size=blocks)) for level in levels]


# ---------------------------------------------------------------- the value


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(times_ns, min_size=n, max_size=n), min_size=1, max_size=6)
    )
)
def test_with_as_many_blocks_in_each_process_it_is_the_median_of_all(
    blocks: list[list[float]],
) -> None:
    assert intervals.pooled_median(blocks) == pytest.approx(np.median(np.concatenate(blocks)))


def test_a_process_with_many_blocks_weighs_no_more_than_another() -> None:
    assert intervals.pooled_median([[1.0], [2.0], [9.0] * 50]) == 2.0


@given(ragged, st.randoms())
def test_the_order_of_processes_and_blocks_does_not_matter(
    blocks: list[list[float]], rng: object
) -> None:
    mixed = [rng.sample(each, len(each)) for each in blocks]  # type: ignore[attr-defined]
    rng.shuffle(mixed)  # type: ignore[attr-defined]

    assert intervals.pooled_median(mixed) == pytest.approx(intervals.pooled_median(blocks))


@given(ragged, st.floats(min_value=0.1, max_value=10))
def test_the_unit_of_time_does_not_matter(blocks: list[list[float]], unit: float) -> None:
    scaled = [[value * unit for value in each] for each in blocks]

    assert intervals.pooled_median(scaled) == pytest.approx(intervals.pooled_median(blocks) * unit)


@given(ragged)
def test_half_of_the_weight_lies_on_either_side(blocks: list[list[float]]) -> None:
    middle = intervals.pooled_median(blocks)
    below = sum(sum(value <= middle for value in each) / len(each) for each in blocks)
    above = sum(sum(value >= middle for value in each) / len(each) for each in blocks)

    assert min(below, above) >= len(blocks) / 2 - 1e-6


# ---------------------------------------------------------------- replicates


@settings(max_examples=30)
@given(ragged)
def test_replicates_stay_between_the_least_and_the_greatest_block(
    blocks: list[list[float]],
) -> None:
    found = intervals.replicates([blocks], count=50)

    assert found.shape == (1, 50)
    assert min(map(min, blocks)) <= found.min() <= found.max() <= max(map(max, blocks))


def test_cases_see_the_same_draws_so_that_ratios_are_paired() -> None:
    blocks = measured(blocks=5)
    twice = [2 * values for values in blocks]
    fewer = [values[:3] for values in blocks]

    ours, theirs, _ = intervals.replicates([blocks, twice, fewer])

    np.testing.assert_allclose(theirs / ours, 2.0)


def test_the_luck_of_processes_cancels_in_paired_ratios() -> None:
    luck = np.random.default_rng(1).normal(0, 0.05, 10)
    ours, theirs = measured(1, luck=0), measured(2, luck=0)
    cases = [[np.exp(k) * v for k, v in zip(luck, case, strict=True)] for case in (ours, theirs)]
    a, b = intervals.replicates(cases)
    (unpaired,) = intervals.replicates(cases[1:], seed=1)

    assert (a / b).std() < 0.5 * (a / unpaired).std()


def test_replicates_follow_the_seed() -> None:
    blocks = measured()
    first, same, other = (intervals.replicates([blocks], seed) for seed in (1, 1, 2))

    assert (first == same).all()
    assert (first != other).any()


@pytest.mark.parametrize("sizes", [(4,) * 6, (3, 4, 5, 6, 9, 12)])
def test_replicates_are_those_of_the_plain_two_stage_bootstrap(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    blocks = [rng.normal(100 + 3 * rng.normal(), 2, size) for size in sizes]

    def once() -> float:
        drawn = [blocks[k] for k in rng.integers(0, len(blocks), len(blocks))]
        return intervals.pooled_median([rng.choice(values, len(values)) for values in drawn])

    plain = np.array([once() for _ in range(1500)])
    found = intervals.replicates([blocks], count=4000)[0]

    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(
        np.quantile(found, shares), np.quantile(plain, shares), atol=0.25 * plain.std()
    )


@pytest.mark.parametrize("cases", [[[[1.0], [2.0]], [[1.0]]], [[[1.0], []]]])
def test_cases_with_other_processes_or_none_of_the_blocks_are_refused(cases: list) -> None:
    with pytest.raises(ValueError, match="same number of processes"):
        intervals.replicates(cases)


# ---------------------------------------------------------------- the interval


def test_few_processes_widen_the_interval_and_many_do_not() -> None:
    draws = np.random.default_rng(0).normal(1, 0.01, 100_000)
    plain = np.quantile(draws, [0.025, 0.975])
    widths = [np.ptp(intervals.interval(draws, n)) / np.ptp(plain) for n in (3, 5, 10, 30, 1000)]

    assert widths == sorted(widths, reverse=True)
    assert widths[2] == pytest.approx(2.262 * math.sqrt(10 / 9) / 1.960, rel=0.03)
    assert widths[4] == pytest.approx(1, abs=0.01)


def test_one_process_says_nothing_about_the_next() -> None:
    assert intervals.interval([1.0, 1.1], 1) == (-math.inf, math.inf)


@pytest.mark.parametrize("share", [0.9, 0.975, 0.999])
def test_students_t_agrees_with_its_closed_forms(share: float) -> None:
    two = (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))

    assert intervals._student(share, 1) == pytest.approx(math.tan(math.pi * (share - 0.5)))
    assert intervals._student(share, 2) == pytest.approx(two)
    assert intervals._student(share, 10**6) == pytest.approx(NormalDist().inv_cdf(share), rel=0.02)


# ---------------------------------------------------------------- quantiles


@pytest.mark.parametrize(("q", "fewest"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_a_quantile_takes_as_many_calls_as_the_binomial_says(q: float, fewest: int) -> None:
    calls = np.random.default_rng(3).exponential(1, fewest)

    assert bounds.fewest_samples(1 - q, 0.975) == fewest
    assert intervals.quantile_interval([calls], q) is not None
    assert intervals.quantile_interval([calls[1:]], q) is None


@given(st.integers(100, 2000), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_ranks_around_a_quantile_miss_it_no_more_often_than_promised(n: int, q: float) -> None:
    found = intervals._quantile_ranks(n, q, 0.025)
    assert found is not None
    low, high = found

    # The quantile lies below rank `low` if fewer than that many calls do, and so on.
    assert bounds.at_most(low - 1, n, q) <= 0.025 < bounds.at_most(low, n, q)
    assert 1 - bounds.at_most(high - 1, n, q) <= 0.025 < 1 - bounds.at_most(high - 2, n, q)


def test_an_outlier_does_not_move_p95() -> None:
    calls = [np.linspace(1, 2, 500)]
    spiked = [np.append(calls[0][:-1], 1e6)]

    assert intervals.quantile_interval(calls, 0.95) == intervals.quantile_interval(spiked, 0.95)


def test_calls_that_resemble_each_other_within_a_process_count_less() -> None:
    rng = np.random.default_rng(2)
    noise = rng.exponential(0.02, (10, 400))
    luck = rng.normal(0, 0.01, (10, 1))

    def width(calls: np.ndarray) -> float:
        found = intervals.quantile_interval(list(calls), 0.95)
        assert found is not None
        value, low, high = found
        assert low <= value <= high
        return high - low

    assert width(1 + noise + luck) > 1.5 * width(1 + noise)


def test_processes_that_differ_more_than_their_calls_have_no_common_p99() -> None:
    calls = [np.linspace(level, level + 0.1, 400) for level in range(1, 11)]

    assert intervals.quantile_interval(calls, 0.99) is None


def test_no_calls_have_no_quantile() -> None:
    assert intervals.quantile_interval([], 0.95) is None
    assert intervals.quantile_interval([[], []], 0.95) is None


# ---------------------------------------------------------------- differences


def test_a_profile_does_not_differ_from_itself() -> None:
    case = [measured(), measured(1)]
    for found in intervals.differences(case, case):
        assert found.ratio == 1
        assert found.low < 1 < found.high
        assert found.chance == 1


def test_swapping_two_profiles_turns_ratios_over() -> None:
    ours, theirs = [measured(1)], [[1.02 * values for values in measured(2)]]
    there, back = (intervals.differences(*pair)[0] for pair in ((ours, theirs), (theirs, ours)))

    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.chance == pytest.approx(back.chance, abs=0.01)
    assert there.low == pytest.approx(1 / back.high, rel=0.01)


def test_the_smallest_chance_of_five_against_five_is_two_of_252() -> None:
    ours = [measured(1, processes=5)]
    theirs = [[2 * values for values in measured(2, processes=5)]]

    assert intervals.differences(ours, theirs)[0].chance == 2 / 252


def test_more_cases_make_no_difference_less_surprising() -> None:
    ours = [measured(k, luck=0.02) for k in range(6)]
    theirs = [[(1.01 + 0.01 * k) * v for v in measured(10 + k, luck=0.02)] for k in range(6)]
    together = intervals.differences(ours, theirs)
    alone = [intervals.differences([a], [b])[0] for a, b in zip(ours, theirs, strict=True)]

    for one, among in zip(alone, together, strict=True):
        assert among.chance >= one.chance - 0.005


def test_cases_that_move_together_cost_no_power() -> None:
    ours = measured(1, luck=0.02)
    theirs = [1.025 * values for values in measured(2, luck=0.02)]
    alone = intervals.differences([ours], [theirs])[0].chance
    among = intervals.differences([ours] * 8, [theirs] * 8)[0].chance

    assert among == pytest.approx(alone)  # Holm would say eight times as much


def test_an_odd_process_neither_makes_nor_hides_a_difference() -> None:
    ours, theirs = measured(1), measured(2)
    slower = [1.05 * values for values in theirs]
    for case in (ours, theirs, slower):
        case[0] = 1.8 * case[0]

    assert intervals.differences([theirs], [ours])[0].chance > 0.05
    assert intervals.differences([slower], [ours])[0].chance < 0.01


def test_one_process_alone_shows_no_difference() -> None:
    found = intervals.differences([[[1.0, 1.1]]], [[[2.0, 2.1]]])[0]

    assert found.chance == 1
    assert found.high == math.inf


def test_profiles_of_other_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="same cases"):
        intervals.differences([measured()], [])
