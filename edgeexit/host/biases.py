"""
Make room for biases that an int8 product cannot hold: those of channels (almost) without weights.

Callers see with_whole_biases. A bias is stored in steps of its input's scale times its channel's
weight scale. Where pruning has set a filter's weights to zero, ai-edge-quantizer writes a scale
near 1e-11; the bias, which is all that the filter still says, becomes the largest 32-bit number
and means next to nothing. Zeros are zeros at any scale, so these channels get one at which their
bias fits.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.host.tidy import CHANNELS
from edgeexit.tflite import Model, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUMS = {"int8": "int32", "int16": "int64"}  # dtype of activations -> of the biases beside them
_LARGEST_BIAS = 2.0**30  # half of what 32 bits hold, so that the sum on top of it fits, too
_LEAST_RATIO = 2.0**-30  # of a product's step to its output's: TFLite shifts by 31 bits at most


def with_whole_biases(model: Model, floats: Model) -> Model:
    """
    The quantized *model* with scales at which every bias of *floats* fits.

    *floats* is the network that it was made of, with the same names of constants. Only products
    with int8 weights per channel, activations and a bias in integers are looked at, and of their
    channels only those whose bias needs more than 30 bits or whose steps vanish in the output's.
    Weights that several operators read stay as they are.
    """
    real = {t.name: t for t in floats.tensors if t.constant is not None and t.dtype == "float32"}
    readers = Counter(t for op in model.operators for t in op.inputs)
    tensors = list(model.tensors)
    for operator in model.operators:
        if operator.kind not in CHANNELS or len(operator.inputs) != 3 or -1 in operator.inputs:
            continue
        x, w, b = (model.tensors[index] for index in operator.inputs)
        y = model.tensors[operator.outputs[0]]
        axis = CHANNELS[operator.kind]
        if w.dtype != "int8" or (x.dtype, b.dtype) not in _SUMS.items() or y.dtype != x.dtype:
            continue
        if any(readers[index] != 1 for index in operator.inputs[1:]):
            continue
        if not len(w.scales) == len(b.scales) == w.shape[axis]:
            continue
        if w.name not in real or b.name not in real:
            continue
        weights, biases = _values(real[w.name], np.float32), _values(real[b.name], np.float32)
        scales = _scales(x, w, y, biases, axis)
        stays = scales == np.array(w.scales)
        if stays.all():
            continue
        lengths = [-1 if k == axis else 1 for k in range(weights.ndim)]
        numbers = np.rint(weights / scales.reshape(lengths)).clip(-127, 127)
        numbers = np.where(stays.reshape(lengths), _values(w, np.int8), numbers)
        steps = np.where(stays, np.array(b.scales), x.scales[0] * scales)
        sums = np.where(stays, _values(b, b.dtype), np.rint(biases / steps))
        _, at, beside = operator.inputs
        tensors[at] = _anew(w, at, numbers.astype(np.int8), scales)
        tensors[beside] = _anew(b, beside, sums.astype(b.dtype), steps)
    return replace(model, tensors=tuple(tensors))


def _scales(
    x: Tensor, w: Tensor, y: Tensor, biases: "NDArray[Any]", axis: int
) -> "NDArray[np.float64]":
    """The scale of every channel's weights: as it is, or as large as its bias needs it."""
    given = np.array(w.scales)
    others = tuple(k for k in range(len(w.shape)) if k != axis)
    is_zero = ~_values(w, np.int8).any(axis=others)
    usual = float(np.median(given[~is_zero])) if not is_zero.all() else 0.0
    least = np.abs(biases) / (x.scales[0] * _LARGEST_BIAS)
    least = np.maximum(least, _LEAST_RATIO * y.scales[0] / x.scales[0])
    # Zeros may have a scale like the others', at which every usual bias fits.
    wanted = np.where(given >= least, given, np.maximum(least, np.where(is_zero, usual, 0.0)))
    return wanted.astype(np.float32).astype(np.float64)


def _values(tensor: Tensor, dtype: Any) -> "NDArray[Any]":
    assert tensor.constant is not None
    values: NDArray[Any] = tensor.constant.view(dtype).reshape(tensor.shape)
    return values


def _anew(tensor: Tensor, index: int, values: "NDArray[Any]", scales: "NDArray[Any]") -> Tensor:
    packed = type(tensor.packed)(**vars(tensor.packed))
    packed.quantization = type(packed.quantization)(**vars(packed.quantization))
    packed.quantization.scale = scales.astype(np.float32)
    return replace(
        tensor,
        scales=tuple(map(float, packed.quantization.scale)),
        constant=np.ascontiguousarray(values).reshape(-1).view(np.uint8),
        buffer=-1 - index,  # no file's: buffers are told apart by their numbers, not found
        packed=packed,
    )
