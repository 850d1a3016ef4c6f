"""
Write an int8 .tflite that holds one layer and nothing else, for measuring it alone.

Callers see Shape and one_layer. Weights are random, scales are plausible, and none of it matters:
the runtime's kernels take the same time whatever the numbers are.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Stored integer = real number * 64 here and * 32 there; any scales would do.
_IN_SCALE, _OUT_SCALE, _WEIGHT_SCALE = 1 / 64, 1 / 32, 1 / 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """
    What a layer's latency depends on, but for its widths.

    *kind* as in graph.Layer; *places* (H, W) of the output map, (tokens,) of a linear layer;
    *kernel*, *stride* and *dilation* (H, W), (1, 1) of a linear layer; *groups* of a grouped
    convolution, else 1.
    """

    kind: str
    places: tuple[int, ...]
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def one_layer(shape: Shape, inputs: int, outputs: int) -> bytes:
    """
    An int8 .tflite with one layer of *shape*, *inputs* channels in and *outputs* out.

    Of a depthwise layer only *outputs* counts. Convolutions are padded to "same".
    """
    writer = _Writer()
    if shape.kind == "linear":
        return writer.linear(math.prod(shape.places), inputs, outputs)
    return writer.convolution(shape, inputs, outputs)


class _Writer:
    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.buffers: list[Any] = [schema.BufferT()]
        self.tensors: list[Any] = []

    def linear(self, rows: int, inputs: int, outputs: int) -> bytes:
        weights = self._weights((outputs, inputs), axis=0)
        x = self._tensor("input", (rows, inputs), scale=[_IN_SCALE])
        y = self._tensor("output", (rows, outputs), scale=[_OUT_SCALE])
        options = self.schema.FullyConnectedOptionsT()
        return self._file("FULLY_CONNECTED", "FullyConnectedOptions", options, x, weights, y)

    def convolution(self, shape: Shape, inputs: int, outputs: int) -> bytes:
        is_depthwise = shape.kind == "depthwise"
        name = "DepthwiseConv2DOptions" if is_depthwise else "Conv2DOptions"
        options = getattr(self.schema, f"{name}T")()
        options.padding = self.schema.Padding.SAME
        options.strideH, options.strideW = shape.stride
        options.dilationHFactor, options.dilationWFactor = shape.dilation
        options.fusedActivationFunction = self.schema.ActivationFunctionType.RELU
        if is_depthwise:
            options.depthMultiplier, inputs = 1, outputs
            weights = self._weights((1, *shape.kernel, outputs), axis=3)
        else:
            weights = self._weights((outputs, *shape.kernel, inputs // shape.groups), axis=0)
        size = [place * step for place, step in zip(shape.places, shape.stride, strict=True)]
        x = self._tensor("input", (1, *size, inputs), scale=[_IN_SCALE])
        y = self._tensor("output", (1, *shape.places, outputs), scale=[_OUT_SCALE])
        code = "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D"
        return self._file(code, name, options, x, weights, y)

    def _weights(self, shape: tuple[int, ...], *, axis: int) -> list[int]:
        some = np.random.default_rng(0).integers(-127, 128, 1 << 12, np.int8)
        values = np.resize(some, shape)
        channels = shape[axis]
        bias = np.zeros(channels, np.int32)
        return [
            self._tensor("weights", shape, [_WEIGHT_SCALE] * channels, values, axis=axis),
            self._tensor("bias", (channels,), [_WEIGHT_SCALE * _IN_SCALE] * channels, bias),
        ]

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: list[float],
        values: NDArray[Any] | None = None,
        *,
        axis: int = 0,
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape = name.encode(), np.array(shape, np.int32)
        is_bias = values is not None and values.dtype == np.int32
        tensor.type = self.schema.TensorType.INT32 if is_bias else self.schema.TensorType.INT8
        tensor.buffer = 0
        if values is not None:
            buffer = self.schema.BufferT()
            buffer.data = values.reshape(-1).view(np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        quantization = self.schema.QuantizationParametersT()
        quantization.scale = np.array(scale, np.float32)
        quantization.zeroPoint = np.zeros(len(scale), np.int64)
        quantization.quantizedDimension = axis
        tensor.quantization = quantization
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _file(
        self, code: str, options_name: str, options: Any, x: int, weights: list[int], y: int
    ) -> bytes:
        import flatbuffers

        schema = self.schema
        operator = schema.OperatorT()
        operator.opcodeIndex = 0
        operator.inputs, operator.outputs = [x, *weights], [y]
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, options_name)
        operator.builtinOptions = options
        kind = schema.OperatorCodeT()
        kind.builtinCode = kind.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, code)
        kind.version = 5 if code == "FULLY_CONNECTED" else 3
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = b"main", self.tensors, [operator]
        graph.inputs, graph.outputs = [x], [y]
        model = schema.ModelT()
        model.version, model.description = 3, b"edgeexit one layer"
        model.operatorCodes, model.subgraphs, model.buffers = [kind], [graph], self.buffers
        builder = flatbuffers.Builder(sum(len(b.data) for b in self.buffers[1:]) + (1 << 14))
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())
