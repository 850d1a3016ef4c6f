"""
Race several ways of answering the same samples against each other in one process.

Callers see race and Race. Hidden here: machines are noisy and drift, so the runners take
turns on short stretches of samples, in an order that changes from turn to turn, and only
figures from the same pass are compared with each other.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from edgeexit.runtime import Runner


@dataclass(frozen=True, kw_only=True)
class Race:
    """
    What each runner needed: *mean_ns[name][pass]* is nanoseconds per sample in one pass.

    A pass visits every sample once with every runner.
    """

    mean_ns: Mapping[str, tuple[float, ...]]

    def latency_ms(self, name: str) -> float:
        """Milliseconds per sample of *name*: the median over passes."""
        return statistics.median(self.mean_ns[name]) / 1e6

    def speed_up(self, name: str, rival: str) -> float:
        """How many times faster *name* is than *rival*: the median over passes of the ratio."""
        pairs = zip(self.mean_ns[rival], self.mean_ns[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def race(
    runners: Mapping[str, Runner],
    samples: Sequence[np.ndarray],
    *,
    passes: int = 5,
    stretch: int = 50,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Race:
    """
    Time *runners* on *samples* (raw, as a calibration set holds them), interleaved.

    Each *stretch* of samples is answered by every runner in a random order before the next
    one begins. *on_step* is called between stretches with the number of answers given.
    """
    order = random.Random(seed)
    stretches = [samples[i : i + stretch] for i in range(0, len(samples), stretch)]
    for runner in runners.values():
        for sample in samples[:stretch]:
            runner(sample)
    means: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(passes):
        total_ns = dict.fromkeys(runners, 0)
        for part in stretches:
            for name in order.sample(list(runners), len(runners)):
                runner = runners[name]
                start = perf_counter_ns()
                for sample in part:
                    runner(sample)
                total_ns[name] += perf_counter_ns() - start
            if on_step is not None:
                on_step(len(part) * len(runners))
        for name, total in total_ns.items():
            means[name].append(total / len(samples))
    return Race(mean_ns={name: tuple(values) for name, values in means.items()})
