"""
Rewrite what converters make into the operators that quantize well and run fast: same answers.

Callers see tidy, and CHANNELS. Surprising, each found by measuring: a BATCH_MATMUL with constant
weights gets its int8 scales along the wrong axis and answers nonsense; 1 / SQRT(v) divides by an
int8 zero and stops the runtime; an activation behind a transposition is not taken over by XNNPACK
in int8.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
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
    is_done = False
    while not is_done:
        is_done, place = True, 0
        while place < len(graph.operators):
            if any(rule(graph, place) for rule in RULES):
                is_done = False
            else:
                place += 1
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
        self._drop_unread()

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

    def integers(self, tensor: int) -> list[int] | None:
        """Axes, an order or a shape: what an int32 constant holds; None for anything else."""
        found = self.tensors[tensor] if tensor >= 0 else None
        if found is None or found.constant is None or found.dtype != "int32":
            return None
        return [int(value) for value in found.constant.view(np.int32)]

    def behind(self, tensor: int, *kinds: str) -> Operator | None:
        """The operator of one of *kinds* that makes *tensor* for one single reader."""
        place = self.maker.get(tensor)
        if place is None or tensor in self.kept or self.users[tensor] != 1:
            return None
        operator = self.operators[place]
        return operator if operator.kind in kinds else None

    def constant_last(self, operator: Operator) -> tuple[int, int]:
        """The two inputs of *operator*; if one is a float32 constant, that one last."""
        x, other = sorted(operator.inputs, key=lambda tensor: self.values(tensor) is not None)
        return x, other

    def channels(self, reader: Operator) -> range:
        """Which channels of its input a SLICE takes for all places; none for any other operator."""
        if reader.kind != "SLICE":
            return range(0)
        (output,), (x, begin, _) = reader.outputs, reader.inputs
        starts, shape, whole = self.integers(begin), self.shape(output), self.shape(x)
        if not starts or len(starts) != len(whole) or shape[:-1] != whole[:-1]:
            return range(0)
        return range(starts[-1], starts[-1] + shape[-1])

    def moves(self, tensor: int, *, is_shared: bool) -> tuple[int, list[Operator]]:
        """
        The tensor that *tensor* is another order or shape of, and what moves it, last first.

        Unless *is_shared*, nobody else may read what lies between, nor may it be an exit.
        """
        found: list[Operator] = []
        while True:
            place = self.maker.get(tensor)
            mover = None if place is None else self.operators[place]
            if mover is None or mover.kind not in ("TRANSPOSE", "RESHAPE"):
                return tensor, found
            if mover.kind == "TRANSPOSE" and self.integers(mover.inputs[1]) is None:
                return tensor, found
            if not is_shared and (tensor in self.kept or self.users[tensor] != 1):
                return tensor, found
            found.append(mover)
            tensor = mover.inputs[0]

    def moved(self, values: "np.ndarray[Any, Any]", moves: list[Operator]) -> Any:
        """*values* of the tensor in front of *moves* (last first) as they are behind them."""
        for mover in reversed(moves):
            if mover.kind == "TRANSPOSE":
                values = values.transpose(self.integers(mover.inputs[1]))
            else:
                values = values.reshape(self.shape(mover.outputs[0]))
        return values

    def leave_out(self, operator: Operator, instead: int) -> bool:
        """Let the readers of *operator* read the tensor *instead*."""
        (output,) = operator.outputs
        for k, reader in enumerate(self.operators):
            if output in reader.inputs:
                inputs = tuple(instead if t == output else t for t in reader.inputs)
                self.operators[k] = replace(reader, inputs=inputs)
        self._drop_unread()
        return True

    def remake(
        self,
        made: Operator,
        inputs: tuple[int, ...],
        moves: list[Operator],
        output: int,
        activation: int,
    ) -> bool:
        """Give *made* other *inputs* and an *activation*, and *moves* (last first) an *output*."""
        options = type(made.packed.builtinOptions)(**vars(made.packed.builtinOptions))
        options.fusedActivationFunction = activation
        if not moves:
            return self.exchange(made, made.kind, inputs, output, options)
        self.exchange(made, made.kind, inputs, made.outputs[0], options)
        last = moves[0]
        return self.exchange(last, last.kind, last.inputs, output, last.packed.builtinOptions)

    def constant(self, like: int, values: "np.ndarray[Any, Any]") -> int:
        """A new constant of *values*, of the dtype of the tensor *like*: float32 or int32."""
        from ai_edge_litert import schema_py_generated as schema

        packed = schema.TensorT(**vars(self.tensors[like].packed))
        packed.shape, packed.shapeSignature = np.array(values.shape, np.int32), None
        dtype = self.tensors[like].dtype
        stored = np.ascontiguousarray(values, np.dtype(dtype)).reshape(-1).view(np.uint8)
        # Numbers below zero are no file's: buffers are told apart by them, not found.
        fresh = -1 - len(self.tensors)
        self.tensors.append(
            Tensor(
                name="",
                shape=values.shape,
                dtype=dtype,
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


def _fused(operator: Operator) -> int:
    """The number of the activation within *operator*; 0 for none."""
    return int(getattr(operator.packed.builtinOptions, "fusedActivationFunction", 0))


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


def _scaled(graph: _Graph, place: int) -> bool:
    """A constant for each channel by which a product is multiplied, or added -> within it."""
    operator = graph.operators[place]
    if operator.kind not in ("ADD", "MUL"):
        return False
    (output,), (x, other) = operator.outputs, graph.constant_last(operator)
    values = graph.values(other)
    if values is None or graph.shape(x) != graph.shape(output):
        return False
    first, moves = graph.moves(x, is_shared=False)
    made = graph.behind(first, *CHANNELS)
    if made is None or made.packed.builtinOptions is None or _fused(made):
        return False
    _, w, b, *_ = (*made.inputs, -1)
    weights, channels = graph.values(w), graph.shape(first)[-1]
    bias = np.zeros(channels, np.float32) if b < 0 else graph.values(b)
    if weights is None or weights.shape[CHANNELS[made.kind]] != channels:
        return False
    if bias is None or bias.shape != (channels,):
        return False
    # Which channel every value comes from: all of one channel must meet the same constant.
    channel = graph.moved(np.broadcast_to(np.arange(channels), graph.shape(first)), moves)
    values = np.broadcast_to(values, channel.shape)
    each = np.zeros(channels, np.float32)
    each[channel] = values
    if not (each[channel] == values).all():
        return False
    if operator.kind == "MUL":
        turned = np.moveaxis(weights, CHANNELS[made.kind], -1)
        w = graph.constant(w, np.moveaxis(turned * each, -1, CHANNELS[made.kind]))
        bias = bias * each
    else:
        bias = bias + each
    inputs = (made.inputs[0], w, graph.constant(other if b < 0 else b, bias))
    return graph.remake(made, inputs, moves, output, _fused(operator))


def _root(graph: _Graph, place: int) -> bool:
    """X / SQRT(v) -> x * RSQRT(v); with x = 1, RSQRT(v) alone."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "DIV" or _fused(operator):
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
    axes = graph.integers(mean.inputs[1])
    if axes is None:
        return False
    shape = graph.shape(mean.inputs[0])
    gone = {axis % len(shape) for axis in axes}
    (output,) = operator.outputs
    if graph.shape(output) != tuple(n for k, n in enumerate(shape) if k not in gone):
        return False
    return graph.exchange(mean, "MEAN", mean.inputs, output, schema.ReducerOptionsT(keepDims=False))


def _averaged(graph: _Graph, place: int) -> bool:
    """MEAN of all there is of a channel, of a transposed or reshaped map -> of the map itself."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind != "MEAN":
        return False
    (x, axes), (output,) = operator.inputs, operator.outputs
    first, moves = graph.moves(x, is_shared=True)
    over, shape = graph.integers(axes), graph.shape(first)
    if not moves or over is None or len(shape) < 3:
        return False
    channels = shape[-1]
    if graph.shape(output) != (1, channels) or shape[0] != 1:
        return False
    channel = graph.moved(np.broadcast_to(np.arange(channels), shape), moves)
    gone = tuple({axis % channel.ndim for axis in over})
    least, most = channel.min(axis=gone).reshape(-1), channel.max(axis=gone).reshape(-1)
    if not (least == np.arange(channels)).all() or not (most == least).all():
        return False
    inner = graph.constant(axes, np.arange(1, len(shape) - 1))
    return graph.exchange(
        operator, "MEAN", (first, inner), output, schema.ReducerOptionsT(keepDims=False)
    )


def _activation(graph: _Graph, place: int) -> bool:
    """RELU behind a convolution, or behind its transposed or reshaped map -> within it."""
    operator = graph.operators[place]
    if operator.kind not in _ACTIVATIONS:
        return False
    x, moves = graph.moves(operator.inputs[0], is_shared=False)
    made = graph.behind(x, *CHANNELS, "ADD")
    if made is None or made.packed.builtinOptions is None or _fused(made):
        return False
    (output,) = operator.outputs
    return graph.remake(made, made.inputs, moves, output, _ACTIVATIONS[operator.kind])


def _divided(graph: _Graph, place: int) -> bool:
    """FULLY_CONNECTED whose channels SLICEs share out -> for each of them one of its own."""
    operator = graph.operators[place]
    if operator.kind != "FULLY_CONNECTED":
        return False
    (whole,), (x, w, *rest) = operator.outputs, operator.inputs
    weights, bias = graph.values(w), graph.values(rest[0]) if rest else None
    if whole in graph.kept or weights is None or (rest and rest[0] >= 0 and bias is None):
        return False
    if bias is not None and bias.shape != (len(weights),):
        return False
    readers = [other for other in graph.operators if whole in other.inputs]
    parts = [graph.channels(reader) for reader in readers]
    rows = sorted(row for part in parts for row in part)
    if len(parts) < 2 or not all(parts) or rows != list(range(len(weights))):
        return False
    for reader, part in zip(readers, parts, strict=True):
        own = slice(part.start, part.stop)
        added = -1 if bias is None else graph.constant(rest[0], bias[own])
        inputs = (x, graph.constant(w, weights[own]), added)
        (output,) = reader.outputs
        graph.exchange(reader, "FULLY_CONNECTED", inputs, output, operator.packed.builtinOptions)
    return True


def _still(graph: _Graph, place: int) -> bool:
    """TRANSPOSEs and RESHAPEs that undo each other -> nothing, or what is left as one RESHAPE."""
    from ai_edge_litert import schema_py_generated as schema

    operator = graph.operators[place]
    if operator.kind not in ("TRANSPOSE", "RESHAPE"):
        return False
    (output,) = operator.outputs
    first, moves = graph.moves(output, is_shared=True)
    shape = graph.shape(output)
    while moves:
        is_same = shape == graph.shape(first) and output not in graph.kept
        if is_same or len(moves) > 1:
            order = np.arange(math.prod(shape)).reshape(graph.shape(first))
            if (graph.moved(order, moves).reshape(-1) == order.reshape(-1)).all():
                if is_same:
                    return graph.leave_out(operator, first)
                told = (t for mover in moves for t in mover.inputs[1:] if graph.integers(t))
                lengths = [graph.constant(like, np.array(shape)) for like in islice(told, 1)]
                options = schema.ReshapeOptionsT(newShape=list(shape))
                return graph.exchange(operator, "RESHAPE", (first, *lengths), output, options)
        first = moves.pop().outputs[0]
    return False


def _idle(graph: _Graph, place: int) -> bool:
    """ADD of zeros, MUL by ones -> nothing."""
    operator = graph.operators[place]
    if operator.kind not in ("ADD", "MUL") or operator.outputs[0] in graph.kept:
        return False
    x, other = graph.constant_last(operator)
    values = graph.values(other)
    if values is None or not (values == (operator.kind == "MUL")).all():
        return False
    if _fused(operator):
        return False
    if graph.shape(x) != graph.shape(operator.outputs[0]):
        return False
    return graph.leave_out(operator, x)


# Products, and along which axis of their weights the channels lie that they make.
CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
_ACTIVATIONS = {"RELU": 1, "RELU6": 3}

RULES: tuple[Callable[[_Graph, int], bool], ...] = (
    _linear,
    _scaled,
    _root,
    _pooled,
    _averaged,
    _activation,
    _divided,
    _still,
    _idle,
)
