"""
What it means when a link that stood fails: asyncssh's exceptions after the login become ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncssh

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, StorageError, printable
from edgeexit.remote.hosts import Host

_SHOWN = 200


class LinkLost(DeviceError):
    """The link to a board ended before the work did; what the board has stays there."""


def told(error: Exception) -> str:
    """What *error* says, fit to be shown."""
    text = getattr(error, "reason", None) or str(error) or type(error).__name__
    return printable(" ".join(str(text).split())[:_SHOWN])


@contextmanager
def understood(host: Host) -> Iterator[None]:
    """A board that answers something else than it was asked is no bad file."""
    try:
        yield
    except BadFile as error:
        raise DeviceError(
            f"{error} in the board's answer", hint=f"edgeexit setup {host.name}"
        ) from error


@contextmanager
def translated(host: Host, connection: asyncssh.SSHClientConnection, doing: str) -> Iterator[None]:
    """Turn what asyncssh raises while *doing* something over *connection* into our errors."""
    try:
        yield
    except (asyncssh.Error, OSError) as error:
        place = f"{host.name}: {doing}"
        for kinds, refusal, fact, hint in _BROKEN:
            if isinstance(error, kinds) and not connection.is_closed():
                raise refusal(f"{place}: {fact or told(error)}", hint=hint) from error
        raise lost(host, doing, error) from error


def lost(host: Host, doing: str, error: Exception | None = None) -> LinkLost:
    """The error for a link that broke while *doing* something."""
    reason = f" ({told(error)})" if error is not None else ""
    return LinkLost(
        f"{host.name}: {doing}: the link broke{reason}",
        hint="run the same command again: it goes on where it was",
    )


_FULL = "free some space on the board"
_BROKEN: tuple[tuple[Any, type[EdgeExitError], str, str | None], ...] = (
    (
        (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded),
        StorageError,
        "no space left on the board",
        _FULL,
    ),
    (asyncssh.SFTPWriteProtect, StorageError, "the board's file system is read-only", None),
    (asyncssh.SFTPPermissionDenied, StorageError, "permission denied on the board", None),
    ((asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath), DeviceError, "no such file there", None),
    (
        asyncssh.SFTPBadMessage,
        DeviceError,
        "the answer is no sftp",
        "does ~/.bashrc or ~/.profile on the board print something? It must not without a terminal",
    ),
    ((asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost), LinkLost, "the link broke", None),
    (asyncssh.SFTPError, DeviceError, "", None),
    (
        asyncssh.ChannelOpenError,
        DeviceError,
        "the board opens no further session",
        "raise MaxSessions in its /etc/ssh/sshd_config",
    ),
)
