"""Facts about functions that run in a process of their own."""

import os
import sys
import time
from pathlib import Path

import pytest

from edgeexit.errors import BadFile, StorageError, Unsupported, UsageError
from edgeexit.host import apart

FUNCTIONS = """
import os, subprocess, sys, time
from edgeexit.errors import BadFile

def double(folder, number):
    (folder / "out.txt").write_text(os.getcwd())
    print("noise")
    return {"twice": 2 * number}
def refuse(folder):
    raise BadFile("net.x: holds nonsense", hint="copy it again")
def crash(folder):
    print("about to fall", file=sys.stderr, flush=True)
    os.abort()
def raised(folder):
    raise RuntimeError("no such thing")
def fill(folder):
    raise OSError(28, "No space left on device", "x")
def hang(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "pid").write_text(str(child.pid))
    time.sleep(60)
def grow(folder):
    bytearray(4 << 30)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch) -> None:
    home = tmp_path / "code"
    home.mkdir()
    (home / "foreign.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(home))


def run(name: str, folder: Path, **options):
    arguments = options.pop("arguments", {})
    return apart.run(f"foreign:{name}", folder, arguments, where="net.x", **options)


def test_plain_values_go_in_and_come_out_and_files_lie_in_the_folder(tmp_path, capfd) -> None:
    assert run("double", tmp_path, arguments={"number": 21}) == {"twice": 42}
    assert (tmp_path / "out.txt").read_text() == str(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_refusal_is_raised_again_with_its_hint(tmp_path) -> None:
    with pytest.raises(BadFile, match=r"net\.x: holds nonsense") as caught:
        run("refuse", tmp_path)
    assert caught.value.hint == "copy it again"
    with pytest.raises(StorageError, match="No space left"):
        run("fill", tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("crash", r"ends with signal 6: about to fall"),
        ("raised", "ends with code 1: RuntimeError: no such thing"),
        ("grow", "ends with code 1: MemoryError"),
    ],
)
def test_a_crash_is_one_line(tmp_path, name, told) -> None:
    with pytest.raises(Unsupported, match=told):
        run(name, tmp_path, memory_bytes=2 << 30)


def test_a_hang_ends_with_all_that_it_started(tmp_path) -> None:
    with pytest.raises(Unsupported, match=r"takes more than 2 s"):
        run("hang", tmp_path, timeout_s=2)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not _is_alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("a grandchild lives on")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_another_interpreter_sees_this_package_alone(tmp_path) -> None:
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    other = folder / "python"
    # An interpreter that says what it was given, then does what is asked.
    other.write_text(f'#!/bin/sh\nls "$PYTHONPATH" > "$TMPDIR/seen"\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)

    with pytest.raises(Unsupported, match="No module named 'foreign'"):
        run("double", tmp_path, arguments={"number": 1}, python=str(other))
    assert (tmp_path / "seen").read_text() == "edgeexit\n"
    with pytest.raises(UsageError, match="no Python interpreter"):
        run("double", tmp_path, python=os.devnull)
