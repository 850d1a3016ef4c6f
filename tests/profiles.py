"""Profiles made of numbers instead of runs: a quiet one, and ways to disturb it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from edgeexit.blocks import CLEAN, Block, Case, Mode, Process, Verdict
from edgeexit.energy import IDLE, Energy, Trace, Window
from edgeexit.meters import MeterInfo
from edgeexit.profile import Profile
from edgeexit.state import Reading

EXITS = ("exit0", "exit1", "exit2")
DIGEST = "b" * 64
MACHINE = {
    "board": "Raspberry Pi 4 Model B Rev 1.4",
    "cores": 4,
    "cores_usable": 4,
    "max_clocks_mhz": [1800.0],
    "kernel": "6.6.31",
    "machine": "aarch64",
}
_BLOCK_NS = 20e6
_JIFFY_MS = 10.0


def all_cases(exits: Sequence[str] = EXITS) -> tuple[Case, ...]:
    """Every exit of every set of kept exits, the largest first."""
    sizes = range(len(exits), 0, -1)
    sets = [kept for size in sizes for kept in combinations(exits, size)]
    return tuple(Case(kept=kept, exit=exit) for kept in sets for exit in kept)


def watched_cases(exits: Sequence[str] = EXITS) -> tuple[Case, ...]:
    """Only each exit with all exits kept, and the network without exits."""
    full = [Case(kept=tuple(exits), exit=exit) for exit in exits]
    return (*full, Case(kept=tuple(exits[-1:]), exit=exits[-1]))


def added_cost(case: Case, exits: Sequence[str] = EXITS) -> float:
    """Nanoseconds: 300 us for each segment on the way, 30 us for each head that runs."""
    return 300e3 * (exits.index(case.exit) + 1) + 30e3 * (case.kept.index(case.exit) + 1)


def built_profile(
    *,
    exits: Sequence[str] = EXITS,
    processes: int = 10,
    rounds: int = 12,
    luck: float = 0.004,
    spread: float = 0.003,
    seed: int = 0,
    cost: Callable[[Case], float] | None = None,
    yardstick_ns: float = 250e3,
    **more: Any,
) -> Profile:
    """
    What a quiet Raspberry Pi 4 could have said.

    A process's costs differ by *luck*, its blocks by *spread* (standard deviations as shares).
    *more* are fields of Profile.
    """
    rng = np.random.default_rng(seed)
    cases = more.pop("cases", all_cases(exits))
    price = cost or (lambda case: added_cost(case, exits))
    costs = [price(case) for case in cases]
    now_ns, busy_ms, ended_ms = 10**12, 5e6, 0.0
    found: list[Process] = []
    for number in range(processes):
        now_ns += 300_000_000
        # A process starts for 300 ms; the parent sees what it used when it has ended.
        busy_ms += 300.0
        began_ns, own_ms = now_ns, ended_ms
        lucky = np.exp(luck * rng.normal(size=len(cases)))
        mine = yardstick_ns * float(np.exp(0.001 * rng.normal()))
        blocks: list[Block] = []
        readings = [_reading(now_ns, busy_ms, own_ms)]
        for _ in range(rounds):
            start_ns = now_ns
            for place in rng.permutation(len(cases)):
                calls = max(1, round(_BLOCK_NS / costs[place]))
                singles = costs[place] * lucky[place] * np.exp(spread * rng.normal(size=9))
                mean_ns = float(np.median(singles)) * float(np.exp(spread * rng.normal()))
                blocks.append(
                    Block(
                        case=int(place),
                        at_ns=now_ns,
                        calls=calls,
                        mean_ns=mean_ns,
                        cpu_ns=mean_ns * 0.999,
                        yardstick_ns=mine * float(np.exp(0.002 * rng.normal())),
                        calls_ns=tuple(int(value) for value in singles),
                    )
                )
                now_ns += int((calls + 1) * mean_ns + 9 * mine) + 100_000
            took_ms = (now_ns - start_ns) / 1e6
            ended_ms += took_ms
            busy_ms += took_ms * float(rng.uniform(1.0, 1.02))
            readings.append(_reading(now_ns, busy_ms, own_ms))
        ended_ms += 300.0
        found.append(
            Process(
                seed=number,
                began_ns=began_ns,
                ended_ns=now_ns,
                warmup_ns=tuple((int(5 * c), int(1.2 * c), int(c), int(c)) for c in costs),
                settled=(2,) * len(cases),
                blocks=tuple(blocks),
                readings=tuple(readings),
            )
        )
    fields: dict[str, Any] = {
        "device": "rpi4",
        "bundle_digest": DIGEST,
        "bundle_name": "made",
        "exits": tuple(exits),
        "mode": Mode(),
        "runtime": "ai-edge-litert 2.0.3",
        "delegate": "XNNPACK",
        "threads": 1,
        "cores": (),
        "seed": seed,
        "precision": 0.01,
        "time_cap_s": 60.0,
        "cases": cases,
        "processes": tuple(found),
        "machine": MACHINE,
        "before": replace(_reading(10**12 - 10**8, 5e6, 0.0), clocks_mhz=(600.0,)),
        "after": _reading(now_ns + 10**8, busy_ms, ended_ms),
        "verdict": Verdict(status=CLEAN),
        "measured_at": "2026-01-02T03:04:05Z",
    }
    return Profile(**{**fields, **more})


def built_energy(per_call_mj: float, seed: int = 0) -> Energy:
    """Five windows for each path, 4 s of 20 samples a second each, and idle ones between."""
    rng = np.random.default_rng(seed)
    at_s, windows, times, power = 0.0, [], [], []
    for case in [IDLE, *[k for _ in range(5) for k in (0, 1, 2, 3)], IDLE]:
        mw = 2000.0 if case == IDLE else 4000.0 + 100 * case
        calls = 0 if case == IDLE else round(mw * 4 / (per_call_mj * (case + 1)))
        began = round(at_s * 1e9)
        windows.append(Window(case=case, began_ns=began, ended_ns=began + 4 * 10**9, calls=calls))
        times += [at_s + k / 20 for k in range(80)]
        power += list(mw * np.exp(0.002 * rng.normal()) + rng.normal(0, 5, 80))
        at_s += 4.0
    info = MeterInfo(
        kind="ina219", label="external", instrument="INA219", boundary="the board", rate_hz=20.0
    )
    trace = Trace(np.array([round(t * 1e9) for t in times]), np.array(power).round(3), False)
    return Energy(info=info, trace=trace, windows=tuple(windows))


def with_blocks(profile: Profile, change: Callable[[float, Block], Block]) -> Profile:
    """*change* gets the share of the run that is over (0..1) and each block."""
    return _changed(profile, "blocks", change)


def with_readings(profile: Profile, change: Callable[[float, Reading], Reading]) -> Profile:
    """*change* gets the share of the run that is over (0..1) and each reading of a process."""
    return _changed(profile, "readings", change)


def without_readings(profile: Profile) -> Profile:
    """*profile* of a machine that says nothing between rounds."""
    bare = tuple(replace(process, readings=()) for process in profile.processes)
    return replace(profile, processes=bare)


def slowed(block: Block, factor: float) -> Block:
    """*block* on a machine that is *factor* times slower, its yardstick too."""
    return replace(
        block,
        mean_ns=block.mean_ns * factor,
        cpu_ns=block.cpu_ns * factor,
        yardstick_ns=block.yardstick_ns * factor,
        calls_ns=tuple(int(value * factor) for value in block.calls_ns),
    )


def _changed(profile: Profile, what: str, change: Callable[[float, Any], Any]) -> Profile:
    began, ended = profile.processes[0].began_ns, profile.processes[-1].ended_ns
    return replace(
        profile,
        processes=tuple(
            replace(
                process,
                **{
                    what: tuple(
                        change((item.at_ns - began) / (ended - began), item)
                        for item in getattr(process, what)
                    )
                },
            )
            for process in profile.processes
        ),
    )


def _reading(at_ns: int, busy_ms: float, own_ms: float) -> Reading:
    return Reading(
        at_ns=at_ns,
        clocks_mhz=(1800.0,),
        governors=("ondemand",),
        temperature_c=54.0,
        throttled=0,
        load_1m=0.5,
        busy_ms=busy_ms // _JIFFY_MS * _JIFFY_MS,
        steal_ms=0.0,
        own_ms=own_ms // _JIFFY_MS * _JIFFY_MS,
        pressure_us=0.0,
        memory_available_mb=3000.0,
        swap_used_mb=0.0,
    )
