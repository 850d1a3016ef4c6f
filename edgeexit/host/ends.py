"""
Make every exit of a .tflite end in logits (1, classes), whatever the network answers with.

Callers see to_logits, as_given and ENDINGS. Thresholds are chosen on logits, so a SOFTMAX at an
exit's end is dropped; a network with one sigmoid answers for two classes: its one logit z is
widened to [0, z], whose softmax is that sigmoid. Hidden here: what may stand between (reshapes,
quantizers), and how a network that is no classifier is recognised: detection, segmentation and
regression are refused by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.errors import Unsupported
from edgeexit.host.grafts import Graft
from edgeexit.tflite import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CASTS = ("QUANTIZE", "DEQUANTIZE")
_THROUGH = (*_CASTS, "RESHAPE", "SQUEEZE", "EXPAND_DIMS")
_ONE = {"logits": "one logit", "probability of each": "one probability"}


def _softmax(x: "NDArray[Any]") -> "NDArray[Any]":
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _sigmoid(x: "NDArray[Any]") -> "NDArray[Any]":
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -80, 80))))


ENDINGS: "dict[str, Callable[[NDArray[Any]], NDArray[Any]]]" = {
    "logits": lambda x: x,
    "probabilities": _softmax,
    "log-probabilities": lambda x: np.log(np.maximum(_softmax(x), np.finfo(np.float32).tiny)),
    "probability of each": _sigmoid,
    "one logit": lambda x: x[:, 1:],
    "one probability": lambda x: _sigmoid(x[:, 1:]),
}
"""What an exit of the user's network ends in -> that, computed from our logits (N, classes)."""

_DROPPED = {
    "SOFTMAX": "probabilities",
    "LOG_SOFTMAX": "log-probabilities",
    "LOGISTIC": "probability of each",
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """
    A model whose exits are logits: exit name -> tensor index, all (1, classes) of one dtype.

    *endings* says for each exit what the network ended in before, a key of ENDINGS.
    """

    model: Model
    exits: Mapping[str, int]
    endings: Mapping[str, str]


def as_given(
    logits: "Mapping[str, NDArray[Any]]", endings: Mapping[str, str]
) -> "dict[str, NDArray[Any]]":
    """What the user's network answers where ours answers *logits* (exit name -> (N, classes))."""
    return {name: ENDINGS[endings.get(name, "logits")](rows) for name, rows in logits.items()}


def to_logits(model: Model, exits: Mapping[str, int]) -> Ended:
    """
    Bring the tensors *exits* (exit name -> index) of *model* into the form of logits.

    Unsupported for what no classifier answers with (boxes, maps, class numbers), and for exits
    that differ in their number of classes or in their dtype.
    """
    _refuse_detection(model, exits)
    graft, endings, ended = Graft(model), {}, {}
    for name, given in exits.items():
        tensor, ending = _before_end(model, given)
        _check_vector(model, name, tensor)
        shape = model.tensors[tensor].shape
        classes = shape[-1] if shape else 1
        if shape != (1, classes):
            tensor = graft.reshape(tensor, (1, classes))
        if classes == 1 and ending not in _ONE:
            raise Unsupported(f"{model.where}: exit {name!r}: softmax over one class answers 1")
        if classes == 1:
            tensor, ending = graft.pad_front(tensor), _ONE[ending]
        ended[name], endings[name] = tensor, ending
    _check_alike(graft, ended, model.where)
    return Ended(model=graft.model, exits=ended, endings=endings)


def width(model: Model, index: int) -> int | None:
    """How many classes the tensor *index* answers with, seen as an exit; None for maps."""
    shape = model.tensors[_before_end(model, index)[0]].shape
    return math.prod(shape) if math.prod(shape) == (shape[-1] if shape else 1) else None


def _before_end(model: Model, given: int) -> tuple[int, str]:
    """The tensor that the end of an exit starts from, and what that end makes of it."""
    maker, place, ending = model.maker, given, "logits"
    while place in maker and model.operators[maker[place]].kind in _THROUGH:
        place = model.operators[maker[place]].inputs[0]
    if place in maker:
        operator = model.operators[maker[place]]
        first = operator.inputs[0]
        shape = model.tensors[first].shape
        is_vector = math.prod(shape) == (shape[-1] if shape else 1)
        if operator.kind in _DROPPED and is_vector:
            if getattr(operator.packed.builtinOptions, "beta", 1.0) != 1.0:
                raise Unsupported(f"{model.where}: a softmax with another beta than 1")
            given, ending = first, _DROPPED[operator.kind]
    # Integers say as much as the floats made of them, and thresholds are chosen on integers.
    while given in maker and model.operators[maker[given]].kind in _CASTS:
        before = model.operators[maker[given]].inputs[0]
        if before not in maker:
            break
        given = before
    return given, ending


# ---------------------------------------------------------------- what is no classifier


def _refuse_detection(model: Model, exits: Mapping[str, int]) -> None:
    kinds = {operator.kind for operator in model.operators}
    shapes = [model.tensors[index].shape for index in exits.values()]
    has_boxes = len(shapes) > 1 and any(len(s) == 3 and s[-1] == 4 and s[1] > 1 for s in shapes)
    if has_boxes or any(kind.startswith("NON_MAX_SUPPRESSION") for kind in kinds):
        raise Unsupported(
            f"{model.where}: this is detection (it answers with boxes), expected a classifier",
            hint="early exits need one class per sample",
        )


def _check_vector(model: Model, name: str, index: int) -> None:
    tensor = model.tensors[index]
    place = f"{model.where}: exit {name!r}"
    shape = list(tensor.shape)
    if tensor.dtype not in ("float32", "int8", "uint8", "int16"):
        raise Unsupported(
            f"{place} answers in {tensor.dtype} (class numbers?), expected logits",
            hint="name the tensor before it with --exits",
        )
    if math.prod(shape) == (shape[-1] if shape else 1) > 0:
        return
    if len(shape) == 4:
        raise Unsupported(
            f"{place} answers with a map {shape}: segmentation, or features without a head; "
            "expected logits [1, classes]",
            hint="early exits need one class per sample: put a head on the map before export "
            "(edgeexit fits heads to maps of ready .tflite files only)",
        )
    if len(shape) == 3:
        raise Unsupported(
            f"{place} answers with rows {shape}: detection, or a sequence; expected logits "
            "[1, classes]",
            hint="early exits need one class per sample",
        )
    raise Unsupported(f"{place} answers with shape {shape}, expected logits [1, classes]")


def _check_alike(graft: Graft, exits: Mapping[str, int], where: str) -> None:
    found = {name: graft.tensor(index) for name, index in exits.items()}
    counts = {name: tensor.shape[-1] for name, tensor in found.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise Unsupported(f"{where}: exits differ in their number of classes ({listed})")
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
        raise Unsupported(
            f"{where}: exits differ in their dtype ({listed})",
            hint="quantize all exits, or none",
        )
