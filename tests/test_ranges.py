"""Facts about the ranges of values that tensors take."""

import numpy as np
import pytest

from edgeexit.errors import BadFile

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit import tflite  # noqa: E402
from edgeexit.host import answers, lower, ranges  # noqa: E402
from edgeexit.host.ranges import Histogram  # noqa: E402
from tests import host_nets  # noqa: E402


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

    for way in ranges.RANGES.values():
        assert way(zeros + zeros) == (0.0, 0.0)


def test_robust_ranges_leave_an_outlier_out_and_mse_errs_least() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400_000).astype(np.float32)
    values[0] = 60.0
    whole = histogram(*values.reshape(10, -1))
    ends = {name: way(whole) for name, way in ranges.RANGES.items()}

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.rint(np.clip(values, low, high) / step) * step - values).mean())

    assert ends["minmax"][1] == 60.0
    assert 3 < ends["percentile"][1] < 6
    assert ends["mse"][1] < 50
    assert error(*ends["mse"]) == min(error(*pair) for pair in ends.values())


def test_percentile_clips_the_stated_share() -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 1_000_000)

    low, high = ranges.RANGES["percentile"](histogram(values))

    assert np.mean(values < low) <= ranges.TAIL
    assert low == pytest.approx(-1 + 4 * ranges.TAIL, abs=0.01)
    assert high == pytest.approx(3 - 4 * ranges.TAIL, abs=0.01)


def test_only_computed_tensors_get_ranges() -> None:
    net, reals = host_nets.conv_net(count=5, seed=1)
    lowered = lower.from_torch(net, (1, 1, 12, 12), host_nets.GRAY)
    found = ranges.activation_ranges(lowered, reals)
    model = tflite.read_model(lowered.data)
    constants = {tensor.name for tensor in model.tensors if tensor.constant is not None}

    assert set(found) == {tensor.name for tensor in model.tensors} - constants


def test_values_that_are_not_finite_name_their_tensor() -> None:
    net = host_nets.Rows()
    net.body.weight.data.fill_(1e30)
    lowered = lower.from_torch(net, (1, 8), host_nets.ROW)
    huge = answers.RealSamples(np.full((5, 8), 1e10, np.float32), host_nets.ROW)

    with pytest.raises(BadFile, match="tensor 't0'"):
        ranges.activation_ranges(lowered, huge)
