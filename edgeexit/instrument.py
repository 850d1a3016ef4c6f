"""
The measuring instrument: from a bundle on this machine to a profile.

Callers see measure and check_device. Latencies come first (edgeexit.collect says when there are
enough), then joules if a meter was named; whatever is finished stands in a notebook, so that a
stopped measurement goes on where it was. Between blocks, never within, the machine's state is read.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeexit.blocks import PACED, SUSTAINED, Case, Kept, Mode
from edgeexit.bundle import Bundle
from edgeexit.collect import FEWEST_PROCESSES, FEWEST_ROUNDS, Limits, Progress, Step, collect
from edgeexit.device import HOST, find_device, identify
from edgeexit.energy import FEWEST_WINDOWS, IDLE, Energy, Trace, Window, window_s
from edgeexit.errors import DeviceError, UsageError
from edgeexit.interpreter import runtime_name
from edgeexit.machine import Machine, this_machine
from edgeexit.meters import Sample
from edgeexit.notebook import Notebook
from edgeexit.paths import paths
from edgeexit.profile import Profile
from edgeexit.sampler import Sampler
from edgeexit.sitting import Child
from edgeexit.state import emulation, machine_facts, read_state
from edgeexit.timing import PACED_CALLS
from edgeexit.verdict import judge

_HEAT_STEP_S, _HEAT_WATCH_S, _HEAT_BLIND_S, _HEAT_CAP_S = 5.0, 30.0, 60.0, 300.0
_STEADY_C = 1.0
_MOST_OVERRUN = 3.0


def check_device(name: str, machine: Machine | None = None) -> str:
    """
    The name of the device *name*, or of a TOML file, if this machine is it; "host" fits any.

    DeviceError otherwise.
    """
    device, here = find_device(name), identify(machine or this_machine())
    is_here = here.model is not None and device.matches(here.model)
    if device.name not in (here.name, HOST) and not is_here:
        raise DeviceError(
            f"device {device.name!r}: this machine is {here.name!r}, expected the {device.title}",
            hint="edgeexit profile --host USER@ADDRESS measures over ssh",
        )
    return device.name


def measure(
    bundle: Bundle,
    device: str = HOST,
    *,
    mode: Mode | None = None,
    threads: int = 1,
    cores: Sequence[int] = (),
    limits: Limits | None = None,
    seed: int = 0,
    sets: Sequence[Kept] | None = None,
    meter: str | None = None,
    notebook: Path | None = None,
    resume: bool = False,
    machine: Machine | None = None,
    on_step: Step | None = None,
    save: Callable[[Profile], object] | None = None,
) -> Profile:
    """
    Measure *bundle* on this machine, which must be the *device*.

    *mode* says how inputs come (default: burst), *cores* which ones the timing processes may use
    (empty: any), *sets* the sets of kept exits (default: paths.kept_sets, in paced mode all exits
    and the final one alone). *meter* is a spec as meters.open_meter takes it; joules are measured
    behind the latencies, for every exit of the full set and the network without exits. With
    *notebook* finished blocks go to that file, from which *resume* goes on; it is removed when
    *save* has been given the profile. *on_step* is called between rounds. A meter that fails
    leaves a profile with energy_failure; its verdict says whether a profile can be trusted.

    DeviceError if the machine is another or a process fails, UsageError for senseless arguments,
    Busy if the notebook is in use, StorageError if it cannot be written.
    """
    machine, mode, limits = machine or this_machine(), mode or Mode(), limits or Limits()
    name = check_device(device, machine)
    if threads < 1 or not 0 <= seed < 1 << 32:
        raise UsageError("threads: expected at least 1; seed: expected 0 .. 2**32 - 1")
    _check_cores(cores)
    if sets is None and mode.name == PACED:
        sets = [bundle.exits]
    cases = paths(bundle, sets)
    if mode.rate_hz is not None:
        _check_pace(mode.rate_hz, len(cases), limits)
    watched = [k for k, case in enumerate(cases) if _is_watched(case, bundle.exits)]
    common = {
        "bundle": bundle.digest,
        "cases": [case.to_document() for case in cases],
        "threads": threads,
        "cores": list(cores),
        "block_ms": limits.block_ms,
        "rate_hz": mode.rate_hz,
        "dissect": True,
        "seed": seed,
    }
    plan = {**common, "folder": str(bundle.path.resolve())}
    identity = {
        **common,
        "device": name,
        "mode": mode.name,
        "runtime": runtime_name(),
        "meter": meter,
    }
    if meter is not None:
        # A meter that cannot be opened is known before anything is measured, not after.
        with Sampler(meter, machine.root, device, cores):
            pass
    with ExitStack() as stack:
        book = None
        if notebook is not None:
            book = stack.enter_context(Notebook(notebook, identity, len(cases), resume=resume))
        before = read_state(machine)
        if book is not None and book.before is not None:
            before = book.before
        elif book is not None:
            book.started(before)
        delegate = book.delegate if book is not None else None

        @contextmanager
        def open_bench(process_seed: int) -> Iterator[Child]:
            nonlocal delegate
            with Child(plan) as child:
                delegate = child.sitting.delegate
                yield child

        if mode.name == SUSTAINED:
            with Child({**plan, "dissect": False}) as child:
                _heat(child, machine, on_step)
        finished = () if book is None else book.finished
        processes = collect(
            open_bench,
            cases,
            watched,
            limits,
            seed=seed,
            feel=lambda: read_state(machine),
            notebook=book,
            finished=finished,
            on_step=on_step,
        )
        energy, failure = None, None
        if meter is not None:
            try:
                energy = _measure_energy(plan, meter, machine, device, watched, book, on_step)
            except DeviceError as error:
                failure = f"{error} ({error.hint})" if error.hint else f"{error}"
        found = Profile(
            device=name,
            bundle_digest=bundle.digest,
            bundle_name=bundle.name,
            exits=bundle.exits,
            mode=mode,
            runtime=runtime_name(),
            delegate=delegate,
            threads=threads,
            cores=tuple(cores),
            seed=seed,
            precision=limits.precision,
            time_cap_s=limits.time_cap_s,
            cases=cases,
            processes=tuple(processes),
            machine=machine_facts(machine),
            before=before,
            after=read_state(machine),
            emulated=emulation(machine),
            energy=energy,
            energy_failure=failure,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        found = replace(found, verdict=judge(found))
        if save is not None:
            save(found)
        if book is not None:
            book.remove()
        return found


def _check_pace(rate_hz: float, cases: int, limits: Limits) -> None:
    """Refuse a pace at which the least that must be measured takes far longer than the cap."""
    least_s = FEWEST_PROCESSES * FEWEST_ROUNDS * PACED_CALLS * cases / rate_hz
    if least_s > _MOST_OVERRUN * limits.time_cap_s:
        raise UsageError(
            f"rate: at {rate_hz:g} inputs a second {cases} paths take at least {least_s:.0f} s, "
            f"the time cap is {limits.time_cap_s:g} s",
            hint="give a higher --rate, or a longer --time-cap",
        )


def _is_watched(case: Case, exits: Sequence[str]) -> bool:
    """Whether the case is an exit of the full set, or the network without exits."""
    return any(kept in (tuple(exits), tuple(exits[-1:])) for kept, _ in case.stands_for)


def _check_cores(cores: Sequence[int]) -> None:
    usable = os.sched_getaffinity(0)
    absent = sorted(set(cores) - usable)
    if absent:
        raise UsageError(
            f"cores: {absent[0]} cannot be used here (can: {', '.join(map(str, sorted(usable)))})"
        )


def _heat(child: Child, machine: Machine, on_step: Step | None) -> None:
    """
    Work until the temperature rises by less than 1 C in half a minute, at most five minutes.

    A machine without a thermometer is heated for a minute.
    """
    seen: list[float] = []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < _HEAT_CAP_S:
        child.heat(_HEAT_STEP_S)
        reading = read_state(machine)
        if reading.temperature_c is not None:
            seen.append(reading.temperature_c)
        if on_step is not None:
            on_step(
                Progress(
                    what="heating",
                    done=min(1.0, passed / _HEAT_CAP_S),
                    left_s=(_HEAT_CAP_S if seen else _HEAT_BLIND_S) - passed,
                    blocks=0,
                    wanted=0,
                    reading=reading,
                    exits=None,
                )
            )
        if not seen and passed >= _HEAT_BLIND_S:
            return
        back = round(_HEAT_WATCH_S / _HEAT_STEP_S)
        if len(seen) > back and seen[-1] - seen[-1 - back] < _STEADY_C:
            return


def _measure_energy(
    plan: Mapping[str, Any],
    meter: str,
    machine: Machine,
    device: str,
    watched: Sequence[int],
    book: Notebook | None,
    on_step: Step | None,
) -> Energy:
    """
    Windows of each watched case in a random order, an idle one before and behind, in five rounds.

    What an earlier, stopped measurement finished is used if the machine was not started anew
    since. DeviceError if the meter fails, or cannot serve windows of calls.
    """
    rate_hz: float | None = plan["rate_hz"]
    rounds = _earlier_rounds(book)
    with Sampler(meter, machine.root, device, plan["cores"]) as sampler:
        seconds = max(window_s(sampler.info.rate_hz), 5 / rate_hz if rate_hz else 0.0)
        while len(rounds) < FEWEST_WINDOWS:
            cases = list(watched)
            random.Random(plan["seed"] + len(rounds)).shuffle(cases)
            windows: list[Window] = []
            # A fresh process each time: joules differ between processes as latencies do.
            with Child({**plan, "dissect": False}) as child:
                for case in [IDLE, *cases, IDLE]:
                    if on_step is not None:
                        made = len(rounds) * (len(cases) + 2) + len(windows)
                        on_step(_energy_progress(made, FEWEST_WINDOWS * (len(cases) + 2), seconds))
                    windows.append(child.window(case, seconds))
            span = windows[0].began_ns, windows[-1].ended_ns
            rounds.append((windows, sampler.samples_between(*span)))
            if book is not None:
                book.energy(_round_document(*rounds[-1]))
        sampler.stop()  # what a meter knows only at its end is then in its info
        # Samples at the edges belong to two rounds.
        samples = {sample.at_ns: sample for _, found in rounds for sample in found}
        return Energy(
            info=sampler.info,
            trace=Trace.of(samples[at_ns] for at_ns in sorted(samples)),
            windows=tuple(window for windows, _ in rounds for window in windows),
            sampler_share=sampler.cpu_share,
            pace_hz=rate_hz,
        )


def _energy_progress(made: int, total: int, seconds: float) -> Progress:
    return Progress(
        what="energy",
        done=made / total,
        left_s=(total - made) * seconds,
        blocks=made,
        wanted=total,
        reading=None,
        exits=None,
    )


_Round = tuple[list[Window], Sequence[Sample]]


def _round_document(windows: Sequence[Window], samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "windows": [asdict(window) for window in windows],
        "samples": [sample.to_row() for sample in samples],
    }


def _earlier_rounds(book: Notebook | None) -> list[_Round]:
    """The rounds in the notebook; none if the machine's clock has begun anew since."""
    rounds: list[_Round] = []
    for table in () if book is None else book.energy_lines:
        windows = [
            Window(**{name: entry.get(name, int) for name in Window.__dataclass_fields__})
            for entry in table.tables("windows")
        ]
        rounds.append((windows, [Sample.from_row(row) for row in table.list_of("samples", list)]))
    ends = [window.ended_ns for windows, _ in rounds for window in windows]
    return rounds if all(end < time.monotonic_ns() for end in ends) else []
