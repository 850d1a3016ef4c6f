"""
Everything that edgeexit refuses, and the exit code that each refusal has.

EdgeExitError
├── UsageError           2   wrong option, unknown name, absent path
├── BadFile              3   truncated, altered, pickled, of another format
├── Unsupported          4   a model or kind of file that edgeexit does not take
├── DeviceError          5   board, runtime, meter or transport
├── Disturbed            6   a measurement that cannot be trusted
├── OutOfReach           7   no policy meets the target, or its check failed
├── Busy                 8   another run holds the lock
├── ParityError          9   a step changed the network's answers
├── SelfTestError       10   this machine answers differently from the one that converted
└── StorageError        11   disk full, read-only, or failing

The class says what the reader can do about it. A message is one line: place, fact,
expectation; the hint is the next step. Anything else that escapes is a bug (exit code 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EdgeExitError(Exception):
    """Base of all refusals: str() is the one-line message, *hint* the next step or None."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(EdgeExitError):
    """A wrong option, an unknown name, or a path that is not there."""

    exit_code = 2


class BadFile(EdgeExitError):
    """A file is truncated, altered, pickled, or of a format that this version cannot read."""

    exit_code = 3


class Unsupported(EdgeExitError):
    """The model or the kind of file is sound, but edgeexit does not take it."""

    exit_code = 4


class DeviceError(EdgeExitError):
    """A board, a runtime, a meter or a transport does not do what was asked."""

    exit_code = 5


class Disturbed(EdgeExitError):
    """A measurement was disturbed or did not converge."""

    exit_code = 6


class OutOfReach(EdgeExitError):
    """No policy meets the target, or the chosen one failed its check."""

    exit_code = 7


class Busy(EdgeExitError):
    """Another run holds the lock."""

    exit_code = 8


class ParityError(EdgeExitError):
    """A conversion step changed the network's answers by more than it may."""

    exit_code = 9


class SelfTestError(EdgeExitError):
    """This machine's answers to the bundle's self-test differ from the recorded ones."""

    exit_code = 10


class StorageError(EdgeExitError):
    """The storage is full, read-only, or failing."""

    exit_code = 11


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Translate an OSError met while *writing* below *path* into StorageError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path}: cannot write: {reason}", hint="free some space or choose another folder"
        ) from error
