"""A bundle is whole or refused, and equal arguments give equal bytes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_runtime import GRAY, SAMPLES, make_bundle
from tiny import tiny_model

from edgeexit.bundle import Bundle, load_bundle, write_bundle
from edgeexit.errors import BadFile, StorageError, Unsupported, UsageError
from edgeexit.policy import Policy


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def rewrite(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle.path / "bundle.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    again = load_bundle(bundle.path)

    assert again == bundle
    assert again.exits == ("exit0", "exit1", "exit2")
    assert again.preprocess == GRAY
    assert [s.outputs[0].name for s in again.segments] == ["logits0", "logits1", "logits2"]
    assert [plan.data for plan in again.segment_data()] == [
        (bundle.path / f"segment-{k}.tflite").read_bytes() for k in range(3)
    ]


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "a")
    mask = os.umask(0o077)
    try:
        second = make_bundle(tmp_path / "b")
    finally:
        os.umask(mask)

    assert contents(first.path) == contents(second.path)
    assert first.digest == second.digest


def test_policies_stay_with_an_equal_bundle_only(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    Policy.full(bundle).save(bundle.policy_path("host"))

    assert load_bundle(bundle.path).digest == bundle.digest
    assert make_bundle(tmp_path).policy_devices() == ["host"]
    assert make_bundle(tmp_path, seed=5).policy_devices() == []


def test_digests_and_bloom_travel_along(tmp_path: Path) -> None:
    model = tiny_model()
    digests = np.arange(32, dtype=np.uint8).reshape(2, 16)
    bundle = write_bundle(
        tmp_path / "x.edgeexit",
        name="x",
        model_data=model.data,
        exits=model.exits,
        class_names=list("abcd"),
        preprocess=GRAY,
        selftest=SAMPLES,
        scheme="int8",
        provenance={"why": "test"},
        ranges_digests=digests,
        training_bloom=b"bloom",
    )

    assert bundle.ranges_digests is not None
    assert (bundle.ranges_digests == digests).all()
    assert bundle.training_bloom == b"bloom"
    assert bundle.provenance == {"why": "test"}


@pytest.mark.parametrize("name", ["model.tflite", "segment-1.tflite", "selftest.npz"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_damaged_files_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    bundle = make_bundle(tmp_path)
    path = bundle.path / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    with pytest.raises(BadFile, match="missing" if damage == "missing" else "altered") as caught:
        load_bundle(bundle.path)
    assert caught.value.hint


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({key: value})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (_set("format", 99), "format"),
    "unknown key": (_set("surprise", 1), "surprise"),
    "no exits": (_set("exits", []), "exits"),
    "twice the same exit": (_set("exits", ["a", "a", "b"]), "exits"),
    "path leads out": (lambda d: d["segments"][0].update(file="../evil"), "plain file name"),
    "absolute path": (lambda d: d["segments"][0].update(file="/etc/passwd"), "plain file name"),
    "files lead out": (
        lambda d: d["files"].update({"a/b": {"sha256": "0" * 64, "bytes": 1}}),
        "plain file name",
    ),
    "one file twice": (lambda d: d["segments"][0].update(file="segment-1.tflite"), "twice"),
    "other class count": (_set("class_names", ["a"]), "classes"),
    "scale": (lambda d: d["segments"][1]["inputs"][0].update(scale=9.0), "input"),
    "bytes are text": (lambda d: d["segments"][0].update(bytes="1"), "bytes"),
    "digest": (lambda d: d["segments"][0].update(sha256="zz"), "sha256"),
    "huge tensor": (
        lambda d: d["segments"][2]["outputs"].append(
            {"name": "h", "shape": [1 << 40], "dtype": "int8", "scale": 1.0, "zero_point": 0}
        ),
        "too many",
    ),
    "preprocess size": (lambda d: d["preprocess"].update(size=[0, 3]), "size"),
    "a missing segment": (lambda d: d["segments"].pop(), "one per exit"),
    "another model file": (_set("model", "segment-0.tflite"), "model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_manifests_are_refused(tmp_path: Path, case: str) -> None:
    change, words = WRONG[case]
    bundle = make_bundle(tmp_path)
    rewrite(bundle, change)

    with pytest.raises(BadFile, match=words):
        load_bundle(bundle.path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1, "format": 1}', '{"format": NaN}', '{"format": 1}', "\xff"],
)
def test_garbage_manifests_are_refused(tmp_path: Path, text: str) -> None:
    bundle = make_bundle(tmp_path)
    (bundle.path / "bundle.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(BadFile, match=r"bundle\.json"):
        load_bundle(bundle.path)


def test_paths_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, kind in (("absent", UsageError), ("file", UsageError), ("empty", BadFile)):
        with pytest.raises(kind):
            load_bundle(tmp_path / name)


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "tiny.edgeexit"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear")

    with pytest.raises(UsageError):
        make_bundle(tmp_path)
    assert (folder / "diary.txt").read_text() == "dear"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        make_bundle(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_net_for_other_classes_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="classes"):
        make_bundle(tmp_path, classes=7)


def test_device_names_cannot_lead_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make_bundle(tmp_path).policy_for("../../etc/passwd")
