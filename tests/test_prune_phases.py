"""Phases: what each paper promises before a removal, seen on a small network that can learn."""

import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.feed import TrainingSet, split_holdout  # noqa: E402
from edgeexit.host.fit import Fit, holdout_accuracies  # noqa: E402
from edgeexit.host.graph import Graph, analyse  # noqa: E402
from edgeexit.host.material import Material  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.prune.growing import Growing, GrowthOptions  # noqa: E402
from edgeexit.host.prune.identity import max_sliced_wasserstein  # noqa: E402
from edgeexit.host.prune.phases import PHASES, Facts, Phase  # noqa: E402
from edgeexit.host.recipe import Augmentation, TrainingPart  # noqa: E402
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

SHAPE = (1, 1, 8, 8)
GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
PART = TrainingPart(epochs=3, learning_rate=0.05, batch=16, seed=1)


def waves(count: int, holdout: int) -> Material:
    """Noisy waves of four directions: no single pixel tells the class."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, count)
    y, x = np.mgrid[0:8, 0:8]
    clean = np.stack([np.sin(a * x + b * y) for a, b in ((1.5, 0), (0, 1.5), (1, 1), (1, -1))])
    pictures = np.clip(128 + 60 * clean[labels] + random.normal(0, 40, (count, 8, 8)), 0, 255)
    training, held = split_holdout(count, holdout, 0)
    return Material(
        data=TrainingSet(
            samples=pictures.astype(np.uint8)[..., None],
            labels=labels.astype(np.int64),
            class_names=("across", "down", "rising", "falling"),
        ),
        training=training,
        holdout=held,
        preprocess=GRAY,
        augmentation=Augmentation(),
    )


MATERIAL = waves(320, 64)
STEPS = 16  # batches of an epoch


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return zoo.resnet(channels=1, classes=4, size=[8, 8], stem=[8], widths=[8, 16], blocks=[2, 2])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Graph]:
    """A network that is right about every held-out sample, and its graph."""
    torch.set_num_threads(1)
    model = new_net()
    fit(model, None, PART)
    assert min(holdout_accuracies(model, MATERIAL).values()) == 1.0
    return model, GRAPH


@pytest.fixture(scope="module")
def trained_on(trained: tuple[nn.Module, Graph]) -> nn.Module:
    """The same network after as much training as a phase gets, without one."""
    model = copy.deepcopy(trained[0])
    fit(model, None, replace(PART, epochs=4))
    return model


def fit(model: nn.Module, phase: Phase | None, part: TrainingPart, material: Any = MATERIAL) -> Fit:
    work = Fit(model, material, part, where="test", influence=phase)
    work.run()
    return work


def after(
    name: str, trained: tuple[nn.Module, Graph], *, epochs: int = 4, rate: float = 0.05, **options
) -> tuple[nn.Module, Phase]:
    """A copy of the trained network after the phase *name*, in eval mode."""
    model, graph = copy.deepcopy(trained[0]), trained[1]
    facts = Facts(model=model, graph=graph, iterations=epochs * STEPS, options=options)
    phase = PHASES[name](facts)
    fit(model, phase, replace(PART, epochs=epochs, learning_rate=rate))
    return model.eval(), phase


def answers(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat(list(exit_outputs(model, MATERIAL.inputs(MATERIAL.holdout)).values()))


GRAPH = analyse(new_net(), SHAPE)


def facts(**changes: Any) -> Facts:
    return replace(Facts(model=new_net(), graph=GRAPH), **changes)


# ---------------------------------------------------------------- growing regularization


def backward(model: nn.Module) -> None:
    images = MATERIAL.inputs(MATERIAL.training[:8])
    model.zero_grad()
    sum(logits.sum() for logits in exit_outputs(model, images).values()).backward()


def test_the_factor_acts_on_the_chosen_units_alone() -> None:
    start = facts(options={"delta": 0.25, "every": 1})
    units = {"blocks.0.first.0": np.array([1, 5])}
    phase = PHASES["greg-1"](replace(start, units=units))
    backward(start.model)
    before = {n: p.grad.clone() for n, p in start.model.named_parameters()}

    phase.after_backward()

    touched = {"blocks.0.first.0.weight", "blocks.0.first.1.weight", "blocks.0.first.1.bias"}
    for name, weight in start.model.named_parameters():
        added = weight.grad - before[name]
        expected = torch.zeros_like(added)
        if name in touched:
            expected[[1, 5]] = 0.25 * weight.detach()[[1, 5]]
        assert torch.allclose(added, expected, atol=1e-6), name


def test_the_factor_grows_as_published() -> None:
    start = facts(units={"blocks.0.first.0": np.array([0])})
    phase = Growing(start, "greg-1", picks=False)
    backward(start.model)

    seen = []
    for _ in range(31):
        phase.after_backward()
        seen.append(float(phase.factors["blocks.0.first.0"][0]))

    assert seen[0] == seen[9] == pytest.approx(1e-4)
    assert seen[10] == pytest.approx(2e-4)
    assert seen[30] == pytest.approx(4e-4)
    assert float(phase.factors["blocks.0.first.0"][1:].abs().max()) == 0


def test_growth_ends_when_kept_units_are_far_larger() -> None:
    start = facts(units={"blocks.0.first.0": np.array([0])}, options={"delta": 0.1, "every": 1})
    start.model.get_submodule("blocks.0.first.0").weight.data[0] *= 1e-4
    phase = Growing(start, "greg-1", picks=False)
    backward(start.model)

    for _ in range(3):
        phase.after_backward()

    assert float(phase.factors["blocks.0.first.0"][0]) == pytest.approx(0.1)


def test_a_growth_that_has_ended_does_not_begin_again_after_a_resume() -> None:
    start = facts(units={"blocks.0.first.0": np.array([0])}, options={"delta": 0.1, "every": 1})
    start.model.get_submodule("blocks.0.first.0").weight.data[0] *= 1e-4
    first = Growing(start, "greg-1", picks=False)
    backward(start.model)
    first.after_backward()
    start.model.get_submodule("blocks.0.first.0").weight.data[0] *= 1e4
    second = Growing(start, "greg-1", picks=False)
    second.load(first.state())

    for phase in (first, second):
        phase.after_backward()
        assert float(phase.factors["blocks.0.first.0"][0]) == pytest.approx(0.1)


@given(st.integers(2, 3000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_growth_fitted_to_a_phase_ends_before_it_does(iterations: int, picks: bool) -> None:
    start = FITTED
    units = {"blocks.0.first.0": np.array([0, 3])}
    phase = Growing(replace(start, units=units, iterations=iterations), "greg", picks=picks)
    ends = []
    for iteration in range(iterations):
        if iteration % phase.every == 0:
            phase._grow("blocks.0.first.0")
        if "blocks.0.first.0" in phase.finished:
            ends.append(iteration)

    factors = phase.factors["blocks.0.first.0"]
    assert float(factors.max()) == GrowthOptions().limit
    assert not picks or float(factors.min()) == GrowthOptions().recover
    if iterations >= 100:
        assert 0.6 * iterations < ends[0] <= 0.95 * iterations


FITTED = facts()


def test_greg_2_grows_on_all_units_then_chooses_by_magnitude() -> None:
    options = {"share": 0.25, "pick_delta": 0.01, "pick_limit": 0.02, "every": 1, "delta": 0.5}
    start = facts(options=options)
    phase = Growing(start, "greg-2", picks=True)
    backward(start.model)
    name = "blocks.2.first.0"

    phase.after_backward()
    assert phase.picked == {}
    assert set(phase.factors[name].tolist()) == {0.01}
    smallest = [3, 7, 8, 12]
    start.model.get_submodule(name).weight.data[smallest] *= 0.1
    phase.after_backward()
    phase.after_backward()

    assert phase.chosen()[name].tolist() == smallest
    kept = [k for k in range(16) if k not in smallest]
    assert set(phase.factors[name][kept].tolist()) == {-1e-4}
    assert phase.factors[name][smallest].tolist() == pytest.approx([0.52] * 4)
    assert np.argsort(phase.scores()[name])[:4].tolist() == pytest.approx(
        sorted(smallest, key=lambda k: phase.scores()[name][k])
    )


@pytest.mark.parametrize("name", ["greg-1", "greg-2"])
def test_what_greg_pushed_away_is_hardly_missed(
    name: str, trained: tuple[nn.Module, Graph], trained_on: nn.Module
) -> None:
    model, phase = after(name, trained, share=0.5)
    chosen = phase.chosen()

    assert isinstance(phase, Growing)
    sizes = {group: phase._ratio(group) for group in chosen}
    assert min(sizes.values()) > 8, sizes  # about 1.1 where nothing pushes
    grown = change(model, trained[1], chosen)
    assert grown < 0.3 * change(copy.deepcopy(trained_on), trained[1], chosen)
    assert min(holdout_accuracies(model, MATERIAL).values()) >= 0.85


def change(model: nn.Module, graph: Graph, chosen: dict[str, np.ndarray]) -> float:
    """Remove *chosen*; how much that changes the answers to the held-out samples."""
    before = answers(model)
    remove_units(model, graph, chosen)
    return float((answers(model) - before).abs().mean())


# ---------------------------------------------------------------- polarized gates


def test_polarized_gates_agree_on_one_static_network(trained: tuple[nn.Module, Graph]) -> None:
    model, phase = after("polarization", trained, rate=0.02, share=0.3)
    gates = np.concatenate(list(phase.scores().values()))
    chosen = phase.chosen()
    gated, accuracies = answers(model), holdout_accuracies(model, MATERIAL)

    assert float((gates * (1 - gates)).mean()) < 0.08  # 0.25 where samples disagree
    closed = sum(map(len, chosen.values())) / len(gates)
    assert closed == pytest.approx(0.3, abs=0.12)
    assert np.mean(list(accuracies.values())) > 0.8
    phase.close()
    remove_units(model, trained[1], chosen)
    assert torch.allclose(gated, answers(model), atol=1e-4)


def test_without_polarization_samples_go_on_disagreeing(trained: tuple[nn.Module, Graph]) -> None:
    _, phase = after("polarization", trained, epochs=2, rate=0.02, polarize=0.0)
    gates = np.concatenate(list(phase.scores().values()))

    assert float((gates * (1 - gates)).mean()) > 0.15


def test_a_closed_gate_on_a_block_is_its_removal(trained: tuple[nn.Module, Graph]) -> None:
    model, phase = after("polarization", trained, epochs=3, rate=0.02, over=2, sparsity=1.0)
    gated, distances = answers(model), phase.distances()

    closed = [name for name, openness in distances.items() if openness < 0.5]
    assert closed and list(distances.values()) == sorted(distances.values())
    assert all(openness < 0.1 or openness > 0.9 for openness in distances.values())
    phase.close()
    for name in closed:
        remove_block(model, trained[1], name)
    assert torch.allclose(gated, answers(model), atol=1e-4)


def test_open_gates_change_no_answer_and_leave_no_hook(trained: tuple[nn.Module, Graph]) -> None:
    model = copy.deepcopy(trained[0])
    before = answers(model)
    phase = PHASES["polarization"](Facts(model=model, graph=trained[1], options={"over": 3}))

    assert torch.equal(before, answers(model))
    phase.close()
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_gates_stand_on_the_units_named_alone() -> None:
    units = {"blocks.2.first.0": np.arange(4)}
    phase = PHASES["polarization"](facts(units=units))

    assert list(phase.scores()) == ["blocks.2.first.0"]
    assert phase.open_share == 0.75


def test_one_unit_of_a_group_always_stays(trained: tuple[nn.Module, Graph]) -> None:
    model, phase = after("polarization", trained, epochs=3, share=1.0, sparsity=20.0)

    chosen = phase.chosen()
    assert chosen
    assert all(len(units) < trained[1].groups[name].size for name, units in chosen.items())
    remove_units(model, trained[1], chosen)


# ---------------------------------------------------------------- blocks made identities


numbers = st.floats(-10, 10, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), st.randoms(), st.data())
@settings(max_examples=25, deadline=None)
def test_the_distance_is_one_of_distributions(rows: list, random: Any, data: Any) -> None:
    one = torch.tensor(rows)
    other = torch.tensor(
        data.draw(st.lists(st.tuples(numbers, numbers), min_size=len(rows), max_size=len(rows)))
    )
    directions = torch.nn.functional.normalize(torch.randn(2, 20), dim=0)
    shuffled = one[random.sample(range(len(rows)), len(rows))]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(max_sliced_wasserstein(a, b, directions))

    assert distance(one, shuffled) == pytest.approx(0, abs=1e-5)
    assert distance(one, other) == pytest.approx(distance(other, one), abs=1e-5)
    moved = distance(one + 3, other + 3)
    assert moved == pytest.approx(distance(one, other), rel=1e-3, abs=1e-3)
    assert distance(3 * one, 3 * other) == pytest.approx(3 * distance(one, other), abs=1e-4)


def test_a_shift_is_as_far_as_it_is_long() -> None:
    one = torch.randn(16, 3, 2)
    shift = torch.zeros(3, 2)
    shift[0, 0] = 5.0
    assert float(max_sliced_wasserstein(one, one + shift, torch.eye(6))) == pytest.approx(5.0)


def test_blocks_come_closer_to_identity_under_the_regularizer(
    trained: tuple[nn.Module, Graph],
) -> None:
    _, plain = after("block-identity", trained, epochs=1, weight=0.0)
    model, phase = after("block-identity", trained, weight=3.0)

    before, now = plain.distances(), phase.distances()
    assert list(now.values()) == sorted(now.values())
    assert set(now) == set(trained[1].blocks)
    assert all(now[name] < 0.4 * before[name] for name in now), (before, now)
    phase.close()
    # Without any retraining: the first block of all, which the plain network cannot do without.
    without, trained_without = model, copy.deepcopy(trained[0])
    remove_block(without, trained[1], "blocks.0")
    remove_block(trained_without, trained[1], "blocks.0")
    assert min(holdout_accuracies(without, MATERIAL).values()) > 0.8
    assert max(holdout_accuracies(trained_without, MATERIAL).values()) < 0.7


def test_each_batch_is_projected_anew_and_judging_leaves_no_trace() -> None:
    start = facts()
    phase = PHASES["block-identity"](start)
    images = MATERIAL.inputs(MATERIAL.training[:8])

    def penalty() -> float:
        start.model(images)
        return float(phase.penalty().detach())

    start.model.eval()
    same, again = penalty(), penalty()
    phase.after_step()
    assert same == again != penalty()
    with torch.no_grad():
        start.model(images)
    assert phase.penalty() is None


def test_a_network_without_blocks_has_no_identities_to_learn() -> None:
    net = zoo.dscnn(classes=3, width=8, blocks=2, exits=[1])
    start = Facts(model=net, graph=analyse(net, (1, 1, 12, 10)))
    with pytest.raises(UsageError, match="no block"):
        PHASES["block-identity"](start)


# ---------------------------------------------------------------- all of them

SETTINGS: dict[str, dict[str, Any]] = {
    "greg-1": {"share": 0.5},
    "greg-2": {"share": 0.5},
    "polarization": {"over": 3},
    "block-identity": {},
}
SMALL = replace(MATERIAL, training=MATERIAL.training[:64], holdout=MATERIAL.holdout[:16])


@pytest.mark.parametrize("name", PHASES)
def test_an_interrupted_phase_goes_on_to_the_same_weights(name: str) -> None:
    def begin() -> tuple[nn.Module, Phase, Fit]:
        start = facts(iterations=12, options=SETTINGS[name])
        phase = PHASES[name](start)
        work = Fit(start.model, SMALL, PART, where="test", influence=phase)
        return start.model, phase, work

    whole, first, work = begin()
    work.run()
    _, _, broken = begin()
    broken.run_epoch()
    buffer = io.BytesIO()
    torch.save(broken.state(), buffer)
    again, second, resumed = begin()
    buffer.seek(0)
    resumed.load(torch.load(buffer, weights_only=True))
    resumed.run()

    state = whole.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    assert {n: u.tolist() for n, u in first.chosen().items()} == {
        n: u.tolist() for n, u in second.chosen().items()
    }
    assert {n: s.tolist() for n, s in first.scores().items()} == {
        n: s.tolist() for n, s in second.scores().items()
    }
    assert first.distances() == second.distances()


@pytest.mark.parametrize("name", PHASES)
def test_the_last_epoch_is_kept(name: str) -> None:
    start = facts(iterations=12, options=SETTINGS[name])
    work = fit(start.model, PHASES[name](start), PART, SMALL)

    assert work.best_epoch == PART.epochs


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("greg-1", {}, "neither units nor the option share"),
        ("greg-1", {"shares": 0.5}, "no option of the phase greg-1 named 'shares'"),
        ("greg-2", {"share": 1.5}, "share: found 1.5, expected a number in 0..1"),
        ("greg-1", {"share": 0.5, "every": 1.5}, "every: found 1.5, expected a whole number"),
        ("greg-1", {"share": 0.5, "every": True}, "every: found True"),
        ("polarization", {"rate": float("nan")}, "rate: found nan"),
        ("polarization", {"over": 4}, "over: found 4"),
        ("block-identity", {"weight": "5"}, "weight: found '5'"),
        ("block-identity", {"weight": float("inf")}, "weight: found inf"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PHASES[name](replace(FITTED, options=options))


def test_units_that_are_not_there_or_are_all_of_a_group_are_refused() -> None:
    with pytest.raises(UsageError, match="no group of channels named 'x'"):
        replace(FITTED, units={"x": np.array([0])})
    with pytest.raises(UsageError, match=r"all 8 units of blocks.0.first.0 would go"):
        PHASES["greg-1"](replace(FITTED, units={"blocks.0.first.0": np.arange(8)}))
