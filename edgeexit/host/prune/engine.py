"""
Prune a network: score, choose, remove, fine-tune, again until the target is met.

Callers see prune, Progress and Pruning. The loop knows the five axes by name only. Hidden here:
the state file beside the output, written after every removal and every epoch of fine-tuning, so
that the same command goes on after a Ctrl-C or a kill and computes what an uninterrupted one
does. Only the training half is looked at: its training samples score and train, its held-out
samples judge.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import check_output, write_file
from edgeexit.host import surgery
from edgeexit.host.checkpoint import Checkpoint, load_checkpoint, save_again
from edgeexit.host.fit import (
    Fit,
    Influence,
    Step,
    accelerated,
    check_training,
    holdout_accuracies,
)
from edgeexit.host.graph import parameters
from edgeexit.host.material import Material, Origin, gather
from edgeexit.host.needs import needs
from edgeexit.host.prune.phase import Facts
from edgeexit.host.prune.phases import PHASES
from edgeexit.host.prune.recipe import PruneRecipe
from edgeexit.host.prune.removal import Removal
from edgeexit.host.prune.schedules import StructureStability
from edgeexit.host.prune.scopes import SCOPES, Stage
from edgeexit.host.purpose import Purpose
from edgeexit.host.recipe import Augmentation, DataPart, TrainingPart
from edgeexit.host.statefile import UNSOUND, read_state, state_bytes, unsound
from edgeexit.host.train import seen
from edgeexit.locks import hold

JOB = "pruning"
# What an altered state file can make of reading it.


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    What is going on: *action* ("measure", "score", "phase", "fine-tune", "final", "done step").

    *done* of *total* steps are behind (0: as many as it takes); *fit* is the training's own
    progress, *row* what a finished step did.
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


def prune(
    model_path: Path,
    recipe: PruneRecipe,
    out: Path,
    *,
    arch: str | None = None,
    purpose: Purpose | None = None,
    again: bool = False,
    on_step: Callable[[Progress], None] | None = None,
) -> Pruning:
    """
    Prune the checkpoint *model_path* by *recipe* and write the checkpoint *out*.

    *arch* and *purpose* as for load_checkpoint.

    An interrupted pruning goes on where it was; a finished one is not redone unless *again*.
    Busy if another process prunes into *out*;
    OutOfReach if the target cannot be met without emptying a layer; UsageError, BadFile or
    Unsupported for a network, recipe or data that will not do; StorageError if the state or the
    checkpoint cannot be written.
    """
    check_output(out, model_path, recipe.where, recipe.data.path)
    checkpoint = load_checkpoint(model_path, arch=arch, purpose=purpose)
    digest = recipe.digest(checkpoint.digest)
    if not again:
        done = _finished(out, digest, arch)
        if done is not None:
            return done
    if recipe.composition.scope != "all" and len(checkpoint.exits) < 2:
        raise UsageError(
            f"{model_path}: has no early exit, which the scope {recipe.composition.scope} needs",
            hint="the scope all, or give it exits first: edgeexit attach",
        )
    lock = out.with_name(f".{out.name}.lock")
    with hold(lock, f"a pruning into {out.name}"):
        material, origin = training_half(
            checkpoint, str(model_path), recipe.data, recipe.augmentation
        )
        work = _Work(checkpoint, recipe, digest, material, on_step)
        state_path = out.with_name(out.name + ".state")
        work.state_path = state_path
        if state_path.exists() and not again:
            work.resume()
        work.run()
        work.save(out, origin)
        state_path.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    return work.result(out)


def _finished(out: Path, digest: str, arch: str | None) -> Pruning | None:
    if not out.exists():
        return None
    made = load_checkpoint(out, arch=arch).metadata.get("pruning")
    if not isinstance(made, dict) or made.get("digest") != digest:
        raise UsageError(
            f"{out}: is there already and was not made by this pruning of this network",
            hint="name another file with -o, or replace it: edgeexit prune ... --again",
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
        self.plan, self.material = recipe.composition, material
        self.stages = SCOPES[self.plan.scope]
        self._check_trainings()
        self.tell = on_step or (lambda progress: None)
        self.state_path = Path()
        part = recipe.finetune or recipe.final
        self.seed = part.seed if part else 0
        self.net = Removal(
            checkpoint,
            self.plan,
            material,
            where=recipe.where,
            weights=part.exit_weights if part else (),
            seed=self.seed,
        )
        self.stage, self.step = 0, 0
        self.start_cost = 0.0  # of the stage, before its first step
        self.pending: str | None = None  # the training that is due
        self.fit_state: dict[str, Any] | None = None
        self.units: dict[str, list[int]] = {}  # what a phase under way prepares to remove
        self.history: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}
        self.waited: dict[str, Any] = {}  # what the wait for a stable structure came to

    def _check_trainings(self) -> None:
        """Better now than after the removals."""
        for key, part, stages in (
            ("finetune", self.recipe.finetune, self.stages),
            ("final", self.recipe.final, self.stages[-1:]),
        ):
            if part is None:
                continue
            for stage in stages:
                check_training(
                    stage.training(part),
                    exits=len(self.checkpoint.exits),
                    samples=len(self.material.training),
                    where=f"{self.recipe.where}: {key}",
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
            self._train(self.stages[-1].training(self.recipe.final), "final")
            self.pending = "done"
            self._save_state()

    def _run_stage(self, stage: Stage) -> None:
        if not self.start_cost:
            if stage.fresh_heads:
                self._renew_heads()
            self._say("measure")
            self.net.measure()
            self.start_cost = self.net.cost(stage)
        steps = self._steps(stage)
        while self.pending is not None or self.step < len(steps):
            self.net.at = (self.stage, self.step)
            if self.pending is None:
                self._say("score")
                prepares = self.step == 0 and not self._is_idle(stage)
                if self.plan.stability and prepares:
                    self._await_stability(stage, steps[0] * self.start_cost)
                if self.plan.phase is not None and prepares:
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

    def _is_idle(self, stage: Stage) -> bool:
        """Whether there is nothing to remove, but to train: heads of one linear layer each."""
        is_empty = not self.plan.is_unstructured and not self.net.groups(stage)
        return stage.best_effort and is_empty

    def _steps(self, stage: Stage) -> list[float]:
        """The share of the stage's cost that may remain after each step."""
        share = self.plan.target.share
        if self._is_idle(stage):
            return [1.0]
        if stage.parts != "heads" and self.plan.selector != "filters":
            # One block, or as many filters, at a time until it is enough.
            is_over = self.net.cost(stage) <= share * self.start_cost
            return [share] * (self.step if is_over else self.step + 1)
        if self.plan.foresight:
            return [share]  # all steps of the schedule are scored at once
        gone = self.plan.gone()
        return [1 - one for one in gone]

    def _cut(self, stage: Stage, share: float) -> None:
        """One step of removing; what was done is the history's new last row."""
        done = self.net.cut(stage, share * self.start_cost, share)
        self.history.append({"stage": stage.name, "step": self.step + 1, **self.waited, **done})
        self.history[-1]["removed_accuracies"] = self._accuracies()
        self.waited = {}
        self.pending = "fine-tune"

    def _finish_step(self, stage: Stage) -> None:
        row = self.history[-1]
        row |= self._figures()
        self.pending, self.fit_state = None, None
        self.step += 1
        self._save_state()
        self.tell(Progress(action="done step", done=self.step, total=self._total(), row=row))

    def _say(self, action: str, fit: Step | None = None) -> None:
        self.tell(Progress(action=action, done=self.step, total=self._total(), fit=fit))

    def _total(self) -> int:
        """Steps of the stage, 0 where one removal follows another until it is enough."""
        if self.plan.selector != "filters":
            return 0
        return 1 if self.plan.foresight else len(self.plan.gone())

    def _figures(self) -> dict[str, Any]:
        return {
            "macs": self.net.graph.macs(),
            "parameters": parameters(self.net.model),
            "accuracies": self._accuracies(),
        }

    def _accuracies(self) -> dict[str, float]:
        with accelerated(self.net.model):
            return holdout_accuracies(self.net.model, self.material)

    def _train(self, part: TrainingPart, action: str, influence: Influence | None = None) -> None:
        """Train by *part*, from where an interruption left it."""
        influence = influence or self.net.used(list(self.net.masks))
        model = self.net.model
        with accelerated(model):
            fit = Fit(model, self.material, part, where=self.recipe.where, influence=influence)
            if self.fit_state is not None:
                try:
                    fit.load(self.fit_state)
                except UNSOUND as error:
                    raise unsound(self.state_path, JOB, error) from error
            while not fit.is_done:
                fit.run_epoch(lambda step: self._say(action, step))
                self.fit_state = fit.state()
                self._save_state()
            fit.take_best()
        self.fit_state = None
        self.net.model.eval()

    # ------------------------------------------------------------ before a removal

    def _await_stability(self, stage: Stage, goal: float) -> None:
        """
        Train until the structure that would be chosen no longer changes, phase_epochs at most.

        A pruning that was stopped here begins the waiting anew.
        """
        part = replace(self._phase_part(stage), epochs=self.plan.phase_epochs)
        watch = StructureStability()
        fit = Fit(self.net.model, self.material, part, where=self.recipe.where)
        while not fit.is_done and not watch.is_stable:
            fit.run_epoch(lambda step: self._say("phase", step))
            watch.take(self.net.structure(stage, goal))
        self.net.model.eval()
        self.waited = {"waited_epochs": fit.epoch, "is_stable": watch.is_stable}

    def _phase_part(self, stage: Stage) -> TrainingPart:
        if self.recipe.finetune is None:
            what = self.plan.phase or "stability"
            raise UsageError(
                f"{self.recipe.where}: {what} needs a training before the removal",
                hint="say --epochs, or give the recipe a [finetune] table",
            )
        return stage.training(self.recipe.finetune)

    def _begin_phase(self, stage: Stage, goal: float) -> None:
        """Choose what the phase shall prepare for removal, if it is told units at all."""
        self._phase_part(stage)
        if self.plan.selector == "filters":
            chosen = self.net.choice(stage, goal)
            self.units = {name: units.tolist() for name, units in chosen.items()}
        self.pending = "phase"

    def _run_phase(self, stage: Stage, share: float) -> None:
        """Train under the phase, then remove what it has made of units or blocks."""
        assert self.plan.phase is not None
        part = replace(self._phase_part(stage), epochs=self.plan.phase_epochs)
        units = {name: np.array(units) for name, units in self.units.items()}
        facts = Facts(
            model=self.net.model,
            graph=self.net.graph,
            units=units if units or self.plan.selector == "blocks" else None,
            iterations=part.epochs * (len(self.material.training) // part.batch),
            seed=self.seed,
            options=self.plan.phase_options,
        )
        with accelerated(self.net.model):
            phase = PHASES[self.plan.phase](facts)
        try:
            self._train(part, "phase", phase)
            self.net.distances = phase.distances()
            # What a phase did not look at stays: it scores above everything else.
            found = phase.scores()
            top = max((float(one.max()) for one in found.values()), default=0.0) + 1.0
            self.net.scores = {
                name: found.get(name, np.full(group.size, top))
                for name, group in self.net.graph.groups.items()
                if found
            }
        finally:
            phase.close()
        self._cut(stage, share)
        self.units, self.net.scores = {}, {}

    def _renew_heads(self) -> None:
        """Give the early exits' heads new random weights."""
        torch.manual_seed(self.seed)
        probe = torch.zeros(self.checkpoint.input_shape)
        for name in sorted(needs(self.net.model, probe).head_modules()):
            reset = getattr(self.net.model.get_submodule(name), "reset_parameters", None)
            if callable(reset):
                reset()

    # ------------------------------------------------------------ going on later

    def _save_state(self) -> None:
        values = {
            "stage": self.stage,
            "step": self.step,
            "pending": self.pending,
            "start_cost": self.start_cost,
            "before": self.before,
            "history": self.history,
            "units": self.units,
            "net": self.net.state(),
            "model": self.net.model.state_dict(),
            "fit": self.fit_state,
        }
        write_file(self.state_path, state_bytes(JOB, self.digest, values))

    def resume(self) -> None:
        """Go on from the state file, which must belong to this very pruning."""
        path = self.state_path
        state = read_state(path, JOB, self.digest)
        try:
            self.net.load(state["net"], str(path))
            self.net.model.load_state_dict(state["model"])
            self.stage, self.step = int(state["stage"]), int(state["step"])
            self.pending, self.fit_state = state["pending"], state["fit"]
            self.start_cost, self.before = float(state["start_cost"]), dict(state["before"])
            self.history, self.units = list(state["history"]), dict(state["units"])
            self._check_resumed()
        except UNSOUND as error:
            raise unsound(path, JOB, error) from error

    def _check_resumed(self) -> None:
        """ValueError unless what the state file says can be gone on from."""
        state, weights = self.net.model.state_dict(), dict(self.net.model.named_parameters())
        done = self.stage == len(self.stages)
        is_sound = (
            0 <= self.stage <= len(self.stages)
            and self.pending in ((None, "final", "done") if done else (None, "phase", "fine-tune"))
            and (self.pending != "phase" or self.plan.phase is not None)
            and 0 <= self.start_cost < float("inf")
            and all(isinstance(row, dict) for row in self.history)
            and self.units.keys() <= self.net.graph.groups.keys()
            and all(bool(tensor.isfinite().all()) for tensor in state.values())
            and self.net.masks.keys() <= weights.keys()
            and all(m.shape == weights[k].shape for k, m in self.net.masks.items())
        )
        if is_sound and not done:
            name = self.stages[self.stage].name
            rows = sum(row.get("stage") == name for row in self.history)
            is_sound = rows == self.step + (self.pending == "fine-tune")
        if not is_sound:
            raise ValueError("values that no pruning leaves")
        made = {"before": self.before, "after": self.before, "history": []}
        _from_metadata(self.state_path, made, was_done=False)

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
            self.net.model,
            calibration_set=self.recipe.data.calibration_set or self.checkpoint.calibration_set,
            training_digests=seen(self.material.data.samples, self.checkpoint.training_bloom),
            surgery=surgery.joined([*self.checkpoint.surgery, *self.net.entries]),
            metadata={
                **origin.to_metadata(),
                "pruning": self.made,
                "holdout_accuracies": self.made["after"]["accuracies"],
            },
        )

    def result(self, out: Path) -> Pruning:
        """What came out."""
        return _from_metadata(out, self.made, was_done=False)
