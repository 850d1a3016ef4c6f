"""
The process in which calls are timed: `python -m edgeexit.timing`, started by instrument.

It reads JSON lines on stdin, a plan first and then one command after another, and answers each
with one JSON line: "ready", "round", "window", "heated", or "failed" with an error. A fresh
process for each part of a profile, because where memory happens to lie decides up to 20 % of a
latency and is drawn anew only then. Inside a timed window there are only calls and the clock:
nothing is printed, written or made there. It ends when its stdin does.
"""

import gc
import hashlib
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter_ns, process_time_ns, sleep
from typing import Any

from edgeexit import series
from edgeexit.blocks import Block, Case

Call = Callable[[Any], object]
Samples = Sequence[Any]
Warm = tuple[tuple[int, ...], int]

_SINGLES = 20  # single calls that are timed in each block
_WARMUP_CALLS = (12, 200)  # fewest and most
_WARMUP_NS = 20_000_000
_FEWEST_CALLS = 5
PACED_CALLS = 3  # in a block, because each of them takes its time
_YARDSTICK = bytes(16384)
_YARDSTICK_TURNS = 9


def yardstick_ns() -> float:
    """
    Nanoseconds of one turn of a fixed loop: SHA-256 of 16 KiB, the median of 9 turns.

    It stays in the first-level cache and does the same arithmetic everywhere and always, so
    that its time tells of the clock and of whoever shares the core, not of the network.
    """
    turns = []
    for _ in range(_YARDSTICK_TURNS):
        start = perf_counter_ns()
        hashlib.sha256(_YARDSTICK)
        turns.append(perf_counter_ns() - start)
    return statistics.median(turns)


def time_block(
    step: Call, samples: Samples, calls: int, singles: int = _SINGLES
) -> tuple[int, int, int, list[int]]:
    """
    Call *step* with *samples* in turn, *calls* times without a pause.

    Returns when it began, wall-clock and CPU nanoseconds of all calls together, and the
    nanoseconds of up to *singles* of them, evenly spread. Besides the calls the window holds
    two readings of the clock for each single call and a bare loop.
    """
    queue = [samples[k % len(samples)] for k in range(calls)]
    count = min(singles, calls)
    edges = [calls * k // count for k in range(count + 1)]
    groups = [(queue[first], queue[first + 1 : last]) for first, last in pairwise(edges)]
    found = [0] * count
    step(queue[-1])  # back into the caches after the other cases
    cpu = process_time_ns()
    began = perf_counter_ns()
    for k, (first, rest) in enumerate(groups):
        start = perf_counter_ns()
        step(first)
        found[k] = perf_counter_ns() - start
        for sample in rest:
            step(sample)
    return began, perf_counter_ns() - began, process_time_ns() - cpu, found


def time_paced(
    step: Call, samples: Samples, calls: int, rate_hz: float
) -> tuple[int, int, int, list[int]]:
    """
    As time_block, but one call every 1 / *rate_hz* seconds, asleep in between.

    Wall-clock and CPU time are those of the calls, without the sleep.
    """
    queue = [samples[k % len(samples)] for k in range(calls)]
    found = [0] * calls
    cpu = [0] * calls
    began = perf_counter_ns()
    for k in range(calls):
        pause = began + (k + 1) * 1e9 / rate_hz - perf_counter_ns()
        if pause > 0:
            sleep(pause / 1e9)
        cpu_start = process_time_ns()
        start = perf_counter_ns()
        step(queue[k])
        found[k] = perf_counter_ns() - start
        cpu[k] = process_time_ns() - cpu_start
    return began, sum(found), sum(cpu), found


def warm_up(step: Call, samples: Samples) -> Warm:
    """
    Nanoseconds of each of the first calls, and which of them was the first warm one.

    The very first opens the segments. Goes on until the rule of series.warm_from finds the
    first warm call in the first third; at least 12 calls and 20 ms, at most 200 calls.
    """
    fewest, most = _WARMUP_CALLS
    found: list[int] = []
    while len(found) < most:
        start = perf_counter_ns()
        step(samples[len(found) % len(samples)])
        found.append(perf_counter_ns() - start)
        is_long = len(found) % fewest == 0 and sum(found[1:]) >= _WARMUP_NS
        if is_long and series.warm_from(found) <= len(found) // 3:
            break
    return tuple(found), series.warm_from(found)


class Stopwatch:
    """Times the cases of one plan, whose callables are *steps*, in this process."""

    def __init__(self, steps: Sequence[Call], samples: Samples, plan: dict[str, Any]) -> None:
        self._steps, self._samples = steps, samples
        self._rate_hz: float | None = plan["rate_hz"]
        self.warmups = [warm_up(step, samples) for step in steps]
        self._call_ns = [
            max(1.0, statistics.median(found[settled:] or found[-1:]))
            for found, settled in self.warmups
        ]
        self._calls = [
            max(_FEWEST_CALLS, math.ceil(plan["block_ms"] * 1e6 / call)) for call in self._call_ns
        ]
        gc.collect()
        gc.freeze()

    def block(self, case: int) -> Block:
        """One block of *case*, the yardstick just before."""
        step, samples = self._steps[case], self._samples
        if self._rate_hz is not None:
            calls = PACED_CALLS
            began, wall, cpu, single = time_paced(step, samples, calls, self._rate_hz)
            yardstick = yardstick_ns()  # behind: before it would wake the core up
        else:
            yardstick = yardstick_ns()
            calls = self._calls[case]
            began, wall, cpu, single = time_block(step, samples, calls)
        return Block(
            case=case,
            at_ns=began,
            calls=calls,
            mean_ns=wall / calls,
            cpu_ns=cpu / calls,
            yardstick_ns=yardstick,
            calls_ns=tuple(single),
        )

    def window(self, case: int, seconds: float) -> dict[str, int]:
        """Calls of *case* (-1: none, asleep) for at least *seconds*, for a meter to watch."""
        began = perf_counter_ns()
        calls = 0
        if case < 0:
            sleep(seconds)
        elif self._rate_hz is not None:
            calls = max(1, math.ceil(seconds * self._rate_hz))
            time_paced(self._steps[case], self._samples, calls, self._rate_hz)
        else:
            # Chunks of about 50 ms: between them only the clock is read.
            chunk = max(1, math.ceil(50e6 / self._call_ns[case]))
            while perf_counter_ns() - began < seconds * 1e9:
                time_block(self._steps[case], self._samples, chunk, 1)
                calls += chunk + 1
        return {"case": case, "began_ns": began, "ended_ns": perf_counter_ns(), "calls": calls}

    def heat(self, seconds: float) -> None:
        """Call all cases in turn for *seconds*."""
        began = perf_counter_ns()
        while perf_counter_ns() - began < seconds * 1e9:
            for step, calls in zip(self._steps, self._calls, strict=True):
                time_block(step, self._samples, calls, 1)


def main() -> int:
    """Do what the lines on stdin ask for; errors of edgeexit go out as a line."""
    from edgeexit.errors import EdgeExitError

    # Ctrl-C reaches the whole group: the parent decides, and closes our stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # A library that prints on stdout must not spoil an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        plan: dict[str, Any] = json.loads(sys.stdin.readline())
        if plan["cores"]:
            os.sched_setaffinity(0, plan["cores"])
        watch = _prepare(plan, say)
        for text in sys.stdin:
            order = json.loads(text)
            if "round" in order:
                say({"round": [watch.block(case).to_document() for case in order["round"]]})
            elif "window" in order:
                say({"window": watch.window(*order["window"])})
            else:
                watch.heat(order["heat"])
                say({"heated": True})
    except EdgeExitError as error:
        say({"failed": [type(error).__name__, str(error), error.hint]})
    except BrokenPipeError:
        pass
    return 0


def _prepare(plan: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> Stopwatch:
    from edgeexit.bundle import load_bundle
    from edgeexit.dissect import dissect
    from edgeexit.errors import BadFile
    from edgeexit.files import Table
    from edgeexit.interpreter import delegate
    from edgeexit.policy import Policy
    from edgeexit.runtime import Runner

    bundle = load_bundle(plan["folder"], verify=False)
    if bundle.digest != plan["bundle"]:
        raise BadFile(f"{bundle.path}: was changed while it was measured", hint="begin anew")
    samples = list(bundle.selftest().samples)
    threads: int = plan["threads"]
    found = dissect(bundle, samples, threads) if plan["dissect"] else None
    cases = [Case.from_document(Table(entry, "plan")) for entry in plan["cases"]]
    steps = [Runner(bundle, Policy.forced(bundle, case.exit, case.kept), threads) for case in cases]
    watch = Stopwatch(steps, samples, plan)
    say(
        {
            "ready": {
                "warmup_ns": [calls for calls, _ in watch.warmups],
                "settled": [settled for _, settled in watch.warmups],
                "dissection": None if found is None else found.to_document(),
                "delegate": delegate(bundle.model_data()),
            }
        }
    )
    return watch


if __name__ == "__main__":
    sys.exit(main())
