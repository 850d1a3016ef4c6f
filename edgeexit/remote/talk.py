"""
A process on a board that one talks to in lines of JSON, or reads to its end.

Hidden here: what a login shell prints before the first answer, limits against endless output,
that standard error is read all the while, and that leaving the block ends the process: its
standard input closes, which our own programs take for Ctrl-C, and it gets SIGTERM.
"""

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncssh

from edgeexit.errors import BadFile, DeviceError, printable
from edgeexit.files import Table, parse_json
from edgeexit.remote.broken import lost, translated
from edgeexit.remote.hosts import Host

MAX_LINE_BYTES = 64 << 20
MAX_BANNER_BYTES = 64 << 10
MAX_ERR_BYTES = 64 << 10
_CHUNK = 1 << 16
_ENDING_S = 3.0
_FIRST_ANSWER_S = 120.0


class Talk:
    """A running process; *place* ("pi: agent hello") begins every error."""

    def __init__(
        self,
        host: Host,
        connection: asyncssh.SSHClientConnection,
        process: "asyncssh.SSHClientProcess[bytes]",
        doing: str,
    ) -> None:
        self.place = f"{host.name}: {doing}"
        self._host, self._connection, self._process, self._doing = host, connection, process, doing
        self._buffer = bytearray()
        self._err = bytearray()
        self._listening = asyncio.create_task(self._listen())

    async def say(self, message: Mapping[str, Any] | bytes) -> None:
        """Send *message* as one line, or bytes as they are; silence if nobody reads any more."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        doing = translated(self._host, self._connection, self._doing)
        # A process that has ended says why in what it wrote.
        with doing, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    def hush(self) -> None:
        """Close the process's standard input."""
        with contextlib.suppress(OSError):
            self._process.stdin.write_eof()

    async def hear(self) -> Table | None:
        """The next line, a JSON object; None after the last one."""
        line = await self.line(MAX_LINE_BYTES)
        if line is None:
            return None
        try:
            return parse_json(line, self.place)
        except BadFile as error:
            raise DeviceError(
                f"{self.place}: says {line[:80]!r}, expected a line of JSON",
                hint="is another edgeexit installed there? edgeexit setup " + self._host.name,
            ) from error

    async def greeting(self, key: str) -> Table | None:
        """The first JSON line that has *key*; what a login shell prints before it is skipped."""
        skipped = 0
        try:
            async with asyncio.timeout(_FIRST_ANSWER_S):
                while skipped <= MAX_BANNER_BYTES:
                    line = await self.line(MAX_BANNER_BYTES)
                    if line is None:
                        return None
                    with contextlib.suppress(BadFile):
                        said = parse_json(line, self.place)
                        if key in said:
                            return said
                    skipped += len(line) + 1
        except TimeoutError:
            fact = f"said nothing that we know within {_FIRST_ANSWER_S:g} s"
            raise DeviceError(f"{self.place}: {fact}") from None
        raise DeviceError(
            f"{self.place}: prints more than {MAX_BANNER_BYTES >> 10} KiB before it answers",
            hint="what does the login shell there print (~/.bashrc, ~/.profile)?",
        )

    async def line(self, limit_bytes: int) -> bytes | None:
        """The next line without its end; None after the last one."""
        begin = 0
        while (end := self._buffer.find(b"\n", begin)) < 0:
            begin = len(self._buffer)
            if begin > limit_bytes:
                raise DeviceError(f"{self.place}: a line of more than {limit_bytes} bytes")
            if not await self._more():
                end = len(self._buffer)
                if not end:
                    return None
                break
        found = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return found

    async def rest(self, limit_bytes: int) -> bytes:
        """Everything that the process still writes to its standard output."""
        while await self._more():
            if len(self._buffer) > limit_bytes:
                raise DeviceError(f"{self.place}: writes more than {limit_bytes} bytes")
        return bytes(self._buffer)

    async def _more(self) -> bool:
        with translated(self._host, self._connection, self._doing):
            data = await self._process.stdout.read(_CHUNK)
        self._buffer += data
        return bool(data)

    async def _listen(self) -> None:
        # Unread, it would fill the channel's window, and the process would wait for ever.
        with contextlib.suppress(OSError, asyncssh.Error):
            while data := await self._process.stderr.read(_CHUNK):
                self._err = (self._err + data)[-MAX_ERR_BYTES:]

    async def ended(self) -> tuple[int, str]:
        """Exit code and what came on standard error; LinkLost if the process did not end itself."""
        with translated(self._host, self._connection, self._doing):
            await self._process.wait_closed()
        await self._listening
        if self._process.exit_signal is not None:
            name = printable(str(self._process.exit_signal[0])[:20])
            raise DeviceError(
                f"{self.place}: was ended there by signal {name}",
                hint="KILL mostly means that the board ran out of memory"
                if name == "KILL"
                else None,
            )
        if self._process.exit_status is None:
            raise lost(self._host, self._doing)
        return self._process.exit_status, self._err.decode(errors="replace")

    async def end(self, *, kill: bool) -> None:
        """Make sure that the process ends: at once with *kill*, else if it does not by itself."""
        self.hush()
        if not kill:
            kill = not await self._closes()
        if kill:
            with contextlib.suppress(OSError, asyncssh.Error):
                self._process.terminate()
            await self._closes()
        self._process.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _closes(self) -> bool:
        with contextlib.suppress(TimeoutError, OSError, asyncssh.Error):
            async with asyncio.timeout(_ENDING_S):
                await self._process.wait_closed()
                return True
        return False


@asynccontextmanager
async def talk(
    host: Host, connection: asyncssh.SSHClientConnection, argv: Sequence[str], doing: str
) -> AsyncIterator[Talk]:
    """Start *argv* on the board; the process does not outlive the block."""
    with translated(host, connection, doing):
        process = await connection.create_process(shlex.join(argv), encoding=None)
    talking = Talk(host, connection, process, doing)
    try:
        yield talking
    except BaseException:
        await talking.end(kill=True)
        raise
    await talking.end(kill=False)


def last_line(err: str) -> str:
    """The last line of *err*, fit to be shown."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return printable(lines[-1][:300]) if lines else "it says nothing"
