import json
from pathlib import Path

import numpy as np
import pytest
from small import EXITS, made_profile, made_record, small_bundle

from edgeexit import cli, device, profile
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import Table
from edgeexit.profile import Profile, kept_sets
from edgeexit.timing import time_cases


def test_up_to_four_exits_every_subset_is_measured() -> None:
    assert len(kept_sets(EXITS)) == 7
    assert len(kept_sets("abcd")) == 15
    assert kept_sets("abcde") == [tuple("abcde"), *((name,) for name in "abcde")]


def test_a_real_profile_of_a_tiny_bundle(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    shares: list[float] = []

    found = profile.measure(
        bundle, processes=2, rounds=4, block_ms=0.3, time_cap_s=4, on_step=shares.append
    )

    assert len(found.cases) == 12
    assert all(len(case.blocks_ns) == 2 for case in found.cases)
    assert all(len(case.blocks_ns[0]) >= 3 for case in found.cases)
    assert found.bundle_digest == bundle.digest
    assert found.before["python"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    found.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert again == found
    estimate = again.latency(again.full)
    assert estimate.low <= estimate.value <= estimate.high


def test_every_round_times_every_case_once_in_changing_order() -> None:
    order: list[int] = []
    lines: list[dict] = []
    plan = {"rounds": 5, "block_ms": 1e-6, "time_cap_s": 60.0, "seed": 1}
    steps = [lambda _, k=k: order.append(k) for k in range(3)]

    time_cases(steps, ["sample"], plan, lines.append)

    assert lines[0]["ready"]["calls"] == [1, 1, 1]
    assert [len(line["round"]) for line in lines[1:]] == [3] * 5
    # Behind the warm-up each block is one unrecorded and one recorded call.
    blocks = np.array(order[36:]).reshape(5, 3, 2)[:, :, 0]
    assert all(sorted(row) == [0, 1, 2] for row in blocks.tolist())
    assert len({tuple(row) for row in blocks.tolist()}) > 1


def test_the_time_cap_ends_a_run_but_not_before_three_rounds() -> None:
    lines: list[dict] = []
    plan = {"rounds": 1000, "block_ms": 1e-6, "time_cap_s": 1e-9, "seed": 1}
    time_cases([lambda _: None], ["sample"], plan, lines.append)
    assert len(lines) == 1 + 3


def test_luck_of_a_process_cancels_in_shares_but_not_in_latencies() -> None:
    table = made_profile(jitter=0.002).to_document()
    for case in table["cases"]:
        case["blocks_ns"] = [
            [value * luck for value in row]
            for row, luck in zip(case["blocks_ns"], (1.0, 1.3, 0.8), strict=True)
        ]
    found = Profile.from_document(Table(table, "p.json"))
    case = found.case(EXITS, "exit0")
    assert case is not None
    latency, share = found.latency(case), found.share(case, found.full)
    assert (latency.high - latency.low) / latency.value > 0.2
    assert (share.high - share.low) / share.value < 0.02
    assert share.value == pytest.approx(105 / 305, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format: found 2"),
        (lambda d: d.update(extra=1), "extra: unknown key"),
        (lambda d: d["cases"].pop(-1), "do not fit the exits"),
        (lambda d: d["cases"][0].update(exit="nowhere"), "not among the kept"),
        (lambda d: d["cases"][0]["blocks_ns"].pop(), "one entry for each process"),
        (lambda d: d["cases"][0]["blocks_ns"][0].pop(), "different numbers of rounds"),
        (lambda d: d["cases"][0]["blocks_ns"][0].append(float("inf")), "more than 0"),
        (lambda d: d["cases"][0]["blocks_ns"][0].append(float("nan")), "more than 0"),
        (lambda d: d["cases"][0]["blocks_ns"][0].append(-1.0), "more than 0"),
        (lambda d: d["cases"][0].update(calls=["ten"]), "calls.0: expected int"),
    ],
)
def test_a_wrong_profile_is_refused(change, message: str) -> None:
    document = made_profile().to_document()
    change(document)
    with pytest.raises(BadFile, match=message):
        Profile.from_document(Table(document, "p.json"))


def test_nan_in_a_profile_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(made_profile().to_document()).replace("105000.0", "NaN"))
    with pytest.raises(BadFile, match="NaN is not allowed"):
        Profile.load(path)


def test_another_board_cannot_be_measured_here() -> None:
    assert device.this_device() == "host"
    with pytest.raises(DeviceError, match="this machine is 'host'"):
        profile.check_device("rpi4")
    with pytest.raises(UsageError):
        profile.check_device("rpi44")


def test_a_bundle_that_vanishes_is_refused_in_the_timing_process(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    (bundle.path / "model.tflite").write_bytes(b"altered")
    with pytest.raises(BadFile, match="altered"):
        profile.measure(bundle, processes=1, rounds=1, block_ms=0.1)


def test_profile_then_tune_by_hand(tmp_path: Path, monkeypatch, capsys) -> None:
    bundle = small_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    fast = ["--processes", "1", "--time-cap", "0.1"]

    assert cli.entry(["tune"]) == 2
    assert "edgeexit profile --device host" in capsys.readouterr().err
    assert cli.entry(["profile", "--device", "rpi4", *fast]) == 5
    assert cli.entry(["profile", "--device", "rpi44", *fast]) == 2
    assert not list(tmp_path.glob("profile-*"))
    assert cli.entry(["profile", "--device", "host", "--json", *fast]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "profile-host.json").read_text()
    assert cli.entry(["tune"]) == 2
    assert "names no calibration set" in capsys.readouterr().err

    made_record().save(tmp_path / "foreign.npz")
    assert cli.entry(["tune", "--record", "foreign.npz"]) == 3
    from dataclasses import replace

    fit = replace(made_record(), bundle_digest=bundle.digest)
    fit.save(tmp_path / "r.npz")
    assert cli.entry(["tune", "--record", "r.npz", "--max-accuracy-drop", "0.01"]) == 0
    assert "Early exit is" in capsys.readouterr().out
    assert bundle.policy_for("host") is not None
    assert cli.entry(["tune", "--record", "r.npz", "--max-accuracy-drop", "0.0001"]) == 7
    assert cli.entry(["tune", "--record", "r.npz", "--max-accuracy-drop", "2"]) == 2
    assert cli.entry(["tune", "--record", "r.npz", "--measure", "entropy"]) == 2
