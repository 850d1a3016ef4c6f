"""
How alike two networks' features are: linear CKA at every exit's head.

Callers see cka, exit_features and exits_cka. Exits are compared where they read the backbone,
so a child with other widths, or without a block, can be held against its parent.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.graph import Graph
from edgeexit.host.prune.evidence import evaluating

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """
    Linear CKA of two feature matrices (n, p) and (n, q) of the same n samples, in 0..1.

    ||X'Y||^2 / (||X'X|| ||Y'Y||), Frobenius norms, columns centred, in float64 (Kornblith et
    al. 2019, arXiv 1905.00414). 1 means equal up to rotation and scale. A constant matrix has
    no direction to compare: 1 against another constant one, else 0. UsageError for matrices that
    do not fit together or are not finite.
    """
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other) or len(one) < 2:
        raise UsageError(
            f"CKA: found {list(one.shape)} and {list(other.shape)}, expected two matrices of the "
            "same two or more samples"
        )
    if not bool(torch.isfinite(one).all()) or not bool(torch.isfinite(other).all()):
        raise UsageError(
            "CKA: the network's features are not finite",
            hint="train it again, with a smaller learning_rate",
        )
    x, y = _centred(one), _centred(other)
    if min(x.shape[1], y.shape[1]) > len(x):
        # More features than samples: the same norms from (n, n) matrices.
        x, y = _centred(x @ x.T), _centred(y @ y.T)
        cross, own, others = (x * y).sum(), x.norm(), y.norm()
    else:
        cross, own, others = (x.T @ y).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    if not own > 0 or not others > 0:
        return float(bool(own == others))
    return min(1.0, max(0.0, float(cross / own / others)))


def _centred(features: torch.Tensor) -> torch.Tensor:
    values = features.detach().double()
    centred = values - values.mean(0)
    # What only rounding tells from a constant is one; the scale is free, so keep it near 1.
    noise = 1e-12 * float(values.abs().amax()) if values.numel() else 0.0
    largest = float(centred.abs().amax()) if values.numel() else 0.0
    return centred / largest if largest > noise else torch.zeros_like(centred)


def exit_features(model: nn.Module, graph: Graph, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What each exit's head reads for *inputs* (n, ...): (n, features) by exit, pooled over places.

    Taken before the first layer of the head, in eval mode. *graph* names the heads; it may be
    that of the network from which *model* was made by removing parts. Unsupported if a head has
    no layer of its own.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, read: tuple[torch.Tensor, ...]) -> None:
            x = read[0].detach()
            last = x.ndim - 1
            axis = last if isinstance(module, nn.Linear) else 1
            places = [k for k in range(1, x.ndim) if k != axis]
            seen[name] = x.mean(places) if places else x

        return hook

    handles = []
    try:
        for name in graph.exits:
            if not graph.heads[name]:
                raise Unsupported(
                    f"exit {name}: its logits are not made by a layer of its own",
                    hint="choose a criterion and a selector that do not compare features",
                )
            module = model.get_submodule(graph.heads[name][0])
            handles.append(module.register_forward_pre_hook(keep(name)))
        with torch.no_grad(), evaluating(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in graph.exits}


def all_features(model: nn.Module, graph: Graph, batches: Batches) -> dict[str, torch.Tensor]:
    """exit_features of all *batches* below each other; labels are not looked at."""
    parts = [exit_features(model, graph, inputs) for inputs, _ in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in graph.exits}


def weighted_cka(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], shares: Mapping[str, float]
) -> float:
    """sum over k of shares[k] * CKA(one[k], other[k]); exits with share 0 are not compared."""
    return sum(share * cka(one[name], other[name]) for name, share in shares.items() if share > 0)


def exits_cka(
    model: nn.Module, child: nn.Module, graph: Graph, batches: Batches, rates: Sequence[float]
) -> float:
    """
    How alike *child* is to the *model* it was made from: sum over k of a_k CKA(R_k, R'_k).

    R_k is what the head of exit k reads, a_k its exit rate (*rates*, earliest exit first, from
    the hold-out; they count relative to each other). The multi-exit form of the selection in
    "Pruning Everything, Everywhere, All at Once" (arXiv 2506.04513), never on test data.
    *graph* is the parent's.
    """
    if len(rates) != len(graph.exits) or any(not rate >= 0 for rate in rates) or not sum(rates) > 0:
        raise UsageError(f"exit rates: found {list(rates)}, expected {len(graph.exits)} of them")
    shares = {k: rate / sum(rates) for k, rate in zip(graph.exits, rates, strict=True)}
    return weighted_cka(
        all_features(model, graph, batches), all_features(child, graph, batches), shares
    )
