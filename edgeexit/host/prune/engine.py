"""
Prune a network: score, choose, remove, fine-tune, again until the target is met.

Callers see prune, Progress and Pruning. The loop knows the five axes by name only. Hidden here:
the state file beside the output, written after every removal and every epoch of fine-tuning, so
that the same command goes on after a Ctrl-C or a kill and computes what an uninterrupted one
does. Only the training half is looked at: its training samples score and train, its held-out
samples judge.
"""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import BadFile, OutOfReach, UsageError
from edgeexit.files import read_bytes, write_file
from edgeexit.host import folding, surgery
from edgeexit.host.checkpoint import Checkpoint, load_checkpoint, save_again
from edgeexit.host.fit import Fit, Influence, Step, holdout_accuracies
from edgeexit.host.graph import analyse, parameters
from edgeexit.host.latency_table import LatencyTable, measure_table
from edgeexit.host.material import Material, Origin, gather
from edgeexit.host.model import exit_outputs
from edgeexit.host.needs import needs
from edgeexit.host.prune import states
from edgeexit.host.prune.allocators import ALLOCATORS, Bill, largest_share
from edgeexit.host.prune.composition import Composition
from edgeexit.host.prune.criteria import CRITERIA
from edgeexit.host.prune.evidence import EntryScores, Evidence
from edgeexit.host.prune.masks import Masks, compressed_bytes, iterate, pool
from edgeexit.host.prune.phase import Facts
from edgeexit.host.prune.phases import PHASES
from edgeexit.host.prune.recipe import PruneRecipe
from edgeexit.host.prune.saliency import effective_rank
from edgeexit.host.prune.schedules import StructureStability, planned
from edgeexit.host.prune.selectors import SELECTORS, Child, equalise, filters_of
from edgeexit.host.prune.similarity import exits_cka
from edgeexit.host.recipe import Augmentation, DataPart, TrainingPart

STATE_FORMAT = 1
MAX_STATE_BYTES = 4 << 30
SCORED_BATCH = 64
LINEAR_BITS = 0.05  # mean state entropy of an activation's units that counts as one state
STAGE_POOLS = {"all": "all", "backbone": "backbone", "heads": "exits"}
SURE = 0.9  # an exit answers a sample when its probability is at least this: for exit rates only


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    What is going on: *action* ("measure", "score", "phase", "fine-tune", "final", "done step").

    *done* of *total* steps are behind; *fit* is the training's own progress, *row* what a
    finished step did.
    """

    action: str
    done: int
    total: int
    fit: Step | None = None
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What came out: the checkpoint's *path*, its steps, and costs before and after."""

    path: Path
    history: tuple[dict[str, Any], ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    accuracies: tuple[dict[str, float], dict[str, float]]
    was_done: bool

    def to_document(self) -> dict[str, Any]:
        """The result as plain values, for --json."""
        return {
            "checkpoint": str(self.path),
            "history": list(self.history),
            "macs": list(self.macs),
            "parameters": list(self.parameters),
            "holdout_accuracies": list(self.accuracies),
            "was_done": self.was_done,
        }


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a scope: which layers it may change, and what its fine-tuning moves."""

    name: str
    parts: str
    regime: str | None = None
    phase_shares: tuple[float, ...] = ()
    fresh_heads: bool = False

    def training(self, part: TrainingPart) -> TrainingPart:
        """*part* with what the stage trains."""
        if self.regime is None:
            return part
        return replace(part, regime=self.regime, phase_shares=self.phase_shares)


# Görmez & Koyuncu's two strategies: everything as one pool; or the backbone first, with its own
# loss alone, then new heads on the frozen backbone.
SCOPES: dict[str, tuple[Stage, ...]] = {
    "all": (Stage(name="all", parts="all"),),
    "backbone-then-exits": (
        Stage(name="backbone", parts="backbone", regime="mixed", phase_shares=(1.0, 0.0, 0.0)),
        Stage(name="exits", parts="heads", regime="frozen", fresh_heads=True),
    ),
    "exits-only": (Stage(name="exits", parts="heads", regime="frozen"),),
}


def prune(
    model_path: Path,
    recipe: PruneRecipe,
    out: Path,
    *,
    arch: str | None = None,
    again: bool = False,
    on_step: Callable[[Progress], None] | None = None,
) -> Pruning:
    """
    Prune the checkpoint *model_path* by *recipe* and write the checkpoint *out*.

    An interrupted pruning goes on where it was; a finished one is not redone unless *again*.
    OutOfReach if the target cannot be met without emptying a layer; UsageError, BadFile or
    Unsupported for a network, recipe or data that will not do; StorageError if the state or the
    checkpoint cannot be written.
    """
    checkpoint = load_checkpoint(model_path, arch=arch)
    digest = recipe.digest(checkpoint.digest)
    if not again:
        done = _finished(out, digest, arch)
        if done is not None:
            return done
    material, origin = training_half(checkpoint, str(model_path), recipe.data, recipe.augmentation)
    work = _Work(checkpoint, recipe, digest, material, on_step)
    state_path = out.with_name(out.name + ".state")
    work.state_path = state_path
    if state_path.exists() and not again:
        work.resume()
    work.run()
    work.save(out, origin)
    state_path.unlink(missing_ok=True)
    return work.result(out)


def _finished(out: Path, digest: str, arch: str | None) -> Pruning | None:
    if not out.exists():
        return None
    made = load_checkpoint(out, arch=arch).metadata.get("pruning")
    if not isinstance(made, dict) or made.get("digest") != digest:
        raise UsageError(
            f"{out}: is there already and was not made by this pruning of this network",
            hint="name another file with -o, or replace it with --again",
        )
    return _from_metadata(out, made, was_done=True)


def _from_metadata(out: Path, made: Mapping[str, Any], *, was_done: bool) -> Pruning:
    try:
        before, after = made["before"], made["after"]
        return Pruning(
            path=out,
            history=tuple(made["history"]),
            macs=(int(before["macs"]), int(after["macs"])),
            parameters=(int(before["parameters"]), int(after["parameters"])),
            accuracies=(dict(before["accuracies"]), dict(after["accuracies"])),
            was_done=was_done,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{out}: metadata.pruning is damaged ({type(error).__name__})") from error


def training_half(
    checkpoint: Checkpoint,
    where: str,
    data: DataPart,
    augmentation: Augmentation | None = None,
) -> tuple[Material, Origin]:
    """
    The samples that *checkpoint*, read from *where*, was trained on, split as then.

    What *data* and *augmentation* say replaces what it says.
    """
    return gather(
        replace(data, class_names=checkpoint.class_names),
        augmentation,
        preprocess=checkpoint.preprocess,
        input_shape=checkpoint.input_shape,
        before=Origin.of(checkpoint.metadata, where),
    )


class _Work:
    """One pruning under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: PruneRecipe,
        digest: str,
        material: Material,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.checkpoint, self.recipe, self.digest = checkpoint, recipe, digest
        self.plan: Composition = recipe.composition
        self.material = material
        self.tell = on_step or (lambda progress: None)
        self.state_path = Path()
        self.model = checkpoint.model
        self.entries: list[surgery.Entry] = []
        self.graph = analyse(self.model, checkpoint.input_shape)
        self._check_names()
        part = recipe.finetune or recipe.final
        self.seed = part.seed if part else 0
        self.weights = list(part.exit_weights) if part and part.exit_weights else []
        self.weights = self.weights or [1.0] * len(self.graph.exits)
        self.stages = SCOPES[self.plan.scope]
        self.stage, self.step = 0, 0
        self.pending: str | None = None  # the training that is due: "fine-tune" or "final"
        self.fit_state: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.masks: dict[str, torch.Tensor] = {}
        self.units: dict[str, list[int]] = {}  # what a phase under way prepares to remove
        self.scores: dict[str, NDArray[np.float64]] = {}  # of units, from the phase that ended
        self.distances: dict[str, float] = {}  # of blocks from identity, once a phase has told
        self.table: LatencyTable | None = None
        self.start_cost = 0.0
        self.before: dict[str, Any] = {}

    def _check_names(self) -> None:
        for name in self.plan.protect:
            if name not in self.graph.layers:
                raise UsageError(
                    f"{self.recipe.where}: protect: the network has no layer {name!r}",
                    hint="edgeexit attach MODEL --list shows its parts",
                )

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        """Everything that is left to do."""
        if not self.before:
            self.before = self._figures()
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage])
            self.stage, self.step, self.start_cost = self.stage + 1, 0, 0.0
            self._save_state()
        if self.recipe.final is not None and self.pending != "done":
            self.pending = self.pending or "final"
            self._train(self.recipe.final, "final")
            self.pending = "done"
            self._save_state()

    def _run_stage(self, stage: Stage) -> None:
        if not self.start_cost:
            if stage.fresh_heads:
                self._renew_heads()
            if self.plan.target.what == "latency" and self.table is None:
                self._say("measure")
                self.table = measure_table(self.graph, self.model, self.checkpoint.input_shape)
            self.start_cost = self._cost(stage)
        steps = self._steps(stage)
        while self.pending is not None or self.step < len(steps):
            if self.pending is None:
                self._say("score")
                if self.plan.phase is not None and self.step == 0:
                    self._begin_phase(stage, steps[0] * self.start_cost)
                else:
                    self._cut(stage, steps[self.step])
                self._save_state()
            if self.pending == "phase":
                self._run_phase(stage, steps[0])
                self._save_state()
            if self.recipe.finetune is not None:
                part = stage.training(self.recipe.finetune)
                self._train(replace(part, seed=part.seed + 1009 * (self.step + 1)), "fine-tune")
            self._finish_step(stage)
            steps = self._steps(stage)

    def _steps(self, stage: Stage) -> list[float]:
        """The share of the stage's cost that may remain after each step."""
        share = self.plan.target.share
        if self.plan.selector != "filters":
            # One block, or as many filters, at a time until it is enough.
            is_over = self._cost(stage) <= share * self.start_cost
            return [share] * (self.step if is_over else self.step + 1)
        if self.plan.foresight:
            return [share]  # all steps of the schedule are scored at once
        gone = planned(self.plan.schedule, 1 - share, self.plan.steps, {})
        return [1 - one for one in gone]

    def _finish_step(self, stage: Stage) -> None:
        row = self.history[-1]
        row |= self._figures()
        self.pending, self.fit_state = None, None
        self.step += 1
        self._save_state()
        self.tell(
            Progress(
                action="done step", done=self.step, total=max(self.step, self.plan.steps), row=row
            )
        )

    def _say(self, action: str, fit: Step | None = None) -> None:
        total = max(self.step + 1, self.plan.steps if self.plan.selector == "filters" else 0)
        self.tell(Progress(action=action, done=self.step, total=total, fit=fit))

    def _figures(self) -> dict[str, Any]:
        return {
            "macs": self.graph.macs(),
            "parameters": parameters(self.model),
            "accuracies": holdout_accuracies(self.model, self.material),
        }

    def _train(self, part: TrainingPart, action: str, influence: Influence | None = None) -> None:
        """Train by *part*, from where an interruption left it."""
        influence = influence or self._masks(list(self.masks))
        fit = Fit(self.model, self.material, part, where=self.recipe.where, influence=influence)
        if self.fit_state is not None:
            fit.load(self.fit_state)
        while not fit.is_done:
            fit.run_epoch(lambda step: self._say(action, step))
            self.fit_state = fit.state()
            self._save_state()
        fit.take_best()
        self.fit_state = None
        self.model.eval()

    # ------------------------------------------------------------ costs

    def _layers(self, stage: Stage) -> set[str]:
        """The layers that a stage may change and is measured by."""
        early = {n for e in self.graph.exits[:-1] for n in self.graph.heads[e]}
        parts = {
            "all": set(self.graph.layers),
            "backbone": set(self.graph.layers) - early,
            "heads": early,
        }
        return parts[stage.parts]

    def _cost(self, stage: Stage, kept: Mapping[str, int] | None = None) -> float:
        """What the target counts, of the stage's layers, when *kept* units of each group stay."""
        layers = self._layers(stage)
        if self.plan.target.what == "macs":
            costs = self.graph.layer_macs(kept)
            others = sum(cost for cost, _ in self.graph.others) if stage.parts == "all" else 0
            return float(sum(costs[n] for n in layers) + others)
        if self.plan.target.what == "params":
            return float(self.graph.parameters(kept or {}, layers))
        if self.plan.target.what == "latency":
            assert self.table is not None
            widths = self.graph.widths(kept or {})
            return sum(
                self.table.milliseconds(self.graph.layers[n], widths[n][1], widths[n][0])
                for n in layers
            )
        return self._used_weights(layers)

    def _used_weights(self, layers: set[str]) -> float:
        """Single weights of *layers* that are in use."""
        used = 0
        for name in layers:
            mask = self.masks.get(f"{name}.weight")
            weight = self.model.get_parameter(f"{name}.weight")
            used += weight.numel() if mask is None else int(mask.sum())
        return float(used)

    # ------------------------------------------------------------ one removal

    def _evidence(self) -> Evidence:
        """Scored samples: drawn from the training samples anew for each step."""
        random = np.random.default_rng([self.seed, 2, self.stage, self.step])
        training = self.material.training
        chosen = random.permutation(training)[: self.plan.samples]
        batches = [
            (self.material.inputs(some), self.material.labels(some))
            for some in np.array_split(chosen, -(-len(chosen) // SCORED_BATCH))
        ]
        return Evidence(
            model=self.model,
            graph=self.graph,
            batches=batches,
            weights=self.weights,
            seed=self.seed + self.step,
        )

    def _cut(self, stage: Stage, share: float) -> None:
        """One step of removing; what was done is the history's new last row."""
        row: dict[str, Any] = {"stage": stage.name, "step": self.step + 1}
        if self.plan.is_unstructured:
            row |= self._zero(stage, share)
        else:
            rules = {
                "filters": self._cut_filters,
                "blocks": self._cut_block,
                "everything": self._cut_either,
            }
            row |= rules[self.plan.selector](stage, share)
            if self.plan.linearise:
                row |= self._linearise()
        self.history.append(row)
        self.pending = "fine-tune"

    def _operate(self, model: nn.Module, chosen: Mapping[str, NDArray[np.int64]]) -> surgery.Entry:
        entry = surgery.remove_units(model, self.graph, chosen)
        try:
            with torch.no_grad():
                exit_outputs(model.eval(), torch.zeros(self.checkpoint.input_shape))
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(
                f"{self.recipe.where}: the network's forward has widths of its own and refuses "
                f"narrower layers: {str(error).splitlines()[0][:160]}",
                hint="protect the layers in question, or write forward without numbers of channels",
            ) from error
        return entry

    def _accept(self, model: nn.Module, entries: Sequence[surgery.Entry]) -> None:
        self.model = model
        self.entries = surgery.joined([*self.entries, *entries])
        self.graph = analyse(model, self.checkpoint.input_shape)

    # -- filters

    def _groups(self, stage: Stage) -> list[str]:
        """The groups that may lose units in this stage."""
        layers = self._layers(stage) - set(self.plan.protect)
        return [
            name
            for name, group in self.graph.groups.items()
            if set(group.producers) <= layers
            and (self.plan.coupled or len(group.producers) == 1 or group.block is not None)
        ]

    def _bills(self, names: Sequence[str], scores: Mapping[str, NDArray[Any]]) -> list[Bill]:
        caps = effective_rank(self._evidence()) if self.plan.rank_cap else {}
        relevance: Mapping[str, float] = {}
        if self.plan.allocator == "egp":
            relevance = states.relevance(self.model, self.graph, self._evidence().batches)
        bills = []
        for name in names:
            group = self.graph.groups[name]
            layer = self.graph.layers[group.producers[0]]
            kernel = tuple(self.model.get_parameter(f"{layer.name}.weight").shape[2:])
            bills.append(
                Bill(
                    name=name,
                    size=group.size,
                    least=min(self.plan.round_to, group.size),
                    inputs=layer.inputs if layer.kind != "depthwise" else 1,
                    kernel=kernel,
                    weights_per_unit=self._weights_per_unit(name),
                    scores=scores[name],
                    relevance=relevance.get(layer.name),
                    cap=None if name not in caps else max(group.size - caps[name], 0),
                    milliseconds=self._curve(name),
                    round_to=self.plan.round_to,
                )
            )
        return bills

    def _weights_per_unit(self, name: str) -> float:
        group = self.graph.groups[name]
        total = 0
        for (module, side), places in group.places.items():
            weight = self.model.get_submodule(module).get_parameter("weight")
            axis = 1 if side == "in" else 0
            total += weight.numel() // weight.shape[axis] * places.shape[1]
        return max(float(total), 2.0)

    def _curve(self, name: str) -> NDArray[np.float64] | None:
        if self.table is None:
            return None
        return self.table.curve(self.graph, name)

    def _cut_filters(self, stage: Stage, share: float) -> dict[str, Any]:
        evidence = self._evidence()
        criterion = CRITERIA[self.plan.criterion]
        assert criterion.units is not None
        goal = share * self.start_cost
        if self._cost(stage) <= goal:
            return {"filters": 0}
        if self.plan.stability and self.step == 0:
            self._await_stability(stage, goal)
            evidence = self._evidence()
        scores = self.scores or criterion.units(evidence)
        chosen = self._chosen(stage, goal, scores)
        gone = sum(len(units) * len(self.graph.groups[n].producers) for n, units in chosen.items())
        entry = self._operate(self.model, chosen)
        self._accept(self.model, [entry])
        return {"filters": gone}

    def _chosen(
        self, stage: Stage, goal: float, scores: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[np.int64]]:
        """The units whose removal just meets *goal*: the smallest share that does."""
        names = self._groups(stage)
        bills = self._bills(names, scores)
        kept = self._kept(bills, stage, goal)
        return {
            name: np.argsort(scores[name], kind="stable")[: self.graph.groups[name].size - count]
            for name, count in kept.items()
            if count < self.graph.groups[name].size
        }

    def _kept(self, bills: Sequence[Bill], stage: Stage, goal: float) -> dict[str, int]:
        allocate = ALLOCATORS[self.plan.allocator]
        units = sum(bill.size for bill in bills)
        most = largest_share(self.plan.allocator, bills)

        def at(share: float) -> dict[str, int]:
            gone = allocate(bills, min(share, most))
            return {bill.name: self._rounded(bill, bill.size - gone[bill.name]) for bill in bills}

        if not units or self._cost(stage, at(most)) > goal:
            least = self._cost(stage, at(most)) / self.start_cost if units else 1.0
            what, asked = self.plan.target.what, self.plan.target.share
            raise OutOfReach(
                f"{self.recipe.where}: {what}={asked:g}: with these axes {least:.3f} of the "
                f"{stage.name} stage's {what} must remain, or a layer would be empty",
                hint="a larger share, a smaller round_to, fewer protected layers, "
                "coupled = true, or the selector everything",
            )
        low, high = 0.0, most
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if self._cost(stage, at(middle)) <= goal else (middle, high)
        return at(high)

    def _rounded(self, bill: Bill, count: int) -> int:
        """*count* as a multiple of round_to, never more than there are or less than must stay."""
        to = self.plan.round_to
        return max(min(int(count / to + 0.5) * to, bill.size), bill.size - bill.room, 1)

    # -- blocks, and either

    def _block_scores(self, stage: Stage) -> dict[str, float]:
        criterion = CRITERIA[self.plan.block_criterion]
        assert criterion.blocks is not None
        layers = self._layers(stage) - set(self.plan.protect)
        scores = self.distances or criterion.blocks(self._evidence())
        return {
            name: score
            for name, score in scores.items()
            if name in self.graph.blocks
            and set(self.graph.blocks[name].layers) <= layers
            and not self.graph.blocks[name].merges
        }

    def _cut_block(self, stage: Stage, share: float) -> dict[str, Any]:
        scores = self._block_scores(stage)
        if not scores:
            raise self._no_block(stage)
        name = min(scores, key=lambda block: (scores[block], block))
        entry = surgery.remove_block(self.model, self.graph, name)
        self._accept(self.model, [entry])
        return {"block": name}

    def _no_block(self, stage: Stage) -> OutOfReach:
        remains = self._cost(stage) / self.start_cost
        return OutOfReach(
            f"{self.recipe.where}: no further block can go, {remains:.3f} of the "
            f"{self.plan.target.what} remain",
            hint="a larger share, or the selector everything or filters",
        )

    def _cut_either(self, stage: Stage, share: float) -> dict[str, Any]:
        """The block child or the filter child, whichever is more similar to the parent."""
        evidence = self._evidence()
        criterion = CRITERIA[self.plan.criterion]
        assert criterion.units is not None
        names = self._groups(stage)
        scores = {k: v for k, v in criterion.units(evidence).items() if k in names}
        blocks = self._block_scores(stage)
        children: dict[str, tuple[nn.Module, list[surgery.Entry], dict[str, Any]]] = {}
        count = max(1, sum(self.graph.groups[n].size for n in names) // 2)
        if blocks:
            name = min(blocks, key=lambda block: (blocks[block], block))
            model = copy.deepcopy(self.model)
            entry = surgery.remove_block(model, self.graph, name)
            children["blocks"] = (model, [entry], {"block": name})
            count = filters_of(self.graph, self.graph.blocks[name].layers)
        chosen = equalise(self.graph, scores, count, seed=self.seed + self.step)
        if chosen:
            model = copy.deepcopy(self.model)
            entry = self._operate(model, chosen)
            gone = sum(len(units) for units in chosen.values())
            children["filters"] = (model, [entry], {"filters": gone})
        if not children:
            raise self._no_block(stage)
        rates = self._exit_rates(evidence)
        similar = [
            Child(
                kind=kind,
                similarity=exits_cka(self.model, child, self.graph, evidence.batches, rates),
            )
            for kind, (child, _, _) in children.items()
        ]
        kind = SELECTORS[self.plan.selector].choose(similar).kind
        model, entries, facts = children[kind]
        self._accept(model, entries)
        return {"child": kind, **facts, "similarity": {c.kind: c.similarity for c in similar}}

    def _exit_rates(self, evidence: Evidence) -> list[float]:
        """Share of the scored samples that each exit would answer when *SURE*."""
        taken = torch.zeros(0, dtype=torch.int64)
        self.model.eval()
        with torch.no_grad():
            for inputs, _ in evidence.batches:
                logits = list(exit_outputs(self.model, inputs).values())
                sure = torch.stack([one.softmax(1).amax(1) >= SURE for one in logits])
                sure[-1] = True
                taken = torch.cat([taken, sure.to(torch.int64).argmax(0)])
        counts = torch.bincount(taken, minlength=len(self.graph.exits)).double()
        return [float(rate) for rate in counts / counts.sum()]

    # -- what happens before a removal

    def _await_stability(self, stage: Stage, goal: float) -> None:
        """Train epoch by epoch until the structure that would be chosen no longer changes."""
        part = self.recipe.finetune
        if part is None:
            return
        watch = StructureStability()
        criterion = CRITERIA[self.plan.criterion]
        assert criterion.units is not None
        fit = Fit(self.model, self.material, part, where=self.recipe.where)
        while not fit.is_done:
            fit.run_epoch(lambda step: self._say("phase", step))
            bills = self._bills(self._groups(stage), criterion.units(self._evidence()))
            watch.take(self._kept(bills, stage, goal))
            if watch.is_stable:
                break
        self.model.eval()

    def _begin_phase(self, stage: Stage, goal: float) -> None:
        """Choose what the phase shall prepare for removal, if it is told units at all."""
        if self.recipe.finetune is None:
            raise UsageError(
                f"{self.recipe.where}: phase {self.plan.phase} needs a training",
                hint="say --epochs, or give the recipe a [finetune] table",
            )
        if self.plan.selector == "filters":
            criterion = CRITERIA[self.plan.criterion]
            assert criterion.units is not None
            chosen = self._chosen(stage, goal, criterion.units(self._evidence()))
            self.units = {name: units.tolist() for name, units in chosen.items()}
        self.pending = "phase"

    def _run_phase(self, stage: Stage, share: float) -> None:
        """Train under the phase, then remove what it has made of units or blocks."""
        assert self.plan.phase is not None
        assert self.recipe.finetune is not None
        part = replace(stage.training(self.recipe.finetune), epochs=self.plan.phase_epochs)
        facts = Facts(
            model=self.model,
            graph=self.graph,
            units={name: np.array(units) for name, units in self.units.items()} or None,
            iterations=part.epochs * (len(self.material.training) // part.batch),
            seed=self.seed,
            options=self.plan.phase_options,
        )
        phase = PHASES[self.plan.phase](facts)
        try:
            self._train(part, "phase", phase)
            self.distances = phase.distances()
            # What a phase did not look at stays: it scores above everything else.
            found = phase.scores()
            top = max((float(one.max()) for one in found.values()), default=0.0) + 1.0
            self.scores = {
                name: found.get(name, np.full(group.size, top))
                for name, group in self.graph.groups.items()
                if found
            }
        finally:
            phase.close()
        self._cut(stage, share)
        self.units, self.scores = {}, {}

    # -- single weights

    def _masks(self, names: Sequence[str]) -> Masks:
        weights = {name: self.model.get_parameter(name) for name in names}
        keeps = {n: self.masks.get(n, torch.ones(w.shape).bool()) for n, w in weights.items()}
        return Masks(self.model, keeps)

    def _zero(self, stage: Stage, share: float) -> dict[str, Any]:
        names = [
            name
            for name in pool(self.graph, STAGE_POOLS[stage.parts])
            if name.removesuffix(".weight") not in self.plan.protect
        ]
        masks, evidence = self._masks(names), self._evidence()
        score = CRITERIA[self.plan.criterion].entries
        assert score is not None

        def saliency(keeps: Mapping[str, torch.Tensor], some: Sequence[Any]) -> EntryScores:
            return score(replace(evidence, batches=list(some), masks=keeps))

        if self.plan.foresight:
            shares = planned(self.plan.schedule, 1 - share, self.plan.steps, {})
            come_back = self.plan.come_back
            iterate(masks, saliency, shares, evidence.batches, come_back=come_back)
        else:
            relevance = None
            if self.plan.allocator == "egp":
                found = states.relevance(self.model, self.graph, evidence.batches)
                relevance = {f"{layer}.weight": value for layer, value in found.items()}
            masks.thin(
                saliency(masks.keeps, evidence.batches),
                1 - share,
                allocator=self.plan.allocator,
                relevance=relevance,
            )
        self.masks.update(masks.keeps)
        return {"weights_gone": masks.gone, "compressed_bytes": compressed_bytes(self.model)}

    def _linearise(self) -> dict[str, Any]:
        """
        Take out activations in (nearly) one state where that lets two layers become one.

        An activation alone costs nothing on a board: without a fold that lowers the MACs it
        stays, and the row says how many were left.
        """
        batches = self._evidence().batches
        folded: list[list[str]] = []
        left = 0
        for name in states.linearisable(self.model, self.graph, batches, LINEAR_BITS):
            model = copy.deepcopy(self.model)
            entries = [folding.linearise(model, name)]
            graph = analyse(model, self.checkpoint.input_shape)
            new = [
                pair
                for pair in folding.foldable(model, graph, self.checkpoint.input_shape)
                if pair.macs_after < pair.macs_before
            ]
            if not new:
                left += 1
                continue
            entries.append(folding.fold(model, new[0]))
            folded.append([new[0].first, new[0].second])
            self._accept(model, entries)
        return {"folded": folded, "linear_but_kept": left}

    def _renew_heads(self) -> None:
        """Give the early exits' heads new random weights."""
        torch.manual_seed(self.seed)
        probe = torch.zeros(self.checkpoint.input_shape)
        for name in sorted(needs(self.model, probe).head_modules()):
            reset = getattr(self.model.get_submodule(name), "reset_parameters", None)
            if callable(reset):
                reset()

    # ------------------------------------------------------------ going on later

    def _save_state(self) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "edgeexit_pruning": STATE_FORMAT,
                "digest": self.digest,
                "stage": self.stage,
                "step": self.step,
                "pending": self.pending,
                "start_cost": self.start_cost,
                "before": self.before,
                "history": self.history,
                "surgery": self.entries,
                "masks": self.masks,
                "units": self.units,
                "distances": self.distances,
                "table": None if self.table is None else self.table.to_document(),
                "model": self.model.state_dict(),
                "fit": self.fit_state,
            },
            buffer,
        )
        write_file(self.state_path, buffer.getvalue())

    def resume(self) -> None:
        """Go on from the state file, which must belong to this very pruning."""
        path = self.state_path
        data = read_bytes(path, limit_bytes=MAX_STATE_BYTES)
        hint = f"remove {path} to start anew"
        try:
            state = torch.load(io.BytesIO(data), weights_only=True)
            version, digest = state["edgeexit_pruning"], state["digest"]
        except Exception as error:  # torch.load has no narrower contract for damaged files
            raise BadFile(
                f"{path}: not a sound pruning state ({type(error).__name__})", hint=hint
            ) from error
        if version != STATE_FORMAT:
            raise BadFile(f"{path}: of another version of edgeexit", hint=hint)
        if digest != self.digest:
            raise UsageError(
                f"{path}: an interrupted pruning with another recipe or network",
                hint="undo the change to go on, or start anew with --again",
            )
        try:
            surgery.replay(self.model, state["surgery"], f"{path}: surgery")
            self.model.load_state_dict(state["model"])
            self.entries = list(state["surgery"])
            self.stage, self.step = int(state["stage"]), int(state["step"])
            self.pending, self.fit_state = state["pending"], state["fit"]
            self.start_cost, self.before = float(state["start_cost"]), dict(state["before"])
            self.history, self.masks = list(state["history"]), dict(state["masks"])
            self.units, self.distances = dict(state["units"]), dict(state["distances"])
            if state["table"] is not None:
                self.table = LatencyTable.from_document(state["table"], str(path))
            self.graph = analyse(self.model, self.checkpoint.input_shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadFile(
                f"{path}: not a sound pruning state ({type(error).__name__})", hint=hint
            ) from error

    # ------------------------------------------------------------ what came out

    def _made(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "composition": self.plan.to_document(),
            "history": self.history,
            "before": self.before,
            "after": self._figures(),
        }

    def save(self, out: Path, origin: Origin) -> None:
        """Write the pruned network as a checkpoint."""
        self.made = self._made()
        save_again(
            out,
            self.checkpoint,
            self.model,
            surgery=surgery.joined([*self.checkpoint.surgery, *self.entries]),
            metadata={
                **origin.to_metadata(),
                "pruning": self.made,
                "holdout_accuracies": self.made["after"]["accuracies"],
            },
        )

    def result(self, out: Path) -> Pruning:
        """What came out."""
        return _from_metadata(out, self.made, was_done=False)
