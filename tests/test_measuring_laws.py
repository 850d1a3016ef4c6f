"""
What the instrument promises, shown on simulated machines whose calls have a known length.

The promises are about chances, so that each test looks at many runs; seeds are fixed. A run is
`collect` with its default limits, with processes, rounds and stopping as in a real one.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from simulated import ClockFall, Event, Hog, Nature, Pause, SimulatedMachine, Slower

from edgeexit import intervals
from edgeexit.blocks import CLEAN, DISTURBED, NOT_CONVERGED, Process
from edgeexit.collect import Limits
from edgeexit.compare import SIGNIFICANT

RUNS = 200
# Calls of 20 us to 20 ms; each run takes the next pair.
LENGTHS_NS = ((20e3, 100e3), (400e3, 900e3), (3e6, 8e6), (20e6, 5e6))
CASES = range(2)

NATURES: dict[str, tuple[Nature, tuple[Event, ...]]] = {
    "quiet": (Nature(luck=0.004), ()),
    "processes differ": (Nature(luck=0.01), ()),
    "processes are slow at every exit": (Nature(luck=0.015, common=0.95), ()),
    "one process of ten is odd": (Nature(luck=0.01, odd=0.1), ()),
    "a passing step": (Nature(luck=0.01), (Slower(at_s=3, until_s=4, factor=1.4),)),
}
SLOW_NATURES = {
    "processes differ by 2 %": (Nature(luck=0.02), ()),
    "processes differ by 3 %": (Nature(luck=0.03), ()),
    "blocks scatter": (Nature(luck=0.01, spread=0.02, jitter=0.3), ()),
    "spikes": (Nature(luck=0.01, spikes=1e-5), ()),
    "a process gets slower": (Nature(luck=0.01, drift=0.02), ()),
}


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the replicates: coarser intervals, not other ones."""
    coarse = functools.partial(intervals.replicates, count=250)
    monkeypatch.setattr("edgeexit.collect.intervals.replicates", coarse)


def values(processes: Sequence[Process], cases: Sequence[int] = CASES) -> list[list[np.ndarray]]:
    return [[process.values(case) for process in processes] for case in cases]


def check_coverage(nature: Nature, events: Sequence[Event], runs: int) -> None:
    hits, errors = [], []
    for run in range(runs):
        lengths = LENGTHS_NS[run % len(LENGTHS_NS)]
        its = Nature(**{**_fields(nature), "call_ns": lengths, "singles": 0})
        processes = SimulatedMachine(its, 1000 + run, events).measure(seed=run)
        found = values(processes)
        for case, draws in enumerate(intervals.replicates(found, run)):
            low, high = intervals.interval(draws, len(processes))
            hits.append(low <= lengths[case] <= high)
            errors.append(intervals.pooled_median(found[case]) / lengths[case] - 1)
    print(f"held {np.mean(hits):.1%}, bias {np.mean(errors):+.2%}")  # noqa: T201

    assert np.mean(hits) >= 0.93
    assert abs(np.mean(errors)) <= 0.005


def _fields(nature: Nature) -> dict[str, object]:
    return {name: getattr(nature, name) for name in Nature.__dataclass_fields__}


@pytest.mark.parametrize("name", NATURES)
def test_the_interval_holds_the_true_value_in_93_of_100_runs(
    name: str, few_replicates: None
) -> None:
    check_coverage(*NATURES[name], RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_NATURES)
def test_the_interval_holds_it_on_rougher_machines_too(name: str, few_replicates: None) -> None:
    check_coverage(*SLOW_NATURES[name], RUNS)


def test_a_run_stops_when_it_knows_enough_and_says_when_it_does_not() -> None:
    quiet = SimulatedMachine(Nature(luck=0.004), 1).profile()
    wild = SimulatedMachine(Nature(luck=0.1), 1).profile(Limits(time_cap_s=8))

    assert quiet.verdict.status == CLEAN
    assert len(quiet.processes) == Limits().processes
    assert max(quiet.latency(case).half_width for case in quiet.cases) <= 0.01
    assert wild.verdict.status == NOT_CONVERGED
    assert max(wild.latency(case).half_width for case in wild.cases) > 0.01


def test_a_machine_whose_processes_differ_more_is_measured_with_more_of_them() -> None:
    counts = [
        np.mean([len(SimulatedMachine(Nature(luck=luck), seed).measure()) for seed in range(5)])
        for luck in (0.003, 0.01, 0.02)
    ]

    assert counts[0] < counts[1] < counts[2]


# ---------------------------------------------------------------- verdicts


def test_nineteen_of_twenty_quiet_runs_are_clean() -> None:
    found = [SimulatedMachine(Nature(luck=0.004), seed).profile().verdict for seed in range(20)]

    assert sum(verdict.status == CLEAN for verdict in found) >= 19


@pytest.mark.parametrize(
    ("event", "kinds"),
    [
        (Hog(at_s=3, until_s=5), {"load", "off-core"}),
        (ClockFall(at_s=3, share=0.6), {"throttled", "step"}),
        (Slower(at_s=3.5, factor=1.8), {"step"}),
        (Slower(at_s=3.5, factor=1.2), {"step"}),
        (Slower(at_s=3, until_s=4, factor=1.8), {"step"}),
    ],
)
def test_what_befalls_the_machine_is_the_reason(event: Event, kinds: set[str]) -> None:
    for seed in range(5):
        verdict = SimulatedMachine(Nature(luck=0.004), seed, [event]).profile().verdict

        assert verdict.status == DISTURBED
        assert kinds <= {reason.kind for reason in verdict.reasons}


def test_a_pause_is_the_reason_if_it_fell_into_a_block() -> None:
    seen: Counter[bool] = Counter()
    for seed in range(10):
        machine = SimulatedMachine(Nature(luck=0.004), seed, [Pause(at_s=3.4, length_s=0.5)])
        profile = machine.profile()
        blocks = [block for process in profile.processes for block in process.blocks]
        is_hit = max((b.mean_ns - b.cpu_ns) * b.calls for b in blocks) > 0.4e9
        seen[is_hit] += 1

        assert is_hit == ("paused" in {reason.kind for reason in profile.verdict.reasons})
    assert seen[True] > 0


# ---------------------------------------------------------------- two profiles


def pairs(luck: float, factor: float, count: int = 20) -> list[list[intervals.Difference]]:
    """Pairs of runs of four exits, the second *factor* times slower."""
    calls_ns = (200e3, 500e3, 900e3, 850e3)
    found = []
    for seed in range(count):
        ours, theirs = (
            SimulatedMachine(
                Nature(call_ns=tuple(scale * ns for ns in calls_ns), luck=luck, singles=0), place
            ).measure(seed=place)
            for scale, place in ((factor, 2 * seed), (1.0, 2 * seed + 1))
        )
        places = range(len(calls_ns))
        found.append(intervals.differences(values(ours, places), values(theirs, places), seed))
    return found


def test_like_machines_show_no_difference_in_19_of_20_pairs(few_replicates: None) -> None:
    found = pairs(0.015, 1.0)

    assert sum(min(one.chance for one in pair) >= SIGNIFICANT for pair in found) >= 19
    assert np.mean([one.low <= 1 <= one.high for pair in found for one in pair]) >= 0.9


@pytest.mark.parametrize("luck", [0.01, 0.02])
def test_three_percent_are_found_in_19_of_20_pairs(luck: float, few_replicates: None) -> None:
    count = 20 if luck < 0.02 else 8
    found = pairs(luck, 1.03, count)

    assert sum(min(one.chance for one in pair) < SIGNIFICANT for pair in found) >= 0.95 * count
    assert np.mean([one.low <= 1.03 <= one.high for pair in found for one in pair]) >= 0.9
