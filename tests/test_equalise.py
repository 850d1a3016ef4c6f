"""Evening out channels: the same function, and no channel drowns the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")

from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.equalise import equalise  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.recover import typical  # noqa: E402
from tests import host_nets, trained  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loudness(model, name: str, x) -> torch.Tensor:
    """The largest value of each channel that the module *name* makes."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, _given, result: seen.append(result.abs().amax((0, 2, 3)))
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@given(st.floats(-4, 4))
@settings(max_examples=5, deadline=None)
def test_answers_stay_and_loud_channels_are_turned_down(exponent: float) -> None:
    model, x = trained.net(), typical(trained.reals())
    with torch.no_grad():
        wanted = exit_outputs(model, x)
    trained.make_hostile(model, 10.0**exponent)
    graph = analyse(model, trained.SHAPE)
    scaled = equalise(model, graph, x)
    with torch.no_grad():
        found = exit_outputs(model, x)
    for exit, logits in wanted.items():
        torch.testing.assert_close(found[exit], logits, rtol=1e-3, atol=2e-3)
    assert {"blocks.0.first.0", "blocks.1.first.0"} <= set(scaled)
    for name in ("blocks.0.first", "blocks.1.first"):
        alive = loudness(model, name, x)
        alive = alive[alive > 0]
        assert alive.max() / alive.min() < 40


def test_it_comes_to_rest() -> None:
    model, x = trained.net(), typical(trained.reals())
    trained.make_hostile(model, 1000.0)
    graph = analyse(model, trained.SHAPE)
    equalise(model, graph, x)
    name = "blocks.0.first"
    before = loudness(model, name, x)
    equalise(model, graph, x)
    torch.testing.assert_close(loudness(model, name, x), before, rtol=0.05, atol=1e-4)


def small_mobilenet() -> torch.nn.Module:
    torch.manual_seed(0)
    net = zoo.mobilenet(
        channels=1,
        classes=4,
        stem=8,
        stem_stride=1,
        last=16,
        stages=[[1, 8, 1, 1], [4, 12, 2, 2]],
        exits=[1],
    )
    return host_nets.settled(net, trained.reals())


def test_channels_behind_a_depthwise_layer_and_a_relu6_are_raised() -> None:
    model, x = small_mobilenet(), typical(trained.reals())
    wanted = {k: v.detach() for k, v in exit_outputs(model, x).items()}
    norm, reader = model.blocks[1].units[1][1], model.blocks[1].units[2][0]
    with torch.no_grad():
        quiet = torch.full((len(norm.weight),), 0.01)
        quiet[3] = 1.0
        norm.weight.mul_(quiet)
        norm.bias.mul_(quiet)
        reader.weight.div_(quiet[None, :, None, None])
    before = loudness(model, "blocks.1.units.1", x)
    equalise(model, analyse(model, trained.SHAPE), x)
    after = loudness(model, "blocks.1.units.1", x)
    assert before.median() < 0.02 * before.max()
    assert after.median() > 0.5 * after.max()
    with torch.no_grad():
        found = exit_outputs(model, x)
    for exit, logits in wanted.items():
        assert float((found[exit] - logits).abs().max() / logits.abs().max()) < 0.01


def test_groups_whose_answers_would_change_are_put_back() -> None:
    class Curved(torch.nn.Module):
        """Nothing that lies between its layers lets a scale pass."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(64, 6), torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.sigmoid(self.first(x.flatten(1))))

    torch.manual_seed(0)
    model, x = Curved().eval(), typical(trained.reals())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = analyse(model, trained.SHAPE)
    assert equalise(model, graph, x) == []
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
