"""
Power cuts on a real file system: python power_cuts.py FOLDER CUTS OPTIONS WRONG_CODE, by root.

A process deploys one release after the other on an ext4, which is shut down under it again and
again, without its journal. One line on stdout for whatever does not hold afterwards, and at the end
the number of steps that were acknowledged. It must run in a mount namespace of its own (unshare
--mount): another one that was made meanwhile would hold the dead file system, and it would be
mounted again instead of what is on the storage.
"""

import fcntl
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shelves import APP, process

from edgeexit.errors import BadFile, UsageError
from edgeexit.releases import Releases

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_WITHOUT_LOG = 2  # what the journal holds in memory is lost, too


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[None]:
    _run("mount", "-o", ",".join(filter(None, ("loop", options))), image, folder)
    try:
        yield
    finally:
        _run("umount", folder)


def cut_power(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
    finally:
        os.close(handle)


def is_as_made(release: Path) -> bool:
    """Whether a release of churn holds what churn put into it."""
    number = (release / "bundle.json").read_bytes()
    return bool(number) and (release / "model.tflite").read_bytes() == number * 20000


def damage(home: Path, said: list[str]) -> list[str]:
    """What does not hold on the board after churn said this much and the power was cut."""
    folder, wrong = home / "apps" / APP, []
    for path in (folder / "current", folder / "previous", *folder.glob("releases/[!.]*")):
        if path.is_symlink() or path.exists():
            try:
                if not is_as_made(path):
                    wrong.append(f"{path.name} is not whole")
            except OSError as error:
                wrong.append(f"{path.name}: {error}")
    lines: list[str] = []
    board = Releases(home, APP, tell=lines.append)
    status = board.status()
    found = " ".join(name or "-" for name in (status.current, status.previous, status.staged))
    # What was done, and what was about to be done.
    ends = [line.partition(" ")[2] for line in said if line.startswith("done")][-1:]
    ends += [line.partition(" ")[2] for line in said[-1:]]
    if ends and found not in ends:
        wrong.append(f"{found} is lost or never was, expected one of {ends}")
    try:
        board.open()
    except UsageError:
        if not ends or not ends[0].startswith("-"):
            wrong.append("nothing runs")
    except BadFile as error:
        wrong.append(f"{error}: {lines}")
    return wrong


def main(folder: Path, cuts: int, options: str, wrong_code: str) -> None:
    chance = random.Random(cuts)
    image, board = folder / "image", folder / "board"
    home = board / "home"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    _run("mkfs.ext4", "-q", image)
    home.mkdir(parents=True)
    (board / "brought").mkdir()
    steps = 0
    for cut in range(cuts):
        with mounted(image, home, options):
            words = process(board, "churn", wrong_code, str(1000 * cut))
            child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert child.stdout is not None
            said = [child.stdout.readline().decode().strip() for _ in range(chance.randint(1, 12))]
            # With commit=1 the file system writes by itself, which is when order matters.
            time.sleep(chance.uniform(0, 1.5 if options else 0.05))
            cut_power(home)
            child.kill()
            said += child.communicate()[0].decode().splitlines()
        steps += sum(line.startswith("done") for line in said)
        with mounted(image, home, options):
            for wrong in damage(home, said):
                sys.stdout.write(f"cut {cut}: {wrong}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{steps}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
