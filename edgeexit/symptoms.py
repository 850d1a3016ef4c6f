"""
What else uses a machine, and what is left: load, memory, swap, free space; and the date.

Callers see Finding, Patient (everything that is looked at) and CHECKS: a dict from the name of
a finding to the function that makes it, Patient -> Finding, or None where it means nothing
here. No check changes anything; `doctor` gathers the Patient. Text out of files is made
harmless before it is shown, and quoted where it stands in a command.

Which fact comes from where, files below the machine's root:

other load   proc/stat twice, proc/*/stat for who it is; proc/loadavg in a recorded tree
pressure     proc/pressure/cpu
memory       proc/meminfo
swap         proc/meminfo, proc/swaps
folders      statvfs and access rights of the current and of the temporary folder
wall clock   run/systemd/timesync/synchronized, else `timedatectl show`
"""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edgeexit.device import Device
from edgeexit.errors import printable
from edgeexit.machine import Machine
from edgeexit.state import Reading

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "unknown"

_SHOWN = 100
# No clock can be right that is before this version's own changes.
_WRITTEN = datetime(2026, 11, 21, tzinfo=UTC)
# Shares of one core that others may take, and that a hypervisor may.
_OTHERS, _STEAL = 0.05, 0.01
# Processor time is counted in ticks of 10 ms: one may fall on either side.
_TICKS_MS = 20.0
# In a recorded tree there is only the load, which counts the recorder as well.
_OTHERS_LOAD = 0.5
_TOP = "see with top who it is, and stop it"
_SWAP_MB = 16.0
# One process with numpy, the runtime and the shipped example: 53 MB at most, on x86-64.
_WORKER_MB = 64.0
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 100e6, 10e6


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One fact that can ruin a run, or one that does not; *status* is one of the four words.

    *seen* is what was found, *fix* the one command or step that mends it, *undo* the command
    that takes the fix back.
    """

    status: str
    seen: str
    fix: str | None = None
    undo: str | None = None


def ok(seen: str) -> Finding:
    """Nothing to mend."""
    return Finding(OK, seen)


def warning(seen: str, fix: str, undo: str | None = None) -> Finding:
    """Figures will be worse than they need be."""
    return Finding(WARNING, seen, fix, undo)


def failed(seen: str, fix: str) -> Finding:
    """Nothing can be measured so, or nothing that is worth it."""
    return Finding(FAILED, seen, fix)


def unknown(seen: str, fix: str | None = None) -> Finding:
    """The machine does not say."""
    return Finding(UNKNOWN, seen, fix)


@dataclass(frozen=True, kw_only=True)
class Process:
    """A program that ran beside us, and its share of one core."""

    pid: int
    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Free space of a folder, and whether this process may write there."""

    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, kw_only=True)
class Patient:
    """
    Everything the checks look at.

    *before* and *after* are readings with a pause in between, *busy* one right after a core
    computed; all three are one and the same for a recorded tree. *busiest* is the program that
    took most in the pause. *usable* are the cores that this process may run on (None: not
    known), *temporary* is the folder for temporary files, *now_s* the wall clock in seconds
    since 1970, *facts* is state.machine_facts.
    """

    machine: Machine
    device: Device
    facts: Mapping[str, Any]
    before: Reading
    after: Reading
    busy: Reading
    busiest: Process | None = None
    usable: frozenset[int] | None = None
    folder: Folder
    temporary: Folder
    now_s: float

    @property
    def is_raspberry(self) -> bool:
        """Whether this is a Raspberry Pi."""
        return str(self.facts["board"]).startswith("Raspberry Pi")


def shown(text: str, most: int = _SHOWN) -> str:
    """*text* out of a file, made fit to be shown: one line, no control characters, not endless."""
    safe = printable(" ".join(text[: 4 * most].split()))
    return safe if len(safe) <= most else f"{safe[:most]}..."


def quoted(text: str) -> str:
    """*text* out of a file as one harmless word of a shell command."""
    return shlex.quote(shown(text))


def tee(value: str, names: Iterable[str]) -> str:
    """The command that writes *value* into the files *names*."""
    return f"echo {quoted(value)} | sudo tee {' '.join(quoted(f'/{name}') for name in names)}"


# ---------------------------------------------------------------- other programs, memory


def other_load(patient: Patient) -> Finding | None:
    """What else runs on this machine."""
    before, after = patient.before, patient.after
    passed_ms = (after.at_ns - before.at_ns) / 1e6
    if passed_ms <= 0 or None in (before.busy_ms, after.busy_ms):
        if after.load_1m is None:
            return unknown("nothing tells it")
        seen = f"load {after.load_1m:.2f} over the last minute"
        return warning(seen, _TOP) if after.load_1m > _OTHERS_LOAD else ok(seen)
    own_ms = (after.own_ms or 0) - (before.own_ms or 0)
    share = max(0.0, (after.busy_ms or 0) - (before.busy_ms or 0) - own_ms) / passed_ms
    stolen = max(0.0, (after.steal_ms or 0) - (before.steal_ms or 0)) / passed_ms
    if stolen > _STEAL:
        return warning(
            f"the hypervisor took {stolen:.0%} of a core away",
            "measure on the board itself, or when the hypervisor's other guests rest",
        )
    seen, who = f"other programs take {share:.0%} of a core", patient.busiest
    if share <= _OTHERS + _TICKS_MS / passed_ms:
        return ok(seen)
    if who is None or who.share < share / 2:
        return warning(seen, _TOP)
    told = f"{shown(who.name)} (process {who.pid})"
    return warning(f"{seen}, most of it {told}", f"stop {told}, or wait for it")


def pressure(patient: Patient) -> Finding | None:
    """Whether the kernel tells how long programs waited for a core (PSI)."""
    machine = patient.machine
    if patient.after.pressure_us is not None:
        return ok("the kernel tells how long programs wait")
    line = next(
        (p for p in ("boot/firmware/cmdline.txt", "boot/cmdline.txt") if machine.exists(p)), None
    )
    return warning(
        "the kernel keeps no pressure figures: short disturbances may pass unseen",
        f"sudo sed -i '1 s/$/ psi=1/' /{line} && sudo reboot"
        if line
        else "add psi=1 to the kernel's command line, then reboot",
    )


def memory(patient: Patient) -> Finding | None:
    """Whether a worker of the profile fits without swapping."""
    free_mb = patient.after.memory_available_mb
    if free_mb is None:
        return unknown("/proc/meminfo does not tell")
    seen = f"{free_mb:.0f} MB free"
    if free_mb < 2 * _WORKER_MB:
        return Finding(
            FAILED if free_mb < _WORKER_MB else WARNING,
            f"{seen}; one process that measures takes about {_WORKER_MB:.0f} MB",
            "stop other programs; on a board with a desktop: sudo systemctl isolate multi-user",
            "sudo systemctl isolate graphical",
        )
    return ok(seen)


def swap(patient: Patient) -> Finding | None:
    """Whether memory was moved out to a disk or into zram."""
    used_mb = patient.after.swap_used_mb
    if used_mb is None:
        return unknown("/proc/meminfo does not tell")
    table = (patient.machine.text("proc/swaps") or "").splitlines()[1:]
    places = [line.split()[0] for line in table if line.split()]
    is_zram = bool(places) and all("zram" in place for place in places)
    kind = "zram" if is_zram else "a disk or card"
    if used_mb > _SWAP_MB:
        return warning(
            f"{used_mb:.0f} MB lie in {kind}: a page that comes back costs milliseconds",
            "sudo swapoff -a",
            "sudo swapon -a",
        )
    return ok(f"{used_mb:.0f} MB used" if places else "none")


# ---------------------------------------------------------------- free space, the date


def folder(patient: Patient) -> Finding | None:
    """Whether results can be written in the current folder."""
    return _space(patient.folder)


def temporary_folder(patient: Patient) -> Finding | None:
    """Whether the system's folder for temporary files takes more."""
    return _space(patient.temporary)


def _space(place: Folder) -> Finding:
    if not place.is_writable:
        return failed("this process may not write there", "cd ~, or mount it writable")
    seen = f"{place.free_bytes / 1e6:.0f} MB free"
    if place.free_bytes < _LITTLE_BYTES:
        judge = failed if place.free_bytes < _TOO_LITTLE_BYTES else warning
        return judge(seen, "remove what is not needed; du -xh --max-depth=2 / shows what is large")
    return ok(seen)


def wall_clock(patient: Patient) -> Finding | None:
    """Whether the date can be right: many boards have no clock that runs without power."""
    machine, step = patient.machine, "sudo timedatectl set-ntp true"
    try:
        now = datetime.fromtimestamp(patient.now_s, tz=UTC)
    except (OverflowError, OSError, ValueError):
        return failed(f"it says {patient.now_s:g} s since 1970", step)
    day = f"{now:%Y-%m-%d}"
    if now < _WRITTEN:
        return failed(f"it says {day}, before this version was written ({_WRITTEN:%Y-%m-%d})", step)
    said = machine.run(["timedatectl", "show", "-p", "NTPSynchronized", "--value"])
    is_set = machine.exists("run/systemd/timesync/synchronized") or (said or "").strip() == "yes"
    if is_set:
        return ok(f"{day}, synchronized")
    if said is None:
        return unknown(f"{day}; nothing tells if it is synchronized")
    return warning(f"{day}, not synchronized", step)


Check = Callable[[Patient], Finding | None]
CHECKS: dict[str, Check] = {
    "other load": other_load,
    "pressure": pressure,
    "memory": memory,
    "swap": swap,
    "folder": folder,
    "temporary folder": temporary_folder,
    "wall clock": wall_clock,
}
