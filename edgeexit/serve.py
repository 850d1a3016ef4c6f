"""
What runs for an app of this board: its current release, and the next one as soon as it is there.

Callers see Served. Hidden here: a release is used once its bytes were verified and its self-test
passed on this board; another one is taken up between two frames, by one look at a link, without
a restart; and one that cannot be used changes nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from edgeexit.bundle import Bundle, load_bundle
from edgeexit.errors import EdgeExitError
from edgeexit.releases import Releases
from edgeexit.selftest import run_selftest

# How often the link is looked at, and no more often.
LOOK_EVERY_S = 0.5


class _Closeable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closeable)


class Served(Generic[T]):
    """
    What *make* makes of the bundle of the current release; `now` answers.

    *tell* hears one line for whatever was taken up or refused. Making the first one raises what
    Releases.open, the self-test or *make* raise. close() closes `now`.
    """

    def __init__(
        self,
        releases: Releases,
        make: Callable[[Bundle], T],
        *,
        tell: Callable[[str], object],
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._releases, self._make, self._tell = releases, make, tell
        self._threads, self._clock = threads, clock
        self._wanted = releases.current_id()
        self._path = releases.open()
        self._due_s = clock() + LOOK_EVERY_S
        self.now = self._open(self._path)

    def _open(self, path: Path) -> T:
        bundle = load_bundle(path)
        run_selftest(bundle, self._threads)
        return self._make(bundle)

    def renew(self) -> bool:
        """
        Take up the current release if it is another one by now; whether `now` has changed.

        The caller is between two frames. What was there before is closed.
        """
        if self._clock() < self._due_s:
            return False
        self._due_s = self._clock() + LOOK_EVERY_S
        wanted = self._releases.current_id()
        # None: somebody is about to exchange it. One that was refused is not tried again.
        if wanted is None or wanted == self._wanted:
            return False
        self._wanted = wanted
        app = self._releases.app
        try:
            path = self._releases.open()
            if path == self._path:
                return False
            made = self._open(path)
        except EdgeExitError as error:
            self._tell(f"{app}: release {wanted}: {error}; {self._path.name} goes on")
            return False
        self._tell(f"{app}: release {path.name} runs now, {self._path.name} did before")
        self.now.close()
        self.now, self._path = made, path
        return True

    @property
    def release(self) -> str:
        """The id of the release that runs."""
        return self._path.name

    def close(self) -> None:
        """Give the memory of what runs back."""
        self.now.close()
