"""Layers of ARM systems are whole or not there; a board that is not there looks like one."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import arm
import pytest
from board import Board
from root import ENVIRONMENT, PYTHON, layer, layers

PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from root import layer

def build(folder):
    (folder / "half").touch()
    with open(sys.argv[2], "a") as log:
        print("begun", file=log, flush=True)
    time.sleep(float(sys.argv[3]))
    (folder / "whole").touch()

print(layer("some", ["recipe"], build))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


def builder(log: Path, seconds: float) -> "subprocess.Popen[str]":
    bench = str(arm.CHECKOUT / "bench" / "arm")
    argv = [sys.executable, "-c", PROGRAM, bench, str(log), str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def begun(log: Path) -> int:
    return log.read_text().count("begun") if log.exists() else 0


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    builders = [builder(log, 1) for _ in range(2)]
    places = {one.communicate()[0].strip() for one in builders}

    assert begun(log) == 1
    assert {path.name for path in Path(places.pop()).iterdir()} == {"half", "whole"}
    assert not places


def test_a_builder_that_is_killed_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    with builder(log, 60) as first:
        while not begun(log):
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    assert not [path for path in cache.iterdir() if path.suffix not in (".lock", ".part")]
    with builder(log, 0) as second:
        place = Path(second.communicate()[0].strip())

    assert begun(log) == 2
    assert {path.name for path in place.iterdir()} == {"half", "whole"}


def test_a_build_that_fails_leaves_nothing_that_counts(cache: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the registry is gone")

    with pytest.raises(OSError, match="gone"):
        layer("some", ["recipe"], fails)
    place = layer("some", ["recipe"], lambda folder: (folder / "whole").touch())

    assert [path.name for path in place.iterdir()] == ["whole"]


def test_another_recipe_is_another_layer() -> None:
    def named(recipe: Sequence[str]) -> Path:
        return layer("some", recipe, lambda folder: (folder / "whole").touch())

    assert named(["a", "b"]) == named(["a", "b"])
    assert len({named(recipe) for recipe in (["a"], ["a", "b"], ["ab"])}) == 3


def test_python_there_finds_byte_code_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real cache
    with arm.or_skip():
        site, system = layers(ready=True)
    is_same = ".".join(map(str, sys.version_info[:2])) == PYTHON
    for package in (site / "opt/site/numpy", system / f"usr/lib/python{PYTHON}/json"):
        code = package / "__pycache__" / f"__init__.cpython-{PYTHON.replace('.', '')}.pyc"
        assert code.is_file() == is_same


def test_a_login_is_on_a_board_that_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real cache
    commands = "id -un; uname -m; cat /proc/device-tree/model; vcgencmd get_throttled; ls /proc"
    with ExitStack() as stack:
        with arm.or_skip():
            login = stack.enter_context(Board("rpi5", tmp_path / "board", ready=False).login())
        ssh = ["ssh", "-F", str(login.config), "-p", str(login.port), login.address]
        done = subprocess.run([*ssh, commands], capture_output=True, text=True, check=True)
        left = subprocess.Popen([*ssh, "echo; sleep 600"], stdout=subprocess.PIPE)
        assert left.stdout is not None
        left.stdout.readline()
    left.communicate(timeout=30)
    assert left.returncode != 0
    said = done.stdout.replace("\0", "\n").splitlines()

    assert said[:4] == ["pi", "aarch64", "Raspberry Pi 5 Model B Rev 1.0", "throttled=0x0"]
    assert "1" in said[4:]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
