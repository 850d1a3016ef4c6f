"""
The state file of a job under way: it lies beside the output, and only that very job goes on.
"""

import copy
import io
from pathlib import Path
from typing import Any

import torch

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.files import read_bytes
from edgeexit.host.torchfile import load_plain

# training 1: first. 2: the state of a Fit, with its phases. 3: a head as pruning has it.
# pruning 1: first.
FORMATS = {"training": 3, "pruning": 1}
MAX_STATE_BYTES = 4 << 30
# What going on from values that no job has left may raise.
UNSOUND = (
    *(KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, OverflowError),
    *(AssertionError, EdgeExitError),
)


def state_bytes(job: str, digest: str, values: dict[str, Any]) -> bytes:
    """
    The file of a *job* (a key of FORMATS) whose plan has that *digest*: tensors, plain *values*.

    Wherever the tensors lie, another machine can go on from it.
    """
    buffer = io.BytesIO()
    named = {f"edgeexit_{job}": FORMATS[job], "digest": digest}
    torch.save({**named, **_on_cpu(values)}, buffer)
    return buffer.getvalue()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy.copy(value)  # a state_dict has more to it than its items
        for key, one in value.items():
            moved[key] = _on_cpu(one)  # update() means something else to some dicts
        return moved
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(one) for one in value)
    return value


def read_state(path: Path, job: str, digest: str) -> dict[str, Any]:
    """
    The state of *job* in *path*. BadFile if it is damaged or of another version, UsageError if
    it belongs to another plan than the one with *digest*.
    """
    data = read_bytes(path, limit_bytes=MAX_STATE_BYTES)
    try:
        state: dict[str, Any] = load_plain(data)
        version, found = state[f"edgeexit_{job}"], state["digest"]
    except Exception as error:  # torch.load has no narrower contract for damaged files
        raise unsound(path, job, error) from error
    if version != FORMATS[job]:
        raise BadFile(f"{path}: of another version of edgeexit", hint=f"remove {path}")
    if found != digest:
        raise UsageError(
            f"{path}: an interrupted {job} with another recipe or network",
            hint=f"undo the change to go on, or remove {path} to start anew",
        )
    return state


def unsound(path: Path, job: str, error: Exception) -> BadFile:
    """The error for a state that cannot be gone on from."""
    return BadFile(
        f"{path}: not a sound {job} state ({type(error).__name__})",
        hint=f"remove {path} to start anew",
    )
