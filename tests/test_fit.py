"""Fitting: each phase moves what it names and nothing else, and an interruption changes nothing."""

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.errors import BadFile, Unsupported, UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.feed import TrainingSet, split_holdout  # noqa: E402
from edgeexit.host.fit import Fit, Influence, Material, Step, holdout_accuracies  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.losses import equilibrium, exit_loss, ramped  # noqa: E402
from edgeexit.host.model import attach, exit_outputs  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
from edgeexit.host.recipe import Augmentation, TrainingPart  # noqa: E402
from edgeexit.host.regimes import REGIMES, plan  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402
from tests.host_nets import ConvNet  # noqa: E402

pytestmark = pytest.mark.host

GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
PART = TrainingPart(epochs=2, learning_rate=0.05, batch=16, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def material(count: int = 80, holdout: int = 16, seed: int = 0) -> Material:
    """Pictures of 8x8 whose class is their brightness."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    pictures = labels[:, None, None, None] * 90 + random.integers(0, 60, (count, 8, 8, 1))
    training, held = split_holdout(count, holdout, seed)
    return Material(
        data=TrainingSet(
            samples=pictures.astype(np.uint8),
            labels=labels.astype(np.int64),
            class_names=("dark", "middle", "bright"),
        ),
        training=training,
        holdout=held,
        preprocess=GRAY,
        augmentation=Augmentation(shift=1),
    )


def zoo_net() -> nn.Module:
    """Three exits, the first one's head with a convolution and batch norm of its own."""
    return zoo.resnet(
        channels=1,
        classes=3,
        size=[8, 8],
        stem=[4],
        widths=[4, 8],
        blocks=[1, 1],
        exits=[0, 1],
        heads=[[4], []],
    )


class Plain(nn.Module):
    """One exit; with dropout, so that a training draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.linear(self.drop(self.second(self.first(x)).mean((2, 3))))


def attached() -> nn.Module:
    return attach(Plain(), ["first"], input_shape=(1, 1, 8, 8))


class DropoutHead(nn.Module):
    """A head that begins with dropout and holds a batch norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 6)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
        self.unused = nn.Linear(2, 2)
        self.final = nn.Linear(6, 3)

    def forward(self, x: Any) -> list[Any]:
        features = torch.relu(self.body(x.flatten(1)))
        return [self.head(features), self.final(features)]


NETS: dict[str, Callable[[], nn.Module]] = {
    "zoo": zoo_net,
    "attached": attached,
    "foreign": lambda: ConvNet(3),
    "dropout": DropoutHead,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, bytes]) -> set[str]:
    return {name for name, value in bits(model).items() if value != before[name]}


# ---------------------------------------------------------------- what an exit needs


@pytest.mark.parametrize("name", ["zoo", "attached", "foreign"])
def test_early_heads_are_those_of_the_graph(name: str) -> None:
    model = made(name)

    found = needs(model, torch.zeros(1, 1, 8, 8)).head_modules()

    heads = analyse(model, (1, 1, 8, 8)).heads
    kinds = nn.Conv2d | nn.Linear
    layers = {n for n in found if isinstance(model.get_submodule(n), kinds)}
    assert layers == {layer for exit in list(heads)[:-1] for layer in heads[exit]}


def test_looking_at_a_network_leaves_it_as_it_was() -> None:
    model = made("dropout")
    model.train()
    model.final.bias.requires_grad_(False)
    before = bits(model)

    found = needs(model, torch.zeros(1, 1, 8, 8))

    assert not changed(model, before)
    assert model.training
    assert model.head[0].training
    assert not model.final.bias.requires_grad
    assert found.parameters["body.weight"] == {"exit0", "exit1"}
    assert found.parameters["unused.weight"] == frozenset()
    assert {"head", "head.0", "head.1", "head.2"} == found.head_modules()


# ---------------------------------------------------------------- regimes


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_backbone_does_not_move_by_a_single_bit(name: str) -> None:
    model = made(name)
    before, given = bits(model), material()
    inputs = given.inputs(given.holdout)
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


@settings(max_examples=25, deadline=None)
@given(
    epochs=st.integers(0, 200),
    shares=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
)
def test_the_phases_share_the_epochs(epochs: int, shares: list[int]) -> None:
    part = replace(PART, regime="mixed", epochs=epochs, phase_shares=tuple(map(float, shares)))
    used = [share for share in shares if share]
    if 0 < epochs < len(used):
        with pytest.raises(BadFile, match="phases"):
            plan(part, "r")
        return

    counts = [count for _, count in plan(part, "r")]

    assert sum(counts) == epochs
    wanted = [epochs * share / sum(used) for share in used]
    if epochs and min(wanted) >= 1:
        assert all(abs(a - b) < 1 for a, b in zip(counts, wanted, strict=True))
    assert all(count >= 1 for count in counts)


@pytest.mark.parametrize("regime", REGIMES)
def test_patience_ends_a_phase_and_brings_its_best_weights_back(regime: str) -> None:
    given = material(160, 80)
    part = replace(PART, regime=regime, epochs=60, patience=2)
    model, steps = made("zoo"), []
    fit = Fit(model, given, part, where="r")

    fit.run(steps.append)

    ends = [step for step in steps if step.accuracies is not None]
    last = [step for step in ends if step.phase == ends[-1].phase]
    assert [step.is_best for step in last[-2:]] == [False, False] or len(ends) == 60
    assert len(ends) < 60
    assert fit.epoch == len(ends)
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
def test_the_learning_rate_never_leaves_its_range(warmup: float, batches: int) -> None:
    given = material(16 * batches + 16)
    part = replace(PART, warmup=warmup, epochs=1)
    fit, rates = Fit(made("zoo"), given, part, where="r"), []

    fit.run(lambda step: rates.append(fit.schedule.get_last_lr()[0]))

    assert len(rates) == batches + 1
    assert all(0 < rate <= part.learning_rate for rate in rates)


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        (replace(PART, regime="jiont"), UsageError, "training regime"),
        (replace(PART, head_init="zeros"), UsageError, "exit heads"),
        (replace(PART, exit_weights=(1.0, 1.0)), BadFile, "the network has 3 exits"),
        (replace(PART, phase_shares=(1.0, 1.0)), BadFile, "has 1 phases: all"),
        (replace(PART, batch=65), UsageError, "fewer training samples"),
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


# ---------------------------------------------------------------- losses


class Chain(nn.Module):
    """N blocks in a row with a head after each, as the laws of gradient scaling assume."""

    def __init__(self, exits: int, scaled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(exits))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(exits))
        self.scaled = scaled

    def forward(self, x: Any) -> list[Any]:
        logits, count = [], len(self.blocks)
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = torch.tanh(block(x))
            if self.scaled:
                x = Scaled.apply(x, 1 / (count - i))
            logits.append(head(x))
            if self.scaled:
                x = Scaled.apply(x, float(count - i - 1))
        return logits


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: float) -> Any:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return ctx.scale * gradient, None


@settings(max_examples=20, deadline=None)
@given(
    exits=st.integers(1, 5),
    seed=st.integers(0, 1000),
    distillation=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_equilibrium_is_the_scaling_of_the_paper(
    exits: int, seed: int, distillation: float, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=exits, max_size=exits))
    torch.manual_seed(seed)
    ours, papers = Chain(exits, False), Chain(exits, True)
    papers.load_state_dict(ours.state_dict())
    inputs, labels = torch.randn(6, 4), torch.randint(0, 3, (6,))
    part = replace(PART, distillation=distillation)

    for model in (ours, papers):
        exit_loss(model(inputs), labels, weights, part).backward()
    equilibrium(ours, needs(ours, inputs).parameters)

    for (name, one), other in zip(ours.named_parameters(), papers.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_equilibrium_changes_what_fitting_learns() -> None:
    models = [made("zoo"), made("zoo")]
    for model, flag in zip(models, (False, True), strict=True):
        Fit(model, material(), replace(PART, equilibrium=flag), where="r").run()

    assert changed(models[0], bits(models[1]))


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5),
    epochs=st.integers(1, 50),
)
def test_the_ramp_grows_to_the_weights_and_spares_the_final_exit(
    weights: list[float], epochs: int
) -> None:
    rows = [ramped(weights, epoch, epochs) for epoch in range(1, epochs + 1)]

    assert rows[-1] == weights
    for earlier, later in pairwise(rows):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))
        assert earlier[-1] == weights[-1]
    assert all(a <= w for row in rows for a, w in zip(row, weights, strict=True))


def test_the_ramp_is_the_one_of_the_paper() -> None:
    # tau_max 0.15, 0.9 in epoch 3 of 10: 0.01 + 0.3 * tau_max.
    assert ramped([0.15, 0.9, 1.0], 3, 10) == pytest.approx([0.055, 0.28, 1.0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 10))
def test_distillation_is_at_rest_where_student_and_teacher_agree(
    seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator)
    student, teacher = (logits.clone().requires_grad_() for _ in range(2))
    labels = torch.randint(0, 4, (5,), generator=generator)
    part = replace(PART, distillation=1.0, distillation_temperature=temperature)

    both = exit_loss([student, teacher], labels, [1.0, 1.0], part)
    alone = exit_loss([student, teacher], labels, [1.0, 1.0], PART)
    pulls = torch.autograd.grad(both - alone, [student, teacher], allow_unused=True)

    assert torch.allclose(pulls[0], torch.zeros_like(logits), atol=1e-5)
    assert float(torch.zeros(()) if pulls[1] is None else pulls[1].abs().max()) < 1e-6


def test_a_temperature_keeps_the_size_of_the_pull() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
    labels = torch.zeros(64, dtype=torch.int64)
    pulls = []
    for temperature in (50.0, 100.0):
        part = replace(PART, distillation=1.0, distillation_temperature=temperature)
        loss = exit_loss([student, teacher], labels, [1.0, 1.0], part)
        loss = loss - exit_loss([student, teacher], labels, [1.0, 1.0], PART)
        pulls.append(torch.autograd.grad(loss, student)[0])

    # Hinton et al. 2015, equation 4: in the limit (z - v) / classes for logits of mean zero.
    centred = [t - t.mean(1, keepdim=True) for t in (student.detach(), teacher)]
    limit = (centred[0] - centred[1]) / 10 / 64
    far, near = (float((pull - limit).norm() / limit.norm()) for pull in pulls)
    assert near < 0.02
    assert far / near == pytest.approx(2, rel=0.1)


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


@pytest.mark.parametrize("flag", [False, True])
def test_a_penalty_moves_weights_whatever_scales_the_losses(flag: bool) -> None:
    class Huge(Influence):
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def penalty(self) -> Any:
            return 10 * self.model.stem[0][0].weight.square().sum()

    norms = []
    for influenced in (False, True):
        model = made("zoo")
        part = replace(PART, equilibrium=flag, learning_rate=0.01)
        influence = Huge(model) if influenced else None
        Fit(model, material(), part, where="r", influence=influence).run()
        norms.append(float(model.stem[0][0].weight.detach().norm()))

    assert norms[1] < 0.7 * norms[0]


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("name", ["zoo", "attached"])
def test_going_on_from_any_epoch_ends_in_the_same_bits(name: str) -> None:
    part = replace(
        PART,
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
