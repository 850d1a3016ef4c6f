"""
Ask this machine the questions that the converting machine answered, and compare.

Input tensors must be equal to the byte: preprocessing is the same everywhere. So must integer
logits where XNNPACK computes all of the network, here and where it was converted: its kernels
agree on x86 and ARM. There is one exception: x86 takes the mean over a large map in float and goes
astray within 5e-5 of a step from a tie (5 in 1,000 samples of ResNet-56, none of ResNet-8), so a
few samples may be off by little.

Other kernels round differently at every layer, and errors grow with depth (tflite-runtime's own:
1 step for the shipped example, 11 for a ResNet-56 with random weights, of a range of 218). There
equality means nothing: what must agree are the answers, at every exit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, SelfTestError, UsageError
from edgeexit.interpreter import delegate
from edgeexit.policy import Confidence, Policy
from edgeexit.runtime import Runner, runtime_name

MAX_STEPS = 2
# One sample in so many may be off although XNNPACK computes everything; elsewhere, one in so many
# may be answered otherwise at an exit.
STRAY = 8
# Share of an exit's range of logits that other kernels may be off by.
MAX_SHARE = 1 / 8
# Schemes that compute in float alone: share of the largest logit.
MAX_REAL = {"float": 1e-3, "float16": 1e-3}


@dataclass(frozen=True, kw_only=True)
class SelfTestReport:
    """
    How this machine's answers compare: *differing* of *numbers* logits, by at most *largest*.

    *largest* and what was *allowed* (at the exit that allows most) count steps of the stored
    integers, or are shares of a float bundle's largest logit. *astray* of the *samples* differ at
    all, *may_stray* may. *same_kernels* tells whether equality was asked for. *agreement* holds
    for each exit the share of samples that it answers alike, *decided* the share that a policy
    lets leave at the same exit with the same answer (None without a policy).
    """

    samples: int
    numbers: int
    differing: int
    largest: float
    allowed: float
    astray: int
    may_stray: int
    same_kernels: bool
    is_integer: bool
    agreement: Mapping[str, float]
    decided: float | None
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
            "same_kernels": self.same_kernels,
            "agreement": dict(self.agreement),
            "decided_alike": self.decided,
            "runtime": self.runtime,
            "summary": str(self),
        }

    def __str__(self) -> str:
        """What differs, as one line."""
        if not self.differing:
            return f"none of {self.numbers} logits differ"
        unit = f"step{'s' * (self.largest > 1)}" if self.is_integer else "of the largest logit"
        said = (
            f"{self.differing} of {self.numbers} logits differ, by at most {self.largest:g} {unit}"
        )
        if self.same_kernels:
            return f"{said}: rounding, in {self.astray} of {self.samples} samples"
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.agreement.items())
        said += f": other kernels than where it was converted; equal answers: {shares}"
        if self.decided is not None:
            said += f"; decided alike by the policy: {self.decided:.1%}"
        return said


def kernels_agree(bundle: Bundle) -> bool:
    """Whether XNNPACK computes all of this integer *bundle*, here and where it was converted."""
    made = bundle.provenance
    return (
        bundle.logits[0].dtype in ("int8", "int16")
        and made.get("outside_xnnpack") == {}
        and "ai-edge-litert" in (made.get("versions") or {})
        and delegate(bundle.model_data()) == "XNNPACK"
    )


def run_selftest(bundle: Bundle, threads: int = 1, policy: Policy | None = None) -> SelfTestReport:
    """
    Compare every exit's logits; SelfTestError if they differ more than kernels may.

    *policy*: also tell for how many samples it decides alike.
    """
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
    logits, wanted = np.array(found), test.logits
    same_kernels = kernels_agree(bundle)
    difference = np.abs(logits.astype(np.float64) - wanted.astype(np.float64)) / _unit(wanted)
    largest = difference.max(axis=(0, 2))
    allowed = _allowed(bundle, wanted, same_kernels)
    for name, found_there, at_most in zip(bundle.exits, largest, allowed, strict=True):
        if not found_there <= at_most:
            raise _refused(
                bundle,
                f"logits differ by {found_there:g} here, expected at most {at_most:g} "
                f"(exit {name!r})",
            )
    few = -(-len(found) // STRAY)
    astray = int((difference > 0).any(axis=(1, 2)).sum())
    if same_kernels and astray > few:
        raise _refused(
            bundle,
            f"{astray} of {len(found)} samples are answered otherwise here, "
            f"expected at most {few}: XNNPACK computes all of the network",
        )
    alike = logits.argmax(axis=2) == wanted.argmax(axis=2)
    for name, same in zip(bundle.exits, alike.T, strict=True):
        if int((~same).sum()) > few:
            raise _refused(
                bundle,
                f"exit {name!r} gives another answer to {int((~same).sum())} of {len(found)} "
                f"samples here, expected at most {few}",
            )
    return SelfTestReport(
        samples=len(found),
        numbers=int(logits.size),
        differing=int((difference > 0).sum()),
        largest=float(largest.max()),
        allowed=float(allowed.max()),
        astray=astray,
        may_stray=few if same_kernels else len(found),
        same_kernels=same_kernels,
        is_integer=_is_integer(wanted),
        agreement={n: float(s.mean()) for n, s in zip(bundle.exits, alike.T, strict=True)},
        decided=None if policy is None else _decided_alike(bundle, policy, logits, wanted),
        runtime=runtime_name(),
    )


def _is_integer(logits: NDArray[Any]) -> bool:
    return logits.dtype.kind in "iu"


def _unit(logits: NDArray[Any]) -> float:
    """What differences are counted in: steps of integers, or a float network's largest logit."""
    return 1.0 if _is_integer(logits) else max(float(np.abs(logits).max()), 1e-9)


def _allowed(bundle: Bundle, wanted: NDArray[Any], same_kernels: bool) -> NDArray[np.float64]:
    """How far the logits of each exit may be off, in _unit."""
    if not same_kernels and bundle.scheme in MAX_REAL:
        return np.full(len(bundle.exits), MAX_REAL[bundle.scheme])
    least = np.full(len(bundle.exits), MAX_STEPS if _is_integer(wanted) else MAX_REAL["float"])
    if same_kernels:
        return least
    real = wanted.astype(np.float64)
    ranges = real.max(axis=(0, 2)) - real.min(axis=(0, 2))
    return np.asarray(np.maximum(least, MAX_SHARE * ranges / _unit(wanted)))


def _decided_alike(
    bundle: Bundle, policy: Policy, here: NDArray[Any], there: NDArray[Any]
) -> float:
    """The share of samples that *policy* lets leave at the same exit with the same answer."""
    decided = []
    for logits in (here, there):
        exit, answer = np.full((2, len(logits)), -1)
        for name in policy.kept:
            k = bundle.exits.index(name)
            labels = logits[:, k].argmax(axis=1)
            sure = Confidence(policy.measure, bundle.logits[k]).many(logits[:, k])
            limits = np.array(policy.limits(name, logits.shape[2]))[labels]
            leaves = (exit < 0) & (sure.astype(np.float64) >= limits)
            exit[leaves], answer[leaves] = k, labels[leaves]
        decided.append((exit, answer))
    (exit_here, answer_here), (exit_there, answer_there) = decided
    return float(((exit_here == exit_there) & (answer_here == answer_there)).mean())


def _refused(bundle: Bundle, what: str) -> SelfTestError:
    return SelfTestError(
        f"{bundle.path}: self-test: {what}",
        hint=f"this machine runs {runtime_name()}; try another version of it, or convert with "
        "another --scheme",
    )
