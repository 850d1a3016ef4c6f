"""Facts about a link to a board, shown on real sshd on loopback."""

import asyncio
import getpass
import hashlib

import pytest

pytest.importorskip("asyncssh")

from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Item, connect
from tests.sshd import Board, boards, laptop

__all__ = ["boards", "laptop"]


def host_of(board: Board, **changes: object) -> Host:
    values = {
        "name": "pi",
        "address": "127.0.0.1",
        "user": getpass.getuser(),
        "port": board.port,
        "host_key": board.key,
        **changes,
    }
    return Host(**values)  # type: ignore[arg-type]


def test_a_command_runs_and_an_upload_is_skipped_the_second_time(boards) -> None:
    board = boards()

    async def work():
        async with connect(host_of(board)) as link:
            done = await link.run(["sh", "-c", "cat; exit 7"], stdin=b"hello")
            items = [Item(content=b"abc", sha256=hashlib.sha256(b"abc").hexdigest(), size_bytes=3)]
            return done, await link.home(), await link.upload(items), await link.upload(items)

    done, home, first, second = asyncio.run(work())

    assert (done.code, done.out) == (7, b"hello")
    assert home == str(board.home)
    assert (first.sent_bytes, second.skipped) == (3, 1)
