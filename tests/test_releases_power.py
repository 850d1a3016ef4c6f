"""
Power cuts: nothing is half there afterwards, and nothing that was acknowledged is lost.

First on a file system that forgets whatever it may (lossy.py), after every system call; there it is
also shown of every fsync in the code that it is needed, and of other ways to write that they fail.
Then on a real ext4 that is shut down under the writer.
"""

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from board_process import MUTANTS
from lossy import Storage, build
from shelves import APP, SCENARIOS, Call, calls, examine, need, process, work

from edgeexit.errors import UsageError
from edgeexit.releases import Releases

LONG = ("first", "deploy")

# Every call of fsync (who calls it, for what, which of several) and a scenario that needs it.
# A name of TWICE: the first process is killed at that scenario's call, a second one comes after it.
FSYNCS = {
    ("make_folder", "folder", 0): "first",
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
}
TWICE = {"install twice": "releases", "activate twice": "app"}


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
        work(root, name, "", inject=inject, log=folder / "log", text_bytes=1 << 20)
        for line in (folder / "log").read_text().splitlines():
            storage.feed(line)
    done = work(root, SCENARIOS[name].operation, wrong_code, log=folder / "log", text_bytes=1 << 20)
    assert done.returncode == SCENARIOS[name].exit_code, done.stderr
    places = [line.removeprefix("fsync ") for line in done.stderr.splitlines() if "fsync " in line]
    shutil.rmtree(root)
    seen = set()
    for line in (folder / "log").read_text().splitlines():
        for image in storage.images() if storage.feed(line) else ():
            key = (*image.items(), *storage.said)
            if key not in seen:
                seen.add(key)
                root.mkdir()
                build(image, root)
                wrong = examine(SCENARIOS[name], root, storage.said)
                shutil.rmtree(root)
                if wrong:
                    return wrong, len(seen), places
    return [], len(seen), places


def last_sync(folder: Path, name: str, of: str) -> Call:
    """The last time that scenario *name* syncs the folder *of*."""
    work(folder / "board", name, log=folder / "log")
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

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_WITHOUT_LOG = 2  # what the journal holds in memory is lost, too


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[None]:
    _run("mount", "-o", ",".join(filter(None, ("loop", options))), image, folder)
    try:
        yield
    finally:
        _run("umount", folder)


def cut_power(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
    finally:
        os.close(handle)


def is_as_made(release: Path) -> bool:
    """Whether a release of churn holds what churn put into it."""
    number = (release / "bundle.json").read_bytes()
    return bool(number) and (release / "model.tflite").read_bytes() == number * 20000


def damage(home: Path, said: list[str]) -> list[str]:
    """What does not hold on the board after churn said this much and the power was cut."""
    folder, wrong = home / "apps" / APP, []
    for path in (folder / "current", folder / "previous", *folder.glob("releases/[!.]*")):
        if path.is_symlink() or path.exists():
            try:
                if not is_as_made(path):
                    wrong.append(f"{path.name} is not whole")
            except OSError as error:
                wrong.append(f"{path.name}: {error}")
    board = Releases(home, APP)
    status = board.status()
    found = " ".join(name or "-" for name in (status.current, status.previous, status.staged))
    # What was done, and what was about to be done.
    ends = [line.partition(" ")[2] for line in said if line.startswith("done")][-1:]
    ends += [line.partition(" ")[2] for line in said[-1:]]
    if ends and found not in ends:
        wrong.append(f"{found} is lost or never was, expected one of {ends}")
    try:
        board.open()
    except UsageError:
        if not ends or not ends[0].startswith("-"):
            wrong.append("nothing runs")
    return wrong


def cuts_that_hurt(
    folder: Path, cuts: int, options: str, wrong_code: str = ""
) -> Generator[str, None, None]:
    """What does not hold after each of so many power cuts on one board that goes on and on."""
    need("mkfs.ext4")
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system and shut it down")
    chance = random.Random(cuts)
    image, board = folder / "image", folder / "board"
    home = board / "home"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    _run("mkfs.ext4", "-q", image)
    home.mkdir(parents=True)
    (board / "brought").mkdir()
    steps = 0
    for cut in range(cuts):
        with mounted(image, home, options):
            words = process(board, "churn", wrong_code, str(1000 * cut))
            child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert child.stdout is not None
            said = [child.stdout.readline().decode().strip()]
            # With commit=1 the file system writes by itself, which is when order matters.
            time.sleep(chance.uniform(0.03, 1.5 if options else 0.35))
            cut_power(home)
            child.kill()
            said += child.communicate()[0].decode().splitlines()
        steps += sum(line.startswith("done") for line in said)
        with mounted(image, home, options):
            yield from damage(home, said)
    assert steps >= 2 * cuts


@pytest.mark.parametrize("options", ["", "commit=1,noauto_da_alloc"], ids=["ext4", "eager"])
@pytest.mark.parametrize(
    "cuts", [4, pytest.param(60, marks=pytest.mark.slow)], ids=lambda cuts: f"{cuts} cuts"
)
def test_the_power_is_cut_on_a_real_file_system(cuts: int, options: str, tmp_path: Path) -> None:
    assert list(cuts_that_hurt(tmp_path, cuts, options)) == []


def test_without_fsync_the_power_cuts_hurt_on_a_real_file_system(tmp_path: Path) -> None:
    with closing(cuts_that_hurt(tmp_path, 20, "", "no_fsync")) as hurts:
        assert next(hurts, None) is not None
