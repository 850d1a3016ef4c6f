"""
Time one kind of layer in a grid of widths, through the runtime that will run it.

Callers see affordable (which widths there is time for), timed (one pass over them) and PASSES.
"""

import math
from collections.abc import Callable
from random import Random
from time import perf_counter_ns

import numpy as np

from edgeexit.host.one_layer import Shape, one_layer
from edgeexit.interpreter import open_interpreter

POINTS = 8  # most widths per axis
BLOCK_NS = 150_000  # one timed block lasts about this long
SHAPE_NS = 200_000_000  # one shape, all its widths and passes together, for about this long
PASSES = 3  # over all shapes
ROUNDS = (3, 9)  # fewest and most rounds of a shape in a pass
Grid = tuple[Shape, tuple[int, ...], tuple[int, ...]]  # with its inputs and outputs


def _thinned(widths: tuple[int, ...], points: int) -> tuple[int, ...]:
    """At most *points* of *widths*, evenly spread, both ends among them."""
    if len(widths) <= points:
        return widths
    places = np.rint(np.linspace(0, len(widths) - 1, max(points, 2))).astype(int)
    return tuple(widths[place] for place in places)


def affordable(shape: Shape, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Grid:
    """As many of these widths (ascending) as can be timed in time, both ends among them."""
    slowest = _opened(shape, inputs[-1], outputs[-1])
    slowest_ns = min(_block_ns(slowest, 1) for _ in range(3))
    opened_ns = min(_block_ns(lambda: _opened(shape, inputs[-1], outputs[-1]), 1) for _ in range(2))
    for points in range(POINTS, 1, -1):
        rows, columns = _thinned(inputs, points), _thinned(outputs, points)
        # Widths are spread evenly, so that a layer has about a quarter of the slowest's MACs.
        pass_ns = opened_ns / 3 + ROUNDS[0] * max(slowest_ns / 3, BLOCK_NS)
        if PASSES * len(rows) * len(columns) * pass_ns <= 2 * SHAPE_NS:
            break
    return shape, rows, columns


def _opened(shape: Shape, inputs: int, outputs: int) -> Callable[[], None]:
    """The call that runs one such layer, warmed up."""
    network = open_interpreter(
        one_layer(shape, inputs, outputs), where=f"{shape.kind} layer", is_own=True
    )
    for _ in range(3):
        network.invoke()
    # Taken after the first call, which looks at more than the later ones.
    return network.invoke


def timed(grid: Grid, *, seed: int) -> list[tuple[float, ...]]:
    """
    One pass: rounds of mean nanoseconds per call, inputs by outputs row by row.

    In a round all widths take turns, in random order drawn from *seed*.
    """
    shape, inputs, outputs = grid
    steps = [_opened(shape, row, column) for row in inputs for column in outputs]
    calls = [
        max(1, math.ceil(BLOCK_NS / min(_block_ns(step, 1) for _ in range(3)))) for step in steps
    ]
    order = Random(seed)
    rounds: list[tuple[float, ...]] = []
    began = perf_counter_ns()
    while len(rounds) < ROUNDS[0] or (
        len(rounds) < ROUNDS[1] and perf_counter_ns() - began < SHAPE_NS / PASSES
    ):
        blocks = [0.0] * len(steps)
        for k in order.sample(range(len(steps)), len(steps)):
            steps[k]()  # back into the caches after the others
            blocks[k] = round(_block_ns(steps[k], calls[k]), 1)
        rounds.append(tuple(blocks))
    return rounds


def _block_ns(step: Callable[[], object], calls: int) -> float:
    began = perf_counter_ns()
    for _ in range(calls):
        step()
    return max(1, perf_counter_ns() - began) / calls
