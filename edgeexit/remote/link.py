"""
A link to one board: run something there, ask our own command line there, move files.

Callers see connect, Link and LinkLost. Hidden here: the login shell and what it prints, the JSON
lines of `edgeexit agent` and their limits, and that closing the link ends the work over there.
"""

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, StorageError, printable
from edgeexit.files import Table, parse_json
from edgeexit.remote.hosts import Host
from edgeexit.remote.login import LinkLost, opened

__all__ = ["Done", "Item", "Link", "LinkLost", "Uploaded", "connect"]

PROTOCOL = 1
MAX_LINE_BYTES = 64 << 20
MAX_BANNER_BYTES = 64 << 10
MAX_ERR_BYTES = 64 << 10
_ENDING_S = 3.0
_AGAIN = "run the same command again: it goes on where it was"

# Whatever the login shell, HOME is found by a POSIX one.
_HOME = "${EDGEEXIT_HOME:-$HOME/.local/share/edgeexit}"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command on the board ended: its exit code, what it wrote (err: at most 64 KiB)."""

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

    async def home(self) -> str:
        """The absolute path of edgeexit's folder on the board, which need not exist yet."""
        if self._home is None:
            # The mark tells the answer from what a login shell prints by itself.
            done = await self.run(["sh", "-c", f'printf "\\nedgeexit-home:%s\\n" "{_HOME}"'])
            found = [
                line.removeprefix(b"edgeexit-home:").decode()
                for line in done.out.splitlines()
                if line.startswith(b"edgeexit-home:/")
            ]
            if done.code != 0 or not found:
                raise DeviceError(f"{self.host.name}: no POSIX shell: {_last(done.err)}")
            self._home = found[-1]
        return self._home

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0
    ) -> Done:
        """Run *argv* on the board, *stdin* given to it; any exit code is an answer."""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._connection.run(shlex.join(argv), input=stdin, encoding=None)
        except TimeoutError:
            raise DeviceError(f"{self.host.name}: {argv[0]}: not done in {timeout_s:g} s") from None
        except (OSError, asyncssh.Error) as error:
            raise self._lost(error) from error
        out, err = bytes(found.stdout or b""), bytes(found.stderr or b"")  # type: ignore[arg-type]
        if found.returncode is None:
            raise self._lost(None)
        return Done(
            code=found.returncode, out=out, err=err[-MAX_ERR_BYTES:].decode(errors="replace")
        )

    async def agent(
        self,
        sub: str,
        order: Mapping[str, Any],
        *,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """
        The result of `edgeexit agent SUB` on the board, which works only while we listen.

        A refusal of the board is raised as the error of its exit code, "HOST: message".
        """
        command = ["sh", "-c", f'exec "{_HOME}/env/current/bin/edgeexit" "$@"']
        text = shlex.join([*command, "edgeexit", "agent", sub])
        process: Any = await self._connection.create_process(text, encoding=None)
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            async for line in process.stdout:
                if not line.startswith(b"{"):
                    continue
                said = parse_json(line, f"{self.host.name}: agent {sub}")
                if "progress" in said and on_progress is not None:
                    on_progress(said.get("progress", dict))
                elif "result" in said:
                    return said.get("result", dict)
                elif "error" in said:
                    raise self._refused(said.table("error"))
                elif "agent" in said:
                    self.version = said.get("edgeexit", str)
            raise DeviceError(f"{self.host.name}: agent {sub} ended without an answer")
        finally:
            process.stdin.write_eof()
            process.terminate()
            process.close()

    def _refused(self, said: Table) -> EdgeExitError:
        code = said.get("exit_code", int)
        kinds = {kind.exit_code: kind for kind in EdgeExitError.__subclasses__()}
        message = f"{self.host.name}: {printable(said.get('message', str))}"
        return kinds.get(code, DeviceError)(message, hint=said.values.get("hint"))

    async def upload(
        self, files: Sequence[Item], *, on_bytes: Callable[[int], None] | None = None
    ) -> Uploaded:
        """
        Put *files* into HOME/blobs, each under its SHA-256; what is there is not sent again.

        *on_bytes* is called with the bytes that just arrived (skipped ones count at once).
        """
        from edgeexit.remote.upload import upload

        return await upload(self, files, on_bytes or (lambda count: None))

    async def fetch(self, remote_path: str, *, limit_bytes: int) -> bytes:
        """The bytes of the file *remote_path* of the board; BadFile if there are more."""
        async with self.sftp() as sftp:
            size = (await sftp.stat(remote_path)).size or 0
            if size > limit_bytes:
                raise BadFile(f"{self.host.name}: {remote_path}: more than {limit_bytes} bytes")
            async with sftp.open(remote_path, "rb") as file:
                return bytes(await file.read())  # type: ignore[arg-type]

    async def remove(self, remote_path: str) -> None:
        """Remove the file or folder *remote_path*, which must lie in edgeexit's folder."""
        home = await self.home()
        if not remote_path.startswith(f"{home}/") or "/../" in f"{remote_path}/":
            raise DeviceError(f"{self.host.name}: {remote_path}: is not in {home}")
        done = await self.run(["rm", "-rf", "--", remote_path])
        if done.code != 0:
            raise StorageError(f"{self.host.name}: {remote_path}: {_last(done.err)}")

    @asynccontextmanager
    async def sftp(self) -> AsyncIterator[asyncssh.SFTPClient]:
        """A client of the board's sftp server; its failures become ours."""
        try:
            async with self._connection.start_sftp_client() as client:
                yield client
        except asyncssh.SFTPError as error:
            raise DeviceError(f"{self.host.name}: sftp: {printable(error.reason)}") from error
        except (OSError, asyncssh.Error) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception | None) -> EdgeExitError:
        reason = f": {printable(str(error))}" if error else ""
        return LinkLost(f"{self.host.name}: the link broke{reason}", hint=_AGAIN)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1][:300]) if lines else "it says nothing"
