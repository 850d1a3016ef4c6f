"""
What a network's exits are worth on this machine: as int8, beside what they cost.

Callers see int8_bundle (a network in memory -> a bundle to be measured) and measured (its
exits' latencies). Hidden here: which of convert's checks a bundle that is thrown away after
measuring needs, and how short a measurement may be.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgeexit.bundle import Bundle
from edgeexit.device import this_device
from edgeexit.errors import UsageError
from edgeexit.host.answers import RealSamples
from edgeexit.host.convert import FEWEST_SAMPLES, OnStep, build
from edgeexit.preprocess import Preprocess
from edgeexit.profile import measure
from edgeexit.runtime import Runner

Interval = tuple[float, float, float]
"""A value with the ends of its 95 % bootstrap interval."""


def int8_bundle(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    preprocess: Preprocess,
    class_names: Sequence[str],
    reals: RealSamples,
    folder: Path,
    on_step: OnStep | None = None,
) -> Bundle:
    """
    Lower *model*, quantize it to int8 and write the bundle *folder*, to be measured.

    *input_shape* is (1, ...) in the network's own layout; *reals* give the activation ranges
    (UsageError for fewer than 16). The road is convert's with fewer comparisons: a pruned
    network that answers the same to everything passes. *model* is set to eval mode. Errors
    otherwise as convert.
    """
    if len(reals) < FEWEST_SAMPLES:
        raise UsageError(
            f"{len(reals)} samples for activation ranges, expected {FEWEST_SAMPLES} or more"
        )
    return build(
        model,
        folder,
        input_shape=tuple(input_shape),
        preprocess=preprocess,
        class_names=class_names,
        reals=reals,
        is_checked=False,
        provenance=lambda quantized: {
            "ranges": {"chosen": quantized.ranges, "count": len(reals)},
            "float_agreement": dict(quantized.agreement),
            "outside_xnnpack": dict(quantized.outside_xnnpack),
        },
        on_step=on_step or (lambda name, done: None),
    )


def int8_accuracies(
    bundle: Bundle, samples: NDArray[Any], labels: NDArray[np.int64]
) -> dict[str, float]:
    """
    Share of right answers of each exit of *bundle*, by the files that would be deployed.

    *samples* (N, ...) as a calibration set holds them, *labels* int64 (N,), N >= 1.
    """
    right = np.zeros(len(bundle.exits), np.int64)
    with Runner(bundle, policy=None) as runner:
        for sample, label in zip(samples, labels, strict=True):
            right += runner.raw_logits(sample).argmax(axis=1) == label
    return dict(zip(bundle.exits, (right / len(labels)).tolist(), strict=True))


def measured(
    bundle: Bundle,
    *,
    seconds: float = 6.0,
    processes: int = 3,
    on_step: Callable[[float], object] | None = None,
) -> dict[str, Interval]:
    """
    Milliseconds to leave at each exit of *bundle* on this machine: exit -> (ms, low, high).

    All exits are kept: the heads on the way are paid for. Measured as edgeexit.profile does, in
    *processes* fresh processes for about *seconds* together (starting them comes on top), with
    95 % bootstrap intervals. DeviceError if a process fails.
    """
    profile = measure(
        bundle,
        this_device(),
        processes=processes,
        time_cap_s=seconds,
        sets=[bundle.exits],
        on_step=on_step,
    )
    found: dict[str, Interval] = {}
    for case in profile.cases:
        latency = profile.latency(case)
        found[case.exit] = (latency.value / 1e6, latency.low / 1e6, latency.high / 1e6)
    return found
