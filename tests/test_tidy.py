"""What converters make is rewritten: other operators, the same answers, good int8."""

from collections.abc import Callable

import numpy as np
import pytest
from float_graphs import FloatGraph

from edgeexit import tflite
from edgeexit.host.answers import RealSamples
from edgeexit.host.lowered import named
from edgeexit.host.tidy import tidy
from edgeexit.interpreter import open_interpreter
from edgeexit.preprocess import Preprocess

RNG = np.random.default_rng(7)
ROWS = Preprocess(kind="array", layout="as-is")


def matmul(graph: FloatGraph, *, turned: bool = False, leading: tuple[int, ...] = ()) -> str:
    weights = RNG.normal(size=(*leading, 8, 6))
    graph.constant("w", np.swapaxes(weights, -1, -2) if turned else weights)
    return graph.add("BATCH_MATMUL", ["input", "w"], "product", (1, 4, 6), adjY=turned)


def biased(graph: FloatGraph, order: int = 1) -> str:
    matmul(graph)
    graph.constant("b", RNG.normal(size=6))
    return graph.add("ADD", ["product", "b"][::order], "sum", (1, 4, 6), fusedActivationFunction=1)


def root(graph: FloatGraph) -> str:
    graph.add("MUL", ["input", "input"], "square", (1, 4, 8))
    graph.add("ADD", ["square", graph.constant("eps", [0.5])], "more", (1, 4, 8))
    graph.add("SQRT", ["more"], "root", (1, 4, 8))
    return graph.add("DIV", [graph.constant("one", [1.0]), "root"], "scale", (1, 4, 8))


def quotient(graph: FloatGraph) -> str:
    graph.add("EXP", ["input"], "positive", (1, 4, 8))
    graph.add("SQRT", ["positive"], "root", (1, 4, 8))
    return graph.add("DIV", ["input", "root"], "scaled", (1, 4, 8))


def pooled(graph: FloatGraph) -> str:
    axes = graph.constant("axes", np.array([1]))
    graph.add("MEAN", ["input", axes], "kept", (1, 1, 8), keepDims=True)
    shape = graph.constant("shape", np.array([1, 8]))
    return graph.add("RESHAPE", ["kept", shape], "flat", (1, 8), newShape=[1, 8])


def activated(graph: FloatGraph) -> str:
    matmul(graph)
    turn = graph.constant("turn", np.array([0, 2, 1]))
    graph.add("TRANSPOSE", ["product", turn], "turned", (1, 6, 4))
    shape = graph.constant("shape", np.array([1, 24]))
    graph.add("RESHAPE", ["turned", shape], "flat", (1, 24), newShape=[1, 24])
    return graph.add("RELU", ["flat"], "positive", (1, 24))


def idle(graph: FloatGraph) -> str:
    shape = graph.constant("shape", np.array([1, 4, 8]))
    graph.add("RESHAPE", ["input", shape], "same", (1, 4, 8), newShape=[1, 4, 8])
    graph.add("MUL", [graph.constant("ones", np.ones(8)), "same"], "once", (1, 4, 8))
    graph.add("ADD", ["once", graph.constant("zeros", np.zeros(8))], "as much", (1, 4, 8))
    return graph.add("EXP", ["as much"], "grown", (1, 4, 8))


def divided(graph: FloatGraph, starts: tuple[int, ...] = (0, 2), bias: bool = True) -> str:
    """A product of six channels, the ones from each of *starts* on cut out of it and multiplied."""
    weights = graph.constant("w", RNG.normal(size=(6, 8)))
    added = graph.constant("b", RNG.normal(size=6)) if bias else ""
    graph.add("FULLY_CONNECTED", ["input", weights, added], "all", (1, 4, 6), keepNumDims=True)
    ends = [*starts[1:], 6]
    for start, end in zip(starts, ends, strict=True):
        begin = graph.constant(f"begin {start}", np.array([0, 0, start]))
        size = graph.constant(f"size {start}", np.array([1, 4, end - start]))
        graph.add("SLICE", ["all", begin, size], f"part {start}", (1, 4, end - start))
    sums = []
    for start in starts:
        axes = graph.constant(f"axes {start}", np.array([2]))
        graph.add("MEAN", [f"part {start}", axes], f"mean {start}", (1, 4))
        sums.append(f"mean {start}")
    return graph.add("ADD", sums, "sum", (1, 4)) if len(sums) == 2 else sums[0]


def scaled(graph: FloatGraph, axes: tuple[int, ...] = (6, 1)) -> str:
    """A product, its axes turned, times one constant and plus another, one for each channel."""
    matmul(graph)
    turn = graph.constant("turn", np.array([0, 2, 1]))
    graph.add("TRANSPOSE", ["product", turn], "turned", (1, 6, 4))
    graph.add("MUL", [graph.constant("m", RNG.normal(size=axes)), "turned"], "more", (1, 6, 4))
    graph.constant("a", RNG.normal(size=(1, *axes)))
    graph.add("ADD", ["more", "a"], "sum", (1, 6, 4), fusedActivationFunction=1)
    return graph.add("EXP", ["sum"], "grown", (1, 6, 4))


def there_and_back(graph: FloatGraph, order: tuple[int, ...] = (0, 2, 1)) -> str:
    graph.add("EXP", ["input"], "grown", (1, 4, 8))
    turn = graph.constant("turn", np.array([0, 2, 1]))
    graph.add("TRANSPOSE", ["grown", turn], "turned", (1, 8, 4))
    shape = graph.constant("shape", np.array([1, 8, 1, 4]))
    graph.add("RESHAPE", ["turned", shape], "wide", (1, 8, 1, 4), newShape=[1, 8, 1, 4])
    shape = graph.constant("other", np.array([1, 8, 4]))
    graph.add("RESHAPE", ["wide", shape], "again", (1, 8, 4), newShape=[1, 8, 4])
    back, lengths = graph.constant("back", np.array(order)), (1, 8, 4)
    graph.add("TRANSPOSE", ["again", back], "as before", tuple(lengths[k] for k in order))
    return graph.add("EXP", ["as before"], "end", tuple(lengths[k] for k in order))


def averaged(graph: FloatGraph, axis: int) -> str:
    graph.add("EXP", ["input"], "grown", (1, 4, 8))
    turn = graph.constant("turn", np.array([0, 2, 1]))
    graph.add("TRANSPOSE", ["grown", turn], "turned", (1, 8, 4))
    axes = graph.constant("axes", np.array([axis]))
    return graph.add("MEAN", ["turned", axes], "mean", (1, 8 if axis == 2 else 4))


def read_whole(graph: FloatGraph) -> str:
    divided(graph)
    axis = graph.constant("last", np.array([2]))
    graph.add("MEAN", ["all", axis], "whole", (1, 4))
    return graph.add("ADD", ["whole", "sum"], "both", (1, 4))


CASES: dict[str, tuple[Callable[[FloatGraph], str], list[str]]] = {
    "constant product": (matmul, ["FULLY_CONNECTED"]),
    "its weights turned": (lambda g: matmul(g, turned=True), ["FULLY_CONNECTED"]),
    "its weights with an axis of one": (lambda g: matmul(g, leading=(1,)), ["FULLY_CONNECTED"]),
    "product and bias": (biased, ["FULLY_CONNECTED"]),
    "bias and product": (lambda g: biased(g, -1), ["FULLY_CONNECTED"]),
    "one over a root": (root, ["MUL", "ADD", "RSQRT"]),
    "value over a root": (quotient, ["EXP", "RSQRT", "MUL"]),
    "mean that keeps its axes": (pooled, ["MEAN"]),
    "activation of a moved product": (activated, ["FULLY_CONNECTED", "TRANSPOSE", "RESHAPE"]),
    "what changes nothing": (idle, ["EXP"]),
    "a number for each channel of a moved product": (
        scaled,
        ["FULLY_CONNECTED", "TRANSPOSE", "EXP"],
    ),
    "a number for each place of it": (
        lambda g: scaled(g, (1, 4)),
        ["FULLY_CONNECTED", "TRANSPOSE", "MUL", "ADD", "EXP"],
    ),
    "moved there and back": (there_and_back, ["EXP", "EXP"]),
    "moved elsewhere": (
        lambda g: there_and_back(g, (1, 0, 2)),
        ["EXP", "TRANSPOSE", "TRANSPOSE", "EXP"],
    ),
    "mean of the channels, moved": (lambda g: averaged(g, 2), ["EXP", "MEAN"]),
    "mean over the channels, moved": (lambda g: averaged(g, 1), ["EXP", "TRANSPOSE", "MEAN"]),
    "product in parts": (divided, ["FULLY_CONNECTED"] * 2 + ["MEAN"] * 2 + ["ADD"]),
    "its parts without a bias": (
        lambda g: divided(g, bias=False),
        ["FULLY_CONNECTED"] * 2 + ["MEAN"] * 2 + ["ADD"],
    ),
    "a part of a product": (
        lambda g: divided(g, (1,)),
        ["FULLY_CONNECTED", "SLICE", "MEAN"],
    ),
    "parts of what is read whole, too": (
        read_whole,
        ["FULLY_CONNECTED", "SLICE", "SLICE", "MEAN", "MEAN", "ADD", "MEAN", "ADD"],
    ),
    "parts that leave some out": (
        lambda g: divided(g, (1, 4)),
        ["FULLY_CONNECTED", "SLICE", "SLICE", "MEAN", "MEAN", "ADD"],
    ),
}


def answers(data: bytes, values: np.ndarray) -> list[np.ndarray]:
    network = open_interpreter(data)
    network.inputs["input"][...] = values
    network.invoke()
    return [output.copy() for output in network.outputs.values()]


@pytest.mark.parametrize("case", CASES)
def test_other_operators_give_the_same_answers(case: str) -> None:
    make, kinds = CASES[case]
    graph = FloatGraph(1, 4, 8)
    end = make(graph)
    data = graph.data(end)
    values = RNG.normal(size=(1, 4, 8)).astype(np.float32)

    written, exits = tidy(data, {"end": tflite.read_model(data).outputs[0]}, "net")

    model = tflite.read_model(written)
    assert [operator.kind for operator in model.operators] == kinds
    assert list(exits) == ["end"]
    assert exits["end"] == model.outputs[0]
    (before,), (after,) = answers(data, values), answers(written, values)
    np.testing.assert_allclose(after, before, atol=1e-5)


def at_random(seed: int) -> tuple[FloatGraph, list[str]]:
    """A graph of the operators that the rules are about, with one to three exits."""
    rng = np.random.default_rng(seed)
    graph = FloatGraph(1, 4, 8)
    shapes: dict[str, tuple[int, ...]] = {"input": (1, 4, 8)}

    def constant(values: np.ndarray) -> str:
        return graph.constant(f"c{len(graph.tensors)}", values)

    def add(kind: str, inputs: list[str], shape: tuple[int, ...], **how: int | bool) -> None:
        name = f"t{len(graph.tensors)}"
        shapes[graph.add(kind, inputs, name, shape, **how)] = shape

    def number_for_each(shape: tuple[int, ...]) -> np.ndarray:
        kind = rng.integers(4)
        kept = [n if kind == 0 or k == rng.integers(len(shape)) else 1 for k, n in enumerate(shape)]
        values = np.full(kept, float(rng.integers(2))) if kind == 1 else rng.normal(size=kept)
        return values if kind != 2 else values.reshape(-1)[:1]

    for _ in range(rng.integers(3, 14)):
        x = list(shapes)[-1 if rng.random() < 0.8 else rng.integers(len(shapes))]
        shape, kind = shapes[x], rng.integers(8)
        if kind == 0:
            order = rng.permutation(np.arange(len(shape)))
            add("TRANSPOSE", [x, constant(order)], tuple(shape[k] for k in order))
        elif kind == 1:
            flat = int(np.prod(shape))
            choices = [(1, flat), (1, 4, flat // 4), (1, flat // 4, 4), (1, 2, flat // 4, 2)]
            if flat % 4 == 0:
                told = choices[rng.integers(4)]
                add("RESHAPE", [x, constant(np.array(told))], told)
        elif kind in (2, 3):
            word = "ADD" if kind == 2 else "MUL"
            pair = [x, constant(number_for_each(shape))][:: rng.choice([-1, 1])]
            add(word, pair, shape, fusedActivationFunction=int(rng.integers(2)))
        elif kind == 4:
            width, inner = int(rng.integers(2, 7)), shape[-1]
            bias = constant(rng.normal(size=width)) if rng.random() < 0.5 else ""
            weights = constant(rng.normal(size=(width, inner)) / inner**0.5)
            add("FULLY_CONNECTED", [x, weights, bias], (*shape[:-1], width), keepNumDims=True)
            if rng.random() < 0.3:
                whole, at = list(shapes)[-1], int(rng.integers(1, width))
                for first, last in ((0, at), (at, width)):
                    begin = [0] * (len(shape) - 1) + [first]
                    size = [*shape[:-1], last - first]
                    told = [constant(np.array(begin)), constant(np.array(size))]
                    add("SLICE", [whole, *told], tuple(size))
        elif kind == 5:
            add("RELU", [x], shape)
        elif kind == 6 and len(shape) > 2:
            axes = rng.permutation(np.arange(1, len(shape)))[: rng.integers(1, len(shape))]
            is_kept = bool(rng.integers(2))
            left = [
                (1 if k in axes else n) for k, n in enumerate(shape) if is_kept or k not in axes
            ]
            signed = axes - len(shape) * rng.integers(0, 2, len(axes))
            add("MEAN", [x, constant(signed)], tuple(left), keepDims=is_kept)
        elif kind == 7 and len(shape) == 4:
            weights = constant(rng.normal(size=(5, 1, 1, shape[3])))
            add("CONV_2D", [x, weights, constant(rng.normal(size=5))], (*shape[:3], 5), **STEPS)
    made = [name for name in shapes if name != "input"]
    exits = [made[-1], *rng.permutation(made[:-1])[: rng.integers(3)]]
    return graph, [str(name) for name in exits]


STEPS = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, "padding": 1}


@pytest.mark.parametrize("seed", range(100))
def test_a_graph_made_at_random_answers_the_same_with_no_more_operators(seed: int) -> None:
    graph, names = at_random(seed)
    data = graph.data(*names)
    outputs = tflite.read_model(data).outputs
    values = RNG.normal(size=(1, 4, 8)).astype(np.float32)

    written, exits = tidy(data, dict(zip(names, outputs, strict=True)), "net")

    model = tflite.read_model(written)
    assert len(model.operators) <= len(tflite.read_model(data).operators)
    assert list(exits.values()) == list(model.outputs)
    for before, after in zip(answers(data, values), answers(written, values), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-4, rtol=1e-4)


def test_what_is_read_twice_or_is_an_exit_stays() -> None:
    graph = FloatGraph(1, 4, 8)
    biased(graph)
    graph.add("EXP", ["product"], "beside", (1, 4, 6))
    data = graph.data("sum", "beside", "product")
    outputs = tflite.read_model(data).outputs
    values = RNG.normal(size=(1, 4, 8)).astype(np.float32)

    written, _ = tidy(data, dict(zip(("a", "b", "c"), outputs, strict=True)), "net")

    kinds = [operator.kind for operator in tflite.read_model(written).operators]
    assert kinds == ["FULLY_CONNECTED", "ADD", "EXP"]
    for before, after in zip(answers(data, values), answers(written, values), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_product_of_two_computed_values_is_left_alone() -> None:
    graph = FloatGraph(1, 4, 4)
    graph.add("EXP", ["input"], "grown", (1, 4, 4))
    graph.add("BATCH_MATMUL", ["input", "grown"], "product", (1, 4, 4))
    data = graph.data("product")

    written, _ = tidy(data, {"end": tflite.read_model(data).outputs[0]}, "net")

    kinds = [operator.kind for operator in tflite.read_model(written).operators]
    assert kinds == ["EXP", "BATCH_MATMUL"]


@pytest.mark.host
@pytest.mark.parametrize("is_tidy", [True, False])
def test_a_constant_product_survives_int8(is_tidy: bool) -> None:
    """Quantized as BATCH_MATMUL its weights get their scales along the wrong axis."""
    from edgeexit.host.schemes import SCHEMES

    graph = FloatGraph(1, 4, 8)
    weights = graph.constant("w", RNG.normal(size=(8, 6)) * np.logspace(-1, 1, 8)[:, None])
    graph.add("BATCH_MATMUL", ["input", weights], "product", (1, 4, 6))
    graph.add("MEAN", ["product", graph.constant("axes", np.array([1]))], "mean", (1, 6))
    head = graph.constant("v", RNG.normal(size=(3, 6)))
    graph.add("FULLY_CONNECTED", ["mean", head, ""], "end", (1, 3))
    data = graph.data("end")
    exits = {"end": tflite.read_model(data).outputs[0]}
    reals = RealSamples(RNG.normal(size=(64, 4, 8)).astype(np.float32), ROWS)

    lowered = named(*(tidy(data, exits, "net") if is_tidy else (data, exits)))
    quantized = SCHEMES["int8"](lowered, reals, None)

    assert (quantized.agreement["end"] > 0.9) == is_tidy
