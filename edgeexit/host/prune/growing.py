"""
Growing regularization: units pushed to zero by an L2 factor that only grows (GReg-1, GReg-2).

Callers see Growing. Hidden here: how a short run still reaches the end of a growth that the
paper spreads over a hundred thousand iterations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.graph import Group
from edgeexit.host.prune.phase import (
    Facts,
    Phase,
    Scores,
    Units,
    magnitudes,
    number,
    read,
)


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """
    Wang et al., "Neural Pruning via Growing Regularization" (arXiv 2012.09243), with the numbers
    of their code: every *every* iterations the factor grows by *delta* up to *limit*, or until
    kept units are *ratio* times as large as the others.

    Without *units* in the facts, *share* of each group is chosen. The remaining *settle* of the
    iterations lets the weights come to rest; GReg-2 spends *picking* of them with *pick_delta* up
    to *pick_limit* on all units, then gives those kept the factor *recover*.
    """

    every: int = number(10, 1)
    delta: float | None = number(None, 1e-12, 1.0)
    limit: float = number(1.0, 1e-6, 1.0)
    ratio: float = number(1000.0, 1.0)
    share: float = number(0.0, 0.0, 1.0)
    settle: float = number(0.1, 0.0, 0.9)
    picking: float = number(0.1, 0.01, 0.9)
    pick_delta: float | None = number(None, 1e-12, 1.0)
    pick_limit: float = number(0.01, 1e-9, 1.0)
    recover: float = number(-1e-4, -1.0, 0.0)


# A growth that is fitted into a short run still has about this many steps.
_STEPS_OF_GROWTH = 50


class Growing(Phase):
    """
    GReg: an L2 factor on the units to remove that only grows (grad += factor * w).

    With *picks* (GReg-2) it first grows on all units; where the loss is curved weights resist,
    and the smallest are chosen afterwards. Unlike the authors' it also acts on the units' biases
    and batch norms, which would undo the shrinking of a filter; the ratio is that of the moment.
    """

    def __init__(self, facts: Facts, name: str, *, picks: bool) -> None:
        super().__init__()
        options = read(GrowthOptions, facts, name)
        self.model, self.options = facts.model, options
        counts = _counts(facts, options.share, name)
        self.groups = {key: facts.graph.groups[key] for key in counts}
        self.counts = counts
        self.factors = {
            key: torch.zeros(group.size, dtype=torch.float64) for key, group in self.groups.items()
        }
        self.finished: set[str] = set()
        self.picked: Units = {}
        if not picks:
            self.picked = _sorted(facts.units) if facts.units else self._smallest()
        self.every, self.delta, self.pick_delta = _growth(options, facts.iterations, picks=picks)

    def after_backward(self) -> None:
        """Grow the factors if it is time, then add them to the gradients."""
        if self.iteration % self.every == 0:
            for name in self.groups:
                self._grow(name)
        for name, group in self.groups.items():
            _push(self.model, group, self.factors[name])
        self.iteration += 1

    def _grow(self, name: str) -> None:
        factors, options = self.factors[name], self.options
        if name not in self.picked:
            factors += self.pick_delta
            if float(factors.max()) < options.pick_limit * (1 - 1e-9):
                return
            order = np.argsort(self._magnitudes(name), kind="stable")
            self.picked[name] = np.sort(order[: self.counts[name]])
            factors.fill_(options.recover)
            factors[self.picked[name]] = options.pick_limit
        elif name not in self.finished:
            gone = self.picked[name]
            factors[gone] = (factors[gone] + self.delta).clamp(max=options.limit)
            is_far = self._ratio(name) > options.ratio
            if is_far or float(factors.max()) >= options.limit:
                self.finished.add(name)

    def _ratio(self, name: str) -> float:
        sizes = self._magnitudes(name)
        gone = np.isin(np.arange(len(sizes)), self.picked[name])
        return float(sizes[~gone].mean() / max(float(sizes[gone].mean()), 1e-300))

    def _magnitudes(self, name: str) -> NDArray[np.float64]:
        return magnitudes(self.model, self.groups[name])

    def _smallest(self) -> Units:
        orders = {name: np.argsort(self._magnitudes(name), kind="stable") for name in self.groups}
        return {name: np.sort(order[: self.counts[name]]) for name, order in orders.items()}

    def chosen(self) -> Units:
        """The units picked; before GReg-2 has picked, the smallest so far."""
        return {name: units.copy() for name, units in {**self._smallest(), **self.picked}.items()}

    def scores(self) -> Scores:
        """Mean |w| of each unit's filters; picked units come before all others."""
        scores = {}
        for name in self.groups:
            scores[name] = self._magnitudes(name)
            gone = self.picked.get(name, np.empty(0, np.int64))
            scores[name][gone] -= scores[name].max() + 1.0
        return scores

    def state(self) -> dict[str, Any]:
        """Iteration, factors, what was picked and what has finished."""
        return {
            "iteration": self.iteration,
            "factors": {name: factors.clone() for name, factors in self.factors.items()},
            "picked": {name: units.tolist() for name, units in self.picked.items()},
            "finished": sorted(self.finished),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state gave; KeyError or ValueError if it is of another network."""
        factors = {name: state["factors"][name].double() for name in self.groups}
        for name, group in self.groups.items():
            if factors[name].shape != (group.size,):
                raise ValueError(f"{name}: factors of {len(factors[name])} units")
        self.iteration = int(state["iteration"])
        self.factors = {name: one.clone() for name, one in factors.items()}
        picked = state["picked"]
        self.picked = {name: np.array(picked[name], np.int64) for name in picked}
        self.finished = set(state["finished"])


def _counts(facts: Facts, share: float, phase: str) -> dict[str, int]:
    """Group -> how many of its units are to go."""
    groups = facts.graph.groups
    if not facts.units:
        if not share:
            raise UsageError(f"phase {phase}: neither units nor the option share say what shall go")
        # As the authors' code rounds: up, but one unit stays.
        counts = {n: min(math.ceil(share * g.size), g.size - 1) for n, g in groups.items()}
    else:
        counts = {name: len(np.unique(units)) for name, units in facts.units.items()}
    for name, count in counts.items():
        if count and count >= groups[name].size:
            raise UsageError(f"phase {phase}: all {count} units of {name} would go")
    return {name: count for name, count in counts.items() if count}


def _sorted(units: Mapping[str, NDArray[np.int64]]) -> Units:
    return {name: np.unique(indices) for name, indices in units.items() if len(indices)}


def _growth(
    options: GrowthOptions, iterations: int | None, *, picks: bool
) -> tuple[int, float, float]:
    """How often factors grow, by how much, and by how much while picking."""
    every = options.every
    delta, pick_delta = options.delta or 1e-4, options.pick_delta or 1e-5
    if iterations is None:
        return every, delta, pick_delta
    every = min(every, max(1, iterations // _STEPS_OF_GROWTH))
    times = max(1, iterations // every)
    pick_times = max(1, int(times * options.picking)) if picks else 0
    grow_times = max(1, int(times * (1 - options.settle)) - pick_times)
    span = options.limit - (options.pick_limit if picks else 0.0)
    return (
        every,
        options.delta or max(span, 1e-12) / grow_times,
        options.pick_delta or options.pick_limit / max(1, pick_times),
    )


def _push(model: nn.Module, group: Group, factors: torch.Tensor) -> None:
    """Add factor * w to the gradients of all weights that make the units of *group*."""
    for (name, side), positions in group.places.items():
        if side == "in":
            continue
        for weight in model.get_submodule(name).parameters(recurse=False):
            if weight.grad is None:
                continue
            rows = torch.from_numpy(positions).reshape(-1)
            spread = torch.zeros(len(weight), dtype=torch.float64)
            spread[rows] = factors.repeat_interleave(positions.shape[1])
            spread = spread.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
            weight.grad.add_(spread * weight.detach())
