"""
Blocks trained to be identities: LaCoOT's regularizer, a real way to fewer layers.

Callers see BlockIdentity and max_sliced_wasserstein.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.prune.phase import Facts, Phase, ascending, number, read


@dataclass(frozen=True, kw_only=True)
class IdentityOptions:
    """
    Quétu et al., LaCoOT (arXiv 2406.08933): *weight* is their lambda (5 for ResNet-18, 9 for
    MobileNetV2); the distance is the largest over *directions* random ones.
    """

    weight: float = number(5.0, 0.0)
    directions: int = number(50, 1, 10_000)


def max_sliced_wasserstein(
    one: torch.Tensor, other: torch.Tensor, directions: torch.Tensor
) -> torch.Tensor:
    """
    Max-sliced 2-Wasserstein distance of two batches (N, ...) of equal shape, a scalar.

    The largest, over the unit vectors *directions* (D, K), of the distance between the batches'
    projections, each sorted by size (Deshpande et al. 2019).
    """
    first, second = (x.flatten(1) @ directions for x in (one, other))
    squares = (first.sort(0).values - second.sort(0).values).square().mean(0)
    # Below the square root's reach the gradient is 0, not infinite.
    distance: torch.Tensor = squares.max().clamp(min=1e-12).sqrt()
    return distance


class BlockIdentity(Phase):
    """weight * the mean, over removable blocks, of the distance between their input and output."""

    def __init__(self, facts: Facts, name: str) -> None:
        super().__init__()
        self.options, self.seed = read(IdentityOptions, facts, name), facts.seed
        self.names = [n for n, block in facts.graph.blocks.items() if not block.merges]
        if not self.names:
            raise UsageError(f"phase {name}: the network has no block that could be removed")
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: dict[str, float] = {}
        for block in self.names:
            hook = facts.model.get_submodule(block).register_forward_hook(self._keeps(block))
            self._handles.append(hook)

    def _keeps(self, block: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                self._pairs[block] = (inputs[0], output)

        return hook

    def penalty(self) -> torch.Tensor | None:
        """The regularizer for the last forward; None if no block took part in it."""
        pairs, self._pairs = self._pairs, {}
        drawn: dict[int, torch.Tensor] = {}
        found = {}
        for name, (x, y) in pairs.items():
            width = x[0].numel()
            if width not in drawn:
                drawn[width] = self._directions(width).to(x)
            found[name] = max_sliced_wasserstein(x, y, drawn[width])
        for name, distance in found.items():
            now, before = float(distance.detach()), self._seen.get(name)
            self._seen[name] = now if before is None else 0.9 * before + 0.1 * now
        return self.options.weight * torch.stack(list(found.values())).mean() if found else None

    def _directions(self, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([self.seed, 13, self.iteration]).integers(1 << 62))
        )
        drawn = torch.randn(width, self.options.directions, generator=generator)
        return nn.functional.normalize(drawn, dim=0)

    def after_step(self) -> None:
        """The next batch has directions of its own."""
        self.iteration += 1

    def distances(self) -> dict[str, float]:
        """Block -> distance, averaged over the last batches; those seen, lowest first."""
        return ascending(self._seen)

    def state(self) -> dict[str, Any]:
        """Iteration and distances."""
        return {"iteration": self.iteration, "distances": dict(self._seen)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state gave."""
        self._seen = {name: float(value) for name, value in state["distances"].items()}
        self.iteration = int(state["iteration"])
