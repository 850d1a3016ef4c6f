"""
What early exit saves: the demo's policy against its rivals, over fresh processes.

    python bench/early_exit.py [--processes 10]

Latency is Runner.__call__ on an in-memory sample of the `report` split, preprocessing included,
one thread, the runners taking turns. The rivals: the same network without exits, and the
cheapest single exit whose accuracy is within the same budget, each cut out alone. Beside them:
what tune expects of the policy from a profile and the certificate samples, with profiles before
and after the runs, since the machine's speed drifts. What `run` tells over `report` is compared
with that as a share of what the network without exits takes in the same profile or process: the
drift falls out.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import in_processes, options, profiled, save, spread


def worker(path: Path, seed: int) -> dict[str, float]:
    from edgeexit import tune
    from edgeexit.bundle import load_bundle
    from edgeexit.demo import contenders
    from edgeexit.race import race
    from edgeexit.samples import find_set

    bundle = load_bundle(path)
    tuned = bundle.policy_for("host")
    assert tuned is not None
    runners = contenders(bundle, tuned, tune.best_static_exit(tuned))
    samples = list(find_set("fashion-mnist").split("report").samples)
    found = race(runners, samples, passes=3, seed=seed)
    told = alone({name: runners[name] for name in ("policy", "static")}, samples)
    return {
        **{f"{name}_alone_us": mean_us for name, mean_us in told.items()},
        **{f"{name}_us": found.latency_ms(name) * 1e3 for name in runners},
        "faster_than_static": found.speed_up("policy", "static"),
        "faster_than_best_static": found.speed_up("policy", "best_static"),
        "faster_than_full": found.speed_up("policy", "full"),
    }


def alone(runners: dict[str, Any], samples: list[Any]) -> dict[str, float]:
    """Mean microseconds that each of *runners* tells, in turns of 250 samples, three times all."""
    told: dict[str, list[int]] = {name: [] for name in runners}
    for first in list(range(0, len(samples), 250)) * 3:
        for name, runner in runners.items():
            told[name] += [runner(sample).latency_ns for sample in samples[first : first + 250]]
    return {name: statistics.mean(values) / 1e3 for name, values in told.items()}


def main() -> None:
    given = options(__doc__.splitlines()[1])
    if given.worker:
        print(json.dumps(worker(given.worker, given.seed)))
        return
    from edgeexit import demo, tune
    from edgeexit.choice import FIXED
    from edgeexit.evaluate import evaluate
    from edgeexit.samples import find_set

    with tempfile.TemporaryDirectory() as folder:
        bundle = demo.copy_of_shipped_bundle(Path(folder))
        costs = profiled(bundle, time_cap_s=40)
        request = tune.Request(target=tune.Target(max_accuracy_drop=demo.MAX_ACCURACY_DROP))
        policy = tune.tune(demo.shipped_record(), costs, request, accept_disturbed=True).policy
        policy.save(bundle.policy_path("host"))
        report = find_set("fashion-mnist").split("report")
        full, tuned = evaluate(bundle, report, None), evaluate(bundle, report, policy)
        runs = in_processes(given.processes, "early_exit.py", str(bundle.path))
        later = profiled(bundle, time_cap_s=40)
        again = tune.Request(
            target=request.target,
            method=FIXED,
            thresholds=policy.thresholds,
            measure=policy.measure,
        )
        priced = tune.tune(demo.shipped_record(), later, again, accept_disturbed=True).policy
    expected_us = [made.expected["mean_ms"] * 1e3 for made in (policy, priced)]
    shares = [made.expected["mean_ms"] / made.expected["full_ms"] for made in (policy, priced)]
    figures = {
        "profiles": [costs.verdict.status, later.verdict.status],
        "accuracy_full": full.accuracy,
        "accuracy_policy": tuned.accuracy,
        "exit_rates": list(tuned.exit_rates),
        "exit_rates_expected": policy.expected["exit_rates"],
        "expected_us": expected_us,
        "expected_share": shares,
        "share_over_expected": spread(
            [
                run["policy_alone_us"] / run["static_alone_us"] / statistics.mean(shares)
                for run in runs
            ]
        ),
        "certified_drop": policy.certificate["level"],
        "certificate": {
            key: policy.certificate[key]
            for key in ("test", "samples", "delta", "harmful", "helpful", "p_value")
        },
        "thresholds": [str(value) for value in policy.thresholds],
        "measure": policy.measure,
        "best_static_exit": tune.best_static_exit(policy),
        **{key: spread([run[key] for run in runs]) for key in runs[0]},
    }
    save("early_exit", "python bench/early_exit.py", figures)


if __name__ == "__main__":
    main()
