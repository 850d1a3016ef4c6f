"""
What choosing thresholds costs: time and memory of learning a path and testing it.

    python bench/choosing.py [--processes 3]

One core and a fresh process for each size: the synthetic samples are made first, then the path is
learned on one half and the other half is counted and tested. Memory is the process's peak, samples
and numpy included. growth is how many times n log n's the time grew with each step in n.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import save

# Numbers of samples and exits.
SIZES = [(n, 6) for n in (1_000, 10_000, 100_000, 1_000_000)] + [
    (n, 10) for n in (10_000, 100_000, 1_000_000)
]
# The bars: samples and exits, seconds, and gigabytes if one is set.
BARS = {(10_000, 6): (1.0, None), (1_000_000, 10): (20.0, 2.0)}


def worker(samples: int, exits: int) -> dict[str, float]:
    """Seconds of learning and of testing, and the peak in gigabytes."""
    import numpy as np

    from edgeexit import certify, nested
    from edgeexit.decision import Costs, Record

    def drawn(seed: int) -> Record:
        random = np.random.default_rng(seed)
        skill = np.linspace(0.6, 1.8, exits, dtype=np.float32)
        margin = skill + random.standard_normal((samples, 1), np.float32)
        margin += 0.35 * random.standard_normal((samples, exits), np.float32)
        label = random.integers(0, 10, samples)
        wrong = (label[:, None] + 1) % 10
        predicted = np.where(margin > 0, label[:, None], wrong)
        margin += 0.7 * random.standard_normal((samples, exits), np.float32)
        return Record(1 / (1 + np.exp(-margin)), predicted, label, np.arange(samples))

    tuning, certificate = drawn(0), drawn(1)
    costs = Costs(np.ones(exits), np.full(exits, 0.08), np.append(np.full(exits - 1, 0.03), 0.0))
    start = time.perf_counter()
    path = nested.learn(tuning, costs, level=0.01, samples=samples, delta=0.05)
    learned = time.perf_counter()
    tally = path.tally(certificate)
    p_values = certify.p_values(tally, 0.01, 0.05, path.tally(tuning))
    certify.last_certified(p_values, 0.05)
    done = time.perf_counter()
    return {
        "learn_s": learned - start,
        "certify_s": done - learned,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "policies": len(path),
    }


def measured(samples: int, exits: int, processes: int) -> dict[str, float]:
    """The medians over fresh processes that have one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"{samples},{exits}"]
    runs = []
    for _ in range(processes):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        runs.append(json.loads(done.stdout))
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"samples": samples, "exits": exits} | {k: round(v, 4) for k, v in found.items()}


def grown(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """*rows* with how their time grew since the size before, in units of n log n."""
    marked: list[dict[str, float]] = []
    for row in rows:
        n = row["samples"]
        before = marked[-1] if marked and marked[-1]["exits"] == row["exits"] else None
        if before is not None:
            m = before["samples"]
            ideal = n * math.log(n) / (m * math.log(m))
            taken = row["learn_s"] + row["certify_s"]
            row = row | {
                "growth": round(taken / (before["learn_s"] + before["certify_s"]) / ideal, 3)
            }
        marked.append(row)
    return marked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        samples, exits = map(int, options.worker.split(","))
        print(json.dumps(worker(samples, exits)))
        return
    rows = []
    for samples, exits in SIZES:
        rows.append(measured(samples, exits, options.processes))
        print(f"  {rows[-1]}", file=sys.stderr)
    bars = []
    for (samples, exits), (seconds, gigabytes) in BARS.items():
        row = next(r for r in rows if (r["samples"], r["exits"]) == (samples, exits))
        met = row["learn_s"] + row["certify_s"] < seconds
        met = met and (gigabytes is None or row["peak_gb"] < gigabytes)
        bars.append({"samples": samples, "exits": exits, "s": seconds, "gb": gigabytes, "met": met})
    command = f"python bench/choosing.py --processes {options.processes}"
    save("choosing", command, {"curve": grown(rows), "bars": bars})


if __name__ == "__main__":
    main()
