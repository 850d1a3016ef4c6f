"""
Measuring a bundle on a board from here.

Callers see measure and Board. The measuring itself is the board's own (`edgeexit agent
profile`); hidden here: the bundle goes over, the board must be the device that was asked for,
what it says while it measures arrives as the instrument's Progress, and the profile is taken off
the board only when it lies here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit import __version__
from edgeexit.blocks import Mode
from edgeexit.bundle import Bundle
from edgeexit.collect import Limits, Progress, Step
from edgeexit.device import HOST, device_names, find_device
from edgeexit.errors import BadFile, DeviceError, printable
from edgeexit.files import MAX_DOCUMENT_BYTES, Table, digest_of, parse_json
from edgeexit.manifest import Manifest
from edgeexit.profile import Profile
from edgeexit.remote.broken import understood
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Item, Link, LinkLost, connect
from edgeexit.request import check_profile


@dataclass(frozen=True, kw_only=True)
class Board:
    """
    The board at the other end: the *device* that it is measured as.

    *measuring* holds the numbers of the processes that measure there already.
    """

    device: str
    measuring: list[int]


async def measure(
    host: Host,
    bundle: Bundle,
    device_name: str | None,
    *,
    mode: Mode,
    threads: int | None,
    cores: Sequence[int] | None,
    limits: Limits,
    meter: str | None,
    resume: bool,
    save: Callable[[Profile], object],
    on_board: Callable[[Board], object] = lambda board: None,
    on_bytes: Callable[[int, int], object] = lambda done, total: None,
    on_step: Step | None = None,
) -> Profile:
    """
    Measure *bundle* on the board *host*, which must be the device that was asked for.

    Options as instrument.measure takes them; those that are None are the device's own. *on_board*
    learns which board answered, *on_bytes* how much of the bundle has arrived, of how much. The
    board keeps the profile until *save* has been given it.

    LinkLost if the link ends before; the board then stops, and *resume* goes on from there. What
    the board refuses is raised as the error that it is there.
    """
    async with connect(host) as link:
        board = await _meet(link, device_name or host.device, is_known=resume)
        kind = find_device(device_name or board.device)
        on_board(board)
        talk = _Talk(link, bundle, board.device, save, on_bytes)
        order = {
            "manifest": talk.manifest.to_document(),
            "device": kind.name,
            "device_toml": _toml(device_name),
            "mode": mode.name,
            "rate_hz": mode.rate_hz,
            "threads": threads or kind.threads,
            "cores": list(kind.pin if cores is None else cores),
            "processes": limits.processes,
            "precision": limits.precision,
            "time_cap_s": limits.time_cap_s,
            "meter": meter,
            "resume": resume,
        }

        def tell(said: Mapping[str, Any]) -> None:
            if on_step is None:
                return
            with understood(host):
                progress = Progress.from_document(Table(said, f"{host.name}: progress"))
            on_step(progress)

        try:
            await link.agent("profile", order, on_progress=tell, on_need=talk.answer)
        except LinkLost:
            if talk.saved is None:  # else only the last word was lost
                raise
        if talk.saved is None:
            raise DeviceError(f"{host.name}: the board gave no profile")
        return talk.saved


async def _meet(link: Link, device_name: str | None, *, is_known: bool) -> Board:
    """
    Who answers; DeviceError if it is another device, another version or has no runtime.

    A board that *is_known* has run its runtime before and is not asked to try it out.
    """
    name = link.host.name
    facts = Table(await link.agent("hello", {"quick": is_known}), f"{name}: hello")
    setup = f"edgeexit setup {name}"
    with understood(link.host):
        version = facts.get("edgeexit", str)
        if version != __version__:
            raise DeviceError(
                f"{name}: has edgeexit {printable(version)}, here is {__version__}", hint=setup
            )
        trial = {} if is_known else facts.table("trial").values
        if not is_known and (trial.get("runtime") is None or trial.get("died") is not None):
            reason = printable(str(trial.get("died") or trial.get("error") or "none is installed"))
            raise DeviceError(f"{name}: no runtime works there: {reason}", hint=setup)
        is_a, measuring = facts.get("device", str), facts.list_of("measuring", int)
    if is_a not in device_names():  # it becomes part of a file's name here
        raise DeviceError(f"{name}: says that it is a {printable(is_a[:80])!r}", hint=setup)
    if device_name is None:
        return Board(device=is_a, measuring=measuring)
    kind, model = find_device(device_name), facts.values.get("model")
    if kind.name not in (is_a, HOST) and not (isinstance(model, str) and kind.matches(model)):
        text = printable(repr(model)) if model is not None else "missing"
        raise DeviceError(
            f"{name}: expected a {kind.title} ({kind.name!r}), found {printable(is_a)!r}: its "
            f"model text is {text}",
            hint=f"--device {printable(is_a)}, or name another host",
        )
    return Board(device=kind.name, measuring=measuring)


def _toml(device_name: str | None) -> str | None:
    """The description of a device that is a file of one's own, for the board to read."""
    if device_name is None or not device_name.endswith(".toml"):
        return None
    return Path(device_name).read_text(encoding="utf-8")


class _Talk:
    """Answers what the board needs: first the bundle, in the end somebody to take the profile."""

    def __init__(
        self,
        link: Link,
        bundle: Bundle,
        device_name: str,
        save: Callable[[Profile], object],
        on_bytes: Callable[[int, int], object],
    ) -> None:
        self.manifest = Manifest.from_folder(bundle.path)
        self.saved: Profile | None = None
        self._link, self._bundle, self._device = link, bundle, device_name
        self._save, self._on_bytes = save, on_bytes

    async def answer(self, need: Mapping[str, Any]) -> Mapping[str, Any]:
        """What to answer when the board says that it needs something."""
        table = Table(need, f"{self._link.host.name}: need")
        if "blobs" in table:
            with understood(self._link.host):
                wanted = set(table.list_of("blobs", str))
            await self._upload(wanted)
            return {"uploaded": True}
        with understood(self._link.host):
            fetch = table.table("fetch")
            path, sha256 = fetch.get("path", str), fetch.get("sha256", str)
            if not path.isprintable():
                raise BadFile(f"{fetch.where}: path: {printable(path[:80])}")
        await self._take(path, sha256)
        return {"fetched": True}

    async def _upload(self, wanted: set[str]) -> None:
        items = {
            entry.sha256: Item(
                content=self._bundle.path / entry.path,
                sha256=entry.sha256,
                size_bytes=entry.size_bytes,
            )
            for entry in self.manifest.files
            if entry.sha256 in wanted
        }
        total, done = sum(item.size_bytes for item in items.values()), 0

        def arrived(count: int) -> None:
            nonlocal done
            done += count
            self._on_bytes(done, total)

        await self._link.upload(list(items.values()), on_bytes=arrived)

    async def _take(self, path: str, sha256: str) -> None:
        place = f"{self._link.host.name}: {printable(path)}"
        data = await self._link.fetch(path, limit_bytes=MAX_DOCUMENT_BYTES)
        if digest_of(data) != sha256:
            raise BadFile(f"{place}: altered on its way", hint="the same command with --resume")
        found = Profile.from_document(parse_json(data, place))
        check_profile(self._bundle, found, self._device)
        self._save(found)
        self.saved = found
