"""
Measuring a bundle on this board for a laptop: `edgeexit agent profile`.

Callers see profile. The instrument is the same as here and everywhere. Each measurement has a
folder, results/ID, named after all that decides about its values: the bundle as it came, the
notebook while it is measured, the profile until the laptop says that it has it. Whatever happens
to the link, the same order goes on from there.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit import instrument
from edgeexit.agent import Talk
from edgeexit.agent.delivery import LOCK
from edgeexit.blobs import Blobs
from edgeexit.blocks import Mode
from edgeexit.bundle import MANIFEST, Bundle, load_bundle
from edgeexit.collect import Limits, Progress, Step
from edgeexit.errors import BadFile, Busy, EdgeExitError, StorageError, UsageError, storage
from edgeexit.files import Table, file_digest, write_file
from edgeexit.locks import hold
from edgeexit.manifest import Manifest
from edgeexit.names import board_home

RESULTS = "results"
_TELL_S = 0.5
# Sending a line is work for sshd, too; the next round waits until that is over.
_SETTLE_S = 0.02
# How long the work of a link that broke may take to end.
_PATIENCE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What shall be measured: *device_toml* describes a board that this package does not know."""

    manifest: Manifest
    device: str
    device_toml: str | None
    mode: Mode
    threads: int
    cores: tuple[int, ...]
    limits: Limits
    meter: str | None
    resume: bool

    @classmethod
    def from_table(cls, table: Table) -> "_Order":
        """Read an order; BadFile or UsageError for what cannot be meant."""
        table.only(
            *("manifest", "device", "device_toml", "mode", "rate_hz", "threads", "cores"),
            *("processes", "precision", "time_cap_s", "meter", "resume"),
        )

        def optional(key: str, kind: type) -> Any:
            return None if table.values.get(key) is None else table.get(key, kind)

        return cls(
            manifest=Manifest.from_document(table.table("manifest")),
            device=table.get("device", str),
            device_toml=optional("device_toml", str),
            mode=Mode(name=table.get("mode", str), rate_hz=optional("rate_hz", float)),
            threads=table.get("threads", int),
            cores=tuple(table.list_of("cores", int)),
            limits=Limits(
                processes=table.get("processes", int),
                precision=table.get("precision", float),
                time_cap_s=table.get("time_cap_s", float),
            ),
            meter=optional("meter", str),
            resume=table.get("resume", bool),
        )

    @property
    def id(self) -> str:
        """The name of the measurement: a digest of all that decides about its values."""
        bundle = [entry.sha256 for entry in self.manifest.files if entry.path == MANIFEST]
        decisive = [
            *(bundle, self.device, self.device_toml, self.mode.name, self.mode.rate_hz),
            *(self.threads, self.cores, self.meter),
        ]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def profile(order: Table, talk: Talk) -> Mapping[str, Any]:
    """
    Measure what the *order* names, or go on with it, and hand the profile over.

    Asks for `blobs` that are not here ({"uploaded": true}), and for `fetch` (path, sha256,
    size_bytes) when the profile lies ready ({"fetched": true}), which then is removed.

    UsageError without `resume` if there is something to go on with, and with it if there is
    nothing; Busy while another measurement runs; DeviceError if this is another board.
    """
    asked = _Order.from_table(order)
    home = board_home()
    folder, lock = home / RESULTS / asked.id, home / RESULTS / "lock"
    done, book = folder / "profile.json", folder / "profile.json.part"
    patience_s = _PATIENCE_S if asked.resume else 0.0
    # Nobody is asked for anything under the lock: a link that is dead, but that the system still
    # believes in for hours, would lock everybody out.
    with _alone(lock, patience_s):
        _check_resume(folder, done, book, asked.resume)
    if not done.is_file():
        try:
            bundle, device = _prepared(asked, folder, Blobs(home), talk)
            with _alone(lock, patience_s):
                _measure(asked, bundle, device, book, done, talk)
        except Busy:
            raise
        except EdgeExitError:
            if not _has_begun(book):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    fetch = {"path": str(done), "sha256": file_digest(done), "size_bytes": done.stat().st_size}
    if talk.need(fetch=fetch).get("fetched", bool):
        with storage(folder):
            shutil.rmtree(folder)
        # What was uploaded may serve a deployment that follows, and goes an hour later.
        with suppress(StorageError, Busy), hold(home / LOCK, "this board"):
            Blobs(home).collect()
    return {"id": asked.id}


def _prepared(asked: _Order, folder: Path, blobs: Blobs, talk: Talk) -> tuple[Bundle, str]:
    """The bundle, and the device as measure takes it; DeviceError if this is another one."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    device = asked.device
    if asked.device_toml is not None:
        device = str(folder / "device.toml")
        write_file(Path(device), asked.device_toml.encode())
    instrument.check_device(device)
    return _bundle(folder / "bundle.edgeexit", blobs, asked.manifest, talk), device


def _measure(
    asked: _Order, bundle: Bundle, device: str, book: Path, done: Path, talk: Talk
) -> None:
    if done.is_file():  # by the one who was waited for
        return
    instrument.measure(
        bundle,
        device,
        mode=asked.mode,
        threads=asked.threads,
        cores=asked.cores,
        limits=asked.limits,
        meter=asked.meter,
        notebook=book,
        resume=asked.resume and _has_begun(book),
        on_step=_teller(talk),
        save=lambda found: found.save(done),
    )


def _has_begun(book: Path) -> bool:
    return book.exists() and book.stat().st_size > 0


@contextmanager
def _alone(lock: Path, patience_s: float) -> Iterator[None]:
    """Hold the *lock* of all measurements of this board; Busy if *patience_s* is not enough."""
    deadline = time.monotonic() + patience_s
    while True:
        held = hold(lock, "a measurement on this board")
        try:
            held.__enter__()
            break
        except Busy:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def _check_resume(folder: Path, done: Path, book: Path, resume: bool) -> None:
    if resume and not folder.is_dir():
        raise UsageError(
            f"{folder}: no unfinished measurement with these options to go on with",
            hint="measure without --resume",
        )
    if not resume and (done.exists() or _has_begun(book)):
        is_done = "finished, but not fetched" if done.exists() else "not finished"
        raise UsageError(
            f"{folder}: a measurement that was {is_done}",
            hint="--resume goes on with it; to begin anew remove that folder on the board",
        )


def _bundle(path: Path, blobs: Blobs, manifest: Manifest, talk: Talk) -> Bundle:
    """The bundle of *manifest*, made out of *blobs* if it does not lie at *path* yet."""
    if path.exists():
        try:
            return load_bundle(path)
        except BadFile:
            shutil.rmtree(path)  # the storage lost some of it: it is made anew
    missing = blobs.missing(manifest)
    if missing:
        talk.need(blobs=[entry.sha256 for entry in missing])
    blobs.build(manifest, path)
    return load_bundle(path)


def _teller(talk: Talk) -> Step:
    last_s = -_TELL_S

    def tell(progress: Progress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _TELL_S:
            talk.progress(**progress.to_document())
            time.sleep(_SETTLE_S)
            last_s = time.monotonic()

    return tell
