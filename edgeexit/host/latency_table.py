"""
How long each layer takes as int8 on this machine, as a function of its widths.

Callers see measure_table and LatencyTable. Every distinct kind of layer is built alone, in a grid
of widths, and timed through the runtime that will run it. Hidden here: widths are timed in
interleaved rounds, in several passes over all layers, so that a busy spell of the machine
spoils no layer as a whole; what one call of the runtime costs is taken off; and the grid is made
monotone, since no layer gets faster by growing. The surprise: halving both widths of a layer
need not quarter its time; that is what the table is for.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgeexit.device import this_device
from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.files import Table, json_bytes, read_json, write_file
from edgeexit.host import layer_timing
from edgeexit.host.channels import Layer
from edgeexit.host.graph import Graph
from edgeexit.host.layer_timing import Grid, affordable, timed
from edgeexit.host.one_layer import Shape
from edgeexit.interpreter import runtime_name
from edgeexit.machine import this_machine
from edgeexit.names import unknown
from edgeexit.state import machine_facts

# 1: first format.
TABLE_FORMAT = 1
STEP = 8  # widths are measured at multiples of it: kernels work on so many channels at once
# Next to nothing to compute: what is left is the runtime's call.
_DISPATCH = Shape(kind="linear", places=(1,))


@dataclass(frozen=True, kw_only=True)
class ShapeTimes:
    """
    One kind of layer in a grid of widths: *inputs* x *outputs*, both ascending.

    *rounds_ns* holds for each round the mean nanoseconds of a call, inputs by outputs row by
    row, as they were measured.
    """

    shape: Shape
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rounds_ns: tuple[tuple[float, ...], ...]

    def grid_ms(self, dispatch_ns: float) -> NDArray[np.float64]:
        """
        (inputs, outputs) milliseconds without the *dispatch_ns* of a call, nowhere falling.

        The fastest round counts: whatever else the machine does only adds. Where times fall with
        growing width they are replaced by the nearest rising ones (least largest deviation:
        halfway between the running maximum and minimum). A tenth of what was measured stays:
        within a network, too, an operator costs something.
        """
        found = np.array(self.rounds_ns).min(axis=0).reshape(len(self.inputs), len(self.outputs))
        up, down = found, found[::-1, ::-1]
        for axis in (0, 1):
            up = np.maximum.accumulate(up, axis=axis)
            down = np.minimum.accumulate(down, axis=axis)
        rising = (up + down[::-1, ::-1]) / 2
        grid: NDArray[np.float64] = np.maximum(rising - dispatch_ns, 0.1 * rising) / 1e6
        return grid


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """
    Measured int8 latencies of a network's layers on one machine, one thread.

    *layers* maps a layer's name to the number of its shape in *shapes* and how often a forward
    uses it; *dispatch_ns* are what calls of the runtime cost with next to nothing to compute.
    """

    device: str
    runtime: str
    environment: Mapping[str, Any]
    input_shape: tuple[int, ...]
    dispatch_ns: tuple[float, ...]
    shapes: tuple[ShapeTimes, ...]
    layers: Mapping[str, tuple[int, int]]

    @cached_property
    def _grids(self) -> list[list[list[float]]]:
        dispatch_ns = min(self.dispatch_ns)
        return [times.grid_ms(dispatch_ns).tolist() for times in self.shapes]

    def milliseconds(self, layer: Layer | str, outputs: int, inputs: int) -> float:
        """
        The latency of *layer* with *outputs* and *inputs* channels; 0 where either is 0.

        Linear between the measured widths, and that of the smallest one below it. UsageError for
        layers and widths that the table does not hold.
        """
        name = layer if isinstance(layer, str) else layer.name
        if name not in self.layers:
            raise unknown(name, self.layers, "layer in the latency table")
        number, uses = self.layers[name]
        times, grid = self.shapes[number], self._grids[number]
        if outputs <= 0 or inputs <= 0:
            return 0.0
        if times.shape.kind == "depthwise":
            inputs = times.inputs[-1]
        row, down = _between(times.inputs, inputs, name)
        column, right = _between(times.outputs, outputs, name)
        near, far = (
            one[column] * (1 - right) + one[min(column + 1, len(one) - 1)] * right
            for one in (grid[row], grid[min(row + 1, len(grid) - 1)])
        )
        return uses * (near * (1 - down) + far * down)

    def total(self, graph: Graph, kept: Mapping[str, int] | None = None) -> float:
        """Milliseconds of all layers of *graph* when *kept* units of each group stay."""
        widths = graph.widths(kept or {})
        return sum(
            self.milliseconds(name, outputs, inputs) for name, (inputs, outputs) in widths.items()
        )

    def curve(self, graph: Graph, group: str) -> NDArray[np.float64]:
        """
        (size + 1,) milliseconds of all layers around *group* with 0, 1, ... of its units.

        The layers' other widths are the present ones. With 0 units as with 1: a group is
        never emptied.
        """
        one = graph.groups[group]
        ends: dict[str, dict[str, int]] = {}
        for (module, side), positions in one.places.items():
            if side != "norm":
                ends.setdefault(module, {})[side] = positions.shape[1]
        curve = np.zeros(one.size + 1)
        for units in range(1, one.size + 1):
            gone = one.size - units
            for name, per_unit in ends.items():
                layer = graph.layers[name]
                outputs = layer.outputs - gone * per_unit.get("out", 0)
                inputs = layer.inputs - gone * per_unit.get("in", 0)
                curve[units] += self.milliseconds(name, outputs, inputs)
        curve[0] = curve[min(1, one.size)]
        return curve

    # ------------------------------------------------------------ the file

    def to_document(self) -> dict[str, Any]:
        """The table as plain values: raw nanoseconds, no statistics."""
        return {
            "format": TABLE_FORMAT,
            "device": self.device,
            "runtime": self.runtime,
            "environment": dict(self.environment),
            "input_shape": list(self.input_shape),
            "dispatch_ns": list(self.dispatch_ns),
            "shapes": [
                {
                    "kind": times.shape.kind,
                    "places": list(times.shape.places),
                    "kernel": list(times.shape.kernel),
                    "stride": list(times.shape.stride),
                    "dilation": list(times.shape.dilation),
                    "groups": times.shape.groups,
                    "inputs": list(times.inputs),
                    "outputs": list(times.outputs),
                    "rounds_ns": [list(row) for row in times.rounds_ns],
                }
                for times in self.shapes
            ],
            "layers": {
                name: {"shape": number, "uses": uses}
                for name, (number, uses) in self.layers.items()
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> "LatencyTable":
        """The table that to_document gave; BadFile if anything in it is not understood."""
        table = Table(document, where)
        table.only(*cls.__dataclass_fields__, "format")
        table.expect_format(TABLE_FORMAT)
        shapes = tuple(_shape_times(entry) for entry in table.tables("shapes"))
        layers = {}
        for name in table.get("layers", dict):
            entry = table.table("layers").table(name)
            entry.only("shape", "uses")
            number, uses = entry.get("shape", int), entry.get("uses", int)
            if not 0 <= number < len(shapes) or uses < 1:
                raise BadFile(f"{entry.where}: no shape {number}, or used {uses} times")
            layers[name] = (number, uses)
        return cls(
            device=table.get("device", str),
            runtime=table.get("runtime", str),
            environment=table.get("environment", dict),
            input_shape=_counts(table, "input_shape"),
            dispatch_ns=_times(table, "dispatch_ns", table.list_of("dispatch_ns", float)),
            shapes=shapes,
            layers=layers,
        )

    def write(self, path: Path) -> None:
        """Write the table as JSON. StorageError if that fails."""
        write_file(path, json_bytes(self.to_document()))


def read_table(path: Path) -> LatencyTable:
    """The table in the JSON file *path*. UsageError if it is absent, BadFile if not sound."""
    return LatencyTable.from_document(read_json(path).values, str(path))


def _shape_times(table: Table) -> ShapeTimes:
    sizes = ("places", "kernel", "stride", "dilation")
    table.only("kind", *sizes, "groups", "inputs", "outputs", "rounds_ns")
    found = {key: _counts(table, key) for key in (*sizes, "inputs", "outputs")}
    for key in ("inputs", "outputs"):
        if list(found[key]) != sorted(set(found[key])):
            raise BadFile(f"{table.where}.{key}: expected ascending widths")
    count = len(found["inputs"]) * len(found["outputs"])
    rounds = tuple(
        _times(table, "rounds_ns", Table({"row": row}, table.where).list_of("row", float))
        for row in table.list_of("rounds_ns", list)
    )
    if not rounds or any(len(row) != count for row in rounds):
        raise BadFile(f"{table.where}.rounds_ns: expected rows of {count} times")
    return ShapeTimes(
        shape=Shape(
            kind=table.get("kind", str),
            groups=table.get("groups", int),
            **{key: found[key] for key in sizes},
        ),
        inputs=found["inputs"],
        outputs=found["outputs"],
        rounds_ns=rounds,
    )


def _counts(table: Table, key: str) -> tuple[int, ...]:
    values = tuple(table.list_of(key, int))
    if not values or min(values) < 1:
        raise BadFile(f"{table.where}.{key}: found {list(values)}, expected numbers from 1")
    return values


def _times(table: Table, key: str, values: Sequence[float]) -> tuple[float, ...]:
    if not values or not all(0 < value < math.inf for value in values):
        raise BadFile(f"{table.where}.{key}: expected times above 0")
    return tuple(values)


def _between(grid: Sequence[int], width: int, name: str) -> tuple[int, float]:
    """Place of *width* in the ascending *grid*: left neighbour, and how far it is to the next."""
    if width > grid[-1]:
        raise UsageError(
            f"latency table: {name} was measured up to {grid[-1]} channels, asked for {width}",
            hint="measure a table of this very network",
        )
    right = bisect_left(grid, width)
    if right == 0:
        return 0, 0.0
    return right - 1, (width - grid[right - 1]) / (grid[right] - grid[right - 1])


# ---------------------------------------------------------------- measuring


def measure_table(
    graph: Graph,
    model: nn.Module,
    input_shape: Sequence[int],
    on_step: Callable[[int, int], None] | None = None,
    widths: Sequence[int] | None = None,
) -> LatencyTable:
    """
    Measure every distinct layer of *graph* (of *model*, for inputs of *input_shape*).

    *widths* are the channels to measure at beside the present ones, by default multiples of
    STEP; layer_timing says how many of them there is time for. What no group can narrow stays
    as it is. *on_step* is told how many of how many measurements are done. Unsupported for
    layers that cannot be measured alone.
    """
    narrow = {place for group in graph.groups.values() for place in group.places}
    numbers: dict[tuple[Any, ...], int] = {}
    layers: dict[str, tuple[int, int]] = {}
    for name, layer in graph.layers.items():
        shape = _shape_of(layer, model.get_submodule(name))
        free = ((name, "in") in narrow, (name, "out") in narrow)
        key = (shape, layer.inputs, layer.outputs, free)
        layers[name] = (numbers.setdefault(key, len(numbers)), _uses(layer, model))
    grids: list[Grid] = [(_DISPATCH, (1,), (1,))]
    for shape, inputs, outputs, free in numbers:
        rows = (1,) if shape.kind == "depthwise" else _widths(inputs, widths, free[0])
        grids.append(affordable(shape, rows, _widths(outputs, widths, free[1])))
    rounds: list[list[tuple[float, ...]]] = [[] for _ in grids]
    for number in range(layer_timing.PASSES):
        for k, grid in enumerate(grids):
            rounds[k].extend(timed(grid, seed=number))
            if on_step is not None:
                on_step(number * len(grids) + k + 1, layer_timing.PASSES * len(grids))
    return LatencyTable(
        device=this_device(),
        runtime=runtime_name(),
        environment=machine_facts(this_machine()),
        input_shape=tuple(input_shape),
        dispatch_ns=tuple(row[0] for row in rounds[0]),
        shapes=tuple(
            ShapeTimes(shape=shape, inputs=inputs, outputs=outputs, rounds_ns=tuple(found))
            for (shape, inputs, outputs), found in list(zip(grids, rounds, strict=True))[1:]
        ),
        layers=layers,
    )


def _uses(layer: Layer, model: nn.Module) -> int:
    """How often one forward uses *layer*: its MACs are those of all its uses."""
    weight = model.get_parameter(f"{layer.name}.weight")
    once = math.prod(layer.out_shape[1:]) * weight[0].numel()
    return max(1, round(layer.macs / once))


def _shape_of(layer: Layer, module: nn.Module) -> Shape:
    if layer.kind == "linear":
        return Shape(kind="linear", places=(math.prod(layer.out_shape[:-1]),))
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        raise Unsupported(
            f"{layer.name}: a {type(module).__name__} cannot be measured alone",
            hint="count macs instead of milliseconds",
        )

    def pair(values: Sequence[int]) -> tuple[int, ...]:
        return (1, *values) if len(values) == 1 else tuple(values)

    return Shape(
        kind=layer.kind,
        places=pair(layer.out_shape[2:]),
        kernel=pair(module.kernel_size),
        stride=pair(module.stride),
        dilation=pair(module.dilation),
        groups=module.groups if layer.kind == "grouped" else 1,
    )


def _widths(present: int, asked: Sequence[int] | None, is_free: bool) -> tuple[int, ...]:
    """The widths of one axis to measure, ascending, the last one *present*."""
    if not is_free:
        return (present,)
    if asked is not None:
        return (*sorted({width for width in asked if 0 < width < present}), present)
    if present <= STEP:
        return tuple(sorted({max(1, present // 2), present}))
    return (*range(STEP, present, STEP), present)
