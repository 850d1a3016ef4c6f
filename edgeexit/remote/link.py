"""
A link to one board: run something there, ask our own command line there, move files.

Callers see connect, Link and LinkLost. Hidden here: the login shell, where edgeexit lives on the
board, the protocol of `edgeexit agent`, and sftp.
"""

import asyncio
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, kind_of, printable
from edgeexit.files import Table
from edgeexit.remote.broken import LinkLost, translated, understood
from edgeexit.remote.hosts import Host
from edgeexit.remote.login import opened
from edgeexit.remote.talk import Talk, last_line, talk

__all__ = ["Done", "Item", "Link", "LinkLost", "Uploaded", "connect"]

# History: 1 first.
PROTOCOL = 1
MAX_OUT_BYTES = 64 << 20
_READ_BYTES = 1 << 15

# Whatever the login shell, HOME is found by a POSIX one.
_HOME = "${EDGEEXIT_HOME:-$HOME/.local/share/edgeexit}"
_PROGRAM = "env/current/bin/edgeexit"
_MARK = "edgeexit-home:"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command on the board ended: its exit code and what it wrote (err: the last 64 KiB)."""

    code: int
    out: bytes
    err: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """Content to upload: a file or bytes, with its SHA-256 and size in bytes."""

    content: Path | bytes
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """What an upload came to: bytes sent, and how many items the board already had."""

    sent_bytes: int
    skipped: int


@asynccontextmanager
async def connect(host: Host, *, timeout_s: float = 15.0) -> AsyncIterator["Link"]:
    """
    A link to *host* that is closed when the block ends.

    The host key is the one pinned in hosts.toml, else one of the user's known_hosts; DeviceError
    says what to do about any other, and about every reason why there is no link.
    """
    async with opened(host, timeout_s=timeout_s) as connection:
        yield Link(host, connection)


class Link:
    """
    An open link to *host*. Every method raises LinkLost when the link ends in the middle.

    *version* is the board's edgeexit, known once `agent` was called.
    """

    def __init__(self, host: Host, connection: asyncssh.SSHClientConnection) -> None:
        self.host = host
        self.version: str | None = None
        self._connection = connection
        self._home: str | None = None

    @property
    def user(self) -> str:
        """Who we are on the board."""
        return str(self._connection.get_extra_info("username"))

    async def home(self) -> str:
        """The absolute path of edgeexit's folder on the board, which need not exist yet."""
        if self._home is None:
            # The mark tells the answer from what a login shell prints by itself.
            done = await self.run(["sh", "-c", f'printf "\\n{_MARK}%s\\n" "{_HOME}"'])
            lines = done.out.decode(errors="replace").splitlines()
            found = [line.removeprefix(_MARK) for line in lines if line.startswith(f"{_MARK}/")]
            if done.code != 0 or not found:
                raise DeviceError(
                    f"{self.host.name}: no home folder found ({last_line(done.err)})",
                    hint=f"can {self.user} log in there and run sh? EDGEEXIT_HOME must be absolute",
                )
            self._home = posixpath.normpath(found[-1])
        return self._home

    async def program(self) -> str | None:
        """The absolute path of edgeexit on the board, None if it is not installed there."""
        path = f"{await self.home()}/{_PROGRAM}"
        return path if (await self.run(["test", "-x", path])).code == 0 else None

    def absent(self) -> DeviceError:
        """What to say where there is no program."""
        return DeviceError(
            f"{self.host.name}: edgeexit is not installed there",
            hint=f"edgeexit setup {self.host.name}",
        )

    def talk(self, argv: Sequence[str], doing: str) -> AbstractAsyncContextManager[Talk]:
        """`async with` a Talk to the process *argv* on the board."""
        return talk(self.host, self._connection, argv, doing)

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0
    ) -> Done:
        """
        Run *argv* on the board, *stdin* given to it; any exit code is an answer.

        DeviceError if it takes longer than *timeout_s* or writes more than 64 MiB.
        """
        doing = argv[0]
        try:
            async with asyncio.timeout(timeout_s), self.talk(argv, doing) as process:
                sending = asyncio.create_task(self._give(process, stdin))
                try:
                    out = await process.rest(MAX_OUT_BYTES)
                    code, err = await process.ended()
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        except TimeoutError:
            raise DeviceError(
                f"{self.host.name}: {doing}: not done within {timeout_s:g} s"
            ) from None
        return Done(code=code, out=out, err=err)

    @staticmethod
    async def _give(process: Talk, stdin: bytes) -> None:
        await process.say(stdin)
        process.hush()

    async def agent(
        self,
        sub: str,
        order: Mapping[str, Any],
        *,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_need: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> dict[str, Any]:
        """
        The result of `edgeexit agent SUB` on the board, which works only while we listen.

        When the board needs something in between, *on_need* brings it (it may upload and fetch
        over this link) and its answer goes back as one line. A refusal of the board is raised as
        the error of its exit code, "HOST: message".
        """
        program = f'exec "{_HOME}/{_PROGRAM}" "$@"'
        argv = ["sh", "-c", program, "edgeexit", "agent", sub]
        process: Talk
        async with self.talk(argv, f"agent {sub}") as process:
            await process.say(order)
            head = await process.greeting("agent")
            if head is None:
                raise await self._silent(process)
            self._greeted(process, head)
            while (said := await process.hear()) is not None:
                if "result" in said:
                    return self._part(said, "result")
                if "error" in said:
                    raise self._refused(self._part(said, "error"))
                if "progress" in said and on_progress is not None:
                    on_progress(self._part(said, "progress"))
                if "need" in said:
                    if on_need is None:
                        raise DeviceError(f"{process.place}: asks for what nobody brings")
                    await process.say(await on_need(self._part(said, "need")))
            raise await self._silent(process)

    def _greeted(self, process: Talk, head: Table) -> None:
        spoken, self.version = head.values["agent"], str(head.values.get("edgeexit"))[:40]
        if spoken != PROTOCOL:
            import edgeexit

            raise DeviceError(
                f"{process.place}: edgeexit {printable(self.version)} there speaks protocol "
                f"{printable(repr(spoken)[:20])}, edgeexit {edgeexit.__version__} here {PROTOCOL}",
                hint=f"edgeexit setup {self.host.name} puts this version there; "
                "or upgrade edgeexit here",
            )

    def _part(self, said: Table, key: str) -> dict[str, Any]:
        with understood(self.host):
            return said.get(key, dict)

    async def _silent(self, process: Talk) -> DeviceError:
        code, err = await process.ended()
        if code in (126, 127):
            return self.absent()
        return DeviceError(
            f"{process.place}: ended with code {code} and without an answer: {last_line(err)}",
            hint=f"edgeexit doctor --host {self.host.name}",
        )

    def _refused(self, said: Mapping[str, Any]) -> EdgeExitError:
        message, hint, code = (said.get(key) for key in ("message", "hint", "exit_code"))
        if not isinstance(message, str) or not isinstance(hint, str | None):
            message, hint = f"refuses without a reason: {str(said)[:80]}", None
        return kind_of(code)(f"{self.host.name}: {printable(message[:2000])}", hint=hint)

    async def upload(
        self, files: Sequence[Item], *, on_bytes: Callable[[int], None] | None = None
    ) -> Uploaded:
        """
        Put *files* into HOME/blobs, each under its SHA-256; what is there is not sent again.

        *on_bytes* is called with the bytes that just arrived or were there already. An upload
        that broke goes on where it was. StorageError if the board cannot take it, BadFile if a
        file is not what its digest says.
        """
        from edgeexit.remote.upload import upload

        return await upload(self, files, on_bytes or (lambda count: None))

    async def fetch(self, remote_path: str, *, limit_bytes: int) -> bytes:
        """The bytes of the file *remote_path* of the board; BadFile if there are more."""
        doing = f"fetch {remote_path}"
        found = bytearray()
        async with self.sftp(doing) as sftp, sftp.open(remote_path, "rb", block_size=0) as file:
            while data := await file.read(_READ_BYTES, len(found)):
                assert isinstance(data, bytes)
                found += data
                if len(found) > limit_bytes:
                    place = f"{self.host.name}: {remote_path}"
                    raise BadFile(f"{place}: more than {limit_bytes} bytes")
        return bytes(found)

    @asynccontextmanager
    async def sftp(self, doing: str) -> AsyncIterator[asyncssh.SFTPClient]:
        """A client of the board's sftp server, with errors of ours."""
        with translated(self.host, self._connection, doing):
            try:
                client = await self._connection.start_sftp_client()
            except (asyncssh.ChannelOpenError, asyncssh.SFTPError) as error:
                if isinstance(error, asyncssh.SFTPBadMessage) or self._connection.is_closed():
                    raise
                raise DeviceError(
                    f"{self.host.name}: {doing}: no sftp there ({printable(error.reason)})",
                    hint="Subsystem sftp internal-sftp in its /etc/ssh/sshd_config",
                ) from error
            async with client:
                yield client
