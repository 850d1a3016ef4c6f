"""
When enough has been timed: processes one after another, until the intervals are narrow.

Callers see collect, Limits and Progress. Several fresh processes time the cases in blocks, in an
order drawn anew and then reversed (ABBA). A process ends when its own medians are settled, the
whole when the intervals over processes are as narrow as was asked for, or the time is up. Clock,
processes and the machine's state are handed in, so that all of it can be simulated.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np

from edgeexit import intervals
from edgeexit.blocks import Block, Case, Process, reading_document, reading_from
from edgeexit.errors import UsageError
from edgeexit.files import Table
from edgeexit.notebook import Notebook
from edgeexit.profile import Estimate
from edgeexit.sitting import Sitting
from edgeexit.state import Reading

FEWEST_PROCESSES = 5
MOST_PROCESSES = 60
FEWEST_ROUNDS, _MOST_ROUNDS = 4, 12
_FEEL_NS = 500_000_000
_INTERVAL = ("value", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    How far a measurement is: *what* is going on, the share that is *done* (0..1), the seconds
    that are left at most, *blocks* of each case so far of the *wanted* ones (more follow if they
    are not enough), the latest *reading*, and what is known of the watched exits so far (None
    before two processes have ended).
    """

    what: str
    done: float
    left_s: float
    blocks: int
    wanted: int
    reading: Reading | None
    exits: "Known"

    def to_document(self) -> dict[str, Any]:
        """The progress as a JSON object."""
        exits = None
        if self.exits is not None:
            exits = [{"exit": name, **asdict(found)} for name, found in self.exits]
        reading = None if self.reading is None else reading_document(self.reading)
        return {**vars(self), "reading": reading, "exits": exits}

    @classmethod
    def from_document(cls, table: Table) -> "Progress":
        """Read what to_document wrote."""
        table.only(*(field.name for field in fields(cls)))
        exits = None
        if table.values.get("exits") is not None:
            exits = tuple(
                (row.get("exit", str), Estimate(**{key: row.get(key, float) for key in _INTERVAL}))
                for row in table.tables("exits")
            )
        has_reading = table.values.get("reading") is not None
        return cls(
            what=table.get("what", str),
            done=table.get("done", float),
            left_s=table.get("left_s", float),
            blocks=table.get("blocks", int),
            wanted=table.get("wanted", int),
            reading=reading_from(table.table("reading")) if has_reading else None,
            exits=exits,
        )


Step = Callable[[Progress], object]
Known = tuple[tuple[str, Estimate], ...] | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop: *processes* at least, and either *precision* reached or the time used up."""

    processes: int = 10
    precision: float = 0.01
    time_cap_s: float = 50.0
    block_ms: float = 25.0

    def __post_init__(self) -> None:
        if not FEWEST_PROCESSES <= self.processes <= MOST_PROCESSES:
            raise UsageError(
                f"processes: expected {FEWEST_PROCESSES} .. {MOST_PROCESSES}, "
                f"found {self.processes}",
                hint="fewer processes say nothing about how they differ",
            )
        if not 0.0005 <= self.precision <= 0.5:
            raise UsageError(f"precision: expected 0.0005 .. 0.5, found {self.precision:g}")
        if not 1 <= self.time_cap_s <= 86400 or not 0.001 <= self.block_ms <= 60000:
            raise UsageError("time cap: expected 1 .. 86400 seconds; block_ms: 0.001 .. 60000")


class Bench(Protocol):
    """One fresh process that can time the cases."""

    @property
    def sitting(self) -> Sitting:
        """What it found before the first round."""

    def round(self, order: Sequence[int]) -> list[Block]:
        """One block of each case, in this *order*."""


OpenBench = Callable[[int], AbstractContextManager[Bench]]


def collect(
    open_bench: OpenBench,
    cases: Sequence[Case],
    watched: Sequence[int],
    limits: Limits,
    *,
    seed: int = 0,
    feel: Callable[[], Reading | None] = lambda: None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    notebook: Notebook | None = None,
    finished: Sequence[Process] = (),
    on_step: Step | None = None,
) -> list[Process]:
    """
    Processes that time *cases*, until *limits* are met; those *finished* earlier come first.

    Convergence is asked of the *watched* cases (their places in *cases*): the half-width of
    the 95 % interval of each must be at most limits.precision. *open_bench* starts a process
    with a seed. *feel* is called between rounds: when a process begins, when it ends, and every
    half second in between.
    """
    done = list(finished)
    began_ns = clock_ns()
    cap_ns = limits.time_cap_s * 1e9
    while True:
        known = _estimates(done, cases, watched, seed) if len(done) > 1 else None
        spent = clock_ns() - began_ns
        count = len(done)
        if count >= FEWEST_PROCESSES and (spent >= cap_ns or count >= MOST_PROCESSES):
            break
        if count >= limits.processes and _converged(known, limits.precision):
            break
        share = max(0.0, cap_ns - spent) / max(1, limits.processes - count)
        if count >= limits.processes:
            share = min(share, cap_ns / limits.processes)
        process_seed = (seed + 1000 * count) % (1 << 32)
        with open_bench(process_seed) as bench:

            def tell(blocks: int, reading: Reading | None, known: Known = known) -> None:
                if on_step is None:
                    return
                passed = clock_ns() - began_ns
                blocks += sum(len(process.blocks) for process in done)
                on_step(
                    Progress(
                        what=f"process {len(done) + 1}",
                        done=min(1.0, passed / cap_ns),
                        left_s=max(0.0, cap_ns - passed) / 1e9,
                        blocks=blocks // len(cases),
                        wanted=limits.processes * FEWEST_ROUNDS,
                        reading=reading,
                        exits=known,
                    )
                )

            done.append(
                _process(
                    *(bench, process_seed, len(cases), watched, limits.precision),
                    *(share, feel, clock_ns, notebook, tell),
                )
            )
    return done


def _process(
    bench: Bench,
    seed: int,
    cases: int,
    watched: Sequence[int],
    precision: float,
    share_ns: float,
    feel: Callable[[], Reading | None],
    clock_ns: Callable[[], int],
    notebook: Notebook | None,
    tell: Callable[[int, Reading | None], None],
) -> Process:
    """One process: rounds until its own medians are settled or its share of the time is over."""
    began = clock_ns()
    order = random.Random(seed)
    sitting = bench.sitting
    if notebook is not None:
        notebook.opened(seed, began, sitting)
    readings = [reading for reading in [feel()] if reading is not None]
    blocks: list[Block] = []
    turn: list[int] = []
    last_ns, is_over = began, False
    while not is_over:
        # A drift within the pair of rounds cancels: the second goes backwards.
        number = len(blocks) // cases
        turn = turn[::-1] if number % 2 else order.sample(range(cases), cases)
        made = bench.round(turn)
        blocks += made
        if number % 2 == 1 and number + 1 >= FEWEST_ROUNDS:
            is_over = (
                number + 1 >= _MOST_ROUNDS
                or clock_ns() - began >= share_ns
                or _settled(blocks, watched, precision)
            )
        reading = None
        if is_over or clock_ns() - last_ns >= _FEEL_NS:
            reading, last_ns = feel(), clock_ns()
        if reading is not None:
            readings.append(reading)
        if notebook is not None:
            notebook.round(made, reading)
        tell(len(blocks), reading)
    ended = clock_ns()
    if notebook is not None:
        notebook.ended(ended)
    return Process(
        seed=seed,
        began_ns=began,
        ended_ns=ended,
        warmup_ns=sitting.warmup_ns,
        settled=sitting.settled,
        dissection=sitting.dissection,
        blocks=tuple(blocks),
        readings=tuple(readings),
    )


def _settled(blocks: Sequence[Block], watched: Sequence[int], precision: float) -> bool:
    """Whether the standard error of each watched median, from its MAD, is within *precision*."""
    for case in watched:
        values = np.array([block.mean_ns for block in blocks if block.case == case])
        middle = np.median(values)
        # 1.4826 MAD is a normal's standard deviation; a median's error is 1.2533 times a mean's.
        spread = 1.4826 * float(np.median(np.abs(values - middle)))
        if 1.2533 * spread / math.sqrt(len(values)) > precision * middle:
            return False
    return True


def _estimates(
    processes: Sequence[Process], cases: Sequence[Case], watched: Sequence[int], seed: int
) -> tuple[tuple[str, Estimate], ...]:
    values = [[process.values(case) for process in processes] for case in watched]
    found = []
    for case, rows, row in zip(
        watched, values, intervals.replicates(values, seed=seed), strict=True
    ):
        low, high = intervals.interval(row, len(processes))
        estimate = Estimate(value=intervals.pooled_median(rows), low=low, high=high)
        found.append((cases[case].exit, estimate))
    return tuple(found)


def _converged(known: Known, precision: float) -> bool:
    return known is not None and all(found.half_width <= precision for _, found in known)
