"""
Ask this machine the questions that the converting machine answered, and compare.

Input tensors must be equal to the byte: preprocessing is the same everywhere. So must integer
logits where XNNPACK computes all of the network, here and where it was converted: its kernels
agree on x86 and ARM. Other logits may differ by 2 steps of the stored integers: the runtime's
own kernels round differently on other processors.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, SelfTestError, UsageError
from edgeexit.interpreter import delegate
from edgeexit.runtime import Runner, runtime_name

MAX_STEPS = 2
MAX_REAL = 1e-3  # float bundles: share of the largest logit


@dataclass(frozen=True, kw_only=True)
class SelfTestReport:
    """
    How this machine's answers compare: *differing* of *numbers* logits, by at most *largest*.

    *largest* and what was *allowed* count steps of the stored integers; for a float bundle they
    are shares of the largest logit.
    """

    samples: int
    numbers: int
    differing: int
    largest: float
    allowed: float
    runtime: str

    def to_document(self) -> dict[str, Any]:
        """The object that `run --json` prints without inputs."""
        return {
            "selftest": "ok",
            "samples": self.samples,
            "logits": self.numbers,
            "differing": self.differing,
            "largest_difference": self.largest,
            "allowed_difference": self.allowed,
            "runtime": self.runtime,
        }


def allowed_difference(bundle: Bundle) -> float:
    """How far logits may be off on this machine, as SelfTestReport counts: 0 if kernels agree."""
    if bundle.logits[0].dtype not in ("int8", "int16"):
        return MAX_REAL
    made = bundle.provenance
    is_whole = made.get("outside_xnnpack") == {} and "ai-edge-litert" in (
        made.get("versions") or {}
    )
    return 0 if is_whole and delegate(bundle.model_data()) == "XNNPACK" else MAX_STEPS


def run_selftest(bundle: Bundle, threads: int = 1) -> SelfTestReport:
    """Compare every exit's logits; SelfTestError if they differ more than kernels may."""
    test = bundle.selftest()
    found = []
    with Runner(bundle, None, threads) as runner:
        for index, sample in enumerate(test.samples):
            try:
                tensor = runner.input_tensor(sample)
            except UsageError as error:
                # The sample is the bundle's own: the user did nothing wrong.
                raise BadFile(f"{bundle.path}: self-test {error}") from error
            if not np.array_equal(tensor, test.inputs[index]):
                raise SelfTestError(
                    f"{bundle.path}: self-test sample {index} gives another input tensor here",
                    hint="other versions of numpy or Pillow? say which when you report this",
                )
            found.append(runner.raw_logits(sample))
    logits = np.array(found)
    difference = np.abs(logits.astype(np.float64) - test.logits.astype(np.float64))
    is_integer = test.logits.dtype.kind in "iu"
    if not is_integer:
        difference /= max(float(np.abs(test.logits).max()), 1e-9)
    largest = float(difference.max())
    limit = allowed_difference(bundle)
    if not largest <= limit:
        raise SelfTestError(
            f"{bundle.path}: self-test logits differ by {largest:g} here, "
            f"expected at most {limit:g}",
            hint=f"this machine runs {runtime_name()}; try another version of it",
        )
    return SelfTestReport(
        samples=len(test.samples),
        numbers=int(logits.size),
        differing=int((difference > 0).sum()),
        largest=largest,
        allowed=limit,
        runtime=runtime_name(),
    )
