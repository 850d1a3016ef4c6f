"""
Locks that are free again when their holder ends, however it ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeexit.errors import Busy, storage


@contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """
    Hold the lock *path* for *what*; it is free again when the block ends or the process dies.

    Busy if another process holds it, unless *wait*. Whoever holds it may remove the file.
    """
    while True:
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise Busy(f"{path}: another process holds {what}", hint="wait for it") from error
            # A file that its last holder removed before it let go locks nobody out.
            if _is_at(handle, path):
                yield
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock *path*."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
