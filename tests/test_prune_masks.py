"""Masks: shares are exact, zeros stay zeros through training and in the file."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgeexit.errors import BadFile, UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.feed import TrainingSet  # noqa: E402
from edgeexit.host.fit import Fit, Material  # noqa: E402
from edgeexit.host.graph import Graph, analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.prune.masks import (  # noqa: E402
    Masks,
    compressed_bytes,
    iterate,
    pool,
    random_masks,
    turns,
)
from edgeexit.host.prune.schedules import SCHEDULES  # noqa: E402
from edgeexit.host.recipe import Augmentation, TrainingPart  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

KWARGS = {
    "channels": 1,
    "classes": 3,
    "size": [8, 8],
    "stem": [8],
    "widths": [8, 16],
    "blocks": [2, 2],
    "exits": [2],
}
GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
laws = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def a_net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return zoo.resnet(**KWARGS).eval()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return analyse(a_net(), (1, 1, 8, 8))


def magnitudes(masks: Masks) -> dict[str, torch.Tensor]:
    return {name: masks.model.get_parameter(name).detach().abs() for name in masks.keeps}


def material() -> Material:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80)
    dark = labels[:, None, None, None] * 80
    samples = (dark + rng.integers(0, 60, (80, 8, 8, 1))).astype(np.uint8)
    return Material(
        data=TrainingSet(samples=samples, labels=labels, class_names=("a", "b", "c")),
        training=np.arange(60),
        holdout=np.arange(60, 80),
        preprocess=GRAY,
        augmentation=Augmentation(flip=True),
    )


def test_twenty_steps_of_ten_percent_leave_a_resnet_0_878_sparse() -> None:
    model = zoo.ZOO["resnet8"]()
    names = pool(analyse(model, (1, 3, 32, 32)), "all")
    masks = Masks.of(model, names)
    before = 1.0

    for gone in SCHEDULES["geometric"](1 - 0.9**20, 20):
        masks.thin(magnitudes(masks), gone)
        assert (1 - masks.gone) / before == pytest.approx(0.9, abs=1e-4)
        before = 1 - masks.gone

    weights = torch.cat([model.get_parameter(name).flatten() for name in names])
    assert len(weights) > 70_000
    assert float((weights == 0).double().mean()) == pytest.approx(0.878, abs=0.001)
    # Global, not layer by layer: hence unequal shares.
    shares = [row.zeros / row.weights for row in masks.report()]
    assert max(shares) - min(shares) > 0.2


@laws
@given(st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 99))
def test_global_magnitude_removes_the_smallest_of_all(
    graph: Graph, one: float, other: float, seed: int
) -> None:
    masks = Masks.of(a_net(seed), pool(graph, "all"))
    dense = torch.cat([score.flatten() for score in magnitudes(masks).values()])

    for gone in sorted((one, other)):
        masks.thin(magnitudes(masks), gone)

    kept = torch.cat([keep.flatten() for keep in masks.keeps.values()])
    assert int((~kept).sum()) == int(max(one, other) * len(dense) + 0.5)
    # The last weight of a tensor stays, however small it is.
    lonely = [torch.full((keep.numel(),), int(keep.sum()) == 1) for keep in masks.keeps.values()]
    chosen = dense[kept & ~torch.cat(lonely)]
    assert max(dense[~kept].tolist(), default=0) <= float(chosen.min())


def test_pools_are_the_backbone_and_the_early_exits_heads(graph: Graph) -> None:
    names = {name: pool(graph, name) for name in ("all", "backbone", "exits")}

    assert names["exits"] == ["heads.2.linear.weight"]
    assert "heads.4.linear.weight" in names["backbone"]
    assert sorted(names["backbone"] + names["exits"]) == sorted(names["all"])
    assert len(names["all"]) == len(graph.layers)
    with pytest.raises(UsageError, match="no pool of weights named 'exit'"):
        pool(graph, "exit")


@laws
@given(
    st.sampled_from(["uniform", "erk", "er", "global", "egp", "nepenthe"]),
    st.floats(0, 0.95),
    st.integers(0, 99),
)
def test_every_allocator_meets_the_share_and_empties_no_tensor(
    graph: Graph, allocator: str, gone: float, seed: int
) -> None:
    masks = Masks.of(a_net(seed), pool(graph, "all"))
    relevance = {name: 0.1 * (k + 1) for k, name in enumerate(masks.keeps)}

    masks.thin(magnitudes(masks), gone, allocator=allocator, relevance=relevance)

    total = sum(keep.numel() for keep in masks.keeps.values())
    zeros = {row.name: row.zeros for row in masks.report()}
    assert sum(zeros.values()) == int(gone * total + 0.5)
    assert all(keep.any() for keep in masks.keeps.values())
    for name, keep in masks.keeps.items():
        weight = masks.model.get_parameter(name).detach()
        assert torch.equal(weight != 0, keep)


def test_a_second_exponential_budget_counts_what_is_left(graph: Graph) -> None:
    masks = Masks.of(a_net(), pool(graph, "all"))
    relevance = {name: 1.0 for name in masks.keeps} | {"blocks.3.second.0.weight": 0.01}

    masks.thin(magnitudes(masks), 0.2, allocator="egp", relevance=relevance)
    first = {row.name: row.zeros for row in masks.report()}
    masks.thin(magnitudes(masks), 0.6, allocator="egp", relevance=relevance)
    second = {row.name: row.zeros for row in masks.report()}

    total = sum(keep.numel() for keep in masks.keeps.values())
    emptied = masks.keeps["blocks.3.second.0.weight"].numel() - 1
    assert first == dict.fromkeys(first, 0) | {"blocks.3.second.0.weight": round(0.2 * total)}
    assert second["blocks.3.second.0.weight"] == emptied
    assert sum(second.values()) == round(0.6 * total)


def test_zeros_stay_zeros_through_training_and_in_the_file(graph: Graph, tmp_path: Path) -> None:
    model = a_net()
    masks = Masks.of(model, pool(graph, "all"))
    masks.thin(magnitudes(masks), 0.8)
    before = {name: model.get_parameter(name).detach().clone() for name in masks.keeps}
    part = TrainingPart(epochs=2, learning_rate=0.1, batch=20, weight_decay=1e-2)

    fit = Fit(model, material(), part, where="test", influence=masks)
    fit.run()

    for name, keep in masks.keeps.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight[~keep], torch.zeros(int((~keep).sum())))
        assert (weight[keep] != before[name][keep]).any()
        momentum = fit.optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert torch.equal(momentum[~keep], torch.zeros(int((~keep).sum())))
    save_checkpoint(
        tmp_path / "sparse.pt",
        model=model,
        arch="edgeexit.host.zoo:resnet",
        kwargs=KWARGS,
        input_shape=[1, 1, 8, 8],
        class_names=["a", "b", "c"],
        preprocess=GRAY,
    )
    found = load_checkpoint(tmp_path / "sparse.pt").model
    again = Masks.of(found, list(masks.keeps), from_zeros=True)
    assert again.gone == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(again.keeps[name], keep) for name, keep in masks.keeps.items())


def test_without_the_masks_training_fills_the_zeros(graph: Graph) -> None:
    model = a_net()
    masks = Masks.of(model, pool(graph, "all"))
    masks.thin(magnitudes(masks), 0.8)

    Fit(model, material(), TrainingPart(epochs=1, learning_rate=0.1, batch=20), where="test").run()

    assert sum(row.zeros for row in masks.report()) < 0.1 * sum(r.weights for r in masks.report())


def test_an_interrupted_masked_training_goes_on_exactly(graph: Graph) -> None:
    part = TrainingPart(epochs=3, learning_rate=0.1, batch=20, seed=4)

    def begun() -> tuple[Masks, Fit]:
        masks = Masks.of(a_net(), pool(graph, "all"))
        masks.thin(magnitudes(masks), 0.7)
        return masks, Fit(masks.model, material(), part, where="test", influence=masks)

    whole, fit = begun()
    fit.run()
    _, fit = begun()
    fit.run_epoch()
    state = fit.state()
    resumed = Masks.of(a_net(), pool(graph, "all"))
    fit = Fit(resumed.model, material(), part, where="test", influence=resumed)
    fit.load(state)
    fit.run()

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_random_masks_have_erk_densities_and_depend_on_the_seed_alone(graph: Graph) -> None:
    names = pool(graph, "all")
    one, same, other = (random_masks(a_net(), names, density=0.3, seed=seed) for seed in (1, 1, 2))

    assert all(torch.equal(one.keeps[name], same.keeps[name]) for name in names)
    assert any(not torch.equal(one.keeps[name], other.keeps[name]) for name in names)
    densities = {name: float(keep.double().mean()) for name, keep in one.keeps.items()}
    assert densities["stem.0.0.weight"] > 0.9 > densities["blocks.3.second.0.weight"]
    free = [name for name in names if densities[name] < 0.95]
    shapes = {name: one.keeps[name].shape for name in free}
    epsilons = [densities[n] * shapes[n].numel() / sum(shapes[n]) for n in free]
    assert max(epsilons) / min(epsilons) < 1.05
    assert len(free) > 4


# ---------------------------------------------------------------- before training


def gradient_saliency(model: torch.nn.Module, seen: list[int] | None = None):
    """|dense weight * gradient of the masked network|, summed over the batches."""

    def score(masks, batches):
        dense = {n: model.get_parameter(n).detach().clone() for n in masks}
        sums = {name: torch.zeros_like(weight) for name, weight in dense.items()}
        for inputs, labels in batches:
            if seen is not None:
                seen.append(int(labels[0]))
            sparse = {n: (w * masks[n]).requires_grad_() for n, w in dense.items()}
            logits = torch.func.functional_call(model, sparse, (inputs,))
            loss = sum(torch.nn.functional.cross_entropy(one, labels) for one in logits)
            grads = torch.autograd.grad(loss, list(sparse.values()))
            for name, grad in zip(sparse, grads, strict=True):
                sums[name] += (dense[name] * grad).abs()
        return sums

    return score


def some_batches(count: int):
    return [(torch.randn(4, 1, 8, 8), torch.tensor([k % 3] * 4)) for k in range(count)]


@pytest.mark.parametrize("come_back", [True, False])
def test_weights_come_back_in_force_and_stay_out_in_iter_snip(
    graph: Graph, come_back: bool
) -> None:
    model = a_net()
    masks = Masks.of(model, pool(graph, "all"))
    dense = {name: model.get_parameter(name).detach().clone() for name in masks.keeps}
    saliency, seen = gradient_saliency(model), []

    def watched(keeps, batches):
        assert all(torch.equal(model.get_parameter(n), w) for n, w in dense.items())
        seen.append(torch.cat([keep.flatten() for keep in keeps.values()]))
        return saliency(keeps, batches)

    torch.manual_seed(1)
    shares = SCHEDULES["exponential"](0.9, 8)
    iterate(masks, watched, shares, some_batches(8), come_back=come_back)

    final = torch.cat([keep.flatten() for keep in masks.keeps.values()])
    steps = [*seen, final]
    total = len(final)
    assert [int((~one).sum()) for one in steps] == [0, *(int(s * total + 0.5) for s in shares)]
    returned = any((~a & b).any() for a, b in pairwise(steps))
    assert returned == come_back
    for name, keep in masks.keeps.items():
        assert torch.equal(model.get_parameter(name).detach(), dense[name] * keep)


def test_the_data_do_not_begin_again_at_every_step(graph: Graph) -> None:
    model, seen = a_net(), []
    masks = Masks.of(model, pool(graph, "all"))

    iterate(
        masks,
        gradient_saliency(model, seen),
        [0.1, 0.2, 0.3, 0.4],
        some_batches(3),
        each=2,
        come_back=False,
    )

    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(UsageError, match="expected 1 or more"):
        next(turns([], 1))


# ---------------------------------------------------------------- refusals and sizes


def test_what_cannot_be_is_refused(graph: Graph) -> None:
    masks = Masks.of(a_net(), pool(graph, "all"))
    scores = magnitudes(masks)
    masks.thin(scores, 0.5)

    with pytest.raises(UsageError, match=r"0\.5000 of the weights are gone, asked for 0\.4"):
        masks.thin(scores, 0.4)
    with pytest.raises(UsageError, match="empty a layer"):
        masks.thin(scores, 1.0)
    with pytest.raises(UsageError, match="no allocator for single weights named 'latency'"):
        masks.thin(scores, 0.6, allocator="latency")
    with pytest.raises(UsageError, match="has no relevance"):
        masks.thin(scores, 0.6, allocator="egp")
    name = next(iter(scores))
    with pytest.raises(UsageError, match=f"scores of {name}: found none"):
        masks.thin({}, 0.6)
    with pytest.raises(UsageError, match="NaN"):
        masks.thin(scores | {name: scores[name] * float("nan")}, 0.6)
    with pytest.raises(UsageError, match="no weight tensor named 'stem'"):
        Masks.of(a_net(), ["stem"])
    with pytest.raises(UsageError, match=f"mask of {name}"):
        Masks(a_net(), {name: torch.ones(3).bool()})
    with pytest.raises(BadFile, match="masks"):
        masks.load({"keeps": {name: torch.ones(3).bool()}})


def test_zeros_make_the_compressed_file_smaller_and_nothing_else(graph: Graph) -> None:
    model = a_net()
    dense = compressed_bytes(model)
    masks = Masks.of(model, pool(graph, "all"))
    masks.thin(magnitudes(masks), 0.9)

    assert compressed_bytes(model) < 0.5 * dense
    count = sum(weight.numel() for weight in model.parameters())
    assert 0.9 * count < dense < 2 * count
    outputs = exit_outputs(model, torch.randn(2, 1, 8, 8))
    assert all(bool(torch.isfinite(logits).all()) for logits in outputs.values())
