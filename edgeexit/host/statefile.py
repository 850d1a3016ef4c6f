"""
The state file of a job under way: it lies beside the output, and only that very job goes on.
"""

from pathlib import Path
from typing import Any

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


def head(job: str, digest: str) -> dict[str, Any]:
    """What a state of *job* (a key of FORMATS) begins with; *digest* is that of its plan."""
    return {f"edgeexit_{job}": FORMATS[job], "digest": digest}


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
            hint="undo the change to go on, or start anew with --again",
        )
    return state


def unsound(path: Path, job: str, error: Exception) -> BadFile:
    """The error for a state that cannot be gone on from."""
    return BadFile(
        f"{path}: not a sound {job} state ({type(error).__name__})",
        hint=f"remove {path} to start anew",
    )
