"""What a dissection saw: plausible on a real chain, and read back only if it can be true."""

import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_bundle

from edgeexit import dissect as room
from edgeexit.dissect import Dissection, SegmentCost, dissect
from edgeexit.errors import BadFile, DeviceError
from edgeexit.files import Table, json_bytes, parse_json
from edgeexit.preprocess import Preprocess

COSTS = st.builds(
    SegmentCost,
    exit=st.text(min_size=1, max_size=5),
    load_ns=st.integers(1, 10**12),
    first_ns=st.integers(1, 10**12),
    memory_bytes=st.none() | st.integers(-(10**12), 10**12),
    handover_ns=st.floats(0.1, 1e9),
)
DISSECTIONS = st.builds(
    Dissection,
    preprocess_ns=st.floats(0.1, 1e9),
    after_idle_ns=st.integers(1, 10**12),
    segments=st.lists(COSTS, unique_by=lambda cost: cost.exit).map(tuple),
    jpeg_ns=st.none() | st.floats(0.1, 1e9),
    png_ns=st.none() | st.floats(0.1, 1e9),
)


def document() -> dict:
    cost = SegmentCost(exit="a", load_ns=5, first_ns=6, memory_bytes=None, handover_ns=0.5)
    made = Dissection(preprocess_ns=1.5, after_idle_ns=9, segments=(cost,))
    return json.loads(json_bytes(made.to_document()))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Dissection:
    bundle = small_bundle(tmp_path_factory.mktemp("dissect"))
    return dissect(bundle, bundle.selftest().samples)


def test_every_segment_of_the_chain_is_seen_in_its_order(seen: Dissection) -> None:
    assert [cost.exit for cost in seen.segments] == ["exit0", "exit1", "exit2"]
    for cost in seen.segments:
        # Opening parses and lays out memory; handing over copies a few bytes.
        assert cost.load_ns > cost.handover_ns
    assert seen.preprocess_ns > 0
    assert seen.after_idle_ns > seen.preprocess_ns


def test_decoding_a_picture_is_timed_and_sensor_values_have_none(
    seen: Dissection, tmp_path: Path
) -> None:
    size = Preprocess(kind="image", size=(32, 24))
    picture = np.random.default_rng(0).integers(0, 256, size.sample_shape, np.uint8)
    values = Preprocess(kind="array", layout="as-is")
    decoding = [room._decode_ns(picture, size, kind) for kind in ("JPEG", "PNG")]

    assert all(ns is not None and ns > 1000 for ns in decoding)
    assert room._decode_ns(np.zeros(5, np.float32), values, "JPEG") is None
    assert (seen.jpeg_ns is None) == (small_bundle(tmp_path).preprocess.kind == "array")


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@pytest.mark.parametrize("color", ["gray", "rgb", "bgr"])
def test_pictures_of_any_colour_can_be_timed(size: tuple[int, int], color: str) -> None:
    spec = Preprocess(kind="image", size=size, color=color)

    assert room._decode_ns(np.zeros(spec.sample_shape, np.uint8), spec, "JPEG")


def test_a_dissection_that_does_not_speak_of_decoding_is_refused() -> None:
    made = document()
    del made["png_ns"]

    with pytest.raises(BadFile, match=r"^p: png_ns: missing"):
        Dissection.from_document(Table(made, "p"))


def test_what_was_seen_survives_its_own_reading(seen: Dissection) -> None:
    again = parse_json(json_bytes(seen.to_document()), "p")

    assert Dissection.from_document(again) == seen


@given(DISSECTIONS)
def test_any_dissection_survives_its_document(made: Dissection) -> None:
    assert Dissection.from_document(Table(made.to_document(), "p")) == made


@pytest.mark.parametrize("key", ["preprocess_ns", "after_idle_ns"])
@pytest.mark.parametrize("value", [0, -1, 10**16, 10**400, "5", None, True, [1]])
def test_nanoseconds_that_cannot_be_are_refused(key: str, value: object) -> None:
    with pytest.raises(BadFile, match=f"^p: {key}: "):
        Dissection.from_document(Table({**document(), key: value}, "p"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load_ns", 0),
        ("load_ns", 1.5),
        ("first_ns", -3),
        ("handover_ns", 0),
        ("memory_bytes", 1 << 60),
        ("memory_bytes", 0.5),
        ("exit", 7),
        ("more", 1),
    ],
)
def test_a_segment_that_cannot_be_is_refused_with_its_place(key: str, value: object) -> None:
    made = document()
    made["segments"][0][key] = value

    with pytest.raises(BadFile, match=rf"^p: segments\[0\](: |\.){key}: "):
        Dissection.from_document(Table(made, "p"))


def test_an_exit_that_stands_twice_is_refused() -> None:
    made = document()
    made["segments"] *= 2

    with pytest.raises(BadFile, match="an exit stands twice"):
        Dissection.from_document(Table(made, "p"))


def test_private_memory_grows_with_what_is_allocated() -> None:
    before = room.private_bytes()
    # Pages of its own: an allocator may give out again what the process has written already.
    with mmap.mmap(-1, 32 << 20) as held:
        held.write(b"x" * len(held))
        after = room.private_bytes()

    if before is not None and after is not None:
        assert after - before > (32 << 20) // 2


def test_a_runtime_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(segment: object) -> None:
        raise RuntimeError("node 3\nfailed")

    monkeypatch.setattr(room, "_watch", fail)
    bundle = small_bundle(tmp_path)

    with pytest.raises(DeviceError, match=r"failed: node 3 failed$"):
        dissect(bundle, bundle.selftest().samples)
