"""
Following every channel through the exported graph of a network.

Callers see Channels and Layer. Hidden here: every value carries a tensor of labels of its own
shape. Views move labels as they move values, sums unite them, convolutions and linear layers end
them and begin new ones; what no rule covers is frozen: it cannot be pruned, but it cannot be
pruned wrongly either.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from edgeexit.host.labels import (
    CLAMPS,
    CONVS,
    FROZEN,
    KEEP_ZERO,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    VIEWS,
    Unions,
    along_axis,
    aten,
    spread_over,
)

Place = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """
    A convolution or linear layer that the forward uses; *macs* are those of one sample.

    *kind* is "conv", "depthwise" (one input channel per output channel), "grouped" or "linear";
    *exits* are those that need it, earliest first; *inputs* and *outputs* count its channels.
    """

    name: str
    kind: str
    macs: int
    exits: tuple[str, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    inputs: int
    outputs: int


class Channels:
    """
    One pass over the exported graph of *model*.

    After run, *layers* are those met (in the order of execution) and *records* say which label
    each channel of a layer or norm has: ((module, "in" | "out" | "norm"), labels (channels,)).
    *others* are MACs outside of layers, *needed* the exits that each node serves.
    """

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model = model
        self.program = program
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensors = {k: v.removeprefix("model.") for k, v in named.items()}
        self.unions = Unions()
        self.labels: dict[fx.Node, Any] = {}
        self.layers: dict[str, Layer] = {}
        self.layer_nodes: dict[str, fx.Node] = {}
        self.others: list[tuple[int, tuple[str, ...]]] = []
        self.records: list[tuple[Place, torch.Tensor]] = []
        self.exit_names, self.exit_nodes = self._outputs()
        self.needed = self._needed()

    # -- who needs what

    def _outputs(self) -> tuple[list[str], list[fx.Node]]:
        (output,) = [node for node in self.program.graph.nodes if node.op == "output"]
        spec = self.program.call_spec.out_spec
        values = torch.utils._pytree.tree_unflatten(list(output.args[0]), spec)
        return list(values), list(values.values())

    def _needed(self) -> dict[fx.Node, tuple[str, ...]]:
        """Node -> the exits that depend on it, earliest first."""
        needed: dict[fx.Node, set[str]] = {}
        for name, node in zip(self.exit_names, self.exit_nodes, strict=True):
            needed.setdefault(node, set()).add(name)
        for node in reversed(list(self.program.graph.nodes)):
            if node.op != "output":
                for before in node.all_input_nodes:
                    needed.setdefault(before, set()).update(needed.get(node, ()))
        order = self.exit_names
        return {n: tuple(e for e in order if e in exits) for n, exits in needed.items()}

    # -- the pass

    def run(self) -> None:
        """Label every value."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                is_input = node.name not in self.tensors
                self.labels[node] = self._frozen(node) if is_input else None
            elif node.op == "call_function":
                self.labels[node] = self._call(node)
        for node in self.exit_nodes:
            self.unions.freeze(self.labels[node])

    def _frozen(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return spread_over(torch.tensor([FROZEN]), value.shape, 0) if value.ndim else None
        if isinstance(value, list | tuple):
            return [
                spread_over(torch.tensor([FROZEN]), v.shape, 0)
                if isinstance(v, torch.Tensor) and v.ndim
                else None
                for v in value
            ]
        return None

    def _call(self, node: fx.Node) -> Any:
        values = [self.labels.get(n) for n in node.all_input_nodes]
        if all(value is None for value in values):
            return None  # made of weights and constants alone
        target = getattr(node.target, "overloadpacket", node.target)
        for kinds, rule in self._rules():
            if target in kinds:
                found = rule(node)
                if found is not None:
                    return found
                break
        for value in values:
            for labels in value if isinstance(value, list | tuple) else [value]:
                if labels is not None:
                    self.unions.freeze(labels)
        self._count_products(node, target)
        return self._frozen(node)

    def _rules(self) -> Iterator[tuple[Iterable[Any], Callable[[fx.Node], Any]]]:
        yield CONVS, self._conv
        yield (aten.linear,), self._linear
        yield (aten.batch_norm,), self._batch_norm
        yield KEEP_ZERO, lambda node: self.labels[_args(node)[0]]
        yield CLAMPS, self._clamp
        yield VIEWS, self._view
        yield (aten.cat,), self._cat
        yield (aten.pad, aten.constant_pad_nd), self._pad
        yield REDUCTIONS, self._reduce
        yield POOLS, self._pool
        yield (aten.add, aten.add_, aten.sub, aten.mul, aten.div), self._elementwise
        yield (operator.getitem,), self._getitem

    # -- layers

    def _module_of(self, node: Any) -> str:
        """Name of the module whose tensor *node* is; empty if it is none."""
        name: str = self.tensors.get(getattr(node, "name", ""), "")
        return name.rpartition(".")[0]

    def _record(self, module: str, side: str, labels: torch.Tensor) -> None:
        self.records.append(((module, side), labels))

    def _add_layer(self, node: fx.Node, name: str, kind: str, macs: int, widths: Any) -> None:
        before = self.layers.get(name)
        inputs, outputs = widths
        self.layers[name] = Layer(
            name=name,
            kind=kind,
            macs=macs + (before.macs if before else 0),
            exits=self.merged(before.exits if before else (), self.needed.get(node, ())),
            in_shape=tuple(_args(node)[0].meta["val"].shape),
            out_shape=tuple(node.meta["val"].shape),
            inputs=inputs,
            outputs=outputs,
        )
        self.layer_nodes.setdefault(name, node)

    def merged(self, one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
        """The exits of both, earliest first."""
        return tuple(e for e in self.exit_names if e in one or e in other)

    def _conv(self, node: fx.Node) -> Any:
        x, weight, *rest = _args(node)
        name = self._module_of(weight)
        labels = self.labels[x]
        groups = rest[4] if len(rest) > 4 else node.kwargs.get("groups", 1)
        shape, filters = node.meta["val"].shape, weight.meta["val"].shape
        macs = math.prod(shape) * math.prod(filters[1:])
        outputs, inputs = filters[0], filters[1] * groups
        is_module = isinstance(self._module(name), nn.Conv1d | nn.Conv2d | nn.Conv3d)
        along = along_axis(labels, 1)
        kind = "conv" if groups == 1 else "depthwise" if filters[1] == 1 else "grouped"
        if name:
            self._add_layer(node, name, kind, macs, (inputs, outputs))
        if not is_module or along is None or kind == "grouped" or name in self._seen(name, node):
            return None
        if kind == "depthwise":
            if outputs != inputs:
                return None
            self._record(name, "out", along)
            return spread_over(along, shape, 1)
        self._record(name, "in", along)
        fresh = self.unions.fresh(outputs)
        self._record(name, "out", fresh)
        return spread_over(fresh, shape, 1)

    def _seen(self, name: str, node: fx.Node) -> tuple[str, ...]:
        """(name,) if another node used this module's weights before: shared, so not prunable."""
        if self.layer_nodes.get(name) in (None, node):
            return ()
        for place, labels in self.records:
            if place[0] == name:
                self.unions.freeze(labels)
        return (name,)

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def _linear(self, node: fx.Node) -> Any:
        x, weight = _args(node)[:2]
        name = self._module_of(weight)
        shape, matrix = node.meta["val"].shape, weight.meta["val"].shape
        if name:
            macs = math.prod(shape) * matrix[1]
            self._add_layer(node, name, "linear", macs, (matrix[1], matrix[0]))
        along = along_axis(self.labels[x], -1)
        is_module = isinstance(self._module(name), nn.Linear)
        if along is None or not is_module or name in self._seen(name, node):
            return None
        self._record(name, "in", along)
        fresh = self.unions.fresh(matrix[0])
        self._record(name, "out", fresh)
        return spread_over(fresh, shape, len(shape) - 1)

    def _batch_norm(self, node: fx.Node) -> Any:
        x = _args(node)[0]
        name = next((m for m in map(self._module_of, node.all_input_nodes) if m), "")
        along = along_axis(self.labels[x], 1)
        is_norm = isinstance(self._module(name), nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if along is None or not is_norm:
            return None
        self._record(name, "norm", along)
        return self.labels[x]

    # -- everything that moves or joins values

    def _clamp(self, node: fx.Node) -> Any:
        low, high = (*_args(node)[1:], None, None)[:2]
        if (low is not None and low > 0) or (high is not None and high < 0):
            return None
        return self.labels[_args(node)[0]]

    def _view(self, node: fx.Node) -> Any:
        labels = self.labels[_args(node)[0]]
        move: Any = node.target
        if getattr(move, "overloadpacket", move) in (aten.view, aten._unsafe_view):
            move = aten.reshape  # repeated labels lie in memory once: they have no views
        return move(labels, *_args(node)[1:], **node.kwargs)

    def _getitem(self, node: fx.Node) -> Any:
        found = self.labels[_args(node)[0]]
        return found[_args(node)[1]] if isinstance(found, list | tuple) else None

    def _cat(self, node: fx.Node) -> Any:
        parts = [self.labels[part] for part in _args(node)[0]]
        if any(part is None for part in parts):
            return None
        return torch.cat(parts, *_args(node)[1:])

    def _pad(self, node: fx.Node) -> Any:
        labels = self.labels[_args(node)[0]]
        padded: Any = torch.nn.functional.pad(labels, list(_args(node)[1]), value=FROZEN)
        amounts = list(_args(node)[1])
        value = (_args(node)[2] if node.target is aten.constant_pad_nd.default else None) or 0
        if value or len(set(map(str, _args(node)[2:3])) - {"constant", "0", "0.0"}):
            return None
        if labels.ndim == 4 and len(amounts) <= 4:
            # Borders around a map are zeros of every channel, not channels of their own.
            along = along_axis(labels, 1)
            return None if along is None else spread_over(along, node.meta["val"].shape, 1)
        return padded

    def _reduce(self, node: fx.Node) -> Any:
        labels = self.labels[_args(node)[0]]
        axes = _args(node)[1] if len(_args(node)) > 1 else None
        if not isinstance(axes, list | tuple | int) or axes == []:
            return None
        chosen = [axes] if isinstance(axes, int) else list(axes)
        chosen = sorted(a % labels.ndim for a in chosen)
        small = labels
        for axis in chosen:
            first = small.narrow(axis, 0, 1)
            if small.stride(axis) != 0 and not bool((small == first).all()):
                return None
            small = first
        shape = node.meta["val"].shape
        if len(shape) == labels.ndim:
            return small
        for axis in reversed(chosen):
            small = small.squeeze(axis)
        return small

    def _pool(self, node: fx.Node) -> Any:
        along = along_axis(self.labels[_args(node)[0]], 1)
        if along is None:
            return None
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return spread_over(along, value.shape, 1)
        return [spread_over(along, one.shape, 1) for one in value]

    def _elementwise(self, node: fx.Node) -> Any:
        name = getattr(node.target, "overloadpacket", node.target)
        is_product = name in (aten.mul, aten.div)
        shape = node.meta["val"].shape
        labels = []
        for value in _args(node)[:2]:
            found = self.labels.get(value) if isinstance(value, fx.Node) else None
            if found is not None:
                labels.append(found.expand(shape))
            elif not (is_product and _is_scalar(value)):
                return None  # a sum with a constant, or a product with weights of its own
        if name is aten.div and not isinstance(_args(node)[0], fx.Node):
            return None
        if len(labels) == 2:
            if name is aten.div:
                return None
            self.unions.unite_all(*labels)
        return labels[0]

    def _count_products(self, node: fx.Node, target: Any) -> None:
        value = node.meta.get("val")
        if target in PRODUCTS and isinstance(value, torch.Tensor):
            inner = _args(node)[0].meta["val"].shape[-1]
            self.others.append((math.prod(value.shape) * inner, self.needed.get(node, ())))
        if target is aten.scaled_dot_product_attention:
            query, key, worth = (_args(node)[k].meta["val"].shape for k in range(3))
            macs = math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * worth[-1]
            self.others.append((macs, self.needed.get(node, ())))


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _is_scalar(value: Any) -> bool:
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return isinstance(found, torch.Tensor) and found.numel() == 1
    return isinstance(value, int | float)
