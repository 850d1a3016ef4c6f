"""
From a checkpoint to a bundle: load, lower, quantize, cut, check, write.

Callers see convert, its middle part build, and OnStep. Hidden here: every step is checked on
real samples before the next one starts (lowered against torch, the chain of segments against
the uncut network), and nothing appears on disk until all of it has passed.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from edgeexit import cut
from edgeexit.bundle import Bundle, check_target, write_bundle
from edgeexit.errors import BadFile, ParityError, Unsupported, UsageError
from edgeexit.host import lower, quantize
from edgeexit.host.answers import RealSamples, check_parity, spread, tflite_logits, torch_logits
from edgeexit.host.checkpoint import Checkpoint, Purpose, load_checkpoint
from edgeexit.interpreter import open_interpreter
from edgeexit.names import choose
from edgeexit.preprocess import Preprocess
from edgeexit.preprocess import quantize as to_stored
from edgeexit.samples import SPLITS, Samples, find_set, is_set, load_samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnStep = Callable[[str, float], None]
"""Told the step's name and the share of it that is done: 0.0 when it starts, 1.0 at its end."""

FEWEST_SAMPLES = 16  # what the self-test holds; ranges from fewer would mean little
SELFTEST_SAMPLES = 16
PARITY_SAMPLES = 128
CHAIN_SAMPLES = 256
PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")


def convert(
    model_path: Path | str,
    out: Path | str | None = None,
    calibration: Path | str | None = None,
    scheme: str = "int8",
    arch: str | None = None,
    on_step: OnStep | None = None,
) -> Bundle:
    """
    Convert the checkpoint *model_path* and write the bundle *out* (default ./NAME.edgeexit).

    *calibration* is a set (its `ranges` split is used), or a folder of pictures or an .npz that
    is used whole; default: the set that the checkpoint names. *scheme* is one of
    quantize.SCHEMES; *arch* as load_checkpoint. An existing bundle at *out* is replaced; its
    policies survive only if the new bundle is the same byte for byte.

    UsageError for wrong names and absent files, BadFile for damaged ones, Unsupported for
    networks that cannot be taken, ParityError if a step changes the answers, StorageError.
    """
    step = (lambda name, done: None) if on_step is None else on_step
    model_path = Path(model_path)
    target = Path(f"{model_path.stem}.edgeexit") if out is None else Path(out)
    choose(scheme, quantize.SCHEMES, "scheme")
    check_target(target)

    step("load", 0.0)
    network = _load(model_path, arch, calibration)
    ranges = _find_ranges(network)
    reals = RealSamples(ranges.samples.samples, network.preprocess)
    step("load", 1.0)

    return build(
        network.model,
        target,
        input_shape=network.input_shape,
        preprocess=network.preprocess,
        class_names=network.class_names,
        reals=reals,
        scheme=scheme,
        provenance=lambda quantized: _provenance(network, ranges, quantized),
        on_step=step,
        calibration_set=ranges.calibration_set,
        ranges_digests=None if ranges.calibration_set else ranges.samples.digests(),
        training_bloom=network.training_bloom,
    )


def build(
    model: nn.Module,
    target: Path,
    *,
    input_shape: tuple[int, ...],
    preprocess: Preprocess,
    class_names: Sequence[str],
    reals: RealSamples,
    scheme: str = "int8",
    is_checked: bool = True,
    provenance: Callable[[quantize.Quantized], Mapping[str, Any]],
    on_step: OnStep,
    **rest: Any,
) -> Bundle:
    """
    The middle of the road: lower *model*, quantize it on *reals*, write the bundle *target*.

    Arguments as in a checkpoint; *rest* goes to write_bundle. Without *is_checked* the chain is
    not compared with the uncut network, and torch on a few samples only, whose answers need not
    differ: for bundles that are measured and thrown away. Errors as convert.
    """
    make = choose(scheme, quantize.SCHEMES, "scheme")
    on_step("lower", 0.0)
    lowered = lower.from_torch(model, input_shape, preprocess)
    _check_classes(lowered, class_names)
    on_step("lower", 1.0)

    on_step("compare with torch", 0.0)
    some = reals.first(PARITY_SAMPLES if is_checked else FEWEST_SAMPLES)
    expected = torch_logits(model, some)
    found = tflite_logits(lowered.data, lowered.exits, some)
    check_parity(expected, found, some, must_differ=is_checked)
    on_step("compare with torch", 1.0)

    on_step("quantize", 0.0)
    quantized = make(lowered, reals, lambda done: on_step("quantize", min(done, 0.999)))
    on_step("quantize", 1.0)

    if is_checked:
        on_step("cut and compare", 0.0)
        check_chain(quantized.data, quantized.exits, reals.first(CHAIN_SAMPLES))
        on_step("cut and compare", 1.0)

    on_step("write", 0.0)
    bundle = write_bundle(
        target,
        name=target.name.removesuffix(".edgeexit"),
        model_data=quantized.data,
        exits=quantized.exits,
        class_names=class_names,
        preprocess=preprocess,
        selftest=reals.samples[np.sort(spread(len(reals))[:SELFTEST_SAMPLES])],
        scheme=scheme,
        provenance=provenance(quantized),
        **rest,
    )
    on_step("write", 1.0)
    return bundle


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A checkpoint with nothing left open; *source* says where activation ranges come from."""

    model: nn.Module
    arch: str
    digest: str
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    training_bloom: bytes | None
    metadata: Mapping[str, Any]
    source: str


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """The samples for activation ranges; calibration_set {"name", "digest"} if from a set."""

    samples: Samples
    calibration_set: Mapping[str, str] | None


def _load(path: Path, arch: str | None, calibration: Path | str | None) -> _Network:
    # A plain state_dict knows nothing of its input: a set can tell.
    checkpoint = load_checkpoint(path, arch=arch, purpose=Purpose.of_samples(calibration))
    return _Network(
        model=checkpoint.model,
        arch=checkpoint.arch,
        digest=checkpoint.digest,
        input_shape=checkpoint.input_shape,
        class_names=checkpoint.class_names,
        preprocess=checkpoint.preprocess,
        training_bloom=checkpoint.training_bloom,
        metadata=checkpoint.metadata,
        source=_source(checkpoint, calibration),
    )


def _source(checkpoint: Checkpoint, calibration: Path | str | None) -> str:
    source = checkpoint.calibration_set if calibration is None else str(calibration)
    if source is None:
        raise UsageError(
            "the checkpoint names no calibration set",
            hint="say --calibration NAME, a folder of pictures, or FILE.npz; "
            "edgeexit calibration make builds a set",
        )
    name, colon, split = source.rpartition(":")
    if colon and split in SPLITS and is_set(name):
        raise UsageError(
            f"{source}: names one split; activation ranges come from the ranges split alone",
            hint=f"say --calibration {name}",
        )
    if calibration is None and not is_set(source):
        find_set(source)  # a checkpoint may name sets only; this says which there are
    return source


def _find_ranges(network: _Network) -> _Ranges:
    source, found = network.source, None
    if is_set(source):
        owner = find_set(source)
        found = {"name": owner.name, "digest": owner.digest}
        source = f"{source}:ranges"
    samples = load_samples(
        source,
        network.preprocess,
        network.class_names,
        network.input_shape,
        labels_required=False,
    )
    if len(samples) < FEWEST_SAMPLES:
        raise BadFile(
            f"{source}: {len(samples)} samples, expected {FEWEST_SAMPLES} or more",
            hint="500 typical samples make good activation ranges",
        )
    return _Ranges(samples=samples, calibration_set=found)


def _check_classes(lowered: lower.Lowered, class_names: Sequence[str]) -> None:
    outputs = cut.model_io(lowered.data, "lowered network")[1]
    found, wanted = outputs[0].shape[-1], len(class_names)
    if found != wanted:
        raise Unsupported(
            f"the network answers with {found} classes, its class_names and the calibration set "
            f"have {wanted}",
            hint="save the checkpoint again with one name per class",
        )


def check_chain(data: bytes, exits: Mapping[str, str], reals: RealSamples) -> None:
    """
    Run the segments of *data* one after the other and the uncut network on *reals*.

    ParityError unless every logit of every exit is the same bit for bit.
    """
    plans = cut.cut(data, exits)
    chain = [(plan, open_interpreter(plan.data)) for plan in plans]
    whole = open_interpreter(data)
    (feed,) = cut.model_io(data)[0]
    for number, real in enumerate(reals):
        tensor = to_stored(real[None], feed.dtype, feed.scale, feed.zero_point)
        whole.inputs[feed.name][...] = tensor
        whole.invoke()
        values: dict[str, NDArray[Any]] = {feed.name: tensor}
        for plan, segment in chain:
            for spec in plan.inputs:
                segment.inputs[spec.name][...] = values[spec.name]
            segment.invoke()
            values |= {spec.name: segment.outputs[spec.name] for spec in plan.outputs}
            logits = plan.outputs[0].name
            if values[logits].tobytes() != whole.outputs[logits].tobytes():
                raise ParityError(
                    f"exit {plan.exit!r}: the segments answer differently from the uncut network "
                    f"to sample {number}",
                    hint="this is a defect of the cut: please report the network",
                )


def _provenance(
    network: _Network, ranges: _Ranges, quantized: quantize.Quantized
) -> dict[str, Any]:
    """What the bundle was made of and how well it went; no path, no time, no machine."""
    pruning = network.metadata.get("pruning")
    return {
        "model_digest": network.digest,
        "arch": network.arch,
        **({} if pruning is None else {"pruning": _pruning(pruning)}),
        "ranges": {
            "samples": ranges.samples.name,
            "count": len(ranges.samples),
            "digest": ranges.samples.digest,
            "chosen": quantized.ranges,
            "held_out_agreement": {k: round(v, 6) for k, v in quantized.candidates.items()},
        },
        "float_agreement": {name: round(v, 6) for name, v in quantized.agreement.items()},
        "outside_xnnpack": dict(quantized.outside_xnnpack),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _pruning(made: Any) -> Any:
    """What the checkpoint's metadata say of its pruning, without the steps."""
    if not isinstance(made, dict):
        return made
    return {key: made.get(key) for key in ("composition", "before", "after")}
