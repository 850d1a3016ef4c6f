"""
The multiple-choice knapsack: one of several widths for each layer, the best sum within a budget.

Callers see best_choices. Hidden here: layer by layer only those ways are kept that no other way
beats in both cost and value; when there are too many, the best of each slice of the budget.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

STATES = 4096  # ways that are kept in mind from one entry to the next


def best_choices(options: Sequence[tuple[Numbers, Numbers]], budget: float) -> list[int] | None:
    """
    For each of *options* the place of the chosen one; None if nothing fits into *budget*.

    An entry of *options* is (costs, values), both (n,) with n >= 1 and costs >= 0. The choices
    add up to the highest value within *budget*: exactly while at most STATES ways are open,
    else at least to the best one for a budget smaller by a STATES-th per entry.
    """
    slack = 1e-12 * max(1.0, budget)
    least = [float(cost.min()) for cost, _ in options]
    cost, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, (costs, values) in enumerate(options):
        count = len(costs)
        all_costs = (cost[:, None] + costs).ravel()
        all_values = (value[:, None] + values).ravel()
        allowed = all_costs <= budget - math.fsum(least[place + 1 :]) + slack
        ways = np.flatnonzero(allowed)
        ways = ways[np.lexsort((-all_values[ways], all_costs[ways]))]
        best = np.maximum.accumulate(all_values[ways])
        better = np.concatenate([[True], best[1:] > best[:-1]]) if len(ways) else np.empty(0, bool)
        ways = ways[better]
        if len(ways) > STATES:
            # Costs and values both rise along *ways*: the last of a slice is its best.
            slices = np.floor(all_costs[ways] * (STATES / budget)).astype(np.int64)
            ways = ways[np.concatenate([slices[1:] > slices[:-1], [True]])]
        trail.append((ways // count, ways % count))
        cost, value = all_costs[ways], all_values[ways]
    if not len(cost):
        return None
    at = int(value.argmax())
    picks = []
    for before, pick in reversed(trail):
        picks.append(int(pick[at]))
        at = int(before[at])
    return picks[::-1]
