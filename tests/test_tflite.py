"""Whatever bytes come in, the reader of .tflite files answers with a model or a refusal."""

import functools
import time
import tracemalloc

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from graphs import Graph, Recipe, build, finish

from edgeexit.cut import cut
from edgeexit.errors import BadFile, EdgeExitError
from edgeexit.tflite import read_model

STEPS = (
    ("conv", 0, 0, 1),
    ("head", 0, 0, 1),
    ("pad", 0, 0, 1),
    ("add", 0, 1, 1),
    ("conv", 0, 0, 7),
    ("split", 0, 0, 1),
    ("concatenate", 0, 1, 0),
    ("head", 0, 0, 2),
)
KINDS = [("float", False), ("float", True), ("int8", False)]


@functools.cache
def small(precision: str, outside: bool) -> Graph:
    return build(
        Recipe(precision=precision, seed=5, inputs=2, steps=STEPS, exits=(0, 2), outside=outside)
    )


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """One to 16 flipped bits, changed bytes, odd 32-bit numbers or displaced pieces."""
    changed = bytearray(data)
    words = [0, 1, 4, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)]
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at, other, width = rng.integers(len(data) - 64), rng.integers(len(data) - 64), 4
        kind = rng.integers(4)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at] = int(rng.integers(256))
        elif kind == 2:
            changed[at : at + width] = int(rng.choice(words)).to_bytes(4, "little")
        else:
            changed[at : at + 32] = changed[other : other + 32]
    return bytes(changed)


@pytest.mark.parametrize(("precision", "outside"), KINDS)
def test_a_mutant_is_cut_or_refused(precision: str, outside: bool) -> None:
    """A thousand mutants of each file: nothing else is raised, none takes long."""
    graph = small(precision, outside)
    rng = np.random.default_rng(11)
    refused, slowest_s = 0, 0.0
    for _ in range(1000):
        start = time.perf_counter()
        try:
            cut(mutant(graph.data, rng), graph.exits)
        except EdgeExitError:
            refused += 1
        slowest_s = max(slowest_s, time.perf_counter() - start)
    assert 100 < refused < 1000
    assert slowest_s < 5


@pytest.mark.parametrize(("precision", "outside"), KINDS)
def test_every_shorter_file_is_refused_or_read(precision: str, outside: bool) -> None:
    graph = small(precision, outside)
    refused = 0
    for length in range(len(graph.data)):
        try:
            cut(graph.data[:length], graph.exits)
        except EdgeExitError:
            refused += 1
    assert refused > 0.9 * len(graph.data)


def bounded(data: bytes) -> None:
    """The file is refused as damaged, soon, and in little memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(BadFile, match="damaged"):
            read_model(data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 10


def model() -> schema.ModelT:
    return schema.ModelT.InitFromPackedBuf(small("float", False).data)


def test_many_codes_that_share_one_long_name_are_refused() -> None:
    """Read one by one, 20,000 codes of 200 kB each would need 4 GB."""

    class Once(schema.OperatorCodeT):
        def Pack(self, builder: object) -> int:  # noqa: N802 (the schema's name)
            if not hasattr(self, "place"):
                self.place = super().Pack(builder)
            return self.place

    forged = model()
    forged.operatorCodes = [Once(customCode="x" * 200_000)] * 20_000
    bounded(finish(forged))


def test_a_million_axes_are_refused() -> None:
    """Their product would take hours."""
    forged = model()
    forged.subgraphs[0].tensors[0].shape = np.full(1_000_000, 2**31 - 1, np.int32)
    bounded(finish(forged))


def test_overlapping_constants_are_refused() -> None:
    """Written out one by one, they would be many times the file."""
    forged = model()
    for index, buffer in enumerate(forged.buffers[1:]):
        buffer.data, buffer.offset, buffer.size = None, 16 + index, 400
    tensors = forged.subgraphs[0].tensors
    for tensor in tensors:
        if tensor.buffer:
            tensor.shape, tensor.type = np.array([400], np.int32), schema.TensorType.INT8
    bounded(finish(forged))
