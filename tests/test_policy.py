"""Confidences agree bit for bit wherever they are computed; policies refuse what is wrong."""

import math
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import json_bytes, parse_json
from edgeexit.policy import (
    ALWAYS,
    DROPPED,
    MEASURES,
    NEVER,
    Confidence,
    Parent,
    Policy,
    _weights,
)
from edgeexit.tflite import TensorSpec


def logits_spec(classes: int, dtype: str = "int8", scale: float = 0.11) -> TensorSpec:
    return TensorSpec(name="logits", shape=(1, classes), dtype=dtype, scale=scale, zero_point=-3)


@dataclass(frozen=True)
class ThreeExits:
    exits: tuple[str, ...] = ("a", "b", "c")
    digest: str = "d" * 64
    parent: Parent | None = None


def some_policy(**changes: object) -> Policy:
    policy = Policy(
        device="host",
        bundle_digest="d" * 64,
        measure="max_prob",
        exits=("a", "b", "c"),
        thresholds=(0.75, DROPPED),
    )
    return replace(policy, kept=(), **changes)


@pytest.mark.parametrize("scale", [3e-5, 0.0005, 0.01, 0.05, 0.11, 1.0, 30.0, 1e29])
def test_weights_of_8_and_16_bit_logits_are_those_of_decimal_arithmetic(scale: float) -> None:
    context, many = Context(prec=60), _weights(scale, 2**16)
    few = [*range(0, 256, 5), *range(256, 2**16, 4001), 2**16 - 1]
    power = [context.exp(context.multiply(Decimal(-scale), Decimal(d))) for d in few]

    wanted = [int(context.multiply(p, Decimal(2**40)).to_integral_value()) for p in power]
    assert [many[d] for d in few] == wanted
    assert _weights(scale, 2**8) == many[: 2**8]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_sample_and_a_batch_agree_to_the_last_bit(
    measure: str, dtype: str, data: st.DataObject
) -> None:
    classes = data.draw(st.sampled_from([1, 2, 3, 10, 31, 32, 33, 200]))
    scale = data.draw(st.floats(0.001, 4.0)) if dtype != "int16" else 0.01
    logits = data.draw(arrays(dtype, (5, classes)))
    confidence = Confidence(measure, logits_spec(classes, dtype, scale))

    many = confidence.many(logits)

    assert many.dtype == np.float32
    assert [confidence.one(row) for row in logits] == [float(value) for value in many]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("classes", [10, 40])
def test_confidence_does_not_depend_on_order_or_offset(measure: str, classes: int) -> None:
    rng = np.random.default_rng(1)
    logits = rng.integers(-100, 100, (200, classes)).astype(np.int8)
    confidence = Confidence(measure, logits_spec(classes))

    found = confidence.many(logits)

    assert (confidence.many(logits[:, ::-1]) == found).all()
    assert (confidence.many(logits + np.int8(20)) == found).all()


def test_max_prob_is_the_softmax_probability() -> None:
    rng = np.random.default_rng(2)
    logits = rng.integers(-128, 128, (500, 10)).astype(np.int8)
    real = 0.11 * logits.astype(np.float64)
    softmax = np.exp(real - real.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    ranked = np.sort(softmax, axis=1)

    spec = logits_spec(10)

    np.testing.assert_allclose(Confidence("max_prob", spec).many(logits), ranked[:, -1], rtol=1e-6)
    np.testing.assert_allclose(
        Confidence("margin", spec).many(logits), ranked[:, -1] - ranked[:, -2], atol=1e-6
    )
    np.testing.assert_allclose(
        Confidence("peak", spec).many(logits), real.max(axis=1) - real.mean(axis=1), rtol=1e-6
    )


def test_known_confidences_never_change() -> None:
    """Thresholds in the field belong to exactly these numbers: a change is a new format."""
    logits = np.array([[-128, 5, 127, 90, -3, 4, 100, 126, 0, 1]], np.int8)
    spec = logits_spec(10, scale=0.0712345678)

    found = {name: Confidence(name, spec).many(logits)[0].tobytes().hex() for name in MEASURES}

    assert found == {"max_prob": "512cee3e", "margin": "fb01033d", "peak": "e118d840"}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("classes", [10, 40])
def test_float_logits_agree_too(measure: str, classes: int) -> None:
    logits = np.random.default_rng(3).normal(0, 4, (50, classes)).astype(np.float32)
    confidence = Confidence(measure, logits_spec(classes, "float32", 0.0))

    assert [confidence.one(row) for row in logits] == confidence.many(logits).tolist()


@pytest.mark.parametrize("measure", MEASURES)
def test_nan_logits_are_never_sure(measure: str) -> None:
    logits = np.array([1, math.nan, math.inf], np.float32)

    assert Confidence(measure, logits_spec(3, "float32", 0.0)).one(logits) == 0.0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("classes", [3, 50])
def test_label_is_the_first_largest_logit(measure: str, classes: int) -> None:
    logits = np.full(classes, 7, np.int8)
    logits[1:3] = 9

    assert Confidence(measure, logits_spec(classes)).read(logits.data)[0] == 1


def test_integer_logits_need_a_scale() -> None:
    with pytest.raises(BadFile, match="scale"):
        Confidence("max_prob", logits_spec(10, scale=0.0))
    with pytest.raises(UsageError, match="max_prob"):
        Confidence("max_prop", logits_spec(10))


def test_policy_file_round_trip(tmp_path: Path) -> None:
    policy = some_policy(target={"max_accuracy_drop": 0.01})
    policy.save(tmp_path / "host.json")

    assert Policy.load(tmp_path / "host.json") == policy
    assert policy.kept == ("a", "c")
    assert '"inf"' in (tmp_path / "host.json").read_text()


def test_forced_policies() -> None:
    bundle = ThreeExits()

    assert Policy.full(bundle).thresholds == (NEVER, NEVER)
    cut = Policy.forced(bundle, exit="b", kept=("b",))
    assert (cut.kept, cut.thresholds) == (("b",), (DROPPED, ALWAYS))
    early = Policy.forced(bundle, exit="a", kept=("a", "b"))
    assert (early.kept, early.thresholds) == (("a", "b"), (ALWAYS, ALWAYS))
    again = Policy.from_document(parse_json(json_bytes(early.to_document()), "p.json"))
    assert again == early
    with pytest.raises(UsageError):
        Policy.forced(bundle, exit="a", kept=("b", "c"))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"format": 3}, "format"),
        ({"format": 1}, "1 holds no certificate"),
        ({"class_offsets": []}, "class_offsets"),
        ({"class_offsets": {"z": [0.1]}}, "'z'"),
        ({"class_offsets": {"c": [0.1]}}, "'c'"),
        ({"class_offsets": {"a": [0.1, "inf"]}}, r"class_offsets\.a\.1"),
        ({"certificate": None}, "certificate"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"thresholds": [0.5, "nan"]}, r"thresholds\[1\]"),
        ({"thresholds": [0.5, True]}, r"thresholds\[1\]"),
        ({"thresholds": [0.5, None]}, r"thresholds\[1\]"),
        ({"measure": "entropy"}, "measure"),
        ({"exits": ["a", "a", "c"]}, "exits"),
        ({"kept": ["c", "a"]}, "kept"),
        ({"kept": ["a", "b", "c"]}, "kept"),
        ({"kept": ["a"]}, "kept"),
        ({"surprise": 1}, "surprise"),
        ({"target": []}, "target"),
    ],
)
def test_wrong_policy_files_are_refused(changes: dict[str, object], place: str) -> None:
    document = some_policy().to_document() | changes

    with pytest.raises(BadFile, match=place):
        Policy.from_document(parse_json(json_bytes(document), "p.json"))


def test_a_huge_threshold_is_refused() -> None:
    text = json_bytes(some_policy().to_document()).replace(b"0.75", b"1e999")

    with pytest.raises(BadFile, match="1e999 is too large"):
        Policy.from_document(parse_json(text, "p.json"))


def test_nan_threshold_is_refused() -> None:
    with pytest.raises(UsageError, match="NaN"):
        some_policy(thresholds=(math.nan, 0.5))


def test_policy_of_another_bundle_is_refused() -> None:
    with pytest.raises(BadFile, match="made for bundle") as caught:
        some_policy().check_bundle(ThreeExits(digest="e" * 64), "host.json")

    assert "tune" in (caught.value.hint or "")


def test_class_offsets_shift_the_threshold_of_each_class(tmp_path: Path) -> None:
    policy = some_policy(
        thresholds=(0.75, NEVER),
        class_offsets={"a": (0.0, -0.25), "b": (-1.0, 1.0)},
        certificate={"level": 0.01, "path": [["inf", "inf"], [0.75, "inf"]]},
    )
    policy.save(tmp_path / "host.json")

    assert Policy.load(tmp_path / "host.json") == policy
    assert policy.limits("a", 2) == (0.75, 0.5)
    assert min(policy.limits("b", 2)) >= NEVER
    assert policy.limits("c", 2) == (ALWAYS, ALWAYS)
    with pytest.raises(BadFile, match="each of 3 classes"):
        policy.limits("a", 3)


def test_a_bundle_cut_out_of_the_policys_own_is_served_if_it_holds_the_kept_exits() -> None:
    policy = some_policy()
    parent = Parent(digest="d" * 64, exits=("a", "b", "c"))

    policy.check_bundle(ThreeExits(exits=("a", "c"), digest="e" * 64, parent=parent))
    for other in (
        ThreeExits(exits=("a", "b"), digest="e" * 64, parent=parent),
        ThreeExits(exits=("a", "c"), digest="e" * 64, parent=replace(parent, digest="f" * 64)),
        ThreeExits(exits=("a", "c"), digest="e" * 64),
    ):
        with pytest.raises(BadFile, match="made for bundle"):
            policy.check_bundle(other)
