"""
How many units go from where: a share of the whole turned into a number per group.

Callers see Bill, removable, ALLOCATORS and ESTIMATOR_OF. An allocator says how many, never which:
of each bill the units with the lowest scores go. A bill may stand for a group of channels or for a
weight tensor, whose units are its single weights. Every allocator but "latency" removes exactly
round(share * all units), so that different ones can be compared at equal numbers; "latency"
saves a share of the milliseconds. Results depend neither on the order of the bills nor on chance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import UsageError
from edgeexit.host.prune.knapsack import best_choices

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """
    One group (or one weight tensor) as an allocator sees it; UsageError if it is not sound.

    *size* units now, of which *least* must stay and at most *cap* may go. *inputs* (fan-in
    channels) and *kernel* (such as (3, 3); () of a linear layer) are of its first producer,
    *weights_per_unit* is 1 where the units are single weights. *scores* (size,), low goes
    first; *relevance* of the whole layer (NEPENTHE); *milliseconds* (size + 1,): measured
    latency of the layers concerned with k units, of which "latency" looks at multiples of
    *round_to*.
    """

    name: str
    size: int
    least: int
    inputs: int
    kernel: tuple[int, ...]
    weights_per_unit: float
    scores: Numbers
    relevance: float | None = None
    cap: int | None = None
    milliseconds: Numbers | None = None
    round_to: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.size or (self.cap is not None and self.cap < 0):
            raise UsageError(
                f"{self.name}: {self.least} of {self.size} units must stay and at most {self.cap} "
                "may go: expected numbers from 0 to all"
            )
        if self.round_to < 1:
            raise UsageError(f"{self.name}: round_to: expected at least 1, found {self.round_to}")
        _check_values(f"{self.name}: scores", self.scores, self.size)
        if self.milliseconds is not None:
            _check_values(f"{self.name}: milliseconds", self.milliseconds, self.size + 1)

    @property
    def room(self) -> int:
        """The most units that may go."""
        free = self.size - self.least
        return free if self.cap is None else min(free, self.cap)


Allocator = Callable[[Sequence[Bill], float], dict[str, int]]


def _check_values(what: str, values: Numbers, count: int) -> None:
    if values.shape != (count,):
        raise UsageError(f"{what}: found shape {values.shape}, expected ({count},)")
    if not np.isfinite(values).all():
        raise UsageError(
            f"{what}: NaN or infinite, expected finite numbers",
            hint="check the network's weights: a training that failed leaves such numbers",
        )


def removable(bills: Sequence[Bill]) -> int:
    """The most units that may go from all *bills* together."""
    return sum(bill.room for bill in bills)


def largest_share(allocator: str, bills: Sequence[Bill]) -> float:
    """The largest share that *allocator* can take from *bills*: of units, or of milliseconds."""
    if allocator == "latency":
        spent = [_widths(bill)[1] for bill in bills]
        now = sum(float(ms[0]) for ms in spent)
        return 1 - sum(float(ms.min()) for ms in spent) / now if now > 0 else 0.0
    units = sum(bill.size for bill in bills)
    return removable(bills) / units if units else 0.0


def uniform(bills: Sequence[Bill], share: float) -> dict[str, int]:
    """
    The same share everywhere, rounded by largest remainders.

    What a bill cannot give the others give, in equal shares. UsageError as for every
    allocator: a *share* outside 0..1, or more than may go.
    """
    bills, total = _opened(bills, share)
    return _thinned(bills, np.ones(len(bills)), total)


def erk(bills: Sequence[Bill], share: float, *, kernels: bool = True) -> dict[str, int]:
    """
    Densities after Erdős-Rényi-Kernel: wide layers lose a larger share than narrow ones.

    density = epsilon * (n_in + n_out + k_w + k_h) / (n_in * n_out * k_w * k_h), without the
    kernel's terms if not *kernels* (ER); epsilon is what meets the total when no density exceeds
    1 and none falls below what must stay (Evci et al. 2020; Liu et al. 2022, arXiv 2202.02643).
    """
    bills, total = _opened(bills, share)
    return _thinned(bills, np.array([_erdos_renyi(bill, kernels) for bill in bills]), total)


def _erdos_renyi(bill: Bill, kernels: bool) -> float:
    fan_in = bill.inputs * math.prod(bill.kernel)
    # Where the units are single weights, the layer's outputs are the weights over the fan-in.
    outputs = bill.size / fan_in if bill.weights_per_unit == 1 else bill.size
    if not kernels:
        return (bill.inputs + outputs) / (bill.inputs * outputs)
    return (bill.inputs + outputs + sum(bill.kernel)) / (fan_in * outputs)


def global_ranking(
    bills: Sequence[Bill], share: float, *, normalise: bool = True
) -> dict[str, int]:
    """
    The lowest scores of all, wherever they stand.

    With *normalise* scores count in units of their bill's mean |score|: scores of different
    layers need not be of one scale. Ties go by name, then by place.
    """
    bills, total = _opened(bills, share)
    scores, owners = [np.empty(0)], [np.empty(0, np.int64)]
    for place, bill in enumerate(bills):
        found = _scaled(bill) if normalise else bill.scores
        scores.append(np.sort(found)[: bill.room])
        owners.append(np.full(bill.room, place))
    first = np.argsort(np.concatenate(scores), kind="stable")[:total]
    counts = np.bincount(np.concatenate(owners)[first], minlength=len(bills))
    return _named(bills, counts)


def _scaled(bill: Bill) -> Numbers:
    scale = float(np.abs(bill.scores).mean()) if bill.size else 0.0
    return bill.scores / scale if scale > 0 else bill.scores


def egp(bills: Sequence[Bill], share: float) -> dict[str, int]:
    """
    The exponential budget over the layers' relevance: the least relevant is emptied first.

    Counted in units, and a layer counts as empty when only what must stay is left: the
    published rule can cut a network in two. Bills of relevance 0 are collapsed already; they
    give, in equal shares, only what the others cannot. See exponential_budget.
    """
    bills, total = _opened(bills, share)
    missing = [bill.name for bill in bills if bill.relevance is None]
    if missing:
        raise UsageError(
            f"allocator egp: {missing[0]} has no relevance",
            hint="only layers with an activation behind them have one: leave the others out",
        )
    relevance = np.array([bill.relevance for bill in bills], float)
    rooms = np.array([bill.room for bill in bills], np.int64)
    alive = relevance > 0
    budget = min(total, int(rooms[alive].sum()))
    wants = np.zeros(len(bills))
    wants[alive] = exponential_budget(relevance[alive], rooms[alive].astype(float), budget)
    counts = _rounded(wants, rooms, budget)
    collapsed = [bill for bill, is_alive in zip(bills, alive, strict=True) if not is_alive]
    rest = _thinned(collapsed, np.ones(len(collapsed)), total - budget)
    return _named(bills, counts) | rest


def exponential_budget(relevance: Numbers, sizes: Numbers, budget: float) -> Numbers:
    """
    How much of *budget* each layer gives up: (layers,), sums to it, nowhere above *sizes*.

    *relevance* (layers,) > 0. With R_l = sum(r) / r_l, layer l's part is in proportion to
    exp(R_l - max R). A layer whose part exceeds it is emptied and leaves the sums; then again
    (EGP, arXiv 2308.06619, and NEPENTHE, arXiv 2404.16890: the budget of an iteration).
    """
    given = np.zeros(len(relevance))
    open_ = np.flatnonzero(sizes > 0)
    left = min(float(budget), float(sizes.sum()))
    while len(open_) and left > 0:
        part = relevance[open_]
        with np.errstate(over="ignore", divide="ignore"):
            inverse = np.minimum((part / part.max()).sum() / (part / part.max()), 1e300)
        weight = np.exp(inverse - inverse.max())
        wants = left * (weight / weight.sum())
        excess = wants - sizes[open_]
        worst = int(excess.argmax())
        if excess[worst] <= 0:
            given[open_] = wants
            return given
        full = open_[worst]
        given[full] = sizes[full]
        left = min(left - sizes[full], float(np.delete(sizes[open_], worst).sum()))
        open_ = np.delete(open_, worst)
    return given


def latency(bills: Sequence[Bill], share: float) -> dict[str, int]:
    """
    The widths that keep the highest total score within 1 - *share* of the bills' milliseconds.

    Widths are the present one and multiples of the bills' round_to (HALP, Shen et al. 2022, arXiv
    2110.10811); scores are scaled as in global_ranking. See knapsack.best_choices for how near
    the best this comes. UsageError if the budget is out of reach.
    """
    bills, _ = _opened(bills, share, counted=False)
    if share == 0 or not bills:
        return dict.fromkeys((bill.name for bill in bills), 0)
    options = [_widths(bill) for bill in bills]
    now = sum(float(ms[0]) for _, ms, _ in options)
    budget = (1 - share) * now
    chosen = best_choices([(ms, value) for _, ms, value in options], budget)
    if chosen is None:
        raise UsageError(
            f"saving {share:.1%} of {now:.3f} ms is out of reach: "
            f"at most {largest_share('latency', bills):.1%} can go",
            hint="ask for less, let blocks go too, or round to smaller steps",
        )
    widths = [int(widths[pick]) for (widths, _, _), pick in zip(options, chosen, strict=True)]
    return {bill.name: bill.size - width for bill, width in zip(bills, widths, strict=True)}


def _widths(bill: Bill) -> tuple[NDArray[np.int64], Numbers, Numbers]:
    """The widths that *bill* may take, the present one first; their milliseconds and scores."""
    if bill.milliseconds is None:
        raise UsageError(
            f"allocator latency: {bill.name} has no measured latencies",
            hint="measure a latency table on this machine first",
        )
    lowest = -(-(bill.size - bill.room) // bill.round_to) * bill.round_to
    steps = range(lowest, bill.size, bill.round_to)
    widths = np.array([bill.size, *(width for width in steps if width > 0)], np.int64)
    best_first = np.sort(_scaled(bill))[::-1]
    kept = np.concatenate([[0.0], np.cumsum(best_first)])
    return widths, bill.milliseconds[widths], kept[widths]


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "erk": erk,
    "er": lambda bills, share: erk(bills, share, kernels=False),
    "global": global_ranking,
    "egp": egp,
    "nepenthe": egp,
    "latency": latency,
}
# Those that look at the layers' relevance, and how its state entropy is estimated.
ESTIMATOR_OF = {"egp": "egp", "nepenthe": "nepenthe"}


# ---------------------------------------------------------------- shared


def _opened(bills: Sequence[Bill], share: float, *, counted: bool = True) -> tuple[list[Bill], int]:
    """The bills by name, and how many of their units a *share* is."""
    if not 0 <= share <= 1:
        raise UsageError(f"share to remove: expected 0 to 1, found {share}")
    ordered = sorted(bills, key=lambda bill: bill.name)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            raise UsageError(f"{one.name} stands twice among what can be removed")
    units = sum(bill.size for bill in ordered)
    total = math.floor(share * units + 0.5)
    if counted and total > removable(ordered):
        raise UsageError(
            f"removing {total} of {units} units would empty a layer: "
            f"at most {removable(ordered)} may go",
            hint="ask for less, or let more units go",
        )
    return ordered, total


def _named(bills: Sequence[Bill], counts: NDArray[np.int64]) -> dict[str, int]:
    return {bill.name: int(count) for bill, count in zip(bills, counts, strict=True)}


def _thinned(bills: Sequence[Bill], raw: Numbers, total: int) -> dict[str, int]:
    """Remove *total* units so that densities are in proportion to *raw* (bills,) where they can."""
    if not bills:
        return {}
    sizes = np.array([bill.size for bill in bills], np.int64)
    rooms = np.array([bill.room for bill in bills], np.int64)
    kept = densities(
        raw, sizes.astype(float), (sizes - rooms).astype(float), float(sizes.sum() - total)
    )
    return _named(bills, _rounded(sizes * (1 - kept), rooms, total))


def densities(raw: Numbers, sizes: Numbers, least: Numbers, target: float) -> Numbers:
    """
    min(1, epsilon * raw), but nowhere below least / sizes, with sum(density * sizes) = target.

    All (layers,), *raw* > 0, *least* <= *sizes*. The sum rises piecewise linearly with epsilon:
    it is solved at its kinks, without iterations.
    """
    floors = np.where(sizes > 0, least / np.maximum(sizes, 1), 0.0)

    def at(epsilon: Numbers) -> Numbers:
        return np.clip(epsilon[:, None] * raw, floors, 1.0)

    kinks = np.unique(np.concatenate([[0.0], floors / raw, 1 / raw]))
    sums = at(kinks) @ sizes
    right = min(int(np.searchsorted(sums, target)), len(kinks) - 1)
    left = max(right - 1, 0)
    rise = sums[right] - sums[left]
    part = (target - sums[left]) / rise if rise > 0 else 1.0
    epsilon = kinks[left] + np.clip(part, 0, 1) * (kinks[right] - kinks[left])
    solved: Numbers = at(np.array([epsilon]))[0]
    return solved


def _rounded(wants: Numbers, rooms: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole numbers near *wants* (largest remainders first) with sum *total*, none over *rooms*."""
    counts = np.clip(np.floor(wants + 1e-9).astype(np.int64), 0, rooms)
    while (left := total - int(counts.sum())) != 0:
        step = 1 if left > 0 else -1
        free = np.flatnonzero(counts < rooms if step > 0 else counts > 0)
        by_need = free[np.argsort(-step * (wants[free] - counts[free]), kind="stable")]
        counts[by_need[: abs(left)]] += step
    return counts
