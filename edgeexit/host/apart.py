"""
Run one of our functions where it can do little harm: in a child process with limits.

Callers see run. The function's module lies in this package; it takes a folder, in which files are
handed over, and plain values, and returns plain values. Hidden here: the child may be another
interpreter, which then sees this package and nothing else of ours; a crash, a hang and a
refusal all come back as one line; nothing that crosses is a pickle.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeexit.errors import EdgeExitError, Unsupported, UsageError, from_os_error, kind_of
from edgeexit.files import json_bytes, read_json

MEMORY_BYTES = 16 << 30
TIMEOUT_S = 900.0
MAX_FILE_BYTES = 16 << 30  # of one file that the child writes

_ANSWER = "answer.json"
_START = "from edgeexit.host.apart import _child; _child()"


def run(
    function: str,
    folder: Path,
    arguments: Mapping[str, Any],
    *,
    where: str,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> Any:
    """
    What *function* ("package.module:name") returns for *folder* and *arguments*, plain values.

    It runs in a process of its own that is ended, with all that it started, after *timeout_s*;
    *memory_bytes* bounds its address space. *python* names another interpreter, which needs what
    the function's module imports; *environment* is added to the child's. Its refusals are raised
    here again; Unsupported, with *where* before it, if it crashes or hangs; UsageError if there
    is no such interpreter.
    """
    order = {
        "function": function,
        "folder": str(folder.resolve()),
        "arguments": dict(arguments),
        "limits": [memory_bytes, math.ceil(timeout_s)],
    }
    answer = folder / _ANSWER
    answer.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as told:
        # A link to this package alone: beside an installed one lie another interpreter's packages.
        (Path(home) / "edgeexit").symlink_to(Path(__file__).resolve().parent.parent)
        code = _wait(
            [python or sys.executable, "-P", "-c", _START],
            json_bytes(order),
            told,
            folder,
            _environment(python, home, folder) | dict(environment or {}),
            timeout_s,
            where,
        )
        last = _last_line(told)
    if code != 0 or not answer.exists():
        how = f"signal {-code}" if code < 0 else f"code {code}"
        raise Unsupported(f"{where}: the process that opens it ends with {how}: {last}")
    table = read_json(answer)
    if "error" in table:
        error = table.table("error")
        kind = kind_of(error.get("code", int))
        raise kind(error.get("message", str), hint=error.get("hint", str) or None)
    return table.values.get("value")


def _environment(python: str | None, home: str, folder: Path) -> dict[str, str]:
    known = os.environ.get("PYTHONPATH") if python is None else None
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [home, known])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder.resolve()),
    }
    if python is not None:
        found["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
        found.pop("PYTHONHOME", None)
    return found


def _wait(
    command: list[str],
    order: bytes,
    told: Any,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    where: str,
) -> int:
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=told,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"{command[0]}: no Python interpreter: {error.strerror}") from error
    try:
        child.communicate(order, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise Unsupported(f"{where}: opening it takes more than {timeout_s:g} s") from error
    finally:
        # What it started goes with it, whichever way this ends.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode


def _last_line(told: Any) -> str:
    size = told.seek(0, os.SEEK_END)
    told.seek(max(0, size - 4096))
    lines = [line.strip() for line in told.read().decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it says nothing")


# ---------------------------------------------------------------- in the child


def _child() -> None:
    order = json.loads(sys.stdin.buffer.read())
    memory_bytes, cpu_s = order["limits"]
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s * (os.cpu_count() or 1)),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    folder = Path(order["folder"])
    module, _, name = order["function"].partition(":")
    answer: dict[str, Any]
    try:
        try:
            called = getattr(importlib.import_module(module), name)
            answer = {"value": called(folder, **order["arguments"])}
        except OSError as error:
            raise from_os_error(error) or error from error
    except EdgeExitError as refused:
        told = {"code": refused.exit_code, "message": str(refused), "hint": refused.hint or ""}
        answer = {"error": told}
    (folder / _ANSWER).write_bytes(json_bytes(answer))
