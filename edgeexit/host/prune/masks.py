"""
Single weights switched off: the papers' unstructured pruning, reported for what it is.

Callers see Masks (the weights in use, kept so through a training), POOLS, random_masks,
iterate and compressed_bytes. Zeros make a file smaller once it is compressed. They make nothing
faster: the runtime's kernels for convolutions and int8 multiply them like any other number.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import BadFile, UsageError
from edgeexit.host.fit import Influence
from edgeexit.host.graph import Graph
from edgeexit.host.prune.allocators import ALLOCATORS, Allocator, Bill, global_ranking
from edgeexit.names import choose

Scores = Mapping[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]

# Single weights are compared as they are: global magnitude means no scale per layer.
_ALLOCATORS: dict[str, Allocator] = {
    name: allocator for name, allocator in ALLOCATORS.items() if name != "latency"
} | {"global": partial(global_ranking, normalise=False)}
# These give each layer a density of its whole size; the others look at what is left of it.
_OF_WHOLE = ("uniform", "erk", "er")


# ---------------------------------------------------------------- which weights


def _backbone(graph: Graph) -> list[str]:
    early = {layer for exit_name in graph.exits[:-1] for layer in graph.heads[exit_name]}
    return [name for name in graph.layers if name not in early]


def _exits(graph: Graph) -> list[str]:
    backbone = set(_backbone(graph))
    return [name for name in graph.layers if name not in backbone]


POOLS: dict[str, Callable[[Graph], list[str]]] = {
    "all": lambda graph: list(graph.layers),
    "backbone": _backbone,  # with the final exit's head (arXiv 2207.03644, first half of S2)
    "exits": _exits,  # the heads of the early exits
}


def pool(graph: Graph, name: str) -> list[str]:
    """Names of the weight tensors of the pool *name*: its convolutions and linear layers."""
    return [f"{layer}.weight" for layer in choose(name, POOLS, "pool of weights")(graph)]


# ---------------------------------------------------------------- masks


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """One weight tensor: how many *weights* it has, how many are *zeros*."""

    name: str
    weights: int
    zeros: int


class Masks(Influence):
    """
    Which single weights of *model* are in use; the others are exactly zero.

    *keeps* maps names of weight tensors to bool tensors of their shapes; without any, nothing is
    held. As a training's influence the masks hide the others' gradients and put the zeros back
    after each step. A training that is under way when thin is called would bring its best
    epoch's weights back: begin another one.
    """

    def __init__(self, model: nn.Module, keeps: Mapping[str, torch.Tensor]) -> None:
        known = dict(model.named_parameters())
        for name, keep in keeps.items():
            if _shape(keep) != choose(name, known, "weight tensor").shape:
                raise UsageError(f"mask of {name}: expected bool {list(known[name].shape)}")
        self.model, self.keeps = model, dict(keeps)

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], *, from_zeros: bool = False) -> "Masks":
        """All weights of the tensors *names* in use, but those that are 0 if *from_zeros*."""
        known = dict(model.named_parameters())
        keeps = {}
        for name in names:
            weight = choose(name, known, "weight tensor").detach().cpu()
            keeps[name] = weight != 0 if from_zeros else torch.ones(weight.shape).bool()
        return cls(model, keeps)

    @property
    def gone(self) -> float:
        """The share of the pool's weights that is out of use."""
        return self._count() / max(1, sum(keep.numel() for keep in self.keeps.values()))

    def _count(self) -> int:
        return sum(int((~keep).sum()) for keep in self.keeps.values())

    def apply(self) -> None:
        """Set what is out of use to zero."""
        with torch.no_grad():
            for name, keep in self.keeps.items():
                weight = self.model.get_parameter(name)
                weight.masked_fill_(~keep.to(weight.device), 0.0)

    def after_backward(self) -> None:
        """Momentum must not gather for weights that are out of use."""
        for name, keep in self.keeps.items():
            gradient = self.model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(~keep.to(gradient.device), 0.0)

    def after_step(self) -> None:
        """Weights that momentum or decay have moved go back to zero."""
        self.apply()

    def state(self) -> dict[str, Any]:
        """The masks, for resume."""
        return {"keeps": {name: keep.clone() for name, keep in self.keeps.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from state(); BadFile if it belongs to other weights."""
        keeps = state.get("keeps")
        if not isinstance(keeps, dict) or {k: _shape(v) for k, v in keeps.items()} != {
            name: _shape(keep) for name, keep in self.keeps.items()
        }:
            raise BadFile("pruning state: masks: expected those of this network's weights")
        self.keeps = {name: keeps[name].clone() for name in self.keeps}
        self.apply()

    def thin(
        self,
        scores: Scores,
        gone: float,
        *,
        allocator: str = "global",
        relevance: Mapping[str, float] | None = None,
    ) -> None:
        """
        Set the lowest *scores* to zero until the share *gone* of the pool is out of use.

        What is out of use stays so; see thinned.
        """
        self.keeps = self.thinned(scores, gone, allocator=allocator, relevance=relevance)
        self.apply()

    def thinned(
        self,
        scores: Scores,
        gone: float,
        *,
        allocator: str = "global",
        relevance: Mapping[str, float] | None = None,
        come_back: bool = False,
    ) -> dict[str, torch.Tensor]:
        """
        The masks (as keeps) with the share *gone* of the pool out of use; nothing is changed.

        *scores* (name -> tensor of the weight's shape) must cover the pool. The lowest go:
        of those in use now, or of all if weights may *come_back*. Global magnitude is scores
        = |w| and the allocator "global", which compares across layers; "egp" needs the layers'
        *relevance*. One weight of each tensor stays. UsageError if more are out of use already,
        if too few could stay, or if scores are NaN.
        """
        choose(allocator, _ALLOCATORS, "allocator for single weights")
        sizes = {name: keep.numel() for name, keep in self.keeps.items()}
        used = {n: torch.ones_like(k) if come_back else k for n, k in self.keeps.items()}
        places = {name: np.flatnonzero(one.numpy().ravel()) for name, one in used.items()}
        values = {name: _score(scores, name, used[name])[at] for name, at in places.items()}
        before = {name: sizes[name] - len(at) for name, at in places.items()}
        total = math.floor(gone * sum(sizes.values()) + 0.5)
        if total < sum(before.values()):
            raise UsageError(f"masks: {self.gone:.4f} of the weights are gone, asked for {gone}")
        if allocator in _OF_WHOLE:
            bills = [self._bill(name, np.zeros(sizes[name]), relevance) for name in places]
            counts = _ALLOCATORS[allocator](bills, gone)
            counts = {name: max(0, count - before[name]) for name, count in counts.items()}
        else:
            bills = [self._bill(name, values[name], relevance) for name in places]
            left = sum(map(len, places.values()))
            counts = _ALLOCATORS[allocator](bills, (total - sum(before.values())) / max(1, left))
        keeps = {}
        for name, keep in used.items():
            lowest = np.argsort(values[name], kind="stable")[: counts[name]]
            keeps[name] = keep.clone()
            keeps[name].view(-1)[torch.from_numpy(places[name][lowest])] = False
        return keeps

    def _bill(
        self, name: str, scores: NDArray[np.float64], relevance: Mapping[str, float] | None
    ) -> Bill:
        shape = self.keeps[name].shape
        return Bill(
            name=name,
            size=len(scores),
            least=min(1, len(scores)),
            inputs=shape[1] if len(shape) > 1 else 1,
            kernel=tuple(shape[2:]),
            weights_per_unit=1,
            scores=scores,
            relevance=None if relevance is None else relevance.get(name),
        )

    def report(self) -> list[Sparsity]:
        """How many weights are zero, tensor by tensor."""
        rows = []
        for name in self.keeps:
            weight = self.model.get_parameter(name).detach()
            rows.append(Sparsity(name=name, weights=weight.numel(), zeros=int((weight == 0).sum())))
        return rows


def _shape(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return None
    return tuple(value.shape)


def _score(scores: Scores, name: str, keep: torch.Tensor) -> NDArray[np.float64]:
    if name not in scores or scores[name].shape != keep.shape:
        found = list(scores[name].shape) if name in scores else "none"
        raise UsageError(f"scores of {name}: found {found}, expected {list(keep.shape)}")
    score: NDArray[np.float64] = scores[name].detach().cpu().double().numpy().ravel()
    if np.isnan(score).any():
        raise UsageError(
            f"scores of {name}: NaN, expected numbers",
            hint="check the network's weights: a training that failed leaves such numbers",
        )
    return score


# ---------------------------------------------------------------- papers


def random_masks(
    model: nn.Module, names: Sequence[str], *, density: float, seed: int, allocator: str = "erk"
) -> Masks:
    """
    Masks that leave the share *density* in use, drawn at random within each layer.

    The layers' densities are the allocator's (ERK: Liu et al. 2022, arXiv 2202.02643). Equal
    seeds give equal masks.
    """
    masks = Masks.of(model, names)
    scores = {
        name: torch.from_numpy(np.random.default_rng([seed, place]).random(tuple(keep.shape)))
        for place, (name, keep) in enumerate(masks.keeps.items())
    }
    masks.thin(scores, 1 - density, allocator=allocator)
    return masks


def turns(batches: Sequence[Batch], each: int) -> Iterator[list[Batch]]:
    """*each* batches at a time, round and round: no turn begins again where the first did."""
    if not batches or each < 1:
        raise UsageError(f"saliency: {len(batches)} batches, {each} at a time: expected 1 or more")
    endless = cycle(batches)
    while True:
        yield list(islice(endless, each))


def iterate(
    masks: Masks,
    saliency: Callable[[Mapping[str, torch.Tensor], Sequence[Batch]], Scores],
    shares: Sequence[float],
    batches: Sequence[Batch],
    *,
    each: int = 1,
    come_back: bool,
) -> None:
    """
    Prune before training in steps: FORCE if what was pruned may *come_back*, else Iter-SNIP.

    *saliency* is handed the masks so far (name -> bool) and the next *each* of *batches*, and
    scores every weight: |dense weight * gradient of the network under these masks|. *shares*
    are gone after each step, by the exponential schedule. The network's weights stay dense until
    the last step (de Jorge et al. 2021, arXiv 2006.09081; its code restarts the data at each
    step, this does not).
    """
    feed = turns(batches, each)
    for share in shares:
        scores = saliency(masks.keeps, next(feed))
        masks.keeps = masks.thinned(scores, share, come_back=come_back)
    masks.apply()


# ---------------------------------------------------------------- size


def compressed_bytes(model: nn.Module) -> int:
    """
    What the network's numbers come to as int8 and compressed (zlib, level 9).

    Weights of two or more axes as int8 with one scale per output channel, as the converter makes
    them; everything else that is learned as float32. It estimates a download, no latency.
    """
    data = bytearray()
    for weight in model.parameters():
        real = weight.detach().cpu().float().contiguous().numpy()
        if real.ndim < 2:
            data += real.tobytes()
            continue
        rows = real.reshape(len(real), -1)
        scale = np.abs(rows).max(axis=1, keepdims=True, initial=0.0) / 127
        data += np.rint(rows / np.where(scale > 0, scale, 1)).astype(np.int8).tobytes()
        data += scale.astype(np.float32).tobytes()
    return len(zlib.compress(bytes(data), 9))
