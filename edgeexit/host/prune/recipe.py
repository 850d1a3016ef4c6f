"""
The pruning recipe: composition, data and trainings, read strictly out of TOML or put together.

Callers see PruneRecipe, read_prune_recipe and prune_recipe. docs/formats.md ("Pruning recipe")
is the description for people.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeexit.files import Table, digest_of, json_bytes, read_toml
from edgeexit.host.prune.composition import Composition, from_table
from edgeexit.host.prune.methods import METHODS
from edgeexit.host.recipe import (
    Augmentation,
    DataPart,
    TrainingPart,
    augmentation_part,
    data_part,
    training_part,
)
from edgeexit.names import choose


@dataclass(frozen=True, kw_only=True)
class PruneRecipe:
    """
    What to do with any network: *finetune* after each step, *final* after the last one.

    None leaves that training out. What *data* and *augmentation* leave open is as the checkpoint
    says it was trained. *where* names the recipe in messages.
    """

    where: str
    composition: Composition
    data: DataPart = field(default_factory=DataPart)
    augmentation: Augmentation | None = None
    finetune: TrainingPart | None = None
    final: TrainingPart | None = None

    def digest(self, model_digest: str) -> str:
        """Of the meaning, together with the network that it is applied to."""
        document: dict[str, Any] = {
            "model": model_digest,
            "composition": self.composition.to_document(),
        }
        for key in ("data", "augmentation", "finetune", "final"):
            part = getattr(self, key)
            document[key] = None if part is None else _plain(part)
        return digest_of(json_bytes(document))

    def to_document(self) -> dict[str, Any]:
        """What prune_recipe reads, nothing left to defaults; without the data."""
        plan = self.composition.to_document()
        document: dict[str, Any] = {
            "format": 1,
            "prune": {key: value for key, value in plan.items() if value is not None},
        }
        for key in ("augmentation", "finetune", "final"):
            part = getattr(self, key)
            if part is not None:
                document[key] = _plain(part)
        return document


def _plain(part: DataPart | Augmentation | TrainingPart) -> dict[str, Any]:
    if isinstance(part, TrainingPart):
        return part.to_document()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(part).items()}


def read_prune_recipe(path: Path) -> PruneRecipe:
    """Read *path*. UsageError if it is absent or a name is unknown, BadFile if not understood."""
    return prune_recipe(read_toml(path))


def prune_recipe(table: Table) -> PruneRecipe:
    """The recipe in *table*. UsageError if a name in it is unknown, BadFile if not understood."""
    table.expect_format(1)
    table.only("format", "data", "augmentation", "prune", "finetune", "final")
    part = table.table("prune")
    method = part.find("method", str, "")
    base = choose(method, METHODS, "method") if method else Composition()
    return PruneRecipe(
        where=table.where,
        composition=from_table(part, base),
        data=data_part(table.table("data"), is_whole=False) if "data" in table else DataPart(),
        augmentation=augmentation_part(table.table("augmentation"), "image")
        if "augmentation" in table
        else None,
        finetune=training_part(table.table("finetune")) if "finetune" in table else None,
        final=training_part(table.table("final")) if "final" in table else None,
    )


def default_training(epochs: int) -> TrainingPart:
    """What a pruned network is trained with unless something else is said."""
    return TrainingPart(
        epochs=epochs, learning_rate=0.05, weight_decay=0.0005, distillation=0.5, warmup=0.1
    )
