"""
The process in which calls are timed: `python -m edgeexit.timing`, started by profile.

It reads a plan (JSON) on stdin and writes JSON lines: "ready" with the warm-up, one "round" for
each round of blocks, "failed" with an error. A fresh process for each part of a profile, because
where memory happens to lie decides up to 20 % of a latency and is drawn anew only then. Lines
are written between rounds; inside a block there are only calls.
"""

import gc
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

_WARMUP_CALLS = 12
_FEWEST_ROUNDS = 3


def block_ns(step: Callable[[Any], object], samples: Sequence[Any], calls: int) -> float:
    """Mean nanoseconds of *calls* calls of *step*, which takes *samples* in turn."""
    queue = [samples[k % len(samples)] for k in range(calls)]
    step(queue[-1])  # back into the caches after the other cases
    start = perf_counter_ns()
    for sample in queue:
        step(sample)
    return (perf_counter_ns() - start) / calls


def warm_up(step: Callable[[Any], object], samples: Sequence[Any]) -> list[int]:
    """Nanoseconds of each of the first calls; the very first one opens the segments."""
    found = []
    for k in range(_WARMUP_CALLS):
        start = perf_counter_ns()
        step(samples[k % len(samples)])
        found.append(perf_counter_ns() - start)
    return found


def time_cases(
    steps: Sequence[Callable[[Any], object]],
    samples: Sequence[Any],
    plan: dict[str, Any],
    say: Callable[[dict[str, Any]], None],
) -> None:
    """
    Time *steps* in interleaved blocks until plan["rounds"] or plan["time_cap_s"] is reached.

    Each round times one block of every step, in a new random order drawn from plan["seed"].
    """
    began = perf_counter_ns()
    warmup = [warm_up(step, samples) for step in steps]
    calls = [
        max(1, math.ceil(plan["block_ms"] * 1e6 / statistics.median(first[4:]))) for first in warmup
    ]
    say({"ready": {"warmup_ns": warmup, "calls": calls}})
    gc.collect()
    gc.freeze()
    order = random.Random(plan["seed"])
    for number in range(plan["rounds"]):
        spent_s = (perf_counter_ns() - began) / 1e9
        if number >= _FEWEST_ROUNDS and spent_s > plan["time_cap_s"]:
            break
        blocks = [0.0] * len(steps)
        for k in order.sample(range(len(steps)), len(steps)):
            blocks[k] = round(block_ns(steps[k], samples, calls[k]), 1)
        say({"round": blocks})


def main() -> int:
    """Time what the plan on stdin asks for; errors of edgeexit go out as a line."""
    from edgeexit.bundle import load_bundle
    from edgeexit.errors import EdgeExitError
    from edgeexit.policy import Policy
    from edgeexit.runtime import Runner

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    plan: dict[str, Any] = json.load(sys.stdin)
    try:
        bundle = load_bundle(plan["bundle"], verify=False)
        samples = list(bundle.selftest().samples)
        runners = [
            Runner(bundle, Policy.forced(bundle, case["exit"], case["kept"]), plan["threads"])
            for case in plan["cases"]
        ]
        time_cases(runners, samples, plan, say)
    except EdgeExitError as error:
        say({"failed": [type(error).__name__, str(error), error.hint]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
