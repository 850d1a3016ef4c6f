"""
Heads out of class means: a start for training, or no training at all.

Callers see logits_layers (which linear layer makes an exit's logits), init_from_class_means and
prototype_heads. Hidden here: that the nearest class mean is one linear layer, and how its logits
are scaled so that they mean something to a loss and to a confidence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.model import exit_outputs
from edgeexit.names import unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

SMOOTHING = 0.05  # classes that the means separate wholly would ask for infinite logits
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Inputs as the network takes them, and their labels int64 (N,); gone through more than once."""


def logits_layers(model: nn.Module, inputs: torch.Tensor) -> dict[str, str]:
    """
    The linear layer whose output is the logits of each exit: exit -> name of the module.

    Found by passing *inputs* (N, ...) once. Unsupported where something follows the layer.
    """
    made: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # an id means something only as long as its tensor lives

    def keep(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            made[id(output)] = name
            kept.append(output)

        return hook

    with _hooked(model, {name: keep(name) for name in _linears(model)}), torch.no_grad():
        outputs = exit_outputs(model, inputs)
    for exit, logits in outputs.items():
        if id(logits) not in made:
            raise Unsupported(
                f"exit {exit!r}: its logits do not come straight out of a linear layer",
                hint="end the exit's head with torch.nn.Linear",
            )
    return {exit: made[id(logits)] for exit, logits in outputs.items()}


def init_from_class_means(model: nn.Module, exits: Sequence[str], batches: Batches) -> None:
    """
    Start the heads of *exits* at their class means instead of at random.

    The last linear layer of each head gets one row per class: the mean of its input features
    over that class's samples in *batches*, the bias from its norm (Goermez & Koyuncu, "Class-aware
    initialization", WANT@ICML 2024). That is prototype_heads' layer: training goes on from the
    nearest class mean.
    """
    prototype_heads(model, exits, batches)


def prototype_heads(model: nn.Module, exits: Sequence[str], batches: Batches) -> None:
    """
    Make each of *exits* answer with the nearest class mean: a head without training.

    E2CM (Goermez, Dasari & Koyuncu, arXiv 2103.01148, section III): c_k is the mean feature of
    class k, the answer argmin ||x - c_k||. Of -||x - c_k||^2 = 2 c_k x - ||c_k||^2 - ||x||^2 the
    last term is common to all classes, so one linear layer computes it. Here, x are the inputs
    of the head's last linear layer, means and norms are taken relative to their average over
    the classes (which changes no softmax, but keeps logits small for int8), and all logits of
    an exit are scaled by the one positive number that makes *batches* most likely; the paper's
    softmax of normalised distances is not linear.

    Only that layer's weight and bias change. UsageError for unknown exits, labels outside of
    the classes or classes without a sample; Unsupported if an exit has no such layer.
    """
    if not batches:
        raise UsageError("class means: no samples")
    was_training = model.training
    model.eval()
    try:
        layers = _linears(model)
        names = logits_layers(model, batches[0][0][:1])
        for exit in exits:
            if exit not in names:
                raise unknown(exit, names, "exit")
        chosen = {exit: layers[names[exit]] for exit in exits}
        for exit, (means, norms) in _class_means(model, chosen, names, batches).items():
            layer = chosen[exit]
            if layer.bias is None:
                raise Unsupported(f"exit {exit!r}: its linear layer has no bias")
            with torch.no_grad():
                layer.weight.copy_(2 * (means - means.mean(0)))
                layer.bias.copy_(norms.mean() - norms)
        for exit, scale in _scales(model, exits, batches).items():
            with torch.no_grad():
                chosen[exit].weight.mul_(scale)
                chosen[exit].bias.mul_(scale)
    finally:
        model.train(was_training)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _class_means(
    model: nn.Module,
    chosen: Mapping[str, nn.Linear],
    names: Mapping[str, str],
    batches: Batches,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Means (classes, D) and their squared norms (classes,), float64, of each exit's features."""
    seen: dict[str, torch.Tensor] = {}

    def keep(exit: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, inputs: Any, _output: torch.Tensor) -> None:
            seen[exit] = inputs[0].double().cpu()

        return hook

    classes = {exit: layer.out_features for exit, layer in chosen.items()}
    sums = {
        exit: torch.zeros(classes[exit], layer.in_features, dtype=torch.float64)
        for exit, layer in chosen.items()
    }
    count = next(iter(classes.values()), 0)
    counts = torch.zeros(count, dtype=torch.int64)
    with _hooked(model, {names[exit]: keep(exit) for exit in chosen}), torch.no_grad():
        for inputs, labels in batches:
            if int(labels.min()) < 0 or int(labels.max()) >= count:
                raise UsageError(f"class means: labels outside of 0..{count - 1}")
            model(inputs)
            counts += torch.bincount(labels.cpu(), minlength=count)
            for exit, features in seen.items():
                sums[exit].index_add_(0, labels.cpu(), features)
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        raise UsageError(
            f"class means: no sample of class {empty[0]} among {int(counts.sum())}",
            hint="give more samples: every class needs one",
        )
    means = {exit: total / counts[:, None] for exit, total in sums.items()}
    return {exit: (mean, mean.square().sum(1)) for exit, mean in means.items()}


def _scales(model: nn.Module, exits: Sequence[str], batches: Batches) -> dict[str, float]:
    """The factor of each exit's logits at which the labels of *batches* are most likely."""
    rows: dict[str, list[torch.Tensor]] = {exit: [] for exit in exits}
    with torch.no_grad():
        for inputs, _ in batches:
            outputs = exit_outputs(model, inputs)
            for exit in exits:
                rows[exit].append(outputs[exit].double().cpu())
    labels = torch.cat([part.cpu() for _, part in batches])
    return {exit: _likeliest(torch.cat(parts), labels) for exit, parts in rows.items()}


def _likeliest(logits: torch.Tensor, labels: torch.Tensor) -> float:
    # The loss is convex in the factor: narrow its logarithm down by golden sections, around
    # the factor that brings logits to about 1.
    start = -math.log(max(float(logits.std()), 1e-30))
    low, high = start - 8.0, start + 8.0

    def loss(log_scale: float) -> float:
        scaled = logits * math.exp(log_scale)
        return float(cross_entropy(scaled, labels, label_smoothing=SMOOTHING))

    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


@contextmanager
def _hooked(
    model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any, torch.Tensor], None]]
) -> "Iterator[None]":
    handles = [
        model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
