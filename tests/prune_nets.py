"""A small trained network as a checkpoint with its samples: what the pruning tests begin from."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeexit.host import zoo
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.fit import Fit
from edgeexit.host.material import Material, gather
from edgeexit.host.prune.composition import Composition
from edgeexit.host.prune.recipe import PruneRecipe
from edgeexit.host.recipe import DataPart, TrainingPart
from edgeexit.preprocess import Preprocess

ARCH = "edgeexit.host.zoo:resnet"
SHAPE = (1, 1, 8, 8)
CLASSES = ("a", "b", "c", "d")
KWARGS = {
    "channels": 1,
    "classes": 4,
    "size": [8, 8],
    "stem": [8],
    "widths": [8, 16],
    "blocks": [2, 2],
    "heads": [[8]],
}
PREPROCESS = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
# One epoch that recovers what a removal costs, and does not undo it by itself.
PART = TrainingPart(epochs=1, batch=32, learning_rate=0.02, momentum=0.9, warmup=0.1)


def save_samples(path: Path, count: int = 800, seed: int = 0) -> Path:
    """Four patterns under as much noise that a good network is right five times out of six."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    patterns = np.random.default_rng(5).normal(0, 1, (4, 8, 8, 1))
    values = 128 + 22 * patterns[labels] + random.normal(0, 60, (count, 8, 8, 1))
    samples = np.clip(values, 0, 255).astype(np.uint8)
    np.savez(path, samples=samples, labels=labels, class_names=np.array(CLASSES))
    return path


def material(path: Path) -> Material:
    """Half of the samples at *path* to train on, half held out."""
    data = DataPart(kind="npz", path=str(path), holdout=400, seed=0, class_names=CLASSES)
    found, _ = gather(data, None, preprocess=PREPROCESS, input_shape=SHAPE)
    return found


def new_net(**changes: object) -> nn.Module:
    """The network before any training."""
    torch.manual_seed(0)
    return zoo.resnet(**{**KWARGS, **changes})


@functools.cache
def trained(path: Path) -> dict[str, torch.Tensor]:
    """The weights after a training on the samples at *path*."""
    model = new_net()
    part = TrainingPart(epochs=5, batch=32, learning_rate=0.05)
    fit = Fit(model, material(path), part, where="prune_nets")
    while not fit.is_done:
        fit.run_epoch()
    return {name: value.clone() for name, value in model.state_dict().items()}


def net(path: Path) -> nn.Module:
    """The trained network, in eval mode."""
    model = new_net()
    model.load_state_dict(trained(path))
    return model.eval()


def save_plain(path: Path, samples: Path) -> Path:
    """The trained network without its early exit."""
    plain = {**KWARGS, "exits": [], "heads": []}
    weights = {n: w for n, w in trained(samples).items() if not n.startswith("heads.2.")}
    model = zoo.resnet(**plain)
    model.load_state_dict(weights)
    save_checkpoint(
        path,
        model=model,
        arch=ARCH,
        kwargs=plain,
        input_shape=SHAPE,
        class_names=CLASSES,
        preprocess=PREPROCESS,
    )
    return path


def save_net(path: Path, samples: Path, model: nn.Module | None = None) -> Path:
    """The trained network (or *model*) as a checkpoint that remembers its samples."""
    save_checkpoint(
        path,
        model=net(samples) if model is None else model,
        arch=ARCH,
        kwargs=KWARGS,
        input_shape=SHAPE,
        class_names=CLASSES,
        preprocess=PREPROCESS,
    )
    return path


def recipe(
    samples: Path,
    composition: Composition,
    *,
    finetune: TrainingPart | None = PART,
    final: TrainingPart | None = None,
) -> PruneRecipe:
    """*composition* on the samples at *samples*."""
    return PruneRecipe(
        where="prune_nets",
        composition=composition,
        data=DataPart(kind="npz", path=str(samples), holdout=400, seed=0),
        finetune=finetune,
        final=final,
    )


LINEAR = "tests.prune_nets:LinearNet"


class LinearNet(nn.Module):
    """Exits around layers whose neurons are always on: two pairs that could become one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.early = nn.Linear(64, 12), nn.Linear(12, 4)
        self.wide, self.on = nn.Linear(12, 32), nn.ReLU()
        self.narrow, self.act = nn.Linear(32, 20), nn.ReLU()
        self.thin, self.also_on = nn.Linear(20, 2), nn.ReLU()
        self.thick = nn.Linear(2, 30)
        self.final = nn.Linear(30, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both exits."""
        first = torch.relu(self.begin(x.flatten(1)))
        second = self.act(self.narrow(self.on(self.wide(first))))
        third = torch.relu(self.thick(self.also_on(self.thin(second))))
        return self.early(first), self.final(third)


def save_linear_net(path: Path) -> Path:
    """A LinearNet in which `wide` and `thin` put out nothing but positive numbers."""
    torch.manual_seed(0)
    model = LinearNet()
    with torch.no_grad():
        model.wide.bias.fill_(50.0)
        model.thin.bias.fill_(50.0)
        model.narrow.bias -= (model.narrow.weight * 50).sum(1)
        model.thick.bias -= (model.thick.weight * 50).sum(1)
    save_checkpoint(
        path,
        model=model,
        arch=LINEAR,
        input_shape=SHAPE,
        class_names=CLASSES,
        preprocess=PREPROCESS,
    )
    return path
