"""
Rewrite what onnx2tf makes into the operators that quantize well and run fast: same answers.

Callers see tidy. Surprising, each found by measuring: a BATCH_MATMUL with constant weights gets
its int8 scales along the wrong axis and answers nonsense; 1 / SQRT(v) divides by an int8 zero and
stops the runtime; an activation behind a transposition is not taken over by XNNPACK in int8.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgeexit import tflite
from edgeexit.tflite import Model, Operator, Tensor


def tidy(data: bytes, exits: Mapping[str, int], where: str) -> tuple[bytes, dict[str, int]]:
    """
    The float .tflite *data* rewritten by RULES, and where its *exits* (tensor indices) are then.

    Operators and tensors that nothing needs any more go. BadFile for a damaged file.
    """
    graph = _Graph(tflite.read_model(data, where), set(exits.values()))
    while any(rule(graph, place) for place in range(len(graph.operators)) for rule in RULES):
        pass
    model = graph.model()
    written = tflite.write_model(
        model,
        range(len(model.operators)),
        model.inputs,
        list(exits.values()),
        description="edgeexit",
    )
    outputs = tflite.read_model(written, where).outputs
    return written, dict(zip(exits, outputs, strict=True))


class _Graph:
    """A model whose operators can be exchanged one by one; *kept* tensors stay as they are."""

    def __init__(self, model: Model, kept: set[int]) -> None:
        self._model, self.kept = model, kept
        self.tensors = list(model.tensors)
        self.operators = list(model.operators)
        self.opcodes = list(model.opcodes)
        self._index()

    def _index(self) -> None:
        self.maker = {t: k for k, op in enumerate(self.operators) for t in op.outputs}
        self.users = Counter(t for op in self.operators for t in op.inputs if t >= 0)

    def model(self) -> Model:
        return replace(
            self._model,
            tensors=tuple(self.tensors),
            operators=tuple(self.operators),
            opcodes=tuple(self.opcodes),
        )

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.tensors[tensor].shape

    def values(self, tensor: int) -> "np.ndarray[Any, Any] | None":
        """What a float32 constant holds, in its shape; None if it is anything else."""
        found = self.tensors[tensor] if tensor >= 0 else None
        if found is None or found.constant is None or found.dtype != "float32":
            return None
        return found.constant.view(np.float32).reshape(found.shape)

    def behind(self, tensor: int, *kinds: str) -> Operator | None:
        """The operator of one of *kinds* that makes *tensor* for one single reader."""
        place = self.maker.get(tensor)
        if place is None or tensor in self.kept or self.users[tensor] != 1:
            return None
        operator = self.operators[place]
        return operator if operator.kind in kinds else None

    def channels(self, reader: Operator) -> range:
        """Which channels of its input a SLICE takes for all places; none for any other operator."""
        if reader.kind != "SLICE":
            return range(0)
        (output,), (x, begin, _) = reader.outputs, reader.inputs
        starts, shape, whole = self.tensors[begin], self.shape(output), self.shape(x)
        if starts.constant is None or starts.dtype != "int32" or starts.shape != (len(whole),):
            return range(0)
        if not whole or shape[:-1] != whole[:-1]:
            return range(0)
        first = int(starts.constant.view(np.int32)[-1])
        return range(first, first + shape[-1])

    def constant(self, like: int, values: "np.ndarray[Any, Any]") -> int:
        from ai_edge_litert import schema_py_generated as schema

        packed = schema.TensorT(**vars(self.tensors[like].packed))
        packed.shape, packed.shapeSignature = np.array(values.shape, np.int32), None
        stored = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        # Numbers below zero are no file's: buffers are told apart by them, not found.
        fresh = -1 - len(self.tensors)
        self.tensors.append(
            Tensor(
                name="",
                shape=values.shape,
                dtype="float32",
                scales=(),
                zero_points=(),
                buffer=fresh,
                constant=stored,
                packed=packed,
            )
        )
        return len(self.tensors) - 1

    def exchange(
        self,
        old: Operator,
        kind: str,
        inputs: tuple[int, ...],
        output: int,
        options: Any = None,
    ) -> bool:
        """Put another operator where *old* stood; what nobody reads afterwards goes."""
        from ai_edge_litert import schema_py_generated as schema

        packed = schema.OperatorT()
        if options is not None:
            word = type(options).__name__.removesuffix("T")
            packed.builtinOptionsType = getattr(schema.BuiltinOptions, word)
            packed.builtinOptions = options
        fresh = Operator(
            kind=kind, opcode=self._opcode(kind), inputs=inputs, outputs=(output,), packed=packed
        )
        place = next(k for k, operator in enumerate(self.operators) if operator is old)
        for k, other in enumerate(self.operators):  # who made it before makes it no longer
            if other is not old and output in other.outputs:
                del self.operators[k]
                place -= k < place
                break
        self.operators[place] = fresh
        self._drop_unread()
        return True

    def _drop_unread(self) -> None:
        self._index()
        while True:
            needed = self.kept | set(self.users)
            alive = [op for op in self.operators if needed & set(op.outputs)]
            if len(alive) == len(self.operators):
                return
            self.operators = alive
            self._index()

    def _opcode(self, kind: str) -> int:
        from ai_edge_litert import schema_py_generated as schema

        number = getattr(schema.BuiltinOperator, kind)
        for place, code in enumerate(self.opcodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                return place
        self.opcodes.append(
            schema.OperatorCodeT(
                builtinCode=number, deprecatedBuiltinCode=min(number, 127), version=1
            )
        )
        return len(self.opcodes) - 1


def _linear(graph: _Graph, place: int) -> bool:
    """BATCH_MATMUL with constant weights -> FULLY_CONNECTED."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "BATCH_MATMUL":
        return False
    x, w = operator.inputs
    weights, options = graph.values(w), operator.packed.builtinOptions
    if weights is None or graph.values(x) is not None or options.adjX:
        return False
    rows, columns = weights.shape[-2:]
    if weights.size != rows * columns:
        return False
    flat = weights.reshape(rows, columns)
    turned = flat if options.adjY else flat.T
    (output,) = operator.outputs
    if graph.shape(output) != (*graph.shape(x)[:-1], turned.shape[0]):
        return False
    made = schema.FullyConnectedOptionsT(keepNumDims=True)
    return graph.exchange(
        operator, "FULLY_CONNECTED", (x, graph.constant(w, turned), -1), output, made
    )


def _bias(graph: _Graph, place: int) -> bool:
    """FULLY_CONNECTED without a bias, and a constant added to it -> with a bias."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "ADD":
        return False
    for x, b in (operator.inputs, operator.inputs[::-1]):
        linear, bias = graph.behind(x, "FULLY_CONNECTED"), graph.values(b)
        if linear is None or bias is None or linear.inputs[2:] not in ((), (-1,)):
            continue
        (output,) = operator.outputs
        if bias.size != graph.shape(x)[-1] or bias.shape[-1:] != (bias.size,):
            continue
        old = linear.packed.builtinOptions
        if old.fusedActivationFunction or graph.shape(output) != graph.shape(x):
            continue
        made = schema.FullyConnectedOptionsT(**vars(old))
        made.fusedActivationFunction = operator.packed.builtinOptions.fusedActivationFunction
        added = graph.constant(b, bias.reshape(-1))
        return graph.exchange(linear, "FULLY_CONNECTED", (*linear.inputs[:2], added), output, made)
    return False


def _root(graph: _Graph, place: int) -> bool:
    """X / SQRT(v) -> x * RSQRT(v); with x = 1, RSQRT(v) alone."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "DIV" or operator.packed.builtinOptions.fusedActivationFunction:
        return False
    x, divisor = operator.inputs
    root = graph.behind(divisor, "SQRT")
    if root is None:
        return False
    (output,), ones = operator.outputs, graph.values(x)
    if ones is not None and (ones == 1).all() and graph.shape(output) == graph.shape(divisor):
        return graph.exchange(operator, "RSQRT", root.inputs, output)
    graph.exchange(root, "RSQRT", root.inputs, divisor)
    return graph.exchange(operator, "MUL", (x, divisor), output, schema.MulOptionsT())


def _pooled(graph: _Graph, place: int) -> bool:
    """MEAN that keeps its axes, reshaped to what it is without them -> MEAN without them."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "RESHAPE":
        return False
    mean = graph.behind(operator.inputs[0], "MEAN")
    if mean is None or not mean.packed.builtinOptions.keepDims:
        return False
    axes = graph.tensors[mean.inputs[1]]
    if axes.constant is None or axes.dtype != "int32":
        return False
    shape = graph.shape(mean.inputs[0])
    gone = {int(axis) % len(shape) for axis in axes.constant.view(np.int32)}
    (output,) = operator.outputs
    if graph.shape(output) != tuple(n for k, n in enumerate(shape) if k not in gone):
        return False
    return graph.exchange(mean, "MEAN", mean.inputs, output, schema.ReducerOptionsT(keepDims=False))


def _activation(graph: _Graph, place: int) -> bool:
    """RELU behind a convolution, or behind its transposed or reshaped map -> within it."""
    operator = graph.operators[place]
    if operator.kind not in _ACTIVATIONS:
        return False
    moved = graph.operators[place].inputs[0]
    last = mover = graph.behind(moved, "TRANSPOSE", "RESHAPE")
    while mover is not None:
        moved = mover.inputs[0]
        mover = graph.behind(moved, "TRANSPOSE", "RESHAPE")
    made = graph.behind(moved, "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD")
    if made is None or made.packed.builtinOptions.fusedActivationFunction:
        return False
    options = type(made.packed.builtinOptions)(**vars(made.packed.builtinOptions))
    options.fusedActivationFunction = _ACTIVATIONS[operator.kind]
    (output,) = operator.outputs
    if last is None:
        return graph.exchange(made, made.kind, made.inputs, output, options)
    graph.exchange(made, made.kind, made.inputs, made.outputs[0], options)
    return graph.exchange(last, last.kind, last.inputs, output, last.packed.builtinOptions)


def _divided(graph: _Graph, place: int) -> bool:
    """FULLY_CONNECTED whose channels SLICEs share out -> for each of them one of its own."""
    operator = graph.operators[place]
    if operator.kind != "FULLY_CONNECTED":
        return False
    (whole,), (x, w, *rest) = operator.outputs, operator.inputs
    weights, bias = graph.values(w), graph.values(rest[0]) if rest else None
    if whole in graph.kept or weights is None or (rest and rest[0] >= 0 and bias is None):
        return False
    readers = [other for other in graph.operators if whole in other.inputs]
    parts = [graph.channels(reader) for reader in readers]
    rows = sorted(row for part in parts for row in part)
    if len(parts) < 2 or rows != list(range(len(weights))):
        return False
    for reader, part in zip(readers, parts, strict=True):
        own = slice(part.start, part.stop)
        added = -1 if bias is None else graph.constant(rest[0], bias[own])
        inputs = (x, graph.constant(w, weights[own]), added)
        (output,) = reader.outputs
        graph.exchange(reader, "FULLY_CONNECTED", inputs, output, operator.packed.builtinOptions)
    return True


def _idle(graph: _Graph, place: int) -> bool:
    """RESHAPE to the shape that there is, ADD of zeros, MUL by ones -> nothing."""
    operator = graph.operators[place]
    (output, *_), options = operator.outputs, operator.packed.builtinOptions
    changes = {"RESHAPE": None, "ADD": 0, "MUL": 1}
    if operator.kind not in changes or output in graph.kept:
        return False
    if getattr(options, "fusedActivationFunction", 0):
        return False
    x = operator.inputs[0]
    if operator.kind != "RESHAPE":
        x, other = sorted(operator.inputs, key=lambda t: graph.values(t) is not None)
        values = graph.values(other)
        if values is None or not (values == changes[operator.kind]).all():
            return False
    if graph.shape(x) != graph.shape(output):
        return False
    for k, reader in enumerate(graph.operators):
        if output in reader.inputs:
            inputs = tuple(x if t == output else t for t in reader.inputs)
            graph.operators[k] = replace(reader, inputs=inputs)
    graph._drop_unread()
    return True


_ACTIVATIONS = {"RELU": 1, "RELU6": 3}

RULES: tuple[Callable[[_Graph, int], bool], ...] = (
    _linear,
    _bias,
    _root,
    _pooled,
    _activation,
    _divided,
    _idle,
)
