"""
Where exits can go in a network, and where they should go.

Callers see tap_points and choose_taps; trial and costs price exits before they are there. Hidden
here: a tap point is a module that every path from the input to the final answer leads through,
so that cutting behind it hands over one tensor. Autograd knows the paths: one forward is enough,
and no graph is traced for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.graph import analyse
from edgeexit.host.model import Attached, attach, exit_outputs, tapped

# Kaya et al. 2019 (arXiv 1810.07052) put six exits at 15, 30, ... 90 % of the cost.
MANY_EXITS, LAST_OF_MANY = 6, 0.9


@dataclass(frozen=True, kw_only=True)
class Tap:
    """
    A module on the main path: *shape* (1, ...) of its output, *macs* of one sample to reach it.

    *share* are these MACs as a share of those of the network's final exit.
    """

    name: str
    shape: tuple[int, ...]
    macs: int
    share: float


def tap_points(model: nn.Module, input_shape: Sequence[int]) -> list[Tap]:
    """
    The modules of *model* (set to eval mode), earliest first, where an exit makes sense.

    Every path from the input to the (last) answer leads through their output; of several such
    outputs with no layer in between the last one counts (behind norm, activation and pooling),
    under its shortest name. Outputs that have only the answer's own layer behind them are left
    out. *input_shape* is (1, ...). Unsupported if the network cannot be traced.
    """
    names = _main_path(model, tuple(input_shape))
    if not names:
        return []
    exits = trial(model, names, input_shape)
    bare, _, total = costs(exits, input_shape)
    with torch.no_grad():
        _, values = tapped(model, names, torch.zeros(tuple(input_shape)))
    taps = [
        Tap(name=name, shape=tuple(values[name].shape), macs=macs, share=macs / total)
        for name, macs in zip(names, bare, strict=True)
    ]
    # Weights that no layer uses (positions of tokens, say) may still have parted two of them.
    last = {tap.macs: tap for tap in taps}
    return list(last.values())


class _Single(nn.Module):
    """A network of which only the last answer is looked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return list(exit_outputs(self.model, x).values())[-1]


def trial(model: nn.Module, at: Sequence[str], input_shape: Sequence[int]) -> Attached:
    """*model* with the cheapest heads behind the modules *at*, and no other exits."""
    with torch.random.fork_rng(devices=[]):
        names = [f"model.{name}" for name in at]
        return attach(_Single(model), names, input_shape=input_shape).eval()


def costs(model: Attached, input_shape: Sequence[int]) -> tuple[list[int], list[int], int]:
    """
    MACs of one sample: to reach each attached exit without its head; of each of these heads; of
    the final exit.
    """
    graph = analyse(model, input_shape)
    reached = graph.exit_macs()
    heads = [
        sum(graph.layers[layer].macs for layer in graph.heads[name]) for name in graph.exits[:-1]
    ]
    bare = [reached[graph.exits[k]] - head for k, head in enumerate(heads)]
    return bare, heads, max(1, reached[graph.exits[-1]])


# A value is known by the autograd node that made it and the number of that node's output.
_Value = tuple[Any, int]


def _main_path(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Names for tap_points, in the order in which they end."""
    final, outputs = _values(model, input_shape)
    everything = _before(final)
    layers = {
        value
        for name, (value, _) in outputs.items()
        if any(weight.ndim > 1 for weight in model.get_submodule(name).parameters(recurse=False))
    }
    total = len(layers & everything)
    found: dict[int, _Value] = {}
    for value, shape in outputs.values():
        if value not in everything or value == final or len(shape) not in (2, 3, 4):
            continue
        done = len(layers & _before(value))
        if 1 <= done <= total - 2 and len(_before(final, without=value) & _roots(everything)) == 0:
            found[done] = value
    chosen = [found[done] for done in sorted(found)]
    return [
        min((name for name, (other, _) in outputs.items() if other == value), key=_depth)
        for value in chosen
    ]


def _depth(name: str) -> int:
    return name.count(".")


def _values(
    model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[_Value, dict[str, tuple[_Value, tuple[int, ...]]]]:
    """The last answer, and the output (with its shape) of each module that depends on the input."""
    single = _Single(model).eval()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    names = [name for name, _ in model.named_modules() if name]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            # Not a leaf: a network may change its input in place.
            inputs = torch.zeros(input_shape, requires_grad=True) * 1
            final, outputs = tapped(single, [f"model.{name}" for name in names], inputs)
    finally:
        for weight in learned:
            weight.requires_grad_(True)
    made = {
        name.removeprefix("model."): ((output.grad_fn, output.output_nr), tuple(output.shape))
        for name, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.grad_fn is not None
    }
    return (final.grad_fn, final.output_nr), made


def _before(value: _Value, without: _Value | None = None) -> set[_Value]:
    """*value* and all that it depends on, found on ways that do not lead through *without*."""
    seen: set[_Value] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen or one == without or one[0] is None:
            continue
        seen.add(one)
        waiting.extend(one[0].next_functions)
    return seen


def _roots(values: set[_Value]) -> set[_Value]:
    """Those that depend on nothing: the network's input."""
    return {value for value in values if not value[0].next_functions}


def choose_taps(taps: Sequence[Tap], count: int) -> list[Tap]:
    """
    The *count* tap points nearest to equal shares of the network's MACs, earliest first.

    Fewer than six exits divide the whole (two: 1/3 and 2/3); six or more go up to 90 % as in
    Shallow-Deep Networks (six: 15, 30, ... 90 %). Nearest: the sum of squared differences is
    least. UsageError if there are not that many.
    """
    if not 1 <= count <= len(taps):
        raise UsageError(
            f"exits: found {count}, this network has {len(taps)} places for one",
            hint="edgeexit attach MODEL.pt --list shows them" if taps else None,
        )
    step = LAST_OF_MANY / count if count >= MANY_EXITS else 1 / (count + 1)
    # best[k]: cost and choice of the first k exits among the taps looked at so far.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * count]
    for place, tap in enumerate(taps):
        for k in range(count, 0, -1):
            cost = best[k - 1][0] + (tap.share - k * step) ** 2
            if cost < best[k][0]:
                best[k] = (cost, (*best[k - 1][1], place))
    return [taps[place] for place in best[count][1]]
