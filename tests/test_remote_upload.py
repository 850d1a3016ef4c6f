"""Facts about uploading to a board: skipped, resumed, verified there; what storage refuses."""

import asyncio
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("asyncssh")

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, StorageError
from edgeexit.files import file_digest
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Item, LinkLost, Uploaded, connect
from tests.faulty_link import FaultyLink
from tests.sshd import Board, boards, laptop

__all__ = ["boards", "laptop"]

Boards = Callable[..., Board]


def item(content: bytes, path: Path | None = None) -> Item:
    """*content* to upload, out of the file *path* if one is given."""
    if path is not None:
        path.write_bytes(content)
    return Item(
        content=content if path is None else path,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )


def upload(host: Host, *items: Item, on_bytes: Callable[[int], None] | None = None) -> Uploaded:
    async def linked() -> Uploaded:
        async with connect(host) as link:
            return await link.upload(items, on_bytes=on_bytes)

    return asyncio.run(linked())


def refused(host: Host, *items: Item) -> EdgeExitError:
    with pytest.raises(EdgeExitError) as caught:
        upload(host, *items)
    assert str(caught.value).isprintable()
    return caught.value


def blobs(board: Board) -> dict[str, str]:
    """What lies on the board: names and digests of the contents."""
    folder = board.home / "blobs"
    return {path.name: file_digest(path) for path in folder.iterdir()} if folder.exists() else {}


def test_what_is_uploaded_lies_there_under_its_digest_and_is_not_sent_again(
    boards: Boards, tmp_path: Path
) -> None:
    board = boards()
    whole = [item(os.urandom(300_000), tmp_path / "a"), item(b"abc"), item(b"")]
    seen: list[int] = []

    first = upload(board.host(), *whole, on_bytes=seen.append)
    second = upload(board.host(), *whole, item(b"new"))

    assert first == Uploaded(sent_bytes=300_003, skipped=0)
    assert sum(seen) == 300_003
    assert second == Uploaded(sent_bytes=3, skipped=3)
    assert blobs(board) == {thing.sha256: thing.sha256 for thing in (*whole, item(b"new"))}


def test_the_same_content_twice_is_sent_once(boards: Boards) -> None:
    assert upload(boards().host(), item(b"abc"), item(b"abc")).sent_bytes == 3


@pytest.mark.parametrize("share", range(0, 100, 10))
def test_an_upload_that_breaks_anywhere_goes_on_where_it_was(
    boards: Boards, tmp_path: Path, share: int, caplog: pytest.LogCaptureFixture
) -> None:
    board, data = boards(), os.urandom(2 << 20)
    thing, place = item(data, tmp_path / "a"), board.home / "blobs"
    with FaultyLink(board.port) as faulty:
        # Logging in and asking take about 10 kB.
        faulty.cut_after = 12_000 + len(data) * share // 100
        broken = refused(board.host(port=faulty.port), thing)
        parts = list(place.glob("*"))
        there = parts[0].stat().st_size if parts else 0
        faulty.cut_after = None
        resumed = upload(board.host(port=faulty.port), thing)

    assert isinstance(broken, LinkLost)
    assert not caplog.records, "libraries must not write on the user's terminal"
    assert [path.suffix for path in parts] in ([], [".part"])
    assert resumed.sent_bytes <= len(data) - there
    assert share < 20 or resumed.sent_bytes < len(data)
    assert blobs(board) == {thing.sha256: thing.sha256}


def test_an_upload_arrives_over_a_slow_link_and_after_many_cuts(
    boards: Boards, tmp_path: Path
) -> None:
    board, thing = boards(), item(os.urandom(1 << 20), tmp_path / "a")
    cuts = 0
    with FaultyLink(board.port) as faulty:
        faulty.rate = 4e6
        faulty.cut_after = 250_000
        while True:
            try:
                done = upload(board.host(port=faulty.port), thing)
                break
            except LinkLost:
                cuts, faulty.count = cuts + 1, 0
                assert cuts < 10

    assert cuts >= 3
    assert done.sent_bytes < 1 << 19
    assert list(blobs(board)) == [thing.sha256]


def test_bytes_altered_on_the_way_never_become_a_blob(boards: Boards, tmp_path: Path) -> None:
    board, thing = boards(), item(os.urandom(1 << 20), tmp_path / "a")
    with FaultyLink(board.port) as faulty:
        faulty.corrupt_at = 400_000
        broken = refused(board.host(port=faulty.port), thing)
        faulty.corrupt_at = None
        upload(board.host(port=faulty.port), thing)

    assert isinstance(broken, LinkLost)
    assert list(blobs(board)) == [thing.sha256]


@pytest.mark.parametrize("size", [1, 50_000, 100_000, 100_001, 300_000])
def test_a_part_that_is_wrong_is_noticed_and_sent_anew(boards: Boards, size: int) -> None:
    board, data = boards(), os.urandom(100_000)
    thing = item(data)
    (board.home / "blobs").mkdir(parents=True)
    (board.home / "blobs" / f"{thing.sha256}.part").write_bytes(b"?" * size)

    done = upload(board.host(), thing)

    assert blobs(board) == {thing.sha256: thing.sha256}
    assert done.sent_bytes >= len(data)


@pytest.mark.parametrize("damage", ["bit", "cut", "folder", "link"])
def test_a_blob_that_went_bad_on_the_board_is_replaced(boards: Boards, damage: str) -> None:
    board, data = boards(), os.urandom(1000)
    thing = item(data)
    upload(board.host(), thing)
    path = board.home / "blobs" / thing.sha256
    if damage == "bit":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "link":
        path.unlink()
        path.symlink_to("/etc/passwd")
    else:
        path.unlink()
        path.mkdir()

    if damage == "folder":
        assert isinstance(refused(board.host(), thing), EdgeExitError)
    else:
        assert upload(board.host(), thing).sent_bytes == len(data)
        assert path.read_bytes() == data
        assert not path.is_symlink()
    assert Path("/etc/passwd").stat().st_size > 1000 or damage != "link"


def test_a_part_that_is_a_link_is_not_written_through(boards: Boards, tmp_path: Path) -> None:
    board, thing = boards(), item(b"x" * 1000)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    (board.home / "blobs").mkdir(parents=True)
    (board.home / "blobs" / f"{thing.sha256}.part").symlink_to(precious)

    upload(board.host(), thing)

    assert precious.read_bytes() == b"mine"


def test_a_file_that_changed_meanwhile_is_named(boards: Boards, tmp_path: Path) -> None:
    board, thing = boards(), item(b"before", tmp_path / "model")
    (tmp_path / "model").write_bytes(b"after!")

    error = refused(board.host(), thing)

    assert isinstance(error, BadFile)
    assert str(tmp_path / "model") in str(error)
    assert blobs(board) == {}


def on_path(board: Board, **programs: str) -> Board:
    """*board*, where only sh and these shell scripts are found as programs."""
    folder = board.folder / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    (folder / "cat").symlink_to("/bin/cat")
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    board.stop()
    board.settings = (f"SetEnv PATH={folder} EDGEEXIT_HOME={board.home} SHLVL=5",)
    return board.start()


def test_a_board_that_alters_what_it_stores_is_told_after_the_second_try(boards: Boards) -> None:
    board = on_path(
        boards(),
        python3="read code; echo '{\"blobs\": 1}'; while read order; do "
        'echo \'{"whole": false, "part": 0}\'; done',
    )
    (board.home / "blobs").mkdir(parents=True)
    seen: list[int] = []

    with pytest.raises(DeviceError, match="arrived altered twice"):
        upload(board.host(), item(b"abc"), on_bytes=seen.append)
    assert sum(seen) == 0


def test_a_board_without_python_is_told(boards: Boards) -> None:
    error = refused(on_path(boards()).host(), item(b"abc"))

    assert str(error) == "pi: no python3 there"
    assert (error.exit_code, error.hint) == (5, "on the board: sudo apt install python3")


@pytest.mark.parametrize("says", ["echo oops >&2; exit 1", "echo oops; sleep 0.1", "cat"])
def test_a_python_that_does_not_work_is_told(
    boards: Boards, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.remote.talk._FIRST_ANSWER_S", 1.0)
    error = refused(on_path(boards(), python3=says).host(), item(b"abc"))

    assert error.exit_code == 5
    assert not isinstance(error, LinkLost)


def test_what_a_login_shell_prints_does_no_harm(boards: Boards) -> None:
    board = boards(user="pi")
    (board.folder / ".bashrc").write_text("echo Welcome; echo '{}'; echo '[1]'\n")

    assert upload(board.host(), item(b"abc")).sent_bytes == 3


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_as_such_and_what_arrived_is_used_later(
    boards: Boards, tmp_path: Path
) -> None:
    board, data = boards(), os.urandom(3 << 20)
    thing = item(data, tmp_path / "a")
    with mounted(board.home, "size=1m"):
        error = refused(board.host(), thing)
        (part,) = (board.home / "blobs").iterdir()
        assert part.name == f"{thing.sha256}.part"
        subprocess.run(["mount", "-o", "remount,size=9m", str(board.home)], check=True)
        done = upload(board.host(), thing)
        assert blobs(board) == {thing.sha256: thing.sha256}

    assert (type(error), error.exit_code) == (StorageError, 11)
    assert "o space left" in str(error)
    assert "free some space" in (error.hint or "")
    assert 0 < done.sent_bytes < len(data)


def test_a_read_only_disk_is_told(boards: Boards) -> None:
    board = boards()
    with mounted(board.home, "ro"):
        error = refused(board.host(), item(b"abc"))

    assert (type(error), "Read-only" in str(error)) == (StorageError, True)


@pytest.mark.parametrize("where", ["", "blobs"])
def test_a_folder_that_is_not_ours_is_told(boards: Boards, where: str) -> None:
    board = boards(user="pi")
    (board.home / "blobs").mkdir(parents=True)
    (board.home / where).chmod(0o555)
    if not where:
        (board.home / "blobs").rmdir()

    error = refused(board.host(), item(b"abc"))

    assert (type(error), "Permission denied" in str(error)) == (StorageError, True)


def test_two_at_once_send_the_same_without_harm(boards: Boards, tmp_path: Path) -> None:
    board, data = boards(), os.urandom(2 << 20)
    thing = item(data, tmp_path / "a")

    async def one() -> Uploaded:
        async with connect(board.host()) as link:
            return await link.upload([thing])

    async def both() -> list[Uploaded]:
        return list(await asyncio.gather(one(), one(), one()))

    asyncio.run(both())

    assert blobs(board) == {thing.sha256: thing.sha256}


@pytest.mark.parametrize("pieces", [33, 40, 64, 65])
def test_cancelling_leaves_a_part_that_the_next_call_uses(
    boards: Boards, tmp_path: Path, pieces: int
) -> None:
    board, data = boards(), os.urandom(4 << 20)
    thing = item(data, tmp_path / "a")

    async def give_up() -> None:
        seen = 0

        def count(number: int) -> None:
            nonlocal seen
            seen += number
            if seen == pieces << 15:
                task.cancel()

        async with connect(board.host()) as link:
            task = asyncio.create_task(link.upload([thing], on_bytes=count))
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(give_up())
    [part] = (board.home / "blobs").iterdir()
    there = part.read_bytes()

    assert there == data[: len(there)]  # no hole: what is there need not be sent again
    assert len(there) >= pieces << 15
    assert upload(board.host(), thing).sent_bytes <= len(data) - len(there)
    assert blobs(board) == {thing.sha256: thing.sha256}
