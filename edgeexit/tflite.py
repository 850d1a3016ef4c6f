"""
Read and write the .tflite container: the one place that knows the flatbuffer schema.

Callers see TensorSpec, Model and two functions. Hidden here: every index, offset and size in
a file is checked before anything trusts it, constants may lie outside the flatbuffer, and
the schema's object API raises half a dozen kinds of exception on garbage, all of which leave
this room as BadFile. What edgeexit cannot cut (control flow, state, strings, sparse storage)
is refused here too.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, Unsupported
from edgeexit.files import Table
from edgeexit.runtimes import LITERT, for_programs, pointer_bits

if TYPE_CHECKING:
    import numpy as np

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
# A flatbuffer's own offsets are 32 bits wide.
MAX_FILE_BYTES = 2**31 - 1
# No kernel takes more than 8; the product of a million forged lengths would keep us busy.
MAX_AXES = 32

# dtype names of tensors that may cross a segment's edge, with bytes an element.
EDGE_DTYPES = {
    "float32": 4,
    "float16": 2,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bool": 1,
}
# The schema's words for them, and types that only constants have (bits an element).
_BITS = {name.upper(): 8 * size for name, size in EDGE_DTYPES.items()} | {
    "BFLOAT16": 16,
    "INT4": 4,
    "UINT4": 4,
    "INT2": 2,
    "FLOAT8_E4M3FN": 8,
    "FLOAT8_E5M2": 8,
    "COMPLEX64": 64,
    "COMPLEX128": 128,
}

# Operators whose answer depends on more than their inputs: why they cannot be cut.
_REFUSED = dict.fromkeys(
    [
        *("CALL", "CALL_ONCE", "IF", "WHILE", "STABLEHLO_WHILE", "STABLEHLO_CASE"),
        *("STABLEHLO_REDUCE", "STABLEHLO_REDUCE_WINDOW", "STABLEHLO_SORT"),
        *("STABLEHLO_SCATTER", "STABLEHLO_COMPOSITE"),
    ],
    "refers to another graph (control flow)",
) | dict.fromkeys(
    [
        *("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "HASHTABLE"),
        *("HASHTABLE_FIND", "HASHTABLE_IMPORT", "HASHTABLE_SIZE"),
        *("RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM", "MULTINOMIAL"),
        *("STABLEHLO_RNG_BIT_GENERATOR", "DELEGATE"),
    ],
    "keeps state between calls",
)

# From which input on one may be left out; with any other operator all are read unseen.
_OPTIONAL_FROM = {
    **dict.fromkeys(["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "FULLY_CONNECTED"], 2),
    **dict.fromkeys(["TRANSPOSE_CONV", "CONV_3D_TRANSPOSE", "SVDF"], 3),
    **dict.fromkeys(["LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"], 1),
    **dict.fromkeys(["RNN", "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN"], 1),
    "CUSTOM": 0,
}

_AGAIN = "copy or export the file again"

# What the object API has been seen to raise on garbage.
_GARBAGE = (
    struct.error,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    AssertionError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """
    One tensor at the edge of a segment.

    name is the tensor's name inside the .tflite. shape is (1, H, W, C) for images and
    feature maps, (1, classes) for logits. dtype is a numpy name. A stored integer q stands
    for the real number scale * (q - zero_point); scale 0.0 means not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    zero_point: int

    @property
    def size_bytes(self) -> int:
        """Bytes of one such tensor."""
        return math.prod(self.shape) * EDGE_DTYPES[self.dtype]

    def to_document(self) -> dict[str, object]:
        """The spec as a JSON object, as bundle.json holds it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "scale": self.scale,
            "zero_point": self.zero_point,
        }

    @classmethod
    def from_table(cls, table: Table) -> "TensorSpec":
        """Read what to_document wrote. BadFile names the key that is wrong."""
        table.only("name", "shape", "dtype", "scale", "zero_point")
        spec = cls(
            name=table.get("name", str),
            shape=tuple(table.list_of("shape", int)),
            dtype=table.get("dtype", str),
            scale=table.get("scale", float),
            zero_point=table.get("zero_point", int),
        )
        if not spec.name:
            raise BadFile(f"{table.where}: name: expected the name of a tensor, found none")
        if any(length < 1 for length in spec.shape):
            raise BadFile(f"{table.where}: shape: expected lengths from 1, found {spec.shape}")
        if spec.dtype not in EDGE_DTYPES:
            known = ", ".join(EDGE_DTYPES)
            raise BadFile(f"{table.where}: dtype: expected one of {known}, found {spec.dtype!r}")
        if not (math.isfinite(spec.scale) and spec.scale >= 0):
            raise BadFile(f"{table.where}: scale: expected a positive number or 0")
        if not -(2**31) <= spec.zero_point < 2**31:
            raise BadFile(f"{table.where}: zero_point: {spec.zero_point} is out of range")
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a model; *constant* holds its stored bytes (uint8, 1-D) or None."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    buffer: int
    constant: "np.ndarray | None"
    packed: Any  # the schema's TensorT

    def spec(self, where: str) -> TensorSpec:
        """The tensor as one at a segment's edge; Unsupported if it cannot be one."""
        place = f"{where}: tensor {self.name!r}"
        if not self.name:
            raise Unsupported(f"{where}: a tensor at a segment's edge has no name")
        if self.dtype not in EDGE_DTYPES:
            raise Unsupported(f"{place}: {self.dtype} values cannot leave a segment")
        if len(self.scales) > 1:
            raise Unsupported(f"{place}: quantized per channel, expected one scale at an edge")
        if any(length < 1 for length in self.shape):
            raise Unsupported(f"{place}: shape {self.shape} has no fixed size")
        return TensorSpec(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            scale=self.scales[0] if self.scales else 0.0,
            zero_point=self.zero_points[0] if self.zero_points else 0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One operator: indices of the tensors it reads (-1: optional and absent) and makes."""

    kind: str
    opcode: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    packed: Any  # the schema's OperatorT


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """
    A sound .tflite with one graph, taken apart.

    Operators stand in an order in which they can run: each reads only constants, inputs and
    what an earlier one made, and no tensor is made twice. All of that was checked.
    *signature* names outputs (name -> tensor index) by the file's first signature, if it has one:
    the order of a file's outputs means nothing.
    """

    where: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    opcodes: tuple[Any, ...]  # the schema's OperatorCodeT
    signature: Mapping[str, int] = field(default_factory=dict)

    @property
    def maker(self) -> dict[int, int]:
        """Tensor index -> index of the operator that makes it."""
        return {t: i for i, operator in enumerate(self.operators) for t in operator.outputs}


@cache
def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        wanted = for_programs(pointer_bits())
        raise DeviceError(
            f"taking networks apart and cutting them needs {LITERT.name}, not here: {error}",
            hint=f"{LITERT.install}; or cut elsewhere: edgeexit tune -o SMALLER.edgeexit"
            if wanted is LITERT
            else "32-bit programs cannot have it: profile and cut on a 64-bit system (edgeexit "
            "tune -o SMALLER.edgeexit) and run the result here",
        ) from error
    return schema_py_generated


@cache
def _names(enum: str) -> dict[int, str]:
    words = vars(getattr(_schema(), enum))
    return {number: word for word, number in words.items() if isinstance(number, int)}


def read_model(data: bytes, where: str = "model.tflite") -> Model:
    """
    Take the bytes of a .tflite apart.

    *where* names the file in messages. BadFile for anything truncated, inconsistent or
    hostile, Unsupported for a sound file with several graphs, state, strings, sparse
    storage or weights in another file. Constants are views of *data*, nothing is copied.
    """
    if len(data) > MAX_FILE_BYTES:
        raise Unsupported(f"{where}: {len(data)} bytes, expected at most {MAX_FILE_BYTES}")
    if data[4:8] != IDENTIFIER:
        raise BadFile(
            f"{where}: not a .tflite file (no {IDENTIFIER.decode()} at its start)", hint=_AGAIN
        )
    try:
        return _Reader(data, where).model()
    except EdgeExitError:
        raise
    except _GARBAGE as error:
        raise BadFile(
            f"{where}: damaged .tflite: {type(error).__name__}: {error}", hint=_AGAIN
        ) from error


class _Reader:
    """Reads one file once; any exception of _GARBAGE that leaves it means a damaged file."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where
        self.root = _schema().Model.GetRootAs(data, 0)
        # A vector may not be longer than the file, and two vectors of a sound file do not
        # overlap: the sum of all lengths is bounded, or a forged file could keep us busy.
        self.budget = len(data)
        # The same holds for constants, but for equal ones stored once: (address, bytes) of
        # each stored place -> the first buffer that lies there.
        self.places: dict[tuple[int, int], int] = {}
        self.room = len(data)

    def bad(self, fact: str) -> BadFile:
        return BadFile(f"{self.where}: damaged .tflite: {fact}", hint=_AGAIN)

    def spend(self, count: int, what: str) -> int:
        self.budget -= count
        if count < 0 or self.budget < 0:
            raise self.bad(f"{count} {what} do not fit into {len(self.data)} bytes")
        return count

    def weigh(self, packed: Any) -> Any:
        """*packed* itself, its strings and vectors paid for: many may point at the same one."""
        for value in vars(packed).values():
            if hasattr(value, "__len__"):
                self.spend(len(value), "bytes")
        return packed

    def model(self) -> Model:
        root = self.root
        if root.Version() != SCHEMA_VERSION:
            raise self.bad(f"schema version {root.Version()}, expected {SCHEMA_VERSION}")
        if root.SubgraphsLength() > 1:
            raise Unsupported(
                f"{self.where}: {root.SubgraphsLength()} graphs in one file, expected one",
                hint="control flow (if, while, call) cannot be cut",
            )
        if root.SubgraphsLength() < 1:
            raise self.bad("no graph")
        graph = root.Subgraphs(0)
        buffer_count = self.spend(root.BuffersLength(), "buffers")
        tensor_count = self.spend(graph.TensorsLength(), "tensors")
        tensors = [self.tensor(graph.Tensors(i), i, buffer_count) for i in range(tensor_count)]
        opcodes = [
            self.weigh(_schema().OperatorCodeT.InitFromObj(root.OperatorCodes(i)))
            for i in range(self.spend(root.OperatorCodesLength(), "operator codes"))
        ]
        kinds = [self.kind(code) for code in opcodes]
        operators = [
            self.operator(graph.Operators(i), i, kinds, tensor_count)
            for i in range(self.spend(graph.OperatorsLength(), "operators"))
        ]
        model = Model(
            where=self.where,
            tensors=tuple(tensors),
            operators=tuple(operators),
            inputs=self.indices(graph.InputsAsNumpy(), tensor_count, "inputs"),
            outputs=self.indices(graph.OutputsAsNumpy(), tensor_count, "outputs"),
            opcodes=tuple(opcodes),
            signature=self.signature(tensor_count),
        )
        self.check_order(model)
        return model

    def signature(self, tensor_count: int) -> dict[str, int]:
        if not self.root.SignatureDefsLength():
            return {}
        first = self.root.SignatureDefs(0)
        found: dict[str, int] = {}
        for k in range(self.spend(first.OutputsLength(), "outputs of a signature")):
            output = first.Outputs(k)
            name, index = (output.Name() or b""), output.TensorIndex()
            self.spend(len(name), "bytes")
            if not 0 <= index < tensor_count:
                raise self.bad(f"its signature names tensor {index} of {tensor_count}")
            found[name.decode("utf-8")] = index
        return found

    def indices(self, vector: Any, limit: int, what: str, *, lowest: int = 0) -> tuple[int, ...]:
        if isinstance(vector, int):  # how the schema says "absent"
            return ()
        self.spend(len(vector), what)
        numbers = tuple(vector.tolist())
        for number in numbers:
            if not lowest <= number < limit:
                raise self.bad(f"{what}: tensor {number} of {limit}")
        return numbers

    def constant(self, index: int) -> "tuple[int, np.ndarray | None]":
        """What buffer *index* holds, if anything, and the first buffer at that very place."""
        stored = self.stored(index)
        if stored is None:
            return index, None
        key = (stored.ctypes.data, stored.size)
        if key not in self.places:
            self.places[key] = index
            self.room -= stored.size
            if self.room < 0:
                raise self.bad("its constants overlap")
        return self.places[key], stored

    def stored(self, index: int) -> "np.ndarray | None":
        import numpy as np

        buffer = self.root.Buffers(index)
        if not buffer.DataIsNone():
            inline = buffer.DataAsNumpy()
            return inline if isinstance(inline, np.ndarray) and inline.size else None
        # Large constants may follow the flatbuffer; offset 0 and 1 mean "not so".
        offset, size = buffer.Offset(), buffer.Size()
        if offset <= 1 or size == 0:
            return None
        if offset + size > len(self.data):
            raise self.bad(f"buffer {index} ends at byte {offset + size} of {len(self.data)}")
        return np.frombuffer(self.data, np.uint8, size, offset)

    def tensor(self, raw: Any, index: int, buffer_count: int) -> Tensor:
        place = f"{self.where}: tensor {index}"
        if raw.Sparsity() is not None:
            raise Unsupported(f"{place}: stored sparsely", hint="convert without sparse storage")
        if raw.IsVariable() or raw.VariantTensorsLength():
            raise Unsupported(f"{place}: keeps state between calls (a variable)")
        if raw.ExternalBuffer():
            raise Unsupported(f"{place}: its values lie in another file")
        kind = _names("TensorType").get(raw.Type())
        if kind is None:
            raise self.bad(f"tensor {index} is of type {raw.Type()}")
        if kind not in _BITS:
            raise Unsupported(f"{place}: {kind.lower()} values cannot be cut")
        if self.spend(raw.ShapeLength(), "axes") > MAX_AXES:
            raise self.bad(f"tensor {index} has {raw.ShapeLength()} axes")
        shape = () if raw.ShapeIsNone() else tuple(raw.ShapeAsNumpy().tolist())
        if any(length < 0 for length in shape):
            raise Unsupported(f"{place}: shape {shape} has no fixed size")
        size_bytes = (math.prod(shape) * _BITS[kind] + 7) // 8
        if size_bytes > MAX_FILE_BYTES:
            raise self.bad(f"tensor {index} of shape {shape} has {size_bytes} bytes")
        if not 0 <= raw.Buffer() < max(buffer_count, 1):
            raise self.bad(f"tensor {index} lies in buffer {raw.Buffer()} of {buffer_count}")
        buffer, constant = self.constant(raw.Buffer()) if raw.Buffer() else (0, None)
        if constant is not None and constant.size != size_bytes:
            raise self.bad(
                f"tensor {index} of shape {shape} holds {constant.size} bytes, "
                f"expected {size_bytes}"
            )
        packed = self.weigh(_schema().TensorT.InitFromObj(raw))
        name = (packed.name or b"").decode("utf-8")
        scales, zero_points = self.quantization(packed.quantization, place)
        return Tensor(
            name=name,
            shape=shape,
            dtype=kind.lower(),
            scales=scales,
            zero_points=zero_points,
            buffer=buffer,
            constant=constant,
            packed=packed,
        )

    def quantization(self, raw: Any, place: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
        if raw is None:
            return (), ()
        if raw.detailsType:
            # Blockwise scales are tensors themselves, named by index.
            raise Unsupported(f"{place}: quantized blockwise or in a custom way")
        self.weigh(raw)
        scales = () if raw.scale is None else tuple(raw.scale.tolist())
        zero_points = () if raw.zeroPoint is None else tuple(raw.zeroPoint.tolist())
        if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
            raise self.bad(f"{place.rpartition(': ')[2]} has a scale that is not a number")
        return scales, zero_points

    def kind(self, code: Any) -> str:
        # Old files have only the byte-wide field; new ones both, the larger is meant.
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        kind = _names("BuiltinOperator").get(number)
        if kind is None:
            raise Unsupported(f"{self.where}: operator kind {number} is not known here")
        return kind

    def operator(self, raw: Any, index: int, kinds: list[str], tensor_count: int) -> Operator:
        if not 0 <= raw.OpcodeIndex() < len(kinds):
            raise self.bad(f"operator {index} is of kind {raw.OpcodeIndex()} of {len(kinds)}")
        kind = kinds[raw.OpcodeIndex()]
        place = f"{self.where}: operator {index} ({kind})"
        if kind in _REFUSED:
            raise Unsupported(f"{place}: {_REFUSED[kind]}")
        packed = self.weigh(_schema().OperatorT.InitFromObj(raw))
        for options, found in (
            (packed.builtinOptions, raw.BuiltinOptions()),
            (packed.builtinOptions2, raw.BuiltinOptions2()),
        ):
            if options is not None:
                self.weigh(options)
            elif found is not None:
                raise Unsupported(f"{place}: its options are of a newer schema")
        if packed.intermediates is not None and len(packed.intermediates):
            raise Unsupported(f"{place}: keeps intermediate values")
        offset, size = packed.largeCustomOptionsOffset, packed.largeCustomOptionsSize
        if offset > 1:
            import numpy as np

            if offset + size > len(self.data):
                raise self.bad(f"operator {index}: options end at byte {offset + size}")
            packed.customOptions = np.frombuffer(self.data, np.uint8, size, offset)
            self.spend(size, "bytes of options")
            packed.largeCustomOptionsOffset = packed.largeCustomOptionsSize = 0
        inputs = self.indices(raw.InputsAsNumpy(), tensor_count, f"operator {index}", lowest=-1)
        if -1 in inputs[: _OPTIONAL_FROM.get(kind)]:
            raise self.bad(f"operator {index} ({kind}) has no input {inputs.index(-1)}")
        return Operator(
            kind=kind,
            opcode=raw.OpcodeIndex(),
            inputs=inputs,
            outputs=self.indices(raw.OutputsAsNumpy(), tensor_count, f"operator {index}"),
            packed=packed,
        )

    def check_order(self, model: Model) -> None:
        known = set(model.inputs)
        for index, tensor in enumerate(model.tensors):
            if tensor.constant is not None or 0 in tensor.shape:
                if index in known:
                    raise self.bad(f"input tensor {index} is a constant")
                known.add(index)
        for number, operator in enumerate(model.operators):
            for index in operator.inputs:
                if index >= 0 and index not in known:
                    raise self.bad(f"operator {number} reads tensor {index} before it is made")
            for index in operator.outputs:
                if index in known:
                    raise self.bad(f"operator {number} makes tensor {index} a second time")
                known.add(index)


def write_model(
    model: Model,
    operators: Iterable[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    description: str,
    names: "dict[int, str] | None" = None,
) -> bytes:
    """
    The bytes of a .tflite with only these *operators* of *model*, in that order.

    *inputs* and *outputs* are tensor indices of *model*; *names* renames some tensors. Only
    tensors, constants and operator codes in use are written, constants inline and aligned
    to 16 bytes. Equal arguments give equal bytes.
    """
    import flatbuffers  # type: ignore[import-untyped,unused-ignore]
    import numpy as np

    schema = _schema()
    chosen = [model.operators[index] for index in operators]
    used = sorted(
        {t for op in chosen for t in (*op.inputs, *op.outputs) if t >= 0} | {*inputs, *outputs}
    )
    place = {old: new for new, old in enumerate(used)} | {-1: -1}

    def numbers(indices: Iterable[int]) -> "np.ndarray":
        return np.array([place[index] for index in indices], np.int32)

    buffers: list[Any] = [schema.BufferT()]  # by convention the first one is empty
    buffer_of: dict[int, int] = {}
    tensors = []
    for index in used:
        tensor = model.tensors[index]
        packed = schema.TensorT(**vars(tensor.packed))
        packed.buffer = 0
        if names and index in names:
            packed.name = names[index].encode()
        if tensor.constant is not None:
            if tensor.buffer not in buffer_of:
                buffer_of[tensor.buffer] = len(buffers)
                buffers.append(_Constant(tensor.constant))
            packed.buffer = buffer_of[tensor.buffer]
        tensors.append(packed)

    opcode_of: dict[int, int] = {}
    packed_operators = []
    for operator in chosen:
        packed = schema.OperatorT(**vars(operator.packed))
        packed.opcodeIndex = opcode_of.setdefault(operator.opcode, len(opcode_of))
        packed.inputs, packed.outputs = numbers(operator.inputs), numbers(operator.outputs)
        packed.debugMetadataIndex = schema.OperatorT().debugMetadataIndex
        packed_operators.append(packed)

    graph = schema.SubGraphT(
        tensors=tensors,
        inputs=numbers(inputs),
        outputs=numbers(outputs),
        operators=packed_operators,
        name="main",
    )
    whole = schema.ModelT(
        version=SCHEMA_VERSION,
        operatorCodes=[model.opcodes[index] for index in opcode_of],
        subgraphs=[graph],
        description=description,
        buffers=buffers,
    )
    size = sum(buffer.size for buffer in buffers[1:])
    if size > MAX_FILE_BYTES - (64 << 20):
        raise Unsupported(f"{model.where}: {size} bytes of constants in one file")
    builder = flatbuffers.Builder(size + (64 << 10))
    builder.Finish(whole.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


class _Constant:
    """
    Packs itself as the schema's BufferT does, with the 16-byte alignment that the schema asks
    for: the Python object API leaves the bytes unaligned, which kernels on ARM may not take.
    """

    def __init__(self, values: "np.ndarray") -> None:
        self.values, self.size = values, int(values.size)

    def Pack(self, builder: Any) -> Any:  # noqa: N802 (the schema's name)
        schema = _schema()
        builder.StartVector(1, self.size, 16)
        builder.head -= self.size
        builder.Bytes[builder.head : builder.head + self.size] = self.values.data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)
