"""
Ask this machine the questions that the converting machine answered, and compare.

Input tensors must be equal to the byte: preprocessing is the same everywhere. So must integer
logits where XNNPACK computes all of the network, here and where it was converted: its kernels
agree on x86 and ARM. There is one exception: x86 takes the mean over a large map in float and goes
astray within 5e-5 of a step from a tie (5 in 1,000 samples of ResNet-56, none of ResNet-8), so a
few samples may be off by little. Where the runtime's own kernels take part, which round
differently on other processors, all samples may.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, SelfTestError, UsageError
from edgeexit.interpreter import delegate
from edgeexit.runtime import Runner, runtime_name

MAX_STEPS = 2
# One sample in so many may be off although XNNPACK computes everything.
STRAY = 8
MAX_REAL = 1e-3  # float bundles: share of the largest logit


@dataclass(frozen=True, kw_only=True)
class SelfTestReport:
    """
    How this machine's answers compare: *differing* of *numbers* logits, by at most *largest*.

    *largest* and what was *allowed* count steps of the stored integers; for a float bundle they
    are shares of the largest logit. *astray* of the *samples* differ at all, *may_stray* may.
    """

    samples: int
    numbers: int
    differing: int
    largest: float
    allowed: float
    astray: int
    may_stray: int
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
            "differing_samples": self.astray,
            "allowed_samples": self.may_stray,
            "runtime": self.runtime,
        }


def kernels_agree(bundle: Bundle) -> bool:
    """Whether XNNPACK computes all of this integer *bundle*, here and where it was converted."""
    made = bundle.provenance
    return (
        bundle.logits[0].dtype in ("int8", "int16")
        and made.get("outside_xnnpack") == {}
        and "ai-edge-litert" in (made.get("versions") or {})
        and delegate(bundle.model_data()) == "XNNPACK"
    )


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
    limit = MAX_STEPS if is_integer else MAX_REAL
    if not largest <= limit:
        raise _refused(bundle, f"logits differ by {largest:g} here, expected at most {limit:g}")
    astray = int((difference > 0).reshape(len(found), -1).any(axis=1).sum())
    may_stray = -(-len(found) // STRAY) if kernels_agree(bundle) else len(found)
    if astray > may_stray:
        raise _refused(
            bundle,
            f"{astray} of {len(found)} samples are answered otherwise here, "
            f"expected at most {may_stray}: XNNPACK computes all of the network",
        )
    return SelfTestReport(
        samples=len(test.samples),
        numbers=int(logits.size),
        differing=int((difference > 0).sum()),
        largest=largest,
        allowed=limit,
        astray=astray,
        may_stray=may_stray,
        runtime=runtime_name(),
    )


def _refused(bundle: Bundle, what: str) -> SelfTestError:
    return SelfTestError(
        f"{bundle.path}: self-test: {what}",
        hint=f"this machine runs {runtime_name()}; try another version of it",
    )
