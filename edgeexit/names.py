"""
Turn names into things: an entry of a dict, a "module:attribute", a data folder, a bundle, the home.

A wrong word is an error that lists the words there are (of many, the nearest and the first)
and the nearest one; nothing is guessed. Data folders are found both in an installed wheel and
in a checkout.
"""

import difflib
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from edgeexit.errors import UsageError, printable

T = TypeVar("T")

HOME = "EDGEEXIT_HOME"

_PACKAGE = Path(__file__).resolve().parent
# A network may have thousands of tensors: an error lists no more names than this.
_LISTED = 20


def unknown(name: str, known: Iterable[str], what: str) -> UsageError:
    """The error for a *name* that is not among the *known* names of a *what*."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=_LISTED)
    listed = known
    if len(known) > _LISTED:
        listed = [*near, *(other for other in known if other not in near)][:_LISTED]
    have = ", ".join(map(printable, listed)) or "none"
    if len(listed) < len(known):
        have += f" and {len(known) - len(listed)} more"
    return UsageError(
        f"no {what} named {name!r} (have: {have})",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def choose(name: str, table: Mapping[str, T], what: str) -> T:
    """Look *name* up in *table*, or say which names exist."""
    if name in table:
        return table[name]
    raise unknown(name, table, what)


def load_attribute(name: str, what: str) -> object:
    """The object named "package.module:attribute". Runs that module's code."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{what} {name!r}: expected the form package.module:attribute")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{what} {name!r}: cannot import {module_name}: {error}") from error
    if not hasattr(module, attribute):
        raise unknown(attribute, vars(module), f"attribute of {module_name}")
    return getattr(module, attribute)


def data_folder(kind: str) -> Path:
    """The folder of shipped data of one *kind* ("devices", "calibration", "examples")."""
    inside = _PACKAGE / "_data" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def only_bundle_here(folder: Path | None = None) -> Path:
    """The one *.edgeexit folder in *folder* (default: the current one)."""
    here = Path() if folder is None else folder
    found = sorted(path for path in here.glob("*.edgeexit") if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            "no bundle (*.edgeexit) in this folder",
            hint="name one, or make one with: edgeexit convert MODEL.pt",
        )
    raise UsageError(
        f"{len(found)} bundles in this folder: {', '.join(map(str, found))}",
        hint="name the one you mean",
    )


def board_home() -> Path:
    """Where edgeexit keeps things on this machine: $EDGEEXIT_HOME or the usual folder."""
    named = os.environ.get(HOME)
    return Path(named) if named else Path.home() / ".local" / "share" / "edgeexit"
