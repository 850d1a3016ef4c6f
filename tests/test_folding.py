"""Folding: exact everywhere, borders included; refused where it would not be or would cost more."""

import copy
import itertools
from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.errors import BadFile, Unsupported, UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.channels import Layer  # noqa: E402
from edgeexit.host.folding import (  # noqa: E402
    Fold,
    examine,
    fold,
    fold_linear,
    foldable,
    linearise,
    replay_fold,
)
from edgeexit.host.graph import Graph, analyse  # noqa: E402
from edgeexit.host.surgery import replay  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Averaged(nn.Module):
    """Logits: the mean over all places of what *body* makes."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y.flatten(2).mean(2) if y.ndim > 2 else y


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """*model* in float64 and eval mode, with random weights and batch statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator).double() * 2 - 1
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.abs_().add_(0.1)
    return model


def graph_of(model: nn.Module, *shape: int) -> Graph:
    """The Graph of a chain of layers without an export: what folding reads of one."""
    layers = {}

    def book(name: str):
        def hook(module: nn.Module, inputs, output) -> None:
            kind = "linear" if isinstance(module, nn.Linear) else "conv"
            layers[name] = Layer(
                name=name,
                kind=kind,
                macs=prod(output.shape) * prod(module.weight.shape[1:]),
                exits=("exit0",),
                in_shape=tuple(inputs[0].shape),
                out_shape=tuple(output.shape),
                inputs=module.weight.shape[1],
                outputs=module.weight.shape[0],
            )

        return hook

    handles = [
        module.register_forward_hook(book(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    with torch.no_grad():
        model(torch.zeros(shape).double())
    for handle in handles:
        handle.remove()
    return Graph(exits=("exit0",), layers=layers, groups={}, blocks={}, heads={}, others=())


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert one.shape == other.shape
    assert bool((one - other).abs().max() <= tolerance * one.abs().max().clamp(min=1))


def check_exact(model: nn.Module, pair: Fold, x: torch.Tensor) -> nn.Module:
    """Fold, and compare every value of the map; replay on a fresh copy, and compare again."""
    fresh, before = copy.deepcopy(model), model.body(x)

    entry = fold(model, pair)

    assert_same(before, model.body(x))
    stirred(fresh, 99)
    replay_fold(fresh, *entry["fold"])
    fresh.load_state_dict(model.state_dict())
    assert_same(before, fresh.body(x))
    return model


# ---------------------------------------------------------------- the law


@st.composite
def convolution(draw: st.DrawFn, inputs: int, outputs: int) -> nn.Conv2d:
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (1, 3), (2, 2)]))
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=draw(st.sampled_from([1, 1, 2])),
        padding=draw(st.sampled_from([0, 0, 1, (0, 1)])),
        dilation=draw(st.sampled_from([1, 1, 2])),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate"])),
    )


@given(st.data(), *[st.integers(1, 8)] * 3, st.booleans(), st.integers(6, 9))
@settings(max_examples=25, deadline=None)
def test_two_convolutions_fold_exactly_or_not_at_all(
    data: st.DataObject, inputs: int, between: int, outputs: int, has_norm: bool, size: int
) -> None:
    one = data.draw(convolution(inputs, between))
    two = data.draw(convolution(between, outputs))
    norm = [nn.BatchNorm2d(between)] if has_norm else []
    model = stirred(Averaged(one, *norm, two))
    with torch.no_grad():
        x = torch.rand(2, inputs, size, size + 1).double()
        try:
            model(x)
        except RuntimeError:  # the map is smaller than the kernel or the reflection
            assume(False)
        graph = graph_of(model, 1, inputs, size, size + 1)
        second = f"body.{1 + has_norm}"
        try:
            pair = examine(model, graph, "body.0", second)
        except Unsupported as refusal:
            assert foldable(model, graph) == []
            assert is_justified(one, two, has_norm, graph, second), refusal
            return
        assert foldable(model, graph) == [pair]
        assert pair.macs_before == sum(layer.macs for layer in graph.layers.values())
        folded = check_exact(model, pair, x)
        now = graph_of(folded, 1, inputs, size, size + 1)
        assert sum(layer.macs for layer in now.layers.values()) == pair.macs_after
        assert pair.macs_after <= pair.macs_before


def is_justified(one: nn.Conv2d, two: nn.Conv2d, has_norm: bool, graph: Graph, second: str) -> bool:
    """Whether one of the known reasons speaks against folding the two."""
    has_bias = has_norm or one.bias is not None
    taps = []
    for axis in (0, 1):
        k1, s1, p1, d1 = one.kernel_size[axis], one.stride[axis], one.padding[axis], one.dilation[0]
        k2, p2, d2 = two.kernel_size[axis], two.padding[axis], two.dilation[0]
        if p2 and (k1 > 1 or p1 or (two.padding_mode == "zeros" and has_bias)):
            return True
        if p2 and two.padding_mode != "zeros" and s1 > 1:
            return True
        if k1 > 1 and k2 > 1 and max(d1, d2) > 1:
            return True
        taps.append(k1 if k2 == 1 else k2 if k1 == 1 else (k2 - 1) * s1 + k1)
    if any(one.padding) and any(two.padding) and one.padding_mode != two.padding_mode:
        return True
    after = prod(graph.layers[second].out_shape) * prod(taps) * one.in_channels
    return after > sum(layer.macs for layer in graph.layers.values())


def test_every_geometry_that_can_fold_does_and_exactly() -> None:
    """Few channels around many: here the MACs nearly always fall, so geometry alone decides."""
    modes = ("zeros", "reflect")
    twos = itertools.product((1, 3), (1, 2), (1, 2), (0, 1), modes, repeat=2)
    folded = 0
    for k1, s1, d1, p1, m1, k2, s2, d2, p2, m2 in twos:
        if s2 > 1 or (m1 != "zeros" and not p1) or (m2 != "zeros" and not p2):
            continue  # a second stride changes nothing, nor does the mode of no padding
        has_bias = (k1 + s1 + d1 + p1 + k2 + d2) % 2 == 0
        one = nn.Conv2d(1, 12, k1, s1, p1, d1, bias=has_bias, padding_mode=m1)
        two = nn.Conv2d(12, 1, k2, s2, p2, d2, padding_mode=m2)
        model = stirred(Averaged(one, two))
        with torch.no_grad():
            x = torch.rand(1, 1, 13, 14).double()
            before = model.body(x)
            graph = graph_of(model, *x.shape)
            pairs = foldable(model, graph)
            assert bool(pairs) != is_justified(one, two, False, graph, "body.1")
            for pair in pairs:
                folded += 1
                fold(model, pair)
                assert_same(before, model.body(x))
    assert folded > 50


@pytest.mark.parametrize("has_norm", [False, True])
def test_linear_layers_fold_exactly(has_norm: bool) -> None:
    norm = [nn.BatchNorm1d(12)] if has_norm else []
    model = stirred(Averaged(nn.Linear(6, 12), *norm, nn.Dropout(), nn.Linear(12, 3)))
    (pair,) = foldable(model, graph_of(model, 1, 6))

    check_exact(model, pair, torch.rand(5, 6).double())

    assert (pair.macs_before, pair.macs_after) == (6 * 12 + 12 * 3, 6 * 3)


def test_a_narrow_waist_between_linear_layers_stays() -> None:
    model = stirred(Averaged(nn.Linear(20, 2), nn.Linear(2, 20)))

    assert foldable(model, graph_of(model, 1, 20)) == []


def test_sequences_fold_too() -> None:
    model = stirred(Averaged(nn.Conv1d(2, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)))
    (pair,) = foldable(model, graph_of(model, 1, 2, 17))

    check_exact(model, pair, torch.rand(2, 2, 17).double())


# ---------------------------------------------------------------- the reasons against it


def test_two_3x3_kernels_are_refused_with_the_numbers() -> None:
    model = stirred(Averaged(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)))
    graph = graph_of(model, 1, 8, 10, 10)

    with pytest.raises(Unsupported, match=r"one 5x5 layer costs 102,400 MACs, .* cost 94,464"):
        examine(model, graph, "body.0", "body.1")


def test_a_padded_3x3_behind_a_biased_1x1_is_refused_but_folds_without_the_bias() -> None:
    model = stirred(Averaged(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 3, padding=1)))
    graph = graph_of(model, 1, 4, 6, 6)
    with pytest.raises(Unsupported, match="at the borders"):
        examine(model, graph, "body.0", "body.1")

    model.body[0].bias.data.zero_()

    pair = examine(model, graph, "body.0", "body.1")
    check_exact(model, pair, torch.rand(2, 4, 6, 6).double())


def test_two_ways_of_padding_are_not_mixed() -> None:
    def pair(mode: str) -> nn.Module:
        across = nn.Conv2d(1, 12, (1, 3), padding=(0, 1), bias=False, padding_mode=mode)
        return stirred(Averaged(across, nn.Conv2d(12, 1, (3, 1), padding=(1, 0))))

    model = pair("reflect")
    with pytest.raises(Unsupported, match="two ways of padding"):
        examine(model, graph_of(model, 1, 1, 6, 6), "body.0", "body.1")
    model = pair("zeros")
    (found,) = foldable(model, graph_of(model, 1, 1, 6, 6))
    check_exact(model, found, torch.rand(2, 1, 6, 6).double())


class Shared(nn.Module):
    """A sum of what *first* makes and of what *second* makes of that: a shortcut."""

    def __init__(self, *, is_shortcut: bool, is_exit: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.is_shortcut, self.is_exit = is_shortcut, is_exit

    def forward(self, x: torch.Tensor):
        y = self.first(x)
        z = self.second(y)
        z = z + y if self.is_shortcut else z
        return (y, z) if self.is_exit else z


@pytest.mark.parametrize("read", [{"is_shortcut": True}, {"is_shortcut": False, "is_exit": True}])
def test_a_value_that_something_else_reads_is_not_folded_away(read: dict[str, bool]) -> None:
    model = stirred(Shared(**read))
    graph = graph_of(model, 1, 4)

    assert foldable(model, graph) == []
    with pytest.raises(Unsupported, match="something else"):
        examine(model, graph, "first", "second")
    alone = stirred(Shared(is_shortcut=False))
    assert [pair.second for pair in foldable(alone, graph_of(alone, 1, 4))] == ["second"]


def test_a_layer_that_runs_twice_is_not_folded() -> None:
    twice = nn.Linear(4, 4)
    model = stirred(Averaged(nn.Linear(4, 4), twice, twice))

    assert foldable(model, graph_of(model, 1, 4)) == []


def test_grouped_convolutions_are_refused() -> None:
    model = stirred(Averaged(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1)))
    graph = graph_of(model, 1, 8, 6, 6)

    with pytest.raises(Unsupported, match="grouped"):
        examine(model, graph, "body.0", "body.1")


def test_an_unknown_layer_is_a_usage_error() -> None:
    model = stirred(Averaged(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(UsageError, match=r"no layer named 'body.7'"):
        examine(model, graph_of(model, 1, 4), "body.0", "body.7")


# ---------------------------------------------------------------- with the rest of the house


def test_a_mobilenet_folds_where_its_last_bottleneck_meets_the_head() -> None:
    stages = [[4, 12, 1, 1], [4, 16, 1, 2]]
    net = zoo.mobilenet(channels=1, classes=3, stem=8, stages=stages, last=8, exits=[])
    graph = analyse(net, (1, 1, 9, 9))
    net = stirred(net)

    # Between the two blocks the bottleneck is narrow: one layer would cost more.
    with pytest.raises(Unsupported, match="one 1x1 layer costs"):
        examine(net, graph, "blocks.0.units.2.0", "blocks.1.units.0.0")
    (pair,) = foldable(net, graph)
    assert (pair.first, pair.second) == ("blocks.1.units.2.0", "heads.2.0.0")
    x = torch.rand(3, 1, 9, 9).double()
    (before,) = net(x)
    fold(net, pair)
    (after,) = net(x)

    assert_same(before, after)
    saved = graph.macs() - analyse(net.float(), (1, 1, 9, 9)).macs()
    assert saved == pair.macs_before - pair.macs_after > 0


def test_replay_through_a_surgery_list_gives_the_shapes() -> None:
    def body() -> nn.Module:
        layers = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        return Averaged(*layers, nn.Conv2d(8, 3, 1))

    model = stirred(body())
    entries = [linearise(model, "body.2")]
    graph = analyse(model.float(), (1, 2, 7, 7))
    (pair,) = foldable(model, graph)
    x = torch.rand(2, 2, 7, 7)
    before = model(x)
    entries.append(fold(model, pair))

    with torch.device("meta"):
        again = body()
    replay(again, entries, "surgery")
    again.load_state_dict(model.state_dict(), assign=True)

    assert_same(before, again.eval()(x), 1e-5)
    assert analyse(again, (1, 2, 7, 7)).macs() == pair.macs_after
    with pytest.raises(BadFile, match="surgery"):
        replay(body(), [{"fold": ["body.3", "body.0"]}], "surgery")


def test_what_has_become_linear_is_folded_only_where_that_saves() -> None:
    """Always on: the 1x1 pair costs less as one layer, two 3x3 would cost more as one 5x5."""
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.ReLU()]
    model = stirred(Averaged(*layers, nn.Conv2d(2, 2, 3)))
    model.float()
    for place in (0, 2):
        model.body[place].bias.data.fill_(100.0)
    x = torch.rand(4, 2, 16, 16)
    before, macs = model(x), analyse(model, (1, 2, 16, 16)).macs()
    batches = [(x, torch.zeros(4, dtype=torch.int64))]

    folded, entries, done = fold_linear(model, (1, 2, 16, 16), batches, 0.0)

    assert done == {"folded": [["body.0", "body.2"]], "linear_but_kept": 1}
    assert entries == [{"linear": "body.1"}, {"fold": ["body.0", "body.2"]}]
    assert analyse(folded, (1, 2, 16, 16)).macs() < macs
    assert isinstance(folded.body[3], nn.ReLU)
    assert_same(before, folded(x), 1e-4)
    assert isinstance(model.body[1], nn.ReLU), "the network itself stays"
    model.body[0].bias.data.zero_()
    model.body[2].bias.data.zero_()
    same, none, done = fold_linear(model, (1, 2, 16, 16), batches, 0.0)
    assert same is model
    assert (none, done["folded"]) == ([], [])


def test_only_activations_are_linearised() -> None:
    model = Averaged(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(UsageError, match="is a Linear, expected an activation"):
        linearise(model, "body.0")
    with pytest.raises(UsageError, match=r"no activation named 'body.9'"):
        linearise(model, "body.9")
