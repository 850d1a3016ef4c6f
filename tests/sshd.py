"""
Real OpenSSH servers on loopback, each with keys, folders and settings of its own.

A board runs sshd as the current user and lets that user in. As root, `user="pi"` makes an
ordinary user of that name, who exists for this server alone (a private /etc/passwd): signals
reach its processes, permissions hold, and its home folder takes a .bashrc.
"""

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgeexit.remote.hosts import Host

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
HAS_SSHD = Path(SSHD).exists() and shutil.which("ssh-keygen") is not None
_UID = 23456


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair at *path* and *path*.pub."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "a test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def public(key: Path) -> str:
    """The public half of *key* as "ALGORITHM BASE64"."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection gets as its own."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@dataclass
class Board:
    """
    An sshd on 127.0.0.1:*port* that lets *client_key* in.

    *home* is EDGEEXIT_HOME there; *settings* are further lines of sshd_config, before the others.
    """

    folder: Path
    client_key: Path
    user: str = field(default_factory=getpass.getuser)
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

    def host(self, **changes: object) -> Host:
        """This board as a Host, its key pinned."""
        known = {"user": self.user, "port": self.port, "host_key": self.key}
        values = {"name": "pi", "address": "127.0.0.1", **known, **changes}
        return Host(**values)  # type: ignore[arg-type]

    def program(self, text: str) -> None:
        """Make the shell script *text* what is called as the board's edgeexit."""
        path = self.home / "env" / "current" / "bin" / "edgeexit"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def start(self) -> "Board":
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.host_keys:
            self.host_keys = (make_key(self.folder / "host_key"),)
        accepted = self.folder / "authorized_keys"
        if not accepted.exists():
            accepted.write_text(public(self.client_key) + "\n")
        # A shell that takes itself for an inner one reads no .bashrc: this machine's may be slow.
        quick = " SHLVL=5" if self.user == getpass.getuser() else ""
        lines = [
            *self.settings,
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            *(f"HostKey {key}" for key in self.host_keys),
            f"AuthorizedKeysFile {accepted}",
            f"PidFile {self.folder / 'sshd.pid'}",
            f"SetEnv EDGEEXIT_HOME={self.home}{quick}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "StrictModes no",
            "UsePAM no",
            "MaxStartups 200",
            "MaxSessions 64",
            "LogLevel VERBOSE",
            *([f"Subsystem sftp {self.sftp}"] if self.sftp else []),
        ]
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [SSHD, "-D", "-e", "-f", str(config)]
        if self.user != getpass.getuser():
            command = self._alone(command)
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + 10
        while not _answers(self.port):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        assert self.process.poll() is None, self.log
        return self

    def _alone(self, command: list[str]) -> list[str]:
        """*command* where our user exists, and owns the board's folder."""
        entry = f"{self.user}:*:{_UID}:{_UID}::{self.folder}:/bin/bash\n"
        (self.folder / "passwd").write_text(Path("/etc/passwd").read_text() + entry)
        os.chown(self.folder, _UID, _UID)
        steps = f'mount --bind {self.folder}/passwd /etc/passwd && exec "$@"'
        return ["unshare", "-m", "--propagation", "private", "sh", "-c", steps, "sh", *command]

    def stop(self) -> None:
        """End the server; open connections end with their clients."""
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
    monkeypatch.setattr("edgeexit.remote.login._SYSTEM_CONFIG", tmp_path / "none")
    monkeypatch.setattr("edgeexit.remote.login._SYSTEM_KNOWN_HOSTS", tmp_path / "none")
    return home


@pytest.fixture
def boards(laptop: Path, tmp_path: Path) -> Iterator[Callable[..., Board]]:
    """Make started boards that let the laptop's key in; they end with the test."""
    if not HAS_SSHD:
        pytest.skip("needs sshd and ssh-keygen (apt install openssh-server)")
    made: list[Board] = []
    # pytest's folders are closed to other users.
    shared = Path(tempfile.mkdtemp(prefix="edgeexit-boards-"))
    shared.chmod(0o755)

    def make(**options: object) -> Board:
        if options.get("user") is not None and os.geteuid() != 0:
            pytest.skip("needs root for another user")
        folder = shared / f"board{len(made)}"
        values = {"client_key": laptop / ".ssh" / "id_ed25519", **options}
        made.append(Board(folder=folder, **values).start())  # type: ignore[arg-type]
        return made[-1]

    yield make
    for board in made:
        board.stop()
    shutil.rmtree(shared)
