"""`edgeexit inspect` shows what a bundle holds."""

import json
from pathlib import Path

import pytest
from test_runtime import make_bundle, stop_at

from edgeexit.cli import entry


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path)
    assert entry(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert bundle.digest in text
    assert "no policy" in text
    stop_at(bundle, "exit0").save(bundle.policy_path("rpi4"))
    assert entry(["inspect", str(bundle.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [s["operators"] for s in document["segments"]] == [3, 3, 3]
    assert list(document["policies"]) == ["rpi4"]


def test_inspect_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    assert entry(["inspect", str(tmp_path)]) == 3
    assert entry(["inspect", str(tmp_path / "absent")]) == 2
