"""
A board that is not there: real ARM programs on a made-up Raspberry Pi, by qemu-user.

Callers see KINDS, Board and Login. A Board is the layers of root.py below files that such a board
would show (tests/trees.py), and the emulated processor that goes with them. There are two ways in:

- run: one ARM program among this machine's own files. Quick, but what it starts in turn would be
  this machine's programs, but for processes of edgeexit's own.
- login: a real sshd on the loopback whose users find themselves on the board, in name spaces of
  their own: the processes, the mounts and the network are the board's, which has only a
  loopback. An unprivileged user, throw-away keys. Needs root; everything ends with the block.

Times taken here mean nothing: a translator runs the program, and edgeexit says so.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from login import USER, USER_ID, Login, accounts, keygen, must
from root import SITE, CannotBuild, layers

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))
import trees  # noqa: E402

QEMU = "qemu-aarch64-static"
_FORMATS = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True)
class Kind:
    """A kind of board: its tree and the processor that qemu has for it."""

    tree: str
    cpu: str


KINDS = {
    "rpi3b+": Kind("rpi3b+", "cortex-a53"),
    "rpi4": Kind("rpi4", "cortex-a72"),
    "rpi5": Kind("rpi5", "cortex-a76"),
}


class Board:
    """
    One *kind* of board (a name in KINDS) whose own files lie in *folder*, which is made.

    With *ready* the wheels of the device side lie in SITE and Python finds them; without it the
    board has Python and nothing else. What a login writes stays in *folder*/disk.
    """

    def __init__(self, kind: str, folder: Path, *, ready: bool = True) -> None:
        self.kind, self.folder, self.ready = KINDS[kind], folder, ready
        self.layers = layers(ready=ready)
        self._shown = folder / "shown"
        machine = trees.tree(self._shown, self.kind.tree)
        self._dress(machine.path("commands"))

    def _dress(self, commands: Path) -> None:
        """Turn the tree's recorded command outputs into programs; add who may log in."""
        printed: dict[str, list[tuple[str, str]]] = {}
        for path in sorted(commands.iterdir()):
            program, _, arguments = unquote(path.name).partition(" ")
            printed.setdefault(program, []).append((arguments, path.read_text()))
        for program in set(printed) & {"vcgencmd"}:  # the others are there, and tell the truth
            cases = "".join(f"'{a}') cat <<'END'\n{t}END\n;;\n" for a, t in printed[program])
            other = "*) echo 'error=1 error_msg=\"Command not registered\"' ;;\n"
            self._write(f"usr/bin/{program}", f'#!/bin/sh\ncase "$*" in\n{cases}{other}esac\n')
            (self._shown / "usr/bin" / program).chmod(0o755)
        shutil.rmtree(commands)
        for name, text in accounts().items():
            self._write(f"etc/{name}", text)
        self._write("etc/hosts", "127.0.0.1 localhost\n")
        (self._shown / "tmp").mkdir()
        (self._shown / "tmp").chmod(0o1777)
        (self._shown / "home" / USER).mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(self._shown / "home" / USER, USER_ID, USER_ID)

    def _write(self, name: str, text: str) -> None:
        path = self._shown / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    # ------------------------------------------------------------ one program

    def command(self, *argv: str) -> list[str]:
        """What runs the ARM Python with *argv* here; the board's files go before this machine's."""
        seen = self.folder / "seen"
        if not seen.is_dir():
            seen.mkdir()
            for name in ("proc", "sys"):
                (seen / name).symlink_to(self._shown / name)
            for name in ("usr", "lib", "bin", "etc"):
                (seen / name).symlink_to(self.layers[-1] / name)
        python = self.layers[-1] / "usr" / "bin" / "python3.11"
        return [QEMU, "-L", str(seen), "-cpu", self.kind.cpu, str(python), *argv]

    def run(
        self, *argv: str, environment: Mapping[str, str] | None = None, timeout_s: float = 1800
    ) -> "subprocess.CompletedProcess[str]":
        """Run the ARM Python with *argv*; edgeexit is this checkout's. CannotBuild without qemu."""
        register()
        site = [str(layer / SITE) for layer in self.layers[:-1]]
        variables = {
            **{
                "PATH": os.environ["PATH"],
                "HOME": os.environ.get("HOME", "/"),
                "LC_ALL": "C.UTF-8",
            },
            **{"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *site]), "PYTHONNOUSERSITE": "1"},
            **{"PYTHONDONTWRITEBYTECODE": "1", "EDGEEXIT_HOME": str(self.folder / "home")},
            # For the processes that it starts of itself: the kernel finds qemu, and qemu these.
            **{"QEMU_LD_PREFIX": str(self.folder / "seen"), "QEMU_CPU": self.kind.cpu},
            **(environment or {}),
        }
        try:
            return subprocess.run(
                self.command(*argv),
                check=False,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                env=variables,
                timeout=timeout_s,
            )
        except FileNotFoundError as error:
            raise CannotBuild(
                f"{QEMU} is missing", hint="apt-get install qemu-user-static"
            ) from error

    # ------------------------------------------------------------ ssh

    @contextmanager
    def login(
        self, *, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Iterator[Login]:
        """
        Let an ssh server for this board stand on the loopback while the block runs.

        *settings* are lines for sshd's configuration before ours, *environment* variables that
        every session has.
        """
        register()
        files, keys = self.folder / "disk", self.folder / "keys"
        for path in (files, keys, self.folder / "overlay"):
            path.mkdir(exist_ok=True)
        for name in ("host", "client"):
            keygen(keys / name)
        variables = {
            "QEMU_CPU": self.kind.cpu,
            **({"PYTHONPATH": f"/{SITE}"} if self.ready else {}),
            **(environment or {}),
        }
        listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = listening.getsockname()[1]
        order = {
            "layers": [str(path) for path in (self._shown, *self.layers)],
            "files": str(files),
            "overlay": str(self.folder / "overlay"),
            "cpuinfo": str(self._shown / "proc/cpuinfo"),
            "device_tree": str(self._shown / "proc/device-tree"),
            "accounts": accounts(),
            "settings": [
                *settings,
                f"HostKey {keys / 'host'}",
                "SetEnv " + " ".join(f"{key}={value}" for key, value in variables.items()),
            ],
            "client": (keys / "client.pub").read_text(),
            "listening": listening.fileno(),
        }
        log = self.folder / "sshd.log"
        with log.open("a") as said:
            inside = subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=SIGKILL"),
                    *("--propagation", "private", sys.executable, str(HERE / "inside.py")),
                    json.dumps(order),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                pass_fds=[listening.fileno()],
            )
        listening.close()
        try:
            assert inside.stdout is not None
            if inside.stdout.readline() != b"ready\n":
                inside.wait()
                raise CannotBuild(f"no board: {' | '.join(log.read_text().splitlines()[-3:])}")
            yield Login.on_loopback(port, keys, files=files, log=log)
        finally:
            inside.kill()
            inside.wait()
            inside.stdout.close()


def register() -> None:
    """Let this machine's kernel start ARM programs; nothing to do if it can. CannotBuild."""
    name = "qemu-aarch64"
    if not (_FORMATS / "register").exists():
        must("mount", "-t", "binfmt_misc", "binfmt_misc", str(_FORMATS))
    if (_FORMATS / name).exists():
        return
    recipe = Path(f"/usr/lib/binfmt.d/{name}.conf")
    try:
        (_FORMATS / "register").write_text(recipe.read_text())
    except FileExistsError:  # another process was quicker
        return
    except OSError as error:
        raise CannotBuild(
            f"the kernel cannot be told to start ARM programs: {error}",
            hint="as root: apt-get install qemu-user-static",
        ) from error


def main() -> None:
    """`python bench/arm/board.py KIND [bare]`: stand until ended, and say how to log in."""
    import signal
    import tempfile

    # In the background a shell lets SIGINT be ignored; a board must not outlive SIGTERM either.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    kind = sys.argv[1]
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        board = Board(kind, Path(folder), ready="bare" not in sys.argv[2:])
        with board.login() as login:
            where = f"{login.user}@{login.address}"
            print(f"ssh -F {login.config} -p {login.port} {where}")
            print(f"edgeexit reaches it with its key in your agent: ssh-add {login.key}")
            print(f"edgeexit hosts add {kind} {where}:{login.port} --device {kind}")
            print(f"its host key: {login.fingerprint}", flush=True)
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
