"""Simulated int8: errors of the real file's size, gradients that pass, means that are mended."""

import pytest

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.errors import BadFile  # noqa: E402
from edgeexit.host import lower, zoo  # noqa: E402
from edgeexit.host.answers import RealSamples  # noqa: E402
from edgeexit.host.fakequant import Simulated  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.quantize import real_logits  # noqa: E402
from edgeexit.host.recover import typical  # noqa: E402
from edgeexit.host.schemes import int8  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from tests import host_nets, trained  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_its_errors_are_as_large_as_those_of_the_real_file() -> None:
    torch.manual_seed(0)
    reals = RealSamples(host_nets.pictures(100, size=(8, 8)), trained.PREPROCESS)
    net = zoo.mobilenet(
        channels=1,
        classes=4,
        stem=8,
        stem_stride=1,
        last=16,
        stages=[[1, 8, 1, 1], [4, 12, 2, 2]],
        exits=[1],
    )
    model = host_nets.settled(net, reals)
    lowered = lower.from_torch(model, trained.SHAPE, trained.PREPROCESS)
    quantized = int8(lowered, reals)

    wanted = torch_logits(model, reals)
    real = real_logits(quantized.data, quantized.exits, reals)
    simulated = torch_logits(Simulated(model, typical(reals), quantized.ranges), reals)

    for exit, logits in wanted.items():
        lost = float(((real[exit] - logits) ** 2).mean() ** 0.5)
        guessed = float(((simulated[exit] - logits) ** 2).mean() ** 0.5)
        assert 0.003 < lost / logits.std() < 0.3
        assert 0.6 < guessed / lost < 1.6


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "vit", "dscnn", "conv1d"])
def test_every_kind_of_network_is_simulated_and_corrected(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, *zoo.ZOO[name].input_shape[1:])
    model = zoo.ZOO[name]()
    model.train()
    with torch.no_grad():
        model(x)
        wanted = exit_outputs(model.eval(), x)
        simulated = Simulated(model, x)
        layers = sum(
            isinstance(m, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d)
            for m in model.modules()
        )
        assert simulated.correct_biases() == layers
        found = exit_outputs(simulated, x)
    for exit, logits in wanted.items():
        assert 0 < float((found[exit] - logits).std() / logits.std()) < 0.4


def test_the_networks_own_parameters_learn_through_the_rounding() -> None:
    model = trained.net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    simulated = Simulated(model, typical(trained.reals())).train()
    loss = sum(logits.square().sum() for logits in simulated(typical(trained.reals())[:8]))
    loss.backward()
    assert {id(p) for p in simulated.parameters()} == {id(p) for p in model.parameters()}
    assert all(bool((p.grad != 0).any()) for p in model.parameters())
    for name, value in model.state_dict().items():  # batch statistics too
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_is_rounded_stays_where_it_is() -> None:
    # With weights and activations on their grids already, a second rounding changes nothing.
    x = typical(trained.reals())
    simulated = Simulated(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), x)
    with torch.no_grad():
        once = simulated(x)
        torch.testing.assert_close(simulated(once.reshape(x.shape)), once.relu(), rtol=0, atol=0)
        assert len(once.unique()) <= 256 < len(typical(trained.reals()).unique()) + 256


@pytest.mark.parametrize("factor", [1.0, 100.0, 1000.0])
def test_after_correcting_biases_every_layer_has_the_float_networks_mean(factor: float) -> None:
    model, x = trained.net(), typical(trained.reals())
    trained.make_hostile(model, factor)
    wanted = _norm_means(model, x, model)

    simulated = Simulated(model, x)
    before = _norm_means(model, x, simulated)
    shifted = simulated.correct_biases()
    after = _norm_means(model, x, simulated)

    convs = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert shifted == convs + 2  # and the linear layer of each exit
    strays = [_worst(found, wanted) for found in (before, after)]
    # Ranges are taken anew after the shifts, so the means agree closely, not exactly.
    assert strays[1] < 0.35 * strays[0]


def _norm_means(model, x, run) -> dict:
    results = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _given, result, name=name: results.__setitem__(name, result)
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    with torch.no_grad():
        run(x)
    for handle in handles:
        handle.remove()
    return {name: (value.mean((0, 2, 3)), value.std()) for name, value in results.items()}


def _worst(found, wanted) -> float:
    shares = [((found[n][0] - mean).abs().mean() / std) for n, (mean, std) in wanted.items()]
    return float(sum(shares))


def test_infinite_values_are_named_and_not_counted() -> None:
    model = trained.net()
    with torch.no_grad():
        model.blocks[0].first[1].weight.fill_(float("inf"))
    with pytest.raises(BadFile, match="for real samples"):
        Simulated(model, typical(trained.reals()))


def test_exits_keep_their_names() -> None:
    model, reals = host_nets.conv_net()
    simulated = Simulated(model, typical(reals))
    with torch.no_grad():
        assert list(exit_outputs(simulated, typical(reals))) == ["small", "middle", "final"]
