"""
The command that gives a plain network exits, and shows what they cost where.

Callers see attach_exits and list_taps. Hidden here: what is said of the plain network and does
not hold for the new one. What a layer costs does not depend on what it sees, so measuring takes
noise and needs no samples.
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
from edgeexit.files import check_output
from edgeexit.host.answers import RealSamples
from edgeexit.host.assess import Interval, int8_bundle, measured
from edgeexit.host.checkpoint import (
    MAX_HEAD_CONVS,
    Checkpoint,
    load_checkpoint,
    save_again,
)
from edgeexit.host.graph import parameters
from edgeexit.host.model import HEADS, WITH_WIDTHS, Attached, attach, tapped
from edgeexit.host.purpose import Purpose
from edgeexit.host.taps import choose_taps, costs, tap_points, trial
from edgeexit.host.zoo import MAX_WIDTH
from edgeexit.names import choose

DEFAULT_EXITS = 3
MOST_MEASURED = 12
# Of all new heads together: what a typing error asks for shall not fill the memory.
MOST_WEIGHTS = 2**26
SEED = 0
OnStep = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One exit or tap point as the table shows it; *latency_ms* is (ms, low, high), or None.

    *at* and *shape* are None for the final exit. *macs* and their *share* are those of the
    network up to there without heads, *head_macs* those of the new head (None in a list, and for
    the final exit); milliseconds are with that head and all heads before it.
    """

    exit: str
    at: str | None
    shape: tuple[int, ...] | None
    macs: int
    share: float
    head_macs: int | None
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


def attach_exits(
    path: Path | str,
    out: Path | str | None = None,
    *,
    arch: str | None = None,
    at: Sequence[str] | None = None,
    exits: int | None = None,
    head: str = "average",
    widths: Sequence[Sequence[int]] | None = None,
    calibration: str | None = None,
    is_measured: bool = True,
    again: bool = False,
    on_step: OnStep | None = None,
) -> Attachment:
    """
    Give the plain network in the checkpoint (or state_dict) *path* untrained exits.

    They sit behind the modules *at*, or at *exits* tap points (default: three) as choose_taps
    places them; *head* is a key of model.HEADS. *widths* are the stride-2 convolutions of heads
    that have such, one list for all exits or one for each in the order of *at* (default: down to
    4x4 places, no wider than the map). *arch* and *calibration* as in convert; *out* is by
    default NAME-exits.pt beside *path*, and replaced only if *again*. Equal arguments give equal
    bytes. With *is_measured* the new network's int8 latency on this machine is measured.

    UsageError for wrong names and absent files, BadFile for damaged ones, Unsupported for
    networks that have exits or take none, DeviceError if measuring fails, StorageError.
    """
    step = on_step or (lambda name, done: None)
    path = Path(path)
    target = path.with_name(f"{path.stem}-exits.pt") if out is None else Path(out)
    check_output(target, path)
    choose(head, HEADS, "kind of exit head")
    _check_widths(widths or [])
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
    if at is not None and widths is not None and 1 < len(widths) == len(names):
        widths = [widths[list(at).index(name)] for name in names]  # earliest first, as they
    model, attached = _with_heads(checkpoint, names, head, widths)
    bare, heads, total = costs(model, checkpoint.input_shape)
    for k, (one, other) in enumerate(pairwise(bare)):
        if one >= other:
            raise UsageError(
                f"no layer lies between the exits at {names[k]!r} and {names[k + 1]!r}"
            )
    for name, cost, own in zip(names, bare, heads, strict=True):
        if cost + own >= total:
            raise UsageError(
                f"an exit at {name!r} costs {cost + own:,} MACs, the network's own answer "
                f"{total:,}: expected less",
                hint="choose an earlier module, or a cheaper kind of head",
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
            head_macs=heads[k],
            latency_ms=latencies.get(f"exit{k}"),
        )
        for k, (name, cost) in enumerate(zip(names, bare, strict=True))
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
    model = trial(checkpoint.model, [tap.name for tap in some], checkpoint.input_shape)
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
            head_macs=None,
            latency_ms=latencies.get(tap.name),
        )
        for tap in taps
    ]
    return [*rows, _final(len(some), costs(model, checkpoint.input_shape)[-1], by_exit)]


def _load(path: Path, arch: str | None, calibration: str | None) -> Checkpoint:
    purpose = None if calibration is None else Purpose.of_set(calibration)
    return load_checkpoint(path, arch=arch, purpose=purpose)


def _check_widths(widths: Sequence[Sequence[int]]) -> None:
    for row in widths:
        if len(row) > MAX_HEAD_CONVS or not all(1 <= width <= MAX_WIDTH for width in row):
            raise UsageError(
                f"widths: found {', '.join(map(str, row))}, expected at most {MAX_HEAD_CONVS} "
                f"numbers from 1 to {MAX_WIDTH}"
            )


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
    checkpoint: Checkpoint,
    at: Sequence[str],
    head: str,
    given: Sequence[Sequence[int]] | None,
) -> tuple[Attached, dict[str, Any]]:
    """The network with new heads, and what a checkpoint says of them."""
    with torch.no_grad():
        _, values = tapped(checkpoint.model, at, torch.zeros(checkpoint.input_shape))
    if given is None:
        widths = [_widths(values.get(name)) if head in WITH_WIDTHS else [] for name in at]
    elif head not in WITH_WIDTHS:
        raise UsageError(
            f"widths: a head of the kind {head!r} has none",
            hint=f"choose the head {' or '.join(sorted(WITH_WIDTHS))}",
        )
    else:
        widths = [list(row) for row in (given if len(given) > 1 else [*given] * len(at))]

    def attached_on(device: str | None) -> Attached:
        return attach(
            checkpoint.model,
            at,
            input_shape=checkpoint.input_shape,
            head=head,
            widths=widths,
            device=device,
        )

    weights = parameters(attached_on("meta").heads)
    if weights > MOST_WEIGHTS:
        raise UsageError(
            f"widths: the new heads would have {weights:,} weights, expected at most "
            f"{MOST_WEIGHTS:,}",
            hint="an exit pays where its head costs less than going on: choose narrower ones",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = attached_on(None)
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
        exit=name,
        at=None,
        shape=None,
        macs=total,
        share=1.0,
        head_macs=None,
        latency_ms=latencies.get(name),
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
