"""
The multi-exit contract, and exits for a plain backbone.

Callers see exit_outputs, exit_answers and attach. Hidden here: the shapes in which a network may
hand over its exits' logits, and how a backbone is tapped without a change to its own code.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.layers import ExitHead, PooledHead, SequenceHead
from edgeexit.names import choose, unknown


def exit_outputs(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The logits (N, classes) of each exit of *model*, earliest first, the final exit last.

    A network that returns a dict names its exits by its keys; one that returns a list or tuple
    has exit0, exit1, ...; a single tensor is exit0. One logit z is widened to two classes'
    [0, z], whose softmax is z's sigmoid. Anything else is Unsupported.
    """
    answers = exit_answers(model, inputs)
    return {
        name: nn.functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits
        for name, logits in answers.items()
    }


def exit_answers(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """As exit_outputs, but one logit stays one: (N, 1)."""
    return _named(model(inputs))


def _named(outputs: object) -> dict[str, torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    if isinstance(outputs, Mapping):
        named = {str(name): logits for name, logits in outputs.items()}
    elif isinstance(outputs, Sequence):
        named = {f"exit{k}": logits for k, logits in enumerate(outputs)}
    else:
        raise Unsupported(
            f"the network's forward returns {type(outputs).__name__}, expected the logits of its "
            "exits: a list, a tuple or a dict"
        )
    shapes = set()
    for name, logits in named.items():
        if isinstance(logits, torch.Tensor) and logits.ndim == 1:
            named[name] = logits = logits[:, None]
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise Unsupported(f"exit {name}: expected logits (N, classes), found {_shape(logits)}")
        shapes.add(tuple(logits.shape))
    if len(shapes) != 1:
        raise Unsupported(f"the exits' logits have shapes {sorted(shapes)}, expected one shape")
    return named


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


# ---------------------------------------------------------------- exits for a plain backbone


class Attached(nn.Module):
    """
    A backbone with an exit head on the output of each of some of its modules.

    The heads' inputs are collected by hooks that live for one forward only, so the backbone
    keeps its own forward and can be exported.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.at = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the attached exits in the order of *at*, then the backbone's own (last)."""
        final, maps = tapped(self.backbone, self.at, x)
        early = [head(maps[name]) for name, head in zip(self.at, self.heads, strict=True)]
        return (*early, final)


def tapped(
    backbone: nn.Module, at: Sequence[str], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """
    The logits of *backbone*'s last exit for *x*, and the output of each module named in *at*.

    Modules stand in the order in which they ended; those that the forward does not use are
    missing.
    """
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.pop(name, None)
            found[name] = output

        return hook

    handles = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in at]
    try:
        outputs = exit_outputs(backbone, x)
    finally:
        for handle in handles:
            handle.remove()
    return list(outputs.values())[-1], found


class TokenHead(nn.Module):
    """Logits (N, classes) from tokens (N, T, D), averaged, or from features (N, D)."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of *x*."""
        logits: torch.Tensor = self.linear(x.mean(1) if x.ndim == 3 else x)
        return logits


HeadMaker = Callable[[int, tuple[int, int], int, Sequence[int]], nn.Module]
"""(channels, (height, width), classes, widths) -> a head for maps (N, C, H, W)."""


def _average(inputs: int, size: tuple[int, int], classes: int, widths: Sequence[int]) -> nn.Module:
    return ExitHead(inputs, size, classes)


def _pooled(inputs: int, size: tuple[int, int], classes: int, widths: Sequence[int]) -> nn.Module:
    return PooledHead(inputs, size, classes)


HEADS: dict[str, HeadMaker] = {"average": _average, "pooled": _pooled, "convs": ExitHead}
WITH_WIDTHS = frozenset({"convs"})


def attach(
    backbone: nn.Module,
    at: Sequence[str],
    *,
    input_shape: Sequence[int],
    head: str = "average",
    widths: Sequence[Sequence[int]] | None = None,
    device: str | None = None,
) -> Attached:
    """
    A multi-exit network out of a plain *backbone* whose forward returns logits (N, classes).

    *at* names modules as in backbone.named_modules(), earliest first; each gets a new, untrained
    exit head on its output. A map (N, C, H, W) gets one of the kind *head* (a key of HEADS);
    *widths* are, for each exit, the stride-2 convolutions of a "convs" head. Sequences (N, C, L)
    are averaged over their places, tokens (N, T, D) over themselves, and like features (N, D)
    end in a linear layer. *input_shape* is (1, ...). The backbone may lie on the meta device;
    *device* is where the heads' weights are made (default: torch's own).

    UsageError for names that are not there, not earliest first, or twice, and for widths that do
    not belong; Unsupported for outputs that take no head and for a network that has exits.
    """
    make = choose(head, HEADS, "kind of exit head")
    rows = [()] * len(at) if widths is None else [tuple(row) for row in widths]
    names = dict(backbone.named_modules())
    for name in at:
        if name not in names or not name:
            raise unknown(name, (known for known in names if known), "module")
    if not at or len(set(at)) != len(at):
        raise UsageError(f"at: found {list(at)}, expected different names of modules")
    if len(rows) != len(at):
        raise UsageError(f"widths: found {len(rows)} lists, expected {len(at)}, one for each exit")
    classes, values = _probe(backbone, at, tuple(input_shape))
    heads = {}
    for name, row in zip(at, rows, strict=True):
        value = values[name]
        is_wanted = value.ndim == 4 and head in WITH_WIDTHS
        if bool(row) != is_wanted:
            wanted = "at least one" if is_wanted else "none"
            raise UsageError(
                f"widths of {name!r}: found {list(row)}, expected {wanted}",
                hint="only a map (N, C, H, W) takes convolutions: leave the widths out"
                if value.ndim != 4
                else None,
            )
        with nullcontext() if device is None else torch.device(device):
            if value.ndim == 4:
                size = (value.shape[2], value.shape[3])
                heads[name] = make(value.shape[1], size, classes, row)
            elif _is_sequence(backbone, name, value):
                heads[name] = SequenceHead(value.shape[1], classes)
            else:
                heads[name] = TokenHead(value.shape[-1], classes)
    return Attached(backbone, heads)


def _probe(
    backbone: nn.Module, at: Sequence[str], input_shape: tuple[int, ...]
) -> tuple[int, dict[str, torch.Tensor]]:
    """The number of classes, and what the modules *at* give, by one pass over zeros."""
    kinds = {tensor.device.type for tensor in (*backbone.parameters(), *backbone.buffers())}
    if "meta" in kinds and len(kinds) > 1:  # partly without memory: such a pass would fail
        backbone = copy.deepcopy(backbone).to("meta")
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), torch.device("meta" if "meta" in kinds else "cpu"):
            zeros = torch.zeros(input_shape)
            count = len(exit_outputs(backbone, zeros))
            final, values = tapped(backbone, at, zeros)
    finally:
        backbone.train(was_training)
    if count != 1:
        raise Unsupported(
            f"the network has {count} exits already, expected a plain backbone",
            hint="new exits go onto a network with one answer",
        )
    for name in at:
        value = values.get(name)
        if name not in values:
            raise Unsupported(f"module {name!r} takes no part in the network's forward")
        if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3, 4):
            raise Unsupported(f"module {name!r} gives {_shape(value)}, which takes no exit head")
    if list(values) != list(at):
        raise UsageError(f"at: expected earliest first: {', '.join(values)}")
    return final.shape[1], values


def _is_sequence(backbone: nn.Module, name: str, value: torch.Tensor) -> bool:
    """
    Whether *value* (N, ?, ?) has its channels on axis 1, as 1-D convolutions give them.

    The nearest module around *name* that holds layers decides.
    """
    if value.ndim != 3:
        return False
    while True:
        kinds = [
            module.num_features if isinstance(module, nn.BatchNorm1d) else module.out_channels
            for module in backbone.get_submodule(name).modules()
            if isinstance(module, nn.Conv1d | nn.BatchNorm1d)
        ]
        others = any(
            isinstance(module, nn.Linear | nn.LayerNorm)
            for module in backbone.get_submodule(name).modules()
        )
        if kinds or others or not name:
            return value.shape[1] in kinds
        name = name.rpartition(".")[0]
