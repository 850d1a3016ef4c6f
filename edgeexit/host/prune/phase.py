"""
What a training that prepares a removal starts from, tells, and lets its user set.

Callers see Facts and Phase; the phases see read, which holds a recipe's plain values to a
dataclass of numbers with ranges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from edgeexit.errors import UsageError
from edgeexit.host.fit import Influence
from edgeexit.host.graph import Graph, Group
from edgeexit.host.prune.evidence import weight_of
from edgeexit.names import unknown

Units = dict[str, NDArray[np.int64]]
Scores = dict[str, NDArray[np.float64]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """
    What a phase starts from.

    *units* (group -> indices) are chosen for removal, or None; *iterations* are the steps of the
    optimizer that the phase will see, if known: growth is then fitted into them. *options* are a
    recipe's plain values. UsageError for a group that is not there.
    """

    model: nn.Module
    graph: Graph
    units: Mapping[str, NDArray[np.int64]] | None = None
    iterations: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.units or {}:
            if name not in self.graph.groups:
                raise unknown(name, self.graph.groups, "group of channels")


class Phase(Influence):
    """An Influence that ends in a removal."""

    # Its weights change on purpose: an earlier epoch that answers better would undo it.
    keeps_last = True

    def __init__(self) -> None:
        self.iteration = 0
        self._handles: list[RemovableHandle] = []

    def chosen(self) -> Units:
        """The units to remove now: group -> ascending indices; at least one unit stays."""
        return {}

    def scores(self) -> Scores:
        """Group -> (size,): what the phase has made of each unit; low goes first."""
        return {}

    def distances(self) -> dict[str, float]:
        """Block -> how far it is from identity, in the order of removal."""
        return {}

    def close(self) -> None:
        """Take every hook off the network."""
        while self._handles:
            self._handles.pop().remove()


def number(default: Any, low: float, high: float = math.inf) -> Any:
    """A dataclass field that read holds to *low*..*high*."""
    return field(default=default, metadata={"range": (low, high)})


def read(kind: type[T], facts: Facts, phase: str) -> T:
    """*facts.options* as a *kind*; UsageError for an unknown one or a number out of range."""
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for name, value in facts.options.items():
        if name not in known:
            raise unknown(name, known, f"option of the phase {phase}")
        low, high = known[name].metadata["range"]
        wanted = str(known[name].type)
        is_number = type(value) is int or (type(value) is float and "float" in wanted)
        if not is_number or not low <= value <= high or math.isinf(value):
            raise UsageError(
                f"phase {phase}: {name}: found {value!r}, expected a"
                f"{'' if 'float' in wanted else ' whole'} number in {low:g}..{high:g}"
            )
    return kind(**facts.options)


def magnitudes(model: nn.Module, group: Group) -> NDArray[np.float64]:
    """Mean |w| (size,) of each unit's filters, averaged over its producers."""
    rows = []
    for producer in group.producers:
        weight = weight_of(model, producer).abs().double().flatten(1).mean(1).cpu()
        rows.append(weight[torch.from_numpy(group.places[producer, "out"])].mean(1))
    return np.asarray(torch.stack(rows).mean(0).numpy())


def ascending(values: Mapping[str, float]) -> dict[str, float]:
    """*values*, lowest first."""
    return dict(sorted(values.items(), key=lambda pair: pair[1]))
