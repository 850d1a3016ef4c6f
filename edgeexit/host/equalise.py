"""
Even out the channels of a network before it is rounded: the same function, other scales.

Callers see equalise. Hidden here: an activation has one int8 scale for all of its channels, so
one loud channel makes all others coarse, while ReLU lets a channel be turned down before it and
up again behind it (Nagel et al. 2019, "Data-free quantization through weight equalization and
bias correction", section 4.1). Which channels belong together is read off the graph; whether
what lies between lets scales pass is seen by trying: a group after which the network answers
differently is put back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgeexit.host.graph import Graph, Group
from edgeexit.host.model import exit_outputs

TOLERANCE = 1e-3  # of an exit's largest logit: float rounding stays far below
MOST = 1e4  # a channel is scaled by at most this
SEEN = 64  # inputs that show whether answers stay
RAISED = 0.8  # of the loudest channel's level: other inputs may be louder than those seen


def equalise(model: nn.Module, graph: Graph, inputs: torch.Tensor) -> list[str]:
    """
    Rescale the channels of *model* in place, group by group; its float answers stay.

    A channel's scale is sqrt(a / w): a the largest value it takes over *inputs* (N, ...), w the
    largest weight that reads it (equation 11 of the paper, with activations in place of the
    weights that make them, for weights have a scale per channel here). Where the answers change
    by that, only the last batch norm is scaled (one before a depthwise layer cannot be); and
    where they still do, channels are raised to the loudest one, which a ReLU6 allows. Returns
    the names of the groups that were scaled.
    """
    model.eval()
    some = inputs[:SEEN]
    with torch.no_grad():
        wanted = exit_outputs(model, some)
        peaks = {name: max(float(v.abs().max()), 1e-30) for name, v in wanted.items()}
        scaled: list[str] = []
        for group in graph.groups.values():
            loud, heavy = _levels(model, group, inputs)
            for makers, scale in WAYS:
                tensors = _tensors(model, group, makers)
                if not tensors:
                    break
                factors = scale(loud, heavy)
                saved = [tensor.clone() for tensor, _, _ in tensors]
                for tensor, place, is_reader in tensors:
                    _multiply(tensor, *place, factors if is_reader else 1 / factors)
                found = exit_outputs(model, some)
                strays = max(float((found[n] - wanted[n]).abs().max()) / peaks[n] for n in wanted)
                if strays <= TOLERANCE:
                    scaled.append(group.name)
                    break
                for (tensor, _, _), before in zip(tensors, saved, strict=True):
                    tensor.copy_(before)
    return scaled


Scaled = tuple[torch.Tensor, tuple[int, torch.Tensor], bool]
"""A tensor, its axis and the positions (size, m) of each channel on it, whether it reads them."""


def _tensors(model: nn.Module, group: Group, makers: slice) -> list[Scaled]:
    """What must change with the channels of *group*; empty if that is not known."""
    found: list[Scaled] = []
    chosen = (group.norms or group.producers)[makers]
    for (name, side), positions in group.places.items():
        module: Any = model.get_submodule(name)
        places = torch.from_numpy(positions)
        if side == "in":
            found.append((module.weight, (1, places), True))
        elif side == ("norm" if group.norms else "out") and name in chosen:
            if module.weight is None:
                return []
            found.append((module.weight, (0, places), False))
            if module.bias is not None:
                found.append((module.bias, (0, places), False))
    is_read = any(is_reader for _, _, is_reader in found)
    return found if is_read and len(found) > 1 else []


def _multiply(tensor: torch.Tensor, axis: int, places: torch.Tensor, factors: torch.Tensor) -> None:
    whole = torch.ones(tensor.shape[axis])
    whole[places.reshape(-1)] = factors.repeat_interleave(places.shape[1])
    shape = [1] * tensor.ndim
    shape[axis] = -1
    tensor.mul_(whole.reshape(shape))


def _levels(
    model: nn.Module, group: Group, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value and the largest reading weight of each channel, both (size,)."""
    loud = torch.zeros(group.size)
    heavy = torch.zeros(group.size)
    handles = []

    def watch(axis: int, places: torch.Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, given: Any, _result: Any) -> None:
            values = given[0].movedim(axis, 0).flatten(1).abs().amax(1)
            loud.copy_(torch.maximum(loud, values[places].amax(1)))

        return hook

    for (name, side), positions in group.places.items():
        if side != "in":
            continue
        module: Any = model.get_submodule(name)
        places = torch.from_numpy(positions)
        axis = -1 if isinstance(module, nn.Linear) else 1
        handles.append(module.register_forward_hook(watch(axis, places)))
        weights = module.weight.movedim(1, 0).flatten(1).abs().amax(1)
        heavy = torch.maximum(heavy, weights[places].amax(1))
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return loud, heavy


def _balanced(loud: torch.Tensor, heavy: torch.Tensor) -> torch.Tensor:
    """One factor per channel, their geometric mean 1; channels that say nothing keep theirs."""
    alive = (loud > 0) & (heavy > 0)
    logs = 0.5 * (loud.clamp(min=1e-30).log() - heavy.clamp(min=1e-30).log())
    if bool(alive.any()):
        logs -= logs[alive].mean()
    logs[~alive] = 0.0
    return logs.exp().clamp(1 / MOST, MOST)


def _levelled(loud: torch.Tensor, _heavy: torch.Tensor) -> torch.Tensor:
    """The factors that raise every channel to most of the loudest one's level."""
    factors = loud / max(float(loud.max()), 1e-30) / RAISED
    return factors.clamp(1 / MOST, 1.0).where(loud > 0, torch.ones(()))


WAYS: tuple[tuple[slice, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], ...] = (
    (slice(None), _balanced),
    (slice(-1, None), _balanced),
    (slice(-1, None), _levelled),
)
