"""
From a model file to a bundle: open, lower, quantize, cut, check, write.

Callers see convert, its middle part build, and OnStep. Hidden here: every step is checked on
real samples before the next one starts (lowered against the framework that the file comes from,
the chain of segments against the uncut network), and nothing appears on disk until all of it has
passed. Which framework that is, the gates know: nothing here needs torch.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit import cut
from edgeexit.bundle import Bundle, check_target, write_bundle
from edgeexit.errors import BadFile, ParityError, Unsupported, UsageError
from edgeexit.host import contest
from edgeexit.host.answers import RealSamples, check_parity, spread, tflite_logits
from edgeexit.host.ends import as_given
from edgeexit.host.gates import Asked, Opened, open_model
from edgeexit.host.lowered import Lowered
from edgeexit.host.purpose import read_labels, read_preprocess
from edgeexit.host.quantize import Quantized
from edgeexit.host.schemes import AUTO, SCHEMES, find_scheme
from edgeexit.interpreter import check_edges, open_interpreter, try_first
from edgeexit.preprocess import quantize as to_stored
from edgeexit.samples import SPLITS, Samples, find_set, is_set, load_samples
from edgeexit.vetting import Held

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnStep = Callable[[str, float], None]
"""Told the step's name and the share of it that is done: 0.0 when it starts, 1.0 at its end."""

FEWEST_SAMPLES = 16  # what the self-test holds; ranges from fewer would mean little
SELFTEST_SAMPLES = 16
PARITY_SAMPLES = 128
CHAIN_SAMPLES = 256
HELD_SAMPLES = 1000


def convert(
    model_path: Path | str,
    out: Path | str | None = None,
    calibration: Path | str | None = None,
    scheme: str | None = None,
    arch: str | None = None,
    on_step: OnStep | None = None,
    *,
    exits: Sequence[str] = (),
    labels: Path | str | None = None,
    preprocess: Path | str | None = None,
    via: str | None = None,
    is_pickle_trusted: bool = False,
    is_external_allowed: bool = False,
    measure: contest.Measure | None = None,
) -> Bundle:
    """
    Convert the model file *model_path* and write the bundle *out* (default ./NAME.edgeexit).

    *calibration* is a set (its `ranges` split is used), or a folder of pictures or an .npz that
    is used whole; default: the set that the file names. *scheme* is as find_scheme takes it
    (default int8; a file that is quantized already stays as it is), or AUTO: what
    *measure* (default: this machine) finds fastest; *arch* as load_checkpoint.
    *labels* and *preprocess* are files that say what the model file does not; *exits* and the
    rest as gates.Asked. An existing bundle at *out* is replaced; its policies survive only if
    the new bundle is the same byte for byte.

    UsageError for wrong names and absent files, BadFile for damaged ones, Unsupported for
    networks that cannot be taken, ParityError if a step changes the answers, StorageError.
    """
    step = (lambda name, done: None) if on_step is None else on_step
    model_path = Path(model_path)
    target = Path(f"{model_path.stem}.edgeexit") if out is None else Path(out)
    if scheme not in (None, AUTO):
        find_scheme(str(scheme))
    check_target(target)
    asked = Asked(
        arch=arch,
        calibration=calibration,
        exits=tuple(exits),
        labels=None if labels is None else read_labels(Path(labels)),
        preprocess=None if preprocess is None else read_preprocess(Path(preprocess)),
        via=via,
        is_pickle_trusted=is_pickle_trusted,
        is_external_allowed=is_external_allowed,
    )

    step("load", 0.0)
    opened = open_model(model_path, asked)
    scheme = _scheme(opened, scheme, model_path)
    source = _source(opened, calibration, model_path)
    ranges = _find_ranges(opened, source)
    reals = RealSamples(ranges.samples.samples, opened.preprocess)
    step("load", 1.0)

    def choose(lowered: Lowered, tell: Callable[[float], None]) -> contest.Choice:
        fit, held = _held_back(opened, source, ranges.samples)
        return contest.pick(
            lowered,
            fit,
            held,
            measure=measure or contest.here(),
            write=lambda path, name, made: _write(opened, path, made, reals, scheme=name),
            on_step=tell,
        )

    return build(
        opened,
        target,
        reals=reals,
        scheme=scheme,
        choose=choose if scheme == AUTO else None,
        where=str(model_path),
        provenance=lambda quantized: _provenance(opened, ranges, quantized),
        on_step=step,
        calibration_set=ranges.calibration_set,
        ranges_digests=None if ranges.calibration_set else ranges.samples.digests(),
        training_bloom=opened.training_bloom,
    )


def build(
    opened: Opened,
    target: Path,
    *,
    reals: RealSamples,
    scheme: str = "int8",
    choose: Callable[[Lowered, Callable[[float], None]], contest.Choice] | None = None,
    is_checked: bool = True,
    where: str = "the network",
    provenance: Callable[[Quantized], Mapping[str, Any]],
    on_step: OnStep,
    **rest: Any,
) -> Bundle:
    """
    The middle of the road: lower what was *opened*, quantize it on *reals*, write *target*.

    *choose* is told the lowered network and says which scheme to take for *scheme*; *where* names
    the file in errors. *rest* goes to write_bundle. Without *is_checked* the chain is not compared
    with the uncut network, and the framework on a few samples only, whose answers need not
    differ: for bundles that are measured and thrown away. Errors as convert.
    """
    on_step("lower", 0.0)
    lowered = opened.lower()
    _check_classes(lowered, opened.class_names, where)
    on_step("lower", 1.0)

    if opened.reference is not None:
        on_step(f"compare with {opened.framework}", 0.0)
        some = reals.first(PARITY_SAMPLES if is_checked else FEWEST_SAMPLES)
        answers = opened.reference(some)
        expected = {name: rows.reshape(len(rows), -1) for name, rows in answers.items()}
        logits = tflite_logits(lowered.data, lowered.exits, some)
        found = as_given(logits, lowered.endings)
        check_parity(expected, found, some, logits=logits, must_differ=is_checked)
        on_step(f"compare with {opened.framework}", 1.0)

    chosen = {}
    if choose is not None:
        on_step("choose a scheme", 0.0)
        choice = choose(lowered, lambda done: on_step("choose a scheme", min(done, 0.999)))
        scheme, chosen = choice.scheme, {"scheme_choice": choice.to_document()}
        on_step("choose a scheme", 1.0)

    on_step("quantize", 0.0)
    make = SCHEMES["float"] if opened.scheme else find_scheme(scheme)
    quantized = make(lowered, reals, lambda done: on_step("quantize", min(done, 0.999)))
    on_step("quantize", 1.0)

    if is_checked:
        on_step("cut and compare", 0.0)
        check_chain(quantized.data, quantized.exits, reals.first(CHAIN_SAMPLES))
        on_step("cut and compare", 1.0)

    on_step("write", 0.0)
    bundle = _write(
        opened,
        target,
        quantized,
        reals,
        scheme=Path(scheme).name if scheme.endswith(".json") else scheme,
        provenance={**provenance(quantized), **chosen},
        **rest,
    )
    on_step("write", 1.0)
    return bundle


def _write(
    opened: Opened,
    target: Path,
    quantized: Quantized,
    reals: RealSamples,
    *,
    scheme: str,
    provenance: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Bundle:
    return write_bundle(
        target,
        name=target.name.removesuffix(".edgeexit"),
        model_data=quantized.data,
        exits=quantized.exits,
        class_names=opened.class_names,
        preprocess=opened.preprocess,
        selftest=reals.samples[np.sort(spread(len(reals))[:SELFTEST_SAMPLES])],
        scheme=scheme,
        provenance=provenance or {},
        **rest,
    )


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """The samples for activation ranges; calibration_set {"name", "digest"} if from a set."""

    samples: Samples
    calibration_set: Mapping[str, str] | None


def _scheme(opened: Opened, asked: str | None, path: Path) -> str:
    if opened.scheme is None:
        scheme = asked or "int8"
        if scheme != "float" and not find_spec("ai_edge_quantizer"):
            raise UsageError(
                f"{path}: --scheme {scheme} needs what is not installed here: ai_edge_quantizer",
                hint='pip install "edgeexit[quantize]", or say --scheme float',
            )
        return scheme
    if asked not in (None, opened.scheme):
        raise Unsupported(
            f"{path}: is quantized already ({opened.scheme}), expected a float network for "
            f"--scheme {asked}",
            hint="leave out --scheme, or convert the float file that it was made from",
        )
    return opened.scheme


def _source(opened: Opened, calibration: Path | str | None, path: Path) -> str:
    source = opened.calibration_set if calibration is None else str(calibration)
    if source is None:
        raise UsageError(
            f"{path}: names no calibration set, whose samples make activation ranges and the "
            "self-test",
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
        find_set(source)  # a file may name sets only; this says which there are
    return source


def _find_ranges(opened: Opened, source: str) -> _Ranges:
    found = None
    if is_set(source):
        owner = find_set(source)
        found = {"name": owner.name, "digest": owner.digest}
        source = f"{source}:ranges"
    samples = load_samples(
        source,
        opened.preprocess,
        opened.class_names,
        opened.input_shape,
        labels_required=False,
    )
    if len(samples) < FEWEST_SAMPLES:
        raise BadFile(
            f"{source}: {len(samples)} samples, expected {FEWEST_SAMPLES} or more",
            hint="500 typical samples make good activation ranges",
        )
    return _Ranges(samples=samples, calibration_set=found)


def _held_back(opened: Opened, source: str, samples: Samples) -> tuple[RealSamples, contest.Held]:
    """
    The *samples* for ranges while schemes compete, and others to compare their answers on.

    Those are of the set's tuning split if it has one; else a fifth of *samples* is held back.
    """
    if is_set(source) and "tuning" in find_set(source).splits:
        fit = samples
        held = load_samples(
            f"{source}:tuning", opened.preprocess, opened.class_names, opened.input_shape
        )
    else:
        order, fifth = spread(len(samples)), len(samples) // 5
        held, fit = samples[order[:fifth]], samples[order[fifth:]]
    held = held[spread(len(held))[:HELD_SAMPLES]]
    return RealSamples(fit.samples, opened.preprocess), contest.Held(
        reals=RealSamples(held.samples, opened.preprocess),
        labels=held.labels if held.is_labelled else None,
        name=held.name,
    )


def _check_classes(lowered: Lowered, class_names: Sequence[str], where: str) -> None:
    outputs = cut.model_io(lowered.data, "lowered network")[1]
    found, wanted = outputs[0].shape[-1], len(class_names)
    if found != wanted and "one logit" in lowered.endings.values():
        raise Unsupported(
            f"{where}: answers with one number: regression, or a classifier of two classes; "
            f"there are {wanted} class names",
            hint="give the two class names: first the one below zero, then the one above",
        )
    if found != wanted:
        raise Unsupported(
            f"{where}: exit {next(iter(lowered.exits))!r} answers with {found} classes, but there "
            f"are {wanted} class names",
            hint="one name per class is wanted, in --labels, the calibration set or the checkpoint",
        )


def check_chain(data: bytes, exits: Mapping[str, str], reals: RealSamples) -> None:
    """
    Run the segments of *data* one after the other and the uncut network on *reals*.

    ParityError unless every logit of every exit is the same bit for bit; BadFile if the shapes
    that the file gives are not those that come out.
    """
    plans = cut.cut(data, exits)
    try_first([Held(piece, "cut network") for piece in (data, *(plan.data for plan in plans))])
    chain = [(plan, open_interpreter(plan.data)) for plan in plans]
    for plan, segment in chain:
        check_edges(segment, plan.inputs, plan.outputs, f"cut for exit {plan.exit!r}")
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


def _provenance(opened: Opened, ranges: _Ranges, quantized: Quantized) -> dict[str, Any]:
    """What the bundle was made of and how well it went; no path, no time, no machine."""
    turned, at_seams = cut.transposes(quantized.data, quantized.exits)
    return {
        "model_digest": opened.digest,
        **opened.provenance,
        "ranges": {
            "samples": ranges.samples.name,
            "count": len(ranges.samples),
            "digest": ranges.samples.digest,
            "chosen": quantized.ranges,
            "held_out_agreement": {k: round(v, 6) for k, v in quantized.candidates.items()},
        },
        "float_agreement": {}
        if opened.scheme
        else {name: round(v, 6) for name, v in quantized.agreement.items()},
        "outside_xnnpack": dict(quantized.outside_xnnpack),
        "transposes": {"count": turned, "at_seams": at_seams},
        "versions": {name: importlib.metadata.version(name) for name in opened.packages},
    }
