"""
The files and commands of a machine, read below a root that can be exchanged.

Callers see Machine and this_machine. Everything that edgeexit wants to know of a board (its
model, its sensors, what vcgencmd prints) goes through here, so that a tree recorded on a real
board can be replayed anywhere. What is absent, refuses or times out is None: "does not say".
In a tree the outputs of commands are files below commands/, named by command_file.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from edgeexit.errors import UsageError

ENVIRONMENT = "EDGEEXIT_SYSROOT"
COMMANDS = "commands"
_MOST_BYTES = 1 << 20


def command_file(argv: Sequence[str]) -> str:
    """Where a recorded tree keeps what *argv* printed, such as "commands/vcgencmd%20version"."""
    return f"{COMMANDS}/{quote(' '.join(argv), safe='')}"


class Machine:
    """
    One machine: the live one (root "/") or a recorded tree of files and command outputs.

    Paths are given without a leading slash ("proc/loadavg") and may hold any bytes of a device's
    file; texts are decoded leniently and cut at 1 MiB.
    """

    def __init__(self, root: Path | str = "/") -> None:
        self.root = Path(root)
        self.is_live = self.root == Path("/")

    def path(self, name: str) -> Path:
        """Where *name* lies, for those who keep it open."""
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder *name*."""
        try:
            return self.path(name).exists()
        except OSError:
            return False

    def data(self, name: str) -> bytes | None:
        """The bytes of the file *name*, cut at 1 MiB; None if it does not say."""
        try:
            with open(self.path(name), "rb", opener=_open_at_once) as file:
                return file.read(_MOST_BYTES)
        except (OSError, ValueError):
            return None

    def text(self, name: str) -> str | None:
        """The text of the file *name*, None if it does not say."""
        data = self.data(name)
        return None if data is None else data.decode(errors="replace")

    def line(self, name: str) -> str | None:
        """The stripped text of *name* (NULs too: device trees end with one), None if empty."""
        return (self.text(name) or "").strip("\0 \t\r\n") or None

    def number(self, name: str) -> float | None:
        """The number in the file *name*; None if there is none or it is not finite."""
        return finite(self.text(name))

    def glob(self, pattern: str) -> list[str]:
        """The names that match *pattern*, sorted so that hwmon10 follows hwmon9."""
        try:
            found = [str(path.relative_to(self.root)) for path in self.root.glob(pattern)]
        except OSError:
            return []
        return sorted(found, key=lambda name: (_natural(name), name))

    def run(self, argv: Sequence[str], timeout_s: float = 2.0) -> str | None:
        """What the command *argv* prints; None if it is absent, fails or takes too long."""
        if not self.is_live:
            return self.text(command_file(argv))
        try:
            # Looking is cheaper than a process that cannot start.
            if not argv or shutil.which(argv[0]) is None:
                return None
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _open_at_once(path: str, flags: int) -> int:
    # A pipe without a writer must not hold us up.
    return os.open(path, flags | os.O_NONBLOCK)


def this_machine() -> Machine:
    """
    The live machine, or the tree that the environment variable EDGEEXIT_SYSROOT names.

    UsageError if that is no folder: a machine that says nothing would look like a healthy one.
    """
    root = Path(os.environ.get(ENVIRONMENT) or "/")
    if not root.is_dir():
        raise UsageError(f"{ENVIRONMENT}: {root}: no such folder, expected a recorded tree")
    return Machine(root)


def finite(text: str | None) -> float | None:
    """The number that *text* spells; None if it spells none, or one beyond 1e15."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e15 else None


def _natural(name: str) -> list[tuple[int, str]]:
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in [*name, ""]:
        if char.isdigit() and char.isascii():
            digits += char
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, char))
    return parts
