"""
How numbers stand in the papers' sections of docs/results.md: grids, spreads over seeds, figures.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    with _axes(path, title, cost, accuracy) as axes:
        for (name, one), (colour, line) in zip(lines.items(), _LOOKS, strict=False):
            axes.fill_between(one.costs, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(one.costs, one.mean, linestyle=line, color=colour, label=name)
        for place, height in marks:
            axes.plot(place, height, "o", color=BLACK, markersize=4)
        if is_logarithmic:
            axes.set_xscale("log")


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points of one kind, each with a name beside it ("": none); *is_line* joins them."""

    costs: Sequence[float]
    accuracies: Sequence[float]
    names: Sequence[str]
    is_line: bool = False


_MARKERS = ("o", "s", "D", "^", "v")


def points(
    path: Path, groups: Mapping[str, Points], *, title: str, cost: str, accuracy: str
) -> None:
    """
    Draw *groups* of points as an SVG; *cost* and *accuracy* name the axes.

    Equal arguments give equal bytes. Needs the extra `plot`.
    """
    with _axes(path, title, cost, accuracy) as axes:
        looks = zip(_LOOKS, _MARKERS, strict=True)
        for (name, one), ((colour, _), marker) in zip(groups.items(), looks, strict=False):
            axes.plot(
                one.costs,
                one.accuracies,
                linestyle="-" if one.is_line else "none",
                marker=marker,
                markersize=5,
                color=colour,
                label=name,
            )
            for place, height, text in zip(one.costs, one.accuracies, one.names, strict=True):
                axes.annotate(
                    text, (place, height), (5, -9), textcoords="offset points", fontsize=7
                )
        axes.margins(x=0.15)


@contextmanager
def _axes(path: Path, title: str, cost: str, accuracy: str) -> Iterator[Any]:
    """Axes to draw on; they lie in *path* afterwards."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "edgeexit", "svg.fonttype": "none", "font.size": 9.0}):
        drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = drawn.subplots()
        yield axes
        axes.set_xlabel(cost)
        axes.set_ylabel(accuracy)
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    write_file(path, buffer.getvalue())
