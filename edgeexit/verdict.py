"""
Whether a profile can be trusted: clean, disturbed, not converged or emulated, and why.

Callers see judge and unseen. Everything is concluded from the raw values that a profile holds,
so that an old profile can be judged anew. Each rule is one function from a profile to reasons;
every threshold stands at the top with the reason for it. A machine that does not say something
(its clock, its temperature) cannot be found guilty of it: unseen lists what it kept to itself.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from edgeexit import series
from edgeexit.blocks import (
    CLEAN,
    DISTURBED,
    EMULATED,
    NOT_CONVERGED,
    PACED,
    SUSTAINED,
    Block,
    Case,
    Process,
    Reason,
    Verdict,
)
from edgeexit.energy import Energy
from edgeexit.errors import printable
from edgeexit.profile import Profile
from edgeexit.state import Reading

# Bits of Reading.throttled: what is the case now; the same shifted: what ever was since boot.
_THROTTLE_BITS = (
    ("under-voltage", "the supply's voltage was too low (under-voltage)"),
    ("frequency-capped", "the firmware capped the clock"),
    ("throttled", "the processor was throttled"),
    ("temperature-limit", "the soft temperature limit was active"),
)
_SINCE_BOOT = 16
# Boards change their clock in steps of 100 MHz, 4.2 % of 2400; less is noise of the reading.
_CLOCK_FALL = 0.04
# A board that does nothing else spends 1 to 3 % of a core on its services. A tenth of a core
# already shows in medians where cores share a cache, a memory bus or a power budget.
_OTHER_LOAD = 0.10
# Half a core for a second is a program at work; services wake up for less.
_OTHER_BURST, _BURST_NS = 0.50, 1e9
# What a hypervisor takes is missing in the blocks; below 2 % their medians are safe.
_STEAL = 0.02
# The kernel counts these in hundredths of a second: shorter stretches show nothing.
_SHORTEST_NS = 3e8
# Starting a process takes seconds, heating up five minutes; after longer than this a run that was
# stopped has been resumed.
_RESUMED_NS = 400e9
# The share of time in which some program waited for a core. Without rivals it is below 1 %.
_PRESSURE = 0.10
# A thread that only computes is on its core for 99.9 % of a block; the timer's ticks take the rest.
_OFF_CPU = 0.02
# With fewer programs than cores nobody waits for as long as this without being stopped; beside
# several hogs it happens, and the load is told as well. Such a block also stands out from the
# quickest one of its path in that process.
_PAUSE_NS, _PAUSE_FACTOR = 100e6, 1.2
# Kernels move a few idle pages out at any time; this much means that memory is short.
_SWAP_MB = 16.0
# Beyond this, millijoules over milliseconds is no power that the board ever drew.
_OTHER_PACE = 0.10
# Sustained claims a steady state; a Pi's sensor wavers by one or two of its steps of 0.5 degrees.
_RISING_C = 2.0
# Where blocks resemble their neighbours more than this, something slow is at work and the
# intervals, which take a process's blocks as draws, are too narrow. Few blocks show that by
# chance: it has to stand out from its error.
_AUTOCORRELATION, _SURE = 0.3, 2.5
# Turns of the yardstick before each block (edgeexit.timing).
_TURNS = 9
_NAMED = 3

NO_EXITS = "without exits"


def judge(profile: Profile) -> Verdict:
    """What the raw values of *profile* say about it; the verdict it carries is not looked at."""
    emulated = [Reason(kind="emulated", text=text) for text in [profile.emulated] if text]
    disturbed = [reason for rule in _DISTURBANCES for reason in rule(profile)]
    wide = list(_precision(profile))
    status = CLEAN
    for name, found in ((NOT_CONVERGED, wide), (DISTURBED, disturbed), (EMULATED, emulated)):
        status = name if found else status
    return Verdict(status=status, reasons=(*emulated, *disturbed, *wide))


def unseen(profile: Profile) -> list[str]:
    """What this machine does not tell, and what "clean" hence does not rule out."""
    readings = list(_readings(profile))
    told = {
        "clock": any(reading.clocks_mhz for reading in readings),
        "temperature": any(reading.temperature_c is not None for reading in readings),
        "throttling": any(reading.throttled is not None for reading in readings),
        "other load": any(reading.busy_ms is not None for reading in readings),
    }
    return [name for name, is_told in told.items() if not is_told]


def watched(profile: Profile) -> list[Case]:
    """The paths whose intervals decide: each exit with all exits kept, and none but the final."""
    wanted = [(profile.exits, name) for name in profile.exits]
    found = [profile.case(kept, name) for kept, name in wanted]
    return list(dict.fromkeys([*(case for case in found if case is not None), profile.full]))


def named(profile: Profile, case: Case) -> str:
    """What a watched path is called."""
    return NO_EXITS if case == profile.full else printable(case.exit)


def _readings(profile: Profile) -> Iterator[Reading]:
    """All readings, in order of time."""
    yield profile.before
    for process in profile.processes:
        yield from process.readings
    yield profile.after


# ---------------------------------------------------------------- the machine


def _throttling(profile: Profile) -> Iterator[Reason]:
    bits = [r.throttled for r in _readings(profile) if r.throttled is not None]
    for place, (kind, text) in enumerate(_THROTTLE_BITS):
        now = sum(value >> place & 1 for value in bits)
        ever = [value >> (_SINCE_BOOT + place) & 1 for value in bits]
        if now:
            yield Reason(kind=kind, text=f"{text} in {now} of {len(bits)} readings")
        elif ever and max(ever) > ever[0]:
            yield Reason(kind=kind, text=f"{text} for a moment between two readings")


def _clock(profile: Profile) -> Iterator[Reason]:
    # Governors lower the clock of an idle machine: only readings behind a first block count, and
    # where inputs come one at a time, only those of a clock that is held.
    is_held = {"performance"}
    clocks = [
        max(reading.clocks_mhz)  # cores that we do not use may rest
        for process in profile.processes
        for reading in process.readings
        if reading.clocks_mhz and reading.at_ns > process.blocks[0].at_ns
        if profile.mode.name != PACED or set(reading.governors) == is_held
    ]
    if not clocks:
        return
    before = np.maximum.accumulate(clocks)
    worst = int(np.argmin(np.array(clocks) / before))
    if clocks[worst] < before[worst] * (1 - _CLOCK_FALL):
        text = f"clock fell from {before[worst]:.0f} to {clocks[worst]:.0f} MHz"
        yield Reason(kind="clock", text=text)


def _temperature(profile: Profile) -> Iterator[Reason]:
    if profile.mode.name != SUSTAINED:
        return
    seen = [r.temperature_c for p in profile.processes for r in p.readings]
    degrees = [value for value in seen if value is not None]
    third = len(degrees) // 3
    if third and (rise := np.median(degrees[-third:]) - np.median(degrees[:third])) > _RISING_C:
        text = f"still {rise:.1f} degrees warmer at the end than at the beginning"
        yield Reason(kind="temperature", text=text)


def _swap(profile: Profile) -> Iterator[Reason]:
    used = [r.swap_used_mb for r in _readings(profile) if r.swap_used_mb is not None]
    if used and max(used) - used[0] > _SWAP_MB:
        text = f"swap in use grew by {max(used) - used[0]:.0f} MB: memory is short"
        yield Reason(kind="swap", text=text)


# ---------------------------------------------------------------- rivals for the cores


def _other_load(profile: Profile) -> Iterator[Reason]:
    whole, burst = _worst(profile, _others), _worst(profile, _others, _bursts)
    if whole and whole[0] > _OTHER_LOAD:
        yield Reason(kind="load", text=f"other programs took {whole[0]:.0%} of a core {whole[1]}")
    elif burst and burst[0] > _OTHER_BURST:
        text = f"other programs took {burst[0]:.0%} of a core for a while {burst[1]}"
        yield Reason(kind="load", text=text)


def _others(blocks: Sequence[Block], first: Reading, last: Reading) -> float | None:
    busy_ms, own_ms = _grown(first.busy_ms, last.busy_ms), _grown(first.own_ms, last.own_ms)
    used_ms = _used_ms(blocks, first, last)
    # The readings' own_ms counts a timing process only after its end.
    return None if busy_ms is None else busy_ms - max(own_ms or 0.0, used_ms)


def _used_ms(blocks: Sequence[Block], first: Reading, last: Reading) -> float:
    """CPU time behind the blocks: their calls, one more before them, the yardstick's turns."""
    inside = [block for block in blocks if first.at_ns <= block.at_ns < last.at_ns]
    # Where no clock counts CPU time, a call's time stands for it.
    calls_ns = sum((b.calls + 1) * (b.cpu_ns or b.mean_ns) for b in inside)
    return (calls_ns + sum(_TURNS * b.yardstick_ns for b in inside)) / 1e6


def _steal(profile: Profile) -> Iterator[Reason]:
    worst = _worst(profile, lambda _, first, last: _grown(first.steal_ms, last.steal_ms))
    if worst and worst[0] > _STEAL:
        yield Reason(kind="steal", text=f"the hypervisor took {worst[0]:.1%} of a core {worst[1]}")


def _pressure(profile: Profile) -> Iterator[Reason]:
    worst = _worst(profile, lambda _, first, last: _grown(first.pressure_us, last.pressure_us))
    if worst and worst[0] / 1e3 > _PRESSURE:
        text = f"programs waited for a core {worst[0] / 1e3:.0%} of the time {worst[1]}"
        yield Reason(kind="pressure", text=text)


Stretch = tuple[Reading, Reading]


def _whole(readings: Sequence[Reading]) -> list[Stretch]:
    """From the first reading to the last one."""
    return [(readings[0], readings[-1])] if len(readings) > 1 else []


def _bursts(readings: Sequence[Reading]) -> list[Stretch]:
    """Stretches of at least a second that follow each other."""
    found: list[Stretch] = []
    for reading in readings:
        if not found or found[-1][1].at_ns - found[-1][0].at_ns >= _BURST_NS:
            found.append((found[-1][1] if found else reading, reading))
        else:
            found[-1] = (found[-1][0], reading)
    return [(a, b) for a, b in found if b.at_ns - a.at_ns >= _BURST_NS]


def _worst(
    profile: Profile,
    grown: Callable[[Sequence[Block], Reading, Reading], float | None],
    stretches: Callable[[Sequence[Reading]], list[Stretch]] = _whole,
) -> tuple[float, str] | None:
    """How much grew in a millisecond of the worst stretch of a process, and of which one."""
    found = []
    for where, blocks, readings in _spells(profile):
        for first, last in stretches(readings):
            value, spent_ns = grown(blocks, first, last), last.at_ns - first.at_ns
            if value is not None and spent_ns >= _SHORTEST_NS:
                found.append((value / spent_ns * 1e6, where))
    return max(found, default=None)


def _spells(profile: Profile) -> Iterator[tuple[str, Sequence[Block], Sequence[Reading]]]:
    """Each process, and the whole run with the time between processes."""
    for number, process in enumerate(profile.processes, 1):
        where = f"(process {number} of {len(profile.processes)})"
        yield where, process.blocks, process.readings
    blocks = [block for process in profile.processes for block in process.blocks]
    first, last = profile.before, profile.after
    # A run that was resumed began under another parent, whose count of own_ms is not this one's,
    # and what happened in the meantime is nobody's business.
    edges = [(first.at_ns, first.at_ns), *((p.began_ns, p.ended_ns) for p in profile.processes)]
    is_one_run = all(0 <= began - ended < _RESUMED_NS for (_, ended), (began, _) in pairwise(edges))
    if is_one_run and (_grown(first.own_ms, last.own_ms) or 0) >= _used_ms(blocks, first, last):
        yield "(whole run)", blocks, (first, last)


def _grown(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else last - first


# ---------------------------------------------------------------- the timing process


def _off_core(profile: Profile) -> Iterator[Reason]:
    # Several threads wait for each other, and a paced process idles on purpose.
    if profile.threads > 1 or profile.mode.name == PACED:
        return
    blocks = [block for process in profile.processes for block in process.blocks]
    if not any(block.cpu_ns for block in blocks):
        return  # no clock of CPU time
    wall_ns = sum(block.mean_ns * block.calls for block in blocks)
    lost_ns = wall_ns - sum(block.cpu_ns * block.calls for block in blocks)
    paused = [block for process in profile.processes for block in _paused(process)]
    if paused:
        longest_ms = max((b.mean_ns - b.cpu_ns) * b.calls for b in paused) / 1e6
        text = f"the timing process was stopped, or had to wait, for up to {longest_ms:.0f} ms "
        yield Reason(kind="paused", text=f"{text}in {len(paused)} of {len(blocks)} blocks")
        lost_ns -= sum((block.mean_ns - block.cpu_ns) * block.calls for block in paused)
    if lost_ns > _OFF_CPU * wall_ns:
        text = f"the timing process had no core for {lost_ns / wall_ns:.0%} of the timed blocks"
        yield Reason(kind="off-core", text=text)


def _paused(process: Process) -> list[Block]:
    least = {case: process.values(case).min() for case in {b.case for b in process.blocks}}
    return [
        block
        for block in process.blocks
        if (block.mean_ns - block.cpu_ns) * block.calls > _PAUSE_NS
        and block.mean_ns > _PAUSE_FACTOR * least[block.case]
    ]


def _yardstick(profile: Profile) -> Iterator[Reason]:
    blocks = [(process, block) for process in profile.processes for block in process.blocks]
    began_ns = profile.processes[0].began_ns
    places = {
        "over the run": [(b.yardstick_ns, (b.at_ns - began_ns) / 1e9) for _, b in blocks],
        "within processes": [(b.yardstick_ns, (b.at_ns - p.began_ns) / 1e9) for p, b in blocks],
    }
    for where, points in places.items():
        values, times = zip(*points, strict=True)
        found = series.trend(values, times)
        if found is None:
            continue
        if found.steps():
            text = f"the yardstick loop became {_change(found.step)} {where}, from "
            text += f"{found.began:.0f} s to {found.ended:.0f} s"
            yield Reason(kind="step", text=text)
        elif found.drifts():
            text = f"the yardstick loop became {_change(found.drift)} {where}"
            yield Reason(kind="drift", text=text)


def _autocorrelation(profile: Profile) -> Iterator[Reason]:
    values = [p.values(case) for case in range(len(profile.cases)) for p in profile.processes]
    found = series.autocorrelation(values)
    if found is None:
        return
    # The blocks of one round share what the machine did: count rounds, not blocks.
    correlation, error = found[0], found[1] * len(profile.cases) ** 0.5
    if correlation > max(_AUTOCORRELATION, _SURE * error):
        text = f"a block resembles the one before it (autocorrelation {correlation:.2f})"
        yield Reason(kind="autocorrelation", text=text)


def _change(share: float) -> str:
    return f"{abs(share):.1%} {'slower' if share > 0 else 'faster'}"


# ---------------------------------------------------------------- the figures


def _energy(profile: Profile) -> Iterator[Reason]:
    if profile.energy is not None:
        for text in profile.energy.reasons(lambda k: named(profile, profile.cases[k])):
            yield Reason(kind="energy", text=text)
        yield from _other_pace(profile, profile.energy)


def _other_pace(profile: Profile, energy: Energy) -> Iterator[Reason]:
    """Joules and milliseconds are of one machine only if calls took as long in both parts."""
    if energy.pace_hz is not None:
        return
    found = []
    for place in energy.cases:
        windows = [window for window in energy.windows if window.case == place]
        per_call_ns = sum(w.duration_s for w in windows) * 1e9 / sum(w.calls for w in windows)
        found.append((per_call_ns / profile.value_ns(profile.cases[place]) - 1, place))
    change, place = max(found, key=lambda pair: abs(pair[0]))
    if abs(change) > _OTHER_PACE:
        name = named(profile, profile.cases[place])
        text = f"calls of {name} were {_change(change)} in the joule windows than in timed blocks"
        yield Reason(kind="energy", text=text)


def _precision(profile: Profile) -> Iterator[Reason]:
    """Which exits' intervals are wider than was asked for."""
    if len(profile.processes) < 2:
        yield Reason(kind="precision", text="one process alone does not tell how processes differ")
        return
    widths = sorted(
        ((profile.latency(case).half_width, case) for case in watched(profile)),
        key=lambda pair: -pair[0],
    )
    wide = [(width, case) for width, case in widths if width > profile.precision]
    if not wide:
        return
    listed = ", ".join(f"{named(profile, case)} ± {width:.2%}" for width, case in wide[:_NAMED])
    more = f" and {len(wide) - _NAMED} more" if len(wide) > _NAMED else ""
    text = f"asked for ± {profile.precision:.2%}, found {listed}{more}"
    yield Reason(kind="precision", text=text)


_DISTURBANCES: tuple[Callable[[Profile], Iterator[Reason]], ...] = (
    _throttling,
    _clock,
    _temperature,
    _swap,
    _other_load,
    _steal,
    _pressure,
    _off_core,
    _yardstick,
    _autocorrelation,
    _energy,
)
