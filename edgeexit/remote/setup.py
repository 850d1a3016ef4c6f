"""
Put edgeexit on a board that has only Python, ask it how it is, and take it away again.

Callers see Wish, Stock, set_up, take_away and ask_doctor; each is work for one board. Hidden here:
what is looked at first, that boards of one kind share one set of wheels, that only what is missing
is sent, and that a second call finds nothing to do. What happens on the board is `onboard`.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import (
    KINDS,
    BadFile,
    DeviceError,
    EdgeExitError,
    Unsupported,
    kind_of,
    printable,
)
from edgeexit.files import Table, digest_of, json_bytes, parse_json
from edgeexit.remote import fitting, onboard, probe
from edgeexit.remote.broken import understood
from edgeexit.remote.fan import Outcome
from edgeexit.remote.fitting import Plan
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Done, Item, Link, LinkLost, connect
from edgeexit.remote.probe import Board
from edgeexit.remote.talk import last_line
from edgeexit.remote.wheelhouse import Target, Wheelhouse, wheels_for

FORMAT = 1
Say = Callable[[Host, str], None]

_PROBE_S, _INSTALL_S, _DOCTOR_S = 300.0, 3600.0, 600.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """
    What the user asked for: *camera* sees the system's packages, *again* makes it anew.

    *wheels* is a folder to take wheels from instead of the registry, *refresh* asks the registry
    for newer ones.
    """

    camera: bool = False
    again: bool = False
    refresh: bool = False
    wheels: Path | None = None


class Stock:
    """The wheels for all boards of one call: fetched once for each kind of board."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self._found: dict[Target, asyncio.Task[Wheelhouse]] = {}

    async def wheels(self, plan: Plan, say: Callable[[str], None]) -> Wheelhouse:
        """The wheels for *plan*; *say* hears what is being done."""
        target = Target(
            python=plan.python.minor,
            machine=plan.machine,
            libc=plan.libc,
            requirements=plan.requirements,
            borrowed=plan.borrowed,
        )
        if target not in self._found:
            work = asyncio.to_thread(
                wheels_for,
                target,
                source=self.wish.wheels,
                refresh=self.wish.refresh,
                on_step=say,
            )
            self._found[target] = asyncio.create_task(work)
        return await asyncio.shield(self._found[target])


@contextmanager
def _of(host: Host) -> Iterator[None]:
    """Let every refusal begin with the board's name."""
    try:
        yield
    except EdgeExitError as error:
        if str(error).startswith(f"{host.name}: "):
            raise
        raise _named(host, type(error), str(error), error.hint) from error


def _named(host: Host, kind: type[EdgeExitError], message: str, hint: str | None) -> EdgeExitError:
    # Of kinds below the documented ones only the documented one can be made anew.
    kind = next(k for k in kind.__mro__ if k in (*KINDS.values(), EdgeExitError))
    return kind(f"{host.name}: {message}", hint=hint)


async def set_up(host: Host, stock: Stock, say: Say = lambda host, step: None) -> Outcome:
    """
    Make *host* run this edgeexit; Outcome.changed is False if it did already.

    What was in use stays in use until the new environment has passed its self-test on the board.
    Every refusal is an EdgeExitError that begins with the board's name.
    """
    with _of(host):
        async with connect(host) as link:
            say(host, "looking at the board")
            board = await look(link)
            plan = fitting.plan(board, camera=stock.wish.camera, now_s=time.time())
            wheels = await stock.wheels(plan, lambda step: say(host, step))
            order = _order(board, plan, wheels, stock.wish)
            sent, found = 0, await _standing(link, board, plan, order, say)
            if found is None:
                sent = await _send(link, wheels, say)
                say(host, "installing, and running the self-test")
                found = await _onboard(link, plan.python.path, {**order, "do": "install"})
            say(host, "asking its doctor")
            findings = await _findings(link)
            with understood(host):
                facts = _facts(order, plan, found, findings, sent)
    is_new = found.values.get("built", False) or found.values.get("changed", False)
    return Outcome(facts=facts, changed=is_new)


async def look(link: Link) -> Board:
    """What the board at the other end says of itself."""
    done = await link.run(["sh", "-s"], stdin=probe.SCRIPT.encode(), timeout_s=_PROBE_S)
    return probe.parse(done.out.decode(errors="replace"))


def _order(board: Board, plan: Plan, wheels: Wheelhouse, wish: Wish) -> dict[str, Any]:
    """What `onboard` is asked to do, and in it the setup.json that the environment will hold."""
    listed = [{"name": wheel.name, "sha256": wheel.sha256} for wheel in wheels.installed]
    installer = {"name": wheels.installer.name, "sha256": wheels.installer.sha256}
    content = {
        "python": [plan.python.path, plan.python.minor],
        "sees_system": plan.sees_system,
        "wheels": sorted(wheel["sha256"] for wheel in listed),
    }
    name = digest_of(json_bytes(content))[:16]
    setup = {
        "format": FORMAT,
        "id": name,
        "edgeexit": wheels.version("edgeexit"),
        "runtime": f"{plan.runtime} {wheels.version(plan.runtime)}",
        "python": {"path": plan.python.path, "version": list(plan.python.version)},
        "numpy": wheels.version("numpy") or plan.python.system.get("numpy"),
        "sees_system": plan.sees_system,
        "wheels": listed,
        "installer": installer,
    }
    return {
        "home": board.home,
        "id": name,
        "wheels": listed,
        "installer": installer,
        "sees_system": plan.sees_system,
        "camera": wish.camera,
        "again": wish.again,
        "setup": setup,
    }


async def _standing(
    link: Link, board: Board, plan: Plan, order: dict[str, Any], say: Say
) -> Table | None:
    """What the environment in use says if it is the one that is wanted, and works; else None."""
    if order["again"] or (board.current or {}).get("id") != order["id"]:
        return None
    say(link.host, "running the self-test")
    try:
        return await _onboard(link, plan.python.path, {**order, "do": "check"})
    except LinkLost:
        raise
    except EdgeExitError:
        pass
    # It is damaged: it is made again from its wheels.
    order["again"] = True
    return None


async def _send(link: Link, wheels: Wheelhouse, say: Say) -> int:
    """Upload the wheels that the board does not have; how many bytes that took."""
    total, done = sum(wheel.size_bytes for wheel in wheels.all), 0

    def count(arrived: int) -> None:
        nonlocal done
        done += arrived
        say(link.host, f"sending wheels: {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    items = [
        Item(content=wheel.path, sha256=wheel.sha256, size_bytes=wheel.size_bytes)
        for wheel in wheels.all
    ]
    return (await link.upload(items, on_bytes=count)).sent_bytes


async def _onboard(link: Link, python: str, order: Mapping[str, Any]) -> Table:
    """The result of *order*, carried out by the board's own *python*."""
    program = Path(onboard.__file__).read_bytes()
    done = await link.run(
        [python, "-I", "-", json.dumps(order)], stdin=program, timeout_s=_INSTALL_S
    )
    for line in reversed(done.out.splitlines()):
        if not line.startswith((b'{"result"', b'{"error"')):
            continue
        with understood(link.host):
            said = parse_json(line, f"{link.host.name}: setup")
            if "result" in said:
                return said.table("result")
            refusal = _refusal(link.host, said.table("error"))
        raise refusal
    raise DeviceError(f"{python} ended with code {done.code}: {last_line(done.err)}")


def _refusal(host: Host, said: Table) -> EdgeExitError:
    hint = said.values.get("hint")
    return _named(
        host,
        kind_of(said.get("exit_code", int)),
        printable(said.get("message", str)),
        printable(hint) if isinstance(hint, str) else None,
    )


async def _findings(link: Link) -> Table | None:
    """What the board's own quick doctor says; None if it does not."""
    try:
        done = await _doctor(link, ["--quick", "--json"])
        return parse_json(done.out[done.out.index(b"{") :], f"{link.host.name}: doctor")
    except LinkLost:
        raise
    except (ValueError, BadFile, DeviceError):
        return None


async def _doctor(link: Link, arguments: Sequence[str]) -> Done:
    program = await link.program()
    if program is None:
        raise link.absent()
    return await link.run([program, "doctor", *arguments], timeout_s=_DOCTOR_S)


def _facts(
    order: Mapping[str, Any], plan: Plan, found: Table, findings: Table | None, sent: int
) -> dict[str, Any]:
    setup, selftest = order["setup"], found.table("selftest")
    facts: dict[str, Any] = {
        "edgeexit": setup["edgeexit"],
        "runtime": setup["runtime"],
        "python": plan.python.minor,
        "numpy": setup["numpy"],
        "selftest": f"ok, {printable(selftest.get('summary', str))}",
        "sent_mb": round(sent / 1e6, 1),
        "environment": order["id"],
    }
    warnings = list(plan.notes)
    camera = found.values.get("camera")
    if isinstance(camera, str):
        warnings.append(printable(f"picamera2 does not load: {camera}"))
    if findings is None:
        warnings.append("its doctor does not answer")
    else:
        facts["doctor"] = {key: findings.get(key, int) for key in ("problems", "warnings")}
    facts["warnings"] = warnings
    return facts


# ---------------------------------------------------------------- afterwards


async def take_away(host: Host, *, everything: bool, dry: bool) -> Outcome:
    """
    Remove edgeexit's environments from *host*, with *everything* also all else in its folder.

    *dry* only tells what would go: facts "removed" holds [name, bytes] of each. Busy if a process
    runs from there.
    """
    with _of(host):
        async with connect(host) as link:
            board = await look(link)
            python = next((p.path for p in board.pythons if p.version >= (3, 10, 0)), None)
            if python is None:
                raise Unsupported(
                    "no Python 3.10 or newer on this board to remove it with",
                    hint=f"look into {board.home} and remove it by hand",
                )
            order = {"do": "uninstall", "home": board.home, "everything": everything, "dry": dry}
            found = await _onboard(link, python, order)
            with understood(host):
                facts = {
                    "removed": [_sized(host, pair) for pair in found.list_of("removed", list)],
                    "left": found.list_of("left", str),
                    "home": found.get("home", str),
                }
    return Outcome(facts=facts, changed=bool(facts["removed"]))


def _sized(host: Host, pair: Sequence[object]) -> tuple[str, int]:
    table = Table(dict(zip(("name", "bytes"), pair, strict=False)), f"{host.name}: removed")
    return table.get("name", str), table.get("bytes", int)


async def ask_doctor(host: Host, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and text of `edgeexit doctor ARGUMENTS` on *host*; DeviceError without setup."""
    with _of(host):
        async with connect(host) as link:
            done = await _doctor(link, arguments)
            text = done.out.decode(errors="replace")
            if not text.strip():
                raise DeviceError(
                    f"its doctor fails: {last_line(done.err)}", hint=f"edgeexit setup {host.name}"
                )
    return done.code, text
