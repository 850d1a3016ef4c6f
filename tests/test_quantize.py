"""Facts about int8 networks."""

import pytest

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("ai_edge_quantizer")

from edgeexit import cut, tflite  # noqa: E402
from edgeexit.host import answers, lower, quantize  # noqa: E402
from edgeexit.host.ranges import RANGES  # noqa: E402
from edgeexit.host.schemes import int8  # noqa: E402
from tests import host_nets  # noqa: E402


@pytest.fixture(scope="module")
def net():
    return host_nets.conv_net(count=150, seed=1)


@pytest.fixture(scope="module")
def lowered(net):
    return lower.from_torch(net[0], (1, 1, 12, 12), host_nets.GRAY)


@pytest.fixture(scope="module")
def quantized(net, lowered):
    return int8(lowered, net[1])


def test_int8_goes_in_and_comes_out_and_agrees_with_float(quantized) -> None:
    inputs, outputs = cut.model_io(quantized.data)

    assert [spec.dtype for spec in (*inputs, *outputs)] == ["int8"] * 4
    assert {spec.name for spec in outputs} == set(quantized.exits.values())
    assert min(quantized.agreement.values()) >= 0.9
    assert set(quantized.candidates) == set(RANGES)
    assert quantized.candidates[quantized.ranges] == max(quantized.candidates.values())
    assert quantized.outside_xnnpack == {}


def test_weights_are_quantized_per_channel(quantized) -> None:
    model = tflite.read_model(quantized.data)
    convolutions = [op for op in model.operators if op.kind.endswith("CONV_2D")]

    assert [len(model.tensors[op.inputs[1]].scales) for op in convolutions] == [8, 12, 16]


def test_no_logit_is_clipped_on_the_samples_that_gave_the_ranges(quantized, lowered, net) -> None:
    expected = answers.tflite_logits(lowered.data, lowered.exits, net[1])
    specs = {spec.name: spec for spec in cut.model_io(quantized.data)[1]}

    for name, tensor in quantized.exits.items():
        spec = specs[tensor]
        lowest, highest = (
            spec.scale * (-128 - spec.zero_point),
            spec.scale * (127 - spec.zero_point),
        )
        assert lowest <= expected[name].min() + spec.scale
        assert highest >= expected[name].max() - spec.scale


def test_equal_samples_give_equal_bytes(quantized, lowered, net) -> None:
    assert int8(lowered, net[1]).data == quantized.data


def test_operators_that_xnnpack_does_not_take_are_named() -> None:
    net = host_nets.Rows(lambda x: torch.cumsum(x, 1))
    lowered = lower.from_torch(net, (1, 8), host_nets.ROW)

    assert quantize.outside_xnnpack(lowered.data) == {"CUMSUM": 1}
