"""
The multi-exit contract, and exits for a plain backbone.

Callers see exit_outputs and attach. Hidden here: the shapes in which a network may hand over its
exits' logits, and how a backbone is tapped without a change to its own code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.layers import ExitHead


def exit_outputs(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The logits (N, classes) of each exit of *model*, earliest first, the final exit last.

    A network that returns a dict names its exits by its keys; one that returns a list or tuple
    has exit0, exit1, ...; a single tensor is exit0. Anything else is Unsupported.
    """
    outputs = model(inputs)
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
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise Unsupported(f"exit {name}: expected logits (N, classes), found {_shape(logits)}")
        shapes.add(tuple(logits.shape))
    if len(shapes) != 1:
        raise Unsupported(f"the exits' logits have shapes {sorted(shapes)}, expected one shape")
    return named


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


class Attached(nn.Module):
    """
    A backbone with an exit head on the output of each of some of its modules.

    The heads' inputs are collected by hooks that live for one forward only, so the backbone
    keeps its own forward and can be exported.
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.at = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the attached exits in the order of *at*, then the backbone's own."""
        final, maps = _tapped(self.backbone, self.at, x)
        early = [head(maps[name]) for name, head in zip(self.at, self.heads, strict=True)]
        return (*early, final)


def _tapped(
    backbone: nn.Module, at: Sequence[str], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The backbone's output for *x* and the output of each module named in *at*."""
    maps: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            maps[name] = output

        return hook

    handles = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in at]
    try:
        final: torch.Tensor = backbone(x)
    finally:
        for handle in handles:
            handle.remove()
    return final, maps


class TokenHead(nn.Module):
    """Logits (N, classes) from tokens (N, T, D), averaged, or from features (N, D)."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of *x*."""
        logits: torch.Tensor = self.linear(x.mean(1) if x.ndim == 3 else x)
        return logits


def attach(
    backbone: nn.Module,
    at: Sequence[str],
    *,
    input_shape: Sequence[int],
    widths: Sequence[int] = (),
) -> Attached:
    """
    A multi-exit network out of a plain *backbone* whose forward returns logits (N, classes).

    *at* names modules as in backbone.named_modules(), earliest first; each gets a new, untrained
    head on its output: a map (N, C, H, W) one of the zoo's (with the stride-2 convolutions
    *widths*), tokens (N, T, D) or features (N, D) a linear layer. *input_shape* is (1, ...).
    UsageError for names that are not there, Unsupported for outputs that take no head.
    """
    names = [name for name, _ in backbone.named_modules() if name]
    for name in at:
        if name not in names:
            near = ", ".join(names[:8])
            raise UsageError(f"the backbone has no module {name!r} (has: {near}, ...)")
    if not at or len(set(at)) != len(at):
        raise UsageError(f"at: found {list(at)}, expected different names of modules")
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        final, maps = _tapped(backbone, at, torch.zeros(tuple(input_shape)))
    backbone.train(was_training)
    if not isinstance(final, torch.Tensor) or final.ndim != 2:
        raise Unsupported(f"the backbone returns {_shape(final)}, expected logits (N, classes)")
    classes = final.shape[1]
    heads: dict[str, nn.Module] = {}
    for name in at:
        value = maps.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3, 4):
            raise Unsupported(f"module {name!r} gives {_shape(value)}, which takes no exit head")
        if value.ndim == 4:
            size = (value.shape[2], value.shape[3])
            heads[name] = ExitHead(value.shape[1], size, classes, widths)
        else:
            heads[name] = TokenHead(value.shape[-1], classes)
    return Attached(backbone, heads)
