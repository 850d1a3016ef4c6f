"""
What stands inside a board's name spaces: its file system, its loopback, and who answers ssh.

Started by board.py under `unshare --mount --net --pid --fork` with one argument, a JSON object.
The listening socket was opened outside and so is this machine's; whatever a session opens itself
has the board's network, where there is nothing but a loopback.
"""

import fcntl
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# In a mount name space of its own: whatever else lies there is out of sight, and only root may
# write to any folder above it, as ChrootDirectory asks.
_ABOVE = Path("/mnt")
ROOT = _ABOVE / "board"
# Where ARM programs look first. So there can be a /proc/device-tree: no kernel lets anybody
# add to its own /proc. But a listing of /proc is then that of this folder.
_LOOKED_IN_FIRST = ROOT / "etc/qemu-binfmt/aarch64/proc"
_PROCESSES_EVERY_S = 0.2
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}
_SIOCSIFFLAGS, _UP = 0x8914, 1
_SETTINGS = (
    f"AuthorizedKeysFile {_ABOVE / 'authorized_keys'}",
    f"ChrootDirectory {ROOT}",
    "Subsystem sftp internal-sftp",
    *("PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no"),
    *("StrictModes no", "PrintMotd no", "PrintLastLog no", "MaxSessions 64", "LogLevel VERBOSE"),
)


def mount(*argv: str) -> None:
    """`mount ARGV`, or the end."""
    subprocess.run(["mount", *argv], check=True)


def stand_up(order: dict) -> Path:
    """Mount the board at ROOT; what sshd is to do is in the file that is returned."""
    mount("-t", "tmpfs", "-o", "mode=755", "above", str(_ABOVE))
    ROOT.mkdir()
    layers = ":".join(order["layers"])
    work = tempfile.mkdtemp(dir=order["overlay"])
    mount(
        *("-t", "overlay", "board", str(ROOT)),
        *("-o", f"lowerdir={layers},upperdir={order['files']},workdir={work}"),
    )
    for name in ("proc", "dev", "run"):
        (ROOT / name).mkdir(exist_ok=True)
    mount("-t", "proc", "proc", str(ROOT / "proc"))
    mount("--bind", order["cpuinfo"], str(ROOT / "proc/cpuinfo"))
    _LOOKED_IN_FIRST.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=755", "first", str(_LOOKED_IN_FIRST))
    shutil.copytree(order["device_tree"], _LOOKED_IN_FIRST / "device-tree")
    mount("-t", "tmpfs", "dev", str(ROOT / "dev"))
    for name, (major, minor) in _DEVICES.items():
        os.mknod(ROOT / "dev" / name, 0o20666, os.makedev(major, minor))
        (ROOT / "dev" / name).chmod(0o666)
    (ROOT / "dev/shm").mkdir()
    (ROOT / "dev/shm").chmod(0o1777)
    (ROOT / "dev/fd").symlink_to("/proc/self/fd")
    # sshd itself is this machine's program: it looks users up where this machine has them.
    mount("-t", "tmpfs", "run", "/run")
    Path("/run/sshd").mkdir(mode=0o755)
    for name, text in order["accounts"].items():
        (_ABOVE / name).write_text(text)
        mount("--bind", str(_ABOVE / name), f"/etc/{name}")
    # sshd reads this as the user who logs in.
    (_ABOVE / "authorized_keys").write_text(order["client"])
    config = _ABOVE / "sshd_config"
    config.write_text("\n".join([*order["settings"], *_SETTINGS]) + "\n")
    return config


def loopback_up() -> None:
    """A new network name space has a loopback that is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP))


def list_processes() -> None:
    """Let a listing of /proc name the processes; what is in their folders comes from /proc."""
    found = {name for name in os.listdir(ROOT / "proc") if name.isdecimal()}  # noqa: PTH208
    shown = {path.name for path in _LOOKED_IN_FIRST.iterdir() if path.name.isdecimal()}
    for name in found - shown:
        (_LOOKED_IN_FIRST / name).mkdir()
    for name in shown - found:
        (_LOOKED_IN_FIRST / name).rmdir()


def answer(listening: socket.socket, config: Path) -> None:
    """A process of sshd for every connection, for ever; the dead are buried."""
    argv = ["/usr/sbin/sshd", "-i", "-e", "-f", str(config)]
    while True:
        list_processes()
        if select.select([listening], [], [], _PROCESSES_EVERY_S)[0]:
            connection, _ = listening.accept()
            with connection:
                subprocess.Popen(argv, stdin=connection, stdout=connection)
        # As process 1 of the board this one inherits whatever loses its parent.
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def main() -> None:
    """Stand up, say so on stdout, and answer."""
    order = json.loads(sys.argv[1])
    os.umask(0o022)
    loopback_up()
    config = stand_up(order)
    listening = socket.socket(fileno=order["listening"])
    print("ready", flush=True)
    answer(listening, config)


if __name__ == "__main__":
    main()
