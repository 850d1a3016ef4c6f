"""
Everything that ruins a run on a board, each with the one command or step that mends it.

Callers see examine, table, to_document and count. Hidden here: how the machine is looked at
(two readings with a pause, one more while a core computes, a child process that tries the
runtime, a meter between rest and load), and that a check that goes wrong ends as a finding of
its own and not the doctor. What is judged how stands in `installation` (Python and its wheels),
`vitals` (processor, clock, heat, supply) and `symptoms` (load, memory, space, date), with the
sources of every fact; device, emulation and meter are judged here.
"""

import hashlib
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

from edgeexit import __version__, installation, symptoms, vitals
from edgeexit.device import Device, find_device, identify
from edgeexit.errors import DeviceError, EdgeExitError, UsageError
from edgeexit.installation import Installation, this_installation
from edgeexit.machine import Machine
from edgeexit.meters import NONE, find_meters, open_meter, parse_spec
from edgeexit.meters.check import LoadTest, load_test
from edgeexit.state import emulation, machine_facts, read_state
from edgeexit.symptoms import (
    FAILED,
    OK,
    UNKNOWN,
    WARNING,
    Finding,
    Folder,
    Patient,
    Process,
    failed,
    ok,
    quoted,
    shown,
    unknown,
    warning,
)

P = ParamSpec("P")

MARKS = {OK: "[ok]", WARNING: "[!]", FAILED: "[x]", UNKNOWN: "[?]"}
BUG = "a bug in edgeexit"
MODELLED = "modelled"

# The meter's test: at least so long, and long enough for so many readings in each third.
_TEST_S, _LONGEST_TEST_S, _READINGS = 3.0, 30.0, 6
_PAUSE_S = 1.0
_COMPUTING_S = 0.3


def examine(
    machine: Machine,
    device_name: str | None = None,
    meter: str | None = None,
    *,
    is_quick: bool = False,
    here: Installation | None = None,
) -> dict[str, Finding]:
    """
    All findings by name. *device_name* and *meter* (a spec) are what the user means to use.

    *is_quick* leaves out what takes seconds: the child process, the readings under load, the
    meter's test. *here* replaces what this Python tells of itself. UsageError or BadFile if
    there is no such device.
    """
    asked = find_device(device_name) if device_name else None
    device = asked or find_device(identify(machine).name)
    if here is None:
        here = this_installation(machine, is_quick=is_quick)
    found: dict[str, Finding | None] = {
        "device": _shielded(_device, machine, asked),
        "emulation": _shielded(_emulation, machine),
    }
    for name, look in installation.CHECKS.items():
        found[name] = _shielded(look, here)
    try:
        patient = _patient(machine, device, is_quick=is_quick)
    except Exception as error:
        found["machine"] = _bug(error)
    else:
        for name, check in {**vitals.CHECKS, **symptoms.CHECKS}.items():
            found[name] = _shielded(check, patient)
    found["meter"] = _shielded(_meter, machine, device, meter, is_quick)
    return {name: finding for name, finding in found.items() if finding is not None}


def _shielded(
    check: Callable[P, Finding | None], *args: P.args, **kwargs: P.kwargs
) -> Finding | None:
    try:
        return check(*args, **kwargs)
    except UsageError:
        raise  # the user's own words, not the machine's state
    except EdgeExitError as error:
        return unknown(str(error), error.hint)
    except Exception as error:
        return _bug(error)


def _bug(error: Exception) -> Finding:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return unknown(shown(f"{BUG}: {type(error).__name__} at {place}: {error}"), "please report it")


# ---------------------------------------------------------------- looking


def _patient(machine: Machine, device: Device, *, is_quick: bool) -> Patient:
    """Read the machine: once if it is a tree or there is no time, else three times."""
    facts = machine_facts(machine)
    usable = frozenset(os.sched_getaffinity(0)) if machine.is_live else None
    first = read_state(machine)
    before, after, busy, busiest = first, first, first, None
    if machine.is_live and not is_quick:
        ticks = _ticks(machine)
        before = read_state(machine)
        time.sleep(_PAUSE_S)
        after = read_state(machine)
        busiest = _busiest(ticks, _ticks(machine), (after.at_ns - before.at_ns) / 1e9)
        _compute(_COMPUTING_S)
        busy = read_state(machine)
    return Patient(
        machine=machine,
        device=device,
        facts=facts,
        before=before,
        after=after,
        busy=busy,
        busiest=busiest,
        usable=usable,
        folder=_folder(Path()),
        temporary=_folder(Path(tempfile.gettempdir())),
        now_s=time.time(),
    )


def _compute(seconds: float) -> None:
    end, block = time.monotonic() + seconds, bytes(1 << 16)
    while time.monotonic() < end:
        hashlib.sha256(block)


def _folder(path: Path) -> Folder:
    try:
        # Absolute: a current folder that somebody removed still answers to ".".
        place = path.resolve(strict=True)
        free_bytes = shutil.disk_usage(place).free
    except OSError:
        return Folder(free_bytes=0, is_writable=False)
    return Folder(free_bytes=free_bytes, is_writable=os.access(place, os.W_OK | os.X_OK))


def _ticks(machine: Machine) -> dict[int, tuple[str, int]]:
    """Name and used processor time, in ticks, of every other process."""
    found = {}
    for place in machine.glob("proc/[0-9]*/stat"):
        # A program's name may hold blanks and brackets.
        head, _, rest = (machine.text(place) or "").rpartition(")")
        pid, _, name = head.partition(" (")
        times = rest.split()[11:13]
        if len(times) == 2 and all(word.isdecimal() for word in (pid, *times)):
            found[int(pid)] = (name, sum(map(int, times)))
    found.pop(os.getpid(), None)
    return found


def _busiest(
    before: Mapping[int, tuple[str, int]], after: Mapping[int, tuple[str, int]], seconds: float
) -> Process | None:
    used = {pid: ticks - before[pid][1] for pid, (_, ticks) in after.items() if pid in before}
    if not used:
        return None
    pid = max(used, key=lambda each: used[each])
    share = used[pid] / os.sysconf("SC_CLK_TCK") / seconds
    return Process(pid=pid, name=after[pid][0], share=share)


# ---------------------------------------------------------------- device, emulation, meter


def _device(machine: Machine, asked: Device | None) -> Finding:
    """Whether the board is known, and is the one that the user means."""
    this = identify(machine)
    told = f" ({shown(this.model)})" if this.model else ""
    if asked is not None and asked.name != this.name:
        return warning(
            f"{asked.name} was asked for, this is {this.name}{told}",
            f"leave --device out, or run this on a {asked.title}",
        )
    if this.pattern is None and machine.exists("proc/device-tree/model"):
        return warning(
            f"no file in devices/ is for this board{told}", "write one as devices/README.md says"
        )
    return ok(f"{this.name}{told}")


def _emulation(machine: Machine) -> Finding:
    """Whether times taken here mean anything."""
    reason = emulation(machine)
    if reason is None:
        return ok("no sign of it")
    return warning(f"{reason}: times mean nothing for a board", "measure on the board itself")


def _meter(machine: Machine, device: Device, spec: str | None, is_quick: bool) -> Finding:
    """Whether energy can be measured, and whether the meter sees a core at work."""
    if spec == NONE:
        return ok("none is wanted: no joules")
    if spec is None:
        found = find_meters(machine, device)
        usable = [f.spec for f in found if f.info is not None and f.info.label != MODELLED]
        if not usable:
            # Of the kinds that sit on boards only the one that this kind of board has.
            others = {MODELLED, "pmic", "jetson"} - {device.meter}
            blind = [f for f in found if f.reason and parse_spec(f.spec).kind not in others]
            reasons = [shown(f"{f.spec}: {f.reason}", 300) for f in blind[:3]]
            return unknown(
                "; ".join(reasons) or "none found: joules can only be modelled",
                "wire one, or name one with --meter (edgeexit meters list)",
            )
        spec = usable[0]
    again = f"edgeexit meters test {quoted(spec)}"
    try:
        meter = open_meter(spec, machine, device)
    except DeviceError as error:
        return failed(str(error), error.hint or again)
    try:
        seen = f"{shown(spec)}: {shown(meter.info.instrument)}, {meter.info.label}"
        if is_quick or not machine.is_live:
            return ok(f"{seen} (not tried)")
        seconds = max(_TEST_S, 3 * _READINGS / meter.info.rate_hz)
        if seconds > _LONGEST_TEST_S:
            return unknown(f"{seen}; it is slow", f"{again} --seconds {seconds:.0f}")
        return _judged(seen, load_test(meter, device, seconds=seconds), again)
    except DeviceError as error:
        return failed(f"{seen}: {error}", error.hint or again)
    finally:
        meter.close()


def _judged(seen: str, test: LoadTest, again: str) -> Finding:
    watts = f"{seen}: {test.power_mw['idle'] / 1e3:.2f} W idle, {test.step_mw / 1e3:+.2f} W busy"
    bad = [found.text for found in test.findings if found.is_bad]
    if bad:
        return failed(f"{watts}; {bad[0]}", again)
    if test.findings:
        return warning(f"{watts}; {test.findings[0].text}", again)
    return ok(watts)


# ---------------------------------------------------------------- showing


def count(findings: Mapping[str, Finding], status: str) -> int:
    """How many findings have this *status*."""
    return sum(finding.status == status for finding in findings.values())


def to_document(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """The object that `edgeexit doctor --json` prints."""
    return {
        "edgeexit": __version__,
        "problems": count(findings, FAILED),
        "warnings": count(findings, WARNING),
        "unknown": count(findings, UNKNOWN),
        "findings": [
            {
                "name": name,
                "status": finding.status,
                "seen": finding.seen,
                "fix": finding.fix,
                "undo": finding.undo,
            }
            for name, finding in findings.items()
        ],
    }


def table(findings: Mapping[str, Finding]) -> str:
    """One line for each finding, what mends it below, and the sum at the end."""
    width = max(map(len, findings), default=0)
    lines = []
    for name, finding in findings.items():
        lines.append(f"{MARKS[finding.status]:4}  {name:{width}}  {finding.seen}")
        for word, text in (("fix:", finding.fix), ("undo:", finding.undo)):
            if text is not None:
                lines.append(f"{'':6}{'':{width}}  {word:5} {text}")
    words = {"problem": FAILED, "warning": WARNING}
    sums = {word: count(findings, status) for word, status in words.items()}
    said = [f"{number} {word}{'s' * (number != 1)}" for word, number in sums.items()]
    lines += ["", ", ".join([*said, f"{count(findings, UNKNOWN)} unknown"])]
    return "\n".join(lines)
