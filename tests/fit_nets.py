"""Small multi-exit networks of every make, and samples that they learn in a few steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexit.host import zoo
from edgeexit.host.feed import TrainingSet, split_holdout
from edgeexit.host.material import Material
from edgeexit.host.model import attach
from edgeexit.host.recipe import Augmentation, TrainingPart
from edgeexit.preprocess import Preprocess
from tests.host_nets import ConvNet

GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
PART = TrainingPart(epochs=2, learning_rate=0.05, batch=16, seed=3)


def material(count: int = 80, holdout: int = 16, seed: int = 0) -> Material:
    """Pictures of 8x8 whose class is their brightness."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    pictures = labels[:, None, None, None] * 90 + random.integers(0, 60, (count, 8, 8, 1))
    training, held = split_holdout(count, holdout, seed)
    return Material(
        data=TrainingSet(
            samples=pictures.astype(np.uint8),
            labels=labels.astype(np.int64),
            class_names=("dark", "middle", "bright"),
        ),
        training=training,
        holdout=held,
        preprocess=GRAY,
        augmentation=Augmentation(shift=1),
    )


def zoo_net() -> nn.Module:
    """Three exits, the first one's head with a convolution and batch norm of its own."""
    return zoo.resnet(
        channels=1,
        classes=3,
        size=[8, 8],
        stem=[4],
        widths=[4, 8],
        blocks=[1, 1],
        exits=[0, 1],
        heads=[[4], []],
    )


class Plain(nn.Module):
    """One exit; with dropout, so that a training draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.linear(self.drop(self.second(self.first(x)).mean((2, 3))))


def attached() -> nn.Module:
    return attach(Plain(), ["first"], input_shape=(1, 1, 8, 8))


class DropoutHead(nn.Module):
    """A head that begins with dropout and holds a batch norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 6)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
        self.unused = nn.Linear(2, 2)
        self.final = nn.Linear(6, 3)

    def forward(self, x: Any) -> list[Any]:
        features = torch.relu(self.body(x.flatten(1)))
        return [self.head(features), self.final(features)]


NETS: dict[str, Callable[[], nn.Module]] = {
    "zoo": zoo_net,
    "attached": attached,
    "foreign": lambda: ConvNet(3),
    "dropout": DropoutHead,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def bits(model: nn.Module) -> dict[str, bytes]:
    """The state of *model*, tensor by tensor."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, bytes]) -> set[str]:
    """Names of the tensors of *model* that are no longer as *before*."""
    return {name for name, value in bits(model).items() if value != before[name]}
