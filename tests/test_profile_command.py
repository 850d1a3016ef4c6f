"""`edgeexit profile` as it is typed: exit codes, files, refusals, and going on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import small_bundle

from edgeexit import cli
from edgeexit.profile import Profile

# As wide and short as possible: the verdict is "clean" or "disturbed", as the machine is.
FAST = ["--processes", "5", "--precision", "50%", "--time-cap", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_profile_is_written_whatever_the_verdict_and_json_is_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.entry(["profile", "--json", *FAST])
    out, err = capsys.readouterr()
    assert out == (folder / "profile-host.json").read_text()
    found = Profile.load(folder / "profile-host.json")
    assert code == (0 if found.verdict.status == "clean" else 6)
    assert ("DISTURBED" in err) == (found.verdict.status == "disturbed")
    assert not list(folder.glob("*.part*"))
    assert not list(folder.glob(".*"))


def test_what_does_not_converge_says_so_and_exits_with_6(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--processes", "5", "--precision", "0.0005", "--time-cap", "1"]
    assert cli.entry(["profile", *fast]) == 6
    out, _ = capsys.readouterr()
    assert "exit0" in out
    verdict = Profile.load("profile-host.json").verdict
    assert "precision" in [reason.kind for reason in verdict.reasons]
    assert verdict.status in ("not converged", "disturbed")
    assert verdict.status.upper() in out.upper()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "rpi44"], 2, "no device named 'rpi44'"),
        (["--device", "rpi4"], 5, "this machine is 'host'"),
        (["--mode", "fast"], 2, "no mode named 'fast'"),
        (["--rate", "5"], 2, "a rate belongs to 'paced'"),
        (["--mode", "paced", "--rate", "0"], 2, "rate: expected"),
        (
            ["--mode", "paced", "--rate", "0.1"],
            2,
            "paths take at least 2400 s, the time cap is 50 s",
        ),
        (["--mode", "paced", "--rate", "nan"], 2, "not a finite number"),
        (["--processes", "1"], 2, "processes: expected 5"),
        (["--precision", "one"], 2, "neither 1% nor 0.01|expected a share"),
        (["--precision", "0"], 2, "precision: expected"),
        (["--time-cap", "inf"], 2, "not a finite number"),
        (["--cores", "4000"], 2, "cores: 4000 cannot be used"),
        (["--cores", "a-b"], 2, "no list such as 0,4-7"),
        (["--cores", "3-1"], 2, "names no core"),
        (["--meter", "nonsense"], 2, "nonsense"),
        (["--meter", "ina219:0x40,shunt=0.1"], 5, "ina219"),
        (["--resume"], 2, "no unfinished measurement"),
        (["nothing.edgeexit"], 2, "nothing.edgeexit"),
        (["-o", "a.json", "--html", "./a.json"], 2, "is where the profile goes"),
        (["-o", "small.edgeexit/bundle.json"], 2, "would be overwritten"),
        (["--html", "small.edgeexit/model.tflite"], 2, "would be overwritten"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    import re

    before = sorted(folder.rglob("*"))
    assert cli.entry(["profile", *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err), err
    assert len([line for line in err.splitlines() if line.startswith("Error:")]) == 1
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_ends_with_11_and_resume_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "edgeexit", "profile", "--processes", "30", "--time-cap", "60"]
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 29; exec "$@"', "-", *command, "--precision", "0.1%"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 11, full.stderr
    assert "Traceback" not in full.stderr
    book = folder / "profile-host.json.part"
    assert 10_000 < book.stat().st_size <= 30_000
    assert not (folder / "profile-host.json").exists()
    first = json.loads(book.read_text().splitlines()[2])["seed"]

    again = subprocess.run(
        [*command[:4], *FAST], cwd=folder, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "--resume" in again.stderr
    done = subprocess.run(
        [*command[:4], *FAST, "--resume"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 6), done.stderr
    assert Profile.load(folder / "profile-host.json").processes[0].seed == first
    assert not book.exists()


def test_ctrl_c_says_interrupted_and_leaves_a_notebook(folder: Path) -> None:
    command = [sys.executable, "-m", "edgeexit", "profile", "--precision", "0.1%"]
    child = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    book = folder / "profile-host.json.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (book.exists() and b'"round"' in book.read_bytes()):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert b"interrupted" in err
    assert b"--resume" in err
    assert book.stat().st_size
