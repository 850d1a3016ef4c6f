"""Profiles of boards behind a real sshd: identity, broken links, results that wait over there."""

import asyncio
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small import small_bundle

pytest.importorskip("asyncssh")

from edgeexit import __version__, cli
from edgeexit.blocks import Mode
from edgeexit.bundle import load_bundle
from edgeexit.children import environment
from edgeexit.collect import Limits, Progress
from edgeexit.errors import DeviceError, Disturbed, EdgeExitError, StorageError, UsageError
from edgeexit.profile import Profile
from edgeexit.remote import profiling
from edgeexit.remote.hosts import Host, Hosts
from edgeexit.remote.link import LinkLost
from edgeexit.request import check_verdict
from tests.faulty_link import FaultyLink
from tests.sshd import Board, boards, laptop

__all__ = ["boards", "laptop"]

# As wide and short as possible: the verdict is "clean" or "disturbed", as the machine is.
FAST = ["--processes", "5", "--precision", "50%", "--time-cap", "1"]
LIMITS = Limits(processes=5, precision=0.5, time_cap_s=1.0)

Make = Callable[..., Board]


def install(board: Board, script: str | None = None, **settings: str) -> Board:
    """Let `edgeexit` on *board* be this very package with *settings*, or a shell *script*."""
    program = board.home / "env" / "1" / "bin" / "edgeexit"
    program.parent.mkdir(parents=True)
    known = {"PYTHONPATH": environment()["PYTHONPATH"], **settings}
    words = ["env", *(f"{key}={value}" for key, value in known.items())]
    words += [sys.executable, "-P", "-m", "edgeexit"]
    program.write_text(f'#!/bin/sh\n{script or f"exec {shlex.join(words)}"} "$@"\n')
    program.chmod(0o755)
    (board.home / "env" / "current").symlink_to("1")
    return board


def replayed(folder: Path, model: str) -> dict[str, str]:
    """The setting that makes a machine say it is a *model*."""
    path = folder / "proc" / "device-tree" / "model"
    path.parent.mkdir(parents=True)
    path.write_text(f"{model}\0")
    return {"EDGEEXIT_SYSROOT": str(folder)}


def host_of(board: Board, name: str = "pi", port: int = 0, device: str | None = None) -> Host:
    return Host(
        name=name, address="127.0.0.1", port=port or board.port, host_key=board.key, device=device
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The laptop's current folder, with a bundle in it."""
    here = tmp_path / "here"
    here.mkdir()
    small_bundle(here, exits=2)
    monkeypatch.chdir(here)
    return here


def measure(host: Host, resume: bool = False, **more: Any) -> Profile:
    """Measure the only bundle here on *host*, as quickly as can be."""
    options = {
        "mode": Mode(),
        "threads": None,
        "cores": None,
        "limits": LIMITS,
        "meter": None,
        "save": lambda found: found.save("profile.json"),
        **more,
    }
    bundle = load_bundle(Path("small.edgeexit"))
    return asyncio.run(profiling.measure(host, bundle, None, resume=resume, **options))


def results(board: Board) -> list[str]:
    return sorted(path.name for path in (board.home / "results").glob("*/*"))


def rounds(board: Board) -> list[str]:
    """The rounds in the notebook on *board*, as they stand there; none without one."""
    books = list((board.home / "results").glob("*/profile.json.part"))
    lines = books[0].read_text().splitlines() if books else []
    return [line for line in lines if '"round"' in line and line.endswith("}")]


def idle(board: Board) -> bool:
    """Whether nobody measures on *board* any more, soon."""
    deadline = time.monotonic() + 10
    lock = board.home / "results" / "lock"
    while lock.exists() and subprocess.run(["flock", "-n", lock, "true"], check=False).returncode:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# ---------------------------------------------------------------- the command


def test_a_device_is_measured_on_the_board_that_hosts_toml_names(
    folder: Path, boards: Make, tmp_path: Path
) -> None:
    fake = replayed(tmp_path / "tree", "Raspberry Pi 4 Model B Rev 1.4")
    board = install(boards(), **fake)
    Hosts.read().add(host_of(board, device="rpi4"))
    old = board.home / "blobs" / ("a" * 64)
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "edgeexit", "profile", "--device", "rpi4", "--json", *FAST]
    with Path("out").open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=slave)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(master, 4096):
            shown += part
    os.close(master)

    assert child.wait(10) == Disturbed.exit_code, shown
    found = Profile.load("profile-rpi4.json")
    assert Path("out").read_bytes() == Path("profile-rpi4.json").read_bytes()
    assert (found.device, found.machine["board"]) == ("rpi4", "Raspberry Pi 4 Model B Rev 1.4")
    assert len(found.processes) >= 5
    assert found.bundle_digest == load_bundle(folder / "small.edgeexit").digest
    for words in (b"MB are there", b"ETA", b"wrote profile-rpi4.json", b"EMULATED"):
        assert words in shown
    assert b"measure on the board itself" in shown
    # What an emulated board says is kept, and never taken for the board's.
    assert found.verdict.status == "emulated"
    with pytest.raises(Disturbed, match="EDGEEXIT_SYSROOT"):
        check_verdict(found, accept_disturbed=True)
    assert results(board) == []
    assert not old.exists()
    assert not list(folder.glob("*.part*"))


def test_another_board_than_the_one_asked_for_is_refused_before_anything_is_sent(
    folder: Path, boards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = replayed(tmp_path / "tree", "Raspberry Pi 5 Model B Rev 1.0")
    board = install(boards(), **fake)
    Hosts.read().add(host_of(board, device="rpi4"))

    # What hosts.toml says counts as asked for, too.
    assert cli.entry(["profile", "--host", "pi", *FAST]) == 5
    err = capsys.readouterr().err
    assert "pi: expected a Raspberry Pi 4 Model B ('rpi4'), found 'rpi5'" in err
    assert "'Raspberry Pi 5 Model B Rev 1.0'" in err
    assert "--device rpi5" in err
    assert not (board.home / "blobs").exists()
    assert results(board) == []


def test_one_host_is_meant_or_the_command_asks_which(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.entry(["profile", "--device", "rpi4"]) == 5
    assert "edgeexit hosts add NAME USER@ADDRESS --device rpi4" in capsys.readouterr().err
    for name in ("a", "b"):
        Hosts.read().add(Host(name=name, address="127.0.0.1", device="rpi4"))
    Hosts.read().add(Host(name="c", address="127.0.0.1", device="rpi5"))
    assert cli.entry(["profile", "--device", "rpi4"]) == 2
    err = capsys.readouterr().err
    assert "2 hosts in hosts.toml are such boards: a, b" in err
    assert "--host a" in err
    assert cli.entry(["profile", "--host", "d"]) == 2
    assert "no host named 'd'" in capsys.readouterr().err
    assert not list(folder.glob("profile*"))


def said(**facts: Any) -> str:
    """A script that greets and gives *facts* as the result, whatever was asked."""
    version = facts.get("edgeexit", __version__)
    lines = [{"agent": 1, "edgeexit": version}, {"result": {"edgeexit": version, **facts}}]
    return f"printf '%s\\n' {shlex.join(map(json.dumps, lines))}; exit 0; #"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "pi: edgeexit is not installed there"),
        (said(edgeexit="9.9"), "pi: has edgeexit 9.9, here is"),
        (said(trial={"died": "was ended by SIGILL"}), "pi: no runtime works there: was ended by"),
        (said(trial={"runtime": None}), "pi: no runtime works there: none is installed"),
    ],
)
def test_a_board_that_lacks_something_sends_to_setup(
    folder: Path, boards: Make, capsys: pytest.CaptureFixture[str], script: str | None, says: str
) -> None:
    board = boards()
    if script is not None:
        install(board, script)
    Hosts.read().add(host_of(board))
    assert cli.entry(["profile", "--host", "pi"]) == 5
    err = capsys.readouterr().err
    assert says in err
    assert "edgeexit setup pi" in err


# ---------------------------------------------------------------- links that break


@pytest.mark.parametrize(
    ("cuts", "every"),
    [(2, 2), pytest.param(9, 8, marks=pytest.mark.slow)],
    ids=["a few times", "after every tenth"],
)
def test_no_measured_round_is_lost_when_the_link_is_cut(
    folder: Path, boards: Make, cuts: int, every: int
) -> None:
    board = install(boards())
    # None of the measurements that are cut would end before.
    long = Limits(processes=30, precision=0.5, time_cap_s=120)
    seen: list[str] = []
    with FaultyLink(board.port) as link:
        host = host_of(board, port=link.port)
        for cut in range(cuts):
            watch = threading.Thread(target=cut_at, args=(link, board, len(seen) + every))
            watch.start()
            with pytest.raises(LinkLost, match="pi"):
                measure(host, resume=cut > 0, limits=long)
            watch.join()
            assert idle(board)
            found = rounds(board)
            assert found[: len(seen)] == seen
            assert len(found) >= len(seen) + every
            seen = found
        profile = measure(host, resume=True)
    blocks = [block.to_document() for process in profile.processes for block in process.blocks]
    assert blocks[: sum(map(len, map(blocks_of, seen)))] == [b for s in seen for b in blocks_of(s)]
    starts = [block.at_ns for process in profile.processes for block in process.blocks]
    assert len(set(starts)) == len(starts)
    assert len({process.seed for process in profile.processes}) == len(profile.processes)
    assert results(board) == []


def cut_at(link: FaultyLink, board: Board, count: int) -> None:
    """Cut the *link* as soon as the notebook on *board* holds *count* rounds."""
    deadline = time.monotonic() + 60
    while len(rounds(board)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    link.cut()


def blocks_of(line: str) -> list[Any]:
    found = json.loads(line)["round"]
    assert isinstance(found, list)
    return found


class Enough(Exception):
    """Raised by a test in the middle of a measurement."""


def stop(_: Any) -> None:
    raise Enough


def test_what_did_not_arrive_or_was_lost_over_there_is_sent_again(
    folder: Path, boards: Make
) -> None:
    board = install(boards())
    with FaultyLink(board.port) as link, pytest.raises(LinkLost):
        measure(host_of(board, port=link.port), on_bytes=lambda done, total: link.cut())
    assert idle(board)
    assert rounds(board) == []
    # With and without --resume: nothing was measured yet.
    with pytest.raises(Enough):
        measure(host_of(board), on_step=stop)
    assert idle(board)
    (lost,) = (board.home / "results").glob("*/bundle.edgeexit/model.tflite")
    lost.chmod(0o644)
    lost.write_bytes(b"rust")
    (board.home / "blobs").rename(board.home / "gone")

    before = rounds(board)
    with pytest.raises(Enough):
        measure(host_of(board), resume=True, on_step=stop)
    assert rounds(board)[: len(before)] == before
    assert lost.stat().st_size > 4


def test_a_finished_profile_waits_on_the_board_until_it_is_fetched(
    folder: Path, boards: Make
) -> None:
    board = install(boards())
    refused: list[EdgeExitError] = []

    def ask() -> None:
        try:
            measure(host_of(board), threads=2)
        except EdgeExitError as error:
            refused.append(error)

    def second(_: Progress) -> None:
        if not refused:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    def full(_: Profile) -> None:
        raise StorageError("profile.json: cannot write: No space left on device")

    with pytest.raises(StorageError):
        measure(host_of(board), save=full, on_step=second)
    # Two would disturb each other.
    assert [error.exit_code for error in refused] == [8]
    assert "pi: " in str(refused[0])
    assert idle(board)
    (waiting,) = (board.home / "results").glob("*/profile.json")
    made = waiting.read_bytes()
    with pytest.raises(UsageError, match=r"pi: .*finished, but not fetched") as caught:
        measure(host_of(board))
    assert "--resume" in (caught.value.hint or "")

    steps: list[Progress] = []
    measure(host_of(board), resume=True, on_step=steps.append)
    assert Path("profile.json").read_bytes() == made
    assert not steps
    assert results(board) == []


@pytest.mark.slow
def test_a_board_whose_storage_is_full_says_so_and_goes_on_when_there_is_room(
    folder: Path, boards: Make
) -> None:
    board = install(boards())
    program = board.home / "env" / "1" / "bin" / "edgeexit"
    sound = program.read_text()
    # Python would leave byte code cut short at the limit, for all who run this checkout.
    limits = "ulimit -f 48; export PYTHONDONTWRITEBYTECODE=1; exec"
    program.write_text(sound.replace("exec", limits, 1))
    more = Limits(processes=20, precision=0.5, time_cap_s=20.0)
    with pytest.raises(StorageError, match=r"pi: .*File too large"):
        measure(host_of(board), limits=more)
    seen = rounds(board)
    assert len(seen) > 4
    program.write_text(sound)
    profile = measure(host_of(board), resume=True)
    blocks = [block.to_document() for process in profile.processes for block in process.blocks]
    assert blocks[: sum(map(len, map(blocks_of, seen)))] == [b for s in seen for b in blocks_of(s)]


@pytest.mark.slow
def test_a_board_behind_a_link_that_stands_still_finishes_and_keeps_the_profile(
    folder: Path, boards: Make
) -> None:
    board = install(boards())

    def stall(_: Progress) -> None:
        link.stall_after = link.stall_after or link.count

    with FaultyLink(board.port) as link:
        with pytest.raises(LinkLost):
            measure(host_of(board, port=link.port), on_step=stall)
        deadline = time.monotonic() + 120
        while not list((board.home / "results").glob("*/profile.json")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        steps: list[Progress] = []
        # The link that the board still believes in locks nobody out.
        measure(host_of(board), resume=True, on_step=steps.append)
    assert not steps
    assert results(board) == []


def test_ctrl_c_stops_the_board_and_resume_goes_on(
    folder: Path, boards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.toml").write_text(
        'format = 2\nname = "mine"\ntitle = "Mine"\nmodels = ["Fruit 7 *"]\n'
    )
    board = install(boards(), **replayed(tmp_path / "tree", "Fruit 7 Rev 1"))
    Hosts.read().add(host_of(board, device="mine"))
    options = ["profile", "--device", "mine.toml"]
    command = [sys.executable, "-m", "edgeexit", *options, "--precision", "0.1%"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not rounds(board):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    time.sleep(1.0)  # the laptop has heard of it
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert b"interrupted" in err
    assert b"pi: keeps it; the same command with --resume goes on" in err
    assert idle(board)

    # Another measurement is another folder; the same one says what there is.
    assert cli.entry([*options, "--resume", "--threads", "2"]) == 2
    assert "no unfinished measurement with these options" in capsys.readouterr().err
    assert cli.entry(options) == 2
    assert "a measurement that was not finished" in capsys.readouterr().err
    assert rounds(board)


def test_a_board_that_calls_itself_what_no_device_is_called_is_not_believed(
    folder: Path, boards: Make
) -> None:
    board = install(boards(), f"exec {shlex.quote(sys.executable)} -P {folder / 'liar.py'}")
    for lie in ("../x", f"{folder}/x.toml", "\x1b[2J"):
        (folder / "liar.py").write_text(
            LIAR.format(version=__version__, folder=str(folder), device=lie)
        )
        with pytest.raises(DeviceError, match="pi: says that it is a"):
            measure(host_of(board))


def test_a_board_that_gives_another_profile_is_not_believed(folder: Path, boards: Make) -> None:
    board = install(boards(), f"exec {shlex.quote(sys.executable)} -P {folder / 'liar.py'}")
    (folder / "liar.py").write_text(
        LIAR.format(version=__version__, folder=str(folder), device="host")
    )
    for lie in ("{", '{"format": 3}'):
        (folder / "lie.json").write_text(lie)
        with pytest.raises(EdgeExitError, match="pi") as caught:
            measure(host_of(board))
        assert caught.value.exit_code == 3
        assert not Path("profile.json").exists()
    liar = folder / "liar.py"
    liar.write_text(liar.read_text().replace("path=str(lie)", "path='\\ud800'"))
    with pytest.raises(DeviceError, match="in the board's answer"):
        measure(host_of(board))


LIAR = """
import hashlib, json, sys
from pathlib import Path
def say(**line):
    print(json.dumps(line), flush=True)
say(agent=1, edgeexit={version!r})
sys.stdin.readline()
if sys.argv[-1] == "hello":
    trial = {{"runtime": "x"}}
    say(result=dict(edgeexit={version!r}, device={device!r}, model=None, measuring=[], trial=trial))
else:
    lie = Path({folder!r}) / "lie.json"
    digest = hashlib.sha256(lie.read_bytes()).hexdigest()
    say(need=dict(fetch=dict(path=str(lie), sha256=digest, size_bytes=2)))
    sys.stdin.readline()
    say(result=dict())
"""
