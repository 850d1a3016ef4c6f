"""
What this machine answers, as numbers that can be laid beside another machine's.

    python tests/answers.py JOB.json OUT.npz

JOB is {"bundles": {PATH: [SAMPLES.npy, COUNT]}, "policies": {PATH: POLICY.json}, "selftests":
[PATH]}. OUT holds, under PATH/..., the stored logits of all exits, labels and confidences by every
measure, the decisions of the chain that stops early, and the report of the self-test where it is
asked for; under "about" what this machine is.
"""

import json
import platform
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import vetting
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.errors import EdgeExitError
from edgeexit.interpreter import delegate, runtime_name
from edgeexit.machine import this_machine
from edgeexit.policy import MEASURES, Confidence, Policy
from edgeexit.runtime import Runner
from edgeexit.selftest import run_selftest
from edgeexit.state import emulation

# The chain that stops early is computed for so many samples only: all confidences are compared.
CHAINED = 20

Arrays = dict[str, NDArray[Any]]


def read(bundle: Bundle, logits: NDArray[Any]) -> NDArray[np.float64]:
    """Labels and confidences (measures, exits, N, 2) of the stored *logits* (N, exits, classes)."""
    found = []
    for measure in MEASURES:
        for exit, spec in enumerate(bundle.logits):
            rows = np.ascontiguousarray(logits[:, exit])
            confidence = Confidence(measure, spec)
            one = np.array([confidence.read(row.data) for row in rows])
            assert (one[:, 1] == confidence.many(rows)).all(), "one by one and together differ"
            found.append(one)
    return np.array(found).reshape(len(MEASURES), len(bundle.exits), len(logits), 2)


def answers(
    path: str, samples: NDArray[Any], policy: str | None, *, is_tested: bool = False
) -> Arrays:
    """All that the bundle *path* says to *samples*."""
    bundle = load_bundle(path)
    with Runner(bundle, None) as runner:
        logits = np.stack([runner.raw_logits(sample) for sample in samples])
    segments = [delegate(bundle.read_file(segment.file)) for segment in bundle.segments]
    selftest = None
    if is_tested:
        try:
            selftest = run_selftest(bundle).to_document()
        except EdgeExitError as error:
            selftest = {"selftest": str(error)}
    facts = {"segments": segments, "whole": delegate(bundle.model_data()), "selftest": selftest}
    found = {"logits": logits, "read": read(bundle, logits), "facts": np.array(json.dumps(facts))}
    if policy is not None:
        with Runner(bundle, Policy.load(policy)) as runner:
            taken = [runner(sample) for sample in samples[:CHAINED]]
        found["chain"] = np.array([(one.exit, one.label, one.confidence) for one in taken])
    return found


def policy_for(bundle: Bundle, samples: NDArray[Any], device: str = "any") -> Policy:
    """Of the samples that get to an exit about half leave there."""
    found = answers(str(bundle.path), samples, None)["read"][0, :-1, :, 1]
    return Policy(
        device=device,
        bundle_digest=bundle.digest,
        measure=next(iter(MEASURES)),
        exits=bundle.exits,
        thresholds=tuple(float(np.median(row)) for row in found),
    )


def main(job: str, out: str) -> None:
    with open(job) as file:  # noqa: PTH123
        order = json.load(file)
    arrays: Arrays = {
        "about": np.array(
            json.dumps(
                {
                    "processor": platform.machine(),
                    "runtime": runtime_name(),
                    "emulated": emulation(this_machine()),
                }
            )
        )
    }
    for path, (samples, count) in order["bundles"].items():
        policy, is_tested = order["policies"].get(path), path in order["selftests"]
        found = answers(path, np.load(samples)[:count], policy, is_tested=is_tested)
        arrays |= {f"{path}/{key}": value for key, value in found.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    # These files are sound; to try them all out first would take as long again.
    vetting._try = lambda files, timeout_s: None
    main(*sys.argv[1:])
