"""
What a criterion may look at, and what it hands back.

Callers see Evidence and Criterion. Everything in an Evidence comes from the training half; a
criterion changes neither the network nor torch's generators.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.graph import Graph

UnitScores = dict[str, NDArray[np.float64]]
BlockScores = dict[str, float]
EntryScores = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """
    All that a criterion may look at, taken from the training half.

    *graph* is the *model*'s own, of now. *batches* are inputs as the network takes them (n, ...)
    with labels (n,); *weights* those of the exits in the loss, earliest first; random choices
    come from *seed*. *masks* (weight tensor -> 1 where the entry is in use, else 0) matter to the
    scores of entries only: *model* then holds the dense weights.
    """

    model: nn.Module
    graph: Graph
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    weights: Sequence[float]
    seed: int
    masks: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.graph.exits):
            raise UsageError(
                f"exit weights: found {len(self.weights)}, expected {len(self.graph.exits)}, "
                "one per exit"
            )
        if any(not weight >= 0 for weight in self.weights):
            raise UsageError(f"exit weights: found {list(self.weights)}, expected 0 or more each")

    def samples(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """The batches; UsageError if there is nothing to look at."""
        if not any(len(labels) for _, labels in self.batches):
            raise UsageError(
                "this criterion looks at samples, and there are none",
                hint="hand over training samples, or choose a criterion that reads weights only",
            )
        return [batch for batch in self.batches if len(batch[1])]

    def shares(self, exits: Sequence[str]) -> dict[str, float]:
        """The weights of *exits* among themselves: they sum to 1, or are all 0."""
        chosen = {
            name: weight
            for name, weight in zip(self.graph.exits, self.weights, strict=True)
            if name in exits
        }
        total = sum(chosen.values())
        return {name: weight / total if total else 0.0 for name, weight in chosen.items()}


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """
    How much parts of a network matter to it; low goes first, None where it says nothing.

    *units* scores each group's units (size,), *blocks* each removable block, *entries* each entry
    of each layer's weight tensor ("layer.weight" -> a tensor of its shape; entries that are out
    of use already have -1 unless the criterion may bring them back). Groups and blocks that the
    criterion cannot judge are left out of its answer: they stay as they are.
    """

    units: Callable[[Evidence], UnitScores] | None = None
    blocks: Callable[[Evidence], BlockScores] | None = None
    entries: Callable[[Evidence], EntryScores] | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside (running batch statistics, no dropout), as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def weight_of(model: nn.Module, layer: str) -> torch.Tensor:
    """The weight tensor of the module *layer*, without its history."""
    weight: torch.Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
    return weight.detach()


def weight_names(evidence: Evidence) -> list[str]:
    """Names of the weight tensors of the network's layers, in the order of execution."""
    known = dict(evidence.model.named_parameters())
    names = [f"{layer}.weight" for layer in evidence.graph.layers]
    return [name for name in names if name in known]


def used_weights(evidence: Evidence) -> dict[str, torch.Tensor]:
    """The weight tensors of the network's layers with what the masks switch off as zeros."""
    known = dict(evidence.model.named_parameters())
    masks = evidence.masks or {}
    tensors = {name: known[name].detach() for name in weight_names(evidence)}
    return {
        name: tensor * masks[name].to(tensor.dtype) if name in masks else tensor
        for name, tensor in tensors.items()
    }


def without_unused(evidence: Evidence, scores: EntryScores) -> EntryScores:
    """*scores* with -1, lower than any, where a mask has switched an entry off."""
    masks = evidence.masks or {}
    return {
        name: score.masked_fill(masks[name] == 0, -1.0) if name in masks else score
        for name, score in scores.items()
    }
