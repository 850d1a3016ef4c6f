"""
What values the tensors of a float network take on real samples, and which range to keep.

Callers see Histogram, RANGES, activation_ranges and operators. Hidden here: one histogram per
tensor grows while samples stream through the network, and several ways read a range out of it.
The quantizer's own statistics are not used: they are a moving average, which depends on the
order of the samples and saturates the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.errors import BadFile
from edgeexit.host.answers import RealSamples
from edgeexit.host.lowered import Lowered

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 2048  # on either side of zero
TAIL = 1e-4  # share of values that "percentile" clips at either end
SHRINKS = [k / 40 for k in range(40, 1, -1)]  # parts of the full range that "mse" tries
OVERFLOW = 3e38  # LiteRT's kernels clamp infinity to the largest float32
SEEN_VALUES = 1 << 16  # of one tensor in one sample: enough for tails of 1e-4

Advance = Callable[[float], None]


@dataclass(eq=False)
class Histogram:
    """
    The values that one tensor takes: their true ends, and counts in bins of a power of two.

    Bin i holds the values in [(i - 2048) * width, (i - 2047) * width). When a value falls
    outside, the width doubles and neighbours merge, so one pass suffices, memory stays fixed,
    and two histograms add up exactly in any order.
    """

    low: float = np.inf
    high: float = -np.inf
    width: float = 0.0
    counts: "NDArray[np.int64]" = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def add(self, values: "NDArray[np.float32]") -> None:
        """
        Count *values* (any shape); of very large tensors, every n-th value.

        ValueError for NaN and infinity, and for what LiteRT's kernels make of infinity.
        """
        low, high = float(values.min()), float(values.max())
        if not (low > -OVERFLOW and high < OVERFLOW):
            raise ValueError(f"values from {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(self.low, self.high)
        flat = values.reshape(-1)
        # An odd stride does not march in step with channels, which come in even numbers.
        seen = flat[:: len(flat) // SEEN_VALUES | 1]
        places = np.floor(seen * (1.0 / self.width)).astype(np.int64) + BINS
        self.counts += np.bincount(np.minimum(places, 2 * BINS - 1), minlength=2 * BINS)

    def __add__(self, other: "Histogram") -> "Histogram":
        total = Histogram(low=self.low, high=self.high, width=self.width, counts=self.counts.copy())
        addend = Histogram(width=other.width, counts=other.counts.copy())
        total._cover(other.low, other.high)
        total._widen(other.width)
        addend._widen(total.width)
        total.counts += addend.counts
        total.low, total.high = min(self.low, other.low), max(self.high, other.high)
        return total

    def _cover(self, low: float, high: float) -> None:
        reach = max(-low, high, 1e-12)
        self._widen(2.0 ** (np.floor(np.log2(reach)) + 1) / BINS)

    def _widen(self, width: float) -> None:
        if self.width == 0.0:
            self.width = width
        while self.width < width:
            merged = np.zeros_like(self.counts)
            merged[BINS // 2 : BINS + BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts, self.width = merged, self.width * 2


def _minmax(values: Histogram) -> tuple[float, float]:
    return values.low, values.high


def _percentile(values: Histogram) -> tuple[float, float]:
    # The edges beyond which a share of TAIL lies; never outside the true ends.
    below = np.cumsum(values.counts)
    first = int(np.searchsorted(below, TAIL * below[-1], side="right"))
    last = int(np.searchsorted(below, (1 - TAIL) * below[-1], side="left"))
    low, high = (first - BINS) * values.width, (last + 1 - BINS) * values.width
    return max(values.low, low), min(values.high, high)


def _mse(values: Histogram) -> tuple[float, float]:
    # Shrink one end, then the other, to the least squared error: what is clipped, plus a
    # twelfth of the squared step for what is rounded. Two rounds settle it.
    centres = (np.arange(2 * BINS) - BINS + 0.5) * values.width
    ends = [min(values.low, 0.0), max(values.high, 0.0)]

    def error(low: float, high: float) -> float:
        lost = centres - np.clip(centres, low, high)
        return float((values.counts * (lost**2 + ((high - low) / 255) ** 2 / 12)).sum())

    low, high = ends
    for _ in range(2):
        high = min((ends[1] * part for part in SHRINKS), key=lambda end: error(low, end))
        low = min((ends[0] * part for part in SHRINKS), key=lambda end: error(end, high))
    return low, high


RANGES: dict[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
}


def activation_ranges(
    lowered: Lowered, reals: RealSamples, advance: Advance | None = None
) -> dict[str, Histogram]:
    """
    What every computed tensor of the float network holds over *reals*: name -> Histogram.

    Constants are left out: a range for a weight would make the quantizer treat it per tensor
    instead of per channel. BadFile if any value is NaN or infinite.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=lowered.data,
        num_threads=1,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    feed = interpreter.get_input_details()[0]["index"]
    computed = {feed} | {int(i) for op in operators(interpreter) for i in op["outputs"]}
    watched = {
        detail["name"]: detail["index"]
        for detail in interpreter.get_tensor_details()
        if detail["index"] in computed and detail["dtype"] is np.float32
    }
    histograms = {name: Histogram() for name in watched}
    for done, real in enumerate(reals):
        interpreter.set_tensor(feed, real[None])
        interpreter.invoke()
        for name, index in watched.items():
            try:
                histograms[name].add(interpreter.get_tensor(index))
            except ValueError as error:
                raise BadFile(
                    f"tensor {name!r} is NaN or infinite for a real sample",
                    hint="check the network's weights and the preprocessing's mean and std",
                ) from error
        if advance is not None:
            advance((done + 1) / len(reals))
    return histograms


def operators(interpreter: Any) -> list[dict[str, Any]]:
    """The operators of an allocated LiteRT *interpreter*: op_name, index, inputs, outputs."""
    # No public call lists operators; LiteRT's own quantization debugger uses this one.
    return list(interpreter._get_ops_details())
