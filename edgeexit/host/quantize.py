"""
Turn a float multi-exit .tflite into an int8 one, with activation ranges of our own.

Callers see SCHEMES, Quantized and activation_ranges. Hidden here: one histogram per tensor
grows while samples stream through the float network, several ways to read a range out of it
are tried, and the one whose int8 network agrees best with the float one on held-out samples
wins. The quantizer's own statistics are not used: they are a moving average, which depends on
the order of the samples and saturates the logits.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit import cut, tflite
from edgeexit.errors import BadFile, Unsupported
from edgeexit.host.answers import RealSamples, spread, tflite_logits
from edgeexit.host.lowered import Lowered
from edgeexit.host.quiet import quietly
from edgeexit.interpreter import check_loads
from edgeexit.preprocess import quantize as to_stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 2048  # on either side of zero
HELD_OUT = 5  # one sample in five chooses between the ranges that the other four suggest
TAIL = 1e-4  # share of values that "percentile" clips at either end
SHRINKS = [k / 40 for k in range(40, 1, -1)]  # parts of the full range that "mse" tries
OVERFLOW = 3e38  # LiteRT's kernels clamp infinity to the largest float32
SEEN_VALUES = 1 << 16  # of one tensor in one sample: enough for tails of 1e-4

Advance = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """
    One multi-exit .tflite as it will be deployed.

    *data* and *exits* as in Lowered; *ranges* the entry of RANGES that won ("none" for float);
    *candidates* for every entry tried: share of held-out answers (mean over the exits) equal
    to the float network's; *agreement* that share per exit on all samples;
    *outside_xnnpack* operator -> count of those that run on slower kernels on this machine.
    """

    data: bytes
    exits: Mapping[str, str]
    ranges: str
    candidates: Mapping[str, float]
    agreement: Mapping[str, float]
    outside_xnnpack: Mapping[str, int]


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
    computed = {feed} | {int(i) for op in _operators(interpreter) for i in op["outputs"]}
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


def int8(lowered: Lowered, reals: RealSamples, advance: Advance | None = None) -> Quantized:
    """
    Static int8: weights per channel, activations per tensor, int8 in and out.

    The ways of RANGES compete on a held-out fifth of *reals*: most answers equal to the float
    network's (mean over the exits), then smallest error of the logits. The winner's ranges
    are then taken over all of *reals*. Input and logits always keep their true ends: clipped
    logits would tie, and no threshold tells ties apart.
    """
    order = spread(len(reals))
    held, fit = reals[order[: len(reals) // HELD_OUT]], reals[order[len(reals) // HELD_OUT :]]
    step = (lambda _: None) if advance is None else advance
    fitted = activation_ranges(lowered, fit, lambda part: step(0.6 * part))
    rest = activation_ranges(lowered, held, lambda part: step(0.6 + 0.15 * part))
    wanted = tflite_logits(lowered.data, lowered.exits, held)
    scores: dict[str, tuple[float, float]] = {}
    for name in RANGES:
        data = _static_int8(lowered, fitted, name)
        scores[name] = _score(wanted, _real_logits(data, lowered.exits, held))
        step(0.75 + 0.2 * len(scores) / len(RANGES))
    best = max(scores, key=lambda name: (scores[name][0], -scores[name][1]))
    data = _static_int8(lowered, {name: fitted[name] + rest[name] for name in fitted}, best)
    check_loads(data, "quantized network")
    everything = tflite_logits(lowered.data, lowered.exits, reals)
    found = _real_logits(data, lowered.exits, reals)
    step(1.0)
    return Quantized(
        data=data,
        exits=lowered.exits,
        ranges=best,
        candidates={name: agree for name, (agree, _) in scores.items()},
        agreement={name: _agreement(everything[name], found[name]) for name in everything},
        outside_xnnpack=outside_xnnpack(data),
    )


def unquantized(lowered: Lowered, reals: RealSamples, advance: Advance | None = None) -> Quantized:
    """The float network as it is."""
    return Quantized(
        data=lowered.data,
        exits=lowered.exits,
        ranges="none",
        candidates={},
        agreement=dict.fromkeys(lowered.exits, 1.0),
        outside_xnnpack=outside_xnnpack(lowered.data),
    )


Scheme = Callable[[Lowered, RealSamples, Advance | None], Quantized]

SCHEMES: dict[str, Scheme] = {"int8": int8, "float": unquantized}


def outside_xnnpack(data: bytes) -> dict[str, int]:
    """
    Operators that XNNPACK did not take on this machine, by name: they run on slower kernels.

    The interpreter lists a delegate's node behind the file's own operators. A delegate has
    taken exactly what lies between that node's outputs and its inputs.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    operators = _operators(interpreter)
    maker = {int(i): op for op in operators for i in op["outputs"] if op["op_name"] != "DELEGATE"}
    taken: set[int] = set()
    for node in operators:
        if node["op_name"] != "DELEGATE":
            continue
        given, open_ends = set(node["inputs"].tolist()), node["outputs"].tolist()
        while open_ends:
            index = open_ends.pop()
            operator = maker.get(index)
            if index in given or operator is None or operator["index"] in taken:
                continue
            taken.add(operator["index"])
            open_ends.extend(operator["inputs"].tolist())
    left = (op for op in operators if op["index"] not in taken and op["op_name"] != "DELEGATE")
    return dict(sorted(Counter(op["op_name"] for op in left).items()))


def _operators(interpreter: Any) -> list[dict[str, Any]]:
    # No public call lists operators; LiteRT's own quantization debugger uses this one.
    return list(interpreter._get_ops_details())


def _static_int8(lowered: Lowered, values: Mapping[str, Histogram], choice: str) -> bytes:
    specs, logits = cut.model_io(lowered.data, "lowered network")
    ends = {spec.name for spec in (*specs, *logits)}
    ranges = {
        name: (_minmax if name in ends else RANGES[choice])(histogram)
        for name, histogram in values.items()
    }
    with quietly():
        from ai_edge_quantizer import quantizer, recipe

        engine = quantizer.Quantizer(bytearray(lowered.data))
        engine.load_quantization_recipe(recipe.static_wi8_ai8())
        ranks = {name: len(shape) for name, shape in _shapes(lowered.data).items()}
        statistics = {
            name: {
                "min": np.full([1] * ranks[name], low, np.float32),
                "max": np.full([1] * ranks[name], high, np.float32),
            }
            for name, (low, high) in ranges.items()
        }
        try:
            result = engine.quantize(statistics, enable_progress_report=False)
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            raise Unsupported(
                f"the network cannot be quantized to int8: {' '.join(str(error).split())[:300]}",
                hint="convert with --scheme float",
            ) from error
    data = bytes(result.quantized_model)
    _check_int8(data, lowered.exits)
    return data


def _check_int8(data: bytes, exits: Mapping[str, str]) -> None:
    inputs, outputs = cut.model_io(data, "quantized network")
    dtypes = {spec.name: spec.dtype for spec in outputs}
    for name, tensor in exits.items():
        if dtypes.get(tensor) != "int8":
            raise Unsupported(
                f"exit {name!r}: its logits come out as {dtypes.get(tensor)}, expected int8: the "
                "operator that makes them is not quantized",
                hint="end each exit with a linear layer, or convert with --scheme float",
            )
    if [spec.dtype for spec in inputs] != ["int8"]:
        raise Unsupported(
            f"the input stays {inputs[0].dtype}, expected int8: the first operator is not "
            "quantized",
            hint="convert with --scheme float",
        )


def _shapes(data: bytes) -> dict[str, tuple[int, ...]]:
    tensors = tflite.read_model(data, "lowered network").tensors
    return {tensor.name: tensor.shape for tensor in tensors}


def _real_logits(
    data: bytes, exits: Mapping[str, str], reals: RealSamples
) -> "dict[str, NDArray[np.float32]]":
    # Logits in real numbers, so that their errors can be compared.
    inputs, outputs = cut.model_io(data, "quantized network")
    feed, specs = inputs[0], {spec.name: spec for spec in outputs}
    stored = (to_stored(real, feed.dtype, feed.scale, feed.zero_point) for real in reals)
    answers = tflite_logits(data, exits, stored)
    return {
        name: (logits.astype(np.float32) - specs[exits[name]].zero_point)
        * np.float32(specs[exits[name]].scale)
        for name, logits in answers.items()
    }


def _agreement(wanted: "NDArray[np.float32]", found: "NDArray[np.float32]") -> float:
    return float((wanted.argmax(axis=1) == found.argmax(axis=1)).mean())


def _score(
    wanted: "Mapping[str, NDArray[np.float32]]", found: "Mapping[str, NDArray[np.float32]]"
) -> tuple[float, float]:
    # Mean over the exits of: equal answers, and squared error over the logits' own variance.
    agree = [_agreement(wanted[name], found[name]) for name in wanted]
    error = [
        float(np.square(wanted[name] - found[name]).mean() / max(wanted[name].var(), 1e-12))
        for name in wanted
    ]
    return float(np.mean(agree)), float(np.mean(error))
