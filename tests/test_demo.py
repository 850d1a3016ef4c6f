"""The demo on the shipped example: what is shipped belongs together, and the job ends well."""

import json
from math import sqrt
from pathlib import Path

import pytest

from edgeexit import demo
from edgeexit.blocks import STATUSES
from edgeexit.cli import entry
from edgeexit.errors import UsageError
from edgeexit.files import digest_of
from edgeexit.runtime import Runner
from edgeexit.samples import find_set

SHIPPED = {
    "fashion": (demo.BUNDLE, demo.RECORD),
    "fashion-pruned": (demo.PRUNED_BUNDLE, demo.PRUNED_RECORD),
}


@pytest.mark.parametrize(("bundle_name", "record_name"), SHIPPED.values())
def test_the_shipped_record_is_of_the_shipped_bundle_and_set(
    tmp_path: Path, bundle_name: str, record_name: str
) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path, bundle_name)
    logits = demo.shipped_record(record_name)
    origin = find_set("fashion-mnist")

    assert logits.bundle_digest == bundle.digest
    assert logits.set_digest == origin.digest
    assert bundle.calibration_set == {"name": origin.name, "digest": origin.digest}
    assert set(logits.splits) == {"tuning", "certificate"}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_bundle_was_made_from_the_shipped_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = demo.example(f"{name}.pt")
    bundle = demo.copy_of_shipped_bundle(tmp_path, SHIPPED[name][0])

    assert bundle.provenance["model_digest"] == digest_of(checkpoint.read_bytes())
    assert checkpoint.stat().st_size <= 2_000_000
    assert sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) <= 1_000_000


@pytest.mark.parametrize(("bundle_name", "record_name"), SHIPPED.values())
def test_the_shipped_record_holds_what_the_bundle_answers(
    tmp_path: Path, bundle_name: str, record_name: str
) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path, bundle_name)
    logits = demo.shipped_record(record_name)
    tuning = find_set("fashion-mnist").split("tuning")
    rows = logits.rows("tuning")[:50]

    with Runner(bundle, policy=None) as runner:
        for row, sample in zip(rows, tuning.samples[:50], strict=True):
            # Kernels of another processor may differ by a step or two.
            found = runner.raw_logits(sample).astype(int)
            assert abs(found - logits.logits[row]).max() <= 2


def test_the_pruned_example_has_half_the_macs_and_every_exit(tmp_path: Path) -> None:
    dense = demo.copy_of_shipped_bundle(tmp_path)
    pruned = demo.copy_of_shipped_bundle(tmp_path, demo.PRUNED_BUNDLE)
    made = pruned.provenance["pruning"]

    assert pruned.exits == dense.exits
    assert made["after"]["macs"] <= 0.5 * made["before"]["macs"]


def test_the_demo_measures_and_keeps_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = demo.copy_of_shipped_bundle(tmp_path)
    pruned = demo.copy_of_shipped_bundle(tmp_path, demo.PRUNED_BUNDLE)
    records = (demo.shipped_record(), demo.shipped_record(demo.PRUNED_RECORD))
    monkeypatch.setattr(demo, "PASSES", 1)

    found = demo.run_demo(bundle, pruned, logits=records, time_cap_s=3)
    document = json.loads(json.dumps(found.to_document()))

    assert document["accuracy_full"] >= 0.915
    # What is promised is the mean drop: on the 2,500 pictures of `report`, with 3 % of flips, its
    # standard error is 0.35 %.
    lowest = -0.01 - 2.5 * sqrt(0.03 / 2500)
    assert document["accuracy_policy"] >= document["accuracy_full"] + lowest
    assert document["accuracy_pruned_full"] >= document["accuracy_full"] - 0.005
    assert document["accuracy_pruned_policy"] >= document["accuracy_pruned_full"] + lowest
    assert sum(document["exit_rates"]) == pytest.approx(1)
    assert document["best_static_exit"] in bundle.exits
    assert all(document[key] > 0 for key in document if key.startswith("latency_"))
    # Whatever else runs here: the demo says how it went, and refuses nothing.
    assert {document[key]["status"] for key in ("verdict", "verdict_pruned")} <= set(STATUSES)
    assert bundle.policy_for(found.dense.policy.device) == found.dense.policy
    assert pruned.policy_for(found.pruned.policy.device) == found.pruned.policy
    assert len(found.pictures) >= 10


def test_an_output_folder_that_holds_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    assert entry(["demo", "-o", str(tmp_path)]) == UsageError.exit_code
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
