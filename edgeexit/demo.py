"""
The main job on the shipped example: profile, tune, run, and an honest comparison.

Callers see run_demo and Demo. Everything here is what a user does by hand with `profile`,
`tune`, `run` and `evaluate`; nothing is read from earlier results except the shipped record
of int8 logits, which `evaluate --record` made.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit import names, tune
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.collect import FEWEST_PROCESSES, Limits
from edgeexit.device import this_device
from edgeexit.errors import UsageError
from edgeexit.evaluate import Evaluation, Record, evaluate, record
from edgeexit.files import read_json
from edgeexit.instrument import measure
from edgeexit.policy import Policy
from edgeexit.preprocess import load_image
from edgeexit.profile import Profile
from edgeexit.race import Race, race
from edgeexit.request import CERTIFICATE, TUNING, Request, check_inputs
from edgeexit.runtime import Prediction, Runner
from edgeexit.samples import CalibrationSet, find_set
from edgeexit.targets import Target
from edgeexit.worth import Worth

BUNDLE = "fashion.edgeexit"
RECORD = "fashion-record.npz"
PRUNED_BUNDLE = "fashion-pruned.edgeexit"
PRUNED_RECORD = "fashion-pruned-record.npz"
PICTURES = "images"
MAX_ACCURACY_DROP = 0.01

PASSES = 4
_BLOCK_MS = 5.0  # short ones, so that few processes see many rounds

# Told what is going on and how far it has come (0..1); 1 ends a step.
Step = Callable[[str, float], object]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One shipped picture, the class it shows, and the policy's answer."""

    path: Path
    expected: str
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A bundle with its profile and policy; *full* and *tuned* on the `report` split."""

    profile: Profile
    policy: Policy
    worth: Worth
    full: Evaluation
    tuned: Evaluation


@dataclass(frozen=True, kw_only=True)
class Demo:
    """
    What the demo measured, all on the `report` split and on this machine.

    *dense* is the shipped network, *pruned* its pruned form, *best_static* the cheapest single
    exit of the dense one within the budget. *race* holds the interleaved latencies of "full"
    (every exit computed), "static" (final exit alone), "best_static", "policy", "pruned_full" and
    "pruned_policy".
    """

    dense: Tuned
    pruned: Tuned
    best_static: Evaluation
    race: Race
    best_static_exit: str
    pictures: Sequence["Picture"]

    def to_document(self) -> dict[str, Any]:
        """The object that `edgeexit demo --json` prints; latencies in ms, accuracies 0..1."""
        return {
            "accuracy_full": self.dense.full.accuracy,
            "accuracy_policy": self.dense.tuned.accuracy,
            "accuracy_pruned_full": self.pruned.full.accuracy,
            "accuracy_pruned_policy": self.pruned.tuned.accuracy,
            "latency_full_ms": self.race.latency_ms("full"),
            "latency_static_ms": self.race.latency_ms("static"),
            "latency_best_static_ms": self.race.latency_ms("best_static"),
            "best_static_exit": self.best_static_exit,
            "latency_policy_ms": self.race.latency_ms("policy"),
            "latency_pruned_full_ms": self.race.latency_ms("pruned_full"),
            "latency_pruned_policy_ms": self.race.latency_ms("pruned_policy"),
            "exit_rates": list(self.dense.tuned.exit_rates),
            "exit_rates_pruned": list(self.pruned.tuned.exit_rates),
            "verdict": self.dense.profile.verdict.to_document(),
            "verdict_pruned": self.pruned.profile.verdict.to_document(),
        }


def example(name: str) -> Path:
    """The path of the shipped example file or folder *name*; UsageError if it is not shipped."""
    path = names.data_folder("examples") / name
    if not path.exists():
        raise UsageError(
            f"{path}: not shipped with this installation",
            hint="work in a checkout of the project, which holds all examples",
        )
    return path


def contenders(bundle: Bundle, policy: Policy, best_static_exit: str) -> dict[str, Runner]:
    """
    The four runners that the demo and `bench/` race against each other.

    "best_static" is the bundle cut down to *best_static_exit* alone, without other heads;
    "static" the same for the final exit.
    """
    return {
        "full": Runner(bundle, policy=None, preload=True),
        "static": Runner(bundle, policy=_alone(bundle, bundle.exits[-1]), preload=True),
        "best_static": Runner(bundle, policy=_alone(bundle, best_static_exit), preload=True),
        "policy": Runner(bundle, policy=policy, preload=True),
    }


def _alone(bundle: Bundle, exit_name: str) -> Policy:
    return Policy.forced(bundle, exit=exit_name, kept=(exit_name,))


def run_demo(
    bundle: Bundle,
    pruned: Bundle,
    *,
    logits: tuple[Record, Record] | None = None,
    time_cap_s: float = 8.0,
    on_step: Step | None = None,
) -> Demo:
    """
    Profile, tune and run *bundle* and its *pruned* form here and compare them with their rivals.

    *logits* are both records of the `tuning` and `certificate` splits; None makes them now, for
    which those splits must be installed. Each profile takes about *time_cap_s* seconds; one that
    was disturbed is used all the same, its verdict says so. The policies are saved into the
    bundles; each certificate counts as the first use of its samples, no ledger is kept.
    Raises what profile, tune and evaluate raise.
    """
    step = on_step or _silent
    records = logits or (None, None)
    dense = _tuned(bundle, records[0], time_cap_s, "", step)
    smaller = _tuned(pruned, records[1], time_cap_s, "pruned: ", step)

    with Runner(bundle, policy=dense.policy, preload=True) as runner:
        pictures = [
            Picture(
                path=path,
                expected=expected,
                prediction=runner(load_image(path, bundle.preprocess)),
            )
            for path, expected in shipped_pictures()
        ]
    step("run", 1.0)

    report = _origin(bundle).split("report")
    best = tune.best_static_exit(dense.policy)
    best_static = evaluate(bundle, report, _alone(bundle, best))
    runners = {
        **contenders(bundle, dense.policy, best),
        "pruned_full": Runner(pruned, policy=None, preload=True),
        "pruned_policy": Runner(pruned, policy=smaller.policy, preload=True),
    }
    total, answered = PASSES * len(runners) * len(report), 0

    def advance(answers: int) -> None:
        nonlocal answered
        answered += answers
        step("compare", answered / total)

    result = race(runners, list(report.samples), passes=PASSES, on_step=advance)
    for runner in runners.values():
        runner.close()
    return Demo(
        dense=dense,
        pruned=smaller,
        best_static=best_static,
        race=result,
        best_static_exit=best,
        pictures=pictures,
    )


def _tuned(
    bundle: Bundle, logits: Record | None, time_cap_s: float, word: str, step: Step
) -> Tuned:
    device, origin = this_device(), _origin(bundle)
    costs = measure(
        bundle,
        device,
        limits=Limits(
            processes=FEWEST_PROCESSES, precision=0.02, time_cap_s=time_cap_s, block_ms=_BLOCK_MS
        ),
        on_step=lambda progress: step(f"{word}profile", min(progress.done, 0.999)),
    )
    step(f"{word}profile", 1.0)
    if logits is None:
        logits = _fresh_record(bundle, origin, lambda name, done: step(word + name, done))
    check_inputs(bundle, logits, costs, device)
    # It shows what comes out here and now: on a restless machine that is said, not refused.
    request = Request(target=Target(max_accuracy_drop=MAX_ACCURACY_DROP))
    found = tune.tune(logits, costs, request, accept_disturbed=True)
    policy = found.policy
    policy.save(bundle.policy_path(device))
    step(f"{word}tune", 1.0)
    report = origin.split("report")
    full = evaluate(bundle, report, None)
    step(f"{word}evaluate", 0.5)
    tuned = evaluate(bundle, report, policy)
    step(f"{word}evaluate", 1.0)
    return Tuned(profile=costs, policy=policy, worth=found.worth, full=full, tuned=tuned)


def _origin(bundle: Bundle) -> CalibrationSet:
    if bundle.calibration_set is None:
        raise UsageError(f"{bundle.path}: names no calibration set")
    return find_set(bundle.calibration_set["name"])


def shipped_pictures() -> list[tuple[Path, str]]:
    """The shipped pictures with the name of the class that each shows, in file order."""
    folder = example(PICTURES)
    expected = read_json(folder / "expected.json")
    return [(folder / name, expected.get(name, str)) for name in expected.values]


def copy_of_shipped_bundle(folder: Path, name: str = BUNDLE) -> Bundle:
    """The shipped bundle *name*, copied below *folder*: what is installed may be read-only."""
    target = folder / name
    shutil.copytree(example(name), target, ignore=shutil.ignore_patterns("policies"))
    return load_bundle(target)


def shipped_record(name: str = RECORD) -> Record:
    """A shipped record of a shipped bundle's `tuning` and `certificate` splits."""
    return Record.load(example(name))


def _fresh_record(bundle: Bundle, origin: CalibrationSet, step: Step) -> Record:
    parts = [origin.split(split) for split in (TUNING, CERTIFICATE)]
    total, answered = sum(map(len, parts)), 0

    def advance(answers: int) -> None:
        nonlocal answered
        answered += answers
        step("record", min(answered / total, 0.999))

    made = record(bundle, parts, set_name=origin.name, set_digest=origin.digest, on_step=advance)
    step("record", 1.0)
    return made


def _silent(name: str, done: float) -> None:
    pass
