"""A new set's splits are disjoint, balanced, and never share a group or a copy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeexit.calibration import FASHION_FOLDER, make_set
from edgeexit.cli import entry
from edgeexit.duplicates import near_duplicates
from edgeexit.errors import BadFile, UsageError
from edgeexit.samples import SPLITS, find_set

RNG = np.random.default_rng(0)


def source(folder: Path, count: int = 200, **more: Any) -> Path:
    path = folder / "source.npz"
    samples = RNG.integers(0, 256, (count, 6, 6, 1), dtype=np.uint8)
    np.savez(path, **{"samples": samples, "labels": np.arange(count) % 2, **more})
    return path


def parts(folder: Path) -> dict[str, Any]:
    made = find_set(folder)
    return {name: made.split(name) for name in SPLITS}


def test_splits_are_balanced_whole_and_repeatable(tmp_path: Path) -> None:
    path = source(tmp_path)

    report = make_set(path, tmp_path / "a")
    make_set(path, tmp_path / "b" / "a")
    make_set(path, tmp_path / "c", seed=1)

    assert report.counts == {"ranges": 10, "tuning": 40, "certificate": 100, "report": 50}
    made = parts(tmp_path / "a")
    assert sorted(i for part in made.values() for i in part.ids) == sorted(map(str, range(200)))
    assert all((np.bincount(p.labels) == len(p) / 2).all() for p in made.values())
    for name in ("set.toml", "report.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b/a" / name).read_bytes()
    assert set(made["report"].ids) != set(parts(tmp_path / "c")["report"].ids)


@pytest.mark.parametrize("as_csv", [False, True])
def test_groups_never_straddle(tmp_path: Path, as_csv: bool) -> None:
    ids = [f"s{k // 4}_{k}" for k in range(200)]
    path = source(tmp_path, ids=ids)
    group_by = "(s[0-9]+)_"
    if as_csv:
        group_by = str(tmp_path / "groups.csv")
        rows = ["id,group", *(f"{i},{i.split('_')[0]}" for i in ids)]
        Path(group_by).write_text("\n".join(rows))

    make_set(path, tmp_path / "out", group_by=group_by)

    subjects = [{i.split("_")[0] for i in p.ids} for p in parts(tmp_path / "out").values()]
    assert sum(map(len, subjects)) == len(set().union(*subjects)) == 50


def test_exact_copies_stay_together(tmp_path: Path) -> None:
    half = RNG.integers(0, 256, (100, 6, 6, 1), dtype=np.uint8)
    path = source(tmp_path, samples=np.repeat(half, 2, axis=0), labels=np.arange(200) // 2 % 2)

    report = make_set(path, tmp_path / "out")

    assert (report.groups, report.copies) == (100, 100)
    for part in parts(tmp_path / "out").values():
        assert len(np.unique(part.digests(), axis=0)) == len(part) / 2


def test_near_duplicates_across_splits_are_found() -> None:
    samples = RNG.integers(0, 250, (300, 32, 32, 3), dtype=np.uint8)
    samples[7] = samples[200]
    samples[7, ::5] += 2
    splits = np.arange(300) % 4

    assert near_duplicates(samples, np.where(np.arange(300) == 7, 1, splits)) == [(7, 200)]
    assert near_duplicates(samples, np.zeros(300, np.int64)) == []


@pytest.mark.parametrize("group_by", ["(", "s", "x(.)", "absent.csv"])
def test_a_wrong_grouping_is_refused(tmp_path: Path, group_by: str) -> None:
    with pytest.raises(UsageError):
        make_set(source(tmp_path), tmp_path / "out", group_by=group_by)
    assert not (tmp_path / "out").exists()


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing left for split"):
        make_set(source(tmp_path, 6), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make_set(source(tmp_path, 8), tmp_path / "out")


def test_an_ambiguous_source_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path, samples=np.zeros((200, 3, 6, 3), np.uint8))
    with pytest.raises(BadFile, match="channels first or last"):
        make_set(path, tmp_path / "out")


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        make_set(source(tmp_path), tmp_path / "out")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for k in range(5):
            pixels = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{k}.png")
    out = str(tmp_path / "out")

    made = entry(
        ["calibration", "make", str(tmp_path / "in"), "-o", out, "--size", "8x8", "--json"]
    )

    assert made == 0
    assert sum(json.loads(capsys.readouterr().out)["counts"].values()) == 10
    assert entry(["calibration", "check", out]) == 0
    assert entry(["calibration", "list"]) == 0
    assert "fashion-mnist" in capsys.readouterr().out
    assert entry(["calibration", "check", "nothing"]) == 2
    assert entry(["calibration", "make", "nothing", "-o", out]) == 2


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="needs dataset-fashion-mnist")
def test_the_shipped_set_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    assert entry(["calibration", "fashion-mnist", "-o", str(tmp_path / "again")]) == 0

    shipped = find_set("fashion-mnist").folder
    for name in ("set.toml", *(f"{split}.npz" for split in SPLITS)):
        assert (tmp_path / "again" / name).read_bytes() == (shipped / name).read_bytes()


def test_an_existing_set_is_not_replaced_unasked(tmp_path: Path) -> None:
    make_set(source(tmp_path), tmp_path / "out")
    before = (tmp_path / "out" / "set.toml").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        make_set(source(tmp_path), tmp_path / "out", seed=1)
    assert (tmp_path / "out" / "set.toml").read_bytes() == before
