"""
Which modules have a shortcut around their layers: the blocks that can be left out.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def shortcut_modules(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
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
