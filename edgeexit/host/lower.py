"""
Turn a multi-exit torch network into one float .tflite that holds all of its exits.

Callers see from_torch. Hidden here: how the converter's outputs find back to the exits they
came from, and the network's graph as the converter likes it. The surprise: a plain
`x.mean((2, 3))` would cost a transposition at every exit, and padded maximum pooling would bring
an infinity that has no int8; the traced graph is rewritten first, so that pooling keeps its axes,
the maps stay channels-last, all padding is numbers and layer norms are plain arithmetic; what the
converter makes of it is tidied (edgeexit.host.tidy).
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgeexit.errors import BadFile, Unsupported
from edgeexit.host.lowered import WHERE, Lowered, named, signature_outputs
from edgeexit.host.model import exit_answers
from edgeexit.host.quiet import quietly
from edgeexit.host.tidy import tidy
from edgeexit.preprocess import Preprocess

_POOLS = frozenset(
    {
        torch.ops.aten.mean.dim,
        torch.ops.aten.sum.dim_IntList,
        torch.ops.aten.amax.default,
        torch.ops.aten.amin.default,
    }
)


_POSITIVE = frozenset(
    {
        torch.ops.aten.relu.default,
        torch.ops.aten.relu_.default,
        torch.ops.aten.relu6.default,
        torch.ops.aten.sigmoid.default,
    }
)
_CLAMPS = frozenset(
    {
        torch.ops.aten.hardtanh.default,
        torch.ops.aten.hardtanh_.default,
        torch.ops.aten.clamp.default,
        torch.ops.aten.clamp_.default,
    }
)


def from_torch(model: nn.Module, input_shape: tuple[int, ...], preprocess: Preprocess) -> Lowered:
    """
    Lower *model* (eval mode is set) for one sample of *input_shape* (its batch axis is 1).

    Images of layout "nchw" come out with a channels-last input. Operators that reach no exit
    are dropped, tensors are renamed, and the file is loaded once in a child process. Raises
    Unsupported for several inputs, data-dependent control flow, operators without a TFLite
    counterpart and exits that are not (1, classes) with one number of classes for all (one
    logit stands for two classes: see ends);
    BadFile if the network does not take *input_shape*.
    """
    model.eval()
    names = _check_contract(model, input_shape)
    channels_last = preprocess.kind == "image" and preprocess.layout == "nchw"
    with _plain_layout(model):
        data = _convert(_trace(_Keyed(model), input_shape), input_shape, channels_last)
    bound = signature_outputs(data)
    return named(*tidy(data, {name: bound[f"exit_{k}"] for k, name in enumerate(names)}, WHERE))


@contextmanager
def _plain_layout(model: nn.Module) -> Iterator[None]:
    """
    Lay the weights out row by row meanwhile: after training channels last they are not.

    The converter knows a constant by its address. Of weights in another layout it makes copies
    and frees them, so the next one of that shape may have the same address and be taken for it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.contiguous()
        yield
    finally:
        for tensor, data in zip(tensors, saved, strict=True):
            tensor.data = data


def _check_contract(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    # One input; every exit (1, classes) of float32, the same number of classes everywhere.
    required = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise Unsupported(
            f"the network takes {len(required)} inputs ({', '.join(required)}), expected one"
        )
    try:
        with torch.inference_mode():
            outputs = exit_answers(model, torch.zeros(input_shape))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise BadFile(
            f"the network does not take an input of shape {list(input_shape)}: {_first(error)}",
            hint="the checkpoint's input_shape must be what its forward expects",
        ) from error
    shapes = {name: tuple(logits.shape) for name, logits in outputs.items()}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] != 1 or shape[1] < 1:
            raise Unsupported(
                f"exit {name!r} answers with shape {list(shape)}, expected logits [1, classes]"
            )
        if outputs[name].dtype != torch.float32:
            raise Unsupported(f"exit {name!r} answers in {outputs[name].dtype}, expected float32")
    if len({shape[1] for shape in shapes.values()}) > 1:
        counts = ", ".join(f"{name}: {shape[1]}" for name, shape in shapes.items())
        raise Unsupported(f"exits differ in their number of classes ({counts})")
    return list(shapes)


class _Keyed(nn.Module):
    """Returns the exits under keys that survive as names of the signature's outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = exit_answers(self.model, x)
        return {f"exit_{k}": logits for k, logits in enumerate(outputs.values())}


def _trace(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    try:
        with quietly():
            program = torch.export.export(model.eval(), (torch.zeros(input_shape),))
    except Exception as error:  # torch.export raises a score of unrelated types
        raise Unsupported(
            f"the network cannot be traced: {_first(error)}",
            hint="forward must not branch on values, only on shapes",
        ) from error
    _keep_pooled_axes(program.graph)
    _pad_with_numbers(program.graph)
    _spell_out_norms(program.graph)
    program.graph_module.recompile()
    traced: nn.Module = program.module(check_guards=False)
    return traced


def _keep_pooled_axes(graph: torch.fx.Graph) -> None:
    # The converter keeps a map channels-last only through operators that leave it 4-D, so
    # mean((2, 3)) becomes mean((2, 3), keepdim=True) followed by a squeeze.
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _POOLS:
            continue
        value, axes, keep = (*node.args, None, None)[:3]
        rank = value.meta["val"].dim()
        keep = keep or node.kwargs.get("keepdim", False)
        if keep or rank != 4 or not isinstance(axes, list | tuple):
            continue
        pooled = sorted(axis % rank for axis in axes)
        if pooled != [2, 3]:
            continue
        node.args = (value, pooled, True)
        with graph.inserting_after(node):
            squeezed = graph.call_function(torch.ops.aten.squeeze.dims, (node, pooled))
        node.replace_all_uses_with(squeezed, delete_user_cb=lambda user, own=squeezed: user != own)


def _pad_with_numbers(graph: torch.fx.Graph) -> None:
    # Maximum pooling pads with -inf, which is no int8 number. A value that cannot win is as good:
    # zero behind an activation that is never negative, else a copy of the border, which the
    # same window holds already (torch allows padding up to half the window).
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != torch.ops.aten.max_pool2d.default:
            continue
        value, *rest = node.args
        kernel, stride, padding, dilation, ceil_mode = (*rest, None, None, None, None)[:5]
        windows, before = _pair(kernel), _pair(padding or 0)
        steps = _pair(stride or kernel)
        if (not any(before) and not ceil_mode) or _pair(dilation or 1) != (1, 1):
            continue
        sizes, places = value.meta["val"].shape[2:], node.meta["val"].shape[2:]
        # What the last window of a row and of a column reaches behind the map's end.
        after = [
            max(0, (count - 1) * step + window - size - first)
            for count, step, window, size, first in zip(
                places, steps, windows, sizes, before, strict=True
            )
        ]
        amounts = [before[1], after[1], before[0], after[0]]
        mode = ("constant", 0.0) if _is_never_negative(value) else ("replicate",)
        with graph.inserting_before(node):
            padded = graph.call_function(torch.ops.aten.pad.default, (value, amounts, *mode))
        node.args = (padded, list(windows), list(steps))


def _spell_out_norms(graph: torch.fx.Graph) -> None:
    # The converter's own form of a layer norm has more operators and more reshapes between them;
    # (x - mean) / sqrt(mean((x - mean)^2) + eps) as it stands is the quicker one in int8.
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != aten.layer_norm.default:
            continue
        given: list[Any] = list(node.args)
        given += [None, None, 1e-5][len(given) - 2 :]
        value, shape, weight, bias, eps = given[:5]
        axes = list(range(-len(shape), 0))
        with graph.inserting_before(node):
            mean = graph.call_function(aten.mean.dim, (value, axes, True))
            centred = graph.call_function(aten.sub.Tensor, (value, mean))
            square = graph.call_function(aten.mul.Tensor, (centred, centred))
            variance = graph.call_function(aten.mean.dim, (square, axes, True))
            added = graph.call_function(aten.add.Tensor, (variance, eps))
            scale = graph.call_function(aten.rsqrt.default, (added,))
            found = graph.call_function(aten.mul.Tensor, (centred, scale))
            if weight is not None:
                found = graph.call_function(aten.mul.Tensor, (found, weight))
            if bias is not None:
                found = graph.call_function(aten.add.Tensor, (found, bias))
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _is_never_negative(node: torch.fx.Node) -> bool:
    if node.target in _CLAMPS:
        low = node.args[1] if len(node.args) > 1 else -1.0  # hardtanh's default
        return isinstance(low, int | float) and low >= 0
    return node.target in _POSITIVE


def _convert(model: nn.Module, input_shape: tuple[int, ...], channels_last: bool) -> bytes:
    shape = input_shape
    try:
        with quietly():
            import litert_torch

            if channels_last:
                batch, channels, height, width = input_shape
                shape = (batch, height, width, channels)
                model = litert_torch.to_channel_last_io(model, args=[0])
            model.training = False  # a traced module has no eval(): its mode is in its graph
            converted = litert_torch.convert(model, (torch.zeros(shape),))
            return bytes(converted.model_content())
    except Exception as error:  # jax, MLIR and torch errors without a common base
        operator = re.search(r"(?:not found: |target=torch\.ops\.)([\w.]+)", str(error))
        what = f"operator {operator[1]}" if operator else "the network"
        raise Unsupported(
            f"{what} cannot be lowered to TFLite: {_first(error)}",
            hint="replace it in the network by operators that TFLite has",
        ) from error


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
