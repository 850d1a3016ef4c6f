"""`edgeexit devices` lists boards, says which one this is, and records it."""

import json
from pathlib import Path

import pytest
import trees

from edgeexit.cli import entry
from edgeexit.device import device_names, find_device
from edgeexit.machine import ENVIRONMENT, Machine
from edgeexit.state import machine_facts


@pytest.fixture
def pi4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = trees.tree(tmp_path / "pi4", "rpi4")
    monkeypatch.setenv(ENVIRONMENT, str(machine.root))
    monkeypatch.chdir(tmp_path)
    return machine


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert entry(["devices", *argv]) == 0
    return capsys.readouterr().out


def test_alone_it_lists_every_board(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys).splitlines()
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == device_names()
    for word in ("Raspberry Pi 5", "4x Cortex-A76", "2400", "neon dotprod fp16", "pmic", "9/9"):
        assert word in rows["rpi5"]
    assert "4x Cortex-A55, 4x Cortex-A76" in rows["rock5b"]


def test_the_list_as_json_has_every_fact_with_its_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = json.loads(said(capsys, "--json"))["devices"]
    assert [device["name"] for device in found] == device_names()
    for device in found:
        for key, fact in device["facts"].items():
            assert set(fact) == {"value", "source", "verified", "note"}, key
            assert fact["source"]


def test_which_says_the_board_and_why(pi4: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "which")
    assert text.startswith(
        "rpi4 (Raspberry Pi 4 Model B): its model text, 'Raspberry Pi 4 Model B Rev 1.4', "
        "matches 'Raspberry Pi 4 Model B*'\n"
    )
    assert "times taken here mean nothing" in text
    clock = next(line for line in text.splitlines() if line.startswith("clock"))
    assert clock.split() == ["clock,", "MHz", "1800", "yes", "1800"]
    assert "64-bit system" in text


def test_which_as_json_holds_both_sides(pi4: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "which", "--json"))
    assert found["device"] == find_device("rpi4").to_document()
    assert found["machine"] == machine_facts(pi4)
    assert "matches" in found["why"]
    assert found["emulated"]


def test_which_shows_a_hostile_model_text_harmlessly(
    pi4: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.put(pi4, {"proc/device-tree/model": "\x1b[2J\nError: all is well\0"})
    text = said(capsys, "which")
    assert "\x1b" not in text
    assert text.startswith("host (this machine): no board's pattern matches its model text")


def test_show_gives_sources_and_what_is_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "rock5b")
    assert "pinned to cores 4, 5, 6, 7" in text
    assert "idle_w: 3.6  (verified)\n    github.com/geerlingguy/sbc-reviews" in text
    assert "ram_mb: 4096, 8192, 16384, 32768  (not verified)" in text
    assert "one busy core adds 1.68 W: (busy_w - idle_w) / cores, not measured alone" in text
    assert json.loads(said(capsys, "show", "rock5b", "--json"))["measure"]["pin"] == [4, 5, 6, 7]


@pytest.mark.parametrize("name", device_names())
def test_every_board_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "show", name).startswith(f"{name}: ")


def test_record_packs_this_machine(pi4: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["devices", "record", "-o", "mine"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mine: ") and " files, " in out and "of rpi4" in out
    assert "serial numbers" in out and "MAC addresses" in out
    assert "EDGEEXIT_SYSROOT=FOLDER" in err
    found = json.loads(said(capsys, "record", "-o", "mine.tar.gz", "--json"))
    assert found["device"] == "rpi4"
    assert sorted(found["names"]) == sorted(
        str(path.relative_to("mine")) for path in Path("mine").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["show", "rpi44"], 2, "no device named 'rpi44'"),
        (["show", "absent.toml"], 2, "absent.toml: no such file"),
        (["show", "broken.toml"], 3, "broken.toml: not valid TOML"),
        (["record"], 2, "Missing option '-o'"),
        (["record", "-o", "pi4"], 2, "pi4: exists, and a recording overwrites nothing"),
        (["record", "-o", "pi4/proc/cpuinfo/deeper"], 11, "cannot write"),
        (["--json", "which"], 2, "--json: give it after the subcommand"),
        (["whcih"], 2, "No such command 'whcih'"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    pi4: Machine,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    message: str,
) -> None:
    Path("broken.toml").write_text("name = ")
    assert entry(["devices", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ") and message in err.splitlines()[0]
    assert len(err.splitlines()) <= 2


def test_a_tree_of_nothing_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "empty"))
    assert entry(["devices", "record", "-o", str(tmp_path / "out")]) == 5
    assert "holds none of the files of a machine" in capsys.readouterr().err
