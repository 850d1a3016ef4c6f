"""
The exported graph of a multi-exit network: what analysis and ablation walk over.
"""

import torch
from torch import nn

from edgeexit.errors import Unsupported
from edgeexit.host.model import exit_outputs
from edgeexit.host.quiet import quietly


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
