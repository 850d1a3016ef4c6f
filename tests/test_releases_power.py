"""
Power cuts: nothing is half there afterwards, and nothing that was acknowledged is lost.

First on a file system that forgets whatever it may (lossy.py), after every system call; there it is
also shown of every fsync in the code that it is needed, and of other ways to write that they fail.
Then on a real ext4 that is shut down under the writer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from board_process import MUTANTS
from lossy import Storage, build
from shelves import CHECKOUT, SCENARIOS, Call, calls, examine, need, work

from edgeexit.manifest import RECORD

LONG = ("first", "deploy")

# Every call of fsync (who calls it, for what, which of several) and a scenario that needs it.
# TWICE: the first process is killed when it last syncs that folder, a second one comes after it.
FSYNCS = {
    ("new_folder", "file", 0): "install",
    ("new_folder", "folder", 0): "install",
    ("new_folder", "folder", 1): "install",
    ("new_folder", "folder", 2): "install",
    ("write_file", "file", 0): "rollback",
    ("write_file", "folder", 0): "rollback",
    ("point", "folder", 0): "rollback",
    ("remove", "folder", 0): "collect",
    ("settle", "folder", 0): "install twice",
    ("settle", "folder", 1): "activate twice",
    ("settle", "folder", 2): "begin twice",
}
TWICE = {"install twice": "releases", "activate twice": "app", "begin twice": "home"}


def stage(folder: Path, scenario: str) -> Path:
    """The board of *scenario*, in the same place each time: paths stand in what strace prints."""
    need("strace")
    shutil.rmtree(folder / "board", ignore_errors=True)
    (folder / "board").mkdir()
    SCENARIOS[scenario].stage(folder / "board")
    return folder / "board"


def first_wrong(folder: Path, name: str, wrong_code: str = "") -> tuple[list[str], int, list[str]]:
    """
    What is wrong after the first power cut that hurts scenario *name*, if one does.

    Also how many different trees were looked at, and which places call fsync.
    """
    name, is_twice = name.removesuffix(" twice"), name.endswith(" twice")
    root = stage(folder, name)
    storage = Storage(root)
    if is_twice:
        call = last_sync(folder, name, TWICE[f"{name} twice"])
        stage(folder, name)
        inject = f"{call.name}:signal=KILL:when={call.nth}"
        work(
            root,
            SCENARIOS[name].operation,
            "",
            inject=inject,
            log=folder / "log",
            text_bytes=1 << 20,
        )
        for line in (folder / "log").read_text().splitlines():
            storage.feed(line)
    done = work(root, SCENARIOS[name].operation, wrong_code, log=folder / "log", text_bytes=1 << 20)
    assert done.returncode == SCENARIOS[name].exit_code, done.stderr
    places = [line.removeprefix("fsync ") for line in done.stderr.splitlines() if "fsync " in line]
    shutil.rmtree(root)
    seen = set()
    for line in (folder / "log").read_text().splitlines():
        for image in storage.images() if storage.feed(line) else ():
            # What is hidden is swept away, whatever it is: one tree with and one without will do.
            hidden = {name for name in image if any(map(is_hidden, name.split("/")))}
            shown = [(name, image[name]) for name in image if name not in hidden]
            key = (bool(hidden), *shown, *storage.said)
            if key not in seen:
                seen.add(key)
                root.mkdir()
                build(image, root)
                wrong = examine(SCENARIOS[name], root, storage.said)
                shutil.rmtree(root)
                if wrong:
                    return wrong, len(seen), places
    return [], len(seen), places


def is_hidden(name: str) -> bool:
    return name.startswith(".") and name != RECORD


def last_sync(folder: Path, name: str, of: str) -> Call:
    """The last time that scenario *name* syncs the folder *of*."""
    work(folder / "board", SCENARIOS[name].operation, log=folder / "log")
    found = calls(folder / "log", folder / "board")
    return [call for call in found if call.name == "fsync" and f"/{of}>" in call.line][-1]


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in SCENARIOS if name not in LONG),
        *TWICE,
        *(pytest.param(name, marks=pytest.mark.slow) for name in LONG),
    ],
)
def test_after_any_power_cut_it_runs_and_heals_and_nothing_acknowledged_is_lost(
    name: str, tmp_path: Path
) -> None:
    wrong, trees, _ = first_wrong(tmp_path, name)

    assert wrong == []
    assert trees >= 3


def rank(place: str, places: list[str]) -> tuple[str, str, int]:
    """A place "function kind line" by name: lines change."""
    function, kind, _ = place.split()
    others = {p for p in places if p.split()[:2] == [function, kind]}
    return function, kind, sorted(others, key=lambda p: int(p.split()[2])).index(place)


def test_there_is_a_test_for_every_fsync(tmp_path: Path) -> None:
    places: list[str] = []
    for name in ("first", "collect", "open"):
        root = stage(tmp_path, name)
        done = work(root, SCENARIOS[name].operation, "")
        lines = done.stderr.splitlines()
        places += [line.removeprefix("fsync ") for line in lines if line.startswith("fsync ")]

    assert {rank(place, places) for place in places} == set(FSYNCS)


@pytest.mark.parametrize("place", FSYNCS, ids=lambda place: " ".join(map(str, place)))
def test_without_any_one_fsync_a_power_cut_hurts(
    place: tuple[str, str, int], tmp_path: Path
) -> None:
    name = FSYNCS[place]
    root = stage(tmp_path, name.removesuffix(" twice"))
    done = work(root, SCENARIOS[name.removesuffix(" twice")].operation, "")
    places = [line.removeprefix("fsync ") for line in done.stderr.splitlines() if "fsync " in line]
    (forgotten,) = {p for p in places if rank(p, places) == place}

    assert first_wrong(tmp_path, name, forgotten)[0] != []


@pytest.mark.parametrize(
    ("mutant", "name"),
    {
        "link_before_intent": "rollback",
        "links_without_rename": "rollback",
        "release_in_place": "install",
        "appears_before_it_is_synced": "install",
        "state_in_place": "rollback",
        "no_fsync": "rollback",
        "no_intent": "rollback",
        "collects_what_is_gone_back_to": "collect",
        "removes_in_place": "collect",
    }.items(),
)
def test_another_order_or_another_way_to_write_hurts(
    mutant: str, name: str, tmp_path: Path
) -> None:
    assert mutant in MUTANTS

    assert first_wrong(tmp_path, name, mutant)[0] != []


def test_every_mutant_is_tried() -> None:
    (mark,) = test_another_order_or_another_way_to_write_hurts.pytestmark  # type: ignore[attr-defined]

    assert {mutant for mutant, _ in mark.args[1]} == set(MUTANTS)


# ---------------------------------------------------------------- a real file system


def cuts_that_hurt(folder: Path, cuts: int, options: str, wrong_code: str = "") -> list[str]:
    """What did not hold after so many power cuts on one board that goes on and on."""
    for command in ("unshare", "mkfs.ext4"):
        need(command)
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system and shut it down")
    script = str(Path(__file__).with_name("power_cuts.py"))
    words = [sys.executable, script, str(folder), str(cuts), options, wrong_code]
    path = {"PYTHONPATH": str(CHECKOUT), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(
        ["unshare", "--mount", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **path},
    )
    assert done.returncode == 0, done.stderr
    *wrong, steps = done.stdout.splitlines()
    assert int(steps) >= cuts
    return wrong


@pytest.mark.parametrize("options", ["", "commit=1,noauto_da_alloc"], ids=["ext4", "eager"])
@pytest.mark.parametrize(
    "cuts", [4, pytest.param(60, marks=pytest.mark.slow)], ids=lambda cuts: f"{cuts} cuts"
)
def test_the_power_is_cut_on_a_real_file_system(cuts: int, options: str, tmp_path: Path) -> None:
    assert cuts_that_hurt(tmp_path, cuts, options) == []


def test_without_fsync_the_power_cuts_hurt_on_a_real_file_system(tmp_path: Path) -> None:
    assert cuts_that_hurt(tmp_path, 4, "", "no_fsync") != []
