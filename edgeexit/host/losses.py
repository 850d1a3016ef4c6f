"""
The loss of a multi-exit network, put together from the pieces that a recipe names.

Callers see exit_loss, ramped and equilibrium. Each piece leaves the others alone: weights and
their ramp scale the exits' terms, distillation adds terms, equilibrium scales gradients.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from edgeexit.host.recipe import TrainingPart

RAMP_START = 0.01


def exit_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    weights: Sequence[float],
    part: TrainingPart,
) -> torch.Tensor:
    """
    The exits' cross entropies, weighted and summed (BranchyNet, Teerapittayanon et al. 2016).

    *logits* (N, classes) of each exit, *labels* int64 (N,). With *distillation* > 0 each early
    exit also imitates the final one's probabilities, which are not moved by it (Phuong &
    Lampert 2019): fewer answers of early exits then contradict the full network. Both sides are
    divided by *distillation_temperature* T and the term is multiplied by its square, which keeps
    its gradients' size (Hinton et al. 2015). Exits of weight 0 have no part in it.
    """
    losses = [
        weight * cross_entropy(one, labels, label_smoothing=part.label_smoothing)
        for one, weight in zip(logits, weights, strict=True)
        if weight
    ]
    if part.distillation:
        temperature = part.distillation_temperature
        teacher = softmax(logits[-1].detach() / temperature, dim=1)
        scale = part.distillation * temperature**2
        losses += [
            scale * weight * cross_entropy(one / temperature, teacher)
            for one, weight in zip(logits[:-1], weights[:-1], strict=True)
            if weight
        ]
    return torch.stack(losses).sum()


def ramped(weights: Sequence[float], epoch: int, epochs: int) -> list[float]:
    """
    The weights of epoch *epoch* (from 1) of *epochs*: early exits grow, the final one stays.

    tau_i(t) = min(tau_max, 0.01 + t / T * tau_max), tau_max the exit's weight (Shallow-Deep
    Networks, Kaya et al. 2019, section 4.2; t from 1 to T as in the authors' code).
    """
    share = epoch / epochs
    early = [min(weight, RAMP_START + share * weight) for weight in weights[:-1]]
    return [*early, weights[-1]]


def equilibrium(model: nn.Module, served: Mapping[str, frozenset[str]]) -> None:
    """
    Divide each gradient by the number of exits that its parameter serves, in place.

    This is gradient equilibrium (Li et al. 2019, "Improved techniques for training adaptive deep
    networks", section 3.1). The paper scales what flows back by 1 / (N - i) before the head of
    exit i (from 0) of N and by N - i - 1 after it; unrolled, every parameter that exits i, ...,
    N - 1 share gets the mean of their gradients, and a head's own gradient is left alone. That is
    what is done here, for any shape of network. *served*: parameter's name -> exits with a loss.
    """
    for name, parameter in model.named_parameters():
        count = len(served[name])
        if parameter.grad is not None and count > 1:
            parameter.grad /= count
