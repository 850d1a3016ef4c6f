"""What tune refuses is refused in one line, before a use of the certificate samples is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
from small import made_profile, made_record, small_bundle

from edgeexit import tune
from edgeexit.cli import entry
from edgeexit.errors import UsageError


@pytest.mark.parametrize("asked", [{"max_accuracy_drop": 1e-300}, {"confidence": 1e-300}])
def test_targets_that_no_number_of_labels_can_show_are_refused(asked: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="1e-300: expected"):
        tune.Target(**{"max_accuracy_drop": 0.01, **asked})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--minimize energy", "the profile holds no joules"),
        ("--method fixed", "thresholds: expected with"),
        ("--method fixed --thresholds 0.5,0.5", "belong to one confidence measure"),
        ("--method fixed --measure margin --thresholds nan,0.5", "numbers or inf"),
        ("--method fixed --measure margin --thresholds 0.5", "thresholds: [0.5], expected 2"),
        ("-o small.edgeexit", "is the bundle that is tuned"),
        ("-o small.edgeexit/inner.edgeexit", "is the bundle that is tuned, or lies in it"),
    ],
)
def test_what_is_refused_costs_no_use_and_writes_nothing(
    asked: str, said: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = small_bundle(tmp_path)
    replace(made_record(), bundle_digest=bundle.digest).save(tmp_path / "r.npz")
    made_profile(bundle_digest=bundle.digest).save(tmp_path / "p.json")
    before = sorted(tmp_path.rglob("*"))

    files = "--device host --record r.npz --profile p.json --ledger l.json"
    assert entry(["tune", "small.edgeexit", *files.split(), *asked.split()]) == 2

    error = capsys.readouterr().err
    assert said in error and "a bug" not in error
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("l.json").exists()
