"""Biases of channels that pruning left without weights survive int8."""

import numpy as np
import pytest

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit import tflite  # noqa: E402
from edgeexit.host import answers, lower, quantize  # noqa: E402
from edgeexit.host.schemes import SCHEMES  # noqa: E402
from tests import host_nets  # noqa: E402


def network(zeroed: int, left: float = 0.0) -> tuple[torch.nn.Module, answers.RealSamples]:
    """Three convolutions; the weights of *zeroed* of 16 filters of each are as small as *left*."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    reals = answers.RealSamples(host_nets.pictures(100), host_nets.GRAY)
    model = host_nets.settled(model, reals)
    for layer in model[:6:2]:
        layer.weight.data[:zeroed] = left * torch.sign(layer.weight.data[:zeroed])
        layer.bias.data[:zeroed] = torch.linspace(-1, 3, zeroed)
    return model, reals


def lowered(zeroed: int, left: float = 0.0):
    model, reals = network(zeroed, left)
    return lower.from_torch(model, (1, 1, 12, 12), host_nets.GRAY), reals


def worst(found: quantize.Quantized, floats, reals) -> float:
    """The largest error of a logit, in shares of the largest logit."""
    wanted = answers.tflite_logits(floats.data, floats.exits, reals)
    got = quantize.real_logits(found.data, found.exits, reals)
    return max(float(np.abs(got[k] - wanted[k]).max() / np.abs(wanted[k]).max()) for k in wanted)


@pytest.mark.parametrize(
    ("scheme", "zeroed", "left"),
    [("int8", 3, 0.0), ("int8", 3, 1e-9), ("int8", 15, 0.0), ("int16x8", 3, 0.0)],
)
def test_what_is_left_of_a_zeroed_filter_is_its_bias(
    scheme: str, zeroed: int, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats, reals = lowered(zeroed, left)

    found = SCHEMES[scheme](floats, reals, None)

    assert scheme != "int8" or found.outside_xnnpack == {}
    assert worst(found, floats, reals) < 0.05
    monkeypatch.setattr(quantize, "with_whole_biases", lambda model, floats: model)
    assert worst(SCHEMES[scheme](floats, reals, None), floats, reals) > 0.2


def test_no_bias_is_at_the_end_of_its_numbers_and_other_channels_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floats, reals = lowered(5)
    after = tflite.read_model(SCHEMES["int8"](floats, reals, None).data)
    monkeypatch.setattr(quantize, "with_whole_biases", lambda model, floats: model)
    before = tflite.read_model(SCHEMES["int8"](floats, reals, None).data)

    assert len(after.tensors) == len(before.tensors)
    moved = {"int8": 0, "int32": 0}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.constant is None or not old.scales:
            continue
        stays = np.array(old.scales) == np.array(new.scales)
        numbers = [t.constant.view(t.dtype).reshape(t.shape) for t in (old, new)]
        axis = -1 if numbers[0].shape[0] == 1 else 0  # of each channel apart: they lie last
        numbers = [np.moveaxis(n, axis, 0) for n in numbers]
        assert (numbers[0] == numbers[1])[stays].all()
        assert new.dtype != "int32" or np.abs(numbers[1]).max() <= 2**30
        moved[old.dtype] += int((~stays).sum())
    assert moved == {"int8": 3 * 5, "int32": 3 * 5}


@pytest.mark.parametrize("granularity", ["CHANNELWISE", "TENSORWISE"])
def test_a_network_without_such_channels_stays_byte_for_byte(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats, reals = lowered(0)
    activations = {"num_bits": 8, "symmetric": False, "granularity": "TENSORWISE", "dtype": "INT"}
    weights = {**activations, "symmetric": True, "granularity": granularity}
    config = {"weight_tensor_config": weights, "activation_tensor_config": activations}
    config |= {"compute_precision": "INTEGER", "explicit_dequantize": False}
    config |= {"skip_checks": False, "min_weight_elements": 0}
    entry = {"regex": ".*", "operation": "*", "algorithm_key": "min_max_uniform_quantize"}
    scheme = quantize.by_recipe([{**entry, "op_config": config}])

    after = scheme(floats, reals, None).data

    monkeypatch.setattr(quantize, "with_whole_biases", lambda model, floats: model)
    assert scheme(floats, reals, None).data == after
