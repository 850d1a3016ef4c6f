"""Selectors: children are compared at equal filters (or milliseconds) removed, never about so."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.channels import Layer  # noqa: E402
from edgeexit.host.graph import Graph, Group, analyse  # noqa: E402
from edgeexit.host.prune.selectors import (  # noqa: E402
    SELECTORS,
    Child,
    equalise,
    equalise_latency,
    filters_of,
)
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402

pytestmark = pytest.mark.host

SHAPE = (1, 1, 8, 8)


def resnet(blocks: list[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.resnet(channels=1, classes=3, size=[8, 8], stem=[8], widths=[8, 16], blocks=blocks)


def chain(sizes: list[int], filters_per_unit: list[int]) -> Graph:
    """Groups g0, g1, ... of *sizes* units, each unit that many filters (of as many layers)."""
    layers, groups = {}, {}
    for number, (size, cost) in enumerate(zip(sizes, filters_per_unit, strict=True)):
        names = tuple(f"g{number}.{k}" for k in range(cost))
        for name in names:
            layers[name] = Layer(
                name=name,
                kind="conv",
                macs=size,
                exits=("exit0",),
                in_shape=(1, 1, 1, 1),
                out_shape=(1, size, 1, 1),
                inputs=1,
                outputs=size,
            )
        groups[f"g{number}"] = Group(
            name=f"g{number}",
            producers=names,
            norms=(),
            consumers=(),
            size=size,
            places={(name, "out"): np.arange(size)[:, None] for name in names},
            exits=("exit0",),
            block=None,
            head=None,
        )
    return Graph(
        exits=("exit0",), layers=layers, groups=groups, blocks={}, heads={"exit0": ()}, others=()
    )


def scores_of(graph: Graph, seed: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(graph.groups[name].size) for name in names or graph.groups}


def filters_gone(graph: Graph, units: dict[str, np.ndarray]) -> int:
    return sum(len(chosen) * len(graph.groups[name].producers) for name, chosen in units.items())


# ---------------------------------------------------------------- which child


@pytest.mark.parametrize(
    ("blocks", "filters", "kept"), [(0.9, 0.8, "blocks"), (0.1, 0.2, "filters")]
)
def test_the_child_more_similar_to_its_parent_lives_on(blocks, filters, kept) -> None:
    children = [
        Child(kind="filters", similarity=filters),
        Child(kind="blocks", similarity=blocks),
    ]

    assert SELECTORS["everything"].choose(children, [0]).kind == kept


def test_of_equally_similar_children_the_shallower_one_lives_on() -> None:
    children = [Child(kind="filters", similarity=0.7), Child(kind="blocks", similarity=0.7)]

    assert SELECTORS["everything"].choose(children, [0]).kind == "blocks"
    assert SELECTORS["everything"].choose(children[::-1], [0]).kind == "blocks"


def test_a_coin_looks_at_the_seed_and_at_nothing_else() -> None:
    coin = SELECTORS["random-child"]
    alike = [Child(kind="blocks", similarity=0.9), Child(kind="filters", similarity=0.1)]
    other = [Child(kind="filters", similarity=0.9), Child(kind="blocks", similarity=0.1)]
    kept = [coin.choose(alike, [7, 3, 0, step]).kind for step in range(400)]

    assert kept == [coin.choose(other, [7, 3, 0, step]).kind for step in range(400)]
    assert kept != [coin.choose(alike, [8, 3, 0, step]).kind for step in range(400)]
    # Five standard deviations of a fair coin; and no run gets stuck on one side of it.
    assert 150 <= kept.count("blocks") <= 250
    assert 150 <= sum(one != two for one, two in itertools.pairwise(kept)) <= 250
    assert coin.choose(alike[1:], [0]).kind == "filters"


def test_a_selector_of_one_kind_builds_that_kind_alone() -> None:
    assert SELECTORS["filters"].kinds == ("filters",)
    assert SELECTORS["blocks"].kinds == ("blocks",)


# ---------------------------------------------------------------- equal filters


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    count=st.integers(0, 45),
    least=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_exactly_that_many_filters_go_or_it_is_impossible(sizes, count, least, seed) -> None:
    graph = chain(sizes, [1] * len(sizes))
    scores = scores_of(graph, seed)
    possible = sum(max(0, size - least) for size in sizes)

    units = equalise(graph, scores, count, seed=seed, least=least)

    assert (units is None) == (count > possible)
    for name, chosen in (units or {}).items():
        size = graph.groups[name].size
        assert size - len(chosen) >= least
        assert len(chosen) == len(set(chosen.tolist()))
        stay = np.setdiff1d(np.arange(size), chosen)
        assert scores[name][chosen].max() <= scores[name][stay].min()
    if units is not None:
        assert filters_gone(graph, units) == count


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4),
    count=st.integers(0, 40),
)
def test_units_of_several_filters_are_found_whenever_they_add_up(parts, count) -> None:
    sizes, costs = [size for size, _ in parts], [cost for _, cost in parts]
    graph = chain(sizes, costs)
    sums = {0}
    for size, cost in parts:
        sums = {total + k * cost for total in sums for k in range(size)}

    units = equalise(graph, scores_of(graph, 0), count, seed=3)

    assert (units is not None) == (count in sums)
    assert units is None or filters_gone(graph, units) == count


def test_the_same_seed_chooses_the_same_units() -> None:
    graph = chain([9, 9, 9, 9], [1, 1, 1, 1])
    scores = scores_of(graph, 0)

    first, again = (equalise(graph, scores, 14, seed=5) for _ in range(2))
    others = [equalise(graph, scores, 14, seed=seed) for seed in range(6, 16)]

    sizes = [{name: len(chosen) for name, chosen in one.items()} for one in [first, again, *others]]
    assert sizes[0] == sizes[1]
    assert any(one != sizes[0] for one in sizes)


def test_the_first_pass_takes_the_same_share_of_every_group() -> None:
    graph = chain([10, 20, 30], [1, 1, 1])

    units = equalise(graph, scores_of(graph, 0), 30, seed=0)

    assert {name: len(chosen) for name, chosen in units.items()} == {"g0": 5, "g1": 10, "g2": 15}


def made_filters(model: torch.nn.Module) -> int:
    return sum(m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))


def test_layer_child_and_filter_child_lose_equally_many_filters() -> None:
    parent, layer_child, filter_child = (resnet([3, 2]) for _ in range(3))
    graph = analyse(parent, SHAPE)
    inner = [name for name, group in graph.groups.items() if group.block is not None]

    gone = filters_of(graph, graph.blocks["blocks.1"].layers)
    units = equalise(graph, scores_of(graph, 1, inner), gone, seed=1)
    remove_block(layer_child, graph, "blocks.1")
    remove_units(filter_child, graph, units)

    assert filters_of(graph) == made_filters(parent)
    assert made_filters(filter_child) == made_filters(layer_child) == made_filters(parent) - 16


def test_a_block_wider_than_all_that_may_go_has_no_filter_child() -> None:
    graph = chain([8, 8], [1, 1])

    assert equalise(graph, scores_of(graph, 0), 15, seed=0) is None


# ---------------------------------------------------------------- equal milliseconds


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    share=st.floats(0.0, 1.3),
    seed=st.integers(0, 5),
)
def test_the_filter_child_saves_the_asked_time_and_no_unit_more(sizes, share, seed) -> None:
    graph = chain(sizes, [1] * len(sizes))
    scores = scores_of(graph, seed)
    total = float(sum(size - 1 for size in sizes))

    def saved_ms(gone) -> float:
        return float(sum(gone.values()))  # one millisecond a unit

    target = share * total
    units = equalise_latency(graph, scores, target, saved_ms, seed=seed)

    assert (units is None) == (target > total)
    if units is not None:
        saved = saved_ms({name: len(chosen) for name, chosen in units.items()})
        assert saved >= target
        assert saved == 0 or saved - 1 < target


def test_time_is_saved_in_steps_of_what_can_be_removed() -> None:
    graph = chain([5, 5], [2, 3])
    milliseconds = {"g0": 1.0, "g1": 4.0}

    def saved_ms(gone) -> float:
        return sum(milliseconds[name] * number for name, number in gone.items())

    units = equalise_latency(graph, scores_of(graph, 0), 6.0, saved_ms, seed=0)

    assert saved_ms({name: len(chosen) for name, chosen in units.items()}) >= 6.0
