"""
What pruning saves beside early exit: the shipped network against its pruned form.

    python bench/pruned.py [--processes 10]

Latency is Runner.__call__ on an in-memory sample of the `report` split, preprocessing included,
one thread, all four taking turns: both networks whole (every exit computed) and both with the
policy that was tuned for them on this machine, at the same budget.
"""

import json
import tempfile
from pathlib import Path

from common import in_processes, options, profiled, save, spread

NAMES = ("dense", "pruned")


def worker(folder: Path, seed: int) -> dict[str, float]:
    from edgeexit import demo
    from edgeexit.bundle import load_bundle
    from edgeexit.race import race
    from edgeexit.runtime import Runner
    from edgeexit.samples import find_set

    runners = {}
    for name, file in zip(NAMES, (demo.BUNDLE, demo.PRUNED_BUNDLE), strict=True):
        bundle = load_bundle(folder / file)
        policy = bundle.policy_for("host")
        assert policy is not None
        runners[f"{name}_full"] = Runner(bundle, policy=None, preload=True)
        runners[f"{name}_policy"] = Runner(bundle, policy=policy, preload=True)
    samples = list(find_set("fashion-mnist").split("report").samples)
    found = race(runners, samples, passes=3, seed=seed)
    return {
        **{f"{name}_us": found.latency_ms(name) * 1e3 for name in runners},
        "full_faster": found.speed_up("pruned_full", "dense_full"),
        "policy_faster": found.speed_up("pruned_policy", "dense_policy"),
        "policy_faster_than_own_full": found.speed_up("pruned_policy", "pruned_full"),
    }


def main() -> None:
    given = options(__doc__.splitlines()[1])
    if given.worker:
        print(json.dumps(worker(given.worker, given.seed)))
        return
    from edgeexit import demo, tune
    from edgeexit.evaluate import evaluate
    from edgeexit.samples import find_set

    report = find_set("fashion-mnist").split("report")
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        shipped = ((demo.BUNDLE, demo.RECORD), (demo.PRUNED_BUNDLE, demo.PRUNED_RECORD))
        for name, (file, record) in zip(NAMES, shipped, strict=True):
            bundle = demo.copy_of_shipped_bundle(Path(folder), file)
            costs = profiled(bundle, time_cap_s=30)
            request = tune.Request(target=tune.Target(max_accuracy_drop=demo.MAX_ACCURACY_DROP))
            policy = tune.tune(
                demo.shipped_record(record), costs, request, accept_disturbed=True
            ).policy
            policy.save(bundle.policy_path("host"))
            figures |= {
                f"{name}_profile": costs.verdict.status,
                f"{name}_exit_accuracies": [
                    evaluate(bundle, report, forced(bundle, exit_name)).accuracy
                    for exit_name in bundle.exits
                ],
                f"{name}_policy_accuracy": evaluate(bundle, report, policy).accuracy,
                f"{name}_exit_rates": list(evaluate(bundle, report, policy).exit_rates),
                f"{name}_bundle_bytes": sum(f.stat().st_size for f in bundle.path.rglob("*")),
            }
            figures |= {
                key: value["macs"]
                for key, value in bundle.provenance.get("pruning", {}).items()
                if key in ("before", "after")
            }
        runs = in_processes(given.processes, "pruned.py", folder)
    figures |= {key: spread([run[key] for run in runs]) for key in runs[0]}
    figures["macs_before"], figures["macs_after"] = figures.pop("before"), figures.pop("after")
    save("pruned", "python bench/pruned.py", figures)


def forced(bundle: object, exit_name: str) -> object:
    from edgeexit.policy import Policy

    return Policy.forced(bundle, exit=exit_name, kept=(exit_name,))


if __name__ == "__main__":
    main()
