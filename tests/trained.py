"""A small trained network with its material, and what makes a network hard to round."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeexit.host import zoo
from edgeexit.host.answers import RealSamples
from edgeexit.host.assess import Assessment, assess, held_out
from edgeexit.host.feed import TrainingSet, split_holdout
from edgeexit.host.fit import Fit
from edgeexit.host.graph import analyse
from edgeexit.host.material import Material
from edgeexit.host.recipe import Augmentation, TrainingPart
from edgeexit.preprocess import Preprocess

SHAPE = (1, 1, 8, 8)
CLASSES = ("a", "b", "c", "d")
KWARGS = {
    "channels": 1,
    "classes": 4,
    "size": [8, 8],
    "stem": [8],
    "widths": [8, 16],
    "blocks": [1, 1],
    "heads": [[8]],
}
PREPROCESS = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)


def material(count: int = 900, seed: int = 0) -> Material:
    """Four noisy pictures, 300 of the samples held out."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    base = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1))
    values = base[labels] * 0.35 + random.normal(0, 60, (count, 8, 8, 1)) + 80
    data = TrainingSet(
        samples=np.clip(values, 0, 255).astype(np.uint8), labels=labels, class_names=CLASSES
    )
    training, holdout = split_holdout(count, 300, 0)
    return Material(
        data=data,
        training=training,
        holdout=holdout,
        preprocess=PREPROCESS,
        augmentation=Augmentation(),
    )


def reals() -> RealSamples:
    """Training samples for activation ranges."""
    found = material()
    return RealSamples(found.data.samples[found.training[:200]], PREPROCESS)


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = _net()
    part = TrainingPart(epochs=6, batch=32, learning_rate=0.05)
    Fit(model, material(), part, where="trained").run()
    return model.state_dict()


def _net() -> nn.Module:
    return zoo.resnet(**KWARGS)


def net() -> nn.Module:
    """A ResNet with two exits, trained until it is right four times out of five."""
    model = _net()
    model.load_state_dict(_weights())
    return model.eval()


_ASSESSED: list[Assessment] = []


def assessed(folders: pytest.TempPathFactory) -> Assessment:
    """What assess finds about net(), without latencies; made once, for all modules of tests."""
    if not _ASSESSED:
        _ASSESSED.append(assess_here(net(), folders.mktemp("trained") / "net"))
    return _ASSESSED[0]


def assess_here(model: nn.Module, folder: Path) -> Assessment:
    """*model* assessed on 120 held-out samples, without latencies."""
    samples, labels = held_out(material(), 120)
    return assess(
        model,
        graph=analyse(model, SHAPE),
        samples=samples,
        labels=labels,
        preprocess=PREPROCESS,
        input_shape=SHAPE,
        class_names=CLASSES,
        reals=reals(),
        folder=folder,
        is_measured=False,
    )


def make_hostile(model: nn.Module, factor: float) -> None:
    """Turn one channel inside each block up, and down again behind: the float answers stay."""
    random = np.random.default_rng(0)
    with torch.no_grad():
        for block in model.blocks:
            norm, reader = block.first[1], block.second[0]
            scales = torch.ones(len(norm.weight))
            scales[random.integers(len(scales))] = factor
            norm.weight *= scales
            norm.bias *= scales
            reader.weight /= scales[None, :, None, None]
