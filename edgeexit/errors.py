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

import errno
import unicodedata
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


_FAILING = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EFBIG)
_WRONG_PATH = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


# The kinds drawn above, by exit code: whoever derives from them elsewhere adds none.
KINDS = {kind.exit_code: kind for kind in EdgeExitError.__subclasses__()}


def kind_of(exit_code: object) -> type[EdgeExitError]:
    """The class of refusals with this *exit_code*; DeviceError for what no refusal has."""
    return KINDS.get(exit_code, DeviceError) if isinstance(exit_code, int) else DeviceError


def from_os_error(error: OSError, path: Path | str | None = None) -> EdgeExitError | None:
    """
    What an OSError met outside of *storage* means, for whoever called; None if nothing is known.

    A path that cannot be right is a UsageError, anything else that the system refuses about a
    file a StorageError. *path* names the place if the error itself does not.
    """
    if error.errno == errno.ENOENT and "temporary directory" in (error.strerror or ""):
        # Python's word for disks that are full everywhere; it names no file.
        return StorageError(
            "temporary files: cannot write to any of the usual folders",
            hint="free some space, or name a folder in the environment variable TMPDIR",
        )
    place = path if path is not None else error.filename
    if error.errno is None or (place is None and error.errno not in _FAILING):
        return None
    if isinstance(place, bytes):
        place = place.decode(errors="replace")
    text = str(place if place is not None else "storage")
    shown = text if len(text) <= 200 else f"{text[:197]}..."
    kind = UsageError if error.errno in _WRONG_PATH else StorageError
    return kind(f"{shown}: {error.strerror or error}")


# Control characters, lone surrogates, line and paragraph ends (Unicode's general categories).
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")


def is_plain(text: str) -> bool:
    """Whether *text* is one line without control characters, fit to be a name in a file."""
    return not any(unicodedata.category(char) in _UNSHOWN for char in text)


def printable(text: str) -> str:
    """
    *text* with control characters, line ends and broken UTF-8 shown as escapes.

    File names and other people's files can hold codes that move a terminal's cursor or fake a
    second line; whatever is shown of them goes through here.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


@contextmanager
def hinting(hint: str) -> Iterator[None]:
    """Give a BadFile that says nothing about the next step this *hint*."""
    try:
        yield
    except BadFile as error:
        error.hint = error.hint or hint
        raise


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
