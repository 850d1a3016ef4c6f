"""
A connection to a board whose host key was checked, or the reason why there is none.

Callers see opened and offered_key. Hidden here: the user's and the system's ssh configuration,
known_hosts, agent and jump hosts (the key of each jump is checked, too); no key is ever trusted
silently, whatever the configuration says.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncssh

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, UsageError, printable
from edgeexit.remote.broken import told
from edgeexit.remote.hosts import Host, fingerprint, parse_address

# Three unanswered questions five seconds apart: a link that says nothing for 15 s is dead.
_KEEPALIVE = {"keepalive_interval": 5, "keepalive_count_max": 3}
# A board needs neither our agent nor our screen, whatever the config says for other uses.
_PLAIN = {"agent_forwarding": False, "x11_forwarding": False, "request_pty": False}
_SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
# Asked for after the kinds of the known keys: a key of another kind is then seen and told.
_KINDS = (
    "ssh-ed25519",
    *(f"ecdsa-sha2-nistp{bits}" for bits in (256, 384, 521)),
    *("rsa-sha2-256", "rsa-sha2-512"),
)
_MAX_JUMPS = 8
_CLOSING_S = 3.0


class _Client(asyncssh.SSHClient):
    """Notes what the server shows and asks for: asyncssh's exceptions do not tell."""

    def __init__(self) -> None:
        self.shown: str | None = None
        self.known: list[str] = []
        self.asked: list[str] = []

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self.shown = public_text(key)
        return False

    def public_key_auth_requested(self) -> None:
        self.asked.append("publickey")

    def kbdint_auth_requested(self) -> None:
        self.asked.append("keyboard-interactive")

    def password_auth_requested(self) -> None:
        self.asked.append("password")


def public_text(key: asyncssh.SSHKey) -> str:
    """*key* as "ALGORITHM BASE64"."""
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


@asynccontextmanager
async def opened(
    host: Host, *, timeout_s: float = 15.0
) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """
    A connection to *host*, closed when the block ends.

    Its key is *host*.host_key or, without that, in a known_hosts file; DeviceError says what to
    do about any other key and every other reason why there is no connection.
    """
    logging.getLogger("asyncio").addFilter(_is_news)
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_s):
                attempt = await _prepared(host, stack)
                connection = await attempt.connected(stack)
        except TimeoutError:
            raise DeviceError(
                f"{host.name}: {host.address} gave no answer within {timeout_s:g} s",
                hint="is the board on, and in the same network?",
            ) from None
        yield connection


def _is_news(record: logging.LogRecord) -> bool:
    # asyncio's warning about a broken link, which we tell ourselves, once and as an error.
    return record.msg != "socket.send() raised exception."


@dataclass(frozen=True)
class Offered:
    """A server's host key, and the keys that known_hosts has for it, each "ALGORITHM BASE64"."""

    key: str
    known: tuple[str, ...]


async def offered_key(host: Host, *, timeout_s: float = 15.0) -> Offered:
    """The key that *host* shows, which nobody has trusted yet, beside what known_hosts has."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_s):
                # What is pinned is told by the caller: known_hosts is the other witness.
                attempt = await _prepared(replace(host, host_key=None), stack)
                return await attempt.offered()
        except TimeoutError:
            raise DeviceError(
                f"{host.name}: {host.address} gave no answer within {timeout_s:g} s",
                hint="is the board on, and in the same network?",
            ) from None


async def _prepared(
    host: Host,
    stack: AsyncExitStack,
    through: tuple[tuple[str, int | None], ...] = (),
    tunnel: asyncssh.SSHClientConnection | None = None,
) -> "_Attempt":
    """What is needed to connect to *host*: its jump hosts are connected and checked already."""
    options = await _resolved(host)
    hops = options.tunnel.split(",") if tunnel is None and isinstance(options.tunnel, str) else ()
    for hop in (text.strip() for text in hops):
        user, address, port = parse_address(hop.removeprefix("ssh://"))
        # "Host * / ProxyJump bastion" also matches the bastion, which is reached directly.
        if (address, port) in (*through, (host.address, host.port)):
            continue
        if len(through) >= _MAX_JUMPS:
            raise UsageError(f"{host.name}: more than {_MAX_JUMPS} jump hosts in the ssh config")
        jump = Host(name=hop, address=address, user=user, port=port)
        attempt = await _prepared(jump, stack, (*through, (host.address, host.port)), tunnel)
        tunnel = await attempt.connected(stack)
    return _Attempt(host, options, tunnel, is_jump=bool(through))


async def _resolved(host: Host) -> asyncssh.SSHClientConnectionOptions:
    """What the ssh configuration says about *host*."""
    files = [Path("~/.ssh/config").expanduser(), _SYSTEM_CONFIG]
    wanted: dict[str, Any] = {"config": [str(path) for path in files if path.is_file()]}
    if host.user:
        wanted["username"] = host.user
    if host.port:
        wanted["port"] = host.port
    wanted |= {"host": host.address, **_KEEPALIVE, **_PLAIN}
    found: asyncssh.SSHClientConnectionOptions
    construct = asyncssh.SSHClientConnectionOptions.construct
    try:
        found = await construct(None, **wanted, client_keys=None)
        # Like OpenSSH, and unlike asyncssh: a key file that is not there is left out.
        names = found.config.get("IdentityFile", [])
        assert isinstance(names, list)
        there = [path for path in (Path(name).expanduser() for name in names) if path.is_file()]
        if there:
            wanted |= {"client_keys": there, "ignore_encrypted": True}
        elif names:
            wanted |= {"client_keys": []}
        found = await construct(None, **wanted)
    except (asyncssh.Error, OSError, ValueError) as error:
        # Unreadable lines and keys of the configuration; the texts hold no key material.
        raise BadFile(
            f"{host.name}: ssh configuration: {told(error)}",
            hint="ssh -G HOST shows what OpenSSH makes of ~/.ssh/config",
        ) from error
    return found


class _Attempt:
    """One try to connect, and what to say if it fails."""

    def __init__(
        self,
        host: Host,
        options: asyncssh.SSHClientConnectionOptions,
        tunnel: asyncssh.SSHClientConnection | None,
        is_jump: bool,
    ) -> None:
        self._host, self._options, self._tunnel = host, options, tunnel
        self._is_jump = is_jump
        self._client = _Client()

    async def connected(self, stack: AsyncExitStack) -> asyncssh.SSHClientConnection:
        """The checked connection, which *stack* will close."""
        with self._explained():
            first = self._first()
            connection, _ = await asyncssh.create_connection(
                lambda: self._client,
                self._host.address,
                options=self._options,
                tunnel=self._tunnel,
                known_hosts=self._trusted,
                **first,
            )
        stack.push_async_callback(_closed, connection)
        return connection

    async def offered(self) -> Offered:
        """The key that the server shows, unchecked; of the kind that known_hosts has, if any."""
        with self._explained():
            first = self._first()
            key = await asyncssh.get_server_host_key(
                self._host.address,
                self._options.port,
                options=self._options,
                tunnel=self._tunnel,
                **first,
            )
        assert key is not None
        return Offered(public_text(key), tuple(self._client.known))

    def _trusted(self, name: str, address: str, port: int | None) -> Any:
        """asyncssh asks: keys, authorities and revoked keys that are known for this server."""
        if self._host.host_key is not None:
            keys, authorities, revoked = [asyncssh.import_public_key(self._host.host_key)], [], []
        else:
            known = self._known_hosts().match(name, address, port)
            keys, authorities, revoked = (list(part) for part in known[:3])
        self._client.known = [public_text(key) for key in keys if key not in revoked]
        return keys, authorities, revoked

    def _first(self) -> dict[str, Any]:
        # The kind of key that is known comes first: the server has keys of several kinds.
        name = self._options.host_key_alias or self._options.host
        port = self._options.port
        keys, authorities, _ = self._trusted(name, "", port if port != 22 else None)
        if authorities or not keys:
            return {}
        kinds = [kind.decode() for key in keys for kind in key.sig_algorithms]
        return {"server_host_key_algs": list(dict.fromkeys([*kinds, *_KINDS]))}

    def _known_hosts(self) -> asyncssh.SSHKnownHosts:
        # `UserKnownHostsFile none` means to asyncssh "trust anybody": here it means no file.
        names = self._options.config.get("UserKnownHostsFile", ["~/.ssh/known_hosts"])
        assert isinstance(names, list)
        files = [*(Path(name).expanduser() for name in names), _SYSTEM_KNOWN_HOSTS]
        try:
            text = "\n".join(path.read_text() for path in files if path.is_file())
            return asyncssh.import_known_hosts(text)
        except (OSError, ValueError) as error:
            raise BadFile(f"{self._host.name}: known_hosts: {told(error)}") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise
        except (OSError, asyncssh.Error) as error:
            raise self._refusal(error) from error
        except ValueError as error:
            raise DeviceError(f"{self._host.name}: {told(error)}") from error

    def _refusal(self, error: Exception) -> EdgeExitError:
        host = self._host
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return self._untrusted(error)
        if isinstance(error, asyncssh.PermissionDenied):
            return self._locked_out()
        for kind, fact, hint in _REASONS:
            if isinstance(error, kind):
                address = self._options.host
                place = f"{f'[{address}]' if ':' in address else address}:{self._options.port}"
                detail = f" ({told(error)})" if kind in (OSError, asyncssh.Error) else ""
                return DeviceError(f"{host.name}: {place} {fact}{detail}", hint=hint)
        raise error

    def _untrusted(self, error: Exception) -> DeviceError:
        host, shown, known = self._host, self._client.shown, self._client.known
        if shown is None:
            return DeviceError(f"{host.name}: {told(error)}", hint="ask who runs it for its key")
        if known:
            source = "hosts.toml" if host.host_key else "known_hosts"
            hint = (
                f"edgeexit hosts add {host.name}"
                if host.host_key
                else f"ssh-keygen -R {self._known_name()}"
            )
            return DeviceError(
                f"{host.name}: its host key has changed: it shows {_described(shown)}, "
                f"{source} has {', '.join(map(_described, known))}",
                hint="either somebody sits between you and the board, or it was installed anew; "
                f"if you are sure of the latter: {hint}",
            )
        hint = f"edgeexit hosts add {host.name}"
        if self._is_jump:
            hint = f"ssh {host.destination} shows its key and asks"
        elif "@" in host.name:
            hint = f"edgeexit hosts add NAME {host.name}"
        return DeviceError(f"{host.name}: its host key {_described(shown)} is not known", hint=hint)

    def _known_name(self) -> str:
        name = self._options.host_key_alias or self._options.host
        port = self._options.port
        return name if port == 22 else f"'[{name}]:{port}'"

    def _locked_out(self) -> DeviceError:
        host, asked = self._host, self._client.asked
        ways = ", ".join(dict.fromkeys(asked)) or "no way that we know"
        message = f"{host.name}: user {printable(self._options.username)} is not let in"
        copy = f"ssh-copy-id {host.destination}"
        locked = _locked_keys(self._options)
        if locked:
            hint = f"ssh-add {locked[0]} (a passphrase locks it), and if that was not it: {copy}"
        elif not self._options.client_keys and not self._options.agent_path:
            hint = f"you have no key yet: ssh-keygen -t ed25519, then {copy}"
        elif {"password", "keyboard-interactive"} & set(asked):
            hint = copy
        else:
            hint = "have your public key added to ~/.ssh/authorized_keys on the board"
        return DeviceError(f"{message} by key; it takes: {ways}", hint=hint)


# The first that fits; those that stand for many things say more.
_REASONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (
        socket.gaierror,
        "is no name that this machine knows",
        "check the spelling; NAME.local needs mDNS (avahi) at both ends; or use an IP address",
    ),
    (
        ConnectionRefusedError,
        "refused the connection",
        "is the port right, and sshd running there? On the board: sudo systemctl enable --now ssh",
    ),
    (
        asyncssh.ChannelOpenError,
        "cannot be reached from the jump host",
        "is the board on, and does the jump host allow forwarding?",
    ),
    (
        asyncssh.KeyExchangeFailed,
        "has no algorithm in common with this machine",
        "update the ssh server there",
    ),
    (
        (asyncssh.ConnectionLost, ConnectionResetError, BrokenPipeError),
        "closed the connection before the login",
        "is it an ssh server? If many log in at once, raise MaxStartups in its sshd_config",
    ),
    (
        asyncssh.Error,
        "does not speak ssh as it should",
        "is it the right port?",
    ),
    (OSError, "cannot be reached", "is the board on, and in the same network?"),
)


def _described(key: str) -> str:
    return f"{fingerprint(key)} ({key.partition(' ')[0]})"


def _locked_keys(options: asyncssh.SSHClientConnectionOptions) -> list[str]:
    """The private key files that could not be used because a passphrase locks them."""
    named = options.config.get("IdentityFile") or [
        f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")
    ]
    assert isinstance(named, list)
    locked = []
    for name in named:
        try:
            asyncssh.read_private_key(Path(name).expanduser())
        except asyncssh.KeyImportError as error:
            if "assphrase" in str(error):
                locked.append(str(name))
        except (OSError, ValueError):
            pass
    return locked


async def _closed(connection: asyncssh.SSHClientConnection) -> None:
    connection.close()
    try:
        async with asyncio.timeout(_CLOSING_S):
            await connection.wait_closed()
    except (TimeoutError, OSError, asyncssh.Error):
        connection.abort()
