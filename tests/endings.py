"""
Tiny networks whose exits end in various ways, as .tflite bytes written operator by operator.

A linear stem on 8 values, and for each exit a linear head with an end of its own. Shares no code
with edgeexit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tests.graphs import finish

Op = schema.BuiltinOperator
TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
}
SCALES = {"SOFTMAX": 1 / 256, "LOGISTIC": 1 / 256, "LOG_SOFTMAX": 16 / 256}
LOWEST = {"int8": -128, "uint8": 0, "float32": 0}


@dataclass(frozen=True)
class Head:
    """*units* logits and what comes behind; *of* names the head that it shares them with."""

    units: int
    end: tuple[str, ...] = ()
    of: str | None = None


class _Net:
    def __init__(self, dtype: str) -> None:
        self.dtype, self.rng = dtype, np.random.default_rng(3)
        self.tensors: list[Any] = []
        self.buffers: list[bytes] = [b""]
        self.operators: list[Any] = []
        self.codes: list[int] = []

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: str,
        scale: float = 0.0,
        zero_point: int = 0,
        values: "np.ndarray | None" = None,
    ) -> int:
        packed = schema.TensorT(
            shape=np.array(shape, np.int32), type=TYPES[dtype], name=f"value/{len(self.tensors)}"
        )
        if dtype in ("int8", "uint8", "int32") and scale:
            packed.quantization = schema.QuantizationParametersT(
                scale=np.array([scale], np.float32), zeroPoint=np.array([zero_point], np.int64)
            )
        if values is not None:
            packed.buffer = len(self.buffers)
            self.buffers.append(values.astype(dtype).tobytes())
        self.tensors.append(packed)
        return len(self.tensors) - 1

    def apply(
        self, kind: str, inputs: list[int], output: int, options: tuple[str, Any] | None = None
    ) -> int:
        code = getattr(Op, kind)
        if code not in self.codes:
            self.codes.append(code)
        name, values = options or ("NONE", None)
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self.codes.index(code),
                inputs=np.array(inputs, np.int32),
                outputs=np.array([output], np.int32),
                builtinOptionsType=getattr(schema.BuiltinOptions, name),
                builtinOptions=values,
            )
        )
        return output

    def linear(self, x: int, width: int, units: int, scales: tuple[float, float]) -> int:
        real = self.rng.normal(0, 1, (units, width))
        middle = 128 if self.dtype == "uint8" else 0
        if self.dtype == "float32":
            weights = self.tensor(real.shape, "float32", values=real)
            bias = self.tensor((units,), "float32", values=self.rng.normal(0, 0.3, units))
        else:
            step = np.abs(real).max() / 127
            stored = np.rint(real / step) + middle
            weights = self.tensor(real.shape, self.dtype, step, middle, stored)
            offset = self.rng.integers(-90, 90, units)
            bias = self.tensor((units,), "int32", step * scales[0], 0, offset)
        made = self.tensor((1, units), self.dtype, scales[1], middle + 3)
        options = ("FullyConnectedOptions", schema.FullyConnectedOptionsT())
        return self.apply("FULLY_CONNECTED", [x, weights, bias], made, options)

    def end(self, x: int, kind: str) -> int:
        old = self.tensors[x]
        shape = tuple(old.shape)
        dtype = next(name for name, number in TYPES.items() if number == old.type)
        scale, zero = 0.0, 0
        if old.quantization is not None:
            scale, zero = float(old.quantization.scale[0]), int(old.quantization.zeroPoint[0])
        if kind in SCALES:
            lowest = LOWEST[dtype] + (255 if kind == "LOG_SOFTMAX" else 0)
            made = self.tensor(shape, dtype, SCALES[kind], lowest)
            options = ("SoftmaxOptions", schema.SoftmaxOptionsT(beta=1.0))
            return self.apply(kind, [x], made, options if kind == "SOFTMAX" else None)
        if kind == "DEQUANTIZE":
            return self.apply(kind, [x], self.tensor(shape, "float32"))
        if kind == "QUANTIZE":
            return self.apply(kind, [x], self.tensor(shape, "uint8", scale, zero + 128))
        if kind == "ARG_MAX":
            axis = self.tensor((), "int32", values=np.array(1))
            options = ("ArgMaxOptions", schema.ArgMaxOptionsT(outputType=TYPES["int32"]))
            return self.apply(kind, [x, axis], self.tensor((1,), "int32"), options)
        target = {
            "RESHAPE": (1, shape[-1]),
            "MAP": (1, 1, 1, shape[-1]),
            "PLACES": (1, 2, 2, shape[-1] // 4),
            "ROWS": (1, shape[-1] // 4, 4),
        }[kind]
        wanted = self.tensor((len(target),), "int32", values=np.array(target))
        options = ("ReshapeOptions", schema.ReshapeOptionsT(newShape=np.array(target, np.int32)))
        return self.apply("RESHAPE", [x, wanted], self.tensor(target, dtype, scale, zero), options)

    def pack(self, inputs: list[int], outputs: list[int]) -> bytes:
        graph = schema.SubGraphT(
            tensors=self.tensors,
            operators=self.operators,
            inputs=np.array(inputs, np.int32),
            outputs=np.array(outputs, np.int32),
            name="main",
        )
        codes = [
            schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1)
            for code in self.codes
        ]
        buffers = [
            schema.BufferT(data=np.frombuffer(data, np.uint8)) if data else schema.BufferT()
            for data in self.buffers
        ]
        return finish(
            schema.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=buffers)
        )


def network(heads: dict[str, Head], dtype: str, *, apart: bool = False) -> bytes:
    """
    A network on (1, 8) values of *dtype* whose outputs are called as *heads* says.

    *apart*: every head has a stem of its own.
    """
    net = _Net(dtype)
    middle = 128 if dtype == "uint8" else 0
    start = net.tensor((1, 8), dtype, 0.05, middle)
    net.tensors[start].name = "samples"
    stem = net.linear(start, 8, 16, (0.05, 0.1))
    logits, outputs = {}, []
    for name, head in heads.items():
        if apart and logits:
            stem = net.linear(start, 8, 16, (0.05, 0.1))
        value = logits[head.of] if head.of else net.linear(stem, 16, head.units, (0.1, 0.2))
        logits[name] = value
        for kind in head.end:
            value = net.end(value, kind)
        net.tensors[value].name = name
        outputs.append(value)
    return net.pack([start], outputs)
