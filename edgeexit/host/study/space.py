"""
What a search may vary: a TOML document, read strictly into dimensions and fixed values.

Callers see Space, Judge, read_space and DEFAULT. docs/formats.md ("Search space") is the
description for people. Hidden here: that a misspelt key or name, or a number out of range, is
refused before any trial starts, and how the values of one trial become a pruning recipe.
"""

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table, json_bytes, read_toml
from edgeexit.host.prune.allocators import ALLOCATORS
from edgeexit.host.prune.composition import Composition
from edgeexit.host.prune.criteria import CRITERIA
from edgeexit.host.prune.methods import METHODS
from edgeexit.host.prune.phases import PHASES
from edgeexit.host.prune.recipe import PruneRecipe, default_training, prune_recipe
from edgeexit.host.prune.schedules import SCHEDULES
from edgeexit.host.prune.scopes import SCOPES
from edgeexit.host.prune.selectors import SELECTORS
from edgeexit.host.recipe import TrainingPart
from edgeexit.names import choose

if TYPE_CHECKING:
    import optuna

FORMAT = 1
Value = str | int | float | bool

DEFAULT = """\
format = 1
[study]
sampler = "tpe"
seed = 0
[judge]
cost = "expected"
sure = 0.9
[exits]
keep = "any"
[prune]
criterion = {choices = ["taylor", "l1", "bn-gamma"]}
allocator = {choices = ["global", "uniform", "erk"]}
selector = {choices = ["filters", "everything"]}
steps = {low = 1, high = 4}
[prune.target]
macs = {low = 0.2, high = 0.9, step = 0.05}
[training]
learning_rate = {low = 0.01, high = 0.1, log = true}
[finetune]
epochs = 1
[final]
epochs = 3
"""

SAMPLERS = ("tpe", "random", "grid")
COSTS = ("expected", "best-exit", "macs")
KEEPS = ("any", "all")
AXES: dict[str, Mapping[str, Any]] = {
    "method": METHODS,
    "criterion": CRITERIA,
    "block_criterion": CRITERIA,
    "allocator": ALLOCATORS,
    "schedule": SCHEDULES,
    "scope": SCOPES,
    "selector": SELECTORS,
    "phase": {**PHASES, "": None},
}
TRAININGS = ("training", "finetune", "final")
MOST_POINTS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Judge:
    """
    How a trial's network is judged, on at most *samples* held-out training samples.

    *cost*: "expected" is the latency of a chain that stops where the largest probability
    reaches *sure*, and its accuracy; "best-exit" that of the exit with the most right answers,
    and its accuracy; "macs" that exit's MACs. Latencies are raced against the network before
    for about *seconds*. Without *int8* nothing is converted: float accuracies and MACs only.
    """

    cost: str = "expected"
    sure: float = 0.9
    samples: int = 2000
    seconds: float = 4.0
    int8: bool = True


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One thing that varies: *choices*, or numbers *low* to *high*, maybe in *step*s or *log*."""

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that stand for all of them when they are checked."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: "optuna.Trial") -> Value:
        """The value that the study's sampler wants to see next."""
        if self.choices:
            found = trial.suggest_categorical(self.name, self.choices)
            assert found is not None
            return found
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = int(self.step or 1)
            return trial.suggest_int(self.name, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def points(self, where: str) -> list[Value]:
        """All values; UsageError if there is no end to them."""
        if self.choices:
            return list(self.choices)
        is_whole = isinstance(self.low, int) and isinstance(self.high, int)
        step = self.step or (1 if is_whole else None)
        if step is None or self.log:
            raise UsageError(
                f"{where}: {self.name}: a grid needs choices or a step, and no log",
                hint='give it a step, or choose the sampler "tpe" or "random"',
            )
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > MOST_POINTS:
            raise UsageError(f"{where}: {self.name}: {count} values are too many for a grid")
        numbers = [self.low + k * step for k in range(count)]
        return list(numbers) if is_whole else [round(one, 12) for one in numbers]


@dataclass(frozen=True, kw_only=True)
class Space:
    """
    What is tried: the *fixed* values of each table, and one value of each dimension.

    *keep* says of the exits whether "any" of the early ones may go, or "all" stay. *document*
    is the whole as plain values, for digests.
    """

    where: str
    sampler: str
    seed: int
    judge: Judge
    keep: str
    fixed: Mapping[str, Mapping[str, Any]]
    varied: tuple[Dimension, ...]
    document: Mapping[str, Any]

    def dimensions(self, exits: Sequence[str]) -> tuple[Dimension, ...]:
        """Everything that varies for a network with these *exits*."""
        if self.keep == "all":
            return self.varied
        both = (True, False)
        early = tuple(Dimension(name=f"exits.{name}", choices=both) for name in exits[:-1])
        return (*self.varied, *early)

    def grid(self, exits: Sequence[str]) -> dict[str, list[Value]]:
        """All values of each dimension. UsageError if they are not finite."""
        found = {one.name: one.points(self.where) for one in self.dimensions(exits)}
        if math.prod(map(len, found.values())) > MOST_POINTS:
            raise UsageError(f"{self.where}: a grid of more than {MOST_POINTS} points")
        return found

    def kept(self, values: Mapping[str, Value], exits: Sequence[str]) -> tuple[str, ...]:
        """The exits that *values* keep; the final one always stays."""
        return tuple(name for name in exits if values.get(f"exits.{name}", True))

    def recipe(self, values: Mapping[str, Value], exits: Sequence[str] = ()) -> PruneRecipe:
        """
        The recipe that *values* describe; exits that are not kept weigh nothing in the loss.

        UsageError if its parts do not go together, BadFile if a number is out of range.
        """
        tables: dict[str, dict[str, Any]] = {name: dict(t) for name, t in self.fixed.items()}
        for name, value in values.items():
            table, _, key = name.partition(".")
            if table == "prune" and key.startswith("target."):
                tables["prune"]["target"] = {key.removeprefix("target."): value}
            elif table in tables:
                tables[table][key] = value
        document: dict[str, Any] = {"format": 1, "prune": tables["prune"]}
        for name in TRAININGS[1:]:
            part = {**tables["training"], **tables[name]}
            if part.get("epochs") != 0:
                base = vars(default_training(1))
                document[name] = {k: v for k, v in base.items() if not isinstance(v, tuple)} | part
        recipe = prune_recipe(Table(document, self.where))
        kept = self.kept(values, exits)
        if len(kept) == len(exits):
            return recipe
        changes = {}
        for name in TRAININGS[1:]:
            part = getattr(recipe, name)
            if part is not None:
                weights = part.exit_weights or (1.0,) * len(exits)
                if len(weights) != len(exits):
                    raise BadFile(
                        f"{self.where}: exit_weights: found {len(weights)}, the network has "
                        f"{len(exits)} exits"
                    )
                pairs = zip(exits, weights, strict=True)
                weights = tuple(w if exit_name in kept else 0.0 for exit_name, w in pairs)
                changes[name] = replace(part, exit_weights=weights)
        return replace(recipe, **changes)


def read_space(path: Path | None) -> Space:
    """
    The space in *path*, or the default one.

    UsageError if the file is absent or names something unknown, BadFile if anything in it is not
    understood.
    """
    if path is None:
        return space_of(Table(tomllib.loads(DEFAULT), "the default space"))
    return space_of(read_toml(path))


def space_of(table: Table) -> Space:
    """The space in *table*, as read_space."""
    table.expect_format(FORMAT)
    table.only("format", "study", "judge", "exits", "prune", *TRAININGS)
    try:
        json_bytes(table.values)
    except (TypeError, ValueError) as error:
        raise BadFile(
            f"{table.where}: expected text, finite numbers, true or false, no dates"
        ) from error
    study, exits = _part(table, "study"), _part(table, "exits")
    study.only("sampler", "seed")
    exits.only("keep")
    fixed: dict[str, dict[str, Any]] = {}
    varied: list[Dimension] = []
    known = {"prune": (*Composition.__dataclass_fields__, "method")}
    for name in ("prune", *TRAININGS):
        part = _part(table, name)
        part.only(*known.get(name, tuple(TrainingPart.__dataclass_fields__)))
        fixed[name] = {}
        for key, value in part.values.items():
            if name == "prune" and key == "target":
                value = _target(part.table(key), varied)
                if not value:
                    continue
            if _varies(value):
                varied.append(_dimension(part.table(key), f"{name}.{key}"))
            else:
                fixed[name][key] = value
    if not varied and exits.find("keep", str, "any") == "all":
        raise BadFile(f"{table.where}: nothing varies: expected {{choices = [...]}} or a range")
    seed = study.find("seed", int, 0)
    if not 0 <= seed < 2**31:
        raise BadFile(f"{study.where}.seed: found {seed}, expected 0 to {2**31 - 1}")
    space = Space(
        where=table.where,
        sampler=_one_of(study, "sampler", SAMPLERS),
        seed=seed,
        judge=_judge(_part(table, "judge")),
        keep=_one_of(exits, "keep", KEEPS),
        fixed=fixed,
        varied=tuple(varied),
        document=table.values,
    )
    _check(space)
    return space


def _part(table: Table, key: str) -> Table:
    return table.table(key) if key in table else Table({}, f"{table.where}: {key}")


def _one_of(table: Table, key: str, names: Sequence[str]) -> str:
    name = table.find(key, str, names[0])
    choose(name, dict.fromkeys(names), f"{table.where}.{key}")
    return name


def _judge(table: Table) -> Judge:
    table.only(*Judge.__dataclass_fields__)
    plain = Judge()
    ranges = {"sure": (0.0, 1.0), "seconds": (0.01, 3600.0)}
    numbers: dict[str, Any] = {}
    for key, (low, high) in ranges.items():
        numbers[key] = table.find(key, float, getattr(plain, key))
        if not low <= numbers[key] <= high:
            raise BadFile(
                f"{table.where}.{key}: found {numbers[key]:g}, expected {low:g} to {high:g}"
            )
    samples = table.find("samples", int, plain.samples)
    if samples < 1:
        raise BadFile(f"{table.where}.samples: found {samples}, expected 1 or more")
    judge = Judge(
        cost=_one_of(table, "cost", COSTS),
        samples=samples,
        int8=table.find("int8", bool, True),
        **numbers,
    )
    if not judge.int8 and judge.cost != "macs":
        raise BadFile(
            f"{table.where}.cost: found {judge.cost!r}; without int8 nothing can be timed",
            hint='cost = "macs", or leave int8 out',
        )
    return judge


def _varies(value: object) -> bool:
    return isinstance(value, dict) and bool({"choices", "low", "high"} & set(value))


def _target(table: Table, varied: list[Dimension]) -> dict[str, Any]:
    """The fixed part of [prune.target]; what varies goes to *varied*."""
    if len(table.values) != 1:
        raise BadFile(f"{table.where}: expected one target, found {len(table.values)}")
    ((what, value),) = table.values.items()
    if not _varies(value):
        return {what: value}
    varied.append(_dimension(table.table(what), f"prune.target.{what}"))
    return {}


def _dimension(table: Table, name: str) -> Dimension:
    if "choices" in table:
        table.only("choices")
        choices = table.get("choices", list)
        kinds = {float if type(one) is int else type(one) for one in choices}
        if not kinds <= {str, bool, float} or len(kinds) != 1 or len(set(choices)) < len(choices):
            raise BadFile(
                f"{table.where}.choices: expected different texts, numbers or true and false"
            )
        return Dimension(name=name, choices=tuple(choices))
    table.only("low", "high", "step", "log")
    ends: dict[str, Any] = {}
    for key in ("low", "high", "step"):
        if key in table:
            is_whole = type(table.values[key]) is int
            ends[key] = table.get(key, int if is_whole else float)
    for key in ("low", "high"):
        table.get(key, type(ends.get(key, 0)))
    log = table.find("log", bool, False)
    if not ends["low"] < ends["high"] or not all(map(math.isfinite, ends.values())):
        raise BadFile(f"{table.where}: low {ends['low']:g}, high {ends['high']:g}, expected more")
    if "step" in ends and (log or ends["step"] <= 0):
        raise BadFile(f"{table.where}.step: expected above 0, and no log beside it")
    if log and ends["low"] <= 0:
        raise BadFile(f"{table.where}.low: found {ends['low']:g}, expected above 0 with log")
    if {type(one) for one in ends.values()} != {int}:
        ends = {key: float(one) for key, one in ends.items()}
    return Dimension(name=name, log=log, **ends)


def _check(space: Space) -> None:
    """Refuse names that are unknown and numbers out of range, whatever goes together with what."""
    for one in space.varied:
        names = AXES.get(one.name.removeprefix("prune."))
        for value in one.choices:
            if names is not None and one.name.startswith("prune."):
                choose(str(value), names, f"{one.name.removeprefix('prune.')}")
    for key, value in space.fixed["prune"].items():
        if key in AXES and isinstance(value, str):
            choose(value, AXES[key], key)
    first = {one.name: one.ends[0] for one in space.varied}
    for one, other in _each(space.varied):
        try:
            space.recipe({**first, one.name: other})
        except UsageError:
            continue  # these do not go together; a trial that wants them is refused
    if not space.varied:
        space.recipe({})


def _each(dimensions: Sequence[Dimension]) -> Iterator[tuple[Dimension, Value]]:
    return itertools.chain.from_iterable(((one, v) for v in one.ends) for one in dimensions)
