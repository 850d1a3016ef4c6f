"""
Merging layers that stand in a row without an activation between them, exactly.

Callers see foldable (which pairs), examine (one pair, or why not), fold, linearise, fold_linear
(both, wherever that saves) and replay_fold. A fold is made only if it changes no answer, borders
included, and costs no more multiplications; batch norms between the two go into it. Hidden here:
one forward is watched call by call to see who reads what, and the kernel algebra runs in float64.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.graph import Graph, analyse
from edgeexit.host.prune.evidence import evaluating
from edgeexit.host.prune.states import (
    ACTIVATION_MODULES,
    Batches,
    dead_units,
    linearisable,
    silence,
)
from edgeexit.names import unknown

Entry = dict[str, Any]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

# Calls whose result is their input, for a network in eval mode.
_KEEPS = frozenset({"dropout", "dropout_", "feature_dropout", "contiguous"})


@dataclass(frozen=True, kw_only=True)
class Fold:
    """*second* reads *first* alone, through *norms* only; MACs of one sample before and after."""

    first: str
    second: str
    norms: tuple[str, ...]
    macs_before: int
    macs_after: int


# ---------------------------------------------------------------- which pairs


def foldable(
    model: nn.Module, graph: Graph, input_shape: Sequence[int] | None = None
) -> list[Fold]:
    """
    The pairs of layers that can be merged exactly and at no higher cost, in forward order.

    *input_shape* (1, ...) is needed only where the network's input is not that of its first layer.
    """
    found = []
    for (first, second), norms in _rows(model, graph, input_shape).items():
        try:
            found.append(_judged(model, graph, first, second, norms))
        except Unsupported:
            continue
    return found


def examine(
    model: nn.Module,
    graph: Graph,
    first: str,
    second: str,
    input_shape: Sequence[int] | None = None,
) -> Fold:
    """
    The fold of the layers *first* and *second*.

    UsageError for an unknown layer; Unsupported, with the reason, if something else stands between
    them or reads between them, if a border would change, or if the MACs would rise.
    """
    for name in (first, second):
        if name not in graph.layers:
            raise unknown(name, graph.layers, "layer")
    rows = _rows(model, graph, input_shape)
    if (first, second) not in rows:
        raise Unsupported(
            f"{first} and {second} cannot be folded: between them stands or reads something else",
            hint="an activation can be replaced by identity first; a shortcut cannot be folded",
        )
    return _judged(model, graph, first, second, rows[first, second])


def _judged(
    model: nn.Module, graph: Graph, first: str, second: str, norms: tuple[str, ...]
) -> Fold:
    merged = _merged_shape(model, first, second, norms)
    size = prod(graph.layers[second].out_shape)
    before = graph.layers[first].macs + graph.layers[second].macs
    # Each output value costs one multiplication per weight of its filter or row.
    after = size * prod(merged.weight.shape[1:])
    if after > before:
        shape = "x".join(map(str, getattr(merged, "kernel_size", ())))
        raise Unsupported(
            f"{first} and {second} are not folded: {'one ' + shape if shape else 'one'} layer "
            f"costs {after:,} MACs, the two cost {before:,}"
        )
    _algebra(model, first, second, norms, merged)
    return Fold(first=first, second=second, norms=norms, macs_before=before, macs_after=after)


class _Uses(TorchFunctionMode):
    """Who reads which tensor: (call, module, result) for every tensor argument of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.module = ""
        self.made: dict[str, list[torch.Tensor]] = {}
        self.reads: dict[int, list[tuple[str, str, Any]]] = {}
        self._held: list[Any] = []  # keeps ids unique while the forward runs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        values = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        # A module of torch that looks at a shape does not read the value; a forward that does
        # might compute with it.
        is_look = bool(self.module) and not isinstance(output, torch.Tensor)
        for value in values:
            if isinstance(value, torch.Tensor) and not is_look:
                name = getattr(func, "__name__", "")
                self.reads.setdefault(id(value), []).append((name, self.module, output))
        self._held.append((values, output))
        return output

    @contextmanager
    def watching(self, model: nn.Module, graph: Graph) -> Iterator[None]:
        """Inside, calls are booked under the layer or batch norm of *model* that makes them."""
        handles = []

        def enter(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any) -> None:
                self.module = name

            return hook

        def leave(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self.module = ""
                self.made.setdefault(name, []).append(output)

            return hook

        for name, module in model.named_modules():
            if name in graph.layers or isinstance(module, Norm):
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave(name)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _rows(
    model: nn.Module, graph: Graph, input_shape: Sequence[int] | None
) -> dict[tuple[str, str], tuple[str, ...]]:
    """(first, second) -> the norms between, for pairs of which each reads and is read alone."""
    if input_shape is None:
        input_shape = next(iter(graph.layers.values())).in_shape
    uses = _Uses()
    weight = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model), uses.watching(model, graph):
            outputs = model(weight.new_zeros(tuple(input_shape)))
    except RuntimeError as error:
        raise Unsupported(
            f"the network refuses input {list(input_shape)}: {error}",
            hint="give input_shape, that of the whole network's input",
        ) from error
    answers = {id(one) for one in torch.utils._pytree.tree_leaves(outputs)}
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for first in graph.layers:
        value, norms = _only(uses.made.get(first, [])), list[str]()
        while value is not None and id(value) not in answers:
            reads = [
                (call, module, made)
                for call, module, made in uses.reads.get(id(value), [])
                if call not in _KEEPS or made is not value
            ]
            if len(reads) != 1:
                break
            ((call, module, value),) = reads
            if module in graph.layers:
                if len(uses.made.get(module, [])) == 1:
                    found[first, module] = tuple(norms)
                break
            if module and len(uses.made.get(module, [])) == 1:
                norms.append(module)
            elif call not in _KEEPS:
                break
    return found


def _only(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return values[0] if len(values) == 1 else None


# ---------------------------------------------------------------- the merged layer


def _merged_shape(
    model: nn.Module, first: str, second: str, norms: Sequence[str]
) -> Conv | nn.Linear:
    """The merged layer without meaningful weights; Unsupported if none does the same."""
    one, two = model.get_submodule(first), model.get_submodule(second)
    if one is two:
        raise _refused(first, second, "they are one layer")
    for name in norms:
        norm = model.get_submodule(name)
        if not isinstance(norm, Norm) or norm.running_mean is None:
            raise _refused(first, second, f"{name} is no batch norm with fixed statistics")
    if isinstance(one, nn.Linear) and isinstance(two, nn.Linear):
        if one.out_features != two.in_features:
            raise _refused(first, second, f"{one.out_features} outputs, {two.in_features} inputs")
        with torch.device(one.weight.device):
            return nn.Linear(one.in_features, two.out_features, dtype=one.weight.dtype)
    if not isinstance(one, Conv) or type(two) is not type(one):
        raise _refused(first, second, f"{type(one).__name__} and {type(two).__name__}")
    assert isinstance(two, Conv)
    if one.groups != 1 or two.groups != 1:
        raise _refused(first, second, "grouped convolutions")
    if one.out_channels != two.in_channels:
        raise _refused(first, second, f"{one.out_channels} outputs, {two.in_channels} inputs")
    pads = [_padding(one), _padding(two)]
    kernel, stride, padding, dilation = list[int](), list[int](), list[int](), list[int]()
    for axis in range(len(one.kernel_size)):
        k1, s1, p1, d1 = (v[axis] for v in (one.kernel_size, one.stride, pads[0], one.dilation))
        k2, s2, p2, d2 = (v[axis] for v in (two.kernel_size, two.stride, pads[1], two.dilation))
        if p2 and (k1 > 1 or p1):
            raise _refused(first, second, "at the borders the second one's padding would differ")
        if p2 and two.padding_mode != "zeros" and s1 > 1:
            raise _refused(first, second, f"padding {two.padding_mode!r} behind a stride")
        if k1 > 1 and k2 > 1 and (d1 > 1 or d2 > 1):
            raise _refused(first, second, "two dilated kernels")
        kernel.append(k1 if k2 == 1 else (k2 - 1) * (s1 if k1 > 1 else 1) + k1)
        dilation.append(d1 if k2 == 1 else d2 * s1 if k1 == 1 else 1)
        stride.append(s1 * s2)
        padding.append(p1 + p2 * s1)
    if all(map(any, pads)) and one.padding_mode != two.padding_mode:
        raise _refused(first, second, "two ways of padding")
    kind: Callable[..., Conv] = type(one)
    with torch.device(one.weight.device):
        return kind(
            one.in_channels,
            two.out_channels,
            tuple(kernel),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            padding_mode=two.padding_mode if any(pads[1]) else one.padding_mode,
            dtype=one.weight.dtype,
        )


def _padding(conv: Conv) -> list[int]:
    """Padding of each axis, the same on both sides; Unsupported if the sides differ."""
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if isinstance(conv.padding, str):
        spans = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        if any(span % 2 for span in spans):
            raise Unsupported("a convolution with padding 'same' and an even kernel is not folded")
        return [span // 2 for span in spans]
    return list(conv.padding)


def _refused(first: str, second: str, reason: str) -> Unsupported:
    return Unsupported(f"{first} and {second} cannot be folded: {reason}")


def _algebra(
    model: nn.Module, first: str, second: str, norms: Sequence[str], merged: Conv | nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of *merged* in float64; Unsupported if its borders would be wrong."""
    one, two = model.get_submodule(first), model.get_submodule(second)
    w1, b1 = _weights(one)
    w2, b2 = _weights(two)
    for name in norms:
        norm = model.get_submodule(name)
        assert isinstance(norm, Norm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if isinstance(one, nn.Linear) and norm.num_features != len(b1):
            raise _refused(first, second, f"{name} does not norm the features")
        scale = (norm.running_var.double().cpu() + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight.detach().double().cpu()
        b1 = (b1 - norm.running_mean.double().cpu()) * scale
        if norm.affine:
            b1 = b1 + norm.bias.detach().double().cpu()
        w1 = w1 * scale.reshape(-1, *[1] * (w1.ndim - 1))
    pads_zeros = isinstance(two, Conv) and any(_padding(two)) and two.padding_mode == "zeros"
    if pads_zeros and torch.count_nonzero(b1):
        raise _refused(
            first, second, "at the borders the second one sees zeros without the first's bias"
        )
    bias = w2.flatten(2).sum(2) @ b1 + b2 if w2.ndim > 2 else w2 @ b1 + b2
    if isinstance(two, nn.Linear):
        return w2 @ w1, bias
    assert isinstance(one, Conv)
    assert isinstance(two, Conv)
    weight = torch.zeros(merged.weight.shape, dtype=torch.float64)
    steps = [s if k > 1 else 1 for s, k in zip(one.stride, one.kernel_size, strict=True)]
    for tap in np.ndindex(*two.kernel_size):
        at: tuple[Any, ...] = (..., *tap)
        part = torch.einsum("oi,ik->ok", w2[at], w1.flatten(1)).reshape(len(w2), *w1.shape[1:])
        window = zip(tap, steps, one.kernel_size, strict=True)
        at = (..., *(slice(t * step, t * step + k) for t, step, k in window))
        weight[at] += part
    return weight, bias


def _weights(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(layer.weight, torch.Tensor)
    weight = layer.weight.detach().double().cpu()
    bias = layer.bias
    if not isinstance(bias, torch.Tensor):
        return weight, torch.zeros(len(weight), dtype=torch.float64)
    return weight, bias.detach().double().cpu()


# ---------------------------------------------------------------- doing it


def fold(model: nn.Module, pair: Fold) -> Entry:
    """
    Merge the two layers of *pair* in place and return what replay_fold needs, as plain data.

    The merged layer stands where the second one stood; the first and the norms become identity.
    """
    merged = _merged_shape(model, pair.first, pair.second, pair.norms)
    weight, bias = _algebra(model, pair.first, pair.second, pair.norms, merged)
    assert isinstance(merged.bias, torch.Tensor)
    with torch.no_grad():
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
    _put(model, merged, pair.first, pair.second, pair.norms)
    return {"fold": [pair.first, pair.second, *pair.norms]}


def replay_fold(model: nn.Module, first: str, second: str, *norms: str) -> None:
    """
    Put a layer of the merged shape where *second* stands, identity for *first* and *norms*.

    Its weights mean nothing until they are loaded. Unsupported if the two do not fit together.
    """
    _put(model, _merged_shape(model, first, second, norms), first, second, norms)


def _put(
    model: nn.Module, merged: nn.Module, first: str, second: str, norms: Sequence[str]
) -> None:
    merged.train(model.get_submodule(second).training)
    _replace(model, second, merged)
    for name in (first, *norms):
        _replace(model, name, nn.Identity())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def linearise(model: nn.Module, name: str) -> Entry:
    """
    Replace the activation module *name* by identity, in place; the entry says so.

    UsageError if there is no such module or if it is no activation.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        activations = [k for k, m in modules.items() if isinstance(m, ACTIVATION_MODULES)]
        raise unknown(name, activations, "activation")
    if not isinstance(modules[name], ACTIVATION_MODULES):
        raise UsageError(f"{name!r} is a {type(modules[name]).__name__}, expected an activation")
    _replace(model, name, nn.Identity())
    return {"linear": name}


def fold_linear(
    model: nn.Module, input_shape: Sequence[int], batches: Batches, tolerance: float
) -> tuple[nn.Module, list[Entry], dict[str, Any]]:
    """
    Take out activations in (nearly) one state where two layers then become one of fewer MACs.

    *tolerance* in bits of mean state entropy over *batches*. An activation alone costs nothing on
    a board: without a fold that saves it stays. Returns the network (a copy, if anything was
    folded), what replays it, and {"folded": pairs of layers, "linear_but_kept": how many
    activations could have gone without a gain}.
    """
    entries: list[Entry] = []
    folded: list[list[str]] = []
    graph, kept = analyse(model, input_shape), 0
    for name in linearisable(model, graph, batches, tolerance):
        tried = copy.deepcopy(model)
        # What is never on would pass its negative values through an identity.
        silence(tried, graph, dead_units(tried, graph, batches))
        entry = linearise(tried, name)
        linear = analyse(tried, input_shape)
        pairs = foldable(tried, linear, input_shape)
        saving = [pair for pair in pairs if pair.macs_after < pair.macs_before]
        if not saving:
            kept += 1
            continue
        entries += [entry, fold(tried, saving[0])]
        folded.append([saving[0].first, saving[0].second])
        model, graph = tried, analyse(tried, input_shape)
    return model, entries, {"folded": folded, "linear_but_kept": kept}
