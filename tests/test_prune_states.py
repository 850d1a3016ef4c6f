"""States: entropies are those of the papers, on and off is what the neurons do, dead is dead."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.folding import linearise  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.prune.states import (  # noqa: E402
    States,
    binary_entropy,
    dead_units,
    linearisable,
    relevance,
    silence,
    state_entropy,
)
from edgeexit.host.surgery import remove_units  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Head(nn.Module):
    """Convolution, norm and ReLU6, then a linear layer, a ReLU and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU6()
        self.linear, self.logits = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x))).mean((2, 3))
        return self.logits(torch.relu(self.linear(y)))


def batches(*shape: int, count: int = 2, seed: int = 0) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator), torch.zeros(shape[0], dtype=torch.int64))
        for _ in range(count)
    ]


counts = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@given(counts, st.data())
@settings(max_examples=25, deadline=None)
def test_estimators_agree_with_the_definitions(on: list[int], data: st.DataObject) -> None:
    size = len(on)
    zero, off = (
        data.draw(st.lists(st.integers(0, 50), min_size=size, max_size=size)) for _ in "ab"
    )
    rows = {"on": np.array(on), "zero": np.array(zero), "off": np.array(off)}
    states = States(activation=None, layers=("a",), **rows)

    def entropy(heads: int, total: int) -> float:
        p = heads / total if total else 0.0
        return -sum(q * np.log2(q) for q in (p, 1 - p) if q)

    neurons = list(zip(on, zero, off, strict=True))
    nepenthe = [entropy(a, a + c) for a, _, c in neurons]
    easier = [entropy(a + b, a + b + c) for a, b, c in neurons]
    egp = [entropy(a, a + b + c) for a, b, c in neurons if 0 < a < a + b + c]
    assert states.entropies("nepenthe") == pytest.approx(nepenthe)
    assert states.entropy("nepenthe") == pytest.approx(np.mean(nepenthe))
    assert states.entropy("easier") == pytest.approx(np.mean(easier))
    assert states.entropy("egp") == pytest.approx(np.mean(egp) if egp else 0.0)
    assert 0 <= states.entropy() <= 1
    assert set(states.always_off()).isdisjoint(states.always_on())


def test_entropy_is_one_bit_for_a_fair_coin_and_none_for_a_sure_thing() -> None:
    assert binary_entropy(np.array([0.5, 0.0, 1.0])).tolist() == [1.0, 0.0, 0.0]


def test_states_are_those_of_the_values_before_each_activation() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    data = batches(8, 1, 6, 6)
    seen = {"conv": [], "linear": []}
    model.act.register_forward_pre_hook(lambda _, inputs: seen["conv"].append(inputs[0]))
    model.linear.register_forward_hook(lambda _, __, output: seen["linear"].append(output))

    found = state_entropy(model, graph, data)

    assert list(found) == ["conv", "linear"]  # not the logits: nothing acts on them
    assert found["conv"].activation == "act"
    assert found["linear"].activation is None  # torch.relu, a function
    for layer, axes in (("conv", (0, 2, 3)), ("linear", 0)):
        z = torch.cat(seen[layer])
        assert found[layer].on.tolist() == (z > 0).sum(axes).tolist()
        assert found[layer].off.tolist() == (z < 0).sum(axes).tolist()
        total = found[layer].on + found[layer].zero + found[layer].off
        assert set(total.tolist()) == {z.numel() // z.shape[1]}


def test_a_sum_at_a_shortcut_counts_for_all_that_it_adds_up() -> None:
    net = zoo.resnet(channels=1, size=[8, 8], stem=[4], widths=[4, 8], blocks=[1, 1])
    graph = analyse(net, (1, 1, 8, 8))

    found = state_entropy(net, graph, batches(4, 1, 8, 8))

    assert found["blocks.1.second.0"] is found["blocks.1.shortcut.0"]
    assert found["blocks.0.second.0"] is not found["stem.0.0"]
    assert "heads.2.linear" not in found
    assert {name for name, layer in graph.layers.items() if layer.kind == "conv"} == set(found)


def test_linear_bottlenecks_have_no_states() -> None:
    stages = [[2, 4, 2, 1]]
    net = zoo.mobilenet(channels=1, stem=4, stages=stages, last=4, exits=[])
    graph = analyse(net, (1, 1, 8, 8))

    found = state_entropy(net, graph, batches(4, 1, 8, 8))

    assert "blocks.0.units.0.0" in found and "blocks.0.units.1.0" in found
    assert not any(name.endswith("units.2.0") for name in found)


class Onward(nn.Module):
    """A value that goes on past its activation, as in networks that act before they add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.logits = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.logits(torch.relu(y + 100 + self.second(torch.relu(y))))


def test_the_first_activation_behind_a_layer_is_the_one_that_counts() -> None:
    model = Onward()
    graph = analyse(model, (1, 2))

    found = state_entropy(model, graph, batches(16, 2))

    assert found["second"].layers == ("first", "second")
    assert found["second"].entropy() == 0
    assert found["first"].layers == ("first",)
    assert found["first"].entropy() > 0


def test_watching_leaves_the_network_as_it_was() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    data = batches(8, 1, 6, 6)
    model.train()
    before = copy.deepcopy(model.state_dict())

    state_entropy(model, graph, data)
    dead_units(model, graph, data)

    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_relevance_is_entropy_times_the_mean_of_the_weights_in_use() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    data = batches(8, 1, 6, 6)
    model.conv.weight.data[:2] = 0
    model.conv.weight.data[2:] = -0.5

    found = relevance(model, graph, data, "egp")

    entropy = state_entropy(model, graph, data)["conv"].entropy("egp")
    assert found["conv"] == pytest.approx(0.5 * entropy)
    assert 0 < found["conv"] < 0.5


def test_only_modules_whose_neurons_never_switch_are_linearisable() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    data = batches(8, 1, 6, 6)
    assert linearisable(model, graph, data) == []
    assert linearisable(model, graph, data, tolerance=1.0) == ["act"]

    model.norm.bias.data = torch.tensor([50.0, 50.0, -50.0, 50.0])

    states = state_entropy(model, graph, data)["conv"]
    assert linearisable(model, graph, data) == ["act"]
    assert states.always_off().tolist() == [2]
    assert states.always_on().tolist() == [0, 1, 3]


def test_dead_units_can_be_removed_without_changing_an_answer() -> None:
    net = zoo.resnet(channels=1, size=[8, 8], stem=[4], widths=[4, 8], blocks=[2, 1], classes=3)
    graph = analyse(net, (1, 1, 8, 8))
    data = batches(6, 1, 8, 8)
    assert dead_units(net, graph, data) == {}
    inner = net.blocks[0].first[1]
    inner.bias.data[[1, 3]] = -100.0
    net.stem[0][1].weight.data[2] = 0  # off in the stem, but blocks add to it

    found = dead_units(net, graph, data)

    assert {name: units.tolist() for name, units in found.items()} == {"blocks.0.first.0": [1, 3]}
    before = [net(inputs) for inputs, _ in data]
    remove_units(net, graph, found)
    for (inputs, _), logits in zip(data, before, strict=True):
        for old, new in zip(logits, net(inputs), strict=True):
            assert torch.allclose(old, new, atol=1e-6)


def test_a_unit_that_one_batch_or_one_reader_needs_is_alive() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2, bias=False)
            self.heads = nn.ModuleList(nn.Linear(2, 3) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.body(x)
            return [self.heads[0](torch.relu(y)), self.heads[1](torch.relu(-y))]

    net = Two()
    graph = analyse(net, (1, 2))
    net.body.weight.data = torch.eye(2)
    rows = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    labels = torch.zeros(1, dtype=torch.int64)

    assert dead_units(net, graph, [(rows[1], labels)]) == {"body": pytest.approx([1])}
    assert dead_units(net, graph, [(row, labels) for row in rows])["body"].tolist() == [1]
    assert dead_units(net, graph, [(-rows[0], labels)])["body"].tolist() == [1]
    both = [(torch.tensor([[1.0, -1.0]]), labels), (rows[1], labels)]
    assert dead_units(net, graph, both) == {}


class Reused(nn.Module):
    """One ReLU module that acts twice, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.logits = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.first(x))
        return self.logits(self.act(y + self.act(self.second(y))))


def test_a_module_that_acts_in_several_places_counts_with_its_highest_entropy() -> None:
    model = Reused()
    graph = analyse(model, (1, 2))
    data = batches(16, 2)
    model.second.bias.data.fill_(100.0)

    found = state_entropy(model, graph, data)

    assert found["second"].entropy() == 0
    assert found["first"].entropy() > 0.1
    assert linearisable(model, graph, data) == []
    model.first.bias.data.fill_(100.0)
    assert linearisable(model, graph, data) == ["act"]


def test_with_its_dead_units_silenced_an_activation_can_go() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    data = batches(8, 1, 6, 6)
    model.act = nn.ReLU()
    model.norm.bias.data = torch.tensor([50.0, 50.0, -50.0, 50.0])
    before = model(data[0][0])

    assert linearisable(model, graph, data) == ["act"]
    silence(model, graph, dead_units(model, graph, data))
    linearise(model, "act")

    assert torch.allclose(before, model(data[0][0]), atol=1e-5)
    assert model.conv.weight.shape[0] == 4


def test_of_a_dead_group_one_unit_stays() -> None:
    net = zoo.resnet(channels=1, size=[8, 8], stem=[4], widths=[4, 8], blocks=[1, 1])
    graph = analyse(net, (1, 1, 8, 8))
    net.blocks[0].first[1].bias.data.fill_(-100.0)

    assert dead_units(net, graph, batches(6, 1, 8, 8))["blocks.0.first.0"].tolist() == [1, 2, 3]


def test_without_samples_there_is_nothing_to_say() -> None:
    model = Head()
    graph = analyse(model, (1, 1, 6, 6))
    with pytest.raises(UsageError, match="no samples"):
        state_entropy(model, graph, [])
    with pytest.raises(UsageError, match="no samples"):
        dead_units(model, graph, [])
    with pytest.raises(UsageError, match="no entropy estimator named 'x'"):
        relevance(model, graph, batches(2, 1, 6, 6), "x")
