"""What follows from a profile's raw values, and what is refused as a profile."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXITS, made_profile

from edgeexit.blocks import Mode
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.profile import Profile


def scaled(profile: Profile, factors: list[float]) -> Profile:
    """The profile as if each process had been slower by its factor."""
    document = profile.to_document()
    for process, factor in zip(document["processes"], factors, strict=True):
        for block in process["blocks"]:
            block[3] *= factor
    return Profile.from_document(Table(document, "p.json"))


def test_luck_of_a_process_cancels_in_shares_but_not_in_latencies() -> None:
    found = scaled(made_profile(jitter=0.002), [1.0, 1.3, 0.8])
    case = found.case(EXITS, "exit0")
    assert case is not None
    latency, share = found.latency(case), found.share(case, found.full)
    assert latency.half_width > 0.2
    assert share.half_width < 0.02
    assert share.value == pytest.approx(105 / 305, rel=0.01)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_a_machine_that_is_faster_all_over_has_the_same_shares(factor: float, seed: int) -> None:
    profile = made_profile(jitter=0.01, seed=seed)
    other = scaled(profile, [factor] * 3)
    for case in profile.cases:
        ours, theirs = profile.latency(case), other.latency(case)
        assert theirs.value == pytest.approx(ours.value * factor, rel=1e-3)
        assert theirs.high == pytest.approx(ours.high * factor, rel=1e-3)
        assert other.share(case, other.full).value == pytest.approx(
            profile.share(case, profile.full).value, rel=1e-3
        )


def test_one_wild_process_of_ten_moves_the_median_little() -> None:
    profile = made_profile(jitter=0.005, processes=10)
    wild = scaled(profile, [1.0] * 9 + [3.0])
    assert wild.value_ns(wild.full) == pytest.approx(profile.value_ns(profile.full), rel=0.005)


def test_a_case_answers_for_all_sets_whose_files_are_the_same() -> None:
    profile = made_profile()
    first = profile.case(EXITS, "exit0")
    assert first is not None
    assert profile.case(("exit0", "exit2"), "exit0") is first
    assert profile.case(("exit0",), "exit1") is None
    assert profile.costs_ns(("exit0", "exit9")) is None
    assert profile.kept_sets()[0] == EXITS
    for kept in profile.kept_sets():
        costs = profile.costs_ns(kept)
        assert costs is not None
        assert costs == sorted(costs)


def test_yardsticks_are_taken_block_by_block() -> None:
    profile = made_profile()
    document = profile.to_document()
    for process in document["processes"]:
        for k, block in enumerate(process["blocks"]):
            slow = 1 + k % 3  # the clock changes all the time
            block[3], block[5] = block[3] * slow, block[5] * slow
    moved = Profile.from_document(Table(document, "p.json"))
    assert moved.in_yardsticks(moved.full) == pytest.approx(profile.in_yardsticks(profile.full))


def test_tails_need_enough_calls() -> None:
    few = made_profile(processes=2, blocks=2)
    assert few.tail(few.full, 0.99) is None
    many = made_profile(processes=10, blocks=20, jitter=0.01)
    tail = many.tail(many.full, 0.95)
    assert tail is not None
    assert many.value_ns(many.full) < tail.low <= tail.value <= tail.high


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = made_profile(jitter=0.01, handover=500.0, mode=Mode(name="paced", rate_hz=5.0))
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert again.to_document() == profile.to_document()
    assert again.mode == profile.mode
    assert again.processes[0].dissection == profile.processes[0].dissection


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), "format: 1 says nothing about the machine"),
        (lambda d: d.update(format=2), "format: 2 does not tell what decoding a picture takes"),
        (lambda d: d.update(format=4), "format: found 4"),
        (lambda d: d.update(format="2"), "format"),
        (lambda d: d.update(extra=1), "extra: unknown key"),
        (lambda d: d.pop("verdict"), "verdict: missing"),
        (lambda d: d["verdict"].update(status="fine"), "status: expected one of"),
        (lambda d: d["mode"].update(name="fast"), "no mode named 'fast'"),
        (lambda d: d["mode"].update(name="paced"), "a rate belongs to"),
        (lambda d: d["cases"].pop(-1), "expected 8 items, found 9"),
        (lambda d: d["cases"][0].update(exit="nowhere"), "not among the kept"),
        (lambda d: d["cases"][0]["also"].append([["exit0"], "exit1"]), "not among the kept"),
        (lambda d: d["cases"][0]["also"].append(["exit0"]), "kept: expected list"),
        (lambda d: d["cases"][1].update(kept=["exit9"], exit="exit9"), "do not fit the exits"),
        (lambda d: d.update(processes=[]), "expected at least one"),
        (lambda d: d["processes"][0].update(blocks=[]), "none of case 0"),
        (lambda d: d["processes"][0]["blocks"][0].append(1), "expected 7 values, found 8"),
        (lambda d: d["processes"][0]["blocks"][0].__setitem__(3, float("inf")), "more than 0"),
        (lambda d: d["processes"][0]["blocks"][0].__setitem__(3, float("nan")), "more than 0"),
        (lambda d: d["processes"][0]["blocks"][0].__setitem__(3, -1.0), "more than 0"),
        (lambda d: d["processes"][0]["blocks"][0].__setitem__(2, 0), "calls: expected at least 1"),
        (lambda d: d["processes"][0]["blocks"][0].__setitem__(0, 99), "case: expected 0"),
        (lambda d: d["processes"][0]["warmup_ns"][0].append("ten"), "expected int"),
        (lambda d: d.update(precision=0.0), "out of range"),
        (lambda d: d.update(seed=-1), "out of range"),
        (lambda d: d["before"].update(mood="good"), "mood: unknown key"),
        (lambda d: d["before"].pop("at_ns"), "at_ns: missing"),
        (lambda d: d["cases"][-1].update(kept=["exit2", "exit1"]), "do not fit the exits"),
        (lambda d: d["exits"].append("exit2"), "do not fit the exits"),
        (lambda d: d["before"].update(at_ns=10**400), "before: at_ns: expected nanoseconds"),
        (lambda d: d["after"].update(temperature_c=-1e300), "temperature_c: found a value that no"),
        (lambda d: d["after"].update(clocks_mhz=[1500.0, 0.0]), "clocks_mhz: found a value that"),
        (lambda d: d["after"].update(throttled=-1), "throttled: found a value that no machine"),
        (lambda d: d["processes"][1].update(began_ns=10**30), "began_ns: expected nanoseconds"),
        (lambda d: d["processes"][1].update(ended_ns=5), "ended_ns: expected nanoseconds from 1"),
        (lambda d: d["processes"][0].update(seed=-1), "seed: expected 0"),
        (lambda d: d["processes"][0]["settled"].__setitem__(0, 3), "settled: expected places"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_place(change, message: str) -> None:
    document = copy.deepcopy(made_profile().to_document())
    change(document)
    with pytest.raises(BadFile, match=message):
        Profile.from_document(Table(document, "p.json"))


def test_nan_in_a_profile_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(made_profile().to_document()).replace("105000.0", "NaN"))
    with pytest.raises(BadFile, match="NaN is not allowed"):
        Profile.load(path)


def test_modes_are_checked() -> None:
    assert str(Mode(name="sustained")) == "sustained"
    with pytest.raises(UsageError, match="no mode named"):
        Mode(name="sustaned")
    for rate_hz in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(UsageError, match="rate"):
            Mode(name="paced", rate_hz=rate_hz)


def test_values_are_those_of_the_case_in_the_order_of_time() -> None:
    profile = made_profile(jitter=0.01)
    process = profile.processes[1]
    expected = [block.mean_ns for block in process.blocks if block.case == 2]
    assert np.array_equal(process.values(2), expected)
    assert np.allclose(process.ratios(2), process.values(2) / 20e3)
