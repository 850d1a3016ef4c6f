"""Latency tables: measured layer by layer, monotone, strict on file, true to the whole network."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

torch = pytest.importorskip("torch")

from edgeexit.errors import BadFile, Unsupported, UsageError  # noqa: E402
from edgeexit.host import layer_timing, zoo  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.latency_table import (  # noqa: E402
    LatencyTable,
    ShapeTimes,
    measure_table,
    read_table,
)
from edgeexit.host.one_layer import Shape, one_layer  # noqa: E402
from edgeexit.interpreter import open_interpreter  # noqa: E402
from edgeexit.tflite import read_model  # noqa: E402

pytestmark = pytest.mark.host

CONV = Shape(kind="conv", places=(8, 8), kernel=(3, 3))
laws = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(layer_timing, "SHAPE_NS", 10_000_000)
    monkeypatch.setattr(layer_timing, "BLOCK_NS", 20_000)
    monkeypatch.setattr(layer_timing, "PASSES", 2)


def a_table(**changes: Any) -> LatencyTable:
    """Two layers of one shape; ms = inputs * outputs / 100 on the grid."""
    grid = [i * o * 10_000.0 + 100 for i in (4, 8) for o in (8, 16, 32)]
    times = ShapeTimes(shape=CONV, inputs=(4, 8), outputs=(8, 16, 32), rounds_ns=(tuple(grid),) * 3)
    wide = ShapeTimes(
        shape=Shape(kind="depthwise", places=(8, 8), kernel=(3, 3)),
        inputs=(1,),
        outputs=(8, 16),
        rounds_ns=((1100.0, 2100.0),),
    )
    facts: dict[str, Any] = {
        "device": "host",
        "runtime": "some runtime",
        "environment": {"cores": 2},
        "input_shape": (1, 1, 8, 8),
        "dispatch_ns": (120.0, 100.0, 500.0),
        "shapes": (times, wide),
        "layers": {"one": (0, 1), "twice": (0, 2), "wide": (1, 1)},
    }
    return LatencyTable(**(facts | changes))


# ---------------------------------------------------------------- looking up


def test_lookups_are_linear_between_the_measured_widths() -> None:
    table = a_table()

    assert table.milliseconds("one", 16, 8) == pytest.approx(1.28)
    assert table.milliseconds("twice", 16, 8) == pytest.approx(2.56)
    assert table.milliseconds("one", 24, 6) == pytest.approx(1.44)
    # Below the smallest width measured, nothing gets faster.
    assert table.milliseconds("one", 1, 1) == table.milliseconds("one", 8, 4)
    assert table.milliseconds("wide", 12, 12) == pytest.approx(0.0015)
    assert table.milliseconds("one", 0, 8) == table.milliseconds("one", 8, 0) == 0
    with pytest.raises(UsageError, match="up to 32 channels, asked for 33"):
        table.milliseconds("one", 33, 8)
    with pytest.raises(UsageError, match="no layer in the latency table named 'onse'"):
        table.milliseconds("onse", 8, 8)


times_ns = st.floats(1e3, 1e6)


@laws
@given(arrays(np.float64, (5, 3, 4), elements=times_ns))
def test_the_grid_never_falls_with_growing_width(rounds: np.ndarray) -> None:
    times = ShapeTimes(
        shape=CONV,
        inputs=(1, 2, 3),
        outputs=(1, 2, 3, 4),
        rounds_ns=tuple(tuple(row.ravel().tolist()) for row in rounds),
    )

    grid = times.grid_ms(500.0)

    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()
    assert (grid >= 1e-4).all()  # a tenth of the fastest that there can be


@laws
@given(
    arrays(np.float64, (3, 4), elements=times_ns),
    arrays(np.float64, (5, 3, 4), elements=st.floats(1, 50)),
)
def test_rising_times_are_left_alone_however_busy_the_machine_was(
    grid: np.ndarray, disturbances: np.ndarray
) -> None:
    rising = np.sort(np.sort(grid, axis=0), axis=1)
    # Each width had one quiet block, in this round or that.
    quiet = np.arange(12).reshape(3, 4) % 5
    disturbances[quiet, np.arange(3)[:, None], np.arange(4)] = 1
    times = ShapeTimes(
        shape=CONV,
        inputs=(1, 2, 3),
        outputs=(1, 2, 3, 4),
        rounds_ns=tuple(tuple((rising * one).ravel().tolist()) for one in disturbances),
    )

    assert times.grid_ms(0.0) * 1e6 == pytest.approx(rising, rel=1e-9)


def test_falling_times_are_replaced_by_the_nearest_rising_ones() -> None:
    times = ShapeTimes(
        shape=CONV, inputs=(8,), outputs=(8, 16, 24), rounds_ns=((100.0, 400.0, 200.0),)
    )

    assert times.grid_ms(0.0) * 1e6 == pytest.approx(np.array([[100.0, 300.0, 300.0]]))


# ---------------------------------------------------------------- the file


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = a_table()
    table.write(tmp_path / "latency.json")

    assert read_table(tmp_path / "latency.json") == table
    assert LatencyTable.from_document(table.to_document(), "state") == table


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], 2, "format: found 2"),
        (["speed"], 1, "unknown key"),
        (["device"], 1, "device: expected str"),
        (["input_shape"], [1, 0], "input_shape"),
        (["dispatch_ns"], [], "dispatch_ns: expected times"),
        (["shapes", 0, "kind"], None, "kind: expected str"),
        (["shapes", 0, "colour"], 1, "colour: unknown key"),
        (["shapes", 0, "inputs"], [8, 4], "inputs: expected ascending"),
        (["shapes", 0, "outputs"], [8, 16], "rows of 4 times"),
        (["shapes", 0, "rounds_ns"], [], "rows of 6 times"),
        (["shapes", 0, "rounds_ns", 1, 2], 0.0, "times above 0"),
        (["shapes", 0, "rounds_ns", 1, 2], "fast", "expected float"),
        (["layers", "one", "shape"], 2, "no shape 2"),
        (["layers", "one", "uses"], 0, "used 0 times"),
        (["layers", "one"], 3, "expected dict"),
    ],
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, path: list[Any], value: object, words: str
) -> None:
    document = copy.deepcopy(a_table().to_document())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "latency.json").write_text(json.dumps(document))

    with pytest.raises(BadFile, match=words):
        read_table(tmp_path / "latency.json")


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    ("shape", "inputs", "outputs", "expected"),
    [
        (CONV, 4, 16, ((1, 8, 8, 4), (1, 8, 8, 16))),
        (
            Shape(kind="conv", places=(7, 5), kernel=(3, 3), stride=(2, 2)),
            3,
            8,
            ((1, 14, 10, 3), (1, 7, 5, 8)),
        ),
        (
            Shape(kind="conv", places=(1, 9), kernel=(1, 5), dilation=(1, 2)),
            6,
            7,
            ((1, 1, 9, 6), (1, 1, 9, 7)),
        ),
        (
            Shape(kind="depthwise", places=(4, 4), kernel=(3, 3), stride=(2, 2)),
            1,
            24,
            ((1, 8, 8, 24), (1, 4, 4, 24)),
        ),
        (
            Shape(kind="grouped", places=(4, 4), kernel=(3, 3), groups=2),
            8,
            16,
            ((1, 4, 4, 8), (1, 4, 4, 16)),
        ),
        (Shape(kind="linear", places=(1,)), 32, 10, ((1, 32), (1, 10))),
        (Shape(kind="linear", places=(16,)), 32, 64, ((16, 32), (16, 64))),
    ],
)
def test_one_layer_is_what_was_asked_for_and_runs(
    shape: Shape, inputs: int, outputs: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    data = one_layer(shape, inputs, outputs)
    network = open_interpreter(data)
    (x,), (y,) = network.inputs.values(), network.outputs.values()
    x[...] = np.random.default_rng(0).integers(-128, 128, x.shape)

    network.invoke()

    assert (x.shape, y.shape) == expected
    assert x.dtype == y.dtype == np.int8
    assert len(np.unique(y)) > 5
    (weights,) = (t.shape for t in read_model(data, "it").tensors if t.name == "weights")
    fan_in = inputs if shape.kind != "depthwise" else 1
    assert np.prod(weights) == outputs * fan_in // shape.groups * np.prod(shape.kernel)


# ---------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def resnet() -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    net = zoo.resnet(
        channels=1, classes=3, size=[16, 16], stem=[16], widths=[16, 64], blocks=[1, 2], exits=[1]
    )
    return net.eval(), (1, 1, 16, 16)


def test_a_network_is_measured_layer_by_layer(resnet: Any, tmp_path: Path) -> None:
    model, input_shape = resnet
    graph = analyse(model, input_shape)
    told: list[tuple[int, int]] = []

    table = measure_table(graph, model, input_shape, lambda *step: told.append(step))

    assert set(table.layers) == set(graph.layers)
    steps = layer_timing.PASSES * (len(table.shapes) + 1)
    assert told == [(k + 1, steps) for k in range(steps)]
    # Equal layers share a shape; every layer's present widths are in the table.
    assert table.layers["blocks.0.first.0"] == table.layers["blocks.0.second.0"]
    for name, layer in graph.layers.items():
        times = table.shapes[table.layers[name][0]]
        assert times.outputs[-1] == layer.outputs
        assert times.inputs[-1] == layer.inputs
        assert len(times.rounds_ns) >= layer_timing.PASSES * layer_timing.ROUNDS[0]
    first = table.shapes[table.layers["stem.0.0"][0]]
    assert first.inputs == (1,)  # the picture's channel is not ours to remove
    assert first.outputs == (8, 16)
    assert table.shapes[table.layers["heads.3.linear"][0]].outputs == (3,)
    # The heaviest layer takes the longest; 64 of 64 channels take longer than 8 of 8.
    slowest = max(graph.layers, key=lambda n: table.milliseconds(n, *present(graph, n)))
    assert slowest in ("blocks.1.second.0", "blocks.2.first.0", "blocks.2.second.0")
    assert table.milliseconds(slowest, 64, 64) > 3 * table.milliseconds(slowest, 8, 8) > 0
    table.write(tmp_path / "latency.json")
    assert read_table(tmp_path / "latency.json") == table


def present(graph: Any, name: str) -> tuple[int, int]:
    return graph.layers[name].outputs, graph.layers[name].inputs


def test_totals_and_curves_count_producers_and_consumers(resnet: Any) -> None:
    model, input_shape = resnet
    graph = analyse(model, input_shape)
    table = measure_table(graph, model, input_shape)
    (name,) = (n for n, g in graph.groups.items() if g.producers == ("blocks.2.first.0",))

    curve = table.curve(graph, name)

    assert curve.shape == (65,)
    assert (np.diff(curve) >= 0).all()
    assert curve[0] == curve[1] > 0
    both = sum(table.milliseconds(f"blocks.2.{n}.0", 64, 64) for n in ("first", "second"))
    assert curve[64] == pytest.approx(both)
    whole = table.total(graph)
    assert whole == pytest.approx(
        sum(table.milliseconds(n, *present(graph, n)) for n in graph.layers)
    )
    for units in (8, 40):
        assert whole - table.total(graph, {name: units}) == pytest.approx(
            curve[64] - curve[units], abs=1e-9
        )


def test_widths_can_be_chosen_and_slow_layers_get_fewer(
    resnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_shape = resnet
    graph = analyse(model, input_shape)
    chosen = measure_table(graph, model, input_shape, widths=[4, 60, 99])
    monkeypatch.setattr(layer_timing, "SHAPE_NS", 1_000)
    coarse = measure_table(graph, model, input_shape)

    deep = chosen.layers["blocks.2.second.0"][0]
    assert chosen.shapes[deep].outputs == chosen.shapes[deep].inputs == (4, 60, 64)
    assert coarse.shapes[coarse.layers["blocks.2.second.0"][0]].outputs == (8, 64)
    least = layer_timing.PASSES * layer_timing.ROUNDS[0]
    assert all(len(times.rounds_ns) == least for times in coarse.shapes)


@pytest.mark.parametrize("name", ["dscnn", "conv1d", "vit", "mobilenet"])
def test_every_kind_of_zoo_net_can_be_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timing, "POINTS", 2)
    monkeypatch.setattr(layer_timing, "SHAPE_NS", 1_000)
    small: dict[str, dict[str, Any]] = {
        "dscnn": {"width": 16, "blocks": 2, "exits": [1]},
        "conv1d": {"widths": [8, 16], "exits": [0]},
        "vit": {"size": [8, 8], "width": 16, "heads": 2, "blocks": 1, "exits": []},
        "mobilenet": {
            "stem": 8,
            "last": 16,
            "stages": [[1, 8, 1, 1], [2, 8, 2, 2]],
            "exits": [2],
        },
    }
    shapes = {
        "dscnn": (1, 1, 49, 10),
        "conv1d": (1, 6, 32),
        "vit": (1, 3, 8, 8),
        "mobilenet": (1, 3, 16, 16),
    }
    model = zoo.FACTORIES[name](**small[name]).eval()
    graph = analyse(model, shapes[name])

    table = measure_table(graph, model, shapes[name])

    assert set(table.layers) == set(graph.layers)
    assert table.total(graph) > 0
    assert all(uses == 1 for _, uses in table.layers.values())


class Twice(torch.nn.Module):
    """One convolution used two times, and a kind of layer that TFLite has no kernel for."""

    def __init__(self, with_volume: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.volume = torch.nn.Conv3d(1, 1, 1) if with_volume else None
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(torch.relu(self.conv(x)))
        if self.volume is not None:
            x = self.volume(x[:, None])[:, 0]
        return self.linear(x.mean((2, 3)))


def test_a_layer_used_twice_counts_twice() -> None:
    model = Twice(with_volume=False).eval()

    table = measure_table(analyse(model, (1, 4, 8, 8)), model, (1, 4, 8, 8))

    assert table.layers["conv"][1] == 2
    volume = Twice(with_volume=True).eval()
    with pytest.raises(Unsupported, match="volume: a Conv3d cannot be measured alone"):
        measure_table(analyse(volume, (1, 4, 8, 8)), volume, (1, 4, 8, 8))
