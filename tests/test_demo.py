"""The demo on the shipped example: what is shipped belongs together, and the job ends well."""

import json
from pathlib import Path

import pytest

from edgeexit import demo
from edgeexit.cli import entry
from edgeexit.errors import UsageError
from edgeexit.files import digest_of
from edgeexit.runtime import Runner
from edgeexit.samples import find_set


def test_the_shipped_record_is_of_the_shipped_bundle_and_set(tmp_path: Path) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path)
    logits = demo.shipped_record()
    origin = find_set("fashion-mnist")

    assert logits.bundle_digest == bundle.digest
    assert logits.set_digest == origin.digest
    assert bundle.calibration_set == {"name": origin.name, "digest": origin.digest}
    assert set(logits.splits) == {"tuning", "certificate"}


def test_the_shipped_bundle_was_made_from_the_shipped_checkpoint(tmp_path: Path) -> None:
    checkpoint = demo.example("fashion.pt")
    bundle = demo.copy_of_shipped_bundle(tmp_path)

    assert bundle.provenance["model_digest"] == digest_of(checkpoint.read_bytes())
    assert checkpoint.stat().st_size <= 2_000_000
    assert sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) <= 1_000_000


def test_the_shipped_record_holds_what_the_bundle_answers(tmp_path: Path) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path)
    logits = demo.shipped_record()
    tuning = find_set("fashion-mnist").split("tuning")
    rows = logits.rows("tuning")[:50]

    with Runner(bundle, policy=None) as runner:
        for row, sample in zip(rows, tuning.samples[:50], strict=True):
            # Kernels of another processor may differ by a step or two.
            found = runner.raw_logits(sample).astype(int)
            assert abs(found - logits.logits[row]).max() <= 2


def test_the_demo_measures_and_keeps_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path)
    monkeypatch.setattr(demo, "PASSES", 1)

    found = demo.run_demo(bundle, logits=demo.shipped_record(), time_cap_s=3)
    document = json.loads(json.dumps(found.to_document()))

    assert document["accuracy_full"] >= 0.915
    assert document["accuracy_policy"] >= document["accuracy_full"] - 0.01
    assert sum(document["exit_rates"]) == pytest.approx(1)
    assert document["best_static_exit"] in bundle.exits
    assert all(document[key] > 0 for key in document if key.startswith("latency_"))
    assert bundle.policy_for(found.policy.device) == found.policy
    assert len(found.pictures) >= 10


def test_an_output_folder_that_holds_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    assert entry(["demo", "-o", str(tmp_path)]) == UsageError.exit_code
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
