"""
Put linear exits onto inner tensors of a finished .tflite, fitted on labelled samples.

Callers see with_exits. Such a file cannot be trained, but its features can be read: each exit is
the mean over the map's places and one linear layer, fitted by multinomial logistic regression in
numpy. In a quantized file the new operators are quantized like its own, so that a board runs one
set of kernels. Hidden here: one scale for all features, because weights that undo each feature's
own spread would lose their small ones when they are quantized.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit import tflite
from edgeexit.errors import Unsupported
from edgeexit.host.answers import RealSamples, finite
from edgeexit.host.grafts import Graft
from edgeexit.interpreter import open_interpreter
from edgeexit.preprocess import quantize as to_stored
from edgeexit.tflite import Model, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS = 1500
DECAY = 1e-3  # on squared weights, features having a spread of about 1
# dtype -> its lowest level, and the zero point of its weights.
_LEVELS = {"int8": (-128, 0), "uint8": (0, 128)}


def with_exits(
    model: Model,
    at: Mapping[str, int],
    reals: RealSamples,
    labels: "NDArray[np.int64]",
    classes: int,
) -> tuple[Model, dict[str, int]]:
    """
    *model* with a linear exit on each of the tensors *at* (exit name -> tensor index).

    Tensors are maps (1, ..., C), averaged over their places, or features (1, C). *labels* (N,)
    in 0..classes-1 belong to *reals*. Returns the grown model, and exit name -> index of its
    logits (1, classes). Unsupported for tensors that take no exit, BadFile for NaN in them.
    Equal arguments give equal exits on one kind of machine.
    """
    for name, index in at.items():
        _check_takes_exit(model, name, model.tensors[index])
    features = _features(model, at, reals)
    graft, made = Graft(model), {}
    for name, index in at.items():
        weights, bias = fit(features[name], labels, classes)
        made[name] = _graft_exit(graft, index, features[name], weights, bias)
    return graft.model, made


def fit(
    features: "NDArray[np.float32]", labels: "NDArray[np.int64]", classes: int
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Weights (classes, C) and bias (classes,) of multinomial regression on *features* (N, C)."""
    middle, spread = features.mean(axis=0), max(float(features.std()), 1e-12)
    x = np.hstack([(features - middle) / spread, np.ones((len(features), 1))]).astype(np.float64)
    wanted = np.eye(classes)[labels]
    decay = np.full(x.shape[1], DECAY)
    decay[-1] = 0.0
    # The loss's curvature is at most half of the features'; Nesterov's method needs a bound.
    pace = 1 / (0.5 * float(np.linalg.eigvalsh(x.T @ x / len(x))[-1]) + DECAY)
    weights = ahead = np.zeros((classes, x.shape[1]))
    for step in range(STEPS):
        powers = np.exp((logits := x @ ahead.T) - logits.max(axis=1, keepdims=True))
        errors = powers / powers.sum(axis=1, keepdims=True) - wanted
        moved = ahead - pace * (errors.T @ x / len(x) + ahead * decay)
        ahead = moved + step / (step + 3) * (moved - weights)
        weights = moved
    real = weights[:, :-1] / spread
    return real, weights[:, -1] - real @ middle


def _check_takes_exit(model: Model, name: str, tensor: Tensor) -> None:
    place = f"{model.where}: exit {name!r}"
    if len(tensor.shape) < 2 or tensor.shape[0] != 1:
        raise Unsupported(f"{place}: shape {list(tensor.shape)} takes no exit, expected a map")
    if tensor.dtype != "float32" and (tensor.dtype not in _LEVELS or len(tensor.scales) != 1):
        raise Unsupported(
            f"{place}: a map of {tensor.dtype} takes no exit, expected float32, int8 or uint8"
        )


def _features(
    model: Model, at: Mapping[str, int], reals: RealSamples
) -> "dict[str, NDArray[np.float32]]":
    """What each tensor of *at* holds, averaged over its places: exit name -> (N, C)."""
    names = {index: f"features of {name}" for name, index in at.items()}
    data = tflite.write_model(
        model,
        range(len(model.operators)),
        model.inputs,
        list(names),
        description="features",
        names={**names, model.inputs[0]: "input"},
    )
    network = open_interpreter(data, where=model.where)
    feed = model.tensors[model.inputs[0]].spec(model.where)
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in at}
    for real in reals:
        stored = to_stored(real[None], feed.dtype, feed.scale, feed.zero_point)
        network.inputs["input"][...] = stored
        network.invoke()
        for name, index in at.items():
            tensor = model.tensors[index]
            values = network.outputs[names[index]].reshape(-1, tensor.shape[-1])
            mean = values.mean(axis=0, dtype=np.float64)
            if tensor.scales:
                mean = (mean - tensor.zero_points[0]) * tensor.scales[0]
            rows[name].append(mean.astype(np.float32))
    return {name: finite(name, np.stack(means)) for name, means in rows.items()}


def _graft_exit(
    graft: Graft,
    x: int,
    features: "NDArray[np.float32]",
    weights: "NDArray[np.float64]",
    bias: "NDArray[np.float64]",
) -> int:
    tensor = graft.tensor(x)
    is_map = len(tensor.shape) > 2
    if tensor.dtype == "float32":
        mean = graft.mean(x, 0.0, 0) if is_map else x
        held = graft.constant(weights.astype(np.float32)), graft.constant(bias.astype(np.float32))
        return graft.linear(mean, *held, 0.0, 0)
    lowest, middle = _LEVELS[tensor.dtype]
    scale, mean = tensor.scales[0], x
    if is_map:
        scale, zero_point = _levels(features, lowest)
        mean = graft.mean(x, scale, zero_point)
    step = float(np.float32(max(float(np.abs(weights).max()), 1e-12) / 127))
    stored = (np.rint(weights / step) + middle).astype(tensor.dtype)
    offset = np.rint(bias / (step * scale)).clip(-(2**30), 2**30).astype(np.int32)
    held = graft.constant(stored, step, middle), graft.constant(offset, step * scale)
    return graft.linear(mean, *held, *_levels(features @ weights.T + bias, lowest))


def _levels(values: "NDArray[Any]", lowest: int) -> tuple[float, int]:
    """Scale and zero point of 256 levels, the first of them *lowest*, over *values* and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = float(np.float32(max(high - low, 1e-12) / 255))
    return scale, lowest + round(-low / scale)
