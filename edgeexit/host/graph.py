"""
What depends on what in a multi-exit network: which channels live and die together, which
blocks can go, what every layer costs.

Callers see analyse and Graph. Hidden here: the network is exported once, and every value in its
graph carries a tensor of labels of its own shape that says which channel each element came
from. Views move labels as they move values, sums unite them, convolutions and linear layers end
them and begin new ones. So a channel finds its places through any permutation and flattening,
and what no rule covers is frozen: it cannot be pruned, but it cannot be pruned wrongly either.
"""

import copy
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgeexit.errors import Unsupported
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
from edgeexit.host.model import exit_outputs
from edgeexit.host.quiet import quietly

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


@dataclass(frozen=True, kw_only=True)
class Group:
    """
    Channels ("units") of equal role; a unit can only be removed everywhere at once.

    Removing unit u is exactly the network with u's weights zeroed in *producers* and *norms*.
    *places* maps (module, "out" | "in" | "norm") to the positions (size, m) of each unit on
    that axis. *block* is the removable block that its producers lie in, *head* the exit in whose
    head they lie, else None.
    """

    name: str
    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    places: Mapping[Place, NDArray[np.int64]]
    exits: tuple[str, ...]
    block: str | None
    head: str | None


@dataclass(frozen=True, kw_only=True)
class Block:
    """
    A module around whose layers a shortcut leads: replaced by identity, shapes stay as they are.

    *merges* names two exits that would read the same value without it, or is empty.
    """

    name: str
    layers: tuple[str, ...]
    exits: tuple[str, ...]
    merges: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """
    A network's exits, layers, groups and blocks, in the order of execution.

    *heads* names the layers of each exit's head: those that no other exit needs; of the final
    exit only the layer that makes its logits. *others* are MACs outside of layers (products of
    two activations) with the exits that need them.
    """

    exits: tuple[str, ...]
    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    heads: Mapping[str, tuple[str, ...]]
    others: tuple[tuple[int, tuple[str, ...]], ...]

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """MACs of the whole network, all heads, for one sample; see exit_macs for *kept*."""
        costs = self.layer_macs(kept)
        return sum(costs.values()) + sum(cost for cost, _ in self.others)

    def exit_macs(self, kept: Mapping[str, int] | None = None) -> dict[str, int]:
        """
        MACs to reach each exit: its own head is included, the heads of other exits are not.

        *kept* says how many units of a group stay (missing groups: all).
        """
        costs = self.layer_macs(kept)
        return {
            exit_name: sum(c for n, c in costs.items() if exit_name in self.layers[n].exits)
            + sum(cost for cost, exits in self.others if exit_name in exits)
            for exit_name in self.exits
        }

    def layer_macs(self, kept: Mapping[str, int] | None = None) -> dict[str, int]:
        """MACs of each layer when *kept* units of each group stay."""
        widths = self.widths(kept or {})
        costs = {}
        for name, layer in self.layers.items():
            inputs, outputs = widths[name]
            sides = layer.outputs * (layer.inputs if layer.kind in ("conv", "linear") else 1)
            now = outputs * (inputs if layer.kind in ("conv", "linear") else 1)
            costs[name] = layer.macs // sides * now
        return costs

    def widths(self, kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Input and output channels of each layer when *kept* units of each group stay."""
        gone: dict[Place, int] = {}
        for name, count in kept.items():
            group = self.groups[name]
            for place, positions in group.places.items():
                gone[place] = gone.get(place, 0) + (group.size - count) * positions.shape[1]
        return {
            name: (
                layer.inputs - gone.get((name, "in"), 0),
                layer.outputs - gone.get((name, "out"), 0),
            )
            for name, layer in self.layers.items()
        }

    def parameters(self, kept: Mapping[str, int], layers: Iterable[str] | None = None) -> int:
        """Weights (without biases and norms) of *layers* (all) when *kept* units stay."""
        total = 0
        widths = self.widths(kept)
        for name in self.layers if layers is None else layers:
            layer = self.layers[name]
            inputs, outputs = widths[name]
            places = math.prod(layer.out_shape) // layer.outputs
            kernel = layer.macs // places // layer.outputs
            if layer.kind in ("conv", "linear"):
                total += kernel // layer.inputs * inputs * outputs
            else:
                total += kernel * outputs
        return total


def parameters(model: nn.Module) -> int:
    """How many numbers the optimizer would learn."""
    return sum(weight.numel() for weight in model.parameters())


def analyse(model: nn.Module, input_shape: Sequence[int]) -> Graph:
    """
    The graph of *model* (set to eval mode) for inputs (1, ...).

    Unsupported if it cannot be traced: forward must not branch on values.
    """
    model.eval()
    program = export(model, tuple(input_shape))
    walk = _Walk(model, program)
    walk.run()
    return walk.graph(tuple(input_shape))


def export(model: nn.Module, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """
    The graph of *model*, in the mode it is in, for inputs of *input_shape* (any batch size).

    Its outputs are a dict by exit; its parameters have "model." before their names. Unsupported
    if the network cannot be traced.
    """
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(Keyed(model), (torch.zeros(input_shape),))
    except Exception as error:  # torch.export raises a score of unrelated types
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unsupported(
            f"the network cannot be traced: {first[:200]}",
            hint="forward must not branch on values, only on shapes",
        ) from error


class Keyed(nn.Module):
    """Returns the exits as a dict whose keys are known, whatever the network returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, classes) by exit, earliest first."""
        return exit_outputs(self.model, x)


# ---------------------------------------------------------------- the pass


class _Walk:
    """One pass over the exported graph."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model = model
        self.program = program
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensors = {k: v.removeprefix("model.") for k, v in named.items()}
        self.unions = Unions()
        self.labels: dict[fx.Node, Any] = {}
        self.places: dict[int, dict[Place, list[int]]] = {}
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
            exits=self._merged(before.exits if before else (), self.needed.get(node, ())),
            in_shape=tuple(_args(node)[0].meta["val"].shape),
            out_shape=tuple(node.meta["val"].shape),
            inputs=inputs,
            outputs=outputs,
        )
        self.layer_nodes.setdefault(name, node)

    def _merged(self, one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
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

    # -- what came out

    def graph(self, input_shape: tuple[int, ...]) -> Graph:
        """All that was found, as a Graph."""
        heads = self._heads()
        blocks = self._blocks(input_shape, heads)
        return Graph(
            exits=tuple(self.exit_names),
            layers=self.layers,
            groups=self._groups(heads, blocks),
            blocks=blocks,
            heads=heads,
            others=tuple(self.others),
        )

    def _heads(self) -> dict[str, tuple[str, ...]]:
        heads = {
            name: tuple(n for n, layer in self.layers.items() if layer.exits == (name,))
            for name in self.exit_names
        }
        final = self.exit_names[-1]
        heads[final] = tuple(n for n in heads[final] if n == self._last_layer(self.exit_nodes[-1]))
        return heads

    def _last_layer(self, node: fx.Node) -> str | None:
        """The layer that made *node*, looking back through what has one input only."""
        by_node = {n: name for name, n in self.layer_nodes.items()}
        while node not in by_node:
            before = [n for n in node.all_input_nodes if self.labels.get(n) is not None]
            if len(before) != 1:
                return None
            node = before[0]
        return by_node[node]

    def _groups(
        self, heads: Mapping[str, tuple[str, ...]], blocks: Mapping[str, Block]
    ) -> dict[str, Group]:
        units: dict[int, dict[Place, list[int]]] = {}
        for place, labels in self.records:
            for position, label in enumerate(labels.tolist()):
                root = self.unions.root(label)
                if root != FROZEN:
                    units.setdefault(root, {}).setdefault(place, []).append(position)
        alike: dict[tuple[Any, ...], list[dict[Place, list[int]]]] = {}
        for unit in units.values():
            key = tuple((place, len(positions)) for place, positions in unit.items())
            alike.setdefault(key, []).append(unit)
        groups: dict[str, Group] = {}
        for members in alike.values():
            group = self._group(members, heads, blocks, groups)
            if group is not None:
                groups[group.name] = group
        order = {name: k for k, name in enumerate(self.layers)}
        return dict(sorted(groups.items(), key=lambda pair: order[pair[1].producers[0]]))

    def _group(
        self,
        members: list[dict[Place, list[int]]],
        heads: Mapping[str, tuple[str, ...]],
        blocks: Mapping[str, Block],
        taken: Mapping[str, Group],
    ) -> Group | None:
        places = {place: np.array([unit[place] for unit in members]) for place in members[0]}
        order = {name: k for k, name in enumerate(self.layers)}
        producers = sorted((n for n, side in places if side == "out"), key=order.__getitem__)
        if not producers:
            return None
        name, number = producers[0], 2
        while name in taken:
            name, number = f"{producers[0]}#{number}", number + 1
        exits: tuple[str, ...] = ()
        for producer in producers:
            exits = self._merged(exits, self.layers[producer].exits)
        return Group(
            name=name,
            producers=tuple(producers),
            norms=tuple(n for n, side in places if side == "norm"),
            consumers=tuple(n for n, side in places if side == "in"),
            size=len(members),
            places=places,
            exits=exits,
            block=_owner(producers, {k: block.layers for k, block in blocks.items()}),
            head=_owner(producers, heads),
        )

    # -- blocks

    def _blocks(
        self, input_shape: tuple[int, ...], heads: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Block]:
        in_heads = {layer for layers in heads.values() for layer in layers}
        blocks = {}
        for name in _shortcut_modules(self.model, input_shape):
            layers = tuple(n for n in self.layers if n.startswith(name + "."))
            if not layers or set(layers) <= in_heads:
                continue
            exits: tuple[str, ...] = ()
            for layer in layers:
                exits = self._merged(exits, self.layers[layer].exits)
            blocks[name] = Block(
                name=name, layers=layers, exits=exits, merges=self._merges(name, heads)
            )
        order = {name: k for k, name in enumerate(self.layers)}
        return dict(sorted(blocks.items(), key=lambda pair: order[pair[1].layers[0]]))

    def _merges(self, block: str, heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The exits that read the block's input and its output, if there are both."""
        inside = [node for node in self.program.graph.nodes if _is_inside(node, block)]
        members = set(inside)
        read = {
            before
            for node in inside
            for before in node.all_input_nodes
            if before not in members and self.labels.get(before) is not None
        }
        before_it = {e for e in self.exit_names[:-1] for n in read if self._is_tapped(n, e)}
        made = [n for n in inside if any(user not in members for user in n.users)]
        after_it = {e for e in self.exit_names[:-1] for n in made if self._is_tapped(n, e)}
        final = self.exit_names[-1]
        later = {
            name
            for name, node in self.layer_nodes.items()
            if any(self._depends(node, one) for one in made)
        }
        if not any(final in self.layers[n].exits and n not in heads[final] for n in later):
            after_it.add(final)
        if before_it and after_it:
            return (*sorted(before_it)[:1], *sorted(after_it)[:1])
        return ()

    def _is_tapped(self, node: fx.Node, exit_name: str) -> bool:
        """Whether the head of the early exit *exit_name* reads *node*."""
        if self.needed.get(node) == (exit_name,):
            return False
        return any(self.needed.get(user) == (exit_name,) for user in node.users)

    def _depends(self, node: fx.Node, on: fx.Node) -> bool:
        if not hasattr(self, "_reach"):
            self._reach: dict[fx.Node, set[fx.Node]] = {}
        if on not in self._reach:
            reached = {on}
            for one in self.program.graph.nodes:
                if any(before in reached for before in one.all_input_nodes):
                    reached.add(one)
            self._reach[on] = reached - {on}
        return node in self._reach[on]


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _is_scalar(value: Any) -> bool:
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return isinstance(found, torch.Tensor) and found.numel() == 1
    return isinstance(value, int | float)


def _owner(producers: Sequence[str], owners: Mapping[str, tuple[str, ...]]) -> str | None:
    """The one owner among whose layers all *producers* are, or None."""
    return next((name for name, layers in owners.items() if set(producers) <= set(layers)), None)


def _is_inside(node: fx.Node, module: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(path.removeprefix("model.") == module for path, _ in stack.values())


def _shortcut_modules(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """
    The innermost modules that pass their input on unchanged when all their weights are zero.

    That is what a shortcut means, whatever the module's forward looks like.
    """
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            fits = len(inputs) == 1 and isinstance(output, torch.Tensor)
            if fits and isinstance(inputs[0], torch.Tensor) and inputs[0].shape == output.shape:
                seen.setdefault(name, []).append(inputs[0].detach())
            else:
                seen[name] = []

        return hook

    found: list[str] = []
    names = [
        name
        for name, module in model.named_modules()
        if name and any(True for _ in module.children()) and any(True for _ in module.parameters())
    ]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        try:
            model(torch.randn(input_shape, generator=generator))
        finally:
            for handle in handles:
                handle.remove()
        for name in reversed(names):
            if any(inner.startswith(name + ".") for inner in found):
                continue
            if len(seen.get(name, [])) == 1 and _passes(model.get_submodule(name), seen[name][0]):
                found.append(name)
    return found


def _passes(module: nn.Module, x: torch.Tensor) -> bool:
    empty = copy.deepcopy(module).eval()
    for weight in empty.parameters():
        weight.zero_()
    try:
        return bool(torch.equal(empty(x), x)) and bool((x != 0).any())
    except (RuntimeError, TypeError, ValueError):
        return False
