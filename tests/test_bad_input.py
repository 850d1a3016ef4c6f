"""
Bad input at the command line: one harmless line, a documented exit code, nothing half-written.

Here stand the cases that go through the whole command line; what one reader alone refuses is
tested beside that reader.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import pictures, small_bundle

from edgeexit import cli
from edgeexit.errors import SelfTestError, StorageError, UsageError, from_os_error, printable
from edgeexit.files import digest_of, npz_bytes

Captured = pytest.CaptureFixture[str]
BUNDLE = "small.edgeexit"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a sound picture and a sound npz."""
    folder = tmp_path_factory.mktemp("made")
    small_bundle(folder)
    samples = pictures(200)
    Image.fromarray(samples.samples[0, ..., 0]).save(folder / "good.png")
    np.savez(folder / "good.npz", samples=samples.samples, labels=samples.labels)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of *made*, as the current folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def refused(capsys: Captured, code: int, *args: str) -> str:
    """Run a command that must fail with *code*; the one line of its error."""
    before = files()
    assert cli.entry(args) == code
    assert files() == before, "something was written or removed"
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(("Error: ", "Hint: ")) or "Traceback" in line
    ]
    assert [line.partition(":")[0] for line in lines] in (["Error"], ["Error", "Hint"])
    assert all(line.isprintable() for line in lines)
    return lines[0]


def altered(change: Callable[[dict[str, object]], object]) -> None:
    """Change bundle.json."""
    path = Path(BUNDLE) / "bundle.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def with_selftest(**arrays: object) -> None:
    """Put other arrays into selftest.npz, with a digest that fits."""
    path = Path(BUNDLE) / "selftest.npz"
    data = npz_bytes({**np.load(path), **arrays})
    path.write_bytes(data)
    entry = {"sha256": digest_of(data), "bytes": len(data)}
    altered(lambda document: document["files"].update({"selftest.npz": entry}))  # type: ignore[attr-defined]


def npy(header: str) -> bytes:
    text = header.encode().ljust(118)
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def twice() -> bytes:
    buffer = io.BytesIO()
    member = io.BytesIO()
    np.save(member, np.zeros((1, 12, 10), np.uint8))
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("samples.npy", member.getvalue())
        archive.writestr("samples.npy", member.getvalue())
    return buffer.getvalue()


# ---------------------------------------------------------------- words of the command line


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["rnu"], 2, "no command named 'rnu'"),
        (["run", "--polcy", "none"], 2, "--polcy"),
        (["run", "good.png", "--threads", "0"], 2, "--threads"),
        (["run", "good.png", "--threads", "100000"], 2, "--threads"),
        (["run", "good.png", "--min-confidence", "nan"], 2, "--min-confidence"),
        (["run", "good.png", "--device", "../host"], 2, "device"),
        (["run", "good.png", "--policy", "absent.json"], 2, "no such file"),
        (["run", "good.png", "--policy", "/dev/zero"], 2, "pipe or device"),
        (["run", "/dev/zero"], 2, "pipe or device"),
        (["run", ""], 2, "an empty name"),
        (["run", "--bundle", "a" * 5000], 2, "name too long"),
        (["run", "a" * 5000 + ".png"], 2, "name too long"),
        (["run", "good.png", "--log", BUNDLE], 11, "Is a directory"),
        (["run", "good.png", "--log", "/dev/full"], 11, "/dev/full: cannot write: No space"),
        (["evaluate", BUNDLE], 2, "no DATA"),
        (["evaluate", BUNDLE, "fashion-mnist:reprot"], 2, "fashion-mnist"),
        (["evaluate", BUNDLE, "fashion-mnist:report"], 2, "10 classes, the network has 4"),
        (["evaluate", BUNDLE, "/dev/zero"], 2, "expected SET:SPLIT"),
        (["evaluate", BUNDLE, "good.npz", "--record", BUNDLE], 2, BUNDLE),
        (["profile", BUNDLE, "--threads", "0"], 2, "--threads"),
        (["profile", BUNDLE, "--time-cap", "nan"], 2, "--time-cap"),
        (["profile", BUNDLE, "--device", "hots"], 2, "no device named 'hots'"),
        (["tune", BUNDLE, "--max-accuracy-drop", "nan"], 2, "nan"),
        (["tune", BUNDLE, "--measure", "margn"], 2, "no confidence measure named 'margn'"),
        (["inspect", "good.png"], 2, "expected a bundle folder"),
        (["calibration", "check", "fashon-mnist"], 2, "no calibration set named"),
        (["calibration", "make", "absent", "-o", "new"], 2, "no such file"),
        (["calibration", "make", "good.npz", "-o", BUNDLE], 2, BUNDLE),
        (["demo", "-o", "good.png"], 2, "not an empty folder"),
        (["demo", "-o", BUNDLE], 2, "not an empty folder"),
    ],
)
def test_wrong_words_are_refused(
    here: Path, capsys: Captured, args: list[str], code: int, words: str
) -> None:
    assert words in refused(capsys, code, *args)


@pytest.mark.parametrize("args", [[], ["calibration"]])
def test_no_command_shows_the_help(args: list[str], capsys: Captured) -> None:
    assert cli.entry(args) == 2
    found = capsys.readouterr()
    assert found.err.startswith("Usage: edgeexit")
    assert "Commands:" in found.err
    assert found.out == ""


def test_a_pipe_nobody_writes_to_does_not_hang(here: Path, capsys: Captured) -> None:
    os.mkfifo("pipe.png")
    assert "pipe or device" in refused(capsys, 2, "run", "pipe.png")


def test_a_loop_of_links_is_a_wrong_path(here: Path, capsys: Captured) -> None:
    Path("loop").symlink_to("loop")
    assert "symbolic links" in refused(capsys, 2, "run", "loop")


# ---------------------------------------------------------------- names that fake


@pytest.mark.parametrize("name", ["x\n\x1b[31mError: y", "x\r\x07", "\u202egnp.x", "\udcff"])
def test_an_absent_name_with_codes_stays_one_harmless_line(
    here: Path, capsys: Captured, name: str
) -> None:
    refused(capsys, 2, "run", f"{name}.png")


def test_a_name_with_codes_is_shown_escaped_and_given_whole_in_json(here: Path) -> None:
    shutil.copy("good.png", b"a\n\x1b[31m\xff.png")
    command = [sys.executable, "-m", "edgeexit", "run", BUNDLE, b"a\n\x1b[31m\xff.png"]
    shown = subprocess.run(command, capture_output=True, check=True)
    assert shown.stdout.startswith(rb"a\n\x1b[31m\udcff.png: ")
    told = subprocess.run([*command, "--json", "--log", "l"], capture_output=True, check=True)
    answer = json.loads(told.stdout)
    assert os.fsencode(answer["input"]) == b"a\n\x1b[31m\xff.png"
    assert json.loads(Path("l").read_bytes()) == answer


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "\ud800", "\x00"])
def test_a_bundle_whose_class_holds_codes_is_refused(
    here: Path, capsys: Captured, name: str
) -> None:
    altered(lambda document: document["class_names"].__setitem__(0, name))  # type: ignore[attr-defined]
    assert "control characters" in refused(capsys, 3, "inspect", BUNDLE)


def test_printable_keeps_letters_of_all_scripts() -> None:
    assert printable("Ünï код 日本") == "Ünï код 日本"
    assert printable("a\x1b\n\ud800") == r"a\x1b\n\ud800"


# ---------------------------------------------------------------- what files hold


@pytest.mark.parametrize("text", ["1e999", "NaN", "[" * 100_000, '{"a":1,"a":2}', "\xff", ""])
def test_a_wrong_policy_file_is_refused(here: Path, capsys: Captured, text: str) -> None:
    content = text if text[:1] in "[{" else f'{{"format": {text}}}'
    Path("p.json").write_bytes(content.encode("latin-1"))
    line = refused(capsys, 3, "run", BUNDLE, "good.png", "--policy", "p.json")
    assert "p.json: not valid JSON" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("(" * 60), "not a sound"),
        (npy("{'descr': '|V0', 'fortran_order': False, 'shape': (10000000000,)}"), "fit"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000,)}"), "fit"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 28)}"), "not a sound"),
        (b"", "not a"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_forged_arrays_are_refused(
    here: Path, capsys: Captured, content: bytes, words: str, suffix: str
) -> None:
    path = Path(f"a.{suffix}")
    path.write_bytes(content)
    if suffix == "npz" and content:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("samples.npy", content)
    assert words in refused(capsys, 3, "run", BUNDLE, str(path))


@pytest.mark.parametrize(
    "values",
    [np.uint8(1), np.zeros((0, 12, 10, 1), np.uint8), np.array(["a"]), np.zeros(3, "M8[s]")],
)
def test_arrays_without_numbers_are_refused_once(
    here: Path, capsys: Captured, values: np.ndarray
) -> None:
    np.save("a.npy", values)
    np.savez("a.npz", samples=values)
    refused(capsys, 3, "run", BUNDLE, "a.npy")
    refused(capsys, 3, "run", BUNDLE, "a.npz")


def test_an_array_that_stands_twice_is_refused(here: Path, capsys: Captured) -> None:
    Path("a.npz").write_bytes(twice())
    assert "stands twice" in refused(capsys, 3, "run", BUNDLE, "a.npz")


@pytest.mark.parametrize(
    "samples",
    [
        np.uint8(3),
        np.zeros((0, 12, 10, 1), np.uint8),
        np.zeros((4, 120), np.uint8),
        np.array(["a"]),
    ],
)
def test_a_bundles_own_wrong_selftest_is_a_bad_file(
    here: Path, capsys: Captured, samples: object
) -> None:
    with_selftest(samples=samples)
    refused(capsys, 3, "run", BUNDLE)


def test_other_answers_are_a_failed_selftest(here: Path, capsys: Captured) -> None:
    with_selftest(logits=~np.load(f"{BUNDLE}/selftest.npz")["logits"])
    assert "logits differ" in refused(capsys, SelfTestError.exit_code, "run", BUNDLE)


def test_foreign_things_among_the_policies_are_not_shown(here: Path, capsys: Captured) -> None:
    policies = Path(BUNDLE) / "policies"
    (policies / "folder.json").mkdir(parents=True)
    (policies / "a\x1b[31m.json").write_text("{")
    assert cli.entry(["inspect", BUNDLE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"] == {}


def test_an_npz_is_evaluated_whatever_the_networks_layout(here: Path, capsys: Captured) -> None:
    altered(lambda document: document["preprocess"].update(layout="nchw"))  # type: ignore[attr-defined]
    samples = np.load("good.npz")["samples"]
    np.savez(
        "first.npz", samples=samples.transpose(0, 3, 1, 2), labels=np.load("good.npz")["labels"]
    )
    found = []
    for name in ("good.npz", "first.npz"):
        assert cli.entry(["evaluate", BUNDLE, name, "--policy", "none", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["confusion"])
    assert found[0] == found[1]


# ---------------------------------------------------------------- streams and surroundings


def shell(command: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    text = command.replace("EDGEEXIT", f"'{sys.executable}' -m edgeexit")
    return subprocess.run(["bash", "-c", text], capture_output=True, check=False, **more)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("EDGEEXIT run small.edgeexit good.png <&-", 0, b""),
        ("EDGEEXIT run small.edgeexit - <&-", 2, b"standard input is closed"),
        ("EDGEEXIT run small.edgeexit good.png >&-", 0, b""),
        ("EDGEEXIT evaluate small.edgeexit good.npz 2>&-", 0, b""),
        ("EDGEEXIT --help > /dev/full", 11, b"No space left"),
        ("EDGEEXIT inspect small.edgeexit | true; exit ${PIPESTATUS[0]}", 0, b""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 EDGEEXIT inspect small.edgeexit", 0, b""),
        ("env -u HOME EDGEEXIT inspect small.edgeexit", 0, b""),
        ("mkdir gone; cd gone; rmdir ../gone; EDGEEXIT run", 2, b""),
        (
            "trap '' XFSZ; ulimit -f 0; EDGEEXIT evaluate small.edgeexit good.npz --record r.npz",
            11,
            b"r.npz: cannot write: File too large",
        ),
        (
            "trap '' XFSZ; ulimit -f 0; EDGEEXIT calibration make good.npz -o new",
            11,
            b"new: cannot write: File too large",
        ),
    ],
)
def test_surroundings(here: Path, command: str, code: int, words: bytes) -> None:
    before = files()
    done = shell(command)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert words in done.stderr
    assert files() == before


def test_json_is_one_document_and_nothing_else(here: Path) -> None:
    for command in ("inspect", "evaluate small.edgeexit good.npz", "run", "run good.png"):
        done = shell(f"EDGEEXIT {command} --json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)


@pytest.mark.parametrize(
    "command", ["profile -o p.json", "evaluate small.edgeexit many.npz --record r.npz"]
)
def test_ctrl_c_leaves_nothing_half_written(here: Path, command: str) -> None:
    samples = np.zeros((400_000, 12, 10, 1), np.uint8)
    np.savez("many.npz", samples=samples, labels=np.zeros(len(samples), np.int64))
    before = files()
    child = subprocess.Popen(
        [sys.executable, "-m", "edgeexit", *command.split()],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(1.5)
    os.killpg(child.pid, signal.SIGINT)
    _, told = child.communicate(timeout=20)
    assert child.returncode == 130, told
    assert re.findall(rb"(?m)^(Error: .*)$", told) == [b"Error: interrupted"]
    assert b"Traceback" not in told
    # What profile has finished is kept for --resume, and named.
    kept = files() - before
    assert kept <= {"p.json.part"}
    assert all(name.encode() in told for name in kept)


# ---------------------------------------------------------------- bugs


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_unless_the_traceback_is_asked_for(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("over\nthere")

    monkeypatch.setattr(cli.main, "invoke", fail)
    monkeypatch.setenv("EDGEEXIT_DEBUG", "1" if debug else "")
    assert cli.entry(["demo"]) == 1
    told = capsys.readouterr().err
    assert "Error: a bug in edgeexit: ZeroDivisionError at test_bad_input.py:" in told
    assert "over there\nHint: " in told
    assert ("Traceback" in told) == debug


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokenPipeError(32, "Broken pipe"), 0),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (EOFError("end"), 1),
        (PermissionError(13, "Permission denied", "x"), 11),
        (OSError(28, "No space left on device"), 11),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (OSError("what?"), 1),
    ],
)
def test_every_exception_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(cli.main, "invoke", fail)
    assert cli.entry(["demo"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_the_system_is_a_wrong_path_or_failing_storage() -> None:
    assert isinstance(from_os_error(OSError(36, "File name too long", "x")), UsageError)
    assert isinstance(from_os_error(OSError(5, "Input/output error")), StorageError)
    # What tempfile raises where every disk is full.
    nowhere = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
    assert isinstance(from_os_error(nowhere), StorageError)
    assert from_os_error(OSError("unknown")) is None
