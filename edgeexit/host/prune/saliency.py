"""
Criteria from gradients of the exits' weighted loss: Taylor, CroP, SNIP, FORCE; effective rank.

Callers see them through CRITERIA. A unit is gated where it is read: a gate of 0 on those inputs
of the unit's consumers is the network without the unit, whatever norms and activations lie
between. Batch statistics are the running ones, so samples do not see each other, and how they
are cut into batches changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from edgeexit.host.exported import Keyed
from edgeexit.host.graph import Graph
from edgeexit.host.prune.evidence import (
    BlockScores,
    EntryScores,
    Evidence,
    UnitScores,
    evaluating,
    used_weights,
    weight_names,
    without_unused,
)

# Share of the gradients' energy (squared singular values) that the effective filters hold.
RANK_ENERGY = 0.99


def weighted_loss(
    evidence: Evidence,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum over samples of the exits' weighted cross entropies; *tensors* replace parameters."""
    replaced = {f"model.{name}": tensor for name, tensor in (tensors or {}).items()}
    outputs = functional_call(Keyed(evidence.model), replaced, (inputs,))
    losses = [
        weight * cross_entropy(logits, labels, reduction="sum")
        for logits, weight in zip(outputs.values(), evidence.weights, strict=True)
    ]
    return torch.stack(losses).sum()


Gates = dict[str, torch.Tensor]  # group -> (size,), or (n, size) with one gate per sample


@contextmanager
def gated(model: nn.Module, graph: Graph, gates: Gates) -> Iterator[None]:
    """Inside, every unit's values are multiplied by its gate where they are read."""
    readers: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, gate in gates.items():
        group = graph.groups[name]
        for consumer in group.consumers:
            positions = torch.from_numpy(group.places[consumer, "in"])
            readers.setdefault(consumer, []).append((positions, gate))

    def scale(
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (x,) = inputs
            axis = x.ndim - 1 if isinstance(module, nn.Linear) else 1
            for positions, gate in pairs:
                per_sample = gate.ndim == 2
                factors = torch.ones(
                    x.shape[0] if per_sample else 1, x.shape[axis], dtype=x.dtype
                ).index_copy(1, positions.flatten(), _repeated(gate, positions).to(x.dtype))
                shape = [factors.shape[0]] + [1] * (x.ndim - 1)
                shape[axis] = x.shape[axis]
                x = x * factors.reshape(shape)
            return (x,)

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(scale(pairs))
        for name, pairs in readers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated(gate: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One factor for each of the flattened *positions* (size, m), as (1 or n, size * m)."""
    rows = gate if gate.ndim == 2 else gate[None]
    return rows.repeat_interleave(positions.shape[1], dim=1)


# ---------------------------------------------------------------- Taylor


def taylor(evidence: Evidence) -> UnitScores:
    """
    First-order change of the loss without the unit: mean over samples of |sum of w g|.

    "Importance Estimation for Neural Network Pruning" (Molchanov et al. 2019, arXiv 1906.10771)
    with gates; of its two forms the absolute value, not the square, so that scores are losses
    and can be compared over the whole network. Taken per sample: over a batch the signs cancel.
    """
    groups = evidence.graph.groups
    sums = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    total = 0
    with torch.enable_grad(), evaluating(evidence.model):
        for inputs, labels in evidence.samples():
            gates = {
                name: torch.ones(len(labels), group.size, requires_grad=True)
                for name, group in groups.items()
            }
            with gated(evidence.model, evidence.graph, gates):
                loss = weighted_loss(evidence, inputs, labels)
            for name, slope in _slopes(loss, gates).items():
                sums[name] += slope.double().abs().sum(0)
            total += len(labels)
    return {name: (score / total).numpy() for name, score in sums.items()}


def _slopes(loss: torch.Tensor, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not wanted:
        return {}
    slopes = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, slopes, strict=True))


def taylor_blocks(evidence: Evidence) -> BlockScores:
    """
    First-order change of the loss if the block hands on its input: |(x - f(x)) dL/df|, mean over
    samples.
    """
    modules = {name: evidence.model.get_submodule(name) for name in evidence.graph.blocks}
    changes: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        def hook(
            _module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
        ) -> torch.Tensor:
            step = torch.zeros(len(output), requires_grad=True)
            changes[name] = step
            away = (inputs[0] - output).detach()
            return output + step.reshape([-1] + [1] * (output.ndim - 1)) * away

        return hook

    sums = dict.fromkeys(modules, 0.0)
    total = 0
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.enable_grad(), evaluating(evidence.model):
            for inputs, labels in evidence.samples():
                loss = weighted_loss(evidence, inputs, labels)
                for name, slope in _slopes(loss, changes).items():
                    sums[name] += float(slope.double().abs().sum())
                total += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    return {name: score / total for name, score in sums.items()}


# ---------------------------------------------------------------- gradients of weights


def _leaves(evidence: Evidence) -> dict[str, torch.Tensor]:
    """The weights in use, as tensors to differentiate by."""
    return {
        name: tensor.clone().requires_grad_() for name, tensor in used_weights(evidence).items()
    }


def _mean_gradients(evidence: Evidence) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all samples, of each weight tensor, at the weights in use."""
    leaves = _leaves(evidence)
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    total = 0
    with torch.enable_grad(), evaluating(evidence.model):
        for inputs, labels in evidence.samples():
            loss = weighted_loss(evidence, inputs, labels, leaves)
            for name, slope in _slopes(loss, leaves).items():
                sums[name] += slope
            total += len(labels)
    return {name: slope / total for name, slope in sums.items()}


def snip(evidence: Evidence) -> EntryScores:
    """|w g| with the gradient over all samples; what is out stays out (SNIP, Iter-SNIP)."""
    gradients, weights = _mean_gradients(evidence), used_weights(evidence)
    scores = {name: (weights[name] * slope).abs() for name, slope in gradients.items()}
    return without_unused(evidence, scores)


def force(evidence: Evidence) -> EntryScores:
    """
    |w g| with the dense weights and the gradient of the sparse network (arXiv 2006.09081).

    What is out has a gradient too, so it may come back.
    """
    dense = dict(evidence.model.named_parameters())
    return {
        name: (dense[name].detach() * slope).abs()
        for name, slope in _mean_gradients(evidence).items()
    }


def crop(evidence: Evidence) -> UnitScores:
    """
    |d(g'g)/dc|: how much of the gradient flow hangs on the unit's gate c (CroP-S, 2206.10451).

    g is the gradient of the mean loss over all samples by the layers' weights in use.
    """
    groups = evidence.graph.groups
    flow = {name: slope.detach() for name, slope in _mean_gradients(evidence).items()}
    masks = evidence.masks or {}
    flow = {name: slope * masks[name] if name in masks else slope for name, slope in flow.items()}
    sums = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    total = 0
    with torch.enable_grad(), evaluating(evidence.model):
        for inputs, labels in evidence.samples():
            leaves = _leaves(evidence)
            gates = {
                name: torch.ones(group.size, requires_grad=True) for name, group in groups.items()
            }
            with gated(evidence.model, evidence.graph, gates):
                loss = weighted_loss(evidence, inputs, labels, leaves)
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            product = torch.stack(
                [(flow[name] * one).sum() for name, one in zip(leaves, slopes, strict=True)]
            ).sum()
            for name, slope in _slopes(2 * product, gates).items():
                sums[name] += slope.double()
            total += len(labels)
    return {name: (score / total).abs().numpy() for name, score in sums.items()}


# ---------------------------------------------------------------- effective rank


def effective_rank(evidence: Evidence, energy: float = RANK_ENERGY) -> dict[str, int]:
    """
    How many of each group's units the gradients tell apart: 1..size.

    The singular values of the matrix (size, weights x batches) of the filters' gradients in all
    producers, one per batch, are taken from the largest until they hold *energy* of all squares
    (after arXiv 2206.03596, which names no threshold). A cap: size - rank units may go.
    """
    groups = evidence.graph.groups
    known = set(weight_names(evidence))
    grams = {name: np.zeros((group.size, group.size)) for name, group in groups.items()}
    leaves = _leaves(evidence)
    with torch.enable_grad(), evaluating(evidence.model):
        for inputs, labels in evidence.samples():
            slopes = _slopes(weighted_loss(evidence, inputs, labels, leaves), leaves)
            for name, group in groups.items():
                for producer in group.producers:
                    if f"{producer}.weight" in known:
                        rows = slopes[f"{producer}.weight"].double().flatten(1) / len(labels)
                        filters = rows[torch.from_numpy(group.places[producer, "out"])].flatten(1)
                        grams[name] += (filters @ filters.T).numpy()
    return {name: _rank(gram, energy) for name, gram in grams.items()}


def _rank(gram: NDArray[np.float64], energy: float) -> int:
    """How many of the largest eigenvalues of *gram* hold the share *energy* of their sum."""
    values = np.linalg.eigvalsh(gram)[::-1].clip(min=0)
    total = values.sum()
    if not total > 0:
        return 1
    return int(np.searchsorted(np.cumsum(values), energy * total * (1 - 1e-12)) + 1)
