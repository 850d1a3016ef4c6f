"""Samples come out checked, in one layout, or not at all."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeexit.errors import BadFile, UsageError
from edgeexit.names import data_folder
from edgeexit.preprocess import Preprocess
from edgeexit.samples import SPLITS, find_set, is_set, load_samples

RGB = Preprocess(kind="image", size=(4, 5))
ARRAY = Preprocess(kind="array", layout="as-is")
LABELS = np.array([0, 1, 1])
LAST = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "mine.npz"
    np.savez(path, **arrays)
    return path


def test_the_shipped_set_is_balanced_and_disjoint() -> None:
    found = find_set("fashion-mnist")
    seen: set[bytes] = set()

    for name, count in zip(SPLITS, (500, 2000, 5000, 2500), strict=True):
        samples = load_samples(f"fashion-mnist:{name}")
        assert samples.samples.shape == (count, 28, 28, 1)
        assert (np.bincount(samples.labels) == count // 10).all()
        digests = {digest.tobytes() for digest in samples.digests()}
        assert not seen & digests
        seen |= digests
    assert found.class_names[9] == "Ankle boot"


def test_channels_first_and_last_are_told_apart_by_shape(tmp_path: Path) -> None:
    for stored in (LAST, LAST.transpose(0, 3, 1, 2)):
        path = npz(tmp_path, samples=stored, labels=LABELS)

        samples = load_samples(path, RGB, ["a", "b"], (1, 3, 4, 5))

        assert (samples.samples == LAST).all()
        assert samples.ids.tolist() == ["0", "1", "2"]


def test_an_ambiguous_layout_is_refused(tmp_path: Path) -> None:
    cube = Preprocess(kind="image", size=(3, 3))
    path = npz(tmp_path, samples=np.zeros((2, 3, 3, 3), np.uint8), labels=[0, 1])

    with pytest.raises(BadFile, match="channels first or last"):
        load_samples(path, cube)


@pytest.mark.parametrize(
    "arrays",
    [
        {"samples": LAST},
        {"labels": LABELS},
        {"samples": LAST, "labels": LABELS[:2]},
        {"samples": LAST, "labels": LABELS + 1},
        {"samples": LAST, "labels": LABELS - 1},
        {"samples": LAST, "labels": LABELS.astype(float)},
        {"samples": LAST[:0], "labels": LABELS[:0]},
        {"samples": LAST.astype(np.float32), "labels": LABELS},
        {"samples": LAST[:, :3], "labels": LABELS},
        {"samples": LAST, "labels": LABELS, "ids": ["a", "b", "a"]},
        {"samples": LAST, "labels": LABELS, "ids": ["a"]},
        {"samples": np.array([None] * 3), "labels": LABELS},
    ],
)
def test_a_wrong_npz_is_one_line(tmp_path: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"mine\.npz: ") as caught:
        load_samples(npz(tmp_path, **arrays), RGB, ["a", "b"], (1, 3, 4, 5))
    assert "\n" not in str(caught.value)


def test_arrays_have_the_networks_shape_and_no_nan(tmp_path: Path) -> None:
    values = np.zeros((3, 2, 7))
    path = npz(tmp_path, samples=values, labels=LABELS)
    assert load_samples(path, ARRAY, None, (1, 2, 7)).samples.dtype == np.float32
    with pytest.raises(BadFile, match="expected"):
        load_samples(path, ARRAY, None, (1, 7, 2))
    values[1, 0, 0] = np.nan
    with pytest.raises(BadFile, match=r"samples\[1\]: NaN"):
        load_samples(npz(tmp_path, samples=values, labels=LABELS), ARRAY)


def test_labels_may_be_missing_for_ranges_only(tmp_path: Path) -> None:
    samples = load_samples(npz(tmp_path, samples=LAST), RGB, labels_required=False)

    assert not samples.is_labelled


def test_a_folder_of_class_subfolders(tmp_path: Path) -> None:
    for name in ("T-shirt_top", "Bag"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), "white").save(tmp_path / name / "x.png")
    (tmp_path / "Bag" / ".hidden.png").write_bytes(b"")
    (tmp_path / "Bag" / "notes.txt").write_bytes(b"")

    samples = load_samples(tmp_path, RGB, ["T-shirt/top", "Dress", "Bag"])

    assert samples.ids.tolist() == ["Bag/x.png", "T-shirt_top/x.png"]
    assert samples.labels.tolist() == [2, 0]
    with pytest.raises(UsageError, match="no class"):
        load_samples(tmp_path, RGB, ["Dress", "Bag"])
    Image.new("L", (9, 9)).save(tmp_path / "loose.png")
    with pytest.raises(BadFile, match=r"loose\.png: not in a class subfolder"):
        load_samples(tmp_path, RGB)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no pictures"):
        load_samples(tmp_path, RGB)


@pytest.mark.parametrize("text", ["fashion-mnist", "fashion-mist:tuning", "nowhere", "x.npz"])
def test_wrong_names_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        load_samples(text, RGB)


def test_a_network_with_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="10 classes, the network has 11"):
        load_samples("fashion-mnist:ranges", None, list("abcdefghijk"))


def test_pictures_are_refitted_for_another_network() -> None:
    assert load_samples("fashion-mnist:ranges", RGB).samples.shape == (500, 4, 5, 3)


def test_an_altered_absent_or_outside_split_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(find_set("fashion-mnist").folder, folder)
    whole = find_set(folder)
    assert whole.digest == find_set("fashion-mnist").digest
    data = (folder / "ranges.npz").read_bytes()
    (folder / "ranges.npz").write_bytes(data[:-1])
    with pytest.raises(BadFile, match="altered"):
        whole.split("ranges")
    (folder / "tuning.npz").unlink()
    with pytest.raises(UsageError, match="not installed"):
        whole.split("tuning")
    text = (folder / "set.toml").read_text()
    (folder / "set.toml").write_text(text.replace('"report.npz"', '"../report.npz"'))
    with pytest.raises(BadFile, match="plain file name"):
        find_set(folder)


def test_a_set_in_the_calibration_folder_here_is_found_by_name(tmp_path, monkeypatch) -> None:
    """Bundles store a set's name only: `tune` must find it again beside them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_folder("calibration") / "fashion-mnist", tmp_path / "calibration" / "mine")

    assert find_set("mine").digest == find_set("fashion-mnist").digest
    assert is_set("mine")
    (tmp_path / "mine").mkdir()
    assert not is_set("mine")  # what lies here under that very name comes first
