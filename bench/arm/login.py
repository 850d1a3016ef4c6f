"""
How one gets onto a board that is not there: its accounts, throw-away keys, what a client needs.

Callers see Login, accounts, keygen and must. An unprivileged user, who has a key and no password.
"""

import base64
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from root import CannotBuild

USER, USER_ID = "pi", 1000


@dataclass(frozen=True, kw_only=True)
class Login:
    """
    How to get onto a board: what hosts.toml and an ssh client ask for.

    *host_key* is "ssh-ed25519 AAAA...", *config* an ssh_config that holds the same for every
    address. *files* is the board's file system as this machine sees it, for tests to look at what
    a command left (None: it cannot be seen from here); *log* is what sshd says.
    """

    address: str
    port: int
    user: str
    key: Path
    host_key: str
    config: Path
    files: Path | None
    log: Path

    @property
    def fingerprint(self) -> str:
        """The host key's "SHA256:...", as ssh-keygen and `edgeexit hosts add` show it."""
        digest = hashlib.sha256(base64.b64decode(self.host_key.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @classmethod
    def on_loopback(cls, port: int, keys: Path, *, files: Path | None, log: Path) -> "Login":
        """Into the server at *port*, by the pairs "host" and "client" that keygen put in *keys*."""
        host_key = " ".join((keys / "host.pub").read_text().split()[:2])
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
        config = keys / "config"
        config.write_text(
            f"Host *\n  IdentityFile {keys / 'client'}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {keys / 'known_hosts'}\n  User {USER}\n  BatchMode yes\n"
        )
        return cls(
            address="127.0.0.1",
            port=port,
            user=USER,
            key=keys / "client",
            host_key=host_key,
            config=config,
            files=files,
            log=log,
        )


def keygen(path: Path) -> None:
    """A pair of keys at *path* and *path*.pub, if there is none. CannotBuild."""
    if not path.exists():
        must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path))


def accounts() -> dict[str, str]:
    """passwd, group and shadow of a board with one user, for its sshd and for itself."""
    users = (
        ("root", 0, 0, "/root", "/bin/sh"),
        (USER, USER_ID, USER_ID, f"/home/{USER}", "/bin/sh"),
        ("sshd", 100, 65534, "/run/sshd", "/usr/sbin/nologin"),
        ("nobody", 65534, 65534, "/", "/usr/sbin/nologin"),
    )
    return {
        "passwd": "".join(f"{n}:x:{u}:{g}::{h}:{s}\n" for n, u, g, h, s in users),
        "group": f"root:x:0:\n{USER}:x:{USER_ID}:\nnogroup:x:65534:\n",
        # No password: "*" lets keys in, which "!" would not.
        "shadow": "".join(f"{n}:*:19000::::::\n" for n, *_ in users),
    }


def must(*argv: str) -> None:
    """Run *argv*; CannotBuild if it is missing or fails."""
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotBuild(f"{error.filename} is missing") from error
    if done.returncode:
        raise CannotBuild(f"{argv[0]}: {done.stderr.strip()}")
