"""Facts about activation ranges and int8 networks."""

import numpy as np
import pytest

from edgeexit.errors import BadFile

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("ai_edge_quantizer")

from edgeexit import cut, tflite  # noqa: E402
from edgeexit.host import answers, lower, quantize  # noqa: E402
from edgeexit.host.quantize import Histogram  # noqa: E402
from tests import host_nets  # noqa: E402


@pytest.fixture(scope="module")
def net():
    return host_nets.conv_net(count=150, seed=1)


@pytest.fixture(scope="module")
def lowered(net):
    return lower.from_torch(net[0], (1, 1, 12, 12), host_nets.GRAY)


@pytest.fixture(scope="module")
def quantized(net, lowered):
    return quantize.int8(lowered, net[1])


def histogram(*batches: np.ndarray) -> Histogram:
    total = Histogram()
    for batch in batches:
        total.add(batch.astype(np.float32))
    return total


def test_a_histogram_grows_and_adds_up_in_any_order() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, size, 500) for size in (0.01, 30.0, 1.0)]
    whole = histogram(*batches)

    for parts in (batches, batches[::-1]):
        first, second = histogram(parts[0]), histogram(*parts[1:])
        for total in (first + second, second + first):
            assert (total.low, total.high, total.width) == (whole.low, whole.high, whole.width)
            assert np.array_equal(total.counts, whole.counts)
    assert whole.counts.sum() == 1500
    assert whole.high == np.float32(max(batch.max() for batch in batches))


def test_a_histogram_takes_tensors_that_are_all_zero() -> None:
    zeros = histogram(np.zeros(10))

    for way in quantize.RANGES.values():
        assert way(zeros + zeros) == (0.0, 0.0)


def test_robust_ranges_leave_an_outlier_out_and_mse_errs_least() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400_000).astype(np.float32)
    values[0] = 60.0
    whole = histogram(*values.reshape(10, -1))
    ends = {name: way(whole) for name, way in quantize.RANGES.items()}

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.rint(np.clip(values, low, high) / step) * step - values).mean())

    assert ends["minmax"][1] == 60.0
    assert 3 < ends["percentile"][1] < 6
    assert ends["mse"][1] < 50
    assert error(*ends["mse"]) == min(error(*pair) for pair in ends.values())


def test_percentile_clips_the_stated_share() -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 1_000_000)

    low, high = quantize.RANGES["percentile"](histogram(values))

    assert np.mean(values < low) <= quantize.TAIL
    assert low == pytest.approx(-1 + 4 * quantize.TAIL, abs=0.01)
    assert high == pytest.approx(3 - 4 * quantize.TAIL, abs=0.01)


def test_only_computed_tensors_get_ranges(lowered, net) -> None:
    ranges = quantize.activation_ranges(lowered, net[1].first(5))
    model = tflite.read_model(lowered.data)
    constants = {tensor.name for tensor in model.tensors if tensor.constant is not None}

    assert set(ranges) == {tensor.name for tensor in model.tensors} - constants


def test_int8_goes_in_and_comes_out_and_agrees_with_float(quantized) -> None:
    inputs, outputs = cut.model_io(quantized.data)

    assert [spec.dtype for spec in (*inputs, *outputs)] == ["int8"] * 4
    assert {spec.name for spec in outputs} == set(quantized.exits.values())
    assert min(quantized.agreement.values()) >= 0.9
    assert set(quantized.candidates) == set(quantize.RANGES)
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
    assert quantize.int8(lowered, net[1]).data == quantized.data


def test_the_float_scheme_leaves_the_network_alone(lowered, net) -> None:
    result = quantize.SCHEMES["float"](lowered, net[1], None)

    assert result.data == lowered.data
    assert result.ranges == "none"


def test_values_that_are_not_finite_name_their_tensor() -> None:
    net = host_nets.Rows()
    net.body.weight.data.fill_(1e30)
    lowered = lower.from_torch(net, (1, 8), host_nets.ROW)
    huge = answers.RealSamples(np.full((5, 8), 1e10, np.float32), host_nets.ROW)

    with pytest.raises(BadFile, match="tensor 't0'"):
        quantize.activation_ranges(lowered, huge)


def test_operators_that_xnnpack_does_not_take_are_named() -> None:
    net = host_nets.Rows(lambda x: torch.cumsum(x, 1))
    lowered = lower.from_torch(net, (1, 8), host_nets.ROW)

    assert quantize.outside_xnnpack(lowered.data) == {"CUMSUM": 1}
