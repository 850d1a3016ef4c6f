"""The chain of segments is the uncut model, bit for bit; what cannot be cut is refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain, combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from float_graphs import FloatGraph
from graphs import Graph, Op, Recipe, Type, build, finish, recipes
from hypothesis import HealthCheck, given, settings
from tiny import tiny_model

from edgeexit.cut import (
    SegmentPlan,
    TensorSpec,
    cut,
    drop_dead,
    exit_order,
    model_io,
    transposes,
    uncut,
)
from edgeexit.errors import BadFile, EdgeExitError, Unsupported, UsageError
from edgeexit.files import Table
from edgeexit.interpreter import open_interpreter

Values = dict[str, np.ndarray]


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, n + 1) for n in range(len(names))))


class Runs:
    """Runs files, each one opened once: different kept-sets often share segments."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.open: dict[bytes, Interpreter] = {}

    def __call__(self, data: bytes, values: Values) -> Values:
        if data not in self.open:
            self.open[data] = Interpreter(model_content=data, num_threads=self.threads)
            self.open[data].allocate_tensors()
        interpreter = self.open[data]
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], values[detail["name"]])
        interpreter.invoke()
        return {
            detail["name"]: interpreter.get_tensor(detail["index"])
            for detail in interpreter.get_output_details()
        }

    def chain(self, plans: list[SegmentPlan], values: Values) -> Values:
        """Every exit's logits; each segment gets what it names, wherever it was made."""
        values, logits = dict(values), {}
        for plan in plans:
            made = self(plan.data, {spec.name: values[spec.name] for spec in plan.inputs})
            assert set(made) == {spec.name for spec in plan.outputs}
            values |= made
            logits[plan.exit] = made[plan.outputs[0].name]
        return logits


def samples(graph: Graph, data: bytes) -> Values:
    interpreter = Interpreter(model_content=data)
    rng = np.random.default_rng(7)
    values = {}
    for detail in interpreter.get_input_details():
        if detail["dtype"] is np.int8:
            values[detail["name"]] = rng.integers(-128, 128, detail["shape"]).astype(np.int8)
        else:
            values[detail["name"]] = rng.standard_normal(detail["shape"]).astype(np.float32)
    return values


def check(recipe: Recipe) -> None:
    graph = build(recipe)
    names = list(graph.exits)
    values = samples(graph, graph.alive)
    cuts = {kept: cut(graph.data, graph.exits, kept) for kept in subsets(names)}
    wholes = {kept: uncut(graph.data, graph.exits, kept) for kept in cuts}
    for kept, plans in cuts.items():
        assert sorted(plan.exit for plan in plans) == sorted(kept)
        check_operators(graph, kept, plans)
        check_edges(graph, plans)
    for threads in (1, 2):
        runs = Runs(threads)
        uncut_logits = runs(graph.alive, values)
        for kept, plans in cuts.items():
            found = runs.chain(plans, values)
            whole = runs(wholes[kept], values)
            for name in kept:
                expected = uncut_logits[graph.exits[name]].tobytes()
                assert found[name].tobytes() == expected
                assert whole[graph.exits[name]].tobytes() == expected


def check_operators(graph: Graph, kept: tuple[str, ...], plans: list[SegmentPlan]) -> None:
    live = set().union(*(graph.ancestors[name] for name in kept))
    counts = Counter(chain.from_iterable(plan.operators for plan in plans))
    assert set(counts) == live
    assert all(count == 1 for i, count in counts.items() if i not in graph.on_constants)


def check_edges(graph: Graph, plans: list[SegmentPlan]) -> None:
    """Plans say what the files say; the first output is the exit's logits, under its own name."""
    known = set(model_io(graph.alive)[0])
    for plan in plans:
        assert model_io(plan.data) == (plan.inputs, plan.outputs)
        assert plan.outputs[0].name == graph.exits[plan.exit]
        assert plan.outputs[0] in model_io(graph.data)[1]
        assert known >= set(plan.inputs)
        known |= set(plan.outputs)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_chain_is_the_uncut_model(precision: str) -> None:
    """Over random networks, every kept-set, 1 and 2 threads: no byte differs."""

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes(precision))
    def every(recipe: Recipe) -> None:
        check(recipe)

    every()


@pytest.mark.xfail(reason="float x * x and the MEAN behind it round otherwise when cut apart")
def test_float_square_across_a_cut() -> None:
    """Known gap: XNNPACK's float MEAN of x * x differs by one ulp if a cut lies between them."""
    add = ("add", 0, 0, 0)
    block = (("mul", 8, 0, 0), add, add, ("flatten", 0, 0, 0), ("head", 2, 0, 0))
    check(
        Recipe(
            precision="float",
            seed=4,
            inputs=1,
            steps=(add, add, ("head", 0, 0, 0), *block),
            exits=(2, 0),
            squares=True,
        )
    )


# ---------------------------------------------------------------- refusals

TINY = tiny_model(skip=True)


def altered(*changes: Callable[[schema.ModelT], object]) -> bytes:
    """TINY's file with something in it changed. Operators: conv, mean, dense; then again."""
    model = schema.ModelT.InitFromPackedBuf(TINY.data)
    for change in changes:
        change(model)
    return finish(model)


def tensor(model: schema.ModelT, name: str) -> schema.TensorT:
    (found,) = (t for t in model.subgraphs[0].tensors if t.name == name.encode())
    return found


def with_tensor(name: str, /, **fields: object) -> bytes:
    return altered(lambda model: vars(tensor(model, name)).update(fields))


def with_kind(kind: int) -> bytes:
    """The convolutions become operators of another *kind*."""

    def change(model: schema.ModelT) -> None:
        model.operatorCodes[0].deprecatedBuiltinCode = min(kind, 127)
        model.operatorCodes[0].builtinCode = kind

    return altered(change)


def rewired(operator: int, source: str) -> bytes:
    """Another operator reads *source*."""

    def change(model: schema.ModelT) -> None:
        graph = model.subgraphs[0]
        _, *others = graph.operators[operator].inputs
        graph.operators[operator].inputs = [graph.tensors.index(tensor(model, source)), *others]

    return altered(change)


def without_input() -> bytes:
    """The picture is a constant."""

    def change(model: schema.ModelT) -> None:
        model.buffers.append(schema.BufferT(data=np.zeros(120, np.uint8)))
        tensor(model, "input").buffer = len(model.buffers) - 1
        model.subgraphs[0].inputs = []

    return altered(change)


def refused(
    error: type[EdgeExitError],
    words: str,
    data: bytes = TINY.data,
    exits: dict[str, str] = TINY.exits,
    kept: list[str] | None = None,
) -> None:
    with pytest.raises(EdgeExitError) as caught:
        cut(data, exits, kept, where="net.tflite")
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value.hint).isprintable()


def test_exit_codes_of_refusals() -> None:
    assert (UsageError.exit_code, BadFile.exit_code, Unsupported.exit_code) == (2, 3, 4)


@pytest.mark.parametrize(
    ("error", "exits", "words"),
    [
        (UsageError, {}, "net.tflite: no exits named"),
        (UsageError, {"a": "logits7"}, "no tensor named 'logits7' (have: "),
        (UsageError, {"a": ""}, "no tensor named ''"),
        (UsageError, {"a": "logits0\n"}, r"no tensor named 'logits0\n'"),
        (Unsupported, {"a": "logits0", "b": "logits0"}, "'b' adds nothing to exit 'a'"),
        (Unsupported, {"a": "logits0", "b": "input"}, "'input' is an input"),
        (Unsupported, {"a": "logits0", "b": "head0/w"}, "'head0/w' is a constant"),
    ],
)
def test_exits_that_are_refused(
    error: type[EdgeExitError], exits: dict[str, str], words: str
) -> None:
    refused(error, words, exits=exits)
    with pytest.raises(error):
        exit_order(TINY.data, exits)
    with pytest.raises(error):
        drop_dead(TINY.data, exits)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], "net.tflite: no exit kept"),
        (["exit3"], "no exit named 'exit3' (have: exit0, exit1, exit2)"),
        (["exit0", "logits1"], "no exit named 'logits1'"),
    ],
)
def test_kept_exits_that_are_refused(kept: list[str], words: str) -> None:
    refused(UsageError, words, kept=kept)
    with pytest.raises(UsageError):
        uncut(TINY.data, TINY.exits, kept)


def double_split() -> tuple[bytes, dict[str, str]]:
    """Two exits made by one operator."""
    graph = build(
        Recipe(precision="float", seed=0, inputs=1, exits=(0,), steps=(("head", 0, 0, 0),))
    )
    model = schema.ModelT.InitFromPackedBuf(graph.data)
    last = model.subgraphs[0].operators[-1]
    model.subgraphs[0].tensors.append(schema.TensorT(shape=[1, 4], name="twin"))
    last.outputs = [last.outputs[0], len(model.subgraphs[0].tensors) - 1]
    return finish(model), {**graph.exits, "twin": "twin"}


def test_two_exits_of_one_operator_are_refused() -> None:
    refused(Unsupported, "'twin' adds nothing to exit 'exit0'", *double_split())


def test_exits_without_a_common_road_are_refused() -> None:
    apart = rewired(3, "input")  # exit 1 and 2 hang on conv1, exit 0 on conv0
    refused(Unsupported, "'exit1' shares no operator with exit 'exit0'", apart)
    assert len(cut(apart, {"b": "logits1", "c": "map2"})) == 2


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("2 graphs in one file", altered(lambda m: m.subgraphs.append(m.subgraphs[0]))),
        ("tensor 4: keeps state between calls", with_tensor("map0", isVariable=True)),
        ("string values cannot be cut", with_tensor("map0", type=Type.STRING)),
        ("stored sparsely", with_tensor("conv0/w", sparsity=schema.SparsityParametersT())),
        ("lie in another file", with_tensor("conv0/w", externalBuffer=1)),
        ("has no fixed size", with_tensor("map0", shape=[1, -1, 10, 8])),
        ("at a segment's edge has no name", with_tensor("map0", name=b"")),
        ("2 tensors named 'input' at the edges", with_tensor("map0", name=b"input")),
        ("2 tensors are named 'logits0', expected one", with_tensor("map0", name=b"logits0")),
        ("bfloat16 values cannot leave a segment", with_tensor("map0", type=Type.BFLOAT16)),
        ("'logits0' depends on no input", without_input()),
        ("(WHILE): refers to another graph", with_kind(Op.WHILE)),
        ("(IF): refers to another graph", with_kind(Op.IF)),
        ("(CALL_ONCE): refers to another graph", with_kind(Op.CALL_ONCE)),
        ("(READ_VARIABLE): keeps state", with_kind(Op.READ_VARIABLE)),
        ("(RANDOM_UNIFORM): keeps state", with_kind(Op.RANDOM_UNIFORM)),
        ("operator kind 9999 is not known", with_kind(9999)),
    ],
)
def test_sound_files_that_are_refused(words: str, data: bytes) -> None:
    refused(Unsupported, words, data)


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("not a .tflite file", b""),
        ("not a .tflite file", b"PK\3\4" + bytes(100)),
        ("damaged", TINY.data[:8]),
        ("damaged", TINY.data[: len(TINY.data) // 2]),
        ("schema version 2, expected 3", altered(lambda m: setattr(m, "version", 2))),
        ("no graph", altered(lambda m: m.subgraphs.clear())),
        ("before it is made", rewired(0, "map1")),
        ("before it is made", altered(lambda m: m.subgraphs[0].operators.reverse())),
        (
            "a second time",
            altered(lambda m: m.subgraphs[0].operators.append(m.subgraphs[0].operators[0])),
        ),
        ("tensor 999 of", altered(lambda m: setattr(m.subgraphs[0], "outputs", [999]))),
        ("lies in buffer 99 of", with_tensor("conv0/w", buffer=99)),
        ("expected 80", with_tensor("conv0/w", shape=[8, 5, 1, 2])),
        (
            "a scale that is not a number",
            altered(
                lambda m: setattr(
                    tensor(m, "map0").quantization, "scale", np.array([np.nan], np.float32)
                )
            ),
        ),
    ],
)
def test_damaged_files_are_refused(words: str, data: bytes) -> None:
    refused(BadFile, words, data)


# ---------------------------------------------------------------- what a plan says

STEPS = (
    ("conv", 0, 0, 1),
    ("head", 0, 0, 1),
    ("pad", 0, 0, 1),
    ("add", 0, 1, 1),
    ("conv", 0, 0, 7),
    ("split", 0, 0, 1),
    ("concatenate", 0, 1, 0),
    ("head", 0, 0, 2),
    ("conv", 2, 0, 2),  # dead
)


def split_graph(precision: str = "int8") -> Graph:
    return build(Recipe(precision=precision, seed=5, inputs=2, steps=STEPS, exits=(2, 0)))


def test_equal_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    graph = split_graph()
    (tmp_path / "net.tflite").write_bytes(graph.data)
    code = (
        "import hashlib, json, sys; from pathlib import Path; from edgeexit import cut\n"
        "data, exits = Path(sys.argv[1]).read_bytes(), json.loads(sys.argv[2])\n"
        "plans = cut.cut(data, exits)\n"
        "print(cut.exit_order(data, exits), [\n"
        "    hashlib.sha256(d).hexdigest()\n"
        "    for d in (*(p.data for p in plans), cut.drop_dead(data, exits))\n"
        "])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.tflite"), json.dumps(graph.exits)]
    told = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1


def test_the_order_of_exits_is_the_networks_own() -> None:
    for names in permutations(TINY.exits):
        exits = {name: TINY.exits[name] for name in names}
        order = exit_order(TINY.data, exits)
        assert order == [plan.exit for plan in cut(TINY.data, exits)]
        assert order == list(names)  # all hang on map 0: the given order decides
    chain_of = tiny_model(exits=4)
    for names in permutations(chain_of.exits):
        exits = {name: chain_of.exits[name] for name in names}
        late = [name for name in names if name in ("exit2", "exit3")]  # rivals: the given order
        assert exit_order(chain_of.data, exits) == ["exit0", "exit1", *late]


def test_an_exit_may_lie_on_the_road_to_another() -> None:
    exits = {"late": "logits1", "early": "map0"}
    assert exit_order(TINY.data, exits) == ["early", "late"]
    first, second = cut(TINY.data, exits)
    assert [spec.name for spec in first.outputs] == ["map0"]
    assert [spec.name for spec in second.inputs] == ["map0"]


def test_kept_exits_may_come_in_any_order_and_twice() -> None:
    names = list(TINY.exits)
    assert cut(TINY.data, TINY.exits, [*names[::-1], names[0]]) == cut(TINY.data, TINY.exits)


def test_values_pass_over_a_segment() -> None:
    net = tiny_model(skip=True)
    plans = cut(net.data, {"a": "logits0", "b": "map1", "c": "map2"})
    assert [[spec.name for spec in plan.outputs] for plan in plans] == [
        ["logits0", "map0"],
        ["map1"],
        ["map2"],
    ]


def test_shared_constants_are_counted() -> None:
    """The axes of the means, two int32 numbers, are all that the heads have in common."""
    assert [plan.shared_bytes for plan in cut(TINY.data, TINY.exits)] == [0, 8, 8]
    assert [plan.shared_bytes for plan in cut(TINY.data, TINY.exits, ["exit1"])] == [0]


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_dead_parts_are_dropped(precision: str) -> None:
    graph = split_graph(precision)
    small = drop_dead(graph.data, graph.exits)
    inputs, outputs = model_io(small)
    assert [spec.name for spec in inputs] == graph.inputs[:1]
    assert [s.name for s in outputs] == [
        graph.exits[name] for name in exit_order(graph.data, graph.exits)
    ]
    live = set().union(*graph.ancestors.values())
    parts = schema.ModelT.InitFromPackedBuf(small).subgraphs[0]
    before = schema.ModelT.InitFromPackedBuf(graph.data).subgraphs[0]
    assert len(parts.operators) == len(live) < len(before.operators)
    used = {int(t) for op in parts.operators for t in (*op.inputs, *op.outputs)} - {-1}
    assert used == set(range(len(parts.tensors)))
    assert drop_dead(small, graph.exits) == small
    values = samples(graph, graph.alive)
    found, expected = Runs(1)(small, values), Runs(1)(graph.alive, values)
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


def test_dropping_dead_parts_gives_each_tensor_a_name_of_its_own() -> None:
    def change(model: schema.ModelT) -> None:
        for name, other in [("map0", "input"), ("map1", "logits0"), ("head0/mean", "")]:
            tensor(model, name).name = other.encode()

    exits = {name: TINY.exits[name] for name in ("exit1", "exit2")}
    data = altered(change)
    named = drop_dead(data, exits)
    names = [t.name.decode() for t in schema.ModelT.InitFromPackedBuf(named).subgraphs[0].tensors]
    assert len(set(names)) == len(names)
    assert all(names)
    assert {"input", *exits.values()} <= set(names)
    assert [plan.exit for plan in cut(named, exits)] == exit_order(data, exits)


def spec(**changes: object) -> dict[str, object]:
    good = TensorSpec(name="map", shape=(1, 4, 5, 8), dtype="int8", scale=0.25, zero_point=-3)
    return {**good.to_document(), **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shape": [], "dtype": "float32", "scale": 0.0, "zero_point": 0},
        {"name": "a\nb", "scale": 1e-30, "zero_point": -(2**31)},
    ],
)
def test_specs_survive_json(changes: dict[str, object]) -> None:
    document = spec(**changes)
    read = TensorSpec.from_table(Table(json.loads(json.dumps(document)), "b"))
    assert read.to_document() == document
    assert TensorSpec.from_table(Table(read.to_document(), "b")) == read


def test_specs_know_their_size() -> None:
    sizes = {"int8": 160, "float16": 320, "float32": 640, "int64": 1280}
    for dtype, size in sizes.items():
        assert TensorSpec.from_table(Table(spec(dtype=dtype), "b")).size_bytes == size


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": 3},
        {"shape": [1, 0]},
        {"shape": [-1]},
        {"shape": 4},
        {"shape": [1.0]},
        {"dtype": "string"},
        {"dtype": "int4"},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": -0.5},
        {"zero_point": 2**31},
        {"zero_point": True},
        {"extra": 1},
    ],
)
def test_wrong_specs_are_refused(changes: dict[str, object]) -> None:
    (key,) = changes
    with pytest.raises(BadFile, match=rf"^b: {key}"):
        TensorSpec.from_table(Table(spec(**changes), "b"))


MLPERF_TINY = Path(__file__).resolve().parents[2] / "shared" / "data" / "mlperf_tiny"


@pytest.mark.parametrize("path", sorted(MLPERF_TINY.glob("*.tflite")), ids=lambda path: path.stem)
def test_a_foreign_file_cut_at_its_one_exit_answers_the_same(path: Path) -> None:
    data = path.read_bytes()
    inputs, outputs = model_io(data)

    (plan,) = cut(data, {"final": outputs[0].name})

    whole, segment = open_interpreter(data), open_interpreter(plan.data)
    name = inputs[0].name
    bytes_in = np.random.default_rng(0).integers(0, 256, whole.inputs[name].nbytes, np.uint8)
    if whole.inputs[name].dtype.kind == "f":
        bytes_in = (bytes_in[: whole.inputs[name].size] / 255).astype(np.float32).view(np.uint8)
    for opened in (whole, segment):
        opened.inputs[name].reshape(-1).view(np.uint8)[:] = bytes_in
        opened.invoke()
    assert np.array_equal(whole.outputs[outputs[0].name], segment.outputs[plan.outputs[0].name])


def turned(places: list[str]) -> bytes:
    """A net with exits "early" and "late" and a TRANSPOSE at each of *places*."""
    graph = FloatGraph(1, 4, 4)
    order = graph.constant("order", np.array([0, 2, 1]))
    axes = graph.constant("axes", np.array([1]))

    def at(place: str, tensor: str) -> str:
        if place not in places:
            return tensor
        turned = graph.add("TRANSPOSE", [tensor, order], f"{place} turned", (1, 4, 4))
        shape = graph.constant(f"{place} shape", np.array([1, 4, 4]))
        options = {"newShape": [1, 4, 4]}
        return graph.add("RESHAPE", [turned, shape], place, (1, 4, 4), **options)

    shared = at("handed over", graph.add("EXP", ["input"], "shared", (1, 4, 4)))
    graph.add("MEAN", [at("early head", shared), axes], "early", (1, 4))
    late = graph.add("TANH", [at("taken over", shared)], "deep", (1, 4, 4))
    graph.add("MEAN", [at("late head", late), axes], "late", (1, 4))
    return graph.data("early", "late")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], (0, 0)),
        (["early head", "late head"], (2, 0)),
        (["handed over"], (1, 1)),
        (["taken over"], (1, 1)),
        (["handed over", "taken over", "late head"], (3, 2)),
    ],
)
def test_transpositions_at_seams_are_counted(places: list[str], expected: tuple[int, int]) -> None:
    assert transposes(turned(places), {"early": "early", "late": "late"}) == expected
