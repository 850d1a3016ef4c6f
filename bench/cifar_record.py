"""
A population for the promise: what int8 exits on CIFAR-10 say about every lossless test picture.

    python bench/cifar_record.py -o RECORD.npz

A pretrained ResNet-20 gets two exits, which learn on 5,000 training pictures while the network
stays as it is; the whole becomes an int8 bundle, and its record has one split, "population".
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from cifar import CLASSES, NORMAL, SIDE, Cifar

from edgeexit.bundle import Bundle
from edgeexit.evaluate import record
from edgeexit.host.attach import attach_exits
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.convert import convert
from edgeexit.host.train import Choices, train

RANGES, TRAINING = 1_000, 5_000  # training pictures, those of the ranges behind the others


def bundle_in(folder: Path) -> Bundle:
    """The int8 bundle of the network with its trained exits, made below *folder*."""
    cifar = Cifar()
    training = cifar.pictures("train", TRAINING)
    behind = cifar.pictures("train", RANGES, behind=TRAINING)
    np.savez(folder / "training.npz", samples=training.samples, labels=training.labels)
    np.savez(folder / "ranges.npz", samples=behind.samples, labels=behind.labels)
    plain, kwargs = cifar.pretrained(20)
    save_checkpoint(
        folder / "plain.pt",
        model=plain,
        arch="edgeexit.host.zoo:resnet",
        kwargs=kwargs,
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
    population = replace(Cifar().pictures("test"), name="cifar10:population")
    with tempfile.TemporaryDirectory() as folder:
        found = record(bundle_in(Path(folder)), [population])
    found.save(out)
    shares = dict(zip(found.exits, found.correct().mean(axis=0).round(4).tolist(), strict=True))
    print(f"{out}: {len(found)} samples, right: {shares}")


if __name__ == "__main__":
    main()
