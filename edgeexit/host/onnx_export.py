"""
Write a torch network as ONNX: the first half of the road by onnx2tf.

Callers see exported. Needs the packages onnx and onnxscript beside torch.
"""

import torch
from torch import nn

from edgeexit.errors import Unsupported
from edgeexit.host.model import exit_outputs
from edgeexit.host.quiet import quietly

OPSET = 20  # the first with GELU as one operator


def exported(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[list[str], bytes]:
    """
    The names of *model*'s exits, earliest first, and its ONNX file with one output for each.

    Unsupported if the network cannot be traced or holds an operator that ONNX has no word for.
    """
    model.eval()
    with torch.inference_mode():
        names = list(exit_outputs(model, torch.zeros(input_shape)))
    outputs = [f"exit_{k}" for k in range(len(names))]
    try:
        with quietly():
            program = torch.onnx.export(
                _Rowed(model),
                (torch.zeros(input_shape),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=outputs,
                verbose=False,
            )
            assert program is not None
            data: bytes = program.model_proto.SerializeToString(deterministic=True)
    except Exception as error:  # torch.onnx raises a score of unrelated types
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unsupported(
            f"the network cannot be exported as ONNX: {first[:300]}",
            hint="leave out --via",
        ) from error
    return names, data


class _Rowed(nn.Module):
    """Returns the exits as a tuple, whatever the network returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(exit_outputs(self.model, x).values())
