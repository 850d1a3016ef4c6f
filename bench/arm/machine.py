"""
A whole ARM machine that is not there: qemu's virt board, Debian's kernel, the system of root.py.

    python bench/arm/machine.py [CPU] [bare]     start one, and say how to log in

Callers see Machine. Nothing on it is made up but the processor: a real kernel with one disk made of
the layers of root.py, started afresh each time, with no way to any network. Two ways in:

- login: like the one of board.Board, but the sshd, its ciphers and its file system are ARM's, too.
- batch: one program with a folder of files, no network at all, off again. With *counting* the
  guest's clock advances by one nanosecond for every instruction that the only processor executes
  and by nothing else, so that a measured "nanosecond" there is an instruction.

Machines run one at a time, and none outlives the process that started it.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from login import USER, USER_ID, Login, accounts, keygen, must
from root import SITE, CannotBuild, cache, extract, layer, layers, system

from edgeexit.errors import EdgeExitError
from edgeexit.locks import hold

QEMU = "qemu-system-aarch64"
KERNEL = "linux-image-cloud-arm64"  # ext4 is built in; made for machines that are not there
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_console")
# What a machine has besides what a board has: a server to log into, and a shell for its start.
_MORE = ("busybox-static", "openssh-server", "openssh-sftp-server")
_DISK, _FILES = "disk", "files"  # how the kernel tells the two disks apart
_DISK_MB, _MEMORY_MB = 2048, 1024
_VERSION = 1  # of the layers made here
_POLL_S = 0.05

# The first program of all: modules, the disk, and on to what lies there.
_INITRAMFS = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in $($b cat /modules/order); do $b insmod /modules/$m; done
until [ -n "$($b grep -l {_DISK} /sys/block/*/serial)" ]; do $b sleep 0.01; done
name=$($b grep -l {_DISK} /sys/block/*/serial)
name=${{name#/sys/block/}}
$b mount -t ext4 /dev/${{name%/serial}} /new
for d in dev proc sys; do $b mount --move /$d /new/$d; done
exec $b switch_root /new /sbin/start
"""

# Its successor on the disk: a job if the files hold one, else a server.
_START = f"""#!/bin/busybox sh
b=/bin/busybox
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
for d in /dev/shm /run /tmp; do $b mount -t tmpfs -o mode=1777 tmpfs $d; done
$b mkdir -m 755 /run/sshd
$b hostname board
$b ip link set lo up
name=$($b grep -l {_FILES} /sys/block/*/serial)
name=${{name#/sys/block/}}
$b mount -t ext4 -o ro /dev/${{name%/serial}} /mnt
if [ -x /mnt/job ]; then
  cd /tmp
  /mnt/job > /dev/vport0p1
  echo "the job ended with $?"
  exec $b poweroff -f
fi
$b ip link set eth0 up
$b ip addr add 10.0.2.15/24 dev eth0
$b cp /mnt/host /run/host
$b chmod 600 /run/host
exec /usr/sbin/sshd -D -e -f /mnt/sshd_config
"""

_SSHD = """HostKey /run/host
AuthorizedKeysFile /mnt/client.pub
PidFile none
Subsystem sftp internal-sftp
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
MaxStartups 100
"""


class MachineFailed(EdgeExitError):
    """The virtual machine did not start, or its job failed."""


class Machine:
    """
    A virtual machine with a *cpu* that qemu knows; its keys, logs and files lie in *folder*.

    With *ready* the wheels of the device side lie in root.SITE, without it there is Python and
    nothing else. With *counting* there is one processor and its clock counts instructions.
    CannotBuild where a tool, a registry or the right to use them is missing.
    """

    def __init__(
        self, cpu: str, folder: Path, *, ready: bool = True, counting: bool = False
    ) -> None:
        self.cpu, self.folder, self.ready, self.counting = cpu, folder, ready, counting
        self.log = folder / "console.log"
        if shutil.which(QEMU) is None:
            raise CannotBuild(f"{QEMU} is missing", hint="apt-get install qemu-system-arm")
        self._kernel, self._disk = kernel(), disk(ready=ready)
        folder.mkdir(parents=True, exist_ok=True)

    def batch(
        self,
        files: Path,
        *,
        timeout_s: float = 600,
        on_line: Callable[[str], object] = lambda line: None,
    ) -> str:
        """
        What the program *files*/job prints on stdout, run by root; the files lie in /mnt there.

        *on_line* is given each line as it comes. MachineFailed if the job does not end with 0 in
        time; the log says why.
        """
        said = self.folder / "said.txt"
        said.unlink(missing_ok=True)
        with self._started(
            files,
            *("-nic", "none", "-device", "virtio-serial-device"),
            *("-chardev", f"file,id=said,path={said}", "-device", "virtserialport,chardev=said"),
        ) as qemu:
            end, told = time.monotonic() + timeout_s, 0
            while qemu.poll() is None:
                if time.monotonic() > end:
                    raise self._failed(f"no end after {timeout_s:.0f} s")
                time.sleep(_POLL_S)
                lines = said.read_text().split("\n")[:-1] if said.exists() else []
                for line in lines[told:]:
                    on_line(line)
                told = len(lines)
        ended = re.search(r"the job ended with (\d+)", self.log.read_text(errors="replace"))
        if ended is None or ended[1] != "0":
            raise self._failed("the job failed" if ended else "ended before its job")
        return said.read_text()

    @contextmanager
    def login(self, *, timeout_s: float = 120) -> Iterator[Login]:
        """Run the machine, with an ssh server on a port of the loopback, while the block runs."""
        keys = self.folder / "keys"
        keys.mkdir(exist_ok=True)
        for name in ("host", "client"):
            keygen(keys / name)
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            files = Path(made)
            files.chmod(0o755)  # sshd reads the client's key as the user who logs in
            shutil.copy(keys / "host", files / "host")
            shutil.copy(keys / "client.pub", files / "client.pub")
            path = [f"SetEnv PYTHONPATH=/{SITE}\n"] if self.ready else []
            (files / "sshd_config").write_text("".join([_SSHD, *path]))
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
            with self._started(
                files, "-netdev", network, "-device", "virtio-net-device,netdev=net"
            ) as qemu:
                self._await_server(qemu, port, timeout_s)
                yield Login.on_loopback(port, keys, files=None, log=self.log)

    def _await_server(self, qemu: "subprocess.Popen[bytes]", port: int, timeout_s: float) -> None:
        """Until sshd greets: qemu itself takes connections long before."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if qemu.poll() is not None:
                raise self._failed("ended while it was starting")
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as there:
                    if there.recv(4) == b"SSH-":
                        return
            except OSError:
                pass
            time.sleep(_POLL_S)
        raise self._failed(f"no ssh server after {timeout_s:.0f} s")

    @contextmanager
    def _started(self, files: Path, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
        counting = ("-smp", "1", "-icount", "shift=0,sleep=on")
        quick = ("-smp", "2", "-accel", "tcg,thread=multi")
        image = self.folder / "files.img"
        make_image(files, image)
        argv = [
            # Killed with the thread that started it, however that ends.
            *("setpriv", "--pdeathsig", "KILL", QEMU, "-M", "virt", "-cpu", self.cpu),
            *(counting if self.counting else quick),
            *("-m", str(_MEMORY_MB), "-display", "none", "-monitor", "none", "-no-reboot"),
            *("-serial", f"file:{self.log}"),
            *("-kernel", str(self._kernel / "kernel"), "-initrd", str(self._kernel / "initramfs")),
            # Addresses are the same each time, and after a panic nobody waits for a person.
            *("-append", "console=ttyAMA0 quiet panic=-1 nokaslr norandmaps mitigations=off"),
            *_drive(image, _FILES),
            *_drive(self._disk / "disk.img", _DISK),
            *more,
        ]
        self.log.unlink(missing_ok=True)
        with (
            hold(cache() / "machine.lock", "the virtual machine", wait=True),
            (self.folder / "qemu.log").open("w") as said,
        ):
            qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            try:
                yield qemu
            finally:
                qemu.kill()
                qemu.wait()

    def _failed(self, what: str) -> MachineFailed:
        texts = [self.folder / "qemu.log", self.log]
        lines = [
            line
            for text in texts
            if text.exists()
            for line in text.read_text(errors="replace").splitlines()
            if line.strip()
        ]
        return MachineFailed(f"{self.cpu}: {what}: {' | '.join(lines[-3:])}", hint=str(self.log))


def _drive(image: Path, name: str) -> tuple[str, ...]:
    """Options for a disk whose writes are forgotten."""
    return (
        *("-drive", f"if=none,id={name},file={image},format=raw,snapshot=on"),
        *("-device", f"virtio-blk-device,drive={name},serial={name}"),
    )


# ---------------------------------------------------------------- layers


def kernel() -> Path:
    """A layer with "kernel" and "initramfs". CannotBuild."""

    def build(folder: Path) -> None:
        whole = folder / "whole"
        extract([KERNEL, "busybox-static"], whole)
        shutil.move(next(whole.glob("boot/vmlinuz-*")), folder / "kernel")
        busybox = (whole / "bin" / "busybox").read_bytes()
        (folder / "initramfs").write_bytes(_initramfs(busybox, whole / "lib" / "modules"))
        shutil.rmtree(whole)

    return layer("kernel", [KERNEL, *_MODULES, _INITRAMFS, str(_VERSION)], build)


def disk(*, ready: bool) -> Path:
    """A layer with "disk.img", made of root.py's layers. CannotBuild."""
    below = [*layers(ready=ready)[:-1], system(_MORE)]

    def build(folder: Path) -> None:
        whole = folder / "whole"
        whole.mkdir()
        for each in reversed(below):  # cp knows that devices are no files
            must("cp", "--archive", "--reflink=auto", f"{each}/.", str(whole))
        shutil.rmtree(whole / "dev")  # the kernel fills it
        for name in ("dev", "mnt", "proc", "run", "sys", "tmp", f"home/{USER}", "var/empty"):
            (whole / name).mkdir(parents=True, exist_ok=True)
        os.chown(whole / "home" / USER, USER_ID, USER_ID)
        for name, text in accounts().items():
            (whole / "etc" / name).write_text(text)
        (whole / "etc/hosts").write_text("127.0.0.1 localhost\n")
        (whole / "sbin/start").write_text(_START)
        (whole / "sbin/start").chmod(0o755)
        make_image(whole, folder / "disk.img", _DISK_MB)
        shutil.rmtree(whole)

    recipe = [*(each.name for each in below), _START, str(accounts())]
    return layer("disk", [*recipe, str(_DISK_MB), str(_VERSION)], build)


def make_image(folder: Path, image: Path, size_mb: int | None = None) -> None:
    """Put *folder* into a new ext4 *image*, of *size_mb* or as large as it must be. CannotBuild."""
    if size_mb is None:
        used = sum(path.stat().st_size + 8192 for path in folder.rglob("*") if path.is_file())
        size_mb = 16 + used * 5 // 4 // 1_000_000
    image.unlink(missing_ok=True)
    without = "^has_journal,^metadata_csum,^64bit"
    must("mke2fs", "-q", "-t", "ext4", "-O", without, "-d", str(folder), str(image), f"{size_mb}M")


def _initramfs(busybox: bytes, modules: Path) -> bytes:
    """The archive ("newc") that the kernel unpacks into its first file system."""
    order = _load_order(_MODULES, modules)
    folder, program, plain, device = 0o40755, 0o100755, 0o100644, 0o20600
    files = [(name, folder, b"") for name in ("bin", "dev", "modules", "new", "proc", "sys")]
    files.append(("dev/console", device, b""))
    files += [("bin/busybox", program, busybox), ("init", program, _INITRAMFS.encode())]
    files += [(f"modules/{path.name}", plain, path.read_bytes()) for path in order]
    files.append(("modules/order", plain, "\n".join(path.name for path in order).encode()))
    made = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        major, minor = (5, 1) if mode == device else (0, 0)
        head = (number, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        made += b"070701" + b"".join(b"%08x" % value for value in head) + name.encode() + b"\0"
        made += b"\0" * (-len(made) % 4) + data
        made += b"\0" * (-len(made) % 4)
    return bytes(made)


def _load_order(names: Iterable[str], modules: Path) -> list[Path]:
    """The files below *modules* of those *names* and of what they need, needed ones first."""
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:  # what is no file is built in
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for need in found[1].decode().split(",") if found else ():
            add(need)
        order.append(path)

    for name in names:
        add(name)
    return order


def main() -> None:
    """Stand until interrupted, and say how to log in."""
    given = [word for word in sys.argv[1:] if word != "bare"]
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(
            given[0] if given else "cortex-a72", Path(folder), ready="bare" not in sys.argv[1:]
        )
        began = time.monotonic()
        with machine.login() as login:
            print(f"up after {time.monotonic() - began:.1f} s", file=sys.stderr)
            print(f"ssh -F {login.config} -p {login.port} {login.user}@{login.address}", flush=True)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    try:
        main()
    except EdgeExitError as error:
        sys.exit(f"Error: {error}")
