"""Bundles on their way to boards behind a real sshd: what breaks is told, nothing is half done."""

import asyncio
import getpass
import json
import os
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from small import small_bundle
from sshd import Board, boards, laptop, make_key, public
from test_remote_profiling import install

pytest.importorskip("asyncssh")

from faulty_link import FaultyLink

from edgeexit.agent.parcel import Parcel, pack
from edgeexit.errors import BadFile, Busy, DeviceError, EdgeExitError, StorageError
from edgeexit.releases import Releases
from edgeexit.remote import delivery
from edgeexit.remote.fan import Outcome
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import LinkLost

__all__ = ["boards", "laptop"]

Make = Callable[..., Board]
SIZE = 400_000


def host_of(board: Board, **changes: Any) -> Host:
    facts = {"name": "pi", "address": "127.0.0.1", "port": board.port, "host_key": board.key}
    return Host(**{"user": getpass.getuser(), **facts, **changes})


def parcel_of(folder: Path, size_bytes: int = SIZE) -> Parcel:
    """A bundle of about *size_bytes* that is different every time."""
    return pack(small_bundle(folder, training_bloom=os.urandom(size_bytes)).path)


def deployed(board: Board, parcel: Parcel, **changes: Any) -> Outcome:
    return done(delivery.deploy(host_of(board, **changes), parcel))


def done(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    return asyncio.run(work)


def running(board: Board, app: str = "small") -> str | None:
    return Releases(board.home, app).current_id()


@pytest.fixture
def board(boards: Make) -> Board:
    return install(boards())


# ---------------------------------------------------------------- the way there


def test_a_board_gets_what_it_has_not_and_is_left_alone_afterwards(
    board: Board, tmp_path: Path
) -> None:
    parcel = parcel_of(tmp_path)
    steps: list[tuple[str, str]] = []

    def on_step(host: str, step: str) -> None:
        steps.append((host, step))

    first = done(delivery.deploy(host_of(board, device="rpi4"), parcel, on_step=on_step))
    again = done(delivery.deploy(host_of(board), parcel, on_step=on_step))

    assert first.changed and not again.changed
    assert first.facts["sent_bytes"] == parcel.manifest.size_bytes
    assert again.facts["sent_bytes"] == 0
    assert running(board) == parcel.manifest.id == first.facts["release"]
    assert "hosts.toml calls it a rpi4, it is a host" in first.facts["warnings"]
    assert [step for _, step in steps[-2:]] == ["install", "self-test"]
    assert {host for host, _ in steps} == {"pi"}
    assert ("pi", "100% of 0.4 MB") in steps


def test_a_dry_run_sends_nothing(board: Board, tmp_path: Path) -> None:
    found = done(delivery.deploy(host_of(board), parcel_of(tmp_path), dry_run=True))

    assert found.changed and found.facts["was"] is None
    assert [path.name for path in board.home.iterdir()] == ["env"]


def test_rollback_and_status_are_the_boards_own(board: Board, tmp_path: Path) -> None:
    first, second = (deployed(board, parcel_of(tmp_path)).facts["release"] for _ in range(2))
    host = host_of(board)

    status = done(delivery.status(host))
    back = done(delivery.rollback(host, "small"))

    (app,) = status.facts["apps"]
    assert not status.changed
    assert (app["app"], app["current"], app["previous"]) == ("small", second, first)
    assert (back.facts["release"], back.facts["was"]) == (first, second)
    assert running(board) == first


def test_a_link_that_is_cut_again_and_again_brings_every_byte_once(
    board: Board, tmp_path: Path
) -> None:
    """Cut after every tenth of the upload; each try goes on where the last one was."""
    before = deployed(board, parcel_of(tmp_path, 1000)).facts["release"]
    parcel, cuts, found = parcel_of(tmp_path), 0, None
    with FaultyLink(board.port) as link:
        while found is None:
            # A tenth of the content, and what a link costs besides.
            link.count, link.cut_after = 0, SIZE // 10 + 10_000
            try:
                found = deployed(board, parcel, port=link.port)
            except LinkLost as error:
                assert str(error).startswith("pi: ")
                assert running(board) == before
                cuts += 1
    assert 7 <= cuts <= 12
    assert running(board) == parcel.manifest.id
    assert found.facts["sent_bytes"] < SIZE / 5
    assert not list((board.home / "blobs").glob("*.part"))


def test_a_slow_link_is_slow_and_no_more(board: Board, tmp_path: Path) -> None:
    parcel = parcel_of(tmp_path, 100_000)
    with FaultyLink(board.port) as link:
        link.rate = 200_000

        assert deployed(board, parcel, port=link.port).changed
    assert running(board) == parcel.manifest.id


def test_a_byte_altered_on_the_way_ends_the_link_and_never_arrives(
    board: Board, tmp_path: Path
) -> None:
    parcel = parcel_of(tmp_path, 100_000)
    with FaultyLink(board.port) as link:
        link.corrupt_at = 60_000
        with pytest.raises(EdgeExitError):
            deployed(board, parcel, port=link.port)
    assert running(board) is None

    assert deployed(board, parcel).changed


def test_two_deploys_at_once_have_one_winner(board: Board, tmp_path: Path) -> None:
    parcels = [parcel_of(tmp_path / str(k)) for k in range(2)]

    async def both() -> list[Outcome | BaseException]:
        works = [delivery.deploy(host_of(board), parcel) for parcel in parcels]
        return await asyncio.gather(*works, return_exceptions=True)

    found = asyncio.run(both())

    (loser,) = [error for error in found if isinstance(error, BaseException)]
    (winner,) = [outcome for outcome in found if isinstance(outcome, Outcome)]
    assert isinstance(loser, Busy) and loser.exit_code == 8
    assert str(loser).startswith("pi: ")
    assert running(board) == winner.facts["release"]
    again = deployed(board, parcels[found.index(loser)])
    assert again.changed and again.facts["was"] == winner.facts["release"]


def test_a_bundle_that_changes_after_it_was_checked_is_not_sent(
    board: Board, tmp_path: Path
) -> None:
    parcel = parcel_of(tmp_path)
    (parcel.path / "training.bloom").write_bytes(bytes(SIZE))

    with pytest.raises(BadFile):
        deployed(board, parcel)
    assert running(board) is None


# ---------------------------------------------------------------- boards that cannot


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at *folder*."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_before_anything_is_sent(boards: Make, tmp_path: Path) -> None:
    board = boards()
    with small_disk(board.home, "size=1m"):
        install(board)
        with pytest.raises(StorageError, match=r"^pi: .* MB free, expected .* MB") as caught:
            deployed(board, parcel_of(tmp_path))
        assert caught.value.hint
        assert not (board.home / "blobs").exists()


def test_a_disk_that_fills_up_on_the_way_leaves_what_runs(boards: Make, tmp_path: Path) -> None:
    board = boards()
    with small_disk(board.home, "size=3m"):
        install(board)
        first = deployed(board, parcel_of(tmp_path, 100_000)).facts["release"]
        parcel = parcel_of(tmp_path)

        def fill(host: str, step: str) -> None:
            if "%" in step:  # the upload has begun
                free = os.statvfs(board.home)
                with suppress(OSError):  # the upload is taking its share, too
                    (board.home / "log").write_bytes(bytes(free.f_bavail * free.f_frsize))

        with pytest.raises(StorageError, match="pi: "):
            done(delivery.deploy(host_of(board), parcel, on_step=fill))
        assert running(board) == first

        (board.home / "log").unlink()
        assert deployed(board, parcel).changed
        assert running(board) == parcel.manifest.id


def test_a_disk_that_fell_to_read_only_is_told(boards: Make, tmp_path: Path) -> None:
    board = boards()
    with small_disk(board.home, "size=9m"):
        install(board)
        first = deployed(board, parcel_of(tmp_path, 1000)).facts["release"]
        subprocess.run(["mount", "-o", "remount,ro", str(board.home)], check=True)

        with pytest.raises(StorageError, match=r"pi: .*Read-only file system"):
            deployed(board, parcel_of(tmp_path, 1000))
        assert done(delivery.status(host_of(board))).facts["apps"][0]["current"] == first


def not_a_program(board: Board) -> None:
    program = board.home / "env" / "current" / "bin" / "edgeexit"
    # An ELF header of a machine that does not exist.
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\xff" + bytes(44))


def other_kind(board: Board) -> None:
    install_again(board, "echo 'Segmentation fault' >&2; exit 139; :")


def without_python(board: Board) -> None:
    program = board.home / "env" / "current" / "bin" / "edgeexit"
    program.write_text("#!/nowhere/python3\n")


def not_set_up(board: Board) -> None:
    (board.home / "env" / "current").unlink()


def old_protocol(board: Board) -> None:
    install_again(board, 'echo \'{"agent": 99, "edgeexit": "9.9"}\'; :')


def install_again(board: Board, script: str) -> None:
    program = board.home / "env" / "current" / "bin" / "edgeexit"
    program.write_text(f"#!/bin/sh\n{script}\n")


@pytest.mark.parametrize(
    "fault", [not_a_program, other_kind, without_python, not_set_up, old_protocol]
)
def test_a_board_without_a_working_edgeexit_is_told_with_the_next_step(
    board: Board, tmp_path: Path, fault: Callable[[Board], None]
) -> None:
    fault(board)

    with pytest.raises(DeviceError, match=r"^pi: ") as caught:
        deployed(board, parcel_of(tmp_path, 1000))
    assert caught.value.hint and ("setup" in caught.value.hint or "doctor" in caught.value.hint)
    assert caught.value.exit_code == 5


RESULT = {
    **{"app": "small", "release": "a" * 16, "was": None, "changed": True, "policy": None},
    **{"device": "host", "runtime": "x", "runtime_version": "1", "edgeexit": "1"},
    **{"selftest": None, "warnings": []},
}


NONSENSE: list[dict[str, Any]] = [
    {"need": {"blobs": ["0" * 64]}},
    {"need": {"blobs": "all"}},
    {"need": {}},
    *({"result": {key: RESULT[key] for key in RESULT if key != name}} for name in RESULT),
    {"result": RESULT | {"changed": "yes"}},
    {"result": RESULT | {"selftest": []}},
]


def test_a_board_that_answers_nonsense_gets_nothing_and_fails_alone(
    board: Board, tmp_path: Path
) -> None:
    parcel = parcel_of(tmp_path, 1000)

    def answering(line: dict[str, Any]) -> None:
        lines = "\n".join(map(json.dumps, ({"agent": 1, "edgeexit": "1"}, line)))
        install_again(board, f"cat <<'END'\n{lines}\nEND\nread order; read answer; exit 0")

    answering({"result": RESULT})
    assert deployed(board, parcel).changed
    for line in NONSENSE:
        answering(line)
        with pytest.raises(DeviceError, match=r"^pi: "):
            deployed(board, parcel)
    assert not (board.home / "blobs").exists()


def test_an_unknown_or_changed_host_key_is_never_trusted(
    board: Board, tmp_path: Path, laptop: Path
) -> None:
    parcel = parcel_of(tmp_path, 1000)
    other = public(make_key(tmp_path / "other"))

    for key in (None, other):
        with pytest.raises(DeviceError, match="key") as caught:
            deployed(board, parcel, host_key=key)
        assert caught.value.hint
    assert not (laptop / ".ssh" / "known_hosts").exists()
    assert running(board) is None
