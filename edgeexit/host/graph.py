"""
What depends on what in a multi-exit network: which channels live and die together, which
blocks can go, what every layer costs.

Callers see analyse and Graph. Hidden here: how the labels of channels (edgeexit.host.channels)
become groups, which layers are a head, and which exits a block keeps apart.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from edgeexit.host.channels import Channels, Layer, Place
from edgeexit.host.exported import export
from edgeexit.host.labels import FROZEN
from edgeexit.host.shortcuts import shortcut_modules


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
    seen = Channels(model, program)
    seen.run()
    return _Assembly(seen).graph(tuple(input_shape))


class _Assembly:
    """Groups, heads and blocks out of what a pass has seen."""

    def __init__(self, seen: Channels) -> None:
        self.seen = seen
        self._reach: dict[fx.Node, set[fx.Node]] = {}

    def graph(self, input_shape: tuple[int, ...]) -> Graph:
        """All that was found, as a Graph."""
        heads = self._heads()
        blocks = self._blocks(input_shape, heads)
        return Graph(
            exits=tuple(self.seen.exit_names),
            layers=self.seen.layers,
            groups=self._groups(heads, blocks),
            blocks=blocks,
            heads=heads,
            others=tuple(self.seen.others),
        )

    def _heads(self) -> dict[str, tuple[str, ...]]:
        heads = {
            name: tuple(n for n, layer in self.seen.layers.items() if layer.exits == (name,))
            for name in self.seen.exit_names
        }
        final = self.seen.exit_names[-1]
        heads[final] = tuple(
            n for n in heads[final] if n == self._last_layer(self.seen.exit_nodes[-1])
        )
        return heads

    def _last_layer(self, node: fx.Node) -> str | None:
        """The layer that made *node*, looking back through what has one input only."""
        by_node = {n: name for name, n in self.seen.layer_nodes.items()}
        while node not in by_node:
            before = [n for n in node.all_input_nodes if self.seen.labels.get(n) is not None]
            if len(before) != 1:
                return None
            node = before[0]
        return by_node[node]

    def _groups(
        self, heads: Mapping[str, tuple[str, ...]], blocks: Mapping[str, Block]
    ) -> dict[str, Group]:
        units: dict[int, dict[Place, list[int]]] = {}
        for place, labels in self.seen.records:
            for position, label in enumerate(labels.tolist()):
                root = self.seen.unions.root(label)
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
        order = {name: k for k, name in enumerate(self.seen.layers)}
        return dict(sorted(groups.items(), key=lambda pair: order[pair[1].producers[0]]))

    def _group(
        self,
        members: list[dict[Place, list[int]]],
        heads: Mapping[str, tuple[str, ...]],
        blocks: Mapping[str, Block],
        taken: Mapping[str, Group],
    ) -> Group | None:
        places = {place: np.array([unit[place] for unit in members]) for place in members[0]}
        order = {name: k for k, name in enumerate(self.seen.layers)}
        producers = sorted((n for n, side in places if side == "out"), key=order.__getitem__)
        if not producers:
            return None
        name, number = producers[0], 2
        while name in taken:
            name, number = f"{producers[0]}#{number}", number + 1
        exits: tuple[str, ...] = ()
        for producer in producers:
            exits = self.seen.merged(exits, self.seen.layers[producer].exits)
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
        for name in shortcut_modules(self.seen.model, input_shape):
            layers = tuple(n for n in self.seen.layers if n.startswith(name + "."))
            if not layers or set(layers) <= in_heads:
                continue
            exits: tuple[str, ...] = ()
            for layer in layers:
                exits = self.seen.merged(exits, self.seen.layers[layer].exits)
            blocks[name] = Block(
                name=name, layers=layers, exits=exits, merges=self._merges(name, heads)
            )
        order = {name: k for k, name in enumerate(self.seen.layers)}
        return dict(sorted(blocks.items(), key=lambda pair: order[pair[1].layers[0]]))

    def _merges(self, block: str, heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The exits that read the block's input and its output, if there are both."""
        inside = [node for node in self.seen.program.graph.nodes if _is_inside(node, block)]
        members = set(inside)
        read = {
            before
            for node in inside
            for before in node.all_input_nodes
            if before not in members and self.seen.labels.get(before) is not None
        }
        before_it = {e for e in self.seen.exit_names[:-1] for n in read if self._is_tapped(n, e)}
        made = [n for n in inside if any(user not in members for user in n.users)]
        after_it = {e for e in self.seen.exit_names[:-1] for n in made if self._is_tapped(n, e)}
        final = self.seen.exit_names[-1]
        later = {
            name
            for name, node in self.seen.layer_nodes.items()
            if any(self._depends(node, one) for one in made)
        }
        if not any(final in self.seen.layers[n].exits and n not in heads[final] for n in later):
            after_it.add(final)
        if before_it and after_it:
            return (*sorted(before_it)[:1], *sorted(after_it)[:1])
        return ()

    def _is_tapped(self, node: fx.Node, exit_name: str) -> bool:
        """Whether the head of the early exit *exit_name* reads *node*."""
        if self.seen.needed.get(node) == (exit_name,):
            return False
        return any(self.seen.needed.get(user) == (exit_name,) for user in node.users)

    def _depends(self, node: fx.Node, on: fx.Node) -> bool:
        if on not in self._reach:
            reached = {on}
            for one in self.seen.program.graph.nodes:
                if any(before in reached for before in one.all_input_nodes):
                    reached.add(one)
            self._reach[on] = reached - {on}
        return node in self._reach[on]


def _owner(producers: Sequence[str], owners: Mapping[str, tuple[str, ...]]) -> str | None:
    """The one owner among whose layers all *producers* are, or None."""
    return next((name for name, layers in owners.items() if set(producers) <= set(layers)), None)


def _is_inside(node: fx.Node, module: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(path.removeprefix("model.") == module for path, _ in stack.values())
