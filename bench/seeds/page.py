"""How figures stand in the papers' sections of docs/results.md: grids and spreads over seeds."""

from collections.abc import Sequence

import numpy as np


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first of *rows* is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """The mean of *values*, one for each seed, with the least and the largest, times *scale*."""
    mean, low, high = (f"{scale * f(values):.{digits}f}" for f in (np.mean, min, max))
    return f"{mean} ({low} .. {high})"
