"""
The layers that zoo networks are made of, and the frame that puts exits between them.

Heads read their maps channels last, so that the lowered graph needs no transposition. Maps are
(N, C, H, W), sequences (N, C, L), tokens (N, T, D), logits (N, classes).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d

POOLED = 4  # places on each side that are left (Kaya et al. 2019, section 4.1)


class ConvUnit(nn.Sequential):
    """Convolution (kxk, padded to keep the size at stride 1), batch norm, then ReLU or ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[], nn.Module] | None = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([activation()] if activation else []))


class ExitHead(nn.Module):
    """
    Logits (N, classes) from a map (N, C, H, W).

    Each of *widths* is a convolution of stride 2; what they leave is flattened, which keeps
    where things are and costs little. Without widths the map is averaged over all places.
    """

    def __init__(
        self, inputs: int, size: tuple[int, int], classes: int, widths: Sequence[int] = ()
    ) -> None:
        super().__init__()
        units = []
        height, width = size
        for outputs in widths:
            units.append(ConvUnit(inputs, outputs, stride=2))
            inputs, height, width = outputs, -(-height // 2), -(-width // 2)
        self.convs = nn.Sequential(*units)
        self.flat = bool(widths)
        self.linear = nn.Linear(inputs * height * width if widths else inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the map *x*."""
        x = self.convs(x).permute(0, 2, 3, 1)
        logits: torch.Tensor = self.linear(x.flatten(1) if self.flat else x.mean((1, 2)))
        return logits


class PooledHead(nn.Module):
    """
    Logits (N, classes) from a map (N, C, H, W): pooled to 4x4, then one linear layer.

    Kaya et al. 2019 (arXiv 1810.07052, section 4.1): a learned mix of maximum and average, the
    same for all channels. Sides that 4 does not divide are covered by windows that overlap;
    sides shorter than 4 are kept as they are, and without any longer side nothing is mixed.
    """

    def __init__(self, inputs: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.stride = tuple(max(1, side // POOLED) for side in size)
        self.kernel = tuple(
            side - (POOLED - 1) * step if side >= POOLED else 1
            for side, step in zip(size, self.stride, strict=True)
        )
        self.mix = nn.Parameter(torch.tensor(0.5)) if max(self.kernel) > 1 else None
        places = math.prod(min(side, POOLED) for side in size)
        self.linear = nn.Linear(inputs * places, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the map *x*."""
        if self.mix is not None:
            largest = max_pool2d(x, self.kernel, self.stride)
            mean = avg_pool2d(x, self.kernel, self.stride)
            x = self.mix * largest + (1 - self.mix) * mean
        logits: torch.Tensor = self.linear(x.permute(0, 2, 3, 1).flatten(1))
        return logits


class Projection(ConvUnit):
    """He et al. 2016, option B: a 1x1 convolution makes the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 1, stride=stride, activation=None)


class Padding(nn.Module):
    """He et al. 2016, option A: every stride-th place, and zeros for the channels that lack."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map of fewer places and more channels."""
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


SHORTCUTS: dict[str, Callable[[int, int, int], nn.Module]] = {"A": Padding, "B": Projection}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; where shapes change it is one of SHORTCUTS."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str = "B") -> None:
        super().__init__()
        self.first = ConvUnit(inputs, outputs, stride=stride)
        self.second = ConvUnit(outputs, outputs, activation=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = SHORTCUTS[shortcut](inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's map for the map *x*."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Widen 1x1, depthwise 3x3, narrow 1x1; a shortcut where shapes agree (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        units = [ConvUnit(inputs, inner, 1, activation=nn.ReLU6)] if expansion > 1 else []
        units.append(ConvUnit(inner, inner, stride=stride, groups=inner, activation=nn.ReLU6))
        units.append(ConvUnit(inner, outputs, 1, activation=None))
        self.units = nn.Sequential(*units)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's map for the map *x*."""
        y: torch.Tensor = self.units(x)
        return x + y if self.has_shortcut else y


class SequenceHead(nn.Module):
    """Logits (N, classes) from a sequence map (N, C, L), averaged over its places."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the map *x*."""
        logits: torch.Tensor = self.linear(x.mean(2))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over tokens (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, T, D) that have looked at each other."""
        n, t, width = x.shape
        each = width // self.heads
        query, key, value = (
            part(x).reshape(n, t, self.heads, each).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(2, 3) * each**-0.5).softmax(-1)
        mixed: torch.Tensor = self.out((weights @ value).transpose(1, 2).reshape(n, t, width))
        return mixed


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, T, D) to tokens (N, T, D)."""
        x = x + self.attention(self.norm_attention(x))
        y: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return y


class Patches(nn.Module):
    """Tokens (N, T, D) of square patches of an image, with learned positions."""

    def __init__(self, channels: int, size: tuple[int, int], patch: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, patch, patch)
        count = (size[0] // patch) * (size[1] // patch)
        self.positions = nn.Parameter(torch.randn(1, count, width) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of the images *x* (N, C, H, W)."""
        tokens: torch.Tensor = self.conv(x).permute(0, 2, 3, 1).flatten(1, 2) + self.positions
        return tokens


class NormTokenHead(nn.Module):
    """Logits (N, classes) from tokens (N, T, D): layer norm, average, linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens *x*."""
        logits: torch.Tensor = self.linear(self.norm(x).mean(1))
        return logits


def sequence_unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Convolution over sequences (width 5, size kept at stride 1), batch norm, ReLU."""
    conv = nn.Conv1d(inputs, outputs, 5, stride, 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(outputs), nn.ReLU())


class MultiExit(nn.Module):
    """A stem, a row of blocks, and heads after some of them (0: the stem); the last is final."""

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], heads: Mapping[int, nn.Module]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleDict({str(after): head for after, head in sorted(heads.items())})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (N, classes) of every exit, earliest first."""
        logits = []
        for number, part in enumerate([self.stem, *self.blocks]):
            x = part(x)
            if str(number) in self.heads:
                logits.append(self.heads[str(number)](x))
        return tuple(logits)
