"""
The releases of one application on a board: installed whole, activated, rolled back, collected.

Callers see Releases and its answers. Hidden here: what is meant to
happen stands in state.json before it happens, so that whoever comes after a crash finishes or
undoes it; a release appears by one rename and never changes; `current` and `previous` are links
that are exchanged by one rename each; nothing is run whose bytes are not those that came.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeexit.blobs import Blobs
from edgeexit.errors import (
    BadFile,
    Busy,
    EdgeExitError,
    ParityError,
    SelfTestError,
    StorageError,
    Unsupported,
    UsageError,
)
from edgeexit.intents import Intent, Links, Mark, State
from edgeexit.locks import hold
from edgeexit.manifest import Entry, Manifest
from edgeexit.names import unknown
from edgeexit.shelf import Shelf

# A check that was cut short as often as this brings the board down: it is not tried again.
MOST_TRIES = 3
# A repair that was cut short as often as this is given up: every link by itself is sound.
MOST_REPAIRS = 8

_APP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
_MAX_MARKS = 32
_MAX_MESSAGE = 500
# Refusals of a check that are the release's fault, not the board's.
_FAULTS = (BadFile, Unsupported, ParityError, SelfTestError)

Check = Callable[[Path], object]
"""Tries the release folder on this board, and refuses it with an EdgeExitError."""


def applications(home: Path) -> list[str]:
    """The applications that have a release on this board, sorted."""
    names = sorted(path.name for path in (home / "apps").glob("*/") if _APP.fullmatch(path.name))
    return [name for name in names if Releases(home, name).installed()]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What runs after an activation or a rollback, what ran before it, and what ran earlier."""

    current: str | None
    previous: str | None
    was: str | None


@dataclass(frozen=True, kw_only=True)
class Status:
    """
    What is there, by name; *bad* maps releases to why they are not to be run.

    staged was installed last and not yet activated; pending is what a process was about to do
    when it ended, or is doing now.
    """

    current: str | None
    previous: str | None
    staged: str | None
    releases: tuple[str, ...]
    bad: Mapping[str, str]
    pending: str | None

    def to_document(self) -> dict[str, Any]:
        """The status as a JSON object."""
        names = ("current", "previous", "staged", "pending")
        return {
            **{name: getattr(self, name) for name in names},
            "releases": list(self.releases),
            "bad": dict(self.bad),
        }


class Releases:
    """
    The releases of the application *app* below the board's folder *home*.

    *tell* is called with one line for whatever was repaired, refused or cannot be written. Every
    method first repairs what a crash has left. Those that change something raise Busy if another
    process is at it, StorageError if the storage refuses.
    """

    def __init__(
        self, home: Path, app: str, *, tell: Callable[[str], object] | None = None
    ) -> None:
        if not _APP.fullmatch(app):
            raise UsageError(
                f"app {app[:60]!r}: not a name that a folder can have",
                hint="letters, digits and _ . + - are allowed",
            )
        self.app, self._home = app, home
        self._shelf, self._blobs = Shelf(home / "apps" / app), Blobs(home)
        self._tell = tell if tell is not None else lambda line: None
        self._is_locked = False

    # ------------------------------------------------------------ what callers order

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else out over several calls. Busy if another process is inside."""
        if self._is_locked:
            yield
            return
        self._shelf.make()
        with hold(self._shelf.lock, f"the releases of {self.app}"):
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def missing(self, manifest: Manifest) -> list[Entry]:
        """The files that neither the uploads nor the sound releases of this app hold."""
        others = self._shelf.files()
        return [e for e in self._blobs.missing(manifest) if e.sha256 not in others]

    def add(self, entry: Entry, source: Path) -> None:
        """Bring a file of this very machine, as an upload would."""
        self._blobs.add(entry, source)

    def install(self, manifest: Manifest) -> str:
        """
        Put together the release from what was uploaded; its name. No work if it is there and sound.

        BadFile if a file has not come, or came altered (it is removed, to be sent again).
        """
        with self._repaired() as state:
            release, links = manifest.id, self._shelf.links()
            if self._shelf.fault(release) is not None:
                intent = Intent(what="install", release=release, before=links, after=links)
                state = self._shelf.write(replace(state, intent=intent))
                with self._clearing(state):
                    others = self._shelf.files()
                    self._blobs.build(manifest, self._shelf.release(release), others=others)
            mark = state.bad.get(release)
            is_bad = mark is not None and mark.cause == "check"
            bad = state.bad if is_bad else _less(state.bad, release)
            staged = None if is_bad or links.current == release else release
            self._shelf.write(replace(state, intent=None, staged=staged, bad=bad))
            return release

    def activate(self, release: str, check: Check, *, force: bool = False) -> Change:
        """
        Let *check* try the installed *release*, and make it the current one if it passes.

        A release that fails (BadFile, Unsupported, ParityError, SelfTestError) is marked bad and
        refused from then on, unless *force*, which also tries the current one again. UsageError
        if it is not installed.
        """
        self._require()
        with self._repaired() as state:
            links = self._shelf.links()
            folder = self._sound(release, state)
            mark = state.bad.get(release)
            if mark is not None and not force:
                raise SelfTestError(
                    f"{self.app}: release {release} was refused before: {mark.message}",
                    hint="--force tries it again",
                )
            if links.current == release and not force:
                return _change(links, links)
            state = self._checked(release, folder, check, state)
            after = links if links.current == release else self._before(links, release)
            self._switch(replace(state, bad=_less(state.bad, release)), "activate", after)
            return _change(links, after)

    def rollback(self) -> Change:
        """Make the previous release the current one, and the other way round. No check is run."""
        self._require()
        with self._repaired() as state:
            links = self._shelf.links()
            if links.previous is None:
                raise UsageError(
                    f"{self.app}: no previous release to go back to",
                    hint="deploy the bundle that you want to run",
                )
            self._sound(links.previous, state)
            is_sound = links.current is not None and self._shelf.fault(links.current) is None
            after = Links(current=links.previous, previous=links.current if is_sound else None)
            self._switch(state, "rollback", after)
            return _change(links, after)

    def collect(self, *, keep: int = 1) -> list[str]:
        """
        Remove releases and old uploads that nobody needs; their names below the board's folder.

        What is current, previous, staged or meant by an intent stays, and of the others the
        newest, if *keep* (how many besides the current one) leaves room. Needs no free space.
        """
        if not self._shelf.is_there:
            return []
        with self.locked():
            self._shelf.sweep()
            self._shelf.settle()
            state, links = self._shelf.state()[0], self._shelf.links()
            named = set() if state.intent is None else state.intent.named
            kept = {links.current, links.previous, state.staged, *named}
            others = [name for name in self._shelf.names() if name not in kept]
            room = max(0, keep - len(kept - {links.current, None}))
            removed = others[: max(0, len(others) - room)]
            self._shelf.remove(removed)
            blobs = self._blobs.collect()
            self._repair()
        return [
            *(f"apps/{self.app}/releases/{release}" for release in removed),
            *(f"blobs/{name}" for name in blobs),
        ]

    def repair(self) -> None:
        """Finish or undo what a crash has left."""
        if self._shelf.is_there:
            with self._repaired():
                pass

    def installed(self) -> list[str]:
        """The names of the releases that are there, oldest first. Nothing is verified."""
        return self._shelf.names()

    def current_id(self) -> str | None:
        """What `current` names at this moment. Nothing is verified."""
        return self._shelf.links().current

    def status(self) -> Status:
        """What is there, verified to the byte; nothing of an application that is not known."""
        with self._leniently() as (state, _):
            bad = {name: mark.message for name, mark in state.bad.items()}
            names = self._shelf.names()
            faults = {
                name: fault for name in names if (fault := self._shelf.fault(name)) is not None
            }
            links = self._shelf.links()
            return Status(
                current=links.current,
                previous=links.previous,
                staged=state.staged,
                releases=tuple(names),
                bad=bad | {name: str(fault) for name, fault in faults.items()},
                pending=None if state.intent is None else state.intent.what,
            )

    def open(self) -> Path:
        """
        The folder of the release to run, verified to the byte: current, else previous.

        Works on storage that cannot be written, and says so. UsageError if nothing was ever
        activated, BadFile if no sound release is left.
        """
        self._require()
        for _ in range(3):
            with self._leniently() as (state, can_write):
                links = self._shelf.links()
                found = self._choose(links, state, can_write=can_write)
                # A deploy under way may have exchanged the links, and collected what they named.
                if found is not None or can_write or links == self._shelf.links():
                    break
        if found is not None:
            return found
        raise BadFile(f"{self.app}: no sound release to run", hint="deploy the bundle again")

    # ------------------------------------------------------------ how it is done

    def _choose(self, links: Links, state: State, *, can_write: bool) -> Path | None:
        if links == Links():
            raise UsageError(f"{self.app}: no release was activated", hint="edgeexit deploy does")
        for release in dict.fromkeys(filter(None, (links.current, links.previous))):
            fault = self._shelf.fault(release)
            if fault is None:
                if release != links.current and can_write:
                    with suppress(StorageError):
                        self._switch(state, "rollback", Links(current=release))
                return self._shelf.release(release)
            goes_on = release == links.current and links.previous is not None
            then = f"; the previous one, {links.previous}, is tried" if goes_on else ""
            self._tell(f"{self.app}: release {release} is refused: {fault}{then}")
            if can_write and isinstance(fault, BadFile):
                with suppress(StorageError):
                    state = self._mark(state, release, "altered", fault)
        return None

    def _checked(self, release: str, folder: Path, check: Check, state: State) -> State:
        links = self._shelf.links()
        intent = Intent(what="check", release=release, before=links, after=links)
        state = self._shelf.write(replace(state, intent=intent))
        with self._clearing(state):
            try:
                check(folder)
            except _FAULTS as error:
                self._mark(state, release, "check", error)
                raise
        return replace(state, tries=_less(state.tries, release))

    @contextmanager
    def _clearing(self, state: State) -> Iterator[None]:
        """Take the intent back if the block fails: nothing has happened yet."""
        try:
            yield
        except BaseException:
            with suppress(EdgeExitError):
                if self._shelf.state()[0].intent is not None:
                    self._shelf.write(replace(state, intent=None))
            raise

    def _before(self, links: Links, release: str) -> Links:
        """The links when *release* runs: a release that is no longer sound is not gone back to."""
        is_sound = links.current is not None and self._shelf.fault(links.current) is None
        return Links(current=release, previous=links.current if is_sound else links.previous)

    def _switch(self, state: State, what: str, after: Links) -> None:
        assert after.current is not None
        intent = Intent(what=what, release=after.current, before=self._shelf.links(), after=after)
        self._settle(self._shelf.write(replace(state, intent=intent)), after)

    def _settle(self, state: State, links: Links) -> State:
        self._shelf.point(links)
        staged = None if state.staged == links.current else state.staged
        return self._shelf.write(replace(state, intent=None, staged=staged))

    def _mark(self, state: State, release: str, cause: str, why: object) -> State:
        others = list(_less(state.bad, release).items())[1 - _MAX_MARKS :]
        bad = dict(others) | {release: Mark(cause=cause, message=str(why)[:_MAX_MESSAGE])}
        staged = None if state.staged == release else state.staged
        return self._shelf.write(replace(state, intent=None, staged=staged, bad=bad))

    def _sound(self, release: str, state: State) -> Path:
        known = self._shelf.names()
        if release not in known:
            raise unknown(release, known, f"release of {self.app}")
        fault = self._shelf.fault(release)
        if fault is not None:
            if isinstance(fault, BadFile):
                self._mark(state, release, "altered", fault)
            raise fault
        return self._shelf.release(release)

    def _require(self) -> None:
        if not self._shelf.is_there:
            error = unknown(self.app, applications(self._home), "app on this board")
            raise UsageError(str(error), hint=error.hint or "edgeexit deploy brings one")

    # ------------------------------------------------------------ after a crash

    @contextmanager
    def _repaired(self) -> Iterator[State]:
        with self.locked():
            self._shelf.sweep()
            # One who was killed may have seen to the names, and not waited for the storage.
            self._shelf.settle()
            yield self._repair()

    @contextmanager
    def _leniently(self) -> Iterator[tuple[State, bool]]:
        """As _repaired, but whoever cannot write or wait gets the state as it stands, and False."""
        with ExitStack() as stack:
            state = None
            try:
                if self._shelf.is_there:
                    state = stack.enter_context(self._repaired())
            except Busy:
                pass  # whoever holds the lock sees to it
            except StorageError as error:
                self._tell(f"degraded: {error}")
            yield (self._peek(), False) if state is None else (state, True)

    def _peek(self) -> State:
        try:
            return self._shelf.state()[0]
        except StorageError:
            return State()

    def _repair(self) -> State:
        state, damage = self._shelf.state()
        if damage is not None:
            self._tell(f"{self.app}: what was noted is lost: {damage}")
            return self._shelf.write(state)
        intent = state.intent
        if intent is None:
            return state
        if intent.attempt > MOST_REPAIRS:
            self._tell(f"{self.app}: {intent.what} of {intent.release}: given up")
            return self._shelf.write(replace(state, intent=None))
        again = replace(intent, attempt=intent.attempt + 1)
        return _REPAIRS[intent.what](self, self._shelf.write(replace(state, intent=again)), intent)

    def _settle_install(self, state: State, intent: Intent) -> State:
        is_there = self._shelf.fault(intent.release) is None
        staged = intent.release if is_there else state.staged
        return self._shelf.write(replace(state, intent=None, staged=staged))

    def _settle_check(self, state: State, intent: Intent) -> State:
        tries = state.tries.get(intent.release, 0) + 1
        others = list(_less(state.tries, intent.release).items())[1 - _MAX_MARKS :]
        state = replace(state, intent=None, tries=dict(others) | {intent.release: tries})
        self._tell(f"{self.app}: the check of {intent.release} did not end")
        if tries < MOST_TRIES:
            return self._shelf.write(state)
        why = f"its check did not come to an end {tries} times"
        return self._mark(state, intent.release, "check", why)

    def _undo(self, state: State, intent: Intent) -> State:
        return self._settle_first(state, intent, intent.before, intent.after)

    def _finish(self, state: State, intent: Intent) -> State:
        return self._settle_first(state, intent, intent.after, intent.before)

    def _settle_first(self, state: State, intent: Intent, first: Links, second: Links) -> State:
        is_sound = first.current is None or self._shelf.fault(first.current) is None
        links = first if is_sound else second
        done = "finished" if links == intent.after else "undone"
        self._tell(f"{self.app}: {intent.what} of {intent.release} was cut short, and is {done}")
        return self._settle(state, links)


# In doubt the release that ran before runs: it has shown that it can.
_REPAIRS: Mapping[str, Callable[[Releases, State, Intent], State]] = {
    "install": Releases._settle_install,
    "check": Releases._settle_check,
    "activate": Releases._undo,
    "rollback": Releases._finish,
}


def _change(before: Links, after: Links) -> Change:
    return Change(current=after.current, previous=after.previous, was=before.current)


def _less(items: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in items.items() if key != name}
