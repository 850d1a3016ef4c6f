"""
How often neurons switch between on and off, and what follows: where a network is nearly linear.

Callers see state_entropy, relevance, linearisable and dead_units. Hidden here: the forward is
watched call by call, so that functions such as torch.relu count like modules do, and a sum at a
shortcut counts for every layer that it adds up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from edgeexit.errors import UsageError
from edgeexit.host.graph import Graph
from edgeexit.host.prune.evidence import evaluating, weight_of
from edgeexit.names import choose

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Counts = NDArray[np.int64]

_RECTIFIERS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min"}
_LEAKY = {"leaky_relu", "leaky_relu_", "elu", "elu_", "prelu"}
_SMOOTH = {"gelu", "silu", "silu_", "mish", "tanh", "sigmoid"}
_HARD = {"hardswish", "hardswish_", "hardsigmoid"}
ACTIVATIONS = frozenset(_RECTIFIERS | _LEAKY | _SMOOTH | _HARD)
# Calls whose result still is the layer's output, moved, scaled or summed with another.
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PLACES = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "pad"}
_SAME = {"batch_norm", "layer_norm", "dropout", "dropout_", "contiguous", "clone"}
_CARRIES = frozenset(_SUMS | _PLACES | _SAME)
ACTIVATION_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.ELU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardsigmoid,
)


# ---------------------------------------------------------------- state entropy


def _egp(on: Counts, zero: Counts, off: Counts) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    share = on / np.maximum(on + zero + off, 1)
    return share, (on > 0) & (zero + off > 0)


def _nepenthe(on: Counts, zero: Counts, off: Counts) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    return on / np.maximum(on + off, 1), np.ones(on.shape, bool)


def _easier(on: Counts, zero: Counts, off: Counts) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    return (on + zero) / np.maximum(on + zero + off, 1), np.ones(on.shape, bool)


# How each paper estimates a neuron's share of "on", and which neurons its average counts.
ESTIMATORS: dict[
    str, Callable[[Counts, Counts, Counts], tuple[NDArray[Any], NDArray[np.bool_]]]
] = {"egp": _egp, "nepenthe": _nepenthe, "easier": _easier}


def binary_entropy(share: NDArray[Any]) -> NDArray[np.float64]:
    """Entropy in bits of a coin that shows heads with probability *share*, elementwise."""
    p = np.clip(np.asarray(share, np.float64), 0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    return np.asarray(np.where((p == 0) | (p == 1), 0.0, bits))


@dataclass(frozen=True, kw_only=True)
class States:
    """
    How often the neurons before one activation were above, at and below zero.

    *activation* is the module's name, or None for a function called in a forward; *layers* are
    those whose outputs it sees. *on*, *zero* and *off* (C,) count samples times places.
    """

    activation: str | None
    layers: tuple[str, ...]
    on: Counts
    zero: Counts
    off: Counts

    def entropies(self, estimator: str = "nepenthe") -> NDArray[np.float64]:
        """State entropy (C,) of each neuron in bits (EGP 2308.06619, NEPENTHE 2404.16890)."""
        share, _ = choose(estimator, ESTIMATORS, "entropy estimator")(self.on, self.zero, self.off)
        return binary_entropy(share)

    def entropy(self, estimator: str = "nepenthe") -> float:
        """
        State entropy of the layer: the mean over its neurons.

        "egp" leaves out neurons that never switch, "nepenthe" leaves out exact zeros,
        "easier" (2404.18949) counts them as on.
        """
        estimate = choose(estimator, ESTIMATORS, "entropy estimator")
        share, counted = estimate(self.on, self.zero, self.off)
        return float(binary_entropy(share[counted]).mean()) if counted.any() else 0.0

    def always_off(self) -> Counts:
        """The neurons that were never above zero: behind a ReLU they are not there."""
        return np.flatnonzero(self.on == 0)

    def always_on(self) -> Counts:
        """The neurons that were never below zero: a ReLU does nothing to them."""
        return np.flatnonzero((self.off == 0) & (self.on > 0))


class _Watch(TorchFunctionMode):
    """Hands every activation's input to *see*, with the layers whose output it is."""

    def __init__(self, see: Callable[[tuple[str, ...], torch.Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        sources = [one for value in args for one in getattr(value, "_made_by", ())]
        if name in ACTIVATIONS and sources:
            self.see(tuple(sources), args[0])
        output = func(*args, **(kwargs or {}))
        made_by = tuple(dict.fromkeys(sources)) if name in _CARRIES else ()
        if isinstance(output, torch.Tensor) and (made_by or hasattr(output, "_made_by")):
            output._made_by = made_by  # type: ignore[attr-defined]
        return output


def state_entropy(model: nn.Module, graph: Graph, batches: Batches) -> dict[str, States]:
    """
    States of the first activation behind each layer of *graph*, over *batches* in eval mode.

    *batches* hold inputs as the network takes them; labels are not looked at. Layers without an
    activation behind them (heads, linear bottlenecks) are left out.
    """
    found: dict[str, States] = {}
    for states in _sites(model, graph, batches):
        for layer in states.layers:
            found.setdefault(layer, states)
    return {layer: found[layer] for layer in graph.layers if layer in found}


def _sites(model: nn.Module, graph: Graph, batches: Batches) -> list[States]:
    """States of every call of an activation, in the order of the forward."""
    _check(batches)
    counts: list[Counts] = []
    calls: list[tuple[str | None, tuple[str, ...]]] = []
    inside: list[str] = []
    number = 0

    def see(layers: tuple[str, ...], z: torch.Tensor) -> None:
        nonlocal number
        layer = graph.layers[layers[0]]
        axis = z.ndim - 1 if layer.kind == "linear" else 1
        if z.ndim < 2 or z.shape[axis] != layer.outputs:
            return
        flat = z.movedim(axis, 0).reshape(layer.outputs, -1)
        row = torch.stack([(flat > 0).sum(1), (flat == 0).sum(1), (flat < 0).sum(1)]).cpu().numpy()
        if number == len(counts):
            counts.append(np.zeros_like(row))
            calls.append((inside[-1] if inside else None, layers))
        counts[number] += row
        number += 1

    handles = []
    for name, module in model.named_modules():
        if name in graph.layers:
            handles.append(module.register_forward_hook(_marks(name)))
        elif isinstance(module, ACTIVATION_MODULES):
            handles.append(module.register_forward_pre_hook(_pushes(inside, name)))
            handles.append(module.register_forward_hook(_pops(inside)))
    try:
        with torch.no_grad(), evaluating(model), _Watch(see):
            for inputs, _ in batches:
                number = 0
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [
        States(activation=name, layers=layers, on=row[0], zero=row[1], off=row[2])
        for (name, layers), row in zip(calls, counts, strict=True)
    ]


def _check(batches: Batches) -> None:
    if not any(len(inputs) for inputs, _ in batches):
        raise UsageError("states of neurons: no samples, expected at least one batch")


def _marks(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output._made_by = (name,)  # type: ignore[attr-defined]

    return hook


def _pushes(inside: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _module, _inputs: inside.append(name)


def _pops(inside: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        inside.pop()

    return hook


def relevance(
    model: nn.Module, graph: Graph, batches: Batches, estimator: str = "nepenthe"
) -> dict[str, float]:
    """
    r_l = H_l * mean |w| over the layer's non-zero weights (EGP 2308.06619, NEPENTHE 2404.16890).

    For the layers that state_entropy finds; low: the layer is nearly linear and may go first.
    """
    found = {}
    for layer, states in state_entropy(model, graph, batches).items():
        weight = weight_of(model, layer).abs().double()
        used = int(torch.count_nonzero(weight))
        found[layer] = states.entropy(estimator) * float(weight.sum()) / max(used, 1)
    return found


def linearisable(
    model: nn.Module,
    graph: Graph,
    batches: Batches,
    tolerance: float = 0.0,
    estimator: str = "nepenthe",
) -> list[str]:
    """
    The activation modules whose layers' entropy is at most *tolerance* bits, lowest first.

    Used in several places, a module counts with its highest entropy. Activations that are
    functions in a forward cannot be replaced and are not listed. Replacing one is exact on
    *batches* only if its neurons are always on: remove or silence dead_units first.
    """
    entropies: dict[str, float] = {}
    for states in _sites(model, graph, batches):
        if states.activation is not None:
            now = states.entropy(estimator)
            entropies[states.activation] = max(now, entropies.get(states.activation, 0.0))
    low = [name for name, entropy in entropies.items() if entropy <= tolerance]
    return sorted(low, key=lambda name: entropies[name])


def dead_units(model: nn.Module, graph: Graph, batches: Batches) -> dict[str, Counts]:
    """
    Group -> the units that every consumer only ever reads as exact zeros, over *batches*.

    Removing them changes no answer on these samples. One unit of a group is always kept.
    """
    _check(batches)
    alive = {name: np.zeros(group.size, bool) for name, group in graph.groups.items()}

    def watch(module: str, readers: list[str]) -> Callable[[nn.Module, Any], None]:
        layer = graph.layers[module]

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            axis = inputs[0].ndim - 1 if layer.kind == "linear" else 1
            read = inputs[0].movedim(axis, 0).reshape(layer.inputs, -1)
            seen = (read != 0).any(1).cpu().numpy()
            for group in readers:
                alive[group] |= seen[graph.groups[group].places[module, "in"]].any(1)

        return hook

    handles = []
    for name in graph.layers:
        readers = [key for key, group in graph.groups.items() if name in group.consumers]
        if readers:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(watch(name, readers))
            )
    try:
        with torch.no_grad(), evaluating(model):
            for inputs, _ in batches:
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    dead = {}
    for name, group in graph.groups.items():
        off = np.flatnonzero(~alive[name])
        if group.consumers and len(off):
            dead[name] = off[len(off) == group.size :]
    return {name: units for name, units in dead.items() if len(units)}


def silence(model: nn.Module, graph: Graph, units: Mapping[str, Counts]) -> None:
    """
    Zero all weights that make *units* (group -> indices), in place; shapes stay.

    That is their removal without its gain. With dead_units it makes linearising an activation
    exact whose other neurons are always on: what was off would otherwise pass its negative values.
    """
    with torch.no_grad():
        for name, chosen in units.items():
            for (module, side), positions in graph.groups[name].places.items():
                if side != "in":
                    rows = torch.from_numpy(positions[chosen].reshape(-1))
                    for weight in model.get_submodule(module).parameters(recurse=False):
                        weight[rows] = 0
