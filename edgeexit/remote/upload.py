"""
Content-addressed upload into HOME/blobs of a board: skip, resume, verify there, rename.

Bytes go over sftp; a few lines of Python on the board say what is there, check the digests where
the bytes lie, and tell full, read-only and forbidden apart, for which sftp has one word. A blob
under its digest is whole and was verified; what is not yet whole ends in .part.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncssh

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, StorageError, printable
from edgeexit.files import Table, file_digest, open_file
from edgeexit.remote.broken import understood
from edgeexit.remote.talk import last_line

if TYPE_CHECKING:
    from edgeexit.remote.hosts import Host
    from edgeexit.remote.link import Item, Link, Uploaded
    from edgeexit.remote.talk import Talk

_CHUNK_BYTES = 1 << 15  # what every sftp server takes
_UNDER_WAY = 32
_LEAST_FREE_BYTES = 1 << 20

# Runs on the board: any Python 3, nothing installed. Each order is a line, each answer is one.
_THERE = r"""
import errno, hashlib, json, os, sys
folder = sys.argv[1]
def digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()
def sync(path, flags):
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
def look(name, size):
    path = os.path.join(folder, name)
    part = path + ".part"
    if os.path.lexists(path):
        if os.path.isfile(path) and os.path.getsize(path) == size and digest(path) == name:
            if os.path.lexists(part):
                os.unlink(part)
            return {"whole": True, "part": size}
        os.unlink(path)
    if not os.path.lexists(part):
        return {"whole": False, "part": 0}
    if os.path.islink(part) or not os.path.isfile(part) or os.path.getsize(part) > size:
        os.unlink(part)
        return {"whole": False, "part": 0}
    return {"whole": False, "part": os.path.getsize(part)}
def seal(name, size):
    path = os.path.join(folder, name)
    part = path + ".part"
    found = look(name, size)
    if found["whole"] or found["part"] < size:
        return found
    try:
        if digest(part) != name:
            os.unlink(part)
            return {"whole": False, "part": 0}
        sync(part, os.O_RDONLY)
        os.rename(part, path)
    except FileNotFoundError:  # another upload of the same was faster
        return look(name, size)
    sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    return {"whole": True, "part": size}
def room(name, size):
    path = os.path.join(folder, ".probe")
    try:
        with open(path, "wb") as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
    finally:
        if os.path.exists(path):
            os.unlink(path)
    found = os.statvfs(folder)
    return {"free": found.f_bavail * found.f_frsize}
print(json.dumps({"blobs": 1}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    try:
        os.makedirs(folder, exist_ok=True)
        answer = {"look": look, "seal": seal, "room": room}[order[0]](*order[1:])
    except OSError as error:
        code = errno.errorcode.get(error.errno, "")
        answer = {"errno": code, "why": error.strerror or str(error)}
    print(json.dumps(answer), flush=True)
"""
_FAILING = {"ENOSPC", "EROFS", "EIO", "EDQUOT", "EFBIG", "EACCES", "EPERM"}


async def upload(
    link: "Link", files: Sequence["Item"], on_bytes: Callable[[int], None]
) -> "Uploaded":
    """As Link.upload."""
    from edgeexit.remote.link import Uploaded

    folder = f"{await link.home()}/blobs"
    sent = skipped = 0
    async with _blobs(link, folder) as blobs:
        missing: list[tuple[Item, int]] = []
        for item in {item.sha256: item for item in files}.values():
            is_whole, begin = await blobs.ask("look", item)
            on_bytes(begin)
            if is_whole:
                skipped += 1
            else:
                missing.append((item, begin))
        if missing:
            async with link.sftp("upload") as sftp:
                for item, begin in missing:
                    sent += await _put(blobs, sftp, item, begin, on_bytes)
    return Uploaded(sent_bytes=sent, skipped=skipped)


async def _put(
    blobs: "_Blobs",
    sftp: asyncssh.SFTPClient,
    item: "Item",
    begin: int,
    on_bytes: Callable[[int], None],
) -> int:
    """Send *item* from *begin* on, and again from 0 if it arrived altered; the bytes sent."""
    sent = 0
    for attempt_begin in (begin, 0):
        sent += await _send(blobs, sftp, item, attempt_begin, on_bytes)
        is_whole, _ = await blobs.ask("seal", item)
        if is_whole:
            return sent
        on_bytes(-item.size_bytes)
        _check(item)
    raise DeviceError(
        f"{blobs.place}: {item.sha256[:16]} arrived altered twice",
        hint="is the board's storage failing? On the board: dmesg | tail",
    )


def _check(item: "Item") -> None:
    if isinstance(item.content, Path):
        found = file_digest(item.content)
    else:
        found = hashlib.sha256(item.content).hexdigest()
    if found != item.sha256:
        raise BadFile(
            f"{item.content if isinstance(item.content, Path) else 'content'}: "
            f"is not what was announced: SHA-256 {found[:16]}, expected {item.sha256[:16]}",
            hint="did it change meanwhile? Run the command again",
        )


async def _send(
    blobs: "_Blobs",
    sftp: asyncssh.SFTPClient,
    item: "Item",
    begin: int,
    on_bytes: Callable[[int], None],
) -> int:
    path = f"{blobs.folder}/{item.sha256}.part"
    # Never cut short: two uploads of the same write the same bytes to the same places.
    flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT
    waiting: deque[tuple[asyncio.Task[int], int]] = deque()
    sent = 0
    try:
        # Blocks of asyncssh's own making would leave its tasks' errors unread when the link ends.
        async with sftp.open(path, flags, encoding=None, block_size=0) as file:
            for offset, data in _chunks(item, begin):
                if len(waiting) >= _UNDER_WAY:
                    sent += await _arrived(waiting, on_bytes)
                task: asyncio.Task[int] = asyncio.ensure_future(file.write(data, offset))
                waiting.append((task, len(data)))
            while waiting:
                sent += await _arrived(waiting, on_bytes)
    except asyncssh.SFTPError as error:
        if isinstance(error, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection):
            raise
        raise await blobs.why(item, error) from error
    finally:
        for task, _ in waiting:
            task.cancel()
        await asyncio.gather(*(task for task, _ in waiting), return_exceptions=True)
    return sent


async def _arrived(
    waiting: deque[tuple["asyncio.Task[int]", int]], on_bytes: Callable[[int], None]
) -> int:
    task, count = waiting[0]
    # Cancelled alone, this piece would be left out and those begun behind it sent: a hole in .part.
    await asyncio.shield(task)
    waiting.popleft()
    on_bytes(count)
    return count


def _chunks(item: "Item", begin: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the pieces of *item* from *begin* on, never more than its size."""
    if isinstance(item.content, bytes):
        for offset in range(begin, len(item.content), _CHUNK_BYTES):
            yield offset, item.content[offset : offset + _CHUNK_BYTES]
        return
    with open_file(item.content) as file:
        file.seek(begin)
        for offset in range(begin, item.size_bytes, _CHUNK_BYTES):
            try:
                data = file.read(min(_CHUNK_BYTES, item.size_bytes - offset))
            except OSError as error:
                raise StorageError(f"{item.content}: cannot read: {error.strerror}") from error
            if data:
                yield offset, data


class _Blobs:
    """The Python process on the board that looks after the folder of blobs."""

    def __init__(self, host: "Host", process: "Talk", folder: str) -> None:
        self.place, self.folder = process.place, folder
        self._host, self._process = host, process

    async def ask(self, what: str, item: "Item") -> tuple[bool, int]:
        """Whether *item* is there whole, and how many bytes; StorageError if it is refused."""
        answer = await self._answer(what, item)
        with understood(self._host):
            if "errno" in answer:
                raise self._refused(answer)
            return answer.get("whole", bool), max(0, answer.get("part", int))

    async def _answer(self, what: str, item: "Item") -> Table:
        import json

        order = json.dumps([what, item.sha256, item.size_bytes]).encode() + b"\n"
        await self._process.say(order)
        answer = await self._process.hear()
        if answer is None:
            code, err = await self._process.ended()
            raise DeviceError(
                f"{self.place}: python3 ended there with code {code}: {last_line(err)}"
            )
        return answer

    def _refused(self, answer: Table) -> EdgeExitError:
        code, why = answer.get("errno", str), printable(answer.get("why", str)[:200])
        kind = StorageError if code in _FAILING else DeviceError
        hint = {"ENOSPC": "free some space on the board", "EDQUOT": "free some space on the board"}
        return kind(
            f"{self.place}: {self.folder}: {why}", hint=hint.get(code, "is the folder ours there?")
        )

    async def why(self, item: "Item", error: asyncssh.SFTPError) -> EdgeExitError:
        """What made sftp refuse: for a full disk it only says "Failure"."""
        answer = await self._answer("room", item)
        with understood(self._host):
            if "errno" in answer:
                return self._refused(answer)
            free = answer.get("free", int)
        if free < max(item.size_bytes, _LEAST_FREE_BYTES):
            return StorageError(
                f"{self.place}: {self.folder}: no space left: {free >> 10} KiB free, "
                f"{item.size_bytes >> 10} KiB wanted",
                hint="free some space on the board",
            )
        return DeviceError(f"{self.place}: {self.folder}: sftp refused: {printable(error.reason)}")


@asynccontextmanager
async def _blobs(link: "Link", folder: str) -> AsyncIterator[_Blobs]:
    import json

    # One line for every shell: the program itself comes on standard input.
    starter = "import json,sys;exec(json.loads(sys.stdin.readline()))"
    async with link.talk(["python3", "-I", "-u", "-c", starter, folder], "upload") as process:
        await process.say(json.dumps(_THERE).encode() + b"\n")
        if await process.greeting("blobs") is None:
            code, err = await process.ended()
            if code in (126, 127):
                raise DeviceError(
                    f"{link.host.name}: no python3 there",
                    hint="on the board: sudo apt install python3",
                )
            raise DeviceError(
                f"{process.place}: python3 ended there with code {code}: {last_line(err)}"
            )
        yield _Blobs(link.host, process, folder)
