"""
Which scheme is the fastest for which network: `edgeexit convert --scheme auto` on this machine.

    python bench/schemes.py [--nets vit,resnet8,mobilenet,resnet20]

The networks learn to tell ten kinds of gratings for a minute, so that agreement means something.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save

from edgeexit.calibration import write_set
from edgeexit.cli.schemes import choice_table
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.convert import convert
from edgeexit.host.zoo import ZOO
from edgeexit.labelled import Samples
from edgeexit.preprocess import Preprocess, real_values

NETS = ("vit", "resnet8", "mobilenet", "resnet20")
CLASSES, STEPS, BATCH = 10, 80, 64
SIZE = (32, 32)
PREPROCESS = Preprocess(
    kind="image",
    size=SIZE,
    color="rgb",
    scale=1 / 255,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    layout="nchw",
)


def gratings(count: int, seed: int) -> Samples:
    """*count* pictures of coloured stripes in noise; the class is their direction."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    angle = (labels * np.pi / CLASSES)[:, None, None]
    phase, pitch = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
    wave = np.sin((columns * np.cos(angle) + rows * np.sin(angle)) * (0.6 + 0.05 * pitch) + phase)
    color = rng.uniform(0.4, 1.0, (count, 1, 1, 3))
    values = 128 + 80 * wave[..., None] * color + rng.normal(0, 25, (count, *SIZE, 3))
    return Samples(
        samples=np.clip(values, 0, 255).astype(np.uint8),
        labels=labels.astype(np.int64),
        ids=np.array([f"{seed}-{k}" for k in range(count)]),
        name="gratings",
    )


def trained(name: str) -> torch.nn.Module:
    """The zoo's net *name* after a few steps on gratings; every exit's loss weighs the same."""
    torch.manual_seed(0)
    model = ZOO[name]()
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(STEPS):
        batch = gratings(BATCH, 1000 + step)
        inputs = np.moveaxis(real_values(batch.samples, PREPROCESS), -1, 1)
        answers = model(torch.from_numpy(np.ascontiguousarray(inputs)))
        rows = list(answers.values()) if isinstance(answers, dict) else answers
        labels = torch.from_numpy(batch.labels)
        loss = sum(torch.nn.functional.cross_entropy(row, labels) for row in rows) / len(rows)
        rule.zero_grad()
        loss.backward()
        rule.step()
    print(f"  {name}: loss {float(loss.detach()):.3f}")
    return model.eval()


def chosen(name: str, folder: Path) -> dict[str, Any]:
    """What `convert --scheme auto` finds for the net *name*."""
    names = [f"direction {k}" for k in range(CLASSES)]
    net = ZOO[name]
    save_checkpoint(
        folder / f"{name}.pt",
        model=trained(name),
        arch=net.arch,
        kwargs=net.kwargs,
        input_shape=net.input_shape,
        class_names=names,
        preprocess=PREPROCESS,
    )
    if not (folder / "gratings").exists():
        write_set(
            folder / "gratings",
            name="gratings",
            parts={"ranges": gratings(100, 1), "tuning": gratings(500, 2)},
            class_names=names,
            preprocess=PREPROCESS,
            origin="made by bench/schemes.py",
            license="MIT",
            rebuild="python bench/schemes.py",
            seed=0,
        )
    bundle = convert(
        folder / f"{name}.pt",
        folder / f"{name}.edgeexit",
        folder / "gratings",
        scheme="auto",
    )
    choice: dict[str, Any] = bundle.provenance["scheme_choice"]
    print("\n".join([name, *choice_table(choice), ""]))
    return choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--nets", default=",".join(NETS))
    nets = parser.parse_args().nets.split(",")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in nets:
            found[name] = chosen(name, Path(folder))
            save("schemes", f"python bench/schemes.py --nets {','.join(found)}", found)


if __name__ == "__main__":
    main()
