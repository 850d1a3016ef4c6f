"""Facts about the ends of exits: logits come out, and what is no classifier does not come in."""

import numpy as np
import pytest

from edgeexit import tflite
from edgeexit.errors import Unsupported
from edgeexit.host.answers import tflite_logits
from edgeexit.host.ends import ENDINGS, as_given
from edgeexit.host.lowered import Lowered, named
from edgeexit.interpreter import open_interpreter
from tests.endings import Head, network

INPUTS = np.random.default_rng(7).normal(0, 1.5, (60, 8)).astype(np.float32)
DROPPED = {
    "probabilities": ("SOFTMAX",),
    "probability of each": ("LOGISTIC",),
    "log-probabilities": ("LOG_SOFTMAX",),  # TFLite has none for uint8
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch) -> None:
    """These files are our own, and opened right here: no child tries them out first."""
    monkeypatch.setattr("edgeexit.host.lowered.check_loads", lambda *_, **__: None)


def lowered(data: bytes) -> Lowered:
    model = tflite.read_model(data)
    return named(data, {model.tensors[index].name: index for index in model.outputs})


def kinds(data: bytes) -> list[str]:
    return [operator.kind for operator in tflite.read_model(data).operators]


def answers(data: bytes) -> dict[str, np.ndarray]:
    """What *data* answers to INPUTS, in real numbers: output name -> (N, ...)."""
    model = tflite.read_model(data)
    names = {model.tensors[index].name: model.tensors[index] for index in model.outputs}
    feed = model.tensors[model.inputs[0]]
    stored = INPUTS
    if feed.scales:
        whole = np.rint(INPUTS / feed.scales[0]) + feed.zero_points[0]
        limits = np.iinfo(feed.dtype)
        stored = np.clip(whole, limits.min, limits.max).astype(feed.dtype)
    found = tflite_logits(data, {name: name for name in names}, stored)
    return {
        name: (rows.astype(np.float32) - tensor.zero_points[0]) * np.float32(tensor.scales[0])
        if (tensor := names[name]).scales
        else rows
        for name, rows in found.items()
    }


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [(ending, dtype) for ending in DROPPED for dtype in ("float32", "int8", "uint8")][:-1],
)
def test_logits_come_out_and_say_what_the_network_said(ending: str, dtype: str) -> None:
    heads = {"early": Head(4, DROPPED[ending]), "final": Head(4, DROPPED[ending])}
    data = network(heads, dtype)

    found = lowered(data)

    assert found.endings == {"early": ending, "final": ending}
    assert not set(DROPPED[ending]) & set(kinds(found.data))
    wanted, given = answers(data), as_given(answers(found.data), found.endings)
    step = 16 / 256 if ending == "log-probabilities" else 1 / 256
    for name in heads:
        # Integers end at -16 + 1 step.
        shown = given[name] if dtype == "float32" else np.maximum(given[name], step - 16)
        assert np.abs(shown - wanted[name]).max() <= (1e-5 if dtype == "float32" else step)
        assert np.ptp(answers(found.data)[name]) > 1


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("ending", ["one logit", "one probability"])
def test_one_logit_is_widened_to_two_classes_exactly(ending: str, dtype: str) -> None:
    data = network({"final": Head(1, ("LOGISTIC",) if "prob" in ending else ())}, dtype)
    bare = answers(network({"final": Head(1)}, dtype))["final"][:, 0]

    found = lowered(data)

    assert found.endings == {"final": ending}
    logits = answers(found.data)["final"]
    assert logits.shape == (60, 2)
    assert (logits[:, 0] == 0).all()
    assert (logits[:, 1] == bare).all()
    given = as_given({"final": logits}, found.endings)["final"]
    assert np.abs(given - answers(data)["final"]).max() <= (1e-6 if dtype == "float32" else 1 / 256)


@pytest.mark.parametrize(
    "end",
    [
        ("SOFTMAX", "RESHAPE"),
        ("RESHAPE", "SOFTMAX"),
        ("SOFTMAX", "DEQUANTIZE"),
        ("DEQUANTIZE", "SOFTMAX"),
        ("SOFTMAX", "QUANTIZE"),
        ("DEQUANTIZE", "SOFTMAX", "RESHAPE"),
    ],
)
def test_what_stands_between_does_not_hide_the_softmax(end: tuple[str, ...]) -> None:
    data = network({"final": Head(4, end)}, "int8")

    found = lowered(data)

    assert found.endings == {"final": "probabilities"}
    assert "SOFTMAX" not in kinds(found.data)
    (output,) = open_interpreter(found.data).outputs.values()
    assert output.dtype == np.int8
    assert output.shape == (1, 4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_end_that_is_logits_already_is_left_alone(dtype: str) -> None:
    data = network({"early": Head(4), "final": Head(4)}, dtype)

    found = lowered(data)

    assert found.endings == {"early": "logits", "final": "logits"}
    assert kinds(found.data) == kinds(data)
    for name, rows in answers(data).items():
        assert (answers(found.data)[name] == rows).all()


def test_logits_in_a_map_of_one_place_are_flattened() -> None:
    found = lowered(network({"final": Head(4, ("MAP",))}, "int8"))

    assert kinds(found.data)[-1] == "RESHAPE"
    assert open_interpreter(found.data).outputs["final"].shape == (1, 4)


REFUSED = {
    "class numbers": ({"final": Head(4, ("ARG_MAX",))}, "class numbers"),
    "a map": ({"final": Head(12, ("PLACES",))}, "segmentation"),
    "boxes": ({"boxes": Head(12, ("ROWS",)), "scores": Head(4)}, "detection"),
    "rows": ({"final": Head(12, ("ROWS",))}, "sequence"),
    "different classes": ({"early": Head(3), "final": Head(4)}, "number of classes"),
    "softmax over one": ({"final": Head(1, ("SOFTMAX",))}, "one class"),
    "logits and their softmax": ({"a": Head(4), "b": Head(4, ("SOFTMAX",), "a")}, "same tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_classifier_is_refused_by_name(case: str) -> None:
    heads, word = REFUSED[case]

    with pytest.raises(Unsupported, match=word) as refusal:
        lowered(network(heads, "float32"))

    assert refusal.value.exit_code == 4
    assert "\n" not in str(refusal.value)


def test_every_ending_is_told_from_two_logits() -> None:
    z = np.linspace(-3, 3, 7, dtype=np.float32)
    logits = np.stack([np.zeros_like(z), z], axis=1)
    chance = 1 / (1 + np.exp(-z))

    given = {ending: make(logits) for ending, make in ENDINGS.items()}

    assert np.allclose(given["probabilities"][:, 1], chance)
    assert np.allclose(given["log-probabilities"][:, 1], np.log(chance))
    assert np.allclose(given["probability of each"][:, 1], chance)
    assert np.allclose(given["one probability"][:, 0], chance)
    assert (given["one logit"][:, 0] == z).all()
    assert given["logits"] is logits
