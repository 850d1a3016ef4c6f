"""
Small quantized multi-exit networks, written as flatbuffers without torch or a converter.

A chain of 3x3 convolutions; behind each one an exit head (mean over the map, then a fully
connected layer). Weights are random but fixed by *seed*.
"""

from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_INT8 = 9
_INT16 = 7
_INT32 = 2
_INT64 = 4
_FLOAT32 = 0
_BUILTIN = {"CONV_2D": 3, "FULLY_CONNECTED": 9, "MEAN": 40}


@dataclass(frozen=True)
class TinyModel:
    """The bytes of an uncut multi-exit .tflite and its exits (name -> tensor name)."""

    data: bytes
    exits: dict[str, str]


class _Graph:
    def __init__(self, scheme: str, heads_per_channel: bool) -> None:
        self.scheme, self.heads_per_channel = scheme, heads_per_channel
        self.tensors: list[schema.TensorT] = []
        self.operators: list[schema.OperatorT] = []
        self.buffers = [schema.BufferT()]
        self.codes: list[str] = []

    def tensor(self, name, shape, kind, values=None, scale=None, zero_point=0, axis=0):
        tensor = schema.TensorT()
        tensor.name = name.encode()
        tensor.shape = np.array(shape, np.int32)
        tensor.type = kind
        tensor.buffer = 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        if scale is not None:
            quantization = schema.QuantizationParametersT()
            quantization.scale = np.atleast_1d(np.asarray(scale, np.float32))
            quantization.zeroPoint = np.full(quantization.scale.shape, zero_point, np.int64)
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def value(self, name, shape, scale, zero_point):
        if self.scheme == "int8":
            return self.tensor(name, shape, _INT8, scale=scale, zero_point=zero_point)
        if self.scheme == "int16x8":
            return self.tensor(name, shape, _INT16, scale=scale / 128)
        return self.tensor(name, shape, _FLOAT32)

    def operator(self, code, inputs, output, options_type, options):
        if code not in self.codes:
            self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = self.codes.index(code)
        operator.inputs, operator.outputs = inputs, [output]
        operator.builtinOptionsType, operator.builtinOptions = options_type, options
        self.operators.append(operator)
        return output

    def weights(self, name, real, input_scale):
        channels = real.shape[0]
        scale = np.abs(real.reshape(channels, -1)).max(axis=1) / 127
        if "head" in name and not self.heads_per_channel:
            scale = scale.max(keepdims=True)
        shaped = scale.reshape((-1,) + (1,) * (real.ndim - 1))
        stored = np.rint(real / shaped).astype(np.int8)
        if self.scheme in ("float", "dynamic"):
            if self.scheme == "float":
                weights = self.tensor(f"{name}/w", real.shape, _FLOAT32, real.astype(np.float32))
            else:
                weights = self.tensor(f"{name}/w", real.shape, _INT8, stored, scale=scale)
            bias = np.zeros(channels, np.float32)
            return weights, self.tensor(f"{name}/b", (channels,), _FLOAT32, bias)
        kind, zeros = _INT32, np.zeros(channels, np.int32)
        if self.scheme == "int16x8":
            kind, zeros, input_scale = _INT64, np.zeros(channels, np.int64), input_scale / 128
        return (
            self.tensor(f"{name}/w", real.shape, _INT8, stored, scale=scale),
            self.tensor(f"{name}/b", (channels,), kind, zeros, scale=scale * input_scale),
        )

    def pack(self, inputs, outputs):
        model = schema.ModelT()
        model.version, model.description = 3, b"tiny"
        model.operatorCodes = []
        for name in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = _BUILTIN[name]
            code.version = 3 if name == "CONV_2D" else 4 if name == "FULLY_CONNECTED" else 2
            model.operatorCodes.append(code)
        graph = schema.SubGraphT()
        graph.name = b"main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = inputs, outputs
        model.subgraphs, model.buffers = [graph], self.buffers
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def tiny_model(
    *,
    exits: int = 3,
    size: tuple[int, int] = (12, 10),
    channels: int = 1,
    classes: int = 4,
    width: int = 8,
    seed: int = 0,
    quantized: bool = True,
    skip: bool = False,
    scheme: str | None = None,
    heads_per_channel: bool = False,
) -> TinyModel:
    """
    A multi-exit net for (1, H, W, channels) inputs; input scale 1/255, zero point -128.

    *scheme* is int8 (as *quantized*), float, dynamic or int16x8; heads have one scale for their
    weights, or one for each class. With *skip* the last head also reads the first map, so that a
    value passes over segments.
    """
    rng = np.random.default_rng(seed)
    g = _Graph(scheme or ("int8" if quantized else "float"), heads_per_channel)
    height, width_px = size
    current = g.value("input", (1, height, width_px, channels), 1 / 255, -128)
    inputs, outputs, names = [current], [], {}
    depth, scale, first = channels, 1 / 255, None
    axes = g.tensor("axes", (2,), _INT32, np.array([1, 2], np.int32))
    for k in range(exits):
        real = rng.normal(0, 1.6 / np.sqrt(9 * depth), (width, 3, 3, depth))
        w, b = g.weights(f"conv{k}", real, scale)
        options = schema.Conv2DOptionsT()
        options.padding, options.strideH, options.strideW = 0, 1, 1
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = 1
        scale = 0.012
        made = g.value(f"map{k}", (1, height, width_px, width), scale, -128)
        current = g.operator("CONV_2D", [current, w, b], made, 1, options)
        first = made if first is None else first
        depth = width
        pooled = g.value(f"head{k}/mean", (1, width), scale, -128)
        reducer = schema.ReducerOptionsT()
        reducer.keepDims = False
        source = first if skip and k == exits - 1 else current
        g.operator("MEAN", [source, axes], pooled, 27, reducer)
        real = rng.normal(0, 1.0, (classes, width))
        w, b = g.weights(f"head{k}", real, scale)
        logits = g.value(f"logits{k}", (1, classes), 0.05, 3)
        g.operator("FULLY_CONNECTED", [pooled, w, b], logits, 8, schema.FullyConnectedOptionsT())
        outputs.append(logits)
        names[f"exit{k}"] = f"logits{k}"
    return TinyModel(g.pack(inputs, outputs), names)
