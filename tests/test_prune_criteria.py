"""Criteria: each does what its paper says, tells the dead from the living, and leaves no trace."""

import copy
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.graph import Graph, Group, analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.prune.ablation import bypassed  # noqa: E402
from edgeexit.host.prune.criteria import CRITERIA  # noqa: E402
from edgeexit.host.prune.evidence import Evidence  # noqa: E402
from edgeexit.host.prune.saliency import effective_rank, gated, weighted_loss  # noqa: E402
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402

pytestmark = pytest.mark.host

NAMES = {
    *("random", "l1", "l2", "bn-gamma", "taylor", "kl", "cka", "state-entropy"),
    *("bn-statistics", "magnitude", "crop-s", "snip", "force"),
}
KINDS = ("units", "blocks", "entries")
EVERY = [
    (name, kind)
    for name, criterion in sorted(CRITERIA.items())
    for kind in KINDS
    if getattr(criterion, kind) is not None
]
LOOKS_AT_SAMPLES = {"taylor", "kl", "cka", "state-entropy", "crop-s", "snip", "force"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class InPlace(nn.Module):
    """Writes into its values: a trial must not see what another one left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.early, self.late = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(x)
        early = self.early(x.mean((2, 3)))
        x += self.second(x)
        return [early, self.late(x.relu_().mean((2, 3)))]


def resnet() -> nn.Module:
    return zoo.resnet(
        channels=1, classes=4, size=[8, 8], stem=[6], widths=[6, 8], blocks=[2, 1], heads=[[5]]
    )


def mobilenet() -> nn.Module:
    stages = [[1, 6, 1, 1], [2, 8, 2, 2]]
    return zoo.mobilenet(
        channels=1, classes=4, stem=6, stem_stride=1, last=8, stages=stages, exits=[1]
    )


def vit() -> nn.Module:
    return zoo.vit(channels=1, classes=4, size=[8, 8], width=8, heads=2, blocks=2, exits=[1])


NETS = {"resnet": resnet, "mobilenet": mobilenet, "vit": vit, "in-place": InPlace}
GRAPHS: dict[str, Graph] = {}


def network(kind: str) -> tuple[nn.Module, Graph]:
    """A network with lively batch statistics, in eval mode, and its graph."""
    torch.manual_seed(3)
    model = NETS[kind]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.5)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.05, 0.3)
    model.eval()
    if kind not in GRAPHS:
        GRAPHS[kind] = analyse(model, (1, 1, 8, 8))
    return model, GRAPHS[kind]


def samples(count: int = 12, each: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return list(zip(inputs.split(each), labels.split(each), strict=True))


def evidence(model: nn.Module, graph: Graph, **changes) -> Evidence:
    facts = {"batches": samples(), "weights": [1.0, 0.5], "seed": 7, **changes}
    return Evidence(model=model, graph=graph, **facts)


def judged(name: str, kind: str, given: Evidence) -> dict:
    return getattr(CRITERIA[name], kind)(given)


def having(kind: str) -> list[str]:
    return [name for name in sorted(NAMES) if getattr(CRITERIA[name], kind) is not None]


def same(one, other, *, rtol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, score in one.items():
        torch.testing.assert_close(
            torch.as_tensor(score), torch.as_tensor(other[name]), rtol=rtol, atol=1e-8
        )


def kill(model: nn.Module, group: Group, unit: int) -> None:
    """Zero the *unit* wherever it is made."""
    with torch.no_grad():
        for (name, side), positions in group.places.items():
            if side != "in":
                for parameter in model.get_submodule(name).parameters():
                    parameter[positions[unit]] = 0


def quiet_block(model: nn.Module, name: str) -> None:
    """Make the block hand its input on, as it would with no weights."""
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.zero_()


# ---------------------------------------------------------------- every criterion


def test_there_is_every_criterion_and_each_scores_something() -> None:
    assert set(CRITERIA) == NAMES
    for criterion in CRITERIA.values():
        assert any(getattr(criterion, kind) is not None for kind in KINDS)


@pytest.mark.parametrize("net", ["resnet", "mobilenet", "vit"])
def test_every_part_has_a_finite_score_unless_it_is_left_out(net) -> None:
    model, graph = network(net)
    given = evidence(model, graph)

    for name in having("units"):
        scores = judged(name, "units", given)
        assert scores.keys() <= graph.groups.keys()
        if name != "state-entropy":  # says nothing of channels without an activation
            assert scores.keys() == graph.groups.keys()
        for group, score in scores.items():
            assert score.shape == (graph.groups[group].size,) and score.dtype == np.float64
            assert np.isfinite(score).all() and (score >= 0).all()
    for name in having("blocks"):
        scores = judged(name, "blocks", given)
        assert scores.keys() == (set() if (net, name) == ("vit", "bn-gamma") else {*graph.blocks})
        assert all(np.isfinite(score) and score >= -1e-9 for score in scores.values())
    for name in having("entries"):
        scores = judged(name, "entries", given)
        assert scores.keys() == {f"{layer}.weight" for layer in graph.layers}
        for weight, score in scores.items():
            assert score.shape == model.get_parameter(weight).shape
            assert bool(torch.isfinite(score).all())


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_scoring_leaves_no_trace(name, kind) -> None:
    model, graph = network("resnet")
    model.train()
    model.requires_grad_(False)  # as with a frozen backbone
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    with torch.no_grad():
        first = judged(name, kind, evidence(model, graph))

    same(first, judged(name, kind, evidence(model, graph)), rtol=0)
    same(model.state_dict(), before, rtol=0)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_how_samples_are_cut_into_batches_does_not_matter(name, kind) -> None:
    model, graph = network("resnet")

    small, large = (evidence(model, graph, batches=samples(each=each)) for each in (5, 12))

    same(judged(name, kind, small), judged(name, kind, large), rtol=1e-3)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_only_what_needs_samples_asks_for_them(name, kind) -> None:
    model, graph = network("resnet")
    given = evidence(model, graph, batches=[])

    if name in LOOKS_AT_SAMPLES:
        with pytest.raises(UsageError, match="samples"):
            judged(name, kind, given)
    else:
        assert judged(name, kind, given)


SIGNS_ALONE = {"random", "state-entropy", "bn-statistics"}  # to them NaN is just not positive


@pytest.mark.parametrize(("name", "kind"), [pair for pair in EVERY if pair[0] not in SIGNS_ALONE])
def test_a_network_that_has_diverged_is_refused(name, kind) -> None:
    model, graph = network("resnet")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))

    with pytest.raises(UsageError, match="not finite"):
        judged(name, kind, evidence(model, graph))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_exit_weights_that_make_no_sense_are_refused(weights) -> None:
    model, graph = network("resnet")

    with pytest.raises(UsageError, match="exit weights"):
        evidence(model, graph, weights=weights)


# ---------------------------------------------------------------- the dead


# Not CroP on the transformer: a GELU lets gradients through at zero.
@pytest.mark.parametrize(
    ("net", "name"),
    [
        (net, name)
        for net in ("resnet", "mobilenet", "vit")
        for name in having("units")
        if name != "random" and (net, name) != ("vit", "crop-s")
    ],
)
def test_a_dead_unit_has_the_lowest_score_of_all(net, name) -> None:
    model, graph = network(net)
    victims = {group.name: (3 * k) % group.size for k, group in enumerate(graph.groups.values())}
    for group, unit in victims.items():
        kill(model, graph.groups[group], unit)

    scores = judged(name, "units", evidence(model, graph))

    for group, score in scores.items():
        unit = victims[group]
        assert score[unit] == pytest.approx(0.0, abs=1e-9)
        others = np.delete(score, unit)
        if name == "state-entropy":  # a unit that is always on has no entropy either
            assert others.max() > 0.1
        else:
            # The late exit's ReLU can be off for a unit on these few samples.
            assert np.median(others) > 1e-6
            assert (others >= score[unit]).all()


@pytest.mark.parametrize("name", [name for name in having("blocks") if name != "random"])
def test_a_block_that_does_nothing_has_the_lowest_score(name) -> None:
    model, graph = network("resnet")
    victim = list(graph.blocks)[1]
    quiet_block(model, victim)

    scores = judged(name, "blocks", evidence(model, graph))

    others = [score for block, score in scores.items() if block != victim]
    assert scores[victim] < min(others)
    if name != "state-entropy":  # the sum with the shortcut still switches
        assert scores[victim] == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------- chance


def test_chance_is_the_seeds_and_no_others() -> None:
    model, graph = network("resnet")

    for kind in KINDS:
        one, again, other = (
            judged("random", kind, evidence(model, graph, seed=seed)) for seed in (1, 1, 2)
        )
        same(one, again, rtol=0)
        for name in one:
            assert not np.array_equal(np.asarray(one[name]), np.asarray(other[name]))


def test_chance_differs_between_parts_and_does_not_ask_which_others_there_are() -> None:
    model, graph = network("resnet")
    everything = judged("random", "units", evidence(model, graph))
    name = "blocks.0.first.0"
    alone = replace(graph, groups={name: graph.groups[name]})

    assert len({score[0] for score in everything.values()}) == len(graph.groups)
    np.testing.assert_array_equal(
        judged("random", "units", evidence(model, alone))[name], everything[name]
    )


def test_chance_prefers_no_unit() -> None:
    model, graph = network("resnet")
    lowest = [
        int(judged("random", "units", evidence(model, graph, seed=seed))["stem.0.0"].argmin())
        for seed in range(300)
    ]

    assert min(np.bincount(lowest, minlength=6)) > 25  # 50 expected of each


# ---------------------------------------------------------------- weights alone


def test_a_filters_norm_sums_over_all_that_make_the_unit() -> None:
    model, graph = network("mobilenet")
    group = next(g for g in graph.groups.values() if len(g.producers) > 1 and g.block)
    rows = [model.get_submodule(p).weight.detach().double().flatten(1) for p in group.producers]
    given = evidence(model, graph)

    l1 = sum(row.abs().sum(1) for row in rows)
    l2 = sum(row.square().sum(1) for row in rows).sqrt()

    assert "depthwise" in {graph.layers[p].kind for p in group.producers}
    np.testing.assert_allclose(judged("l1", "units", given)[group.name], l1, rtol=1e-12)
    np.testing.assert_allclose(judged("l2", "units", given)[group.name], l2, rtol=1e-12)


def test_biases_do_not_count_for_a_filters_norm() -> None:
    model, graph = network("vit")
    before = judged("l1", "units", evidence(model, graph))
    with torch.no_grad():
        model.get_submodule("blocks.0.mlp.0").bias.fill_(9.0)

    same(judged("l1", "units", evidence(model, graph)), before, rtol=0)


def test_a_blocks_l1_is_the_sum_of_its_layers_mean_filters() -> None:
    model, graph = network("resnet")
    weights = [model.get_submodule(f"blocks.1.{part}.0").weight for part in ("first", "second")]
    expected = sum(float(w.detach().abs().sum((1, 2, 3)).mean()) for w in weights)

    found = judged("l1", "blocks", evidence(model, graph))

    assert found["blocks.1"] == pytest.approx(expected, rel=1e-5)


def test_gamma_is_compared_in_units_of_what_the_layer_puts_out() -> None:
    model, graph = network("vit")  # no batch norms: the deviation of the outputs stands in
    layer = model.get_submodule("blocks.0.mlp.0")
    seen = []
    handle = layer.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    with torch.no_grad():
        for inputs, _ in samples():
            model(inputs)
    handle.remove()
    expected = torch.cat(seen).double().flatten(0, 1).std(0, correction=0)

    found = judged("bn-gamma", "units", evidence(model, graph))

    np.testing.assert_allclose(found["blocks.0.mlp.0"], expected, rtol=1e-6)


def test_gamma_is_averaged_over_the_norms_of_a_shared_channel() -> None:
    model, graph = network("resnet")
    group = graph.groups["stem.0.0"]
    gammas = [model.get_submodule(norm).weight.detach().double() for norm in group.norms]

    found = judged("bn-gamma", "units", evidence(model, graph))[group.name]

    assert len(gammas) == 3
    np.testing.assert_allclose(found, torch.stack(gammas).abs().mean(0), rtol=1e-12)


def test_statistics_tell_how_often_a_unit_is_on() -> None:
    model, graph = network("resnet")
    norm = model.get_submodule("blocks.0.first.1")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.0, -9.0, 0.5, -0.5, 3.0]))

    found = judged("bn-statistics", "units", evidence(model, graph, batches=[]))

    phi_of_1 = 0.5 * (1 + torch.erf(torch.tensor(0.5).double().sqrt()).item())
    expected = [0.5, 0.5, 0.0, 1.0, 0.0, phi_of_1]
    np.testing.assert_allclose(found["blocks.0.first.0"], expected, atol=1e-12)


def test_magnitude_keeps_out_what_is_out() -> None:
    model, graph = network("resnet")
    weight = model.get_parameter("stem.0.0.weight").detach()
    mask = torch.ones_like(weight)
    mask[0] = 0

    found = judged("magnitude", "entries", evidence(model, graph, masks={"stem.0.0.weight": mask}))

    assert bool((found["stem.0.0.weight"][0] == -1).all())
    assert torch.equal(found["stem.0.0.weight"][1:], weight[1:].abs())


# ---------------------------------------------------------------- leaving out


def divergence(before: dict, after: dict, weights: dict[str, float]) -> float:
    """As in the paper, from probabilities."""
    total = 0.0
    for name, weight in weights.items():
        p, q = before[name].double().softmax(1), after[name].double().softmax(1)
        total += weight * float((q * (q.log() - p.log())).sum(1).mean())
    return total / sum(weights.values())


def all_inputs() -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in samples()])


@pytest.mark.parametrize("net", sorted(NETS))
def test_kl_of_a_unit_is_that_of_the_network_with_it_removed(net) -> None:
    model, graph = network(net)
    scores = judged("kl", "units", evidence(model, graph))
    weights = dict(zip(graph.exits, (1.0, 0.5), strict=True))
    with torch.no_grad():
        before = exit_outputs(model, all_inputs())
        for group in graph.groups.values():
            child = copy.deepcopy(model)
            remove_units(child, graph, {group.name: np.array([1])})
            after = exit_outputs(child, all_inputs())
            needed = {name: weights[name] for name in group.exits}
            expected = divergence(before, after, needed)

            assert scores[group.name][1] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_kl_and_cka_of_a_block_are_those_of_the_network_without_it() -> None:
    model, graph = network("resnet")
    kl, cka = (judged(name, "blocks", evidence(model, graph)) for name in ("kl", "cka"))
    weights = dict(zip(graph.exits, (1.0, 0.5), strict=True))
    with torch.no_grad():
        before = exit_outputs(model, all_inputs())
        for name, block in graph.blocks.items():
            child = copy.deepcopy(model)
            remove_block(child, graph, name)
            needed = {one: weights[one] for one in block.exits}
            expected = divergence(before, exit_outputs(child, all_inputs()), needed)

            assert kl[name] == pytest.approx(expected, rel=1e-6)
            assert 0 < cka[name] < 1


def test_a_bypassed_block_comes_back_even_after_an_error() -> None:
    model, _ = network("resnet")
    block = model.get_submodule("blocks.1")

    with pytest.raises(RuntimeError, match="stop"), bypassed(model, "blocks.1"):
        assert isinstance(model.get_submodule("blocks.1"), nn.Identity)
        raise RuntimeError("stop")

    assert model.get_submodule("blocks.1") is block


def test_a_unit_is_judged_by_the_exits_that_need_it() -> None:
    model, graph = network("resnet")
    head = next(g for g in graph.groups.values() if g.head == "exit0")

    for name in ("kl", "taylor"):
        unwanted, alone = (
            judged(name, "units", evidence(model, graph, weights=weights))[head.name]
            for weights in ([0.0, 1.0], [1.0, 0.0])
        )
        assert unwanted.max() == 0.0 < alone.max()


# ---------------------------------------------------------------- gradients


def test_a_closed_gate_is_the_network_without_the_unit() -> None:
    for net in NETS:
        model, graph = network(net)
        for group in graph.groups.values():
            child = copy.deepcopy(model)
            remove_units(child, graph, {group.name: np.array([2])})
            gate = torch.ones(group.size)
            gate[2] = 0
            with torch.no_grad():
                expected = exit_outputs(child, all_inputs())
                with gated(model, graph, {group.name: gate}):
                    found = exit_outputs(model, all_inputs())
            for name, logits in expected.items():
                torch.testing.assert_close(found[name], logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", ["resnet", "mobilenet"])
def test_taylor_is_w_times_g_summed_over_the_weights_that_read_the_unit(net) -> None:
    model, graph = network(net)
    one = [(inputs[:1], labels[:1]) for inputs, labels in samples(count=1)]
    given = evidence(model, graph, batches=one)
    found = judged("taylor", "units", given)

    weighted_loss(given, *one[0]).backward()

    for group in graph.groups.values():
        total = torch.zeros(group.size)
        for consumer in group.consumers:
            weight = model.get_submodule(consumer).weight
            columns = (weight * weight.grad).detach().transpose(0, 1).flatten(1).sum(1)
            total += columns[torch.from_numpy(group.places[consumer, "in"])].sum(1)
        np.testing.assert_allclose(found[group.name], total.abs(), rtol=1e-3, atol=1e-6)


def test_behind_a_relu_taylor_is_that_of_the_norms_gate() -> None:
    model, graph = network("resnet")
    one = samples(count=1)
    given = evidence(model, graph, batches=one)
    found = judged("taylor", "units", given)

    weighted_loss(given, *one[0]).backward()

    norm = model.get_submodule("blocks.1.first.1")
    expected = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    np.testing.assert_allclose(
        found["blocks.1.first.0"], expected.detach().abs(), rtol=1e-3, atol=1e-6
    )


def test_a_blocks_taylor_is_the_slope_of_the_loss_towards_identity() -> None:
    model, graph = network("resnet")
    model.double()
    inputs, labels = samples(count=1)[0]
    inputs = inputs.double()
    given = evidence(model, graph, batches=[(inputs, labels)])
    found = judged("taylor", "blocks", given)
    step = 1e-6

    def moved(amount: float) -> float:
        def hook(_module, read, made):
            return made + amount * (read[0] - made)

        handle = model.get_submodule("blocks.1").register_forward_hook(hook)
        try:
            with torch.no_grad():
                return float(weighted_loss(given, inputs, labels))
        finally:
            handle.remove()

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert found["blocks.1"] == pytest.approx(abs(slope), rel=1e-4)


def test_crop_is_the_slope_of_the_gradient_flow_by_the_gate() -> None:
    model, graph = network("mobilenet")
    model.double()
    batches = [(inputs.double(), labels) for inputs, labels in samples()]
    given = evidence(model, graph, batches=batches)
    found = judged("crop-s", "units", given)
    group = next(g for g in graph.groups.values() if g.block is not None)
    step = 1e-5

    def flow(amount: float) -> float:
        gate = torch.ones(group.size, dtype=torch.float64)
        gate[1] += amount
        copied = copy.deepcopy(model)
        with gated(copied, graph, {group.name: gate}):
            loss = sum(
                weighted_loss(evidence(copied, graph, batches=batches), *batch) for batch in batches
            )
        (loss / 12).backward()
        return sum(
            float(copied.get_parameter(f"{layer}.weight").grad.square().sum())
            for layer in graph.layers
        )

    slope = (flow(step) - flow(-step)) / (2 * step)
    assert found[group.name][1] == pytest.approx(abs(slope), rel=1e-4)


def masks_of(graph: Graph, model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{layer}.weight": (
            torch.rand(model.get_submodule(layer).weight.shape, generator=generator) < 0.5
        ).float()
        for layer in graph.layers
    }


def test_snip_and_force_use_the_gradient_of_the_sparse_network() -> None:
    model, graph = network("resnet")
    masks = masks_of(graph, model)
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            sparse.get_parameter(name).mul_(mask)
    losses = [weighted_loss(evidence(sparse, graph), *batch) for batch in samples()]
    (torch.stack(losses).sum() / 12).backward()

    given = evidence(model, graph, masks=masks)
    snip, force = (judged(name, "entries", given) for name in ("snip", "force"))

    for name, mask in masks.items():
        gradient = sparse.get_parameter(name).grad
        dense = model.get_parameter(name).detach()
        torch.testing.assert_close(force[name], (dense * gradient).abs(), rtol=1e-3, atol=1e-8)
        assert bool((snip[name][mask == 0] == -1).all())
        used = (sparse.get_parameter(name) * gradient).abs().detach()[mask == 1]
        torch.testing.assert_close(snip[name][mask == 1], used, rtol=1e-3, atol=1e-8)


def test_force_can_bring_weights_back_and_snip_cannot() -> None:
    model, graph = network("resnet")
    masks = masks_of(graph, model)
    given = evidence(model, graph, masks=masks)

    revived = {}
    for name in ("snip", "force"):
        scores = judged(name, "entries", given)
        flat = torch.cat([scores[one].flatten() for one in masks])
        used = torch.cat([mask.flatten() for mask in masks.values()])
        best = flat.argsort(descending=True)[: int(used.sum())]
        revived[name] = int((used[best] == 0).sum())

    assert revived["snip"] == 0 < revived["force"]


# ---------------------------------------------------------------- effective rank


def test_filters_that_learn_the_same_count_once() -> None:
    model, graph = network("resnet")
    group = graph.groups["blocks.0.first.0"]
    before = effective_rank(evidence(model, graph))
    with torch.no_grad():
        for name in (*group.producers, *group.norms):
            module = model.get_submodule(name)
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim:
                    tensor[:] = tensor[:1].clone()
        for name in group.consumers:
            weight = model.get_submodule(name).weight
            weight[:] = weight[:, :1].clone()

    after = effective_rank(evidence(model, graph))

    assert after[group.name] == 1 < before[group.name]
    assert all(1 <= rank <= graph.groups[name].size for name, rank in {**before, **after}.items())


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.99])
def test_the_rank_counts_the_singular_values_that_hold_the_energy(energy) -> None:
    model, graph = network("mobilenet")
    given = evidence(model, graph)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in graph.groups}
    for inputs, labels in given.batches:
        model.zero_grad()
        (weighted_loss(given, inputs, labels) / len(labels)).backward()
        for name, group in graph.groups.items():
            for producer in group.producers:
                columns[name].append(model.get_submodule(producer).weight.grad.double().flatten(1))

    found = effective_rank(given, energy=energy)

    for name, parts in columns.items():
        squares = np.linalg.svd(torch.cat(parts, 1).numpy(), compute_uv=False) ** 2
        held = np.cumsum(squares) / squares.sum()
        assert found[name] == 1 + int((held < energy).sum())


def test_more_energy_needs_more_filters() -> None:
    model, graph = network("resnet")

    ranks = [
        sum(effective_rank(evidence(model, graph), energy=energy).values())
        for energy in (0.5, 0.9, 0.99, 1.0)
    ]

    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_without_any_gradient_one_filter_is_left() -> None:
    model, graph = network("resnet")

    ranks = effective_rank(evidence(model, graph, weights=[0.0, 0.0]))

    assert set(ranks.values()) == {1}


# ---------------------------------------------------------------- against chance


def bright_spots(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures whose class is the quarter with a bright spot."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    spots = torch.zeros(4, 1, 8, 8)
    for label in range(4):
        row, column = 1 + 4 * (label // 2), 1 + 4 * (label % 2)
        spots[label, 0, row : row + 2, column : column + 2] = 1.5
    return spots[labels] + 0.6 * torch.randn(count, 1, 8, 8, generator=generator), labels


def anew(seed: int) -> tuple[nn.Module, Graph]:
    model, graph = network("resnet")
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model, graph


@pytest.fixture(scope="module")
def trained() -> list[tuple[nn.Module, Graph]]:
    """Three networks after a few steps each."""
    torch.set_num_threads(1)
    nets = []
    for seed in range(3):
        model, graph = anew(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=60)
        model.train()
        for step in range(60):
            inputs, labels = bright_spots(32, seed=100 * seed + step)
            loss = sum(cross_entropy(one, labels) for one in exit_outputs(model, inputs).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        nets.append((model.eval(), graph))
    return nets


def without_lowest(model: nn.Module, graph: Graph, scores: dict, share: float) -> nn.Module:
    """A copy without the lowest *share* of every group's units."""
    child = copy.deepcopy(model)
    chosen = {
        name: np.argsort(score, kind="stable")[: round(share * len(score))]
        for name, score in scores.items()
    }
    remove_units(child, graph, chosen)
    return child


def heldout_loss(model: nn.Module) -> float:
    inputs, labels = bright_spots(256, seed=999)
    with torch.no_grad():
        return float(sum(cross_entropy(o, labels) for o in exit_outputs(model, inputs).values()))


@pytest.fixture(scope="module")
def harm_of_chance(trained) -> float:
    """How much held-out loss it costs, on average, to remove units by chance."""
    harm = []
    for model, graph in trained:
        for seed in range(5):
            drawn = judged("random", "units", evidence(model, graph, seed=seed))
            child = without_lowest(model, graph, drawn, 0.35)
            harm.append(heldout_loss(child) - heldout_loss(model))
    return float(np.mean(harm))


# Not the statistics of TLC and NEPENTHE: they say which layers are linear, not which channels
# are of little use, and do no better than chance at that.
@pytest.mark.parametrize(
    ("name", "most"),
    [("kl", 0.7), ("taylor", 0.7), ("l1", 0.9), ("l2", 0.9), ("bn-gamma", 0.9), ("crop-s", 0.9)],
)
def test_at_equal_ratios_per_layer_it_hurts_less_than_chance(
    trained, harm_of_chance, name, most
) -> None:
    harm = []
    for model, graph in trained:
        given = evidence(model, graph, batches=[bright_spots(64, seed=500)], weights=[1.0, 1.0])
        child = without_lowest(model, graph, judged(name, "units", given), 0.35)
        harm.append(heldout_loss(child) - heldout_loss(model))

    assert 0 < np.mean(harm) < most * harm_of_chance


def gradient_flow(model: nn.Module, graph: Graph) -> float:
    """g'g over the layers' weights, g the gradient of the mean loss."""
    model = copy.deepcopy(model)
    batch = bright_spots(64, seed=500)
    (weighted_loss(evidence(model, graph), *batch) / 64).backward()
    return sum(
        float(model.get_parameter(f"{layer}.weight").grad.square().sum()) for layer in graph.layers
    )


def test_crop_keeps_the_gradients_of_an_untrained_network_flowing() -> None:
    ours, chance = [], []
    for seed in range(3):
        model, graph = anew(seed)
        flow = gradient_flow(model, graph)
        given = evidence(model, graph, batches=[bright_spots(64, seed=500)])
        child = without_lowest(model, graph, judged("crop-s", "units", given), 0.35)
        ours.append(abs(gradient_flow(child, graph) - flow) / flow)
        for draw in range(5):
            drawn = judged("random", "units", evidence(model, graph, seed=draw))
            child = without_lowest(model, graph, drawn, 0.35)
            chance.append(abs(gradient_flow(child, graph) - flow) / flow)

    assert np.mean(ours) < 0.75 * np.mean(chance)
