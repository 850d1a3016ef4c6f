"""
Polarized gates: binary gates on units or blocks, trained until all samples agree on them.

Callers see Polarized. Hidden here: where a gate must stand so that a closed one is exactly the
removal of its unit or block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.graph import Block, Group
from edgeexit.host.prune.phase import (
    Facts,
    Phase,
    Scores,
    Units,
    ascending,
    magnitudes,
    number,
    read,
)


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """
    Zhi et al., one-pass pruning with polarization (arXiv 2302.10798), whose code is not public.

    *share* of the gates shall close (default: that of the facts' units, else a half); *over* is 1
    for units, 2 for blocks, 3 for both (default: units, or blocks if the facts name no unit).
    *polarize* and *sparsity* weigh the two terms of the loss, the first one growing from 0 over
    half of the iterations; *rate* is the gates' own learning rate (Adam; default 0.01, more in
    short runs).
    """

    share: float | None = number(None, 0.0, 1.0)
    over: int | None = number(None, 1, 3)
    polarize: float = number(1.5, 0.0)
    sparsity: float = number(0.5, 0.0)
    rate: float | None = number(None, 1e-6, 1.0)


class _Gates:
    """
    The gates of one group, or of one block: a linear layer on what it sees, on or off.

    *sizes* rank them at the start; at least *least* stay open.
    """

    def __init__(
        self,
        inputs: int,
        sizes: NDArray[np.float64],
        model: nn.Module,
        seed: Sequence[int],
        least: int,
    ) -> None:
        self.least = least
        size, some = len(sizes), next(model.parameters())
        drawn = np.random.default_rng(list(seed)).normal(size=(size, inputs)) * 0.3
        self.weight = torch.tensor(drawn).to(some).requires_grad_()
        order = sizes.argsort(kind="stable").argsort(kind="stable")
        self.bias = torch.tensor(0.5 + (order + 0.5) / size).to(some).requires_grad_()
        self.average = torch.ones(size, dtype=torch.float64)
        self.now: torch.Tensor | None = None  # (N, size), of the forward under way
        self.batch: torch.Tensor | None = None  # (size,), averaged over the last training batch

    def of(self, seen: torch.Tensor) -> torch.Tensor:
        """Gates (N, size) for what they *see* (N, inputs), once per forward."""
        if self.now is None or len(self.now) != len(seen):
            if torch.is_grad_enabled():
                seen = seen.detach()
                if seen.shape[1] > 1:
                    seen = nn.functional.layer_norm(seen, seen.shape[1:]) / seen.shape[1] ** 0.5
                soft = torch.sigmoid(seen @ self.weight.T + self.bias)
                # Straight-through (Bengio et al. 2013): hard forward, the sigmoid's slope back.
                self.now = (soft > 0.5).to(soft) + soft - soft.detach()
                self.batch = self.now.mean(0)
            else:
                self.now = self.is_open().to(seen).expand(len(seen), -1)
        return self.now

    def is_open(self) -> torch.Tensor:
        """The static network's gates (size,)."""
        opened = self.average >= 0.5
        opened[self.average.argsort(descending=True, stable=True)[: self.least]] = True
        return opened


class Polarized(Phase):
    """
    Binary gates that choose per sample while training, pushed until all samples agree.

    Likely form of the paper's loss: polarize * sum g(1 - g) + sparsity * n (mean g - open)^2 with g
    the n gates' averages over the batch. A unit's gate multiplies what its consumers read, so a
    gate that is closed for all is its removal, exactly, and one that is open leaves no scale
    behind to be folded. Small filters start nearer to closing. Without gradients the static
    network answers: gates by their running averages.
    """

    def __init__(self, facts: Facts, name: str) -> None:
        super().__init__()
        options = read(GateOptions, facts, name)
        self.model, self.graph, self.options = facts.model, facts.graph, options
        self.units: dict[str, _Gates] = {}
        self.blocks: dict[str, _Gates] = {}
        share = options.share
        over = options.over or (2 if facts.units is not None and not facts.units else 1)
        if over & 1:
            named = facts.graph.groups if facts.units is None else facts.units
            groups = [g for n, g in facts.graph.groups.items() if n in named and g.consumers]
            if facts.units and groups and share is None:
                gone = sum(len(facts.units[group.name]) for group in groups)
                share = gone / sum(group.size for group in groups)
            for k, group in enumerate(groups):
                sizes = magnitudes(self.model, group)
                gates = _Gates(group.size, sizes, self.model, [facts.seed, 11, k], 1)
                self.units[group.name] = gates
                for consumer in group.consumers:
                    self._hook_unit(group, consumer, gates)
        if over & 2:
            able = [block for block in facts.graph.blocks.values() if not block.merges]
            for k, block in enumerate(able):
                width = facts.graph.layers[block.layers[0]].inputs
                gates = _Gates(width, np.ones(1), self.model, [facts.seed, 12, k], 0)
                self.blocks[block.name] = gates
                self._hook_block(block, gates)
        if not self.units and not self.blocks:
            raise UsageError(f"phase {name}: the network has nothing that a gate could close")
        self.open_share = 1 - (0.5 if share is None else share)
        self.ramp = max(1.0, (facts.iterations or 2) / 2)
        rate = options.rate or max(0.01, min(0.2, 5 / (facts.iterations or 1000)))
        self.optimizer = torch.optim.Adam(
            [one for gates in self._all() for one in (gates.weight, gates.bias)], lr=rate
        )
        self._handles.append(self.model.register_forward_pre_hook(self._begin))

    def _all(self) -> list[_Gates]:
        return [*self.units.values(), *self.blocks.values()]

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        for gates in self._all():
            gates.now = None

    def _hook_unit(self, group: Group, consumer: str, gates: _Gates) -> None:
        places = torch.from_numpy(group.places[consumer, "in"])
        is_linear = self.graph.layers[consumer].kind == "linear"

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            x = inputs[0]
            axis = x.ndim - 1 if is_linear else 1
            rows = x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1).mean(2)
            now = gates.of(rows[:, places].mean(2))
            spread = now.repeat_interleave(places.shape[1], 1)
            full = x.new_ones(rows.shape).index_copy(1, places.reshape(-1).to(x.device), spread)
            view = [1] * x.ndim
            view[0], view[axis] = full.shape
            return (x * full.reshape(view),)

        self._handles.append(self.model.get_submodule(consumer).register_forward_pre_hook(hook))

    def _hook_block(self, block: Block, gates: _Gates) -> None:
        is_linear = self.graph.layers[block.layers[0]].kind == "linear"

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> Any:
            x = inputs[0]
            rows = x.movedim(x.ndim - 1 if is_linear else 1, 1)
            rows = rows.reshape(len(x), rows.shape[1], -1).mean(2)
            gate = gates.of(rows).reshape(-1, *[1] * (x.ndim - 1))
            return gate * y + (1 - gate) * x

        module = self.model.get_submodule(block.name)
        self._handles.append(module.register_forward_hook(hook))

    def penalty(self) -> torch.Tensor | None:
        """The two terms, summed over the kinds of gates."""
        total = None
        grown = min(1.0, (self.iteration + 1) / self.ramp)
        for kind in (self.units, self.blocks):
            seen = [gates.batch for gates in kind.values() if gates.batch is not None]
            if seen:
                g = torch.cat(seen)
                polar = self.options.polarize * grown * (g * (1 - g)).sum()
                sparse = self.options.sparsity * len(g) * (g.mean() - self.open_share).square()
                total = polar + sparse if total is None else total + polar + sparse
        return total

    def after_step(self) -> None:
        """Let the gates learn, and remember how open they were."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for gates in self._all():
            if gates.batch is not None:
                gates.average.mul_(0.9).add_(gates.batch.detach().cpu().double(), alpha=0.1)
            gates.now = gates.batch = None
        self.iteration += 1

    def chosen(self) -> Units:
        """The units behind closed gates."""
        closed = {n: np.flatnonzero(~gates.is_open().numpy()) for n, gates in self.units.items()}
        return {name: units for name, units in closed.items() if len(units)}

    def scores(self) -> Scores:
        """How open each unit's gate was, 0..1, averaged over the last batches."""
        return {name: gates.average.numpy().copy() for name, gates in self.units.items()}

    def distances(self) -> dict[str, float]:
        """How open each block's gate was, 0..1; below a half it is closed."""
        return ascending({name: float(gates.average[0]) for name, gates in self.blocks.items()})

    def state(self) -> dict[str, Any]:
        """The gates, their optimizer, their averages."""
        return {
            "iteration": self.iteration,
            "gates": [
                [gates.weight.detach().clone(), gates.bias.detach().clone(), gates.average.clone()]
                for gates in self._all()
            ],
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state gave; ValueError or RuntimeError if it is of another network."""
        for gates, (weight, bias, average) in zip(self._all(), state["gates"], strict=True):
            with torch.no_grad():
                gates.weight.copy_(weight)
                gates.bias.copy_(bias)
            gates.average.copy_(average)
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = int(state["iteration"])
