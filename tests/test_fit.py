"""Fitting: each phase moves what it names and nothing else, and an interruption changes nothing."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.errors import BadFile, Unsupported, UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.courses import COURSES  # noqa: E402
from edgeexit.host.fit import Fit, Influence, Step, holdout_accuracies  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
from edgeexit.host.recipe import Augmentation, TrainingPart  # noqa: E402
from edgeexit.host.regimes import REGIMES  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402
from tests.fit_nets import NETS, PART, DropoutHead, Plain, bits, changed, made, material  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------- regimes


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_backbone_does_not_move_by_a_single_bit(name: str) -> None:
    model = made(name)
    before, given = bits(model), material()
    inputs = given.inputs(given.holdout)
    if inputs.ndim == 4:  # as Fit lays it out: another layout adds up in another order
        model.to(memory_format=torch.channels_last)
    model.eval()
    final = list(exit_outputs(model, inputs).values())[-1]

    Fit(model, given, replace(PART, regime="frozen"), where="r").run()

    heads = needs(model, inputs[:1]).head_modules()
    moved = changed(model, before)
    assert moved
    assert {name.rpartition(".")[0] for name in moved} <= heads
    trained = {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in heads}
    assert trained <= moved
    model.eval()
    assert torch.equal(list(exit_outputs(model, inputs).values())[-1], final)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_statistics_of_the_heads_alone_follow_the_data() -> None:
    model = made("zoo")
    before = bits(model)

    Fit(model, material(), replace(PART, regime="frozen"), where="r").run()

    statistics = {name for name in changed(model, before) if "running" in name}
    assert statistics == {f"heads.0.convs.0.1.running_{kind}" for kind in ("mean", "var")}


def test_each_phase_of_mixed_moves_its_part() -> None:
    model = made("zoo")
    part = replace(PART, regime="mixed", epochs=6, phase_shares=(1.0, 1.0, 1.0))
    fit = Fit(model, material(), part, where="r")
    heads = needs(model, torch.zeros(1, 1, 8, 8)).head_parameters()
    names = {name for name, _ in model.named_parameters()}
    wanted = {"backbone": names - heads, "heads": set(heads), "all": names}
    phases = []

    while not fit.is_done:
        phase, before = fit.phase, bits(model)
        fit.run_epoch()
        # At a phase's end the best weights come back: its first epoch may be the best.
        if fit.phase == phase:
            assert changed(model, before) & names == wanted[phase]
        phases.append(phase)

    assert phases == ["backbone"] * 2 + ["heads"] * 2 + ["all"] * 2


def test_the_first_phase_of_mixed_is_judged_by_the_final_exit() -> None:
    steps: list[Step] = []
    part = replace(PART, regime="mixed", epochs=8, phase_shares=(1.0, 0.0, 1.0))

    Fit(made("zoo"), material(), part, where="r").run(steps.append)

    ends = [step for step in steps if step.accuracies is not None]
    assert [step.phase for step in ends] == ["backbone"] * 4 + ["all"] * 4
    best = -1.0
    for step in ends[:4]:
        final = list(step.accuracies.values())[-1]
        assert step.is_best == (final > best)
        best = max(best, final)


@pytest.mark.parametrize("regime", REGIMES)
def test_patience_ends_a_phase_and_brings_its_best_weights_back(regime: str) -> None:
    given = material(160, 80)
    part = replace(PART, regime=regime, epochs=60, patience=2)
    model, ends, best = made("zoo"), [], []
    fit = Fit(model, given, part, where="r")

    def note(step: Step) -> None:
        if step.accuracies is not None:
            ends.append(step)
        if step.is_best:
            best.append(bits(model))

    fit.run(note)

    assert [step.is_best for step in ends[-2:]] == [False, False]
    assert fit.epoch == len(ends) < 60
    assert not changed(model, best[-1])
    assert holdout_accuracies(model, given) == fit.best_accuracies
    assert fit.best_accuracies == ends[fit.best_epoch - 1].accuracies


def test_no_epochs_are_a_training_that_is_done() -> None:
    model = made("zoo")
    before = bits(model)

    fit = Fit(model, material(), replace(PART, epochs=0), where="r")
    fit.run()

    assert fit.is_done
    assert not changed(model, before)


@pytest.mark.parametrize("regime", ["frozen", "mixed"])
def test_a_network_without_early_exits_has_no_heads_to_train(regime: str) -> None:
    part = replace(PART, regime=regime, epochs=3)
    with pytest.raises(UsageError, match="nothing to train in phase heads"):
        Fit(Plain(), material(), part, where="r")


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("schedule", COURSES)
def test_the_learning_rate_never_leaves_its_range(
    schedule: str, warmup: float, batches: int
) -> None:
    given = material(16 * batches + 16)
    part = replace(PART, schedule=schedule, warmup=warmup, epochs=1)
    fit, rates = Fit(made("zoo"), given, part, where="r"), []

    fit.run(lambda step: rates.append(fit.schedule.get_last_lr()[0]))

    assert len(rates) == batches + 1
    assert all(0 < rate <= part.learning_rate for rate in rates)


def rates_of(part: TrainingPart, batches: int) -> list[float]:
    """The learning rate of every step of every epoch, without a network."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=part.learning_rate)
    course = COURSES[part.schedule].make(optimizer, part, part.epochs * batches)
    rates = []
    for _ in range(part.epochs * batches):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course.step()
    return rates


@pytest.mark.parametrize(
    ("epochs", "drops", "at"),
    [
        (100, (0.35, 0.6, 0.85), (35, 60, 85)),  # Shallow-Deep Networks
        (160, (0.5, 0.75), (80, 120)),  # EGP
        (190, (100 / 190, 150 / 190), (100, 150)),  # Pruning Everything
        (10, (), ()),
    ],
)
@pytest.mark.parametrize("batches", [1, 7, 376])
def test_in_steps_the_rate_falls_to_a_tenth_with_those_epochs(
    epochs: int, drops: tuple[float, ...], at: tuple[int, ...], batches: int
) -> None:
    part = TrainingPart(epochs=epochs, learning_rate=0.1, schedule="steps", drops=drops, warmup=0.0)
    rates = np.reshape(rates_of(part, batches), (epochs, batches))

    for epoch in range(epochs):
        wanted = 0.1 / 10 ** sum(epoch >= drop for drop in at)
        assert rates[epoch] == pytest.approx(np.full(batches, wanted), rel=1e-9), epoch


def test_a_warm_up_rises_in_a_line_before_the_steps() -> None:
    part = TrainingPart(epochs=10, learning_rate=1.0, schedule="steps", drops=(0.5,), warmup=0.4)
    assert rates_of(part, 1) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, *[0.1] * 5])


def test_each_phase_has_the_steps_to_itself() -> None:
    part = replace(
        PART,
        regime="mixed",
        epochs=6,
        phase_shares=(1.0, 1.0, 1.0),
        schedule="steps",
        drops=(0.5,),
        warmup=0.0,
    )
    fit, rates = Fit(made("zoo"), material(), part, where="r"), []
    while not fit.is_done:
        rates.append(fit.optimizer.param_groups[0]["lr"])
        fit.run_epoch()
    assert rates == pytest.approx([0.05, 0.005] * 3)


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        (replace(PART, schedule="cosine"), UsageError, "schedule of the learning rate"),
        (replace(PART, drops=(0.5,)), UsageError, "training.drops: the schedule one-cycle has"),
        (replace(PART, regime="jiont"), UsageError, "training regime"),
        (replace(PART, head_init="zeros"), UsageError, "exit heads"),
        (replace(PART, precision="float16"), UsageError, "precision of a training"),
        (replace(PART, exit_weights=(1.0, 1.0)), BadFile, "the network has 3 exits"),
        (replace(PART, phase_shares=(1.0, 1.0)), BadFile, "has 1 phases: all"),
        (replace(PART, batch=65), UsageError, "training.batch: found 65, but there are 64"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(
    part: TrainingPart, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Fit(made("zoo"), material(), part, where="r")


def test_a_network_for_other_samples_is_refused() -> None:
    model = zoo.resnet(channels=2, classes=3, size=[8, 8], stem=[4], widths=[4], blocks=[1])
    with pytest.raises(Unsupported, match="refuses"):
        Fit(model, material(), PART, where="r")


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", NETS)
def test_in_bfloat16_only_maps_of_the_training_are_short(name: str) -> None:
    model, seen = made(name), set()
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    layer.register_forward_hook(lambda module, given, out: seen.add((module.training, out.dtype)))
    fit = Fit(model, material(), replace(PART, precision="bfloat16"), where="r")
    seen.clear()
    fit.run()

    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for t in fit.state()["best_state"].values()} <= {torch.float32, torch.int64}


def test_bfloat16_learns_nearly_the_same_weights() -> None:
    start, models = made("zoo").state_dict(), [made("zoo"), made("zoo")]
    for model, precision in zip(models, ("float32", "bfloat16"), strict=True):
        Fit(model, material(), replace(PART, precision=precision), where="r").run()
    long, short = (
        torch.cat([(p - start[n]).detach().flatten() for n, p in model.named_parameters()])
        for model in models
    )

    assert not torch.equal(long, short)
    assert nn.functional.cosine_similarity(long, short, dim=0) > 0.99


# ---------------------------------------------------------------- losses


def test_equilibrium_changes_what_fitting_learns() -> None:
    models = [made("zoo"), made("zoo")]
    for model, flag in zip(models, (False, True), strict=True):
        Fit(model, material(), replace(PART, equilibrium=flag), where="r").run()

    assert changed(models[0], bits(models[1]))


def test_exits_of_weight_zero_learn_nothing() -> None:
    model = made("zoo")
    before = bits(model)

    part = replace(PART, exit_weights=(0.0, 1.0, 1.0), distillation=0.5)
    Fit(model, material(), part, where="r").run()

    moved = changed(model, before)
    assert "heads.0.linear.weight" not in moved
    assert {"heads.1.linear.weight", "heads.2.linear.weight"} <= moved


def test_heads_may_start_at_their_class_means() -> None:
    given, scores = material(160, 80), []
    for init in ("random", "class-means"):
        part = replace(PART, regime="frozen", head_init=init, learning_rate=1e-9, epochs=1)
        fit = Fit(made("attached"), given, part, where="r")
        fit.run()
        scores.append(fit.best_accuracies["exit0"])

    assert scores[1] > max(scores[0], 0.6)


# ---------------------------------------------------------------- influences


class Recorder(Influence):
    """Says in which order it is asked, and counts."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls, self.count = model, [], 0

    def penalty(self) -> Any:
        self.calls.append("penalty")
        assert all(p.grad is None or self.count for p in self.model.parameters())
        self.count += 1
        return 0.1 * self.model.linear.weight.square().sum()

    def after_backward(self) -> None:
        self.calls.append("backward")
        assert self.model.linear.weight.grad is not None
        self.weight = self.model.linear.weight.detach().clone()

    def after_step(self) -> None:
        self.calls.append("step")
        assert not torch.equal(self.model.linear.weight, self.weight)
        with torch.no_grad():
            self.model.linear.weight[0] = 0

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_an_influence_is_asked_in_order_and_has_the_last_word() -> None:
    model = Plain()
    influence = Recorder(model)

    fit = Fit(model, material(), replace(PART, epochs=1), where="r", influence=influence)
    fit.run()

    assert influence.calls == ["penalty", "backward", "step"] * fit.batches
    assert not model.linear.weight[0].any()
    assert model.linear.weight[1].any()


class Gradients(Influence):
    """Keeps the gradients of the first batch; *strength* times the weights' squares on top."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.model, self.strength, self.found = model, strength, {}

    def penalty(self) -> Any:
        if not self.strength:
            return None
        return self.strength * sum(weight.square().sum() for weight in self.model.parameters())

    def after_backward(self) -> None:
        if not self.found:
            self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            named = self.model.named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


def first_gradients(part: TrainingPart, strength: float = 0.0) -> Gradients:
    model = made("zoo")
    seen = Gradients(model, strength)
    Fit(model, material(), replace(part, epochs=1), where="r", influence=seen).run()
    return seen


@pytest.mark.parametrize("flag", [False, True])
def test_a_penalty_counts_in_full_whatever_scales_the_losses(flag: bool) -> None:
    part = replace(PART, equilibrium=flag)

    without, influenced = first_gradients(part), first_gradients(part, 3.0)

    for name, gradient in influenced.found.items():
        pull = gradient - without.found[name]
        assert torch.allclose(pull, 6.0 * influenced.weights[name], rtol=1e-3, atol=1e-4)


def test_exits_without_a_loss_do_not_count_in_the_equilibrium() -> None:
    names = ("stem.0.0.weight", "blocks.0.first.0.weight", "blocks.1.first.0.weight")
    tiny = (1e-30, 1.0, 1.0)
    plain = first_gradients(replace(PART, exit_weights=tiny)).found

    for weights, counts in ((tiny, (3, 2, 1)), ((0.0, 1.0, 1.0), (2, 2, 1))):
        part = replace(PART, exit_weights=weights, equilibrium=True)
        found = first_gradients(part).found
        for name, count in zip(names, counts, strict=True):
            assert torch.allclose(count * found[name], plain[name], rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("name", "course"),
    [("zoo", {}), ("attached", {}), ("zoo", {"schedule": "steps", "drops": (0.5, 0.9)})],
)
def test_going_on_from_any_epoch_ends_in_the_same_bits(name: str, course: dict[str, Any]) -> None:
    part = replace(
        PART,
        **course,
        regime="mixed",
        epochs=6,
        phase_shares=(1.0, 1.0, 1.0),
        patience=1,
        equilibrium=True,
        ramp=True,
        head_init="class-means",
    )
    whole, given = made(name), material()
    fit, states = Fit(whole, given, part, where="r"), []
    while not fit.is_done:
        fit.run_epoch()
        buffer = io.BytesIO()
        torch.save(fit.state(), buffer)
        states.append(buffer.getvalue())

    for state in states:
        torch.manual_seed(99)
        model = NETS[name]()
        later = Fit(model, given, part, where="r")
        later.load(torch.load(io.BytesIO(state), weights_only=True))
        later.run()
        assert not changed(model, bits(whole))
        assert later.best_accuracies == fit.best_accuracies
        assert later.epoch == fit.epoch


def test_what_an_influence_knows_travels_with_the_state() -> None:
    model = Plain()
    fit = Fit(model, material(), PART, where="r", influence=Recorder(model))
    fit.run_epoch()
    state = fit.state()

    other = Recorder(Plain())
    later = Fit(other.model, material(), PART, where="r", influence=other)
    later.load(state)

    assert other.count == fit.batches


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("phase"),
        lambda state: state.update(phase=9),
        lambda state: state.update(model={}),
        lambda state: state.pop("optimizer"),
        lambda state: state.update(best_state=3),
    ],
)
def test_a_damaged_state_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    fit = Fit(made("zoo"), material(), PART, where="r")
    fit.run_epoch()
    state = fit.state()
    damage(state)

    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        Fit(made("zoo"), material(), PART, where="r").load(state)


def test_nan_is_seen_in_the_batch_that_makes_it_and_moves_no_weight() -> None:
    given = material()
    samples = given.data.samples.reshape(-1, 64).astype(np.float32) / 255
    samples[given.training[0]] = np.nan
    data = replace(given.data, samples=samples)
    rows = Preprocess(kind="array", layout="as-is")
    broken = replace(given, data=data, preprocess=rows, augmentation=Augmentation())
    model, steps = DropoutHead(), []
    model.head = nn.Linear(6, 3)  # no batch statistics: they would take the NaN in

    with pytest.raises(
        UsageError, match=r"r: the loss became nan in epoch 1, batch (\d)"
    ) as caught:
        Fit(model, broken, PART, where="r").run(steps.append)

    assert str(caught.value).endswith(f"batch {len(steps) + 1}")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_weights_spoilt_by_the_last_step_are_not_kept() -> None:
    class Spoil(Influence):
        def after_step(self) -> None:
            with torch.no_grad():
                model.linear.weight[0, 0] = torch.inf

    model, given = Plain(), material(20, 4)

    with pytest.raises(UsageError, match=r"r: linear\.weight became NaN or infinite in epoch 1$"):
        Fit(model, given, PART, where="r", influence=Spoil()).run()
