"""Killed or failing at any system call: the board runs, and the next call heals it."""

import itertools
import random
import subprocess
import time
from pathlib import Path

import pytest
from shelves import SCENARIOS, Call, acknowledged, calls, copied, examine, need, process, work

# In CI every so many-th system call of each operation; with --slow all of them.
STRIDE = 24
KILLED = (-9, 137)


@pytest.fixture(params=SCENARIOS)
def staged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A scenario's name, and its board ready to be copied."""
    need("strace")
    (tmp_path / "template").mkdir()
    SCENARIOS[request.param].stage(tmp_path / "template")
    return request.param, tmp_path / "template"


def points(staged: tuple[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> list[Call]:
    """The system calls at which the operation is to be disturbed; it is well without."""
    name, template = staged
    with copied(template, tmp_path / "board") as root:
        done = work(root, SCENARIOS[name].operation, log=tmp_path / "log")
        assert done.returncode == SCENARIOS[name].exit_code, done.stderr
        assert examine(SCENARIOS[name], root, acknowledged(done)) == []
        found = calls(tmp_path / "log", root)
    assert len(found) >= 10
    if request.config.getoption("--slow"):
        return found
    return found[list(SCENARIOS).index(name) % STRIDE :: STRIDE]


def test_killed_at_any_call_that_writes_it_runs_and_heals(
    staged: tuple[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scenario = SCENARIOS[staged[0]]
    for call in points(staged, tmp_path, request):
        with copied(staged[1], tmp_path / "board") as root:
            done = work(root, scenario.operation, inject=f"{call.name}:signal=KILL:when={call.nth}")
            assert done.returncode in KILLED, call
            assert examine(scenario, root, acknowledged(done)) == [], call


def test_refused_by_the_storage_at_any_call_it_says_so_runs_and_heals(
    staged: tuple[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Full, failing or read-only at one call: exit code 11, or done all the same."""
    scenario = SCENARIOS[staged[0]]
    errors = itertools.cycle(("ENOSPC", "EIO", "EROFS"))
    for call, error in zip(points(staged, tmp_path, request), errors, strict=False):
        with copied(staged[1], tmp_path / "board") as root:
            inject = f"{call.name}:error={error}:when={call.nth}"
            done = work(root, scenario.operation, inject=inject)
            assert done.returncode in (11, scenario.exit_code), (call, error, done.stderr)
            assert examine(scenario, root, acknowledged(done)) == [], (call, error)


@pytest.mark.parametrize(
    "kills", [8, pytest.param(100, marks=pytest.mark.slow)], ids=lambda kills: f"{kills} kills"
)
def test_killed_at_any_time_it_runs_and_heals(kills: int, tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    scenario = SCENARIOS["deploy"]
    scenario.stage(tmp_path / "template")
    chance = random.Random(7)
    with copied(tmp_path / "template", tmp_path / "board") as root:
        began = time.monotonic()
        subprocess.run(process(root, "deploy"), check=True, capture_output=True)
        whole_s = time.monotonic() - began
    cut_short = 0
    for _ in range(kills):
        with copied(tmp_path / "template", tmp_path / "board") as root:
            child = subprocess.Popen(process(root, "deploy"), stdout=subprocess.PIPE, text=True)
            time.sleep(chance.uniform(0, 1.1 * whole_s))
            child.kill()
            said = child.communicate()[0].split()
            cut_short += "deploy" not in said
            assert examine(scenario, root, said) == []
    assert cut_short >= kills / 4
