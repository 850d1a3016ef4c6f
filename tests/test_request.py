"""What tune is asked for survives the policy file, and the ledger knows it again."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from small import made_profile, made_record, small_bundle

from edgeexit import __version__, ledger, request, tune
from edgeexit.cli import entry
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table, json_bytes, parse_json, read_json
from edgeexit.request import Request
from edgeexit.targets import Target

DROP = Target(max_accuracy_drop=0.05)
ASKED = [
    Request(target=DROP),
    Request(target=DROP, measure="margin", method="shared", seed=-7),
    Request(target=DROP, method="fixed", thresholds=(0.9, math.inf), measure="peak"),
    Request(target=DROP, method="fixed", thresholds=(0.25, -math.inf), measure="max_prob"),
    Request(target=Target(latency_budget_ms=0.28, confidence=0.9, rate_hz=30.0)),
]


@pytest.mark.parametrize("asked", ASKED)
def test_a_policy_file_tells_what_was_asked_for(asked: Request, tmp_path: Path) -> None:
    tune.tune(made_record(), made_profile(), asked).policy.save(tmp_path / "p.json")
    found = Request.from_policy(read_json(tmp_path / "p.json"))

    assert found == asked
    assert found.digest({"record": "r"}) == asked.digest({"record": "r"})


def test_the_digest_is_the_one_that_ledgers_hold() -> None:
    """Over these words, whatever else changes: a use that was counted is known for ever."""
    asked = ASKED[2].digest({"record": "r", "reference": None})
    words = {
        "made_by": __version__,
        "record": "r",
        "reference": None,
        "max_accuracy_drop": 0.05,
        "latency_budget_ms": None,
        "energy_budget_mj": None,
        "p95_ms": None,
        "confidence": 0.95,
        "minimize": "latency",
        "method": "fixed",
        "thresholds": ["0.9", "inf"],
        "measure": "peak",
        "seed": 0,
    }
    assert asked == ledger.request_digest(words)
    assert len({each.digest({}) for each in ASKED}) == len(ASKED)


def test_a_rate_is_no_other_question() -> None:
    """It decides about the verdict: whoever asks again at another rate sees the same policy."""
    at_once, later = (Request(target=replace(DROP, rate_hz=rate)) for rate in (None, 30.0))

    assert at_once.digest({"record": "r"}) == later.digest({"record": "r"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "pat"}, "did you mean 'path'|no method named 'pat'"),
        ({"measure": "maxprob"}, "no confidence measure named"),
        ({"method": "fixed"}, "expected with the method 'fixed', and only there"),
        ({"thresholds": (0.5, 0.5)}, "expected with the method 'fixed', and only there"),
        ({"method": "fixed", "thresholds": (0.5,)}, "belong to one confidence measure"),
        ({"method": "fixed", "thresholds": (math.nan,), "measure": "peak"}, "numbers or inf"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Request(target=DROP, **options)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("certificate", "method", 5),
        ("certificate", "method", "pat"),
        ("certificate", "seed", "0"),
        ("certificate", "seed", ...),
        ("provenance", "measure_asked", ...),
        ("provenance", "measure_asked", ["peak"]),
        ("provenance", "thresholds_asked", ["a", "b"]),
        ("provenance", "thresholds_asked", [0.5, 0.5]),
        ("provenance", "thresholds_asked", ["nan", "0.5"]),
        ("target", "confidence", 2.0),
        ("target", "confidence", ...),
    ],
)
def test_a_policy_that_tells_nothing_sensible_is_a_bad_file(
    part: str, key: str, value: object
) -> None:
    made = tune.tune(made_record(), made_profile(), ASKED[2]).policy
    document = json.loads(json_bytes(made.to_document()))
    document[part][key] = value
    if value is ...:
        del document[part][key]
    with pytest.raises(BadFile, match="policy"):
        Request.from_policy(parse_json(json.dumps(document).encode(), "policy"))
    with pytest.raises(BadFile, match="certificate"):
        Request.from_policy(Table({"format": 2}, "policy"))


def test_a_bundle_of_one_exit_leaves_no_choice() -> None:
    request.check_choice(("a", "b"))
    with pytest.raises(UsageError, match="one exit"):
        request.check_choice(("a",))


def test_a_profile_of_another_bundle_is_refused_before_a_record_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_bundle(tmp_path)
    made_profile(bundle_digest="0" * 64).save(tmp_path / "profile-host.json")
    assert entry(["tune", "--device", "host"]) == BadFile.exit_code
    assert "the profile is of bundle 000000000000" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-record.npz"))
