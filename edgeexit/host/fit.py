"""
Train a multi-exit network in place: epoch by epoch, phase by phase, the best epoch kept.

Callers see Fit, Material, Influence, holdout_accuracies and accelerated. Hidden here: which parts
move in which phase of a regime, and the rule which epoch is best (the exits' held-out accuracies,
weighted as in the loss). Fit's state taken after an epoch and loaded into a new Fit computes what
an uninterrupted one does.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.host.courses import COURSES
from edgeexit.host.feed import batches, to_input
from edgeexit.host.losses import equilibrium, exit_loss, ramped
from edgeexit.host.material import Material as Material
from edgeexit.host.model import exit_outputs
from edgeexit.host.needs import Needs, needs
from edgeexit.host.recipe import TrainingPart
from edgeexit.host.regimes import REGIMES as REGIMES
from edgeexit.host.regimes import Phase, plan
from edgeexit.names import choose

HOLDOUT_BATCH = 500
MEANS_BATCH = 256
MEANS_SAMPLES = 4096

# In what maps are computed while training; weights, losses and held-out answers stay float32.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class Influence:
    """What else acts on a training under way; every method may be left as it is."""

    keeps_last = False  # whether the last weights count as the best, whatever they answer

    def penalty(self) -> torch.Tensor | None:
        """A scalar added to the loss of this batch, asked for after its forward."""
        return None

    def after_backward(self) -> None:
        """Gradients are there, the optimizer has not moved yet."""

    def after_step(self) -> None:
        """The weights have moved: the place to put masks on again."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that load needs to go on exactly."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state gave."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    Progress: *epoch* of at most *epochs* (from 1), *batch* of *batches*, in *phase*.

    At an epoch's end *accuracies* are those of the held-out samples.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    phase: str = ""
    accuracies: dict[str, float] | None = None
    is_best: bool = False


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """
    Inside, *model* lies on this machine's GPU, if it has one; afterwards where it lay before.

    What keeps tensors of the model, as a Fit does, is made inside. UsageError if the GPU has no
    room.
    """
    home, away = _device(model), _gpu()
    if away is None:
        yield
        return
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            model.to(away)
            yield
    except torch.OutOfMemoryError as error:
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"{away}: no room for this training: {said[:160]}",
            hint="a smaller batch, or the processor: set CUDA_VISIBLE_DEVICES to nothing",
        ) from error
    finally:
        model.to(home)


def holdout_accuracies(
    model: nn.Module, material: Material, indices: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """
    Share of right answers of each exit, dropout and the like off; *model* is left in eval mode.

    *indices* are those of the samples, default: the held-out ones.
    """
    chosen = material.holdout if indices is None else indices
    device = _device(model)
    right: dict[str, int] = {}
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(chosen), HOLDOUT_BATCH):
            some = chosen[start : start + HOLDOUT_BATCH]
            labels = material.labels(some).to(device)
            for name, logits in exit_outputs(model, material.inputs(some).to(device)).items():
                right[name] = right.get(name, 0) + int((logits.argmax(1) == labels).sum())
    return {name: count / len(chosen) for name, count in right.items()}


def lay_out(model: nn.Module, probe: torch.Tensor) -> torch.memory_format:
    """
    Lay *model*'s weights out channels last, which is faster, if its forward works that way.

    A forward that takes views of maps does not.
    """
    if probe.ndim != 4:
        return torch.contiguous_format
    trial = copy.deepcopy(model).eval()
    try:
        trial.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.inference_mode():
            trial(probe.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.channels_last


def check_training(part: TrainingPart, *, exits: int, samples: int, where: str) -> None:
    """
    Refuse a *part* that cannot train a network of so many *exits* on so many *samples*.

    *where* names its table. UsageError for unknown names, numbers that do not go together with
    them and too few samples, BadFile for numbers that are not one for each exit or phase.
    """
    if part.exit_weights and len(part.exit_weights) != exits:
        raise BadFile(
            f"{where}.exit_weights: found {len(part.exit_weights)}, the network has {exits} exits"
        )
    if part.batch > samples:
        raise UsageError(
            f"{where}.batch: found {part.batch}, but there are {samples} training samples",
            hint="more samples, fewer held out, or a smaller batch (in a recipe: batch = ...)",
        )
    plan(part, where)
    choose(part.head_init, HEAD_INITS, "way to start exit heads")
    choose(part.precision, PRECISIONS, "precision of a training")
    course = choose(part.schedule, COURSES, "schedule of the learning rate")
    if part.drops and not course.has_drops:
        able = [name for name, course in COURSES.items() if course.has_drops]
        raise UsageError(
            f"{where}.drops: the schedule {part.schedule} has none",
            hint=f"schedules that do: {', '.join(able)}",
        )


class Fit:
    """
    One training under way: the network, its optimizer, and the best weights so far.

    *model* is trained in place, where it lies, by the regime, losses and numbers of *part*; a
    phase ends after its share of the epochs, or after *part.patience* epochs without a better
    held-out score, and leaves its best weights in the model. *where* names the recipe in errors:
    BadFile or UsageError if *part* does not fit the network or the data, Unsupported if the
    network refuses the samples.
    """

    def __init__(
        self,
        model: nn.Module,
        material: Material,
        part: TrainingPart,
        *,
        where: str,
        influence: Influence | None = None,
    ) -> None:
        self.model, self.material, self.part, self.where = model, material, part, where
        self.influence = Influence() if influence is None else influence
        self.device = _device(model)
        self._dtype = choose(part.precision, PRECISIONS, "precision of a training")
        self._probe = material.inputs(material.training[:1]).to(self.device)
        self._format = lay_out(model, self._probe)
        self.exits = self._check_model()
        self.weights = list(part.exit_weights) or [1.0] * len(self.exits)
        check_training(
            part, exits=len(self.exits), samples=len(material.training), where=f"{where}: training"
        )
        self.batches = len(material.training) // part.batch
        self.plan = plan(part, f"{where}: training")
        self._course = COURSES[part.schedule]
        self._trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        self._needs: Needs | None = None
        self.epoch = 0
        self.best_epoch = 0
        self.best_accuracies: dict[str, float] = {}
        self._check_phases()
        self._begin(0)
        self._start_heads()

    def _check_model(self) -> tuple[str, ...]:
        """Names of the exits, after one pass that shows input and classes to fit."""
        self.model.eval()
        try:
            with torch.inference_mode():
                outputs = self._outputs(self._probe)
        except RuntimeError as error:
            raise Unsupported(
                f"{self.where}: model.input_shape: the network refuses "
                f"{list(self._probe.shape)} in {self.part.precision}: {error}"
            ) from error
        classes = len(self.material.data.class_names)
        for name, logits in outputs.items():
            if tuple(logits.shape) != (1, classes):
                raise UsageError(
                    f"{self.where}: exit {name} gives {list(logits.shape)}, expected "
                    f"[1, {classes}] for the data's {classes} classes"
                )
        return tuple(outputs)

    def _outputs(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of every exit in float32, computed in the precision of the part."""
        short = None if self._dtype is None else torch.autocast(self.device.type, self._dtype)
        with short or nullcontext():
            outputs = exit_outputs(self.model, inputs)
        return {name: logits.float() for name, logits in outputs.items()}

    # ------------------------------------------------------------ phases

    @property
    def is_done(self) -> bool:
        """Whether every phase is over; the model then holds the best weights of the last."""
        return self._number == len(self.plan)

    @property
    def phase(self) -> str:
        """The name of the phase under way, or of the last one."""
        return self.plan[min(self._number, len(self.plan) - 1)][0].name if self.plan else ""

    def _begin(self, number: int) -> None:
        """Set the network and a new optimizer up for phase *number*, or for having ended."""
        self._number, self._phase_epoch, self._phase_best = number, 0, 0
        self.best_state: dict[str, torch.Tensor] = {}
        parameters = dict(self.model.named_parameters())
        if self.is_done:
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._trainable[name])
            return
        phase, epochs = self.plan[number]
        moved, self._phase_weights = self._moved(phase), self._weights_in(phase)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in moved)
        self.optimizer = torch.optim.SGD(
            [parameter for name, parameter in parameters.items() if name in moved],
            lr=self.part.learning_rate,
            momentum=self.part.momentum,
            nesterov=self.part.momentum > 0,
            weight_decay=self.part.weight_decay,
        )
        self.schedule = self._course.make(self.optimizer, self.part, epochs * self.batches)

    def _start_heads(self) -> None:
        """Where the first phase begins that moves the heads: give them their first weights."""
        first = next((k for k, (phase, _) in enumerate(self.plan) if phase.moves != "backbone"), -1)
        if self._number == first:
            HEAD_INITS[self.part.head_init](self)

    def _parts(self) -> Needs:
        if self._needs is None:
            self._needs = needs(self.model, self._probe)
        return self._needs

    def _weights_in(self, phase: Phase) -> list[float]:
        """What each exit's loss weighs in *phase*."""
        if phase.moves == "backbone":
            return [0.0] * (len(self.weights) - 1) + [1.0]
        return self.weights if phase.moves == "all" else [*self.weights[:-1], 0.0]

    def _check_phases(self) -> None:
        """Better now than after the first phase."""
        for phase, _ in self.plan:
            if not self._moved(phase) or not any(self._weights_in(phase)):
                raise UsageError(
                    f"{self.where}: nothing to train in phase {phase.name}: the network has no "
                    "early exit with a head of its own and a weight above 0",
                    hint="give it exits first (edgeexit attach), or choose the regime joint",
                )

    def _moved(self, phase: Phase) -> set[str]:
        """Names of the parameters that *phase* trains; those frozen from the start never move."""
        free = {name for name, flag in self._trainable.items() if flag}
        if phase.moves == "all":
            return free
        if phase.moves == "heads":
            return free & self._parts().head_parameters()
        final = self.exits[-1]
        return {name for name in free if final in self._parts().parameters[name]}

    def _set_modes(self, phase: Phase) -> None:
        """Train mode for what moves: elsewhere batch statistics stay and dropout is off."""
        self.model.train(phase.moves == "all")
        if phase.moves == "all":
            return
        heads, final = self._parts().head_modules(), self.exits[-1]
        for name, module in self.model.named_modules():
            serves = self._parts().modules[name]
            module.training = name in heads if phase.moves == "heads" else final in serves

    # ------------------------------------------------------------ epochs

    def run_epoch(self, on_step: Callable[[Step], None] | None = None) -> None:
        """
        Train one epoch, then judge it on the held-out samples; may end the phase.

        UsageError as soon as a batch's loss is NaN or infinite: no weight has moved by it.
        """
        part, (phase, epochs) = self.part, self.plan[self._number]
        tell = on_step or (lambda step: None)
        # Dropout draws from torch's own generator: tie it to the epoch, so resuming is exact.
        torch.manual_seed(part.seed + 1_000_003 * (self.epoch + 1))
        self._set_modes(phase)
        weights = self._phase_weights
        if part.ramp and phase.moves == "all":
            weights = ramped(weights, self._phase_epoch + 1, epochs)
        feed = batches(
            self.material.data,
            self.material.training,
            self.material.preprocess,
            self.material.augmentation,
            batch=part.batch,
            seed=part.seed,
            epoch=self.epoch,
        )
        for number, (real, labels) in enumerate(feed, start=1):
            inputs = to_input(real, self.material.preprocess)
            inputs = inputs.to(self.device, memory_format=self._format)
            outputs = list(self._outputs(inputs).values())
            loss = exit_loss(outputs, torch.from_numpy(labels).to(self.device), weights, part)
            self._learn(loss, weights, number)
            tell(self._step(number))
        self._check_weights()
        accuracies = holdout_accuracies(self.model, self.material)
        self._judge(accuracies, tell)

    def _learn(self, loss: torch.Tensor, weights: list[float], number: int) -> None:
        """One step of the optimizer for the *loss* of batch *number*."""
        penalty = self.influence.penalty()
        total = loss if penalty is None else loss + penalty
        if not bool(torch.isfinite(total)):
            raise self._diverged(f"the loss became {total.item()}", f", batch {number}")
        self.optimizer.zero_grad(set_to_none=True)
        if self.part.equilibrium:
            loss.backward(retain_graph=penalty is not None)  # type: ignore[no-untyped-call]
            pairs = zip(self.exits, weights, strict=True)
            paid = frozenset(name for name, weight in pairs if weight)
            served = {name: exits & paid for name, exits in self._parts().parameters.items()}
            equilibrium(self.model, served)
            if penalty is not None:
                penalty.backward()  # type: ignore[no-untyped-call]
        else:
            total.backward()  # type: ignore[no-untyped-call]
        self.influence.after_backward()
        self.optimizer.step()
        self.schedule.step()
        self.influence.after_step()

    def _check_weights(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise self._diverged(f"{name} became NaN or infinite")

    def _diverged(self, what: str, place: str = "") -> UsageError:
        return UsageError(
            f"{self.where}: {what} in epoch {self.epoch + 1}{place}",
            hint="try a smaller training.learning_rate",
        )

    def _judge(self, accuracies: dict[str, float], tell: Callable[[Step], None]) -> None:
        """Count the epoch, keep its weights if they are the best, go on to the next phase."""
        epochs = self.plan[self._number][1]
        is_best = not self.best_state or self._score(accuracies) > self._score(self.best_accuracies)
        is_best |= self.influence.keeps_last
        self.epoch += 1
        self._phase_epoch += 1
        if is_best:
            self.best_epoch, self.best_accuracies = self.epoch, accuracies
            self._phase_best = self._phase_epoch
            self.best_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        tell(self._step(self.batches, accuracies=accuracies, is_best=is_best))
        waited = self._phase_epoch - self._phase_best
        if self._phase_epoch == epochs or (self.part.patience and waited >= self.part.patience):
            self.take_best()
            self._begin(self._number + 1)
            self._start_heads()

    def take_best(self) -> None:
        """Put the best weights of the phase under way into the model, if there are any yet."""
        if self.best_state:
            self.model.load_state_dict(self.best_state)

    def run(self, on_step: Callable[[Step], None] | None = None) -> None:
        """Run every epoch that is left."""
        while not self.is_done:
            self.run_epoch(on_step)

    def _step(
        self, batch: int, accuracies: dict[str, float] | None = None, is_best: bool = False
    ) -> Step:
        return Step(
            epoch=self.epoch + (accuracies is None),
            epochs=sum(epochs for _, epochs in self.plan),
            batch=batch,
            batches=self.batches,
            phase=self.phase,
            accuracies=accuracies,
            is_best=is_best,
        )

    def _score(self, accuracies: dict[str, float]) -> float:
        only_final = self.plan[self._number][0].moves == "backbone"
        weights = self._phase_weights if only_final else self.weights
        return sum(a * weight for a, weight in zip(accuracies.values(), weights, strict=True))

    # ------------------------------------------------------------ going on later

    def state(self) -> dict[str, Any]:
        """
        Everything that the next epoch needs: tensors and plain values, for torch.save.

        The tensors are the live ones: save or copy them before the next epoch.
        """
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "phase": self._number,
            "phase_epoch": self._phase_epoch,
            "phase_best": self._phase_best,
            "model": self.model.state_dict(),
            "best_epoch": self.best_epoch,
            "best_accuracies": self.best_accuracies,
            "best_state": self.best_state,
            "influence": self.influence.state(),
        }
        if not self.is_done:
            state["optimizer"] = self.optimizer.state_dict()
            state["schedule"] = self.schedule.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """
        Go on from *state*, taken from a Fit of the same network, material and part.

        KeyError, TypeError, ValueError or RuntimeError if it is none.
        """
        number = int(state["phase"])
        if not 0 <= number <= len(self.plan):
            raise ValueError(f"phase {number} of {len(self.plan)}")
        self.model.load_state_dict(state["model"])
        self._begin(number)
        if not self.is_done:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        self.epoch = int(state["epoch"])
        self._phase_epoch, self._phase_best = int(state["phase_epoch"]), int(state["phase_best"])
        self.best_epoch = int(state["best_epoch"])
        self.best_accuracies = dict(state["best_accuracies"])
        self.best_state = dict(state["best_state"])
        self.influence.load(dict(state["influence"]))


def _as_they_are(fit: Fit) -> None:
    """Heads as they were built or loaded."""


def _class_means(fit: Fit) -> None:
    from edgeexit.host.heads import init_from_class_means

    material, random = fit.material, np.random.default_rng([fit.part.seed, 2])
    order = random.permutation(material.training)
    labels = material.data.labels[order]
    # As many of each class: a rare one must not be missed.
    each = -(-MEANS_SAMPLES // len(material.data.class_names))
    kept = [order[labels == label][:each] for label in np.unique(labels)]
    chosen = random.permutation(np.concatenate(kept))
    parts = [chosen[k : k + MEANS_BATCH] for k in range(0, len(chosen), MEANS_BATCH)]
    batches = [
        (material.inputs(part).to(fit.device), material.labels(part).to(fit.device))
        for part in parts
    ]
    init_from_class_means(fit.model, fit.exits[:-1], batches)


HEAD_INITS: dict[str, Callable[[Fit], None]] = {
    "random": _as_they_are,
    "class-means": _class_means,
}


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _gpu() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None
