"""Float .tflite files written down operator by operator."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from graphs import finish

_OPTIONS = {
    "BATCH_MATMUL": "BatchMatMulOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "RESHAPE": "ReshapeOptions",
    "TRANSPOSE": "TransposeOptions",
    "MEAN": "ReducerOptions",
    "CONV_2D": "Conv2DOptions",
}


class FloatGraph:
    """One input "input"; tensors are told apart by the names that they are given here."""

    def __init__(self, *shape: int) -> None:
        self.tensors: dict[str, schema.TensorT] = {}
        self.buffers = [schema.BufferT()]
        self.operators: list[schema.OperatorT] = []
        self.kinds: list[str] = []
        self._tensor("input", shape, np.dtype(np.float32))

    def constant(self, name: str, values: Any) -> str:
        values = np.asarray(values)
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self._tensor(name, values.shape, values.dtype).buffer = len(self.buffers)
        self.buffers.append(buffer)
        return name

    def add(self, kind: str, inputs: list[str], output: str, shape: Any, **options: Any) -> str:
        self._tensor(output, shape, np.dtype(np.float32))
        operator = schema.OperatorT()
        if kind not in self.kinds:
            self.kinds.append(kind)
        operator.opcodeIndex = self.kinds.index(kind)
        places = list(self.tensors)
        operator.inputs = [places.index(name) if name else -1 for name in inputs]
        operator.outputs = [places.index(output)]
        if kind in _OPTIONS:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, _OPTIONS[kind])
            operator.builtinOptions = getattr(schema, f"{_OPTIONS[kind]}T")(**options)
        self.operators.append(operator)
        return output

    def data(self, *outputs: str) -> bytes:
        places = list(self.tensors)
        graph = schema.SubGraphT()
        graph.name, graph.inputs = b"main", [0]
        graph.outputs = [places.index(name) for name in outputs]
        graph.tensors, graph.operators = list(self.tensors.values()), self.operators
        codes = []
        for kind in self.kinds:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
            codes.append(code)
        model = schema.ModelT()
        model.version, model.description = 3, b"by hand"
        model.operatorCodes, model.subgraphs, model.buffers = codes, [graph], self.buffers
        return finish(model)

    def _tensor(self, name: str, shape: Any, dtype: "np.dtype[Any]") -> schema.TensorT:
        tensor = schema.TensorT()
        tensor.name, tensor.buffer = name.encode(), 0
        tensor.shape = np.array(shape, np.int32)
        tensor.type = getattr(schema.TensorType, dtype.name.upper())
        assert name not in self.tensors
        self.tensors[name] = tensor
        return tensor
