"""
The training recipe: a TOML document, read strictly into frozen data.

Hidden here: the defaults, and that a misspelt key, a number out of range or an augmentation
that does not fit the kind of sample is refused before any work starts. docs/formats.md
("Training recipe") is the description for people.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import BadFile
from edgeexit.files import Table, digest_of, json_bytes, read_toml
from edgeexit.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A net to build: *arch* and *kwargs* as in a checkpoint; *input_shape* is (1, ...)."""

    arch: str
    kwargs: dict[str, Any]
    input_shape: tuple[int, ...]
    preprocess: Preprocess
    initial_weights: Path | None


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """
    Which samples: a *kind* of source at *path*; *holdout* of them, drawn by *seed*, choose the
    best epoch. What is None follows from the rest: see docs/formats.md.
    """

    kind: str | None = None
    path: str | None = None
    holdout: int | None = None
    seed: int | None = None
    class_names: tuple[str, ...] | None = None
    calibration_set: str | None = None


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """
    Random changes of each training sample: *flip* left-right with probability 1/2, *shift* by
    up to that many pixels, *erase* a rectangle with that probability (images); *noise* adds
    normal noise of that standard deviation in units of the normalised input (any kind).
    """

    flip: bool = False
    shift: int = 0
    erase: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingPart:
    """
    How to train: see docs/formats.md. *exit_weights* is one number per exit, or empty: all 1;
    *phase_shares* one per phase of the regime, or empty: the regime's own. *drops* are shares of
    each phase's steps, ascending, at which the *schedule* "steps" cuts the rate to a tenth.
    """

    epochs: int
    learning_rate: float
    regime: str = "joint"
    phase_shares: tuple[float, ...] = ()
    patience: int = 0
    batch: int = 128
    seed: int = 0
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    warmup: float = 0.2
    drops: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    exit_weights: tuple[float, ...] = ()
    ramp: bool = False
    equilibrium: bool = False
    distillation: float = 0.0
    distillation_temperature: float = 1.0
    head_init: str = "random"
    precision: str = "float32"

    def to_document(self) -> dict[str, Any]:
        """What training_part reads; what was added later is there only where it is used."""
        document = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }
        plain = type(self)(epochs=self.epochs, learning_rate=self.learning_rate)
        for key in ("schedule", "drops", "precision"):
            if getattr(self, key) == getattr(plain, key):
                del document[key]
        return document


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    One training recipe; *digest* is that of its meaning, not of its layout and comments.

    *model* is a net to build, or the path of a checkpoint to go on from. *augmentation* is None
    where the recipe leaves it to that checkpoint.
    """

    path: Path
    digest: str
    model: ModelPart | Path
    data: DataPart
    augmentation: Augmentation | None
    training: TrainingPart


def read_recipe(path: Path) -> Recipe:
    """Read *path*. UsageError if it is absent, BadFile if anything in it is not understood."""
    table = read_toml(path)
    table.expect_format(1)
    digest = digest_of(json_bytes(_plain(table.values, table.where)))
    training = training_part(table.table("training"))
    model = table.table("model")
    if "checkpoint" in model:
        # What it takes and answers, the checkpoint says itself.
        table.only("format", "model", "data", "augmentation", "training")
        model.only("checkpoint")
        return Recipe(
            path=path,
            digest=digest,
            model=Path(model.get("checkpoint", str)),
            data=data_part(_optional(table, "data"), is_whole=False),
            augmentation=augmentation_part(table.table("augmentation"), "image")
            if "augmentation" in table
            else None,
            training=training,
        )
    table.only("format", "model", "data", "preprocess", "augmentation", "training")
    preprocess = Preprocess.from_table(table.table("preprocess"))
    return Recipe(
        path=path,
        digest=digest,
        model=_model(model, preprocess),
        data=data_part(table.table("data"), is_whole=True),
        augmentation=augmentation_part(_optional(table, "augmentation"), preprocess.kind),
        training=training,
    )


def _optional(table: Table, key: str) -> Table:
    return table.table(key) if key in table else Table({}, f"{table.where}: {key}")


def _plain(value: Any, where: str) -> Any:
    """*value* with sorted keys; TOML's dates, NaN and infinity have no place in a recipe."""
    if isinstance(value, dict):
        return {key: _plain(value[key], where) for key in sorted(value)}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        raise BadFile(f"{where}: found {value!r}, expected a finite number")
    if not isinstance(value, str | int | float):
        raise BadFile(f"{where}: found {value!r}, expected text, numbers, true or false")
    return value


def _within(table: Table, key: str, low: float, high: float, default: float | None = None) -> float:
    """The number at *key*, in low..high; a missing one is *default*, or refused without one."""
    if default is not None and key not in table:
        return default
    value = table.get(key, float)
    if not low <= value <= high:
        raise BadFile(f"{table.where}.{key}: found {value:g}, expected {low:g} to {high:g}")
    return value


def _whole(table: Table, key: str, low: int, high: int, default: int | None = None) -> int:
    """Like _within for whole numbers."""
    if default is not None and key not in table:
        return default
    value = table.get(key, int)
    if not low <= value <= high:
        raise BadFile(f"{table.where}.{key}: found {value}, expected {low} to {high}")
    return value


def _model(table: Table, preprocess: Preprocess) -> ModelPart:
    table.only("arch", "kwargs", "input_shape", "initial_weights")
    shape = tuple(table.list_of("input_shape", int))
    if len(shape) < 2 or shape[0] != 1 or min(shape) < 1:
        raise BadFile(f"{table.where}.input_shape: found {list(shape)}, expected [1, ...]")
    if preprocess.kind == "image":
        height, width, channels = preprocess.sample_shape
        shapes = {"nchw": (1, channels, height, width), "nhwc": (1, height, width, channels)}
        if shape != shapes[preprocess.layout]:
            raise BadFile(
                f"{table.where}.input_shape: found {list(shape)}, "
                f"preprocess makes {list(shapes[preprocess.layout])}"
            )
    weights = table.find("initial_weights", str, "")
    return ModelPart(
        arch=table.get("arch", str),
        kwargs=dict(table.find("kwargs", dict, {})),
        input_shape=shape,
        preprocess=preprocess,
        initial_weights=Path(weights) if weights else None,
    )


def data_part(table: Table, *, is_whole: bool) -> DataPart:
    """Read a [data] table; *is_whole*: nothing can come from a checkpoint. BadFile."""
    keys = ("kind", "path", "holdout", "seed", "calibration_set")
    table.only(*keys, *(["class_names"] if is_whole else []))
    names = tuple(table.list_of("class_names", str)) if "class_names" in table else None
    if names is not None and (len(names) < 2 or len(set(names)) != len(names)):
        raise BadFile(f"{table.where}.class_names: expected two or more, all different")
    if is_whole:
        table.get("path", str)
    return DataPart(
        kind=table.find("kind", str, "") or None,
        path=table.find("path", str, "") or None,
        holdout=_whole(table, "holdout", 1, 10_000_000) if "holdout" in table else None,
        seed=_whole(table, "seed", 0, 2**31 - 1) if "seed" in table else None,
        class_names=names,
        calibration_set=table.find("calibration_set", str, "") or None,
    )


def augmentation_part(table: Table, kind: str) -> Augmentation:
    """Read a table of random changes for samples of *kind* "image" or "array"; BadFile."""
    if kind == "image":
        table.only("flip", "shift", "erase", "noise")
    else:
        table.only("noise")
    return Augmentation(
        flip=table.find("flip", bool, False),
        shift=_whole(table, "shift", 0, 1024, 0),
        erase=_within(table, "erase", 0, 1, 0),
        noise=_within(table, "noise", 0, 100, 0),
    )


def training_part(table: Table) -> TrainingPart:
    """Read a table of training keys. BadFile if anything in it is not understood."""
    table.only(*TrainingPart.__dataclass_fields__)
    weights = tuple(table.list_of("exit_weights", float)) if "exit_weights" in table else ()
    if any(not 0 <= weight <= 1000 for weight in weights) or (weights and weights[-1] == 0):
        raise BadFile(
            f"{table.where}.exit_weights: found {list(weights)}, expected numbers of 0 to 1000, "
            "the final exit's above 0"
        )
    shares = tuple(table.list_of("phase_shares", float)) if "phase_shares" in table else ()
    if any(not 0 <= share <= 1000 for share in shares) or (shares and not sum(shares)):
        raise BadFile(
            f"{table.where}.phase_shares: found {list(shares)}, expected numbers of 0 to 1000, "
            "one of them above 0"
        )
    drops = tuple(table.list_of("drops", float)) if "drops" in table else ()
    if any(not low < high for low, high in itertools.pairwise((0.0, *drops, 1.0))):
        raise BadFile(
            f"{table.where}.drops: found {list(drops)}, expected ascending shares above 0 and "
            "below 1"
        )
    return TrainingPart(
        epochs=_whole(table, "epochs", 1, 100_000),
        learning_rate=_within(table, "learning_rate", 1e-9, 100),
        regime=table.find("regime", str, "joint"),
        schedule=table.find("schedule", str, "one-cycle"),
        drops=drops,
        phase_shares=shares,
        patience=_whole(table, "patience", 0, 100_000, 0),
        batch=_whole(table, "batch", 2, 65_536, 128),
        seed=_whole(table, "seed", 0, 2**31 - 1, 0),
        momentum=_within(table, "momentum", 0, 0.9999, 0.9),
        weight_decay=_within(table, "weight_decay", 0, 1, 0),
        warmup=_within(table, "warmup", 0, 0.9, 0.2),
        label_smoothing=_within(table, "label_smoothing", 0, 0.9, 0),
        exit_weights=weights,
        ramp=table.find("ramp", bool, False),
        equilibrium=table.find("equilibrium", bool, False),
        distillation=_within(table, "distillation", 0, 100, 0),
        distillation_temperature=_within(table, "distillation_temperature", 0.01, 100, 1),
        head_init=table.find("head_init", str, "random"),
        precision=table.find("precision", str, "float32"),
    )
