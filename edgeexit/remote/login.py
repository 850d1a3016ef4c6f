"""
A connection to a board whose host key was checked, or the reason why there is none.

Callers see opened and offered_key. Hidden here: the user's and the system's ssh configuration,
known_hosts, agent and jump hosts (each jump is checked, too); no key is ever trusted silently.
asyncssh's exceptions become ours here and nowhere else.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh

from edgeexit.errors import DeviceError, EdgeExitError, printable
from edgeexit.remote.hosts import Host

# Three unanswered questions five seconds apart: a link that says nothing for 15 s is dead.
KEEPALIVE = {"keepalive_interval": 5, "keepalive_count_max": 3}
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
MAX_JUMPS = 8
_CLOSING_S = 3.0


class LinkLost(DeviceError):
    """The link to a board ended before the work did; what the board has stays there."""


class _Client(asyncssh.SSHClient):
    """What the server said that asyncssh's exceptions do not tell."""

    def __init__(self) -> None:
        self.shown: str | None = None
        self.asked: set[str] = set()

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self.shown = public_text(key)
        return False

    def public_key_auth_requested(self) -> None:
        self.asked.add("publickey")

    def password_auth_requested(self) -> None:
        self.asked.add("password")

    def kbdint_auth_requested(self) -> None:
        self.asked.add("keyboard-interactive")


def public_text(key: asyncssh.SSHKey) -> str:
    """*key* as "ALGORITHM BASE64"."""
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


def _config_files() -> list[str]:
    files = [Path("~/.ssh/config").expanduser(), SYSTEM_CONFIG]
    return [str(path) for path in files if path.is_file()]


async def _options(host: Host) -> asyncssh.SSHClientConnectionOptions:
    wanted: dict[str, Any] = {"host": host.address, "config": _config_files(), **KEEPALIVE}
    if host.user:
        wanted["username"] = host.user
    if host.port:
        wanted["port"] = host.port
    # A board needs neither our agent nor our screen, whatever the config says for other uses.
    wanted |= {"agent_forwarding": False, "x11_forwarding": False, "request_pty": False}
    found: asyncssh.SSHClientConnectionOptions
    found = await asyncssh.SSHClientConnectionOptions.construct(None, **wanted)
    return found


@asynccontextmanager
async def opened(
    host: Host, *, timeout_s: float = 15.0
) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """A checked connection to *host*; DeviceError with the reason if there is none."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_s):
                connection = await _connected(host, stack)
        except TimeoutError:
            raise DeviceError(f"{host.name}: no answer within {timeout_s:g} s") from None
        yield connection


async def _connected(host: Host, stack: AsyncExitStack) -> asyncssh.SSHClientConnection:
    client = _Client()
    options = await _options(host)
    known: Any = ()
    if host.host_key is not None:
        known = ([asyncssh.import_public_key(host.host_key)], [], [])
    try:
        connection, _ = await asyncssh.create_connection(
            lambda: client, host.address, options.port, options=options, known_hosts=known
        )
    except (OSError, asyncssh.Error) as error:
        raise _refusal(host, client, error) from error
    stack.push_async_callback(_closed, connection)
    return connection


async def _closed(connection: asyncssh.SSHClientConnection) -> None:
    connection.close()
    try:
        async with asyncio.timeout(_CLOSING_S):
            await connection.wait_closed()
    except (TimeoutError, OSError, asyncssh.Error):
        connection.abort()


def _refusal(host: Host, client: _Client, error: Exception) -> EdgeExitError:
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return DeviceError(
            f"{host.name}: its host key is not known", hint=f"edgeexit hosts add {host.name}"
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return DeviceError(
            f"{host.name}: lets us in with none of our keys", hint=f"ssh-copy-id {host.destination}"
        )
    return DeviceError(f"{host.name}: {printable(str(error))}")


async def offered_key(host: Host, *, timeout_s: float = 15.0) -> str:
    """The key "ALGORITHM BASE64" that *host* shows, not yet trusted."""
    options = await _options(host)
    try:
        async with asyncio.timeout(timeout_s):
            key = await asyncssh.get_server_host_key(host.address, options.port, options=options)
    except (OSError, asyncssh.Error) as error:
        raise _refusal(host, _Client(), error) from error
    assert key is not None
    return public_text(key)
