"""Untrained multi-exit torch networks for tests of the host side, and samples to feed them."""

import numpy as np
import torch
from torch import nn

from edgeexit.host.answers import RealSamples, real_values
from edgeexit.preprocess import Preprocess

GRAY = Preprocess(
    kind="image", size=(12, 12), color="gray", scale=1 / 255, mean=(0.4,), std=(0.3,), layout="nchw"
)
ROW = Preprocess(kind="array", layout="as-is")


class ConvNet(nn.Module):
    """Three exits under names whose alphabetical order is not theirs; pooling by plain mean."""

    def __init__(self, classes: int = 5, channels: int = 1) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, stride: int) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.first, self.second, self.third = unit(channels, 8, 1), unit(8, 12, 2), unit(12, 16, 2)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in (8, 12, 16))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.first(x)
        b = self.second(a)
        c = self.third(b)
        means = [maps.mean((2, 3)) for maps in (a, b, c)]
        logits = [head(mean) for head, mean in zip(self.heads, means, strict=True)]
        return dict(zip(("small", "middle", "final"), logits, strict=True))


class Rows(nn.Module):
    """Two exits on a vector of 8 numbers; *between* is what the second one sees of the first."""

    def __init__(self, between=torch.relu, classes=(3, 3)) -> None:
        super().__init__()
        self.body, self.between = nn.Linear(8, 8), between
        self.heads = nn.ModuleList(nn.Linear(8, count) for count in classes)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = torch.relu(self.body(x))
        return [self.heads[0](features), self.heads[1](self.between(features))]


def pictures(count: int, *, size: tuple[int, int] = (12, 12), channels: int = 1, seed: int = 0):
    """Smooth uint8 pictures (count, H, W, channels), all different."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, channels))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    fine = coarse.repeat(rows, axis=1).repeat(columns, axis=2)[:, : size[0], : size[1]]
    return np.clip(fine + rng.integers(-20, 21, fine.shape), 0, 255).astype(np.uint8)


def settled(model: nn.Module, reals: RealSamples) -> nn.Module:
    """
    *model* with the batch statistics of *reals*, in eval mode.

    With the initial statistics (0, 1) an untrained network answers nearly the same to
    everything, and comparing its answers would prove nothing.
    """
    batch = real_values(reals.samples, reals.preprocess)
    if reals.preprocess.layout == "nchw":
        batch = np.moveaxis(batch, -1, 1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(np.ascontiguousarray(batch)))
    return model.eval()


def conv_net(*, classes: int = 5, count: int = 100, seed: int = 0) -> tuple[nn.Module, RealSamples]:
    """A settled ConvNet and the samples it was settled on."""
    torch.manual_seed(seed)
    reals = RealSamples(pictures(count, seed=seed), GRAY)
    return settled(ConvNet(classes), reals), reals


def rows(count: int, *, seed: int = 0) -> RealSamples:
    """*count* random vectors of 8 numbers."""
    values = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return RealSamples(values, ROW)
