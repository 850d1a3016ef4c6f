"""
Random multi-exit networks as .tflite bytes, for tests of the cut.

A Recipe is plain small data, so that Hypothesis can shrink it and a found trap can be kept as
an example. build() turns it into a flatbuffer directly, without converter or quantizer: float,
or int8 with scales, zero points, per-channel weights and int32 biases written here. It shares
no code with edgeexit.tflite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from hypothesis import strategies as st

Op = schema.BuiltinOperator
Options = schema.BuiltinOptions
Type = schema.TensorType
DTYPES = {
    "float32": Type.FLOAT32,
    "float16": Type.FLOAT16,
    "int8": Type.INT8,
    "int32": Type.INT32,
    "int64": Type.INT64,
    "int16": Type.INT16,
}
ACTIVATIONS = [
    schema.ActivationFunctionType.NONE,
    schema.ActivationFunctionType.RELU,
    schema.ActivationFunctionType.RELU6,
]
CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    One network. steps are (kind, a, b, variant): a kind of layer, which of the suitable
    earlier values it reads (0 is the latest), and small choices; exits pick logits.
    """

    precision: str  # "float" | "int8"
    seed: int
    inputs: int
    steps: tuple[tuple[str, int, int, int], ...]
    exits: tuple[int, ...]
    outside: bool = False  # constants stored behind the flatbuffer
    squares: bool = False  # float x * x too: see test_float_square_across_a_cut


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A built network: its bytes, the same without dead operators, and what is true of it."""

    data: bytes
    alive: bytes
    exits: dict[str, str]  # exit name -> logits' tensor name, in declared order
    inputs: list[str]
    ancestors: dict[str, set[int]]  # exit name -> operators its logits need
    on_constants: set[int]  # operators that read nothing but constants


@dataclass(frozen=True, kw_only=True)
class Value:
    index: int
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    roots: frozenset[int]  # operators it needs

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 4


@dataclass
class Network:
    """A network under construction."""

    precision: str
    rng: np.random.Generator
    tensors: list[Any] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=lambda: [b""])
    operators: list[tuple[int, Any, int, list[int], list[int]]] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    shared: dict[Any, int] = field(default_factory=dict)
    squares: bool = False

    @property
    def dtype(self) -> str:
        return "int8" if self.precision == "int8" else "float32"

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: str,
        *,
        scale: "np.ndarray | float | None" = None,
        zero_point: int = 0,
        axis: int = 0,
        buffer: int = 0,
    ) -> int:
        packed = schema.TensorT(
            shape=np.array(shape, np.int32),
            type=DTYPES[dtype],
            buffer=buffer,
            name=f"value/{len(self.tensors)}",
        )
        if scale is not None:
            scales = np.atleast_1d(np.asarray(scale, np.float32))
            packed.quantization = schema.QuantizationParametersT(
                scale=scales,
                zeroPoint=np.full(len(scales), zero_point, np.int64),
                quantizedDimension=axis,
            )
        self.tensors.append(packed)
        return len(self.tensors) - 1

    def constant(self, array: np.ndarray, **quantization: Any) -> int:
        self.buffers.append(array.tobytes())
        return self.tensor(
            array.shape, array.dtype.name, buffer=len(self.buffers) - 1, **quantization
        )

    def twin(self, tensor: int, variant: int) -> int:
        """The same constant: the tensor itself, or a second tensor on the same buffer."""
        if variant % 2 or not self.tensors[tensor].buffer:  # widened float16 has one maker
            return tensor
        packed = schema.TensorT(**vars(self.tensors[tensor]))
        packed.name = f"value/{len(self.tensors)}"
        self.tensors.append(packed)
        return len(self.tensors) - 1

    def activation(
        self, shape: tuple[int, ...], scale: float, zero_point: int
    ) -> tuple[int, float, int]:
        if self.precision == "float":
            return self.tensor(shape, "float32"), 0.0, 0
        scale = float(np.float32(scale))
        return self.tensor(shape, "int8", scale=scale, zero_point=zero_point), scale, zero_point

    def input(self, shape: tuple[int, ...]) -> Value:
        index, scale, zero_point = self.activation(shape, 0.05, int(self.rng.integers(-9, 9)))
        value = Value(
            index=index, shape=shape, scale=scale, zero_point=zero_point, roots=frozenset()
        )
        self.values.append(value)
        return value

    def apply(
        self,
        op: int,
        options: tuple[int, Any] | None,
        inputs: list["Value | int"],
        shape: tuple[int, ...],
        scale: float,
        zero_point: int,
        *,
        twice: bool = False,
    ) -> Value:
        """Append one operator; *twice* gives it two outputs of that shape."""
        number = len(self.operators)
        roots = frozenset({number}).union(*(v.roots for v in inputs if isinstance(v, Value)))
        outputs = []
        for _ in range(2 if twice else 1):
            index, real_scale, real_zero = self.activation(shape, scale, zero_point)
            outputs.append(
                Value(index=index, shape=shape, scale=real_scale, zero_point=real_zero, roots=roots)
            )
        self.operators.append(
            (
                op,
                options[1] if options else None,
                options[0] if options else 0,
                [v.index if isinstance(v, Value) else v for v in inputs],
                [v.index for v in outputs],
            )
        )
        self.values.extend(outputs)
        return outputs[0]

    def weights(
        self, kind: str, shape: tuple[int, ...], axis: int, fan_in: int, x: Value, variant: int
    ) -> tuple[list[int], float]:
        """Tensor indices of weights and bias, and the scale of the layer's output."""
        channels = shape[axis]
        key = (kind, shape, x.scale)
        if key in self.shared and variant % 3 == 0:
            first, bias, scale = self.shared[key]  # type: ignore[misc]
            return [self.twin(first, variant), self.twin(bias, variant + 1)], scale
        if self.precision == "float":
            real = self.rng.standard_normal(shape).astype(np.float32) / np.float32(fan_in**0.5)
            if variant % 5 == 1 and kind != "depthwise":
                # Stored as float16, widened by an operator that sees only constants.
                half = self.constant(real.astype(np.float16))
                weights = self.tensor(shape, "float32")
                options = (Options.DequantizeOptions, schema.DequantizeOptionsT())
                self.operators.append((Op.DEQUANTIZE, options[1], options[0], [half], [weights]))
            else:
                weights = self.constant(real)
            bias = self.constant(self.rng.standard_normal(channels).astype(np.float32))
            scale = 0.0
        else:
            integers = self.rng.integers(-127, 128, shape).astype(np.int8)
            per_channel = kind != "dense"
            base = 1.0 / (73 * math.sqrt(fan_in))
            scales = base * self.rng.uniform(0.5, 1.5, channels if per_channel else 1)
            scales = scales.astype(np.float32)
            weights = self.constant(integers, scale=scales, axis=axis if per_channel else 0)
            bias_values = self.rng.integers(-(1 << 12), 1 << 12, channels).astype(np.int32)
            bias = self.constant(bias_values, scale=np.float32(x.scale) * scales)
            scale = float(np.clip(x.scale * self.rng.uniform(0.7, 1.5), 0.02, 0.2))
        self.shared[key] = (weights, bias, scale)  # type: ignore[assignment]
        return [weights, bias], scale

    def zero(self) -> int:
        return int(self.rng.integers(-20, 20))

    def as_scale(self, x: Value, scale: float, zero_point: int) -> Value:
        """x, requantized if it has another scale: joining int8 values needs equal ones."""
        if self.precision == "float" or (x.scale, x.zero_point) == (scale, zero_point):
            return x
        options = (Options.QuantizeOptions, schema.QuantizeOptionsT())
        return self.apply(Op.QUANTIZE, options, [x], x.shape, scale, zero_point)


def _conv(net: Network, x: Value, other: Value | None, variant: int) -> None:
    _, height, width, depth = x.shape
    kernel, stride = (1, 3)[variant % 2], (1, 2)[variant // 2 % 2]
    same = variant // 4 % 2 == 0 or kernel > min(height, width)
    channels = 2 + variant % 5
    inputs, scale = net.weights(
        "conv", (channels, kernel, kernel, depth), 0, kernel * kernel * depth, x, variant
    )
    options = schema.Conv2DOptionsT(
        padding=schema.Padding.SAME if same else schema.Padding.VALID,
        strideH=stride,
        strideW=stride,
        dilationHFactor=1,
        dilationWFactor=1,
        fusedActivationFunction=ACTIVATIONS[variant % 3],
    )
    shape = (1, *_size(height, width, kernel, stride, same), channels)
    net.apply(Op.CONV_2D, (Options.Conv2DOptions, options), [x, *inputs], shape, scale, net.zero())


def _depthwise(net: Network, x: Value, other: Value | None, variant: int) -> None:
    _, height, width, depth = x.shape
    stride, multiplier = 1 + variant % 2, 1 + variant // 2 % 2 * (depth < 4)
    inputs, scale = net.weights("depthwise", (1, 3, 3, depth * multiplier), 3, 9, x, variant)
    options = schema.DepthwiseConv2DOptionsT(
        padding=schema.Padding.SAME,
        strideH=stride,
        strideW=stride,
        depthMultiplier=multiplier,
        dilationHFactor=1,
        dilationWFactor=1,
        fusedActivationFunction=ACTIVATIONS[variant % 3],
    )
    shape = (1, *_size(height, width, 3, stride, True), depth * multiplier)
    net.apply(
        Op.DEPTHWISE_CONV_2D,
        (Options.DepthwiseConv2DOptions, options),
        [x, *inputs],
        shape,
        scale,
        net.zero(),
    )


def _size(height: int, width: int, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    room = 0 if same else kernel - 1
    return -(-(height - room) // stride), -(-(width - room) // stride)


def _binary(op: int, kind: int, options: Callable[..., Any]) -> Callable[..., None]:
    def layer(net: Network, x: Value, other: Value | None, variant: int) -> None:
        if other is None:
            return
        if op == Op.MUL and other is x and net.precision == "float" and not net.squares:
            return
        chosen = options(fusedActivationFunction=ACTIVATIONS[variant % 3])
        scale = math.hypot(x.scale, other.scale) or 0.0
        scale = float(np.clip(scale, 0.02, 0.2))
        net.apply(op, (kind, chosen), [x, other], x.shape, scale, net.zero())

    return layer


def _pad(net: Network, x: Value, other: Value | None, variant: int) -> None:
    _, height, width, depth = x.shape
    if height > 10:
        return
    key = ("pad", variant % 2)
    if key not in net.shared:
        amounts = [[0, 0], [1, 1], [variant % 2, 1], [0, 0]]
        net.shared[key] = net.constant(np.array(amounts, np.int32))
    shape = (1, height + 2, width + 1 + variant % 2, depth)
    options = (Options.PadOptions, schema.PadOptionsT())
    net.apply(Op.PAD, options, [x, net.shared[key]], shape, x.scale, x.zero_point)


def _pool(op: int) -> Callable[..., None]:
    def layer(net: Network, x: Value, other: Value | None, variant: int) -> None:
        _, height, width, depth = x.shape
        options = schema.Pool2DOptionsT(
            padding=schema.Padding.SAME,
            strideH=1 + variant % 2,
            strideW=1 + variant % 2,
            filterHeight=2,
            filterWidth=2,
        )
        shape = (1, *_size(height, width, 2, 1 + variant % 2, True), depth)
        net.apply(op, (Options.Pool2DOptions, options), [x], shape, x.scale, x.zero_point)

    return layer


def _unary(op: int) -> Callable[..., None]:
    def layer(net: Network, x: Value, other: Value | None, variant: int) -> None:
        scale, zero_point = x.scale, x.zero_point
        if op == Op.LOGISTIC:
            scale, zero_point = 1 / 256, -128
        net.apply(op, None, [x], x.shape, scale, zero_point)

    return layer


def _concatenate(net: Network, x: Value, other: Value | None, variant: int) -> None:
    axis = len(x.shape) - 1
    if other is None or x.shape[axis] + other.shape[axis] > 12:
        return
    other = net.as_scale(other, x.scale, x.zero_point)
    shape = (*x.shape[:axis], x.shape[axis] + other.shape[axis])
    options = (Options.ConcatenationOptions, schema.ConcatenationOptionsT(axis=axis))
    net.apply(Op.CONCATENATION, options, [x, other], shape, x.scale, x.zero_point)


def _split(net: Network, x: Value, other: Value | None, variant: int) -> None:
    axis = len(x.shape) - 1
    if x.shape[axis] % 2:
        return
    which = net.constant(np.array(axis, np.int32))
    options = (Options.SplitOptions, schema.SplitOptionsT(numSplits=2))
    shape = (*x.shape[:axis], x.shape[axis] // 2)
    net.apply(Op.SPLIT, options, [which, x], shape, x.scale, x.zero_point, twice=True)


def _mean(net: Network, x: Value, other: Value | None, variant: int) -> Value:
    if "axes" not in net.shared:
        net.shared["axes"] = net.constant(np.array([1, 2], np.int32))
    options = (Options.ReducerOptions, schema.ReducerOptionsT(keepDims=False))
    shape = (1, x.shape[3])
    scale = x.scale if variant % 2 else x.scale * 0.6
    return net.apply(Op.MEAN, options, [x, net.shared["axes"]], shape, scale, x.zero_point)


def _flatten(net: Network, x: Value, other: Value | None, variant: int) -> None:
    size = math.prod(x.shape)
    if size > 400:
        return
    _reshape(net, x, (1, size))


def _reshape(net: Network, x: Value, shape: tuple[int, ...]) -> Value:
    target = np.array(shape, np.int32)
    options = (Options.ReshapeOptions, schema.ReshapeOptionsT(newShape=target))
    return net.apply(Op.RESHAPE, options, [x, net.constant(target)], shape, x.scale, x.zero_point)


def _dense(net: Network, x: Value, other: Value | None, variant: int) -> Value:
    units = CLASSES if variant % 2 == 0 else 2 + variant % 6
    inputs, scale = net.weights("dense", (units, x.shape[1]), 0, x.shape[1], x, variant)
    options = schema.FullyConnectedOptionsT(fusedActivationFunction=ACTIVATIONS[variant % 3])
    bias = inputs[1] if variant % 7 else -1  # the bias may be left out
    return net.apply(
        Op.FULLY_CONNECTED,
        (Options.FullyConnectedOptions, options),
        [x, inputs[0], bias],
        (1, units),
        scale,
        net.zero(),
    )


def _head(net: Network, x: Value, other: Value | None, variant: int) -> None:
    _dense(net, _mean(net, x, None, variant), None, 2 * (variant % 4) + 6)


def _gate(net: Network, x: Value, other: Value | None, variant: int) -> None:
    """Squeeze and excite: a value that leaves the map and comes back."""
    depth = x.shape[3]
    pooled = _mean(net, x, None, variant)
    inputs, scale = net.weights("dense", (depth, depth), 0, depth, pooled, variant)
    options = (Options.FullyConnectedOptions, schema.FullyConnectedOptionsT())
    gate = net.apply(Op.FULLY_CONNECTED, options, [pooled, *inputs], (1, depth), scale, net.zero())
    gate = net.apply(Op.LOGISTIC, None, [gate], gate.shape, 1 / 256, -128)
    gate = _reshape(net, gate, (1, 1, 1, depth))
    net.apply(
        Op.MUL, (Options.MulOptions, schema.MulOptionsT()), [x, gate], x.shape, x.scale, net.zero()
    )


MAP, VECTOR, ANY = "map", "vector", "any"
# kind -> what it reads, whether a second value of a like shape, and how it is built.
LAYERS: dict[str, tuple[str, str | None, Callable[..., Any]]] = {
    "conv": (MAP, None, _conv),
    "depthwise": (MAP, None, _depthwise),
    "add": (ANY, "shape", _binary(Op.ADD, Options.AddOptions, schema.AddOptionsT)),
    "mul": (ANY, "shape", _binary(Op.MUL, Options.MulOptions, schema.MulOptionsT)),
    "concatenate": (ANY, "size", _concatenate),
    "pad": (MAP, None, _pad),
    "average": (MAP, None, _pool(Op.AVERAGE_POOL_2D)),
    "max": (MAP, None, _pool(Op.MAX_POOL_2D)),
    "relu": (ANY, None, _unary(Op.RELU)),
    "relu6": (ANY, None, _unary(Op.RELU6)),
    "logistic": (ANY, None, _unary(Op.LOGISTIC)),
    "split": (ANY, None, _split),
    "mean": (MAP, None, _mean),
    "flatten": (MAP, None, _flatten),
    "dense": (VECTOR, None, _dense),
    "gate": (MAP, None, _gate),
    "head": (MAP, None, _head),
}


def _pick(net: Network, kind: str, a: int, b: int) -> tuple[Value, Value | None] | None:
    reads, second, _ = LAYERS[kind]
    fits = {MAP: lambda v: v.is_map, VECTOR: lambda v: not v.is_map, ANY: lambda v: True}[reads]
    found = [v for v in reversed(net.values) if fits(v)]
    if not found:
        return None
    x = found[a % len(found)]
    if second is None:
        return x, None
    like = [
        v
        for v in found
        if (v.shape == x.shape if second == "shape" else v.shape[:-1] == x.shape[:-1])
    ]
    return x, like[b % len(like)]


def build(recipe: Recipe) -> Graph:
    """The network of *recipe*; a step that fits nowhere is left out."""
    net = Network(
        precision=recipe.precision,
        rng=np.random.default_rng(recipe.seed),
        squares=recipe.squares,
    )
    inputs = [net.input((1, 6, 6, 2)) for _ in range(recipe.inputs)]
    stem = net.values[0]
    _conv(net, stem, None, recipe.seed % 12)
    first = len(net.operators) - 1
    for kind, a, b, variant in recipe.steps:
        picked = _pick(net, kind, a, b)
        if picked is not None:
            LAYERS[kind][2](net, *picked, variant)

    def candidates() -> list[Value]:
        # One value an operator (the first of a split's), on the road that starts at the stem.
        made = {op[4][0] for op in net.operators}
        return [v for v in net.values if not v.is_map and first in v.roots and v.index in made][
            ::-1
        ]

    if not candidates():
        maps = [v for v in net.values if v.is_map and first in v.roots]
        _head(net, maps[-1], None, 0)
    chosen: dict[int, Value] = {}
    for pick in recipe.exits:
        value = candidates()[pick % len(candidates())]
        chosen.setdefault(value.index, value)
    exits = {f"exit{i}": value for i, value in enumerate(chosen.values())}
    ancestors = {name: _needed(net, value.index) for name, value in exits.items()}
    live = set().union(*ancestors.values())
    outputs = [value.index for value in chosen.values()]
    ends = [v.index for v in inputs]
    everything = range(len(net.operators))
    return Graph(
        data=_pack(net, list(everything), ends, outputs, outside=recipe.outside),
        alive=_pack(
            net,
            sorted(live),
            [i for i in ends if any(i in net.operators[o][3] for o in live)],
            outputs,
            outside=False,
        ),
        exits={name: f"value/{value.index}" for name, value in exits.items()},
        inputs=[f"value/{i}" for i in ends],
        ancestors=ancestors,
        on_constants={i for i, op in enumerate(net.operators) if op[0] == Op.DEQUANTIZE},
    )


def _needed(net: Network, tensor: int) -> set[int]:
    wanted, needed = {tensor}, set()
    for number in reversed(range(len(net.operators))):
        _, _, _, inputs, outputs = net.operators[number]
        if wanted & set(outputs):
            needed.add(number)
            wanted |= set(inputs)
    return needed


def _pack(
    net: Network, operators: list[int], inputs: list[int], outputs: list[int], *, outside: bool
) -> bytes:
    codes: dict[int, int] = {}
    packed = []
    for number in operators:
        op, options, kind, reads, makes = net.operators[number]
        codes.setdefault(op, len(codes))
        packed.append(
            schema.OperatorT(
                opcodeIndex=codes[op],
                inputs=np.array(reads, np.int32),
                outputs=np.array(makes, np.int32),
                builtinOptionsType=kind,
                builtinOptions=options,
            )
        )
    model = schema.ModelT(
        version=3,
        operatorCodes=[
            schema.OperatorCodeT(deprecatedBuiltinCode=min(op, 127), builtinCode=op, version=1)
            for op in codes
        ],
        subgraphs=[
            schema.SubGraphT(
                tensors=net.tensors,
                inputs=np.array(inputs, np.int32),
                outputs=np.array(outputs, np.int32),
                operators=packed,
                name="main",
            )
        ],
        buffers=[
            schema.BufferT(data=np.frombuffer(b, np.uint8)) if b else schema.BufferT()
            for b in net.buffers
        ],
    )
    if not outside:
        return finish(model)
    # Twice: the first time to learn how long the flatbuffer is.
    model.buffers = [schema.BufferT(offset=2, size=len(b)) for b in net.buffers]
    model.buffers[0] = schema.BufferT()
    head = len(finish(model))
    tail = b""
    for buffer, stored in zip(model.buffers[1:], net.buffers[1:], strict=True):
        tail += b"\0" * (-(head + len(tail)) % 16)
        buffer.offset = head + len(tail)
        tail += stored
    return finish(model) + tail


def finish(model: Any) -> bytes:
    """The bytes of a ModelT."""
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def recipes(precision: str) -> st.SearchStrategy[Recipe]:
    """Recipes of 2 to 4 blocks of layers, each block ending in a head, with 1 to 4 exits."""
    step = st.tuples(
        st.sampled_from(sorted(LAYERS)),
        # Mostly the latest value, so that networks are deep; sometimes any, so they are dense.
        st.sampled_from([0, 1, 2, 0, 3, 1, 5, 0, 8]),
        st.integers(0, 8),
        st.integers(0, 11),
    )
    head = st.tuples(st.just("head"), st.sampled_from([0, 0, 1, 2]), st.just(0), st.integers(0, 11))
    block = st.builds(
        lambda steps, end: (*steps, end), st.lists(step, min_size=2, max_size=5), head
    )
    return st.builds(
        lambda blocks, **others: Recipe(steps=tuple(s for b in blocks for s in b), **others),
        st.lists(block, min_size=2, max_size=4),
        precision=st.just(precision),
        seed=st.integers(0, 1000),
        inputs=st.sampled_from([1, 2, 3]),
        exits=st.lists(st.integers(0, 9), min_size=2, max_size=4, unique=True).map(tuple),
        outside=st.booleans(),
    )
