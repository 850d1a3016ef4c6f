"""
How often the samples of a certificate were spent, in a file that lies beside them.

Callers see spend, which counts a use before anybody looks at the samples, find and next_use, which
only read, and share, what a use may still risk. Hidden here: a use is known by the digest of all
that went into it, so repeating a run costs nothing; every entry carries a digest over itself and
the one before, and the file is read only in the very bytes that were written, so that one altered
bit is seen. What no file can show is its own absence: deleting a ledger voids later promises.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, StorageError, UsageError, hinting, storage
from edgeexit.files import (
    Table,
    digest_of,
    encoded_json,
    json_bytes,
    parse_json,
    read_bytes,
    write_file,
)
from edgeexit.locks import hold
from edgeexit.samples import find_set, is_set

# 1: first version.
FORMAT = 1
FILE = "ledger.json"

_OWN = ("use", "request", "at", "digest")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RESTORE = "bring it back from a copy; without it, promises about its samples no longer hold"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """
    One use of a split: the use-th, for *request*, at an ISO 8601 time in UTC.

    facts are JSON values for people: what was asked for. digest is the SHA-256 over all of it,
    the split's key and the digest of the use before.
    """

    use: int
    request: str
    at: str
    facts: Mapping[str, Any]
    digest: str

    def to_document(self) -> dict[str, Any]:
        """The entry as it stands in the ledger, and in the policy that it was spent on."""
        return {
            "use": self.use,
            "request": self.request,
            **self.facts,
            "at": self.at,
            "digest": self.digest,
        }


def share(delta: float, use: int) -> float:
    """
    What the *use*-th use of a split may risk of *delta*: the shares of all uses sum to it.

    delta * 6 / (pi**2 * use**2); UsageError unless 0 < delta < 1 and use >= 1.
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta: {delta:g}, expected between 0 and 1")
    if use < 1:
        raise UsageError(f"use: {use}, expected 1 or more")
    return delta * 6 / (math.pi**2 * use**2)


def split_key(digests: NDArray[np.uint8]) -> str:
    """
    The name, in hexadecimal, of the split whose samples have *digests*, uint8 (N, bytes each).

    The order of the samples does not matter, nor what the split is called.
    """
    return digest_of(b"".join(sorted(row.tobytes() for row in digests)))


def request_digest(request: Mapping[str, Any]) -> str:
    """The digest of all that a use depends on, given as JSON values; key order is free."""
    return digest_of(_canonical(request))


def place(set_name: str, set_digest: str, record: Path | None) -> Path:
    """
    Where the ledger of a calibration set's samples lies: beside its set.toml.

    If that very set is not found here, it lies beside the file *record*, as RECORD.ledger.json.
    UsageError if there is neither.
    """
    if set_name and is_set(set_name):
        found = find_set(set_name)
        if found.digest == set_digest:
            return found.folder / FILE
    if record is None:
        raise UsageError(
            f"calibration set {set_name!r}: not found here, so its ledger neither",
            hint="go to the folder that holds it, or name the ledger with --ledger FILE",
        )
    return record.with_name(f"{record.name}.{FILE}")


def find(path: Path, key: str, request: str) -> Entry | None:
    """The use of split *key* for *request* in the ledger *path*, None if there is none."""
    return next((e for e in _uses(_read(path), key) if e.request == request), None)


def next_use(path: Path, key: str, request: str) -> int:
    """The number that spend would give; nothing is counted. BadFile as spend."""
    uses = _uses(_read(path), key)
    return next((e.use for e in uses if e.request == request), len(uses) + 1)


def spend(path: Path, key: str, request: str, facts: Mapping[str, Any]) -> Entry:
    """
    Count one use of split *key* in the ledger *path*, durably, before its samples are looked at.

    A *request* (SHA-256 in hexadecimal) that was counted before is the same use again, and keeps
    its number. *facts* are JSON values to remember. BadFile if the ledger is damaged or of another
    format, StorageError if it cannot be written: then nothing may be looked at.
    """
    if not (_DIGEST.fullmatch(key) and _DIGEST.fullmatch(request)):
        raise ValueError(f"expected two SHA-256 digests, found {key!r} and {request!r}")
    if clash := set(facts) & set(_OWN):
        raise ValueError(f"facts: {sorted(clash)} are the ledger's own keys")
    # Entries never go: one that is there needs neither the lock nor a storage that can be written.
    known = find(path, key, request)
    return known or _spend(path, key, request, facts)


def _spend(path: Path, key: str, request: str, facts: Mapping[str, Any]) -> Entry:
    real = Path(os.path.realpath(path))
    lock = real.with_name(f".{real.name}.lock")
    try:
        with hold(lock, "the ledger", wait=True):
            try:
                splits = _read(real)
                uses = _uses(splits, key)
                known = next((e for e in uses if e.request == request), None)
                if known is not None:
                    return known
                entry = _entry(key, uses, request, datetime.now(UTC).isoformat(), dict(facts))
                splits = {**splits, key: [*uses, entry]}
                write_file(real, _to_bytes(splits))
            finally:
                with storage(lock):
                    lock.unlink(missing_ok=True)
    except StorageError as error:
        raise StorageError(
            f"{path}: cannot count this use: {error}",
            hint="the samples were not looked at; name a ledger that can be written with "
            "--ledger FILE, always the same",
        ) from error
    return entry


def _entry(
    key: str, before: Sequence[Entry], request: str, at: str, facts: Mapping[str, Any]
) -> Entry:
    """The entry that follows *before* in split *key*."""
    body = {"use": len(before) + 1, "request": request, **facts, "at": at}
    chained = {"split": key, "before": before[-1].digest if before else "", "entry": body}
    return Entry(
        use=len(before) + 1,
        request=request,
        at=at,
        # As they will be read: tuples are lists in JSON.
        facts=json.loads(_canonical(facts)),
        digest=digest_of(_canonical(chained)),
    )


def _canonical(values: Mapping[str, Any]) -> bytes:
    return encoded_json(json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False))


def _to_bytes(splits: Mapping[str, Sequence[Entry]]) -> bytes:
    return json_bytes(
        {
            "format": FORMAT,
            "splits": {key: [e.to_document() for e in uses] for key, uses in splits.items()},
        }
    )


def _uses(splits: Mapping[str, Sequence[Entry]], key: str) -> Sequence[Entry]:
    return splits.get(key, ())


def _read(path: Path) -> dict[str, list[Entry]]:
    """Every use of every split; nothing if there is no file. BadFile if it is not as written."""
    if not path.exists():
        return {}
    data = read_bytes(path)
    with hinting(_RESTORE):
        table = parse_json(data, str(path))
        table.expect_format(FORMAT)
        table.only("format", "splits")
        splits = table.table("splits")
        found: dict[str, list[Entry]] = {}
        for key in splits.values:
            found[key] = []
            for row in splits.tables(key):
                found[key].append(_checked(row, key, found[key]))
        if _to_bytes(found) != data:
            raise BadFile(f"{path}: altered: not as edgeexit wrote it")
    return found


def _checked(row: Table, key: str, before: Sequence[Entry]) -> Entry:
    request, at, digest = (row.get(name, str) for name in ("request", "at", "digest"))
    facts = {name: value for name, value in row.values.items() if name not in _OWN}
    entry = _entry(key, before, request, at, facts)
    if row.get("use", int) != entry.use or digest != entry.digest:
        raise BadFile(f"{row.where}: altered: use, facts and digest do not belong together")
    if any(e.request == request for e in before):
        raise BadFile(f"{row.where}: request: stands twice for one split")
    return entry
