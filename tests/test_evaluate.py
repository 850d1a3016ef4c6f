import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import made_record, pictures, small_bundle

from edgeexit import cli
from edgeexit.errors import BadFile, UsageError
from edgeexit.evaluate import Record, evaluate, record
from edgeexit.files import npz_bytes, read_npz
from edgeexit.policy import Policy


def test_a_record_holds_what_the_runner_answers(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    lots = [pictures(60), pictures(30, "small:certificate", 1)]
    done = []

    found = record(bundle, lots, set_name="small", on_step=done.append)

    assert found.logits.shape == (90, 3, 4)
    assert found.logits.dtype == np.int8
    assert list(found.rows("certificate")) == list(range(60, 90))
    assert found.bundle_digest == bundle.digest
    assert found.specs == bundle.logits
    assert (found.digests[60:] == lots[1].digests()).all()
    assert sum(done) == 50
    assert found.to_bytes() == record(bundle, lots, set_name="small").to_bytes()


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    first = made_record(40, 30)
    first.save(tmp_path / "r.npz")
    second = Record.load(tmp_path / "r.npz")
    assert second.to_bytes() == first.to_bytes()
    assert second.specs == first.specs
    assert second.exits == first.exits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": np.array(2)}, "format 2, this version reads 1"),
        ({"labels": np.zeros(7, np.int64)}, "labels: shape"),
        ({"labels": np.full(70, 10)}, "labels: expected 0 .. 9"),
        ({"logits": np.full((70, 3, 10), np.nan, np.float32)}, "NaN"),
        ({"logits": np.zeros((70, 3, 10), np.int64)}, "logits: int64"),
        ({"exits": np.array(["a", "b"])}, "exits: shape"),
        ({"digests": np.zeros((70, 8), np.uint8)}, "digests: shape"),
        ({"ids": np.zeros(70)}, "ids: unexpected dtype"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "r.npz"
    made_record(40, 30).save(path)
    arrays = read_npz(path)
    path.write_bytes(npz_bytes({**{n: arrays.get(n) for n in arrays.names}, **change}))
    with pytest.raises(BadFile, match=message):
        Record.load(path)


def test_a_truncated_or_absent_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    path.write_bytes(made_record(40, 30).to_bytes()[:-30])
    with pytest.raises(BadFile):
        Record.load(path)
    with pytest.raises(UsageError, match="no such file"):
        Record.load(tmp_path / "none.npz")


def test_an_evaluation_counts_what_the_record_shows(tmp_path: Path) -> None:
    bundle, samples = small_bundle(tmp_path), pictures(80)
    right = record(bundle, [samples]).correct()

    full = evaluate(bundle, samples, None)
    early = evaluate(bundle, samples, Policy.forced(bundle, "exit0", bundle.exits))

    assert full.correct == right[:, 2].sum()
    assert early.correct == right[:, 0].sum()
    assert full.exit_rates == (0.0, 0.0, 1.0)
    assert early.exit_rates == (1.0, 0.0, 0.0)
    assert np.sum(full.confusion) == 80
    assert full.interval[0] < full.accuracy < full.interval[1]
    assert full.mean_ms > 0
    json.dumps(full.to_document(), allow_nan=False)


def test_samples_without_labels_or_of_other_classes_are_refused(tmp_path: Path) -> None:
    bundle, samples = small_bundle(tmp_path), pictures(5)
    for labels, message in ((np.full(5, -1), "no labels"), (np.full(5, 4), "label 4")):
        with pytest.raises(UsageError, match=message):
            evaluate(bundle, replace(samples, labels=labels), None)
    with pytest.raises(UsageError, match="no samples"):
        record(bundle, [samples[:0]])


def test_the_command_evaluates_and_records(tmp_path: Path, monkeypatch, capsys) -> None:
    small_bundle(tmp_path)
    samples = pictures(20)
    np.savez(tmp_path / "mine.npz", samples=samples.samples, labels=samples.labels)
    monkeypatch.chdir(tmp_path)

    assert (
        cli.entry(["evaluate", "mine.npz", "--policy", "none", "--record", "r.npz", "--json"]) == 0
    )

    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 20
    assert len(Record.load(tmp_path / "r.npz")) == 20
    assert cli.entry(["evaluate", "small.edgeexit", "mine.npz"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.entry(["evaluate", "small.edgeexit"]) == 2
    assert cli.entry(["evaluate", "small.edgeexit", "none.npz"]) == 2
