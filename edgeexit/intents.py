"""
What an application's state.json holds: what is about to happen, and what was learnt of releases.

Callers see State, Intent, Links and Mark. Hidden here: how they are written, and that nothing which
stands in such a file may name anything but a release.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import BadFile
from edgeexit.files import Table

# 1: first version.
FORMAT = 1

_ID = re.compile(r"[0-9a-f]{16}")


def is_release(name: str) -> bool:
    """Whether *name* can be that of a release."""
    return _ID.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Links:
    """Which release runs, and which one ran before it."""

    current: str | None = None
    previous: str | None = None

    def to_document(self) -> dict[str, Any]:
        """The links as a JSON object."""
        return {"current": self.current, "previous": self.previous}

    @classmethod
    def from_document(cls, table: Table) -> "Links":
        """Read what to_document wrote."""
        table.only("current", "previous")
        return cls(current=_release(table, "current"), previous=_release(table, "previous"))


@dataclass(frozen=True, kw_only=True)
class Intent:
    """
    What is about to happen to *release*, and the links before it and after it.

    what is "install", "check", "activate" or "rollback"; attempt counts who has tried so far.
    """

    what: str
    release: str
    before: Links
    after: Links
    attempt: int = 1

    @property
    def named(self) -> set[str | None]:
        """The releases that finishing or undoing it may need."""
        links = (self.before, self.after)
        return {self.release, *(link.current for link in links), *(link.previous for link in links)}

    def to_document(self) -> dict[str, Any]:
        """The intent as a JSON object."""
        return {
            "what": self.what,
            "release": self.release,
            "from": self.before.to_document(),
            "to": self.after.to_document(),
            "attempt": self.attempt,
        }

    @classmethod
    def from_document(cls, table: Table) -> "Intent":
        """Read what to_document wrote."""
        table.only("what", "release", "from", "to", "attempt")
        release, what = _release(table, "release"), table.get("what", str)
        if release is None or what not in ("install", "check", "activate", "rollback"):
            raise BadFile(f"{table.where}: {what[:40]!r} is nothing that happens to a release")
        return cls(
            what=what,
            release=release,
            before=Links.from_document(table.table("from")),
            after=Links.from_document(table.table("to")),
            attempt=table.get("attempt", int),
        )


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Why a release is bad: its bytes were "altered", or it failed its "check"."""

    cause: str
    message: str


@dataclass(frozen=True, kw_only=True)
class State:
    """
    The intent, if any; the release installed last and not yet activated; bad releases.

    tries counts the checks of a release that did not come to an end.
    """

    intent: Intent | None = None
    staged: str | None = None
    bad: Mapping[str, Mark] = field(default_factory=dict)
    tries: Mapping[str, int] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """The state as a JSON object."""
        return {
            "format": FORMAT,
            "intent": None if self.intent is None else self.intent.to_document(),
            "staged": self.staged,
            "bad": {name: [mark.cause, mark.message] for name, mark in self.bad.items()},
            "tries": dict(self.tries),
        }

    @classmethod
    def from_document(cls, table: Table) -> "State":
        """Read what to_document wrote."""
        table.expect_format(FORMAT)
        table.only("format", "intent", "staged", "bad", "tries")
        bad, tries = table.table("bad"), table.table("tries")
        marks = {name: bad.list_of(name, str, length=2) for name in bad.values}
        has_intent = table.values.get("intent") is not None
        return cls(
            intent=Intent.from_document(table.table("intent")) if has_intent else None,
            staged=_release(table, "staged"),
            bad={name: Mark(cause=mark[0], message=mark[1]) for name, mark in marks.items()},
            tries={name: tries.get(name, int) for name in tries.values},
        )


def _release(table: Table, key: str) -> str | None:
    if table.values.get(key) is None:
        return None
    text = table.get(key, str)
    if not is_release(text):
        raise BadFile(f"{table.where}: {key}: {text[:40]!r} is no release")
    return text
