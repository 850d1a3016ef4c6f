"""
Which child of a step lives on: the network without some filters, or the one without a block.

Callers see SELECTORS and equalise. "Pruning Everything, Everywhere, All at Once" (arXiv
2506.04513) lets each step build a layer child and a filter child that have lost equally many
filters, and keeps the one more similar to their parent; a coin in place of that is the control.
Nothing here looks at data: similarities and savings are handed over. The surprise: where a unit
is several filters (channels on a shortcut, depthwise layers), not every number of filters can be
removed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.host.graph import Graph

Units = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Child:
    """One network that a step built: its *kind*, and its *similarity* to the parent, 0..1."""

    kind: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Selector:
    """
    The *kinds* of children, "blocks" or "filters", that every step builds; which of them stays.

    With *by_chance* that is drawn, each child as probably as the other; else they are compared.
    """

    kinds: tuple[str, ...]
    by_chance: bool = False

    def choose(self, children: Sequence[Child], seed: Sequence[int]) -> Child:
        """
        The child most similar to the parent, of equal ones the first of *kinds*.

        Or one drawn from *seed* alone: neither similarities nor the order of *children* matter.
        """
        order = sorted(children, key=lambda child: self.kinds.index(child.kind))
        if self.by_chance:
            return order[int(np.random.default_rng(list(seed)).integers(len(order)))]
        return max(order, key=lambda child: child.similarity)


# Blocks first: depth is what saves time, so it wins where similarity does not tell.
SELECTORS: dict[str, Selector] = {
    "filters": Selector(kinds=("filters",)),
    "blocks": Selector(kinds=("blocks",)),
    "everything": Selector(kinds=("blocks", "filters")),
    "random-child": Selector(kinds=("blocks", "filters"), by_chance=True),
}


def filters_of(graph: Graph, layers: Iterable[str] | None = None) -> int:
    """Output channels of *layers* (default: of all but those that make logits)."""
    if layers is None:
        logits = {head[-1] for head in graph.heads.values() if head}
        layers = [name for name in graph.layers if name not in logits]
    return sum(graph.layers[name].outputs for name in layers)


def equalise(
    graph: Graph,
    scores: Mapping[str, NDArray[np.float64]],
    count: int,
    seed: int,
    least: int = 1,
) -> Units | None:
    """
    The units (group -> indices) whose removal takes exactly *count* filters, or None.

    *scores* (group -> (size,), low goes first) names the groups that may be pruned; *least* units
    stay in each. As published: of each group of n units round(p n) go, p being the share of
    *count* in all filters; then, one by one, the unit with the lowest score of a group drawn by
    chance from *seed*. A group from which a unit would leave a rest that cannot be reached is not
    drawn. None if no choice gives *count*.
    """
    pool = _Pool(graph, scores, least)
    share = count / max(1, filters_of(graph))
    for rounding in (round, math.floor, _nothing):
        taken = {
            name: min(int(rounding(share * size)), pool.most[name])
            for name, size in pool.sizes.items()
        }
        rest = count - sum(pool.costs[name] * number for name, number in taken.items())
        if rest >= 0 and _sums(pool.left(taken), rest) >> rest & 1:
            break
    else:
        return None
    rng = np.random.default_rng(seed)
    while rest:
        name = pool.draw(taken, rest, rng)
        taken[name] += 1
        rest -= pool.costs[name]
    return {
        name: np.sort(np.argsort(scores[name], kind="stable")[:number])
        for name, number in taken.items()
        if number
    }


def equalise_latency(
    graph: Graph,
    scores: Mapping[str, NDArray[np.float64]],
    target_ms: float,
    saved_ms: Callable[[Mapping[str, int]], float],
    *,
    seed: int,
    least: int = 1,
) -> Units | None:
    """
    As equalise, but so many filters that *saved_ms* (units removed per group) is *target_ms*.

    Exact up to one unit: the result saves *target_ms* or more, and the next smaller number of
    filters that can be removed saves less. None if all that may go does not save that much.
    """
    pool = _Pool(graph, scores, least)
    nothing = dict.fromkeys(pool.sizes, 0)
    everything = sum(pool.costs[name] * most for name, most in pool.most.items())
    sums = _sums(pool.left(nothing), everything)
    counts = [count for count in range(everything + 1) if sums >> count & 1]

    def attempt(number: int) -> tuple[Units, float]:
        units = equalise(graph, scores, counts[number], seed=seed, least=least) or {}
        return units, saved_ms({name: len(chosen) for name, chosen in units.items()})

    low, high = 0, len(counts) - 1
    best, saved = attempt(high)
    if saved < target_ms:
        return None
    if attempt(low)[1] >= target_ms:
        return {}
    while high - low > 1:  # low saves too little, high enough
        middle = (low + high) // 2
        units, saved = attempt(middle)
        if saved >= target_ms:
            high, best = middle, units
        else:
            low = middle
    return best


def _nothing(_number: float) -> int:
    return 0


class _Pool:
    """What may go from each group, and how many filters one unit of it is."""

    def __init__(self, graph: Graph, scores: Mapping[str, NDArray[np.float64]], least: int) -> None:
        groups = {name: graph.groups[name] for name in scores}
        self.sizes = {name: group.size for name, group in groups.items()}
        self.most = {name: max(0, size - least) for name, size in self.sizes.items()}
        self.costs = {
            name: sum(group.places[producer, "out"].shape[1] for producer in group.producers)
            for name, group in groups.items()
        }

    def left(self, taken: Mapping[str, int]) -> dict[int, int]:
        """Filters per unit -> how many such units can still go."""
        left: dict[int, int] = {}
        for name, cost in self.costs.items():
            left[cost] = left.get(cost, 0) + self.most[name] - taken[name]
        return left

    def draw(self, taken: Mapping[str, int], rest: int, rng: np.random.Generator) -> str:
        """A group of which one more unit can go so that the rest can still be reached."""
        left = self.left(taken)
        fitting = {
            cost
            for cost, number in left.items()
            if number
            and cost <= rest
            and _sums({**left, cost: number - 1}, rest) >> rest - cost & 1
        }
        able = [
            name
            for name, cost in self.costs.items()
            if cost in fitting and taken[name] < self.most[name]
        ]
        return able[int(rng.integers(len(able)))]


def _sums(left: Mapping[int, int], most: int) -> int:
    """Bit k is set where some of the units *left* (cost -> number) cost k together, k <= most."""
    sums, limit = 1, (1 << most + 1) - 1
    for cost, number in left.items():
        step = 1
        while number > 0:
            now = min(step, number)
            sums |= sums << cost * now & limit
            number, step = number - now, 2 * step
    return sums
