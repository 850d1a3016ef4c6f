"""
Add tensors and operators to a .tflite that was taken apart.

Callers see Graft: what it adds stands behind everything that was there, and nothing that was
there changes. Hidden here: which numbers and which versions of operators the schema wants.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.tflite import Model, Operator, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The lowest version of each operator's kernel that takes a dtype.
_VERSIONS = {
    "PAD": {"float32": 1, "uint8": 1, "int8": 2, "int16": 3},
    "RESHAPE": {},
    "MEAN": {"float32": 1, "uint8": 1, "int8": 2, "int16": 3},
    "FULLY_CONNECTED": {"float32": 1, "uint8": 1, "int8": 4},
}
_OPTIONS = {
    "PAD": "PadOptions",
    "RESHAPE": "ReshapeOptions",
    "MEAN": "ReducerOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
}


class Graft:
    """A model that grows; tensors are indices as in Model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._added = 0

    def tensor(self, index: int) -> Tensor:
        """The tensor *index*, old or new."""
        return self.model.tensors[index]

    def reshape(self, x: int, shape: tuple[int, ...]) -> int:
        """*x* with *shape* of as many values."""
        target = np.array(shape, np.int32)
        made = self._like(x, shape)
        return self._apply("RESHAPE", [x, self.constant(target)], made, newShape=target)

    def pad_front(self, x: int) -> int:
        """*x* (1, n) with a zero before its values: (1, n + 1)."""
        amounts = np.array([[0, 0], [1, 0]], np.int32)
        made = self._like(x, (1, self.tensor(x).shape[1] + 1))
        return self._apply("PAD", [x, self.constant(amounts)], made)

    def mean(self, x: int, scale: float, zero_point: int) -> int:
        """The means (1, C) of *x* (1, ..., C) over its places; scale 0.0 means float."""
        shape = self.tensor(x).shape
        axes = np.arange(1, len(shape) - 1, dtype=np.int32)
        made = self._value(x, (1, shape[-1]), scale, zero_point)
        return self._apply("MEAN", [x, self.constant(axes)], made, keepDims=False)

    def linear(self, x: int, weights: int, bias: int, scale: float, zero_point: int) -> int:
        """*weights* (outputs, inputs) times *x* (1, inputs), plus *bias*; scale 0.0: float."""
        made = self._value(x, (1, self.tensor(weights).shape[0]), scale, zero_point)
        return self._apply("FULLY_CONNECTED", [x, weights, bias], made)

    def constant(self, values: "NDArray[Any]", scale: float = 0.0, zero_point: int = 0) -> int:
        """A tensor that holds *values*."""
        self._added += 1
        stored = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        # Numbers below zero are no file's: buffers are told apart by them, not found.
        return self._add(
            values.shape, values.dtype.name, scale, zero_point, -self._added, constant=stored
        )

    def _like(self, x: int, shape: tuple[int, ...]) -> int:
        old = self.tensor(x)
        scale = old.scales[0] if old.scales else 0.0
        return self._value(x, shape, scale, old.zero_points[0] if old.zero_points else 0)

    def _value(self, x: int, shape: tuple[int, ...], scale: float, zero_point: int) -> int:
        return self._add(shape, self.tensor(x).dtype, scale, zero_point, 0)

    def _add(
        self,
        shape: Sequence[int],
        dtype: str,
        scale: float,
        zero_point: int,
        buffer: int,
        *,
        constant: "NDArray[np.uint8] | None" = None,
    ) -> int:
        from ai_edge_litert import schema_py_generated as schema

        packed = schema.TensorT(
            shape=np.array(shape, np.int32), type=getattr(schema.TensorType, dtype.upper())
        )
        packed.name = b""
        if scale:
            packed.quantization = schema.QuantizationParametersT(
                scale=np.array([scale], np.float32), zeroPoint=np.array([zero_point], np.int64)
            )
        tensor = Tensor(
            name="",
            shape=tuple(shape),
            dtype=dtype,
            scales=(float(np.float32(scale)),) if scale else (),
            zero_points=(zero_point,) if scale else (),
            buffer=buffer,
            constant=constant,
            packed=packed,
        )
        self.model = replace(self.model, tensors=(*self.model.tensors, tensor))
        return len(self.model.tensors) - 1

    def _apply(self, kind: str, inputs: list[int], output: int, **options: Any) -> int:
        from ai_edge_litert import schema_py_generated as schema

        packed = schema.OperatorT(
            builtinOptionsType=getattr(schema.BuiltinOptions, _OPTIONS[kind]),
            builtinOptions=getattr(schema, f"{_OPTIONS[kind]}T")(**options),
        )
        operator = Operator(
            kind=kind,
            opcode=self._opcode(kind, self.tensor(inputs[0]).dtype),
            inputs=tuple(inputs),
            outputs=(output,),
            packed=packed,
        )
        self.model = replace(self.model, operators=(*self.model.operators, operator))
        return output

    def _opcode(self, kind: str, dtype: str) -> int:
        from ai_edge_litert import schema_py_generated as schema

        number = getattr(schema.BuiltinOperator, kind)
        version = _VERSIONS[kind].get(dtype, 1)
        for place, code in enumerate(self.model.opcodes):
            same = max(code.builtinCode, code.deprecatedBuiltinCode) == number
            if same and code.version == version:
                return place
        fresh = schema.OperatorCodeT(
            builtinCode=number, deprecatedBuiltinCode=number, version=version
        )
        self.model = replace(self.model, opcodes=(*self.model.opcodes, fresh))
        return len(self.model.opcodes) - 1
