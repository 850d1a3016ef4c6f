"""Each way in which a machine can spoil a measurement has its own reason; quiet runs have none."""

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import (
    EXITS,
    built_profile,
    slowed,
    watched_cases,
    with_blocks,
    with_readings,
    without_readings,
)
from simulated import ClockFall, Event, Hog, Nature, Pause, SimulatedMachine, Slower
from small import small_bundle

from edgeexit.blocks import (
    CLEAN,
    DISTURBED,
    EMULATED,
    NOT_CONVERGED,
    PACED,
    SUSTAINED,
    Block,
    Case,
    Mode,
)
from edgeexit.collect import Limits
from edgeexit.energy import Window
from edgeexit.instrument import measure
from edgeexit.profile import Profile
from edgeexit.state import Reading
from edgeexit.verdict import judge, unseen, watched

CASES = watched_cases()
QUIET = built_profile(cases=CASES)
PACED_QUIET = replace(QUIET, mode=Mode(name=PACED, rate_hz=5.0))


def kinds(profile: Profile) -> list[str]:
    return [reason.kind for reason in judge(profile).reasons]


def disturbed_by(profile: Profile) -> str:
    """The text of the only reason."""
    verdict = judge(profile)
    assert verdict.status == DISTURBED
    assert len(verdict.reasons) == 1, verdict
    return verdict.reasons[0].text


def from_half(**fields: Any) -> Callable[[float, Reading], Reading]:
    """Readings whose *fields* have these values in the second half of the run."""
    return lambda when, reading: replace(reading, **fields) if when > 0.5 else reading


def test_quiet_runs_are_clean() -> None:
    verdicts = [judge(built_profile(cases=CASES, seed=seed)) for seed in range(20)]
    assert [v.status for v in verdicts].count(CLEAN) >= 19, [str(v) for v in verdicts]


def test_a_machine_that_says_nothing_is_clean_and_what_it_kept_is_listed() -> None:
    def silent(_: float, reading: Reading) -> Reading:
        return Reading(at_ns=reading.at_ns)

    mute = replace(with_readings(QUIET, silent), before=Reading(at_ns=0), after=Reading(at_ns=1))
    assert judge(mute).status == CLEAN
    assert unseen(mute) == ["clock", "temperature", "throttling", "other load"]
    assert unseen(QUIET) == []


def test_a_run_without_readings_can_be_judged() -> None:
    assert judge(without_readings(QUIET)).status == CLEAN


# ---------------------------------------------------------------- throttling, clock, heat


BITS = ("under-voltage", "frequency-capped", "throttled", "temperature-limit")


@given(now=st.sets(st.sampled_from(range(4))), ever=st.sets(st.sampled_from(range(4))))
@settings(max_examples=12, deadline=None)
def test_each_bit_that_shows_up_is_a_reason_of_its_own(now: set[int], ever: set[int]) -> None:
    bits = sum(1 << bit for bit in now) | sum(1 << bit + 16 for bit in ever | now)
    found = kinds(with_readings(QUIET, from_half(throttled=bits)))
    assert found == [BITS[bit] for bit in sorted(now | ever)]


def test_what_was_throttled_before_the_run_is_no_reason() -> None:
    old = 0x50000
    profile = with_readings(QUIET, lambda _, reading: replace(reading, throttled=old))
    before, after = (replace(r, throttled=old) for r in (QUIET.before, QUIET.after))
    assert judge(replace(profile, before=before, after=after)).status == CLEAN


def test_a_bit_that_is_only_set_at_the_end_disturbs() -> None:
    profile = replace(QUIET, after=replace(QUIET.after, throttled=0x80008))
    assert "soft temperature limit" in disturbed_by(profile)


def test_a_falling_clock_disturbs() -> None:
    profile = with_readings(QUIET, from_half(clocks_mhz=(1000.0,)))
    assert disturbed_by(profile) == "clock fell from 1800 to 1000 MHz"


def test_cores_that_rest_are_no_falling_clock() -> None:
    other = with_readings(
        QUIET,
        lambda when, reading: replace(reading, clocks_mhz=(1800.0, 600.0 if when > 0.5 else 1800)),
    )
    assert judge(other).status == CLEAN


def test_the_idle_clock_before_the_first_block_is_no_falling_clock() -> None:
    def first_low(process: Any) -> Any:
        first = replace(process.readings[0], clocks_mhz=(600.0,))
        return replace(process, readings=(first, *process.readings[1:]))

    assert judge(replace(QUIET, processes=tuple(map(first_low, QUIET.processes)))).status == CLEAN


def test_a_governor_that_rests_between_paced_inputs_is_no_falling_clock() -> None:
    low = with_readings(PACED_QUIET, from_half(clocks_mhz=(600.0,)))
    assert judge(low).status == CLEAN
    held = with_readings(low, lambda _, reading: replace(reading, governors=("performance",)))
    assert "clock fell" in disturbed_by(held)


def test_other_governors_than_performance_are_no_disturbance_by_themselves() -> None:
    for governor in ("powersave", "schedutil"):
        named = with_readings(QUIET, lambda _, r, g=governor: replace(r, governors=(g,)))
        assert judge(named).status == CLEAN


def test_getting_warmer_disturbs_only_what_claims_to_be_steady() -> None:
    warming = with_readings(QUIET, lambda when, r: replace(r, temperature_c=50 + 8 * when))
    assert judge(warming).status == CLEAN
    claimed = replace(warming, mode=Mode(name=SUSTAINED))
    assert "warmer at the end" in disturbed_by(claimed)
    wavering = with_readings(
        replace(QUIET, mode=Mode(name=SUSTAINED)),
        lambda _, r: replace(r, temperature_c=60 + 0.487 * (r.at_ns // 10**8 % 3)),
    )
    assert judge(wavering).status == CLEAN


def test_growing_swap_disturbs() -> None:
    assert "100 MB" in disturbed_by(with_readings(QUIET, from_half(swap_used_mb=100.0)))
    assert judge(with_readings(QUIET, from_half(swap_used_mb=5.0))).status == CLEAN


# ---------------------------------------------------------------- rivals


def growing(field: str, each_ms: float) -> Callable[[float, Reading], Reading]:
    """A counter that grows by *each_ms* in every millisecond of the second half of the run."""
    began, ended = QUIET.processes[0].began_ns, QUIET.processes[-1].ended_ns

    def change(when: float, reading: Reading) -> Reading:
        more = max(0.0, when - 0.5) * (ended - began) / 1e6 * each_ms
        return replace(reading, **{field: getattr(reading, field) + more})

    return change


def test_a_hog_beside_the_measurement_disturbs() -> None:
    text = disturbed_by(with_readings(QUIET, growing("busy_ms", 1.0)))
    share = int(text.removeprefix("other programs took ").partition("%")[0])
    assert 99 <= share <= 103


def test_services_at_work_are_no_hog() -> None:
    assert judge(with_readings(QUIET, growing("busy_ms", 0.04))).status == CLEAN


def test_a_hog_for_a_second_disturbs() -> None:
    long = built_profile(cases=CASES, processes=5, rounds=150)
    middle = long.processes[2]
    began = middle.began_ns + 10**9

    def hog(_: float, reading: Reading) -> Reading:
        extra = min(max(reading.at_ns - began, 0), 0.9e9) / 1e6
        assert reading.busy_ms is not None
        return replace(reading, busy_ms=reading.busy_ms + extra)

    assert "for a while (process 3 of 5)" in disturbed_by(with_readings(long, hog))


def test_our_own_time_is_no_other_load_whoever_counts_it() -> None:
    """Readings are the parent's: it sees its child's time only once that has ended."""
    counted = with_readings(QUIET, lambda _, reading: replace(reading, own_ms=reading.busy_ms))
    assert judge(counted).status == CLEAN
    assert "other programs" in disturbed_by(with_readings(counted, growing("busy_ms", 0.5)))


def test_a_hog_between_processes_is_seen_over_the_whole_run() -> None:
    assert QUIET.after.busy_ms is not None
    after = replace(QUIET.after, busy_ms=QUIET.after.busy_ms + 6000)
    assert "(whole run)" in disturbed_by(replace(QUIET, after=after))


def test_a_resumed_run_whose_parent_knows_nothing_of_earlier_processes_is_not_blamed() -> None:
    assert judge(replace(QUIET, after=replace(QUIET.after, own_ms=50.0))).status == CLEAN


def test_what_happened_before_a_run_was_resumed_is_not_its_load() -> None:
    long_ago = replace(QUIET.before, at_ns=QUIET.before.at_ns - 10**12, busy_ms=4e6)
    assert judge(replace(QUIET, before=long_ago)).status == CLEAN


def test_time_that_a_hypervisor_takes_disturbs() -> None:
    assert "hypervisor took 5.0%" in disturbed_by(with_readings(QUIET, growing("steal_ms", 0.05)))


def test_waiting_for_cores_disturbs() -> None:
    text = disturbed_by(with_readings(QUIET, growing("pressure_us", 300.0)))
    assert text.startswith("programs waited for a core 30% of the time")


# ---------------------------------------------------------------- the timing process


def without_core(block: Block, share: float) -> Block:
    return replace(block, mean_ns=block.mean_ns / (1 - share))


def test_a_process_that_often_loses_its_core_disturbs() -> None:
    profile = with_blocks(QUIET, lambda _, block: without_core(block, 0.1))
    assert "no core for 10%" in disturbed_by(profile)


def test_idling_between_paced_inputs_and_waiting_threads_are_no_loss() -> None:
    for profile in (PACED_QUIET, replace(QUIET, threads=4)):
        assert judge(with_blocks(profile, lambda _, b: without_core(b, 0.1))).status == CLEAN


def test_a_system_that_does_not_count_cpu_time_is_not_blamed() -> None:
    assert judge(with_blocks(QUIET, lambda _, b: replace(b, cpu_ns=0.0))).status == CLEAN


def test_a_paused_process_disturbs() -> None:
    paused = QUIET.processes[3].blocks[7]

    def pause(_: float, block: Block) -> Block:
        return without_core(block, 0.95) if block == paused else block

    text = disturbed_by(with_blocks(QUIET, pause))
    assert "ms in 1 of 480 blocks" in text


def test_a_slow_block_that_worked_all_the_time_was_not_paused() -> None:
    slow = QUIET.processes[3].blocks[7]
    profile = with_blocks(QUIET, lambda _, b: slowed(b, 10.0) if b == slow else b)
    assert judge(profile).status == CLEAN


# ---------------------------------------------------------------- drift


@pytest.mark.parametrize("factor", [1.2, 0.9])
def test_a_step_of_the_whole_machine_disturbs(factor: float) -> None:
    profile = with_blocks(QUIET, lambda when, b: slowed(b, factor) if when > 0.6 else b)
    verdict = judge(profile)
    assert verdict.status == DISTURBED
    assert "step" in kinds(profile)
    assert ("slower" if factor > 1 else "faster") in str(verdict)


def test_a_drift_of_the_whole_machine_disturbs() -> None:
    profile = with_blocks(QUIET, lambda when, b: slowed(b, 1 + 0.1 * when))
    assert judge(profile).status == DISTURBED
    assert {"step", "drift"} & set(kinds(profile))


def test_every_process_getting_slower_disturbs() -> None:
    began = {block: process.began_ns for process in QUIET.processes for block in process.blocks}
    profile = with_blocks(
        QUIET, lambda _, block: slowed(block, 1 + 0.08 * (block.at_ns - began[block]) / 1e9)
    )
    assert judge(profile).status == DISTURBED
    assert "within processes" in str(judge(profile))


def test_a_drift_below_what_intervals_show_is_no_reason() -> None:
    assert judge(with_blocks(QUIET, lambda when, b: slowed(b, 1 + 0.004 * when))).status == CLEAN


def test_blocks_that_resemble_their_neighbours_disturb() -> None:
    rng = np.random.default_rng(0)
    rounds: dict[tuple[int, int], float] = {}
    factor = 0.0
    numbers = {}
    for p, process in enumerate(QUIET.processes):
        for k, block in enumerate(process.blocks):
            if k % len(CASES) == 0:
                factor = 0.8 * factor + 0.006 * rng.normal()
                rounds[p, k // len(CASES)] = 1 + factor
            numbers[block] = rounds[p, k // len(CASES)]
    profile = with_blocks(
        QUIET,
        lambda _, b: replace(b, mean_ns=b.mean_ns * numbers[b], cpu_ns=b.cpu_ns * numbers[b]),
    )
    assert "autocorrelation" in kinds(profile)


# ---------------------------------------------------------------- a simulated machine


EVENTS: dict[str, tuple[list[Event], set[str]]] = {
    "hog": ([Hog(at_s=2.1, until_s=7.0)], {"load", "off-core"}),
    "clock": ([ClockFall(at_s=3.0, share=0.83)], {"throttled", "frequency-capped", "clock"}),
    "moment": ([ClockFall(at_s=3.0, until_s=4.0, share=0.6)], {"throttled", "clock"}),
    "slower": ([Slower(at_s=3.0, factor=1.1)], {"step"}),
    # A pause between processes would harm nothing.
    "pauses": ([Pause(at_s=at_s, length_s=0.3) for at_s in (2.1, 2.9, 3.7)], {"paused"}),
}


@pytest.mark.parametrize("name", EVENTS)
def test_what_befalls_a_simulated_machine_is_noticed(name: str) -> None:
    events, wanted = EVENTS[name]
    profile = SimulatedMachine(Nature(), seed=0, events=events).profile()
    assert profile.verdict.status == DISTURBED
    assert wanted <= {reason.kind for reason in profile.verdict.reasons}, profile.verdict


def test_quiet_simulated_machines_are_clean() -> None:
    verdicts = [SimulatedMachine(Nature(), seed).profile().verdict for seed in range(20)]
    assert [v.status for v in verdicts].count(CLEAN) >= 19, [str(v) for v in verdicts]


# ---------------------------------------------------------------- figures, order


def test_doubtful_joules_disturb() -> None:
    drifted = "idle power drifted between 2 W and 3 W (40%)"
    meter = SimpleNamespace(reasons=lambda name: [drifted], pace_hz=5.0)
    verdict = judge(replace(QUIET, energy=meter))
    assert verdict.status == DISTURBED
    assert [reason.kind for reason in verdict.reasons] == ["energy"]


@pytest.mark.parametrize(("factor", "status"), [(0.95, CLEAN), (1.0, CLEAN), (0.8, DISTURBED)])
def test_calls_that_took_another_time_in_the_joule_windows_disturb(
    factor: float, status: str
) -> None:
    def window(case: int) -> Window:
        calls = round(4e9 / (factor * QUIET.value_ns(QUIET.cases[case])))
        return Window(case=case, began_ns=0, ended_ns=4 * 10**9, calls=calls)

    meter = SimpleNamespace(
        reasons=lambda name: [], pace_hz=None, cases=[0, 1], windows=[window(0), window(1)]
    )
    verdict = judge(replace(QUIET, energy=meter))
    assert verdict.status == status
    assert [reason.kind for reason in verdict.reasons] == (["energy"] if factor < 0.9 else [])


def test_wide_intervals_are_not_converged_and_named() -> None:
    profile = built_profile(cases=CASES, luck=0.05)
    verdict = judge(profile)
    assert verdict.status == NOT_CONVERGED
    assert [reason.kind for reason in verdict.reasons] == ["precision"]
    assert "asked for ± 1.00%, found" in verdict.reasons[0].text
    assert "and 1 more" in verdict.reasons[0].text
    assert judge(replace(profile, precision=0.2)).status == CLEAN


def test_one_process_alone_never_converges() -> None:
    assert judge(built_profile(cases=CASES, processes=1)).status == NOT_CONVERGED


def test_the_worst_status_wins_and_all_reasons_are_listed() -> None:
    wide = built_profile(cases=CASES, luck=0.05, emulated="qemu-user")
    hot = with_readings(wide, from_half(throttled=4))
    verdict = judge(hot)
    assert verdict.status == EMULATED
    assert [reason.kind for reason in verdict.reasons] == ["emulated", "throttled", "precision"]
    assert judge(replace(hot, emulated=None)).status == DISTURBED


@given(factor=st.floats(0.05, 50.0))
@settings(max_examples=5, deadline=None)
def test_the_unit_of_time_does_not_matter(factor: float) -> None:
    def scaled(_: float, block: Block) -> Block:
        single = slowed(block, factor)
        return replace(single, calls=max(1, round(block.calls / factor)))

    assert judge(with_blocks(without_readings(QUIET), scaled)).status == CLEAN


def test_the_full_set_and_the_network_without_exits_decide() -> None:
    found = watched(built_profile(processes=2, rounds=2))
    assert [(case.kept, case.exit) for case in found] == [
        *((EXITS, name) for name in EXITS),
        (EXITS[-1:], EXITS[-1]),
    ]
    shared = Case(kept=EXITS, exit="exit0", also=((("exit0",), "exit0"),))
    assert watched(built_profile(cases=(shared, *CASES[1:]), rounds=2))[0] == shared


# ---------------------------------------------------------------- for real


LIMITS = Limits(processes=5, precision=0.5, time_cap_s=1.0, block_ms=10)


def test_a_real_hog_beside_a_real_measurement_is_noticed(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, exits=1)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as hog:
        try:
            verdict = measure(bundle, limits=LIMITS).verdict
        finally:
            hog.kill()
    assert verdict.status == DISTURBED
    assert "load" in {reason.kind for reason in verdict.reasons}, verdict


def test_a_real_process_that_is_stopped_is_noticed(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, exits=1)
    is_timing, is_over = threading.Event(), threading.Event()

    def stop_and_go() -> None:
        while not is_over.is_set():
            if not is_timing.wait(0.1) or is_over.wait(0.03):  # amid the block that comes next
                continue
            is_timing.clear()
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    child.suspend()
                    is_over.wait(0.2)
                    child.resume()

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        limits = replace(LIMITS, block_ms=100)
        verdict = measure(bundle, limits=limits, on_step=lambda _: is_timing.set()).verdict
    finally:
        is_over.set()
        is_timing.set()
        thread.join()
    assert verdict.status == DISTURBED
    assert "paused" in {reason.kind for reason in verdict.reasons}, verdict
