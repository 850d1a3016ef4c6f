"""
What a board's files tell about whether its measurements will be worth anything: cores and load.

Callers see Finding, Patient (everything that is looked at) and CHECKS: a dict from the name of
a finding to the function that makes it, Patient -> Finding, or None where it means nothing
here. No check changes anything; `doctor` gathers the Patient and adds what is no file. Text out
of files is made harmless before it is shown, and quoted where it stands in a command.

Which fact comes from where, all below the machine's root:

processor    proc/cpuinfo: "Features" (ARM) or "flags" (x86)
cores        sys/devices/system/cpu/{present,online,isolated}, cpufreq/policy*/related_cpus
cpu quota    proc/self/cgroup, sys/fs/cgroup/**/cpu.max or cpu.cfs_quota_us
other load   proc/stat twice, proc/*/stat for who it is; proc/loadavg in a recorded tree
pressure     proc/pressure/cpu
memory       proc/meminfo
swap         proc/meminfo, proc/swaps
wall clock   run/systemd/timesync/synchronized, else `timedatectl show`
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edgeexit.device import Device
from edgeexit.errors import printable
from edgeexit.machine import Machine, finite
from edgeexit.state import Reading

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "unknown"

_CPU = "sys/devices/system/cpu"
_MOST_CORES = 4096
_MOST_GROUPS = 64
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
class Patient:
    """
    Everything the checks look at.

    *before* and *after* are readings with a pause in between, *busy* one right after a core
    computed; all three are one and the same for a recorded tree. *busiest* is the program that
    took most in the pause. *usable* are the cores that this process may run on (None: not
    known), *now_s* is the wall clock in seconds since 1970, *facts* is state.machine_facts.
    """

    machine: Machine
    device: Device
    facts: Mapping[str, Any]
    before: Reading
    after: Reading
    busy: Reading
    busiest: Process | None = None
    usable: frozenset[int] | None = None
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


# ---------------------------------------------------------------- the processor

# What int8 gains, by whether there are dot products. Counted under emulation with -icount: one
# MobileNet v2 int8 takes 113.8 million instructions on an A72 and 49.2 on an A76. Published in
# XNNPACK's README, February 2022, Pi 4 in 64 bit: float 46 ms, int8 17 ms.
_GAINS = {
    True: "; with dotprod MobileNet v2 takes 49 million instructions in int8, without it 114",
    False: ", no dotprod; int8 gains all the same: MobileNet v2 17 ms on a Pi 4, in float 46",
}


def processor(patient: Patient) -> Finding | None:
    """What int8 kernels will find: vector units and dot products."""
    isa = patient.facts["isa"]
    listed = re.search(r"^(Features|flags)\s*:", patient.machine.text("proc/cpuinfo") or "", re.M)
    if not isa:
        return (
            unknown("/proc/cpuinfo lists no features")
            if listed is None
            else failed(
                "no vector unit (NEON, SSE 4.1): the runtime's kernels need one",
                "take a board with a 64-bit ARM processor (Zero 2 W, Pi 3 and later)",
            )
        )
    gain = _GAINS["dotprod" in isa] if "neon" in isa else ""
    return ok(f"{shown(patient.facts['cpu'] or 'unnamed')}: {', '.join(isa)}{gain}")


def core_list(text: str | None) -> tuple[int, ...] | None:
    """The cores that the kernel writes as "0-3,6"; None if *text* is no such list."""
    found: set[int] = set()
    for part in (text or "").split(",") if text else ():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= _MOST_CORES:
            return None
        found.update(range(first, last + 1))
    return tuple(sorted(found)) if text else None


def _as_list(cores: Iterable[int]) -> str:
    """Cores as the kernel writes them."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def cores(patient: Patient) -> Finding | None:
    """Cores that are there, switched on, and ours to use."""
    machine = patient.machine
    online = core_list(machine.line(f"{_CPU}/online"))
    present = core_list(machine.line(f"{_CPU}/present")) or online
    if online is None or present is None:
        return unknown("the kernel lists no cores")
    off = sorted(set(present) - set(online))
    if off:
        is_jetson = machine.exists("etc/nv_tegra_release")
        return warning(
            f"{len(off)} of {len(present)} cores are switched off: {_as_list(off)}",
            "sudo nvpmodel -m 0"
            if is_jetson
            else tee("1", (f"{_CPU}/cpu{core}/online" for core in off)),
        )
    isolated = set(core_list(machine.line(f"{_CPU}/isolated")) or ())
    usable = set(online) if patient.usable is None else set(patient.usable)
    if set(online) - isolated - usable:
        return warning(
            f"this process may use cores {_as_list(usable)} only, of {_as_list(online)}",
            "start it without taskset, or give the container all cores (--cpuset-cpus)",
        )
    kinds = [f"{_as_list(own)} up to {mhz:.0f} MHz" for own, mhz in _kinds(machine)]
    told = f" ({', '.join(kinds)})" if len(kinds) > 1 else ""
    return ok(f"{len(online)} of {len(present)} online{told}")


def _kinds(machine: Machine) -> list[tuple[set[int], float]]:
    """Cores by their highest clock: a chip of two kinds of cores has two."""
    kinds: dict[float, set[int]] = {}
    for policy in machine.glob(f"{_CPU}/cpufreq/policy*"):
        top_khz = machine.number(f"{policy}/cpuinfo_max_freq")
        own = core_list((machine.line(f"{policy}/related_cpus") or "").replace(" ", ","))
        if top_khz is not None and own:
            kinds.setdefault(top_khz / 1e3, set()).update(own)
    return [(own, mhz) for mhz, own in sorted(kinds.items())]


def isolated_cores(patient: Patient) -> Finding | None:
    """Cores that the kernel keeps free of other programs, and whether we are on them."""
    isolated = core_list(patient.machine.line(f"{_CPU}/isolated"))
    if not isolated:
        return None
    listed = _as_list(isolated)
    if patient.usable is not None and set(isolated) <= patient.usable:
        return ok(f"{listed}, and this process may use them")
    return warning(
        f"{listed} are kept free of other programs, but this process is not on them",
        f"taskset -c {listed} edgeexit profile",
    )


def cpu_quota(patient: Patient) -> Finding | None:
    """A container's or a service's share of the processor, after which it must pause."""
    machine = patient.machine
    shares = [share for share in _quotas(machine) if share is not None]
    online = core_list(machine.line(f"{_CPU}/online")) or (0,)
    if not shares or min(shares) >= len(online):
        return ok("none")
    share = min(shares)
    return Finding(
        FAILED if share < 1 else WARNING,
        f"the control group grants {share:.2f} of {len(online)} cores, then pauses us",
        "start the container without --cpus, the service without CPUQuota",
    )


def _quotas(machine: Machine) -> Iterable[float | None]:
    """Cores that each control group above this process grants; None: no limit."""
    for line in (machine.text("proc/self/cgroup") or "0::/").splitlines()[:_MOST_GROUPS]:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = "sys/fs/cgroup" + ("" if number == "0" else f"/{controllers}")
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(min(len(parts), _MOST_GROUPS) + 1):
            folder = "/".join([top, *parts[:depth]])
            if number == "0":
                quota, _, period = (machine.line(f"{folder}/cpu.max") or "").partition(" ")
                granted, of = finite(quota), finite(period)
            else:
                granted = machine.number(f"{folder}/cpu.cfs_quota_us")
                of = machine.number(f"{folder}/cpu.cfs_period_us")
            # "max", and -1 in the first version, mean no limit.
            yield granted / of if granted and of and granted > 0 and of > 0 else None


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


# ---------------------------------------------------------------- the wall clock


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
    "processor": processor,
    "cores": cores,
    "isolated cores": isolated_cores,
    "cpu quota": cpu_quota,
    "other load": other_load,
    "pressure": pressure,
    "memory": memory,
    "swap": swap,
    "wall clock": wall_clock,
}
