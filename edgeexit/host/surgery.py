"""
Taking parts out of a network, written down as plain data that can be replayed.

Callers see remove_block, remove_units and replay. An entry of a surgery list is one of
    {"remove": "blocks.3"}                           the block is replaced by identity
    {"channels": {"blocks.0.first.0": [16, 8], ...}} widths after removal: [in, out], norms [width]
    {"linear": "blocks.2.first.2"}                   the activation is replaced by identity
    {"fold": ["first", "second", ...]}               two layers (and the norms between) become one
It names modules and counts and holds no weights; replayed on the network that a factory makes,
it gives the shapes into which a checkpoint's weights fit. Hidden here: that it never enlarges.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.host.graph import Graph

Entry = dict[str, Any]
Convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_ENTRIES = 10_000


def remove_block(model: nn.Module, graph: Graph, name: str) -> Entry:
    """
    Replace the block *name* by identity, in place; an exit on it moves to what comes before.

    UsageError if it is no removable block, or if two exits would then read the same value.
    """
    if name not in graph.blocks:
        some = ", ".join(graph.blocks) or "none"
        raise UsageError(f"{name!r} is no block that can be removed (can: {some})")
    merges = graph.blocks[name].merges
    if merges:
        raise UsageError(
            f"block {name!r} stands between the exits {' and '.join(merges)}: without it they "
            "would read the same value",
            hint="drop one of the two exits, or keep the block",
        )
    _replace(model, name, nn.Identity())
    return {"remove": name}


def remove_units(model: nn.Module, graph: Graph, chosen: Mapping[str, NDArray[np.int64]]) -> Entry:
    """
    Remove the units *chosen* (group -> indices) from every layer that knows them, in place.

    UsageError if a group would be left empty.
    """
    gone: dict[tuple[str, str], list[NDArray[np.int64]]] = {}
    for name, units in chosen.items():
        group = graph.groups[name]
        if len(np.unique(units)) >= group.size:
            raise UsageError(
                f"{name}: all {group.size} channels would be removed, expected one or more to stay",
                hint="a smaller ratio, or remove its block",
            )
        for place, positions in group.places.items():
            gone.setdefault(place, []).append(positions[units].reshape(-1))
    for (name, side), lost in gone.items():
        _shrink(model.get_submodule(name), side, np.concatenate(lost))
    changed = dict.fromkeys(name for name, _ in gone)
    return {"channels": {name: _widths(model.get_submodule(name)) for name in changed}}


def _shrink(module: nn.Module, side: str, lost: NDArray[np.int64]) -> None:
    """Take the positions *lost* out of one axis of *module*'s tensors."""
    axis = 1 if side == "in" else 0
    width = _weight(module).shape[axis]
    stay = torch.from_numpy(np.setdiff1d(np.arange(width), lost))
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.ndim > axis and not (axis == 1 and key == "bias"):
            _set(module, key, tensor.detach().index_select(axis, stay))
    _note(module)


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _set(module: nn.Module, key: str, value: torch.Tensor) -> None:
    if key in module._buffers:
        module._buffers[key] = value
    else:
        old = module._parameters[key]
        module._parameters[key] = nn.Parameter(value, old is not None and old.requires_grad)


def _note(module: nn.Module) -> None:
    """Make the numbers that *module* shows agree with its tensors."""
    weight = _weight(module)
    if isinstance(module, Convs):
        is_depthwise = module.groups > 1
        module.out_channels = weight.shape[0]
        module.groups = weight.shape[0] if is_depthwise else 1
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Norms):
        module.num_features = weight.shape[0]


def _widths(module: nn.Module) -> list[int]:
    weight = _weight(module)
    if isinstance(module, Norms):
        return [weight.shape[0]]
    inputs = module.in_channels if isinstance(module, Convs) else weight.shape[1]
    return [int(inputs), int(weight.shape[0])]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def joined(entries: Sequence[Entry]) -> list[Entry]:
    """*entries* with runs of "channels" made one: the last widths of a module are what counts."""
    out: list[Entry] = []
    for entry in entries:
        if "channels" in entry and out and "channels" in out[-1]:
            out[-1] = {"channels": {**out[-1]["channels"], **entry["channels"]}}
        else:
            out.append(dict(entry))
    return out


# ---------------------------------------------------------------- replay


def replay(model: nn.Module, entries: object, where: str) -> None:
    """
    Do to *model* what *entries* (out of a file) say; its weights mean nothing afterwards.

    BadFile if an entry is not understood, names no fitting module, or would enlarge one.
    """
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise BadFile(f"{where}: expected a list of at most {MAX_ENTRIES} entries")
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        if not isinstance(entry, dict) or len(entry) != 1:
            raise BadFile(f"{place}: expected one of {', '.join(REPLAYS)}")
        ((kind, value),) = entry.items()
        if kind not in REPLAYS:
            raise BadFile(f"{place}: found {kind!r}, expected one of {', '.join(REPLAYS)}")
        REPLAYS[kind](model, value, f"{place}: {kind}")


def _find(model: nn.Module, name: object, where: str) -> nn.Module:
    if isinstance(name, str) and name:
        try:
            return model.get_submodule(name)
        except AttributeError:
            pass
    raise BadFile(f"{where}: the network has no module {name!r}")


def _replay_remove(model: nn.Module, name: Any, where: str) -> None:
    module = _find(model, name, where)
    if not any(True for _ in module.children()):
        raise BadFile(f"{where}: {name!r} is no block")
    _replace(model, name, nn.Identity())


def _replay_linear(model: nn.Module, name: Any, where: str) -> None:
    module = _find(model, name, where)
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        raise BadFile(f"{where}: {name!r} is no activation")
    _replace(model, name, nn.Identity())


def _replay_fold(model: nn.Module, names: Any, where: str) -> None:
    from edgeexit.host.folding import replay_fold

    if not isinstance(names, list) or len(names) < 2:
        raise BadFile(f"{where}: expected the names of two layers and of the norms between them")
    for name in names:
        _find(model, name, where)
    try:
        replay_fold(model, *names)
    except (EdgeExitError, ValueError, TypeError, AttributeError) as error:
        raise BadFile(f"{where}: {names}: {error}") from error


def _replay_channels(model: nn.Module, widths: Any, where: str) -> None:
    if not isinstance(widths, dict):
        raise BadFile(f"{where}: expected module -> widths")
    for name, wanted in widths.items():
        module = _find(model, name, where)
        if not isinstance(module, (*Convs, *Norms, nn.Linear)):
            raise BadFile(f"{where}: {name!r} has no channels ({type(module).__name__})")
        now = _widths(module)
        fits = isinstance(wanted, list) and len(wanted) == len(now)
        if not fits or any(
            type(new) is not int or not 1 <= new <= old
            for new, old in zip(wanted, now, strict=True)
        ):
            raise BadFile(
                f"{where}: {name}: found {wanted!r}, expected at most {now}, each 1 or more"
            )
        _resize(module, wanted, f"{where}: {name}")


def _resize(module: nn.Module, widths: list[int], where: str) -> None:
    weight = _weight(module)
    if isinstance(module, Convs) and module.groups > 1:
        if weight.shape[1] != 1 or widths[0] != widths[1]:
            raise BadFile(f"{where}: a grouped convolution cannot be narrowed to {widths}")
        widths = [1, widths[1]]
    shapes = {0: widths[-1], 1: widths[0]}
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        shape = list(tensor.shape)
        if shape:
            shape[0] = shapes[0]
        if len(shape) > 1:
            shape[1] = shapes[1]
        _set(module, key, torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))
    _note(module)


REPLAYS = {
    "remove": _replay_remove,
    "channels": _replay_channels,
    "linear": _replay_linear,
    "fold": _replay_fold,
}
