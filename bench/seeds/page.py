"""
How numbers stand in the papers' sections of docs/results.md: grids, spreads over seeds, figures.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from seeds.curves import Band

from edgeexit.files import write_file
from edgeexit.plot import BLACK, BLUE, GREEN, GREY, ORANGE, RED


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first of *rows* is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """The mean of *values*, one for each seed, with the least and the largest, times *scale*."""
    mean, low, high = (f"{scale * f(values):.{digits}f}" for f in (np.mean, min, max))
    return f"{mean} ({low} .. {high})"


def verdicts(nets: Iterable[Mapping[str, Any]]) -> str:
    """How many of the profiles behind the milliseconds of int8 *nets* can be trusted."""
    words = [net["measured"]["verdict"].partition(":")[0].lower() for net in nets]
    counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
    return f"Profiles behind the milliseconds: {counts}.\n"


_LOOKS = ((BLUE, "-"), (RED, "--"), (GREY, ":"), (GREEN, "-."), (ORANGE, (0, (4, 1, 1, 1, 1, 1))))


def figure(
    path: Path,
    lines: Mapping[str, Band],
    *,
    title: str,
    cost: str,
    accuracy: str,
    marks: Sequence[tuple[float, float]] = (),
    is_logarithmic: bool = False,
) -> None:
    """
    Draw *lines* with their bands over the seeds as an SVG; *cost* and *accuracy* name the axes.

    *marks* are points. Equal arguments give equal bytes. Needs the extra `plot`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "edgeexit", "svg.fonttype": "none", "font.size": 9.0}):
        drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = drawn.subplots()
        for (name, one), (colour, line) in zip(lines.items(), _LOOKS, strict=False):
            axes.fill_between(one.costs, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(one.costs, one.mean, linestyle=line, color=colour, label=name)
        for place, height in marks:
            axes.plot(place, height, "o", color=BLACK, markersize=4)
        if is_logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(cost)
        axes.set_ylabel(accuracy)
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    write_file(path, buffer.getvalue())
