"""
Is it worth it? Pruning and early exit on CIFAR-10 in measured int8 milliseconds.

    python bench/seeds/worth.py [--full] [--steps] [--later] [--data DIR] [--work DIR]

The pretrained ResNet-56 loses half of its blocks (examples/cifar-prune.toml), gets early exits, and
is trained once (examples/cifar-train.toml). Killed, it goes on where it was.
"""

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar import DATA, LISTED, Cifar
from common import CHECKOUT
from seeds import kinds
from seeds.steps import Step, Table, command, main, of_settings

NAME = "seeds-worth"
PRUNE = CHECKOUT / "examples/cifar-prune.toml"
TRAIN = CHECKOUT / "examples/cifar-train.toml"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    What is trained how long: *epochs* on *pictures*, the recipe's held-out ones included.

    Early exits stand behind the blocks *at*, their heads with stride-2 convolutions of *widths*.
    """

    depth: int = 56
    pictures: int = 48_129
    ranges: int = 1_000
    test: int | None = None
    at: tuple[str, ...] = ("blocks.7", "blocks.12", "blocks.19")
    widths: tuple[tuple[int, ...], ...] = ((32, 64), (64, 64), (64,))
    epochs: int = 12
    seeds: int = 1


SMALL = Setting()
FULL = Setting(epochs=200)


def table(setting: Setting, *, name: str = NAME, data: Path = DATA, listed: str = LISTED) -> Table:
    """The steps, and what is made of them."""
    cifar = Cifar(data, listed=listed)
    steps = [
        kinds.data_step(cifar, training=setting.pictures, ranges=setting.ranges, test=setting.test)
    ]
    for seed in range(setting.seeds):
        steps += _seed_steps(setting, cifar, seed)
    return Table(
        name=name,
        facts={"setting": asdict(setting)},
        steps=steps,
        figures=lambda results, work: figures(setting, results),
    )


def _seed_steps(setting: Setting, cifar: Cifar, seed: int) -> list[Step]:
    pruning, training = (tomllib.loads(path.read_text()) for path in (PRUNE, TRAIN))
    net = kinds.Net(depth=setting.depth, blocks=(), shortcut="A")
    return [
        kinds.dense_step(cifar, f"{seed}/dense", setting.depth),
        kinds.prune_step(
            f"{seed}/pruned",
            f"{seed}/dense",
            net,
            pictures=setting.pictures,
            epochs=0,
            extra_s=60.0,
            recipe={"data": _data(pruning), "prune": pruning["prune"]},
        ),
        kinds.attach_step(
            f"{seed}/exits",
            f"{seed}/pruned",
            at=setting.at,
            head="convs",
            widths=setting.widths,
        ),
        kinds.train_step(
            f"{seed}/trained",
            f"{seed}/exits",
            net,
            pictures=setting.pictures,
            cost=pruning["prune"]["target"]["macs"],
            data=_data(training),
            augmentation=training["augmentation"],
            training={
                **training["training"],
                "epochs": setting.epochs,
                "seed": training["training"]["seed"] + seed,
            },
        ),
    ]


def _data(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of its samples besides where they are."""
    return {key: value for key, value in recipe["data"].items() if key != "path"}


def figures(setting: Setting, results: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows, out of the steps' *results*."""
    return {"splits": results["data"]}


if __name__ == "__main__":
    make = of_settings(table, NAME, SMALL, FULL)
    sys.exit(main(command(__doc__ or "", "bench/seeds/worth.py", make)))
