"""Allocators: sums are exact, nothing exceeds a layer, order and chance play no part."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import UsageError
from edgeexit.host.prune import knapsack
from edgeexit.host.prune.allocators import (
    ALLOCATORS,
    Bill,
    densities,
    egp,
    erk,
    exponential_budget,
    global_ranking,
    largest_share,
    latency,
    removable,
    uniform,
)

COUNTING = [name for name in ALLOCATORS if name != "latency"]


def a_bill(name: str, size: int, seed: int = 0, **changes) -> Bill:
    rng = np.random.default_rng([seed, size])
    facts = {
        "least": min(1, size),
        "inputs": 4,
        "kernel": (3, 3),
        "weights_per_unit": 36.0,
        "scores": rng.random(size),
        "relevance": float(rng.uniform(0.05, 2)),
        "milliseconds": np.cumsum(np.r_[0.05, rng.uniform(0, 0.1, size)]),
    }
    return Bill(name=name, size=size, **(facts | changes))


@st.composite
def bill_lists(draw: st.DrawFn, longest: int = 6, largest: int = 40) -> list[Bill]:
    bills = []
    for place in range(draw(st.integers(1, longest))):
        size = draw(st.integers(1, largest))
        bills.append(
            a_bill(
                f"layer{place}",
                size,
                seed=draw(st.integers(0, 99)),
                least=draw(st.integers(0, size)),
                cap=draw(st.none() | st.integers(0, size)),
                inputs=draw(st.integers(1, 64)),
                kernel=draw(st.sampled_from([(), (1, 1), (3, 3), (5,)])),
                weights_per_unit=draw(st.sampled_from([1.0, 36.0])),
                relevance=draw(st.sampled_from([0.0, 1e-320, 0.1, 0.5, 0.50001, 3.0, 1e300])),
            )
        )
    return bills


def a_share(bills: list[Bill], part: float) -> float:
    """*part* of what may go from *bills*, as a share of all their units."""
    return part * removable(bills) / sum(bill.size for bill in bills)


laws = settings(max_examples=25, deadline=None)


@laws
@given(st.sampled_from(COUNTING), bill_lists(), st.floats(0, 1))
def test_the_total_is_exact_and_no_layer_gives_more_than_it_may(
    name: str, bills: list[Bill], part: float
) -> None:
    share = a_share(bills, part)

    counts = ALLOCATORS[name](bills, share)

    assert set(counts) == {bill.name for bill in bills}
    assert sum(counts.values()) == math.floor(share * sum(bill.size for bill in bills) + 0.5)
    for bill in bills:
        assert 0 <= counts[bill.name] <= bill.size - bill.least
        assert bill.cap is None or counts[bill.name] <= bill.cap


@laws
@given(st.sampled_from(list(ALLOCATORS)), bill_lists(), st.floats(0, 1), st.randoms())
def test_the_order_of_the_bills_does_not_matter(
    name: str, bills: list[Bill], part: float, random
) -> None:
    free = [a_bill(bill.name, bill.size, scores=np.round(bill.scores, 1)) for bill in bills]
    shuffled = random.sample(free, len(free))
    share = 0.4 * part if name == "latency" else a_share(free, part)
    try:
        expected = ALLOCATORS[name](free, share)
    except UsageError as error:
        with pytest.raises(UsageError) as again:
            ALLOCATORS[name](shuffled, share)
        assert str(again.value) == str(error)
        return

    assert ALLOCATORS[name](shuffled, share) == expected


@laws
@given(
    st.sampled_from(["uniform", "erk", "er", "global"]),
    bill_lists(),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_larger_share_takes_no_less_anywhere(
    name: str, bills: list[Bill], one: float, other: float
) -> None:
    few, many = (ALLOCATORS[name](bills, a_share(bills, part)) for part in sorted((one, other)))

    # Largest remainders may hand a single unit back (the Alabama paradox); a ranking never does.
    # (The exponential budget promises nothing: an emptied layer changes the others' exponents.)
    slack = 0 if name == "global" else 1
    assert all(few[bill] <= many[bill] + slack for bill in few)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_nothing_and_too_much(name: str) -> None:
    bills = [a_bill("a", 16), a_bill("b", 24, least=8)]

    assert ALLOCATORS[name](bills, 0.0) == {"a": 0, "b": 0}
    assert ALLOCATORS[name]([], 0.5) == {}
    for wrong in (1.0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match=r"empty a layer|expected 0 to 1|out of reach"):
            ALLOCATORS[name](bills, wrong)
    with pytest.raises(UsageError, match="a stands twice"):
        ALLOCATORS[name]([bills[0], bills[0]], 0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"least": 9}, "9 of 8 units"),
        ({"cap": -1}, "at most -1"),
        ({"round_to": 0}, "round_to: expected at least 1"),
        ({"scores": np.zeros(7)}, r"scores: found shape \(7,\)"),
        ({"scores": np.full(8, np.nan)}, "scores: NaN"),
        ({"milliseconds": np.zeros(8)}, r"milliseconds: .* expected \(9,\)"),
    ],
)
def test_an_unsound_bill_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=f"conv1: .*{words}|conv1: {words}"):
        a_bill("conv1", 8, **changes)


@laws
@given(st.sampled_from(list(ALLOCATORS)), bill_lists())
def test_the_largest_share_is_within_reach_and_no_larger_one_is(
    name: str, bills: list[Bill]
) -> None:
    share = largest_share(name, bills)
    ALLOCATORS[name](bills, share)

    if share < 0.9:
        with pytest.raises(UsageError, match=r"empty a layer|out of reach"):
            ALLOCATORS[name](bills, share + 0.51 / sum(bill.size for bill in bills))


# ---------------------------------------------------------------- uniform, ERK


@laws
@given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.floats(0, 0.5))
def test_uniform_takes_the_same_share_of_every_layer(sizes: list[int], share: float) -> None:
    bills = [a_bill(f"layer{k}", size) for k, size in enumerate(sizes)]
    exact = math.floor(share * sum(sizes) + 0.5) / sum(sizes)

    counts = uniform(bills, share)

    for bill in bills:
        assert abs(counts[bill.name] - exact * bill.size) < 1 + 1e-9


def test_what_one_layer_cannot_give_the_others_give() -> None:
    bills = [a_bill("a", 100, least=100), a_bill("b", 100), a_bill("c", 100, cap=10)]

    assert uniform(bills, 0.3) == {"a": 0, "b": 80, "c": 10}


def published_erk(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """The loop of VITA-Group/Random_Pruning, CIFAR/sparselearning/core.py, on (out, in, h, w)."""
    dense: set[int] = set()
    while True:
        divisor = right = 0.0
        raw = {}
        for k, shape in enumerate(shapes):
            count = math.prod(shape)
            if k in dense:
                right -= count * (1 - density)
            else:
                right += count * density
                raw[k] = sum(shape) / count
                divisor += raw[k] * count
        epsilon = right / divisor
        if max(raw.values()) * epsilon <= 1:
            return [1.0 if k in dense else epsilon * raw[k] for k in range(len(shapes))]
        dense |= {k for k in raw if raw[k] == max(raw.values())}


@laws
@given(
    st.lists(
        st.tuples(
            st.integers(1, 64), st.integers(1, 64), st.sampled_from([(), (1, 1), (3, 3), (7, 7)])
        ),
        min_size=1,
        max_size=8,
    ),
    st.floats(0.02, 0.98),
)
def test_erk_densities_are_the_published_ones(layers: list, density: float) -> None:
    shapes = [(outputs, inputs, *kernel) for outputs, inputs, kernel in layers]
    bills = [
        a_bill(
            f"layer{k:02}",
            math.prod(shape),
            least=0,
            inputs=shape[1],
            kernel=shape[2:],
            weights_per_unit=1.0,
        )
        for k, shape in enumerate(shapes)
    ]
    total = sum(bill.size for bill in bills)
    removed = math.floor((1 - density) * total + 0.5)

    counts = erk(bills, 1 - density)

    assert sum(counts.values()) == removed
    expected = published_erk(shapes, 1 - removed / total) if removed < total else [0] * len(bills)
    for bill, wanted in zip(bills, expected, strict=True):
        kept = bill.size - counts[bill.name]
        assert kept <= bill.size
        assert abs(kept - wanted * bill.size) < 1 + 1e-6 * bill.size


@laws
@given(st.integers(1, 8), st.integers(0, 10**6), st.floats(0, 1))
def test_densities_meet_the_target_between_their_floors_and_one(
    count: int, seed: int, part: float
) -> None:
    rng = np.random.default_rng(seed)
    raw, sizes = rng.uniform(1e-4, 10, count), rng.integers(1, 10**5, count).astype(float)
    least = np.floor(sizes * rng.choice([0, 0.3, 1], count))
    target = least.sum() + part * (sizes - least).sum()

    found = densities(raw, sizes, least, target)

    assert found @ sizes == pytest.approx(target, rel=1e-9, abs=1e-9)
    assert (found <= 1).all()
    assert (found >= least / sizes - 1e-12).all()
    # One epsilon for all that are free: their densities are in proportion to raw.
    free = (found < 1 - 1e-9) & (found > least / sizes + 1e-9)
    epsilons = found[free] / raw[free]
    assert epsilons == pytest.approx(np.full(free.sum(), epsilons.max(initial=0)), rel=1e-9)


def test_er_leaves_the_kernel_out() -> None:
    bills = [
        a_bill("pointwise", 64, inputs=64, kernel=(1, 1), weights_per_unit=64.0),
        a_bill("spatial", 64, inputs=64, kernel=(3, 3), weights_per_unit=576.0),
    ]

    assert ALLOCATORS["er"](bills, 0.5) == {"pointwise": 32, "spatial": 32}
    counts = ALLOCATORS["erk"](bills, 0.5)
    assert counts["spatial"] > counts["pointwise"]


# ---------------------------------------------------------------- global ranking


@laws
@given(bill_lists(), st.floats(0, 1))
def test_a_ranking_takes_the_lowest_scores(bills: list[Bill], part: float) -> None:
    free = [a_bill(bill.name, bill.size, scores=bill.scores, least=0) for bill in bills]

    counts = global_ranking(free, part, normalise=False)

    gone = [np.sort(bill.scores)[: counts[bill.name]] for bill in free]
    kept = [np.sort(bill.scores)[counts[bill.name] :] for bill in free]
    assert np.concatenate(gone).max(initial=-1) <= np.concatenate(kept).min(initial=2)


def test_of_a_bill_that_may_not_give_all_the_lowest_stand_in_the_ranking() -> None:
    high_first = a_bill("high first", 4, scores=np.array([9.0, 8.0, 1.0, 2.0]), least=2)
    other = a_bill("other", 4, scores=np.array([3.0, 4.0, 5.0, 6.0]), least=0)

    assert global_ranking([high_first, other], 0.5, normalise=False) == {
        "high first": 2,
        "other": 2,
    }


def test_normalised_scores_do_not_know_their_scale() -> None:
    bills = [a_bill("a", 30, seed=1), a_bill("b", 30, seed=2), a_bill("dead", 4, least=2)]
    scaled = [
        a_bill("a", 30, seed=1, scores=1000 * bills[0].scores),
        bills[1],
        a_bill("dead", 4, least=2, scores=np.zeros(4)),
    ]

    counts = global_ranking(scaled, 0.5)

    assert counts["dead"] == 2
    assert counts["a"] == global_ranking([bills[0], bills[1], scaled[2]], 0.5)["a"] > 5
    assert global_ranking(scaled[:2], 0.5, normalise=False) == {"a": 1, "b": 29}


# ---------------------------------------------------------------- the exponential budget


@laws
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 500)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_the_exponential_budget_sums_to_zeta_and_never_exceeds_a_layer(
    layers: list[tuple[float, int]], zeta: float
) -> None:
    relevance, sizes = (np.array(column, float) for column in zip(*layers, strict=True))

    given_up = exponential_budget(relevance, sizes, zeta * sizes.sum())

    assert given_up.sum() == pytest.approx(zeta * sizes.sum(), rel=1e-9, abs=1e-9)
    assert (given_up >= 0).all()
    assert (given_up <= sizes).all()


@laws
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_parts_are_the_published_exponentials(count: int, seed: int) -> None:
    relevance = np.random.default_rng(seed).uniform(0.5, 2, count)
    inverse = relevance.sum() / relevance
    expected = np.exp(inverse - inverse.max())

    given_up = exponential_budget(relevance, np.full(count, 1e9), 100.0)

    assert given_up == pytest.approx(100 * expected / expected.sum(), rel=1e-9)
    assert exponential_budget(7 * relevance, np.full(count, 1e9), 100.0) == pytest.approx(given_up)


def test_the_least_relevant_layer_is_emptied_first_but_for_what_must_stay() -> None:
    bills = [
        a_bill("low", 50, relevance=0.1, least=2),
        a_bill("middle", 50, relevance=0.5),
        a_bill("high", 50, relevance=2.0),
        a_bill("collapsed", 50, relevance=0.0),
    ]

    counts = egp(bills, 0.3)

    assert counts["low"] == 48
    assert counts["middle"] > counts["high"]
    assert counts["collapsed"] == 0
    assert egp(bills, 0.9)["collapsed"] == 180 - 48 - 49 - 49
    with pytest.raises(UsageError, match="low has no relevance"):
        egp([a_bill("low", 50, relevance=None)], 0.5)


# ---------------------------------------------------------------- the latency knapsack


def best_by_trying(bills: list[Bill], budget: float, round_to: int) -> float:
    """The highest kept score of all combinations of widths within *budget* ms."""
    rows = []
    for bill in bills:
        floor = bill.size - bill.room
        widths = {w for w in range(round_to, bill.size, round_to) if w >= floor} | {bill.size}
        scores = np.sort(bill.scores / bill.scores.mean())[::-1]
        rows.append([(float(bill.milliseconds[w]), float(scores[:w].sum())) for w in widths])
    ways = ([sum(part) for part in zip(*way, strict=True)] for way in itertools.product(*rows))
    return max((value for cost, value in ways if cost <= budget + 1e-9), default=-math.inf)


def kept_and_spent(bills: list[Bill], counts: dict[str, int]) -> tuple[float, float]:
    kept = spent = 0.0
    for bill in bills:
        width = bill.size - counts[bill.name]
        kept += float(np.sort(bill.scores / bill.scores.mean())[::-1][:width].sum())
        spent += float(bill.milliseconds[width])
    return kept, spent


@laws
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.integers(0, 90),
    st.sampled_from([1, 4, 8]),
)
def test_the_knapsack_finds_the_best_of_all_combinations(
    sizes: list[int], seed: int, percent: int, round_to: int
) -> None:
    share = percent / 100
    rng = np.random.default_rng(seed)
    bills = [
        a_bill(
            f"layer{k}",
            size,
            seed=seed + k,
            least=int(rng.integers(1, size + 1)) if rng.random() < 0.5 else 1,
            cap=int(rng.integers(0, size + 1)) if rng.random() < 0.5 else None,
            round_to=round_to,
        )
        for k, size in enumerate(sizes)
    ]
    budget = (1 - share) * sum(float(bill.milliseconds[-1]) for bill in bills)
    best = best_by_trying(bills, budget, round_to)
    if best == -math.inf:
        with pytest.raises(UsageError, match="out of reach"):
            latency(bills, share)
        return

    counts = latency(bills, share)

    kept, spent = kept_and_spent(bills, counts)
    assert spent <= budget + 1e-9
    assert kept == pytest.approx(best, rel=1e-9)
    for bill in bills:
        width = bill.size - counts[bill.name]
        assert width == bill.size or (
            width % round_to == 0 and bill.size - bill.room <= width < bill.size
        )


@laws
@given(st.integers(0, 10**6), st.floats(0.1, 0.7), st.integers(40, 120))
def test_with_few_states_the_bound_holds(seed: int, share: float, states: int) -> None:
    bills = [a_bill(f"layer{k}", 24, seed=seed + k, round_to=4) for k in range(4)]
    budget = (1 - share) * sum(float(bill.milliseconds[-1]) for bill in bills)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "STATES", states)
        counts = latency(bills, share)

    kept, spent = kept_and_spent(bills, counts)
    assert spent <= budget + 1e-9
    assert kept >= best_by_trying(bills, budget * (1 - len(bills) / states), 4) - 1e-9


def test_of_ways_that_are_too_many_the_best_of_each_slice_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knapsack, "STATES", 2)
    bills = [
        a_bill(name, len(scores), scores=np.array(scores), milliseconds=np.array(ms), round_to=1)
        for name, scores, ms in [
            ("a", [1.0, 5.0, 6.0], [0.05, 0.1, 0.2, 0.3]),
            ("b", [1.0], [0.05, 0.7]),
            ("c", [0.0, 0.0], [0.05, 0.1, 0.2]),
        ]
    ]

    assert latency(bills, 0.08) == {"a": 0, "b": 0, "c": 1}


def test_a_network_of_many_layers_is_solved_soon() -> None:
    bills = [a_bill(f"layer{k:02}", 256, seed=k) for k in range(60)]

    now = sum(float(bill.milliseconds[-1]) for bill in bills)
    even, budget = kept_and_spent(bills, {bill.name: 128 for bill in bills})

    counts = latency(bills, 1 - budget / now)

    kept, spent = kept_and_spent(bills, counts)
    assert 0.99 * budget < spent <= budget * (1 + 1e-9)
    assert kept > even


def test_latency_needs_a_table() -> None:
    with pytest.raises(UsageError, match="no measured latencies"):
        latency([a_bill("a", 16, milliseconds=None)], 0.1)
