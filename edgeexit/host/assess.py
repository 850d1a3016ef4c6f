"""
What a network's exits are worth on this machine: as int8, beside what they cost.

Callers see int8_bundle (a network in memory -> a bundle to be measured) and measured (its
exits' latencies). Hidden here: which of convert's checks a bundle that is thrown away after
measuring needs, and how short a measurement may be.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from edgeexit.bundle import Bundle
from edgeexit.device import this_device
from edgeexit.errors import UsageError
from edgeexit.host.answers import RealSamples
from edgeexit.host.convert import FEWEST_SAMPLES, OnStep, build
from edgeexit.preprocess import Preprocess
from edgeexit.profile import measure

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
    (UsageError for fewer than 16). The road is convert's without its comparisons with torch and
    with the uncut network, which a pruned network that answers the same to everything would not
    pass. *model* is set to eval mode. Errors otherwise as convert.
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
