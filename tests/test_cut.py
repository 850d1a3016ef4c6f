"""The chain of segments is the uncut model, bit for bit; what cannot be cut is refused."""

from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from graphs import Graph, Recipe, build, recipes
from hypothesis import HealthCheck, given, settings

from edgeexit.cut import SegmentPlan, cut, uncut

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
