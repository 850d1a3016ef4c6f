"""Two profiles beside each other: like ones do not differ, unlike ones do, and it says how sure."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import (
    EXITS,
    added_cost,
    built_energy,
    built_profile,
    slowed,
    watched_cases,
    with_blocks,
)
from simulated import Nature, SimulatedMachine

from edgeexit import report
from edgeexit.blocks import DISTURBED, Block, Case, Mode, Reason, Verdict
from edgeexit.cli import entry
from edgeexit.compare import TIME, YARDSTICK, compare
from edgeexit.errors import UsageError
from edgeexit.profile import Profile

CASES = watched_cases()
USUAL = Nature(call_ns=(400e3, 900e3, 850e3), luck=0.005, singles=0)
A = built_profile(cases=CASES, rounds=6)


def slower_at(exit: str, factor: float, **more: Any) -> Profile:
    def cost(case: Case) -> float:
        return added_cost(case) * (factor if (case.kept, case.exit) == (EXITS, exit) else 1)

    return built_profile(**{"cases": CASES, "rounds": 6, "seed": 1, "cost": cost, **more})


# ---------------------------------------------------------------- what is told


@pytest.fixture(scope="module")
def usual() -> list[Profile]:
    return [SimulatedMachine(USUAL, seed).profile() for seed in range(21)]


def test_like_machines_show_no_difference(usual: list[Profile]) -> None:
    told = [compare(a, b).summary() for a, b in pairwise(usual)]
    assert sum(line.startswith("no difference") for line in told) >= 19, told


def test_three_percent_at_one_exit_are_found(usual: list[Profile]) -> None:
    slow = replace(USUAL, call_ns=(412e3, *USUAL.call_ns[1:]))
    others = [SimulatedMachine(slow, seed).profile() for seed in range(100, 120)]
    told = [compare(a, b).summary() for a, b in zip(usual, others, strict=False)]
    found = [line for line in told if line.startswith("B is 1.0") and "slower at exit0" in line]
    assert len(found) >= 19, told


def test_only_the_slower_exit_is_named() -> None:
    found = compare(A, slower_at("exit1", 1.05))
    assert [row.name for row in found.rows] == [*EXITS, "without exits"]
    assert found.summary().startswith("B is 1.05")
    assert "slower at exit1 (p = 0.0" in found.summary()
    assert "exit0" not in found.summary()


def test_what_is_faster_is_told_as_times_faster() -> None:
    found = re.match(
        r"B is (1\.2[45]\d)x faster at exit2 ", compare(A, slower_at("exit2", 0.8)).summary()
    )
    assert found


def test_a_profile_does_not_differ_from_itself() -> None:
    found = compare(A, A)
    assert found.notes == ()
    assert all(row.time.ratio == 1 for row in found.rows)
    assert found.summary().startswith("no difference (all ratios lie within 0.99")


@given(factor=st.floats(0.5, 2.0))
@settings(max_examples=5, deadline=None)
def test_there_and_back_is_one(factor: float) -> None:
    b = slower_at("exit0", factor, rounds=3)
    for there, back in zip(compare(A, b).rows, compare(b, A).rows, strict=True):
        assert math.isclose(there.time.ratio * back.time.ratio, 1)
        assert math.isclose(there.time.chance, back.time.chance, abs_tol=0.02)


def test_wide_intervals_do_not_pass_as_likeness() -> None:
    wide = [built_profile(cases=CASES, rounds=3, luck=0.08, seed=k) for k in (0, 1)]
    assert re.match(
        r"no difference for sure \(least p = \S+\), but ratios of 0\.\d+ \.\. 1\.\d+ fit",
        compare(*wide).summary(),
    )


def test_two_processes_cannot_tell() -> None:
    few = [built_profile(cases=CASES, processes=2, seed=k) for k in (0, 1)]
    found = compare(*few)
    assert not found.can_tell
    assert found.summary() == "cannot tell: 2 and 2 processes are too few to show a difference"


def test_one_process_has_no_interval_in_json_either() -> None:
    one = built_profile(cases=CASES, processes=1)
    document = json.loads(json.dumps(compare(one, A).to_document(), allow_nan=False))
    assert document["exits"][0]["time"]["high"] is None


# ---------------------------------------------------------------- times or yardsticks


def test_a_slower_machine_is_no_slower_bundle() -> None:
    b = with_blocks(built_profile(cases=CASES, rounds=6, seed=1), lambda _, b: slowed(b, 1.1))
    found = compare(A, b)
    assert found.basis == YARDSTICK
    assert "yardstick loop was 10.0% slower" in found.why.replace("9.9%", "10.0%")
    assert found.summary().startswith("no difference")
    assert found.rows[0].time.ratio == pytest.approx(1.1, rel=0.02)


def test_agreeing_yardsticks_leave_it_at_times() -> None:
    found = compare(A, built_profile(cases=CASES, rounds=6, seed=1))
    assert (found.basis, found.notes) == (TIME, ())


def test_between_machines_the_yardstick_is_not_taken() -> None:
    def fast(_: float, block: Block) -> Block:
        return slowed(block, 0.4)

    b = with_blocks(built_profile(cases=CASES, rounds=6, seed=1), fast)
    b = replace(b, device="rpi5", machine={**A.machine, "board": "Raspberry Pi 5 Model B Rev 1.0"})
    found = compare(A, b)
    assert found.basis == TIME
    assert "different machines" in found.why
    assert "x faster at exit0" in found.summary()
    assert any(note.startswith("board differs: Raspberry Pi 4") for note in found.notes)


# ---------------------------------------------------------------- what else differs


def test_what_else_differs_is_said() -> None:
    b = replace(
        slower_at("exit0", 1.0),
        bundle_digest="c" * 64,
        mode=Mode(name="sustained"),
        threads=4,
        machine={**A.machine, "kernel": "6.12"},
        verdict=Verdict(status=DISTURBED, reasons=(Reason(kind="clock", text="clock fell"),)),
    )
    notes = "\n".join(compare(A, b).notes)
    for part in (
        "B is DISTURBED (clock)",
        "bundle differs",
        "sustained in B",
        "threads differs",
    ):
        assert part in notes
    assert "kernel differs: 6.6.31 in A, 6.12 in B" in notes


def test_exits_are_matched_by_name() -> None:
    b = built_profile(
        exits=("exit1", "exit2", "new"), cases=watched_cases(("exit1", "exit2", "new"))
    )
    found = compare(A, b)
    # The networks without exits end elsewhere: they are not the same thing.
    assert [row.name for row in found.rows] == ["exit1", "exit2"]
    assert "only in A: exit0" in found.notes
    assert "only in B: new" in found.notes


def test_without_a_common_exit_there_is_nothing_to_compare() -> None:
    other = built_profile(exits=("x", "y"), cases=watched_cases(("x", "y")), rounds=2)
    with pytest.raises(UsageError, match=r"nothing to compare: A has the exits exit0, exit1"):
        compare(A, other)


def test_hostile_facts_become_one_short_line() -> None:
    b = replace(A, machine={**A.machine, "ker\nnel": "x\x1b[2J" * 500})
    (note,) = compare(A, b).notes
    assert note.isprintable()
    assert len(note) < 120


# ---------------------------------------------------------------- joules


def test_joules_are_compared_with_their_label() -> None:
    found = compare(
        replace(A, energy=built_energy(2.0)), replace(A, energy=built_energy(2.2, seed=1))
    )
    assert found.joule_labels == ("external",)
    assert found.rows[0].a_mj == pytest.approx(2.0, rel=0.01)
    assert found.rows[0].energy is not None
    assert found.rows[0].energy.ratio == pytest.approx(1.1, rel=0.01)
    assert found.energy_summary() is not None
    assert "1.1" in str(found.energy_summary())
    text = report.comparison_table(found)
    assert "joules (gross, external, window by window): B takes 1.1" in text
    assert found.summary().startswith("no difference")


def test_joules_of_one_side_are_not_compared() -> None:
    found = compare(A, replace(A, energy=built_energy(2.0)))
    assert found.energy_summary() is None
    assert found.joule_labels == ()
    assert "meter differs: nothing in A, INA219 in B" in found.notes


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("profiles")
    made = {"a": A, "slow": slower_at("exit1", 1.05), "same": slower_at("exit1", 1.0)}
    made["few"] = built_profile(cases=CASES, processes=2, rounds=3, seed=3)
    for name, profile in made.items():
        profile.save(folder / f"{name}.json")
    return {name: str(folder / f"{name}.json") for name in made}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = entry(["compare", *words])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_the_last_line_is_the_result(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, files["a"], files["same"])
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("no difference")
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run(capsys, files["a"], files["slow"])
    assert code == 0
    assert out.splitlines()[-1].startswith("B is 1.05")


@pytest.mark.parametrize(("allowed", "code"), [("3%", 6), ("0.03", 6), ("0%", 6), ("20%", 0)])
def test_too_slow_is_exit_code_6(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], allowed: str, code: int
) -> None:
    found, out, err = run(capsys, files["a"], files["slow"], "--fail-if-slower", allowed)
    assert found == code
    assert out.splitlines()[-1].startswith("B is 1.05")
    assert ("Error: more than" in err) == (code == 6)


def test_like_profiles_pass_the_gate(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, files["a"], files["same"], "--fail-if-slower", "3%")[::2] == (0, "")


def test_data_that_cannot_tell_say_so(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, files["few"], files["few"], "--fail-if-slower", "0.1%")
    assert code == 0
    assert "cannot tell whether B is slower by more than 0.001" in err
    assert "2 and 2 processes" in err


@pytest.mark.parametrize("share", ["3", "-1%", "nan", "inf%", "150%", "three", "", "%"])
def test_senseless_shares_are_refused(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], share: str
) -> None:
    code, out, err = run(capsys, files["a"], files["same"], "--fail-if-slower", share)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")


def test_json_holds_every_exit(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, files["a"], files["slow"], "--json", "--fail-if-slower", "3%")
    document = json.loads(out)
    assert code == 6
    assert document["basis"] == "time"
    assert [entry["exit"] for entry in document["exits"]] == [*EXITS, "without exits"]
    assert document["exits"][1]["time"]["low"] > 1.03


def test_wrong_files_are_refused_in_a_line(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cut.json").write_bytes(Path(files["a"]).read_bytes()[:1000])
    (tmp_path / "other.json").write_text('{"format": 1}')
    for name, wanted in (("cut.json", 3), ("other.json", 3), ("absent.json", 2)):
        code, out, err = run(capsys, files["a"], str(tmp_path / name))
        assert (code, out) == (wanted, "")
        assert err.count("\n") <= 2


def test_help_shows_examples() -> None:
    from edgeexit.cli.compare import command

    assert "--fail-if-slower 3%" in CliRunner().invoke(command, ["--help"]).output
