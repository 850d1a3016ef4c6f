"""
Real OpenSSH servers on loopback, each with keys, folders and settings of its own.

A board is an sshd of the current user. Where that is root, signals are not passed on by sshd and
permissions do not hold: `Board(user="nobody")` logs in as an unprivileged user then.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
HAS_SSHD = Path(SSHD).exists() and shutil.which("ssh-keygen") is not None


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair at *path* and *path*.pub."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "a test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def public(key: Path) -> str:
    """The public half of *key* as "ALGORITHM BASE64"."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@dataclass
class Board:
    """An sshd on 127.0.0.1:*port*; *home* is HOME and *folder*/board EDGEEXIT_HOME there."""

    folder: Path
    client_key: Path
    port: int = field(default_factory=free_port)
    host_keys: tuple[Path, ...] = ()
    settings: tuple[str, ...] = ()
    sftp: str | None = "internal-sftp"
    process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return self.folder / "board"

    @property
    def key(self) -> str:
        return public(self.host_keys[0])

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    def start(self) -> "Board":
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.host_keys:
            self.host_keys = (make_key(self.folder / "host_key"),)
        accepted = self.folder / "authorized_keys"
        if not accepted.exists():
            accepted.write_text(public(self.client_key) + "\n")
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            *(f"HostKey {key}" for key in self.host_keys),
            f"AuthorizedKeysFile {accepted}",
            f"PidFile {self.folder / 'sshd.pid'}",
            f"SetEnv EDGEEXIT_HOME={self.home}",
            "StrictModes no",
            "UsePAM no",
            "MaxStartups 200",
            "MaxSessions 64",
            "LogLevel VERBOSE",
            *([f"Subsystem sftp {self.sftp}"] if self.sftp else []),
            *self.settings,
        ]
        if not any("PasswordAuthentication" in line for line in self.settings):
            lines += ["PasswordAuthentication no", "KbdInteractiveAuthentication no"]
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + 10
        while not _answers(self.port):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        """End the server and with it every connection (its children share a session)."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of our own with a key in ~/.ssh, no agent and no system ssh config."""
    home = tmp_path / "laptop"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    make_key(home / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("EDGEEXIT_HOSTS", raising=False)
    return home


@pytest.fixture
def boards(laptop: Path, tmp_path: Path) -> Iterator[Callable[..., Board]]:
    """Make started boards that let the laptop's key in; they end with the test."""
    if not HAS_SSHD:
        pytest.skip("needs sshd and ssh-keygen (apt install openssh-server)")
    made: list[Board] = []

    def make(**options: object) -> Board:
        folder = tmp_path / f"board{len(made)}"
        values = {"client_key": laptop / ".ssh" / "id_ed25519", **options}
        made.append(Board(folder=folder, **values).start())  # type: ignore[arg-type]
        return made[-1]

    yield make
    for board in made:
        board.stop()
