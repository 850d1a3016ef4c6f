"""
Tell the service manager how this process is: ready, alive, stopping. Nothing without one.

systemd names a datagram socket in NOTIFY_SOCKET and how long it stays patient in WATCHDOG_USEC.
Nobody calls alive() from a timer or a thread: it says that a frame was answered, or that the
source proved to have none.
"""

import contextlib
import os
import socket
import time


class Notifier:
    """
    The service manager's ear. All calls are quick, and none ever fails or waits.

    is_heard says whether somebody listens. The environment is cleared, so that no child speaks
    for this process.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]  # Linux' abstract names
        patience_us = os.environ.pop("WATCHDOG_USEC", "0")
        wanted = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        is_watched = patience_us.isdigit() and wanted == str(os.getpid())
        # More often than this is no better.
        self._period_s = int(patience_us) / 4e6 if is_watched else 0.0
        self._due_s = 0.0
        self.is_heard = self._address[:1] in ("/", "\0")

    def ready(self, status: str) -> None:
        """The release has passed its self-test; *status* is one line for people."""
        self._say(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """A frame was answered just now, or the source proved to be idle."""
        if self._period_s and time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + self._period_s
            self._say("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for people."""
        self._say(f"STATUS={text}")

    def stopping(self) -> None:
        """The end has begun."""
        self._say("STOPPING=1")

    def _say(self, text: str) -> None:
        if not self.is_heard:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as ear:
            ear.sendto(text.encode(errors="replace"), self._address)
