"""When enough has been timed: rounds, processes, the time cap, and what was finished before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from edgeexit.blocks import Block, Case
from edgeexit.collect import MOST_PROCESSES, Limits, Progress, collect
from edgeexit.sitting import Sitting

CASES = (
    Case(kept=("a", "b"), exit="a"),
    Case(kept=("a", "b"), exit="b"),
    Case(kept=("b",), exit="b"),
)
COST_NS = (50e3, 100e3, 90e3)


class Board:
    """Blocks of 25 ms with some jitter; processes differ by *luck*."""

    def __init__(self, jitter: float = 0.002, luck: float = 0.002, seed: int = 0) -> None:
        self.now_ns, self.jitter, self.luck = 0, jitter, luck
        self.rng = np.random.default_rng(seed)
        self.orders: list[list[int]] = []
        self.opened: list[int] = []
        self.sitting = Sitting(warmup_ns=((1,),) * 3, settled=(0,) * 3)

    @contextmanager
    def open(self, seed: int) -> "Iterator[Board]":
        self.opened.append(seed)
        self.factor = 1 + self.luck * self.rng.normal()
        self.now_ns += 500_000_000
        yield self

    def round(self, order: Sequence[int]) -> list[Block]:
        self.orders.append(list(order))
        return [self.block(case) for case in order]

    def block(self, case: int) -> Block:
        mean = COST_NS[case] * self.factor * (1 + self.jitter * self.rng.normal())
        self.now_ns += 25_000_000
        return Block(
            case=case, at_ns=self.now_ns, calls=100, mean_ns=mean, cpu_ns=mean, yardstick_ns=2e4
        )

    def clock_ns(self) -> int:
        return self.now_ns


def run(board: Board, limits: Limits, **more) -> list:
    return collect(board.open, CASES, (0, 1, 2), limits, clock_ns=board.clock_ns, **more)


def test_a_quiet_board_needs_as_many_processes_as_asked_and_few_rounds() -> None:
    board = Board()
    found = run(board, Limits(processes=10, precision=0.01))
    assert len(found) == 10
    assert all(len(process.blocks) <= 3 * 8 for process in found)
    assert board.now_ns < 15e9


def test_processes_that_differ_are_followed_by_more() -> None:
    board = Board(luck=0.015)
    found = run(board, Limits(processes=5, precision=0.01, time_cap_s=600))
    assert 5 < len(found) <= MOST_PROCESSES


def test_the_time_cap_ends_it_but_not_before_five_processes() -> None:
    board = Board(luck=0.3, jitter=0.2)
    found = run(board, Limits(processes=10, precision=0.001, time_cap_s=1.0))
    assert len(found) == 5
    board = Board(luck=0.3, jitter=0.2)
    found = run(board, Limits(processes=10, precision=0.001, time_cap_s=60.0))
    assert len(found) >= 10
    # A process that is under way ends its pair of rounds.
    assert 55e9 < board.now_ns < 65e9


def test_rounds_come_in_pairs_there_and_back_in_changing_order() -> None:
    board = Board(jitter=0.1)
    run(board, Limits(processes=5, precision=0.01, time_cap_s=30))
    pairs = list(zip(board.orders[::2], board.orders[1::2], strict=True))
    assert all(there == back[::-1] and sorted(there) == [0, 1, 2] for there, back in pairs)
    assert len({tuple(there) for there, _ in pairs}) > 3


def test_finished_processes_come_first_and_count() -> None:
    board = Board()
    earlier = run(board, Limits(processes=6))
    later = Board(seed=1)
    found = run(later, Limits(processes=8), finished=earlier)
    assert found[:6] == earlier
    assert len(later.opened) == 2
    assert len({process.seed for process in found}) == 8
    assert run(Board(), Limits(processes=6), finished=earlier) == earlier


def test_progress_tells_estimates_from_the_second_process_on() -> None:
    seen: list[Progress] = []
    run(Board(), Limits(processes=5), on_step=seen.append)
    assert seen[0].exits is None
    last = seen[-1].exits
    assert last is not None
    assert [name for name, _ in last] == ["a", "b", "b"]
    for (_, estimate), cost in zip(last, COST_NS, strict=True):
        assert estimate.value == pytest.approx(cost, rel=0.01)
    assert [step.blocks for step in seen] == sorted(step.blocks for step in seen)
    assert all(0 <= step.done <= 1 and step.left_s >= 0 for step in seen)
