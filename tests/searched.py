"""A tiny network on disk with its training samples, and spaces that are searched in no time."""

from pathlib import Path

import numpy as np
import torch

from edgeexit.files import Table
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.material import Origin
from edgeexit.host.recipe import Augmentation
from edgeexit.host.study.space import Space, space_of
from edgeexit.host.zoo import resnet
from edgeexit.preprocess import Preprocess

GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
EXITS = ("exit0", "exit1")
DOCUMENT = {
    "format": 1,
    "study": {"sampler": "random", "seed": 1},
    "judge": {"cost": "macs", "int8": False, "samples": 30},
    "exits": {"keep": "all"},
    "prune": {
        "target": {"macs": {"low": 0.4, "high": 0.9, "step": 0.1}},
        "criterion": {"choices": ["l1", "random"]},
        "steps": 1,
        "samples": 16,
        "round_to": 1,
    },
    "training": {"batch": 16, "learning_rate": 0.02},
    "finetune": {"epochs": 0},
    "final": {"epochs": 3},
}
VALUES = {"prune.target.macs": 0.6, "prune.criterion": "l1"}


def space(**changes: object) -> Space:
    """The space of DOCUMENT; a dict changes keys of a table, None takes a table out."""
    document: dict[str, object] = dict(DOCUMENT)
    for name, change in changes.items():
        old = document.pop(name, {})
        if isinstance(change, dict) and isinstance(old, dict):
            document[name] = {k: v for k, v in (old | change).items() if v is not None}
        elif change is not None:
            document[name] = change
    return space_of(Table(document, "tiny"))


def network(folder: Path) -> Path:
    """An untrained network of two exits, and 90 pictures whose class is their brightness."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    samples = labels[:, None, None, None] * 90 + random.integers(0, 60, (90, 8, 8, 1))
    np.savez(folder / "data.npz", samples=samples.astype(np.uint8), labels=labels)
    kwargs = {
        "channels": 1,
        "classes": 3,
        "size": [8, 8],
        "stem": [4],
        "widths": [4, 8],
        "blocks": [1, 1],
    }
    torch.manual_seed(0)
    save_checkpoint(
        folder / "net.pt",
        model=resnet(**kwargs),  # type: ignore[arg-type]
        arch="edgeexit.host.zoo:resnet",
        kwargs=kwargs,
        input_shape=[1, 1, 8, 8],
        class_names=["dark", "middle", "bright"],
        preprocess=GRAY,
        metadata=Origin(
            kind="npz",
            path=str(folder / "data.npz"),
            count=90,
            holdout=30,
            seed=0,
            augmentation=Augmentation(),
        ).to_metadata(),
    )
    return folder / "net.pt"
