"""
A population for the promise: what int8 exits on CIFAR-10 say about every lossless test picture.

    python bench/cifar_record.py -o RECORD.npz

A pretrained ResNet-20 gets two exits, which learn on 5,000 training pictures while the network
stays as it is; the whole becomes an int8 bundle, and its record has one split, "population".
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from nets import SHARED
from PIL import Image
from torch import nn

from edgeexit.bundle import Bundle
from edgeexit.evaluate import record
from edgeexit.host.attach import attach_exits
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.convert import convert
from edgeexit.host.train import Choices, train
from edgeexit.host.zoo import resnet
from edgeexit.preprocess import Preprocess
from edgeexit.samples import Samples

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE, COLUMNS = 32, 40
RANGES, TRAINING = 1_000, 5_000  # training pictures, those of the ranges behind the others
PLAIN = {"depth": 20, "exits": [], "shortcut": "A"}
NORMAL = Preprocess(
    kind="image",
    size=(SIDE, SIDE),
    color="rgb",
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    layout="nchw",
)


def pictures(split: str, files: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures uint8 (N, 32, 32, 3), labels and numbers of the mosaics *files*, lossless alone."""
    tiles = []
    for k in files:
        with Image.open(SHARED / "cifar10" / f"{split}_{k:02d}.webp") as mosaic:
            pixels = np.asarray(mosaic.convert("RGB"))
        rows = pixels.shape[0] // SIDE
        grid = pixels.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)
        tiles.append(grid.reshape(-1, SIDE, SIDE, 3)[:1000])
    found = np.concatenate(tiles)
    with np.load(SHARED / "cifar10" / f"{split}_labels.npz") as data:
        numbers = np.arange(files.start * 1000, files.start * 1000 + len(found))
        labels, source = data["labels"][numbers], data["source"][numbers]
    lossless = source > 0
    return found[lossless], labels[lossless].astype(np.int64), numbers[lossless]


def plain_network() -> nn.Module:
    """The pretrained network; its tensors stand in the file in the order of ours."""
    path = SHARED / "cifar_resnets" / "resnet20-12fca82f.th"
    given = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = resnet(**PLAIN)
    own = model.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    for name, tensor in zip(names, given.values(), strict=True):
        assert own[name].shape == tensor.shape, name
        own[name] = tensor
    model.load_state_dict(own)
    return model.eval()


def bundle_in(folder: Path) -> Bundle:
    """The int8 bundle of the network with its trained exits, made below *folder*."""
    samples, labels, _ = pictures("train", range(-(-(TRAINING + RANGES) // 1000) + 1))
    np.savez(folder / "training.npz", samples=samples[:TRAINING], labels=labels[:TRAINING])
    behind = slice(TRAINING, TRAINING + RANGES)
    np.savez(folder / "ranges.npz", samples=samples[behind], labels=labels[behind])
    save_checkpoint(
        folder / "plain.pt",
        model=plain_network(),
        arch="edgeexit.host.zoo:resnet",
        kwargs=PLAIN,
        input_shape=(1, 3, SIDE, SIDE),
        class_names=CLASSES,
        preprocess=NORMAL,
    )
    attached = attach_exits(folder / "plain.pt", exits=2, head="pooled", is_measured=False)
    data = str(folder / "training.npz")
    choices = Choices(regime="frozen", data=data, epochs=10, learning_rate=0.01, flip=True)
    trained = train(attached.path, folder / "trained.pt", choices=choices)
    print(f"  held out: {trained.accuracies}", file=sys.stderr)
    return convert(trained.path, folder / "cifar.edgeexit", folder / "ranges.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("-o", "--out", type=Path, required=True)
    out = parser.parse_args().out
    samples, labels, numbers = pictures("test", range(10))
    population = Samples(
        samples=samples,
        labels=labels,
        ids=np.array([f"test-{number:05d}" for number in numbers]),
        name="cifar10:population",
    )
    with tempfile.TemporaryDirectory() as folder:
        found = record(bundle_in(Path(folder)), [population])
    found.save(out)
    shares = dict(zip(found.exits, found.correct().mean(axis=0).round(4).tolist(), strict=True))
    print(f"{out}: {len(found)} samples, right: {shares}")


if __name__ == "__main__":
    main()
