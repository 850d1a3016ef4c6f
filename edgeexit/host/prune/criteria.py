"""
Which part of a network matters least: the criteria by name, and those that read weights only.

Callers see CRITERIA. Low scores go first. Scores of one layer can always be compared with each
other; across layers only where a criterion says so. Criteria that need gradients or ablations
live in modules of their own.
"""

import math
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.graph import Graph, Group
from edgeexit.host.prune.ablation import cka_blocks, kl, kl_blocks
from edgeexit.host.prune.evidence import (
    BlockScores,
    Criterion,
    EntryScores,
    Evidence,
    UnitScores,
    evaluating,
    used_weights,
    weight_of,
    without_unused,
)
from edgeexit.host.prune.saliency import crop, force, snip, taylor, taylor_blocks
from edgeexit.host.prune.states import state_entropy

# ---------------------------------------------------------------- chance


def random_units(evidence: Evidence) -> UnitScores:
    """Uniform in 0..1: the control that every criterion must beat at equal ratios per layer."""
    groups = evidence.graph.groups
    return {name: _rng(evidence, name).random(group.size) for name, group in groups.items()}


def random_blocks(evidence: Evidence) -> BlockScores:
    """Uniform in 0..1."""
    return {name: float(_rng(evidence, name).random()) for name in evidence.graph.blocks}


def random_entries(evidence: Evidence) -> EntryScores:
    """Uniform in 0..1 (arXiv 2202.02643)."""
    scores = {}
    for name, weight in used_weights(evidence).items():
        drawn = _rng(evidence, name).random(tuple(weight.shape))
        scores[name] = torch.from_numpy(drawn).to(weight.dtype)
    return without_unused(evidence, scores)


def _rng(evidence: Evidence, name: str) -> np.random.Generator:
    """Chance that depends on the seed and on the name alone, not on what else there is."""
    return np.random.default_rng([evidence.seed, zlib.crc32(name.encode())])


# ---------------------------------------------------------------- magnitude

Norm = Callable[[torch.Tensor], torch.Tensor]  # (n, m) -> (n,)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().sum(1)


def _root(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(1).sqrt()


def filter_norms(evidence: Evidence, norm: Norm) -> UnitScores:
    """
    *norm* of each unit's weights in all of its producers, biases excluded.

    Comparable within a group only: it grows with the fan-in.
    """
    scores = {}
    for name, group in evidence.graph.groups.items():
        rows = []
        for producer in group.producers:
            weight = weight_of(evidence.model, producer).double().flatten(1)
            rows.append(weight[_positions(group, producer, "out")].flatten(1))
        scores[name] = norm(torch.cat(rows, 1)).numpy()
    return scores


def block_norms(evidence: Evidence, norm: Norm) -> BlockScores:
    """
    The mean filter's *norm*, summed over the block's layers.

    L1 as in the code of "Pruning Everything, Everywhere, All at Once" (arXiv 2506.04513).
    """
    return {
        name: sum(
            float(norm(weight_of(evidence.model, layer).double().flatten(1)).mean())
            for layer in block.layers
        )
        for name, block in evidence.graph.blocks.items()
    }


def magnitude(evidence: Evidence) -> EntryScores:
    """|w|, comparable over the whole network (global magnitude, as in arXiv 2207.03644)."""
    scores = {name: weight.abs() for name, weight in used_weights(evidence).items()}
    return without_unused(evidence, scores)


def _positions(group: Group, module: str, side: str) -> torch.Tensor:
    """(size, m): where each unit of *group* lies on an axis of *module*."""
    return torch.from_numpy(group.places[module, side])


# ---------------------------------------------------------------- batch norms


Moments = list[tuple[torch.Tensor, torch.Tensor]]  # mean and deviation (size,), per norm


def bn_gamma(evidence: Evidence) -> UnitScores:
    """
    |gamma|, averaged over the unit's batch norms (Network Slimming, arXiv 1708.06519).

    It is the standard deviation of what the norm puts out, so groups without a batch norm are
    scored by that of their producers' outputs over the samples: the same unit everywhere.
    """
    return {
        name: torch.stack([deviation for _, deviation in pairs]).mean(0).numpy()
        for name, pairs in _moments(evidence).items()
    }


def bn_gamma_blocks(evidence: Evidence) -> BlockScores:
    """The mean |gamma| of the batch norms that end the block's branch, before the shortcut."""
    scores = {}
    for name in evidence.graph.blocks:
        norms = _ending_norms(evidence.graph, name)
        if norms:
            means = [float(weight_of(evidence.model, norm).abs().mean()) for norm in norms]
            scores[name] = float(np.mean(means))
    return scores


def _ending_norms(graph: Graph, block: str) -> list[str]:
    """Batch norms inside *block* whose channels live on outside of it."""
    outside = [group for group in graph.groups.values() if group.block != block]
    return [norm for group in outside for norm in group.norms if norm.startswith(f"{block}.")]


def bn_statistics(evidence: Evidence) -> UnitScores:
    """
    How probably the unit is on: P(z > 0) = Phi(beta / |gamma|) for z ~ N(beta, gamma^2).

    The statistics of TLC (arXiv 2412.15077), which calls a channel with beta <= 0 off; averaged
    over the unit's batch norms, without a look at data. Groups without a batch norm are scored
    by mean and deviation of their producers' outputs over the samples.
    """
    return {
        name: torch.stack([_probability_on(*pair) for pair in pairs]).mean(0).numpy()
        for name, pairs in _moments(evidence).items()
    }


def _probability_on(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    certain = torch.where(mean > 0, math.inf, -math.inf).double()
    on: torch.Tensor = torch.special.ndtr(torch.where(deviation > 0, mean / deviation, certain))
    return on


def _moments(evidence: Evidence) -> dict[str, Moments]:
    """Mean and deviation of every group's units, after each of its norms (or producers)."""
    groups = evidence.graph.groups
    measured = _measured(evidence, [g for g in groups.values() if not g.norms])
    return {
        name: [_after_norm(evidence.model, group, norm) for norm in group.norms] or measured[name]
        for name, group in groups.items()
    }


def _after_norm(model: nn.Module, group: Group, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = model.get_submodule(norm)
    positions = _positions(group, norm, "norm")
    if not isinstance(module.weight, torch.Tensor) or not isinstance(module.bias, torch.Tensor):
        size = len(positions)  # affine=False
        return torch.zeros(size).double(), torch.ones(size).double()
    mean = module.bias.detach().double()[positions].mean(1)
    return mean, module.weight.detach().double().abs()[positions].mean(1)


def _measured(evidence: Evidence, groups: list[Group]) -> dict[str, Moments]:
    """The same of groups without norms, over the samples."""
    names = {producer for group in groups for producer in group.producers}
    if not names:
        return {}
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            rows = output.double().movedim(axis, 0).flatten(1)
            count = torch.full((len(rows),), rows.shape[1])
            powers = torch.stack([count.double(), rows.sum(1), rows.square().sum(1)])
            sums[name] = sums.get(name, torch.zeros_like(powers)) + powers

        return hook

    modules = {name: evidence.model.get_submodule(name) for name in sorted(names)}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad(), evaluating(evidence.model):
            for inputs, _ in evidence.samples():
                evidence.model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        group.name: [_of_positions(sums[p], _positions(group, p, "out")) for p in group.producers]
        for group in groups
    }


def _of_positions(
    powers: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    count, total, squares = powers[:, positions].sum(2)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


# ---------------------------------------------------------------- states


def state_entropies(evidence: Evidence) -> UnitScores:
    """
    How undecided the unit's sign is before its activations, in bits (NEPENTHE, 2404.16890).

    Exact zeros are not counted; averaged over the unit's producers. Groups without an
    activation behind them are left out. A unit that is always on scores 0 like one that is
    always off: this says where a layer is linear, not which channel is useless.
    """
    states = state_entropy(evidence.model, evidence.graph, evidence.samples())
    scores = {}
    for name, group in evidence.graph.groups.items():
        rows = [
            states[producer].entropies()[group.places[producer, "out"]].mean(1)
            for producer in group.producers
            if producer in states
        ]
        if rows:
            scores[name] = np.mean(rows, axis=0)
    return scores


def state_entropies_of_blocks(evidence: Evidence) -> BlockScores:
    """The mean state entropy of the block's layers; blocks without activations are left out."""
    states = state_entropy(evidence.model, evidence.graph, evidence.samples())
    scores = {}
    for name, block in evidence.graph.blocks.items():
        found = [states[layer].entropy() for layer in block.layers if layer in states]
        if found:
            scores[name] = float(np.mean(found))
    return scores


# ---------------------------------------------------------------- by name

Scores = TypeVar("Scores", UnitScores, BlockScores, EntryScores)


def _finite(
    name: str, judge: Callable[[Evidence], Scores] | None
) -> Callable[[Evidence], Scores] | None:
    """*judge*, but UsageError where a score is no number: sorted, it would stand anywhere."""
    if judge is None:
        return None

    def judged(evidence: Evidence) -> Scores:
        scores = judge(evidence)
        for part, score in scores.items():
            if not bool(torch.isfinite(torch.as_tensor(score)).all()):
                raise UsageError(
                    f"criterion {name}: the score of {part} is not finite",
                    hint="the network has weights or activations that are not: train it again, "
                    "with a smaller learning_rate",
                )
        return scores

    return judged


_CRITERIA: dict[str, Criterion] = {
    "random": Criterion(units=random_units, blocks=random_blocks, entries=random_entries),
    "l1": Criterion(
        units=lambda evidence: filter_norms(evidence, _sum),
        blocks=lambda evidence: block_norms(evidence, _sum),
    ),
    "l2": Criterion(
        units=lambda evidence: filter_norms(evidence, _root),
        blocks=lambda evidence: block_norms(evidence, _root),
    ),
    "bn-gamma": Criterion(units=bn_gamma, blocks=bn_gamma_blocks),
    "bn-statistics": Criterion(units=bn_statistics),
    "taylor": Criterion(units=taylor, blocks=taylor_blocks),
    "kl": Criterion(units=kl, blocks=kl_blocks),
    "cka": Criterion(blocks=cka_blocks),
    "state-entropy": Criterion(units=state_entropies, blocks=state_entropies_of_blocks),
    "crop-s": Criterion(units=crop),
    "magnitude": Criterion(entries=magnitude),
    "snip": Criterion(entries=snip),
    "force": Criterion(entries=force),
}
CRITERIA: dict[str, Criterion] = {
    name: Criterion(
        units=_finite(name, one.units),
        blocks=_finite(name, one.blocks),
        entries=_finite(name, one.entries),
    )
    for name, one in _CRITERIA.items()
}
