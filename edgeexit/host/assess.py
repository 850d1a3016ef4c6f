"""
What a network's exits are worth on this machine: as int8, beside what they cost.

Callers see assess, Assessment and tail_hint, and the pieces int8_bundle, int8_accuracies and
measured. Hidden here: which of convert's checks a bundle that is thrown away after measuring
needs, and how long a measurement may take.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.bundle import Bundle
from edgeexit.collect import FEWEST_PROCESSES, Limits
from edgeexit.device import this_device
from edgeexit.errors import UsageError
from edgeexit.host.answers import RealSamples, spread
from edgeexit.host.checkpoint import Checkpoint
from edgeexit.host.convert import FEWEST_SAMPLES, OnStep, build
from edgeexit.host.feed import to_input
from edgeexit.host.gates import Opened
from edgeexit.host.graph import Graph, parameters
from edgeexit.host.lower import from_torch
from edgeexit.host.material import Material
from edgeexit.host.model import exit_outputs
from edgeexit.host.torch_answers import torch_logits
from edgeexit.instrument import measure
from edgeexit.machine import this_machine
from edgeexit.preprocess import Preprocess, real_values
from edgeexit.report import milliseconds, text_table
from edgeexit.runtime import Runner
from edgeexit.samples import is_set, load_samples
from edgeexit.state import machine_facts

Interval = tuple[float, float, float]
"""A value with the ends of an interval around it."""

MOST_JUDGED = 2000  # samples: their accuracy is known to about one point
RANGES_SAMPLES = 500
RACED = 40  # samples
_BLOCK_MS = 10.0


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """
    One exit: held-out accuracies in torch and of the int8 file, and what it costs to reach it.

    *macs* and *parameters* count its own head but no other's; *int8_bytes* are the segments up
    to it, all heads on the way included; *latency_ms* is with all exits kept (95 % interval).
    """

    name: str
    float_accuracy: float
    int8_accuracy: float
    macs: int
    parameters: int
    int8_bytes: int
    latency_ms: Interval | None


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """
    One network, judged on *samples* held-out training samples and measured on *device*.

    *macs* and *parameters* are the whole network's; *bundle* lies where assess was told to, and
    *raced* are raw samples to race it with, as long as it is to be compared.
    """

    device: str
    cpu: str
    samples: int
    macs: int
    parameters: int
    rows: tuple[ExitRow, ...]
    bundle: Bundle
    raced: NDArray[Any]

    def row(self, name: str) -> ExitRow | None:
        """The exit *name*, None if this network has none of that name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def best(self) -> ExitRow:
        """The exit with the most right answers as int8, the earliest of equals."""
        return max(self.rows, key=lambda row: row.int8_accuracy)

    def text(self) -> str:
        """A table with one line for each exit, and what its figures are."""
        rows = [[row.name, *cells(row)] for row in self.rows]
        hint = tail_hint(self)
        return "\n".join(
            [
                text_table(["exit", *COLUMNS], rows),
                "",
                *legend(self),
                *([hint] if hint else []),
            ]
        )

    def to_document(self) -> dict[str, Any]:
        """The assessment as plain values, for --json."""
        return {
            "device": self.device,
            "cpu": self.cpu,
            "samples": self.samples,
            "macs": self.macs,
            "parameters": self.parameters,
            "exits": [_plain(row) for row in self.rows],
            "tail_hint": tail_hint(self),
        }


COLUMNS = ("float", "int8", "MMACs", "parameters", "int8 bytes", "ms (95 % interval)")


def cells(row: ExitRow) -> list[str]:
    """The figures of *row* under COLUMNS."""
    latency = "-"
    if row.latency_ms is not None:
        value, low, high = map(milliseconds, row.latency_ms)
        latency = f"{value} ({low} .. {high})"
    return [
        f"{row.float_accuracy:.2%}",
        f"{row.int8_accuracy:.2%}",
        millions(row.macs),
        f"{row.parameters:,}",
        f"{row.int8_bytes:,}",
        latency,
    ]


def millions(count: int) -> str:
    """*count* in millions, as the papers print MACs."""
    return f"{count / 1e6:.2f}" if count >= 10_000_000 else f"{count / 1e6:.4f}"


def legend(net: Assessment) -> list[str]:
    """What the figures under COLUMNS are."""
    where = f"{net.device} ({net.cpu})" if net.cpu else net.device
    return [
        f"float, int8: right of {net.samples} held-out training samples.",
        f"ms: to leave there as int8 with all exits kept, 1 thread, on {where}.",
    ]


def bounds(interval: Interval) -> dict[str, float]:
    """An interval as plain values, for JSON."""
    return dict(zip(("value", "low", "high"), interval, strict=True))


def _plain(row: ExitRow) -> dict[str, Any]:
    document = asdict(row)
    document["latency_ms"] = None if row.latency_ms is None else bounds(row.latency_ms)
    return document


def tail_hint(net: Assessment) -> str | None:
    """A line if the final exit answers worse than an earlier one, as int8; else None."""
    best, final = net.best, net.rows[-1]
    if best.int8_accuracy <= final.int8_accuracy:
        return None
    saved = final.macs - best.macs
    return (
        f"The final exit ({final.int8_accuracy:.2%}) is no better here than {best.name!r} "
        f"({best.int8_accuracy:.2%}): dropping what lies behind that saves "
        f"{millions(saved)} M MACs."
    )


def held_out(material: Material, most: int = MOST_JUDGED) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """At most *most* of the held-out samples (N, ...), spread over all, and their labels."""
    chosen = material.holdout[np.sort(spread(len(material.holdout))[:most])]
    return material.data.samples[chosen], material.data.labels[chosen]


def ranges_of(
    checkpoint: Checkpoint, material: Material, calibration: str | None = None
) -> RealSamples:
    """
    Samples for the activation ranges of *checkpoint*: those that convert would take.

    That is the `ranges` split of the set that *calibration*, else the checkpoint names; a folder
    or an .npz is taken whole. Without any, 500 of the training samples. UsageError or BadFile as
    load_samples.
    """
    source = calibration or checkpoint.calibration_set
    if source is None:
        some = material.training[np.sort(spread(len(material.training))[:RANGES_SAMPLES])]
        return RealSamples(material.data.samples[some], material.preprocess)
    found = load_samples(
        f"{source}:ranges" if is_set(source) else source,
        checkpoint.preprocess,
        checkpoint.class_names,
        checkpoint.input_shape,
        labels_required=False,
    )
    return RealSamples(found.samples, checkpoint.preprocess)


def assess(
    model: nn.Module,
    *,
    graph: Graph,
    samples: NDArray[Any],
    labels: NDArray[np.int64],
    preprocess: Preprocess,
    input_shape: Sequence[int],
    class_names: Sequence[str],
    reals: RealSamples,
    folder: Path,
    is_measured: bool = True,
    seconds: float = 6.0,
    on_step: OnStep | None = None,
) -> Assessment:
    """
    Judge every exit of *model* (set to eval mode), whose *graph* is given, as it is deployed.

    *samples* (N, ...) as a calibration set holds them and *labels* int64 (N,) are held-out
    training samples, never test data; see held_out. *reals* give the activation ranges. The
    bundle is written to *folder*, which the caller removes once nothing is compared any more.
    Without *is_measured* there are no latencies; measuring takes about *seconds*. Errors as
    int8_bundle and measured.
    """
    step = on_step or (lambda name, done: None)
    bundle = int8_bundle(
        model,
        input_shape=input_shape,
        preprocess=preprocess,
        class_names=class_names,
        reals=reals,
        folder=folder,
        on_step=step,
    )
    floats = float_accuracies(model, samples, labels, preprocess)
    ints = int8_accuracies(bundle, samples, labels, lambda done: step("judge", min(done, 0.999)))
    step("judge", 1.0)
    latencies: dict[str, Interval] = {}
    if is_measured:
        step("measure", 0.0)
        latencies = measured(
            bundle, seconds=seconds, on_step=lambda done: step("measure", min(done, 0.999))
        )
        step("measure", 1.0)
    macs, counts = graph.exit_macs(), exit_parameters(model, input_shape)
    sizes = np.cumsum([segment.bytes for segment in bundle.segments])
    rows = [
        ExitRow(
            name=name,
            float_accuracy=floats[name],
            int8_accuracy=ints[name],
            macs=macs[name],
            parameters=counts[name],
            int8_bytes=int(size),
            latency_ms=latencies.get(name),
        )
        for name, size in zip(bundle.exits, sizes, strict=True)
    ]
    return Assessment(
        device=this_device(),
        cpu=str(machine_facts(this_machine())["cpu"] or ""),
        samples=len(labels),
        macs=graph.macs(),
        parameters=parameters(model),
        rows=tuple(rows),
        bundle=bundle,
        raced=samples[np.sort(spread(len(samples))[:RACED])],
    )


def exit_parameters(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """
    How many parameters each exit of *model* needs: those that its logits have a gradient by.

    *model* is set to eval mode. Parameters that no exit needs are counted nowhere.
    """
    model.eval()
    weights = list(model.parameters())
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            outputs = exit_outputs(model, torch.zeros(tuple(input_shape)))
        counts = {}
        for name, logits in outputs.items():
            found = torch.autograd.grad(logits.sum(), weights, allow_unused=True, retain_graph=True)
            pairs = zip(weights, found, strict=True)
            counts[name] = sum(w.numel() for w, gradient in pairs if gradient is not None)
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return counts


def float_accuracies(
    model: nn.Module, samples: NDArray[Any], labels: NDArray[np.int64], preprocess: Preprocess
) -> dict[str, float]:
    """Share of right answers of each exit of *model* (set to eval mode) in torch."""
    right: dict[str, int] = {}
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(labels), 250):
            part = slice(start, start + 250)
            inputs = to_input(real_values(samples[part], preprocess), preprocess)
            for name, logits in exit_outputs(model, inputs).items():
                hits = int((logits.argmax(1).numpy() == labels[part]).sum())
                right[name] = right.get(name, 0) + hits
    return {name: count / len(labels) for name, count in right.items()}


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
    shape = tuple(input_shape)
    return build(
        Opened(
            lower=lambda: from_torch(model, shape, preprocess),
            framework="torch",
            reference=lambda reals: torch_logits(model, reals),
            input_shape=shape,
            class_names=tuple(class_names),
            preprocess=preprocess,
            digest="",
        ),
        folder,
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
    bundle: Bundle,
    samples: NDArray[Any],
    labels: NDArray[np.int64],
    on_step: Callable[[float], object] | None = None,
) -> dict[str, float]:
    """
    Share of right answers of each exit of *bundle*, by the files that would be deployed.

    *samples* (N, ...) as a calibration set holds them, *labels* int64 (N,), N >= 1. *on_step*
    hears the share that is done.
    """
    right = np.zeros(len(bundle.exits), np.int64)
    with Runner(bundle, policy=None) as runner:
        for number, (sample, label) in enumerate(zip(samples, labels, strict=True), start=1):
            right += runner.raw_logits(sample).argmax(axis=1) == label
            if on_step is not None and number % 50 == 0:
                on_step(number / len(labels))
    return dict(zip(bundle.exits, (right / len(labels)).tolist(), strict=True))


def measured(
    bundle: Bundle,
    *,
    seconds: float = 6.0,
    processes: int = FEWEST_PROCESSES,
    on_step: Callable[[float], object] | None = None,
) -> dict[str, Interval]:
    """
    Milliseconds to leave at each exit of *bundle* on this machine: exit -> (ms, low, high).

    All exits are kept: the heads on the way are paid for. Measured as edgeexit.instrument does,
    in *processes* (5 or more) fresh ones for about *seconds* together (starting them comes on
    top), with 95 % bootstrap intervals. DeviceError if a process fails.
    """
    profile = measure(
        bundle,
        this_device(),
        limits=Limits(processes=processes, time_cap_s=seconds, block_ms=_BLOCK_MS),
        sets=[bundle.exits],
        on_step=None if on_step is None else lambda progress: on_step(progress.done),
    )
    found: dict[str, Interval] = {}
    for name in bundle.exits:
        case = profile.case(bundle.exits, name)
        assert case is not None
        latency = profile.latency(case)
        found[name] = (latency.value / 1e6, latency.low / 1e6, latency.high / 1e6)
    return found
