"""
Exits for a plain network: where they can go, where they should go, what they cost there.

Callers see attach_exits, list_taps, tap_points and choose_taps. Hidden here: a tap point is a
module that every path from the input to the final answer leads through, so that cutting behind
it hands over one tensor. Autograd knows the paths: one forward, and no graph is traced for it.
Measuring needs no samples that mean something, so it takes noise.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexit.errors import Unsupported, UsageError
from edgeexit.host.answers import RealSamples
from edgeexit.host.assess import Interval, int8_bundle, measured
from edgeexit.host.checkpoint import Checkpoint, Purpose, load_checkpoint, save_again
from edgeexit.host.graph import analyse
from edgeexit.host.model import HEADS, WITH_WIDTHS, Attached, attach, exit_outputs, tapped
from edgeexit.names import choose

DEFAULT_EXITS = 3
MOST_MEASURED = 12
# Kaya et al. 2019 (arXiv 1810.07052) put six exits at 15, 30, ... 90 % of the cost.
MANY_EXITS, LAST_OF_MANY = 6, 0.9
SEED = 0
OnStep = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Tap:
    """
    A module on the main path: *shape* (1, ...) of its output, *macs* of one sample to reach it.

    *share* are these MACs as a share of those of the network's final exit.
    """

    name: str
    shape: tuple[int, ...]
    macs: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One exit or tap point as the table shows it; *latency_ms* is (ms, low, high), or None.

    *at* and *shape* are None for the final exit. Shares are without the exit's head,
    milliseconds with it and with all heads before it.
    """

    exit: str
    at: str | None
    shape: tuple[int, ...] | None
    macs: int
    share: float
    latency_ms: Interval | None

    def to_document(self) -> dict[str, Any]:
        """The row as plain values for JSON."""
        shape = None if self.shape is None else list(self.shape)
        latency = None if self.latency_ms is None else list(self.latency_ms)
        return {**vars(self), "shape": shape, "latency_ms": latency}


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What attach_exits wrote to *path*: its exits, the final one last."""

    path: Path
    head: str
    rows: tuple[Row, ...]


# ---------------------------------------------------------------- where exits can go


def tap_points(model: nn.Module, input_shape: Sequence[int]) -> list[Tap]:
    """
    The modules of *model*, earliest first, where an exit makes sense.

    Every path from the input to the (last) answer leads through their output; of several such
    outputs with no layer in between the last one counts (behind norm, activation and pooling),
    under its shortest name. Outputs that have only the answer's own layer behind them are left
    out. *input_shape* is (1, ...). Unsupported if the network cannot be traced.
    """
    names = _main_path(model, tuple(input_shape))
    if not names:
        return []
    exits = _trial(model, names, input_shape)
    costs, total = _costs(exits, input_shape)
    with torch.no_grad():
        _, values = tapped(model, names, torch.zeros(tuple(input_shape)))
    taps = [
        Tap(name=name, shape=tuple(values[name].shape), macs=macs, share=macs / total)
        for name, macs in zip(names, costs, strict=True)
    ]
    # Weights that no layer uses (positions of tokens, say) may still have parted two of them.
    last = {tap.macs: tap for tap in taps}
    return list(last.values())


class _Single(nn.Module):
    """A network of which only the last answer is looked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return list(exit_outputs(self.model, x).values())[-1]


def _trial(model: nn.Module, at: Sequence[str], input_shape: Sequence[int]) -> Attached:
    """*model* with the cheapest heads behind the modules *at*, and no other exits."""
    with torch.random.fork_rng(devices=[]):
        names = [f"model.{name}" for name in at]
        return attach(_Single(model), names, input_shape=input_shape).eval()


def _costs(model: Attached, input_shape: Sequence[int]) -> tuple[list[int], int]:
    """MACs to reach each attached exit without its head, and those of the final exit."""
    graph = analyse(model, input_shape)
    costs = graph.exit_macs()
    bare = [
        costs[name] - sum(graph.layers[layer].macs for layer in graph.heads[name])
        for name in graph.exits[:-1]
    ]
    return bare, max(1, costs[graph.exits[-1]])


# A value is known by the autograd node that made it and the number of that node's output.
_Value = tuple[Any, int]


def _main_path(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Names for tap_points, in the order in which they end."""
    final, outputs = _values(model, input_shape)
    everything = _before(final)
    layers = {
        value
        for name, (value, _) in outputs.items()
        if any(weight.ndim > 1 for weight in model.get_submodule(name).parameters(recurse=False))
    }
    total = len(layers & everything)
    found: dict[int, _Value] = {}
    for value, shape in outputs.values():
        if value not in everything or value == final or len(shape) not in (2, 3, 4):
            continue
        done = len(layers & _before(value))
        if 1 <= done <= total - 2 and len(_before(final, without=value) & _roots(everything)) == 0:
            found[done] = value
    chosen = [found[done] for done in sorted(found)]
    return [
        min((name for name, (other, _) in outputs.items() if other == value), key=_depth)
        for value in chosen
    ]


def _depth(name: str) -> int:
    return name.count(".")


def _values(
    model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[_Value, dict[str, tuple[_Value, tuple[int, ...]]]]:
    """The last answer, and the output (with its shape) of each module that depends on the input."""
    single = _Single(model).eval()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    names = [name for name, _ in model.named_modules() if name]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            # Not a leaf: a network may change its input in place.
            inputs = torch.zeros(input_shape, requires_grad=True) * 1
            final, outputs = tapped(single, [f"model.{name}" for name in names], inputs)
    finally:
        for weight in learned:
            weight.requires_grad_(True)
    made = {
        name.removeprefix("model."): ((output.grad_fn, output.output_nr), tuple(output.shape))
        for name, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.grad_fn is not None
    }
    return (final.grad_fn, final.output_nr), made


def _before(value: _Value, without: _Value | None = None) -> set[_Value]:
    """*value* and all that it depends on, found on ways that do not lead through *without*."""
    seen: set[_Value] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen or one == without or one[0] is None:
            continue
        seen.add(one)
        waiting.extend(one[0].next_functions)
    return seen


def _roots(values: set[_Value]) -> set[_Value]:
    """Those that depend on nothing: the network's input."""
    return {value for value in values if not value[0].next_functions}


# ---------------------------------------------------------------- where they should go


def choose_taps(taps: Sequence[Tap], count: int) -> list[Tap]:
    """
    The *count* tap points nearest to equal shares of the network's MACs, earliest first.

    Fewer than six exits divide the whole (two: 1/3 and 2/3); six or more go up to 90 % as in
    Shallow-Deep Networks (six: 15, 30, ... 90 %). Nearest: the sum of squared differences is
    least. UsageError if there are not that many.
    """
    if not 1 <= count <= len(taps):
        raise UsageError(
            f"exits: found {count}, this network has {len(taps)} places for one",
            hint="edgeexit attach MODEL.pt --list shows them" if taps else None,
        )
    step = LAST_OF_MANY / count if count >= MANY_EXITS else 1 / (count + 1)
    # best[k]: cost and choice of the first k exits among the taps looked at so far.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * count]
    for place, tap in enumerate(taps):
        for k in range(count, 0, -1):
            cost = best[k - 1][0] + (tap.share - k * step) ** 2
            if cost < best[k][0]:
                best[k] = (cost, (*best[k - 1][1], place))
    return [taps[place] for place in best[count][1]]


# ---------------------------------------------------------------- the command's work


def attach_exits(
    path: Path | str,
    out: Path | str | None = None,
    *,
    arch: str | None = None,
    at: Sequence[str] | None = None,
    exits: int | None = None,
    head: str = "average",
    calibration: str | None = None,
    is_measured: bool = True,
    again: bool = False,
    on_step: OnStep | None = None,
) -> Attachment:
    """
    Give the plain network in the checkpoint (or state_dict) *path* untrained exits.

    They sit behind the modules *at*, or at *exits* tap points (default: three) as choose_taps
    places them; *head* is a key of model.HEADS. *arch* and *calibration* as in convert; *out* is
    by default NAME-exits.pt beside *path*, and replaced only if *again*. Equal arguments give
    equal bytes. With *is_measured* the new network's int8 latency on this machine is measured.

    UsageError for wrong names and absent files, BadFile for damaged ones, Unsupported for
    networks that have exits or take none, DeviceError if measuring fails, StorageError.
    """
    step = on_step or (lambda name, done: None)
    path = Path(path)
    target = path.with_name(f"{path.stem}-exits.pt") if out is None else Path(out)
    choose(head, HEADS, "kind of exit head")
    if at is not None and exits is not None:
        raise UsageError("both the exits' modules and their number are given, expected one")
    step("load", 0.0)
    checkpoint = _load(path, arch, calibration)
    if len(checkpoint.exits) > 1:
        raise UsageError(
            f"{path}: has {len(checkpoint.exits)} exits already ({', '.join(checkpoint.exits)})",
            hint="--list shows its tap points; exits can be attached to its plain network only",
        )
    step("load", 1.0)
    step("find places", 0.0)
    names = _places(checkpoint, at, exits)
    model, attached = _with_heads(checkpoint, names, head)
    costs, total = _costs(model, checkpoint.input_shape)
    for k, (one, other) in enumerate(pairwise(costs)):
        if one >= other:
            raise UsageError(
                f"no layer lies between the exits at {names[k]!r} and {names[k + 1]!r}"
            )
    if target.exists() and not again:
        raise UsageError(
            f"{target}: is there already",
            hint="name another file with -o, or replace it with --again",
        )
    step("find places", 1.0)
    latencies = _latencies(model, checkpoint, step) if is_measured else {}
    save_again(
        target,
        checkpoint,
        model,
        attached=attached,
        surgery=(),
        # What was said of the plain network does not hold for this one.
        metadata={
            "attached_to": checkpoint.digest,
            "recipe_digest": None,
            "holdout_accuracies": None,
        },
    )
    with torch.no_grad():
        _, values = tapped(model.backbone, names, torch.zeros(checkpoint.input_shape))
    rows = [
        Row(
            exit=f"exit{k}",
            at=name,
            shape=tuple(values[name].shape),
            macs=cost,
            share=cost / total,
            latency_ms=latencies.get(f"exit{k}"),
        )
        for k, (name, cost) in enumerate(zip(names, costs, strict=True))
    ]
    last = _final(len(names), total, latencies)
    return Attachment(path=target, head=head, rows=(*rows, last))


def list_taps(
    path: Path | str,
    *,
    arch: str | None = None,
    calibration: str | None = None,
    is_measured: bool = True,
    on_step: OnStep | None = None,
) -> list[Row]:
    """
    The tap points of the network in *path*, which may have exits; up to 12 are measured.

    Arguments and errors as attach_exits.
    """
    step = on_step or (lambda name, done: None)
    step("load", 0.0)
    checkpoint = _load(Path(path), arch, calibration)
    step("load", 1.0)
    step("find places", 0.0)
    taps = tap_points(checkpoint.model, checkpoint.input_shape)
    if not taps:
        raise Unsupported(f"{path}: no exit makes sense: all paths meet only behind the last layer")
    some = choose_taps(taps, min(len(taps), MOST_MEASURED))
    model = _trial(checkpoint.model, [tap.name for tap in some], checkpoint.input_shape)
    step("find places", 1.0)
    by_exit = _latencies(model, checkpoint, step) if is_measured else {}
    latencies = {tap.name: by_exit.get(f"exit{k}") for k, tap in enumerate(some)}
    rows = [
        Row(
            exit="",
            at=tap.name,
            shape=tap.shape,
            macs=tap.macs,
            share=tap.share,
            latency_ms=latencies.get(tap.name),
        )
        for tap in taps
    ]
    return [*rows, _final(len(some), _costs(model, checkpoint.input_shape)[1], by_exit)]


def _load(path: Path, arch: str | None, calibration: str | None) -> Checkpoint:
    purpose = None if calibration is None else Purpose.of_set(calibration)
    return load_checkpoint(path, arch=arch, purpose=purpose)


def _places(checkpoint: Checkpoint, at: Sequence[str] | None, exits: int | None) -> list[str]:
    model, input_shape = checkpoint.model, checkpoint.input_shape
    if at is None:
        taps = tap_points(model, input_shape)
        count = min(DEFAULT_EXITS, max(1, len(taps))) if exits is None else exits
        return [tap.name for tap in choose_taps(taps, count)]
    known = {name: module for name, module in model.named_modules() if name}
    for name in at:
        choose(name, known, "module")
    with torch.no_grad():
        _, values = tapped(model, list(known), torch.zeros(input_shape))
    order = {name: place for place, name in enumerate(values)}
    return sorted(at, key=lambda name: order.get(name, -1))


def _with_heads(
    checkpoint: Checkpoint, at: Sequence[str], head: str
) -> tuple[Attached, dict[str, Any]]:
    """The network with new heads, and what a checkpoint says of them."""
    with torch.no_grad():
        _, values = tapped(checkpoint.model, at, torch.zeros(checkpoint.input_shape))
    widths = [_widths(values.get(name)) if head in WITH_WIDTHS else [] for name in at]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = attach(
            checkpoint.model, at, input_shape=checkpoint.input_shape, head=head, widths=widths
        )
    attached: dict[str, Any] = {"at": list(at), "head": head, "widths": widths}
    if checkpoint.surgery:
        attached["surgery"] = list(checkpoint.surgery)
    return model.eval(), attached


def _widths(value: object) -> list[int]:
    """
    Stride-2 convolutions of a head on the map *value*: down to 4x4 places, at most three.

    Each is as wide as the map, but at most 32: a head must cost less than going on.
    """
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return []
    side = max(value.shape[2:])
    count = min(3, max(1, math.ceil(math.log2(max(1, side) / 4))))
    return [min(32, value.shape[1])] * count


def _final(number: int, total: int, latencies: dict[str, Interval]) -> Row:
    name = f"exit{number}"
    return Row(
        exit=name, at=None, shape=None, macs=total, share=1.0, latency_ms=latencies.get(name)
    )


def _latencies(model: nn.Module, checkpoint: Checkpoint, step: OnStep) -> dict[str, Interval]:
    """Measured int8 latency of each exit of *model*."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = int8_bundle(
            model,
            input_shape=checkpoint.input_shape,
            preprocess=checkpoint.preprocess,
            class_names=checkpoint.class_names,
            reals=_noise(checkpoint),
            folder=Path(folder) / "taps.edgeexit",
            on_step=step,
        )
        step("measure", 0.0)
        found = measured(bundle, on_step=lambda done: step("measure", min(done, 0.999)))
        step("measure", 1.0)
    return found


def _noise(checkpoint: Checkpoint) -> RealSamples:
    """What a layer costs does not depend on what it sees."""
    rng = np.random.default_rng(SEED)
    preprocess = checkpoint.preprocess
    if preprocess.kind == "image":
        images = rng.integers(0, 256, (16, *preprocess.sample_shape), dtype=np.uint8)
        return RealSamples(images, preprocess)
    rows = rng.standard_normal((16, *checkpoint.input_shape[1:])).astype(np.float32)
    return RealSamples(rows, preprocess)
