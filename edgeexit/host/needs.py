"""
Which exits need which part of a network, found by asking autograd.

Callers see needs and Needs. A part that one early exit alone needs is its head: no convention
about names or classes is asked of the network. Surprising: each module's output is cloned on the
way, so that dropout, which in eval mode hands its input through, is still told apart from the
layer before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeexit.host.model import exit_outputs


@dataclass(frozen=True, kw_only=True)
class Needs:
    """
    *exits*, earliest first; for each parameter and each module the exits that it serves.

    A module serves the exits that anything inside it serves; one that the forward never
    calls serves none.
    """

    exits: tuple[str, ...]
    parameters: dict[str, frozenset[str]]
    modules: dict[str, frozenset[str]]

    def head_parameters(self) -> frozenset[str]:
        """Names of the parameters that belong to the head of an early exit."""
        return frozenset(name for name, exits in self.parameters.items() if self._is_head(exits))

    def head_modules(self) -> frozenset[str]:
        """Names of the modules that lie in the head of an early exit."""
        return frozenset(name for name, exits in self.modules.items() if self._is_head(exits))

    def _is_head(self, exits: frozenset[str]) -> bool:
        return len(exits) == 1 and not exits & {self.exits[-1]}


def needs(model: nn.Module, inputs: torch.Tensor) -> Needs:
    """
    What each exit of *model* needs, seen in one pass over *inputs* (N, ...) in eval mode.

    A parameter is needed where the logits have a gradient by it (zero counts); so a head on a
    detached map needs nothing of the backbone.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    with _in_eval_mode(model), _watched(model, outputs), torch.enable_grad():
        logits = exit_outputs(model, inputs.detach().requires_grad_())
        tensors = [(name, parameter) for name, parameter in model.named_parameters()]
        watched = [(name, output) for name, found in outputs.items() for output in found]
        parameters: dict[str, set[str]] = {name: set() for name, _ in tensors}
        leaves: dict[str, set[str]] = {name: set() for name, _ in watched}
        for exit_name, values in logits.items():
            if not values.requires_grad:
                continue
            found = torch.autograd.grad(
                values.sum(),
                [tensor for _, tensor in tensors + watched],
                retain_graph=True,
                allow_unused=True,
            )
            for (name, _), gradient in zip(tensors, found, strict=False):
                if gradient is not None:
                    parameters[name].add(exit_name)
            for (name, _), gradient in zip(watched, found[len(tensors) :], strict=True):
                if gradient is not None:
                    leaves[name].add(exit_name)
    return Needs(
        exits=tuple(logits),
        parameters={name: frozenset(exits) for name, exits in parameters.items()},
        modules=_of_modules(model, parameters, leaves),
    )


def _of_modules(
    model: nn.Module, parameters: dict[str, set[str]], leaves: dict[str, set[str]]
) -> dict[str, frozenset[str]]:
    # Shared parameters and modules carry their first name only: look them up by identity.
    by_id = {id(parameter): parameters[name] for name, parameter in model.named_parameters()}
    leaf_by_id = {id(model.get_submodule(name)): exits for name, exits in leaves.items()}
    found = {}
    for name, module in model.named_modules():
        inside: set[str] = set()
        for parameter in module.parameters():
            inside |= by_id[id(parameter)]
        for part in module.modules():
            inside |= leaf_by_id.get(id(part), set())
        found[name] = frozenset(inside)
    return found


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every parameter with a gradient, every module in eval mode; as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@contextmanager
def _watched(model: nn.Module, outputs: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Collect what the modules without parts give, each as a tensor of its own."""
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def hook(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> Any:
                if not isinstance(output, torch.Tensor) or not output.requires_grad:
                    return None
                own = output.clone()
                outputs.setdefault(name, []).append(own)
                return own

            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
