"""
Try .tflite files out in a child process before this one opens them, and remember which passed.

Some files abort or hang the runtime, or write where they must not, and with it goes the process
that holds it; digests say nothing about that. Callers see vet and expendable. Hidden here: the
child has limits and can write no file; a file that passed is tried again only where the runtime or
the machine is another one; the memory lies in edgeexit's folder and may be lost at any time. What
is found is what shows within a few calls: this keeps accidents out, it does not make foreign files
harmless.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

from edgeexit.children import command, environment
from edgeexit.errors import BadFile, DeviceError, EdgeExitError, Unsupported, printable
from edgeexit.files import digest_of, write_file
from edgeexit.names import board_home

MEMORY = "vetted"
# Of the memory the older half is forgotten when it is as large as this: about 4,000 files.
_MOST_BYTES = 256 << 10
# Part of every line of the memory: another number when more than before is looked at.
_STRICTNESS = 1

_CHILD_MEMORY_BYTES = 6 << 30
_CHILD = "import sys; from edgeexit import interpreter, vetting; vetting.child(interpreter.try_out)"
# What a forced end looks like: our own clock's, and the limits' on time.
_HANGS = (signal.SIGALRM, signal.SIGXCPU)

TIMEOUT_S = 60.0


class Suspect(Protocol):
    """A .tflite that may not have been tried: *load* fetches the bytes that *digest* names."""

    @property
    def where(self) -> str:
        """What it is called in errors."""

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""

    @property
    def load(self) -> Callable[[], bytes]:
        """Fetches its bytes."""


class Held:
    """A .tflite in memory, as a Suspect."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return digest_of(self.data)

    def load(self) -> bytes:
        """The bytes."""
        return self.data


_passed: set[str] = set()
_is_expendable = False


def expendable() -> None:
    """Say that this process is itself one in which something is tried out: it needs no other."""
    global _is_expendable
    _is_expendable = True


def vet(suspects: Sequence[Suspect], runtime: str, *, timeout_s: float = TIMEOUT_S) -> None:
    """
    Try out, in one child process, those of *suspects* that did not pass here with *runtime*.

    BadFile if the runtime refuses one, or fails at it; Unsupported if one crashes it, runs
    longer than *timeout_s*, takes more than 6 GiB or answers by what else lies in memory;
    DeviceError if there can be no child.
    """
    if _is_expendable:
        return
    keys = {_key(suspect.digest, runtime): suspect for suspect in suspects}
    if keys.keys() <= _passed:
        return
    known = _remembered()
    new = {key: suspect for key, suspect in keys.items() if key.encode() not in known}
    if new:
        _try([(suspect.where, suspect.load()) for suspect in new.values()], timeout_s)
        _remember(list(new))
    _passed.update(keys)


def _key(digest: str, runtime: str) -> str:
    here = (_STRICTNESS, runtime, platform.machine(), platform.node(), digest)
    return hashlib.sha256("\n".join(map(str, here)).encode()).hexdigest()


# ---------------------------------------------------------------- memory


def _remembered() -> bytes:
    try:
        return (board_home() / MEMORY).read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
        return b""


def _remember(keys: Sequence[str]) -> None:
    # Where nothing can be kept a file is tried anew by each process.
    with suppress(OSError, RuntimeError, EdgeExitError):
        path = board_home() / MEMORY
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o644)
        try:
            os.write(handle, "".join(f"{key}\n" for key in keys).encode())
            is_full = os.fstat(handle).st_size > _MOST_BYTES
        finally:
            os.close(handle)
        if is_full:
            kept = path.read_bytes()[-_MOST_BYTES // 2 :]
            write_file(path, kept[kept.index(b"\n") + 1 :], mode=0o644)


# ---------------------------------------------------------------- the parent's side


def _try(files: Sequence[tuple[str, bytes]], timeout_s: float) -> None:
    """Let a child try *files*, (where, bytes) each; it says which one it is at."""
    chunks = [chunk for where, data in files for chunk in (where.encode(errors="replace"), data)]
    letter = b"".join(len(chunk).to_bytes(8, "little") + chunk for chunk in chunks)
    code, said, complaint = _run(letter, timeout_s, len(files))
    try:
        words = [json.loads(line) for line in said.splitlines()]
        where = files[words[-1].get("at", 0) if words else 0][0]
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise Unsupported(f"{files[0][0]}: the runtime garbles its process") from error
    if not words:
        lines = complaint.decode(errors="replace").strip().splitlines() or [f"code {code}"]
        raise DeviceError(
            f"no process to try {where} out in: {printable(lines[-1])[:200]}",
            hint="enough memory? edgeexit doctor tells more",
        )
    if code == 0 and "ok" in words[-1]:
        return
    if "refused" in words[-1]:
        kind = BadFile if words[-1].get("code") == BadFile.exit_code else Unsupported
        raise kind(printable(str(words[-1]["refused"]))[:400])
    if code is None or -code in _HANGS:
        raise Unsupported(f"{where}: the runtime hangs on it (over {timeout_s:g} s)")
    how = f"signal {-code}" if code < 0 else f"code {code}"
    raise Unsupported(
        f"{where}: the runtime crashes on it ({how})",
        hint="the file is damaged, or made for another runtime: convert the network again",
    )


def _run(letter: bytes, timeout_s: float, count: int) -> tuple[int | None, bytes, bytes]:
    """The child's exit code (None if it had to be ended from here), its words and complaints."""
    try:
        done = subprocess.run(
            command("-c", _CHILD, str(timeout_s)),
            input=letter,
            capture_output=True,
            # The child's own clock rings first; this is for one that cannot hear it.
            timeout=(timeout_s + 5) * count + 30,
            check=False,
            cwd="/",
            # It may write no file, not even half of a module's.
            env={**environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired as error:
        return None, error.stdout or b"", b""
    except OSError as error:
        return 1, b"", str(error.strerror or error).encode()
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------- the child's side

TryOut = Callable[[bytes, str, Callable[[], bool]], None]
"""Tries bytes (named in errors) out, raising BadFile or Unsupported; less once it is late."""


def child(try_out: TryOut) -> None:
    """Try out what comes on stdin: the child's whole life."""
    letter = sys.stdin.buffer.read()
    answer = os.fdopen(os.dup(1), "w")
    # Whatever a runtime prints is nobody's answer, and could be without end.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nowhere, handle)
    attempt(letter, try_out, float(sys.argv[1]), answer)


def attempt(letter: bytes, try_out: TryOut, timeout_s: float, answer: IO[str]) -> None:
    """Try the files in *letter* under limits that this process will not get rid of again."""
    files, rest = [], memoryview(letter)
    while rest:
        end = 8 + int.from_bytes(rest[:8], "little")
        files.append(bytes(rest[8:end]))
        rest = rest[end:]

    def say(**words: object) -> None:
        answer.write(f"{json.dumps(words)}\n")
        answer.flush()

    _limit(timeout_s, len(files) // 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
    for number, (name, data) in enumerate(zip(files[::2], files[1::2], strict=True)):
        where = name.decode()
        say(at=number)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            try_out(data, where, lambda: signal.getitimer(signal.ITIMER_REAL)[0] < timeout_s / 2)
        except (BadFile, Unsupported) as error:
            say(at=number, refused=str(error), code=error.exit_code)
            return
        except MemoryError:
            say(at=number, refused=f"{where}: it takes too much memory")
            return
    say(ok=True)


def _limit(timeout_s: float, count: int) -> None:
    with suppress(OSError):  # where memory runs out it shall be this process that goes
        Path("/proc/self/oom_score_adj").write_text("1000")
    for kind, most in (
        (resource.RLIMIT_AS, min(_CHILD_MEMORY_BYTES, sys.maxsize)),
        (resource.RLIMIT_CPU, math.ceil(timeout_s) * count + 5),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def perturb(byte: int) -> None:
    """Let glibc fill memory that it gives out with the inverse of *byte*; nothing elsewhere."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-6, byte)  # M_PERTURB
