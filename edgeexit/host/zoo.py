"""
Small multi-exit networks for images, audio maps and sensor windows.

A factory takes plain numbers and lists (they are stored in checkpoints as `kwargs`) and
returns an nn.Module whose forward gives a tuple of logits (N, classes), earliest exit first.
FACTORIES lists what the `arch` of a checkpoint may name; ZOO holds ready-made settings for
tests and benchmarks. Every argument is held to a range: a checkpoint's kwargs come from a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from edgeexit.errors import Unsupported
from edgeexit.host.layers import (
    SHORTCUTS,
    ConvUnit,
    ExitHead,
    InvertedResidual,
    MultiExit,
    NormTokenHead,
    Patches,
    ResidualBlock,
    SequenceHead,
    TransformerBlock,
    sequence_unit,
)

# No zoo net of a size that makes sense on a small board comes near these.
MAX_WIDTH = 4096
MAX_BLOCKS = 256


def _check(what: str, values: Sequence[int], most: int, *, least: int = 1) -> tuple[int, ...]:
    """*values* as a tuple, all whole numbers in least..most, else Unsupported."""
    for value in values:
        if type(value) is not int or not least <= value <= most:
            raise Unsupported(f"{what}: found {value!r}, expected a number in {least}..{most}")
    return tuple(values)


def _exit_places(exits: Sequence[int] | None, blocks: int, default: Sequence[int]) -> list[int]:
    """Early exits as numbers of blocks, ascending, distinct, before the last block."""
    places = list(_check("exits", default if exits is None else exits, blocks - 1, least=0))
    if places != sorted(set(places)):
        raise Unsupported(f"exits: found {places}, expected ascending numbers of blocks")
    return places


def resnet(
    *,
    depth: int = 20,
    channels: int = 3,
    classes: int = 10,
    size: Sequence[int] = (32, 32),
    stem: Sequence[int] = (16,),
    widths: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] | None = None,
    exits: Sequence[int] | None = None,
    heads: Sequence[Sequence[int]] | None = None,
    shortcut: str = "B",
) -> nn.Module:
    """
    CIFAR-style ResNet on (N, channels, *size): *depth* = 6n + 2 gives n blocks a stage.

    *stem* are the widths of the first convolutions, the second and later ones halving the
    map; *blocks* counts each stage's blocks in place of *depth*; *exits* are the early
    exits, each after that many blocks (0: after the stem; default: where a stage ends);
    *heads* gives each early exit its head's stride-2 convolutions (default none: averaged
    over all places). *shortcut* is "A" (padding) or "B" (projection) where shapes change.
    """
    if shortcut not in SHORTCUTS:
        raise Unsupported(f"shortcut: found {shortcut!r}, expected one of {', '.join(SHORTCUTS)}")
    if blocks is None:
        if depth < 8 or (depth - 2) % 6:
            raise Unsupported(f"depth: found {depth}, expected 6n + 2 (8, 20, 32, 44, 56)")
        blocks = [(depth - 2) // 6] * len(widths)
    counts = _check("blocks", blocks, MAX_BLOCKS)
    widths = _check("widths", widths, MAX_WIDTH)
    stem = _check("stem", stem, MAX_WIDTH)
    if len(counts) != len(widths) or not stem or sum(counts) > MAX_BLOCKS:
        raise Unsupported(
            f"blocks {counts} and widths {widths}: expected one number per stage, and a stem"
        )
    _check("channels, classes, size", (channels, classes, *size), MAX_WIDTH)
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    places = _exit_places(exits, ends[-1], ends[:-1])
    nothing: Sequence[Sequence[int]] = [()] * len(places)
    early = [_check("heads", row, MAX_WIDTH) for row in (nothing if heads is None else heads)]
    if len(early) != len(places):
        raise Unsupported(f"heads: found {len(early)}, expected {len(places)}, one per early exit")

    height, width = size
    units: list[nn.Module] = []
    inputs = channels
    for k, outputs in enumerate(stem):
        units.append(ConvUnit(inputs, outputs, stride=1 if k == 0 else 2))
        if k:
            height, width = -(-height // 2), -(-width // 2)
        inputs = outputs
    wanted = dict(zip(places, early, strict=True))
    row: list[nn.Module] = []
    made: dict[int, nn.Module] = {}
    if 0 in wanted:
        made[0] = ExitHead(inputs, (height, width), classes, wanted[0])
    for stage, (count, outputs) in enumerate(zip(counts, widths, strict=True)):
        for k in range(count):
            stride = 2 if stage and k == 0 else 1
            if stride == 2:
                height, width = -(-height // 2), -(-width // 2)
            row.append(ResidualBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
            if len(row) in wanted:
                made[len(row)] = ExitHead(inputs, (height, width), classes, wanted[len(row)])
    made[len(row)] = ExitHead(inputs, (height, width), classes)
    return MultiExit(nn.Sequential(*units), row, made)


# Sandler et al. 2018, table 2: expansion, width, blocks, stride of the first block.
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet(
    *,
    channels: int = 3,
    classes: int = 10,
    stem: int = 32,
    stem_stride: int = 2,
    last: int = 1280,
    stages: Sequence[Sequence[int]] = MOBILENET_STAGES,
    exits: Sequence[int] = (6, 13),
) -> nn.Module:
    """
    MobileNetV2-like net on (N, channels, H, W), any H and W.

    *stages* are [expansion, width, blocks, stride]; *exits* as in resnet; *last* is the width
    of the 1x1 convolution before the final head. The defaults are the paper's net for 224x224.
    """
    rows = [_check("stages", row, MAX_WIDTH) for row in stages]
    _check("channels, classes, stem", (channels, classes, stem, last), MAX_WIDTH)
    _check("stem_stride", (stem_stride,), 2)
    if not rows or any(len(row) != 4 for row in rows) or sum(r[2] for r in rows) > MAX_BLOCKS:
        raise Unsupported(f"stages: found {rows}, expected [expansion, width, blocks, stride] each")
    places = _exit_places(exits, sum(row[2] for row in rows), ())
    blocks: list[nn.Module] = []
    made: dict[int, nn.Module] = {}
    inputs = stem
    for expansion, outputs, count, stride in rows:
        for k in range(count):
            blocks.append(InvertedResidual(inputs, outputs, 1 if k else stride, expansion))
            inputs = outputs
            if len(blocks) in places:
                made[len(blocks)] = ExitHead(inputs, (0, 0), classes)
    final = nn.Sequential(
        ConvUnit(inputs, last, 1, activation=nn.ReLU6), ExitHead(last, (0, 0), classes)
    )
    if 0 in places:
        made[0] = ExitHead(stem, (0, 0), classes)
    made[len(blocks)] = final
    first = ConvUnit(channels, stem, stride=stem_stride, activation=nn.ReLU6)
    return MultiExit(first, blocks, made)


def resnet18(
    *,
    channels: int = 3,
    classes: int = 1000,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (2, 2, 2, 2),
    exits: Sequence[int] = (4, 6),
) -> nn.Module:
    """ImageNet-style ResNet (7x7 stem and 3x3 pooling, each of stride 2), any input size."""
    widths = _check("widths", widths, MAX_WIDTH)
    counts = _check("blocks", blocks, MAX_BLOCKS)
    _check("channels, classes", (channels, classes), MAX_WIDTH)
    if len(counts) != len(widths) or sum(counts) > MAX_BLOCKS:
        raise Unsupported(f"blocks {counts} and widths {widths}: expected one number per stage")
    places = _exit_places(exits, sum(counts), ())
    # Average pooling in place of the paper's max pooling: same cost, no extra kind of operator.
    first = nn.Sequential(
        ConvUnit(channels, widths[0], 7, stride=2), nn.AvgPool2d(2, ceil_mode=False)
    )
    row: list[nn.Module] = []
    made: dict[int, nn.Module] = {}
    inputs = widths[0]
    if 0 in places:
        made[0] = ExitHead(inputs, (0, 0), classes)
    for stage, (count, outputs) in enumerate(zip(counts, widths, strict=True)):
        for k in range(count):
            row.append(ResidualBlock(inputs, outputs, 2 if stage and not k else 1))
            inputs = outputs
            if len(row) in places:
                made[len(row)] = ExitHead(inputs, (0, 0), classes)
    made[len(row)] = ExitHead(inputs, (0, 0), classes)
    return MultiExit(first, row, made)


def dscnn(
    *,
    channels: int = 1,
    classes: int = 12,
    width: int = 64,
    blocks: int = 4,
    exits: Sequence[int] = (1, 2),
) -> nn.Module:
    """
    DS-CNN on audio maps (N, channels, 49, 10) (Zhang et al. 2017, "Hello Edge").

    A 3x3 convolution of stride 2, then *blocks* depthwise separable ones; any map size.
    """
    _check("channels, classes, width", (channels, classes, width), MAX_WIDTH)
    _check("blocks", (blocks,), MAX_BLOCKS)
    places = _exit_places(exits, blocks, ())
    row = [
        nn.Sequential(ConvUnit(width, width, groups=width), ConvUnit(width, width, 1))
        for _ in range(blocks)
    ]
    made = {k: ExitHead(width, (0, 0), classes) for k in (*places, blocks)}
    return MultiExit(ConvUnit(channels, width, stride=2), row, made)


def conv1d(
    *,
    channels: int = 6,
    classes: int = 6,
    widths: Sequence[int] = (32, 64, 96, 96),
    exits: Sequence[int] = (1, 2),
) -> nn.Module:
    """1-D convolutions on sensor windows (N, channels, L): one of stride 2 for each width."""
    widths = _check("widths", widths, MAX_WIDTH)
    _check("channels, classes", (channels, classes), MAX_WIDTH)
    if not 2 <= len(widths) <= MAX_BLOCKS:
        raise Unsupported(f"widths: found {len(widths)}, expected 2 or more")
    places = _exit_places(exits, len(widths) - 1, ())
    stem = sequence_unit(channels, widths[0], 2)
    row = [sequence_unit(a, b, 2) for a, b in pairwise(widths)]
    made = {k: SequenceHead(widths[k], classes) for k in (*places, len(row))}
    return MultiExit(stem, row, made)


def vit(
    *,
    channels: int = 3,
    classes: int = 10,
    size: Sequence[int] = (32, 32),
    patch: int = 4,
    width: int = 64,
    heads: int = 4,
    blocks: int = 6,
    exits: Sequence[int] = (2, 4),
) -> nn.Module:
    """Small vision transformer (Dosovitskiy et al. 2021, averaged tokens for a class token)."""
    height, breadth = _check("size", size, MAX_WIDTH)
    numbers = (channels, classes, patch, width, heads)
    _check("channels, classes, patch, width, heads", numbers, MAX_WIDTH)
    _check("blocks", (blocks,), MAX_BLOCKS)
    if height % patch or breadth % patch or width % heads:
        raise Unsupported(
            f"vit: size {list(size)} must divide by patch {patch}, width {width} by heads {heads}"
        )
    places = _exit_places(exits, blocks, ())
    row = [TransformerBlock(width, heads) for _ in range(blocks)]
    made = {k: NormTokenHead(width, classes) for k in (*places, blocks)}
    return MultiExit(Patches(channels, (height, breadth), patch, width), row, made)


FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "resnet": resnet,
    "resnet18": resnet18,
    "mobilenet": mobilenet,
    "vit": vit,
    "dscnn": dscnn,
    "conv1d": conv1d,
}


@dataclass(frozen=True, kw_only=True)
class ZooNet:
    """One ready-made net: calling it builds it, untrained; *input_shape* is (1, ...), NCHW."""

    arch: str
    input_shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        """A new net with random weights (torch's generator decides which)."""
        return FACTORIES[self.arch.partition(":")[2]](**self.kwargs)


def _entry(factory: str, input_shape: tuple[int, ...], **kwargs: Any) -> ZooNet:
    return ZooNet(arch=f"{__name__}:{factory}", input_shape=input_shape, kwargs=kwargs)


SMALL_MOBILENET = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 3, 2], [4, 48, 2, 1]]

ZOO: dict[str, ZooNet] = {
    **{f"resnet{n}": _entry("resnet", (1, 3, 32, 32), depth=n) for n in (8, 20, 32, 44, 56)},
    "mobilenet": _entry(
        "mobilenet",
        (1, 3, 32, 32),
        stem=16,
        stem_stride=1,
        last=128,
        stages=SMALL_MOBILENET,
        exits=[3, 6],
    ),
    "vit": _entry("vit", (1, 3, 32, 32)),
    "dscnn": _entry("dscnn", (1, 1, 49, 10)),
    "conv1d": _entry("conv1d", (1, 6, 128)),
    "mobilenet-224": _entry("mobilenet", (1, 3, 224, 224), classes=1000),
    "resnet18-224": _entry("resnet18", (1, 3, 224, 224)),
}
