"""The timed code itself: what is called, what is timed, and what the window holds besides."""

from collections.abc import Iterator
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit import timing


class Clock:
    """A clock that only calls move on: `cost_ns` for each call, `step_ns` for a look at it."""

    def __init__(self, cost_ns: int, look_ns: int = 0) -> None:
        self.now_ns, self.cost_ns, self.look_ns = 1000, cost_ns, look_ns
        self.seen: list[object] = []
        self.slept_ns = 0

    def __call__(self) -> int:
        self.now_ns += self.look_ns
        return self.now_ns

    def step(self, sample: object) -> None:
        self.seen.append(sample)
        self.now_ns += self.cost_ns

    def sleep(self, seconds: float) -> None:
        self.slept_ns += round(seconds * 1e9)
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock(20_000)
    monkeypatch.setattr(timing, "perf_counter_ns", made)
    monkeypatch.setattr(timing, "process_time_ns", made)
    monkeypatch.setattr(timing, "sleep", made.sleep)
    return made


@given(
    calls=st.integers(1, 300), singles=st.integers(1, 40), cost_ns=st.integers(20_000, 20_000_000)
)
def test_a_block_calls_every_sample_in_turn_and_tells_the_exact_time(
    calls: int, singles: int, cost_ns: int
) -> None:
    clock = Clock(cost_ns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "perf_counter_ns", clock)
        patch.setattr(timing, "process_time_ns", clock)
        samples = ["a", "b", "c"]
        began, wall, cpu, found = timing.time_block(clock.step, samples, calls, singles)

    # One unrecorded call brings the case back into the caches.
    assert clock.seen[1:] == [samples[k % 3] for k in range(calls)]
    assert began == 1000 + cost_ns
    assert wall == cpu == calls * cost_ns
    assert found == [cost_ns] * min(calls, singles)


def test_a_block_looks_at_the_clock_twice_for_each_single_call_and_twice_for_itself() -> None:
    clock = Clock(0, look_ns=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "perf_counter_ns", clock)
        patch.setattr(timing, "process_time_ns", lambda: 0)
        _, wall, _, _ = timing.time_block(clock.step, ["a"], 1000, 20)
    assert wall == 2 * 20 + 1


def test_paced_calls_come_at_their_times_and_sleep_does_not_count(clock: Clock) -> None:
    began, wall, cpu, found = timing.time_paced(clock.step, ["a"], 4, rate_hz=5)
    assert found == [20_000] * 4
    assert wall == cpu == 4 * 20_000
    assert clock.now_ns - began == 4 * 200_000_000 + 20_000


def test_paced_calls_that_are_late_do_not_sleep(clock: Clock) -> None:
    clock.cost_ns = 300_000_000
    timing.time_paced(clock.step, ["a"], 4, rate_hz=5)
    assert clock.slept_ns == 200_000_000


def test_warm_up_goes_on_until_the_first_third_holds_what_is_cold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(1_000_000)
    cold = iter([90_000_000, 40_000_000, 9_000_000, 4_000_000] + [1_000_000] * 500)

    def step(_: object) -> None:
        clock.now_ns += next(cold)

    monkeypatch.setattr(timing, "perf_counter_ns", clock)
    found, settled = timing.warm_up(step, ["a"])
    assert found[:4] == (90_000_000, 40_000_000, 9_000_000, 4_000_000)
    assert 4 <= settled <= len(found) // 3
    assert len(found) % 12 == 0
    assert sum(found[1:]) >= 20_000_000


@given(costs=st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_warm_up_is_bounded_whatever_the_calls_take(costs: list[int]) -> None:
    clock = Clock(0)
    endless = cycle(costs)

    def step(_: object) -> None:
        clock.now_ns += next(endless)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "perf_counter_ns", clock)
        found, settled = timing.warm_up(step, ["a"])
    assert 12 <= len(found) <= 200
    assert 0 <= settled <= len(found) // 2


def stopwatch(clock: Clock, rate_hz: float | None = None) -> timing.Stopwatch:
    plan = {"rate_hz": rate_hz, "block_ms": 2.0}
    return timing.Stopwatch([clock.step, clock.step], ["a", "b"], plan)


def test_a_block_lasts_about_as_long_as_the_plan_says(clock: Clock) -> None:
    watch = stopwatch(clock)
    block = watch.block(1)
    assert block.calls == 100
    assert (block.case, block.mean_ns, block.cpu_ns) == (1, 20_000, 20_000)
    assert len(block.calls_ns) == 20
    clock.cost_ns = 20_000_000
    assert stopwatch(clock).block(0).calls == 5


def test_the_yardstick_runs_before_a_block_but_behind_a_paced_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "yardstick_ns", lambda: clock.seen.append("yardstick") or 5.0)
    for rate_hz, place in ((None, 0), (100.0, -1)):
        watch = stopwatch(clock, rate_hz)
        clock.seen.clear()
        assert watch.block(0).yardstick_ns == 5.0
        assert clock.seen.index("yardstick") % len(clock.seen) == place % len(clock.seen)


def test_a_window_lasts_at_least_as_long_as_asked_and_counts_its_calls(clock: Clock) -> None:
    watch = stopwatch(clock)
    clock.seen.clear()
    found = watch.window(0, 3.0)
    assert found["ended_ns"] - found["began_ns"] >= 3e9
    assert found["calls"] == len(clock.seen)
    assert found["calls"] * 20_000 == found["ended_ns"] - found["began_ns"]

    clock.seen.clear()
    idle = watch.window(-1, 3.0)
    assert (idle["case"], idle["calls"], clock.seen) == (-1, 0, [])
    assert idle["ended_ns"] - idle["began_ns"] == 3_000_000_000


def test_heating_uses_all_cases(clock: Clock) -> None:
    watch = stopwatch(clock)
    began = clock.now_ns
    watch.heat(1.0)
    assert clock.now_ns - began >= 1e9


def test_the_yardstick_is_the_same_work_every_time() -> None:
    found = [timing.yardstick_ns() for _ in range(20)]
    assert all(value > 0 for value in found)
