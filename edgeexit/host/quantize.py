"""
Carry a recipe out: from a float multi-exit .tflite to the one that is deployed.

Callers see by_recipe, Scheme, Quantized, finished, check_ends, real_logits and agreement. A
recipe says operator by operator what becomes an integer; it is carried out on the uncut network,
so that what one segment gives the next one takes. Hidden here: where a recipe wants activation
ranges, several ways to read them compete (edgeexit.host.ranges), and the one whose network agrees
best with the float one on held-out samples wins.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit import cut, tflite
from edgeexit.errors import Unsupported
from edgeexit.host.answers import RealSamples, spread, tflite_logits
from edgeexit.host.biases import with_whole_biases
from edgeexit.host.lowered import Lowered
from edgeexit.host.quiet import quietly
from edgeexit.host.ranges import RANGES, Advance, Histogram, activation_ranges, operators
from edgeexit.interpreter import check_loads
from edgeexit.preprocess import quantize as to_stored
from edgeexit.runtime import real_logits as to_real

if TYPE_CHECKING:
    from numpy.typing import NDArray

HELD_OUT = 5  # one sample in five chooses between the ranges that the other four suggest
FULL = "minmax"

Recipe = Sequence[Mapping[str, Any]]
"""What becomes of which operators, as ai-edge-quantizer's recipes say it; later entries win."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """
    One multi-exit .tflite as it will be deployed.

    *data* and *exits* as in Lowered; *ranges* the entry of RANGES that won ("none" where no
    activation becomes an integer); *candidates* for every entry that competed: share of held-out
    answers (mean over the exits) equal to the float network's; *agreement* that share per exit on
    all samples; *outside_xnnpack* operator -> count of those that run on slower kernels here.
    """

    data: bytes
    exits: Mapping[str, str]
    ranges: str
    candidates: Mapping[str, float]
    agreement: Mapping[str, float]
    outside_xnnpack: Mapping[str, int]


Scheme = Callable[[Lowered, RealSamples, Advance | None], Quantized]
"""Told the share of the work that is done, if there is somebody to tell."""


def by_recipe(recipe: Recipe, *, ends: str | None = None) -> Scheme:
    """
    The scheme that carries *recipe* out; input and logits must come out as *ends* (None: any).

    Where it makes integers of activations of 8 bits, the ways of RANGES compete on a held-out
    fifth of the samples: most answers equal to the float network's (mean over the exits), then
    smallest error of the logits; the winner's ranges are then taken over all samples. Activations
    of 16 bits keep their true ends, and so do input and logits always: clipped logits would tie,
    and no threshold tells ties apart.
    """
    bits = {_activation_bits(entry) for entry in recipe} - {None}

    def scheme(lowered: Lowered, reals: RealSamples, advance: Advance | None = None) -> Quantized:
        step = (lambda _: None) if advance is None else advance
        scores: dict[str, tuple[float, float]] = {}
        best = "none"
        if not bits:
            data = _carry_out(recipe, lowered, None, best)
        elif bits == {16}:
            best = FULL
            values = activation_ranges(lowered, reals, lambda part: step(0.5 * part))
            data = _carry_out(recipe, lowered, values, best)
        else:
            scores, values = _compete(recipe, lowered, reals, step)
            best = max(scores, key=lambda name: (scores[name][0], -scores[name][1]))
            data = _carry_out(recipe, lowered, values, best)
        check_loads(data, "quantized network")
        check_ends(data, lowered.exits, ends)
        return finished(lowered, data, reals, best, {k: agree for k, (agree, _) in scores.items()})

    return scheme


def finished(
    lowered: Lowered,
    data: bytes,
    reals: RealSamples,
    ranges: str = "none",
    candidates: Mapping[str, float] | None = None,
) -> Quantized:
    """*data*, made out of *lowered*, with what can be told of it on *reals*."""
    wanted = tflite_logits(lowered.data, lowered.exits, reals)
    found = real_logits(data, lowered.exits, reals)
    return Quantized(
        data=data,
        exits=lowered.exits,
        ranges=ranges,
        candidates=candidates or {},
        agreement={name: agreement(wanted[name], found[name]) for name in wanted},
        outside_xnnpack=outside_xnnpack(data),
    )


def outside_xnnpack(data: bytes) -> dict[str, int]:
    """
    Operators that XNNPACK did not take on this machine, by name: they run on slower kernels.

    The interpreter lists a delegate's node behind the file's own operators. A delegate has
    taken exactly what lies between that node's outputs and its inputs.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    found = operators(interpreter)
    maker = {int(i): op for op in found for i in op["outputs"] if op["op_name"] != "DELEGATE"}
    taken: set[int] = set()
    for node in found:
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
    left = (op for op in found if op["index"] not in taken and op["op_name"] != "DELEGATE")
    return dict(sorted(Counter(op["op_name"] for op in left).items()))


def real_logits(
    data: bytes, exits: Mapping[str, str], reals: RealSamples
) -> "dict[str, NDArray[np.float32]]":
    """The answers of *data* in real numbers: exit name -> logits, float32 (N, classes)."""
    inputs, outputs = cut.model_io(data, "quantized network")
    feed, specs = inputs[0], {spec.name: spec for spec in outputs}
    stored = (to_stored(real, feed.dtype, feed.scale, feed.zero_point) for real in reals)
    answers = tflite_logits(data, exits, stored)
    return {name: to_real(logits, specs[exits[name]]) for name, logits in answers.items()}


def agreement(wanted: "NDArray[Any]", found: "NDArray[Any]") -> float:
    """The share of samples to which two arrays of logits (N, classes) give the same answer."""
    return float((wanted.argmax(axis=1) == found.argmax(axis=1)).mean())


def _activation_bits(entry: Mapping[str, Any]) -> int | None:
    config = entry.get("op_config") or {}
    activations = config.get("activation_tensor_config") or {}
    found = activations.get("num_bits")
    return found if isinstance(found, int) else None


def _compete(
    recipe: Recipe, lowered: Lowered, reals: RealSamples, step: Advance
) -> tuple[dict[str, tuple[float, float]], dict[str, Histogram]]:
    """The score of each way of RANGES, and the values of all tensors on all of *reals*."""
    order = spread(len(reals))
    held, fit = reals[order[: len(reals) // HELD_OUT]], reals[order[len(reals) // HELD_OUT :]]
    fitted = activation_ranges(lowered, fit, lambda part: step(0.6 * part))
    rest = activation_ranges(lowered, held, lambda part: step(0.6 + 0.15 * part))
    wanted = tflite_logits(lowered.data, lowered.exits, held)
    scores: dict[str, tuple[float, float]] = {}
    for name in RANGES:
        data = _carry_out(recipe, lowered, fitted, name)
        scores[name] = _score(wanted, real_logits(data, lowered.exits, held))
        step(0.75 + 0.2 * len(scores) / len(RANGES))
    return scores, {name: fitted[name] + rest[name] for name in fitted}


def _carry_out(
    recipe: Recipe, lowered: Lowered, values: Mapping[str, Histogram] | None, way: str
) -> bytes:
    statistics = None if values is None else _statistics(lowered, values, way)
    with quietly():
        from ai_edge_quantizer import quantizer

        try:
            engine = quantizer.Quantizer(bytearray(_signed(lowered.data)))
            engine.load_quantization_recipe([dict(entry) for entry in recipe])
            result = engine.quantize(statistics)
        # What it raises for a recipe or a network that it does not take is of any of these kinds.
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise Unsupported(
                f"the network cannot be quantized so: {' '.join(str(error).split())[:300]}",
                hint="convert with --scheme float",
            ) from error
    return _rewritten(bytes(result.quantized_model), lowered)


def _signed(data: bytes) -> bytes:
    """
    *data* with an empty list of signatures: the quantizer takes it for granted that there is one.

    Constants lie inside the file, as edgeexit writes them.
    """
    import flatbuffers  # type: ignore[import-untyped,unused-ignore]
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data)
    model.signatureDefs = []
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=tflite.IDENTIFIER)
    return bytes(builder.Output())


def _rewritten(data: bytes, lowered: Lowered) -> bytes:
    """
    *data* as edgeexit writes files, with biases that fit and the logits under their old names.

    Where the quantizer puts an operator behind them, its result is the output, of another name.
    """
    model = tflite.read_model(data, "quantized network")
    model = with_whole_biases(model, tflite.read_model(lowered.data, "lowered network"))
    wanted = [spec.name for spec in cut.model_io(lowered.data, "lowered network")[1]]
    places = {tensor.name: index for index, tensor in enumerate(model.tensors)}
    fresh: dict[int, str] = {}
    for index, name in zip(model.outputs, wanted, strict=True):
        if model.tensors[index].name != name:
            fresh |= {index: name, places[name]: model.tensors[index].name}
    return tflite.write_model(
        model,
        range(len(model.operators)),
        model.inputs,
        model.outputs,
        description="edgeexit",
        names=fresh,
    )


def _statistics(
    lowered: Lowered, values: Mapping[str, Histogram], way: str
) -> dict[str, dict[str, "NDArray[np.float32]"]]:
    """The quantizer's own form of the range of every tensor, read the *way* of RANGES."""
    specs, logits = cut.model_io(lowered.data, "lowered network")
    ends = {spec.name for spec in (*specs, *logits)}
    model = tflite.read_model(lowered.data, "lowered network")
    ranks = {tensor.name: len(tensor.shape) for tensor in model.tensors}
    found = {}
    for name, histogram in values.items():
        low, high = RANGES[FULL if name in ends else way](histogram)
        shape = [1] * ranks[name]
        found[name] = {
            "min": np.full(shape, low, np.float32),
            "max": np.full(shape, high, np.float32),
        }
    return found


def check_ends(data: bytes, exits: Mapping[str, str], wanted: str | None) -> None:
    """Unsupported unless input and logits are *wanted* (None: anything, the same at all exits)."""
    inputs, outputs = cut.model_io(data, "quantized network")
    dtypes = {spec.name: spec.dtype for spec in outputs}
    expected = wanted or dtypes.get(next(iter(exits.values())))
    for name, tensor in exits.items():
        if dtypes.get(tensor) != expected:
            raise Unsupported(
                f"exit {name!r}: its logits come out as {dtypes.get(tensor)}, expected {expected}"
                + (
                    ": the operator that makes them is not quantized"
                    if wanted
                    else " as at the first exit"
                ),
                hint="end each exit with a linear layer, or convert with --scheme float",
            )
    if [spec.dtype for spec in inputs] != [wanted or inputs[0].dtype]:
        raise Unsupported(
            f"the input stays {inputs[0].dtype}, expected {wanted}: the first operator is not "
            "quantized",
            hint="convert with --scheme float",
        )


def _score(
    wanted: "Mapping[str, NDArray[np.float32]]", found: "Mapping[str, NDArray[np.float32]]"
) -> tuple[float, float]:
    # Mean over the exits of: equal answers, and squared error over the logits' own variance.
    agree = [agreement(wanted[name], found[name]) for name in wanted]
    pairs = [(wanted[name].astype(np.float64), found[name]) for name in wanted]
    error = [float(np.square(a - b).mean() / max(a.var(), 1e-12)) for a, b in pairs]
    return float(np.mean(agree)), float(np.mean(error))
