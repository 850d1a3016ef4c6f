"""
The gate for ready .tflite files, float or quantized: cut, checked and bundled as they are.

Callers see open_tflite. Exits are the file's outputs, or the tensors that the user names; an inner
map gets a linear exit, fitted on labelled samples. Hidden here: the names by which tensors may be
called, and that a file's metadata may hold its labels.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit import tflite
from edgeexit.errors import Unsupported, UsageError
from edgeexit.files import digest_of, read_bytes
from edgeexit.host import fitted
from edgeexit.host.answers import RealSamples, spread, tflite_logits
from edgeexit.host.ends import width
from edgeexit.host.gates import Asked, Opened
from edgeexit.host.lowered import Lowered, by_depth, check_kernels, from_model
from edgeexit.host.purpose import Purpose, parse_labels
from edgeexit.interpreter import check_loads
from edgeexit.names import unknown
from edgeexit.preprocess import Preprocess
from edgeexit.preprocess import quantize as to_stored
from edgeexit.samples import Samples, is_set, load_samples
from edgeexit.tflite import Model

HELD_OUT = 5  # one labelled sample in five tells how good the fitted exits are
FINAL = "final"  # what the only output of a file may be called, too
_MOST_LABELS = 1 << 20


def open_tflite(path: Path, asked: Asked) -> Opened:
    """
    Open the .tflite file *path*; what it is for, the calibration set or the user's files say.

    UsageError for an absent file and unknown names, BadFile for damaged ones, Unsupported for
    what cannot be cut or is no classifier.
    """
    where = str(path)
    data = read_bytes(path, limit_bytes=tflite.MAX_FILE_BYTES)
    model = tflite.read_model(data, where)
    check_kernels(data, where)
    check_loads(data, where)
    if len(model.inputs) != 1:
        raise Unsupported(f"{where}: {len(model.inputs)} inputs, expected one")
    shape = model.tensors[model.inputs[0]].shape
    if len(shape) < 2 or shape[0] != 1:
        raise Unsupported(
            f"{where}: takes {list(shape)}, expected one sample [1, ...]",
            hint="convert the network again, for a batch of 1",
        )
    labels = asked.labels or _packed_labels(data, where)
    purpose = Purpose.said(where, asked.calibration, labels, asked.preprocess)
    purpose = purpose.fitting(where, shape, "nhwc")
    exits = _exits(model, asked.exits)
    classes = len(purpose.class_names)
    inner = {name: t for name, t in exits.items() if _wants_head(model, t, classes)}
    grown, heads = model, None
    if inner:
        heads = _Fitted.on(_labelled(where, inner, asked, purpose), purpose)
        fit = heads.fit
        reals = RealSamples(fit.samples, purpose.preprocess)
        grown, made = fitted.with_exits(model, inner, reals, fit.labels, classes)
        exits = {**exits, **made}
    lowered = from_model(grown, exits)
    scheme = _scheme(model)
    told = {name: t for name, t in exits.items() if t in model.outputs}
    return Opened(
        lower=lambda: lowered,
        framework="the file",
        reference=_reference(data, model, told, scheme),
        input_shape=shape,
        class_names=purpose.class_names,
        preprocess=purpose.preprocess,
        digest=digest_of(data),
        scheme=scheme,
        calibration_set=purpose.calibration_set,
        provenance={} if heads is None else {"heads": heads.facts(model, inner, lowered)},
        packages=_packages(scheme),
    )


def _packages(scheme: str | None) -> tuple[str, ...]:
    is_quantizer_used = scheme is None and find_spec("ai_edge_quantizer") is not None
    return ("ai-edge-litert", *(("ai-edge-quantizer",) if is_quantizer_used else ()))


# ---------------------------------------------------------------- what the file says


def _packed_labels(data: bytes, where: str) -> tuple[str, ...] | None:
    """The class names in the archive behind the flatbuffer, if it holds one text file."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            texts = [one for one in archive.infolist() if one.filename.lower().endswith(".txt")]
            if len(texts) != 1 or texts[0].file_size > _MOST_LABELS:
                return None
            with archive.open(texts[0]) as file:
                inside = file.read(_MOST_LABELS)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return None
    return parse_labels(inside, f"{where}, {texts[0].filename}")


def _exits(model: Model, wanted: tuple[str, ...]) -> dict[str, int]:
    """Exit name -> tensor index; all outputs if none is *wanted*."""
    called = {index: name for name, index in model.signature.items() if name}
    if not set(model.outputs) <= called.keys():
        called = {index: model.tensors[index].name for index in model.outputs}
    if not wanted:
        found = {name or f"exit{k}": index for k, (index, name) in enumerate(called.items())}
        if len(found) < len(called):
            raise Unsupported(f"{model.where}: outputs that are called alike, and no signature")
        return by_depth(model, found)
    known = _names(model)
    known |= {name: index for index, name in called.items()}
    if len(model.outputs) == 1:
        known.setdefault(FINAL, model.outputs[0])
    for name in wanted:
        if name not in known:
            short = [other for other in known if ";" not in other]  # joined ones tell nothing more
            error = unknown(name, short, "output or inner tensor")
            raise UsageError(f"{model.where}: {error}", hint=error.hint or "--exits names them")
        if wanted.count(name) > 1:
            raise UsageError(f"--exits: {name!r} stands there twice")
    return {name: known[name] for name in wanted}


def _names(model: Model) -> dict[str, int]:
    """What computed tensors may be called: their names, and the parts of joined ones."""
    found: dict[str, int] = {}
    several: set[str] = set()
    for index in model.maker:
        whole = model.tensors[index].name
        # Converters call a fused operator "relu;batch_norm;conv" after all that went into it.
        for name in {whole, *whole.split(";")} - {""}:
            several |= {name} & found.keys()
            found[name] = index
    found = {name: index for name, index in found.items() if name not in several}
    exact = {model.tensors[index].name: index for index in model.maker}
    return found | {name: exact[name] for name in exact if name and name not in several}


def _scheme(model: Model) -> str | None:
    """What the file is quantized by, in the words of --scheme; None for float networks."""
    computing = (op for op in model.operators if op.kind not in ("QUANTIZE", "DEQUANTIZE"))
    made = {model.tensors[t].dtype for op in computing for t in op.outputs}
    words = {"int16": "int16x8", "uint8": "uint8", "int8": "int8"}
    integer = [word for dtype, word in words.items() if dtype in made]
    if integer:
        return "mixed" if "float32" in made else integer[0]
    constants = {t.dtype for t in model.tensors if t.constant is not None and t.scales}
    if constants & {"int8", "uint8", "int4"}:
        return "dynamic"
    return "float16" if any(t.dtype == "float16" for t in model.tensors) else None


def _reference(data: bytes, model: Model, exits: Mapping[str, int], scheme: str | None) -> Any:
    """Asks the untouched file for its own answers; None if they are integers or have no names."""
    names = {name: model.tensors[index].name for name, index in exits.items()}
    ends = [model.tensors[index] for index in (*model.inputs, *exits.values())]
    is_float = all(tensor.dtype == "float32" for tensor in ends)
    all_names = [model.tensors[index].name for index in model.outputs]
    if not names or scheme not in (None, "float16", "dynamic") or not is_float:
        return None
    if "" in all_names or len(set(all_names)) < len(all_names):
        return None
    return lambda reals: tflite_logits(data, names, reals)


# ---------------------------------------------------------------- exits on inner maps


def _wants_head(model: Model, index: int, classes: int) -> bool:
    """Whether a tensor that was named is features, not an answer."""
    answers = {classes, 1} if classes == 2 else {classes}
    return index not in model.outputs and width(model, index) not in answers


def _labelled(where: str, inner: Mapping[str, int], asked: Asked, purpose: Purpose) -> Samples:
    if asked.calibration is None:
        raise UsageError(
            f"{where}: exit {next(iter(inner))!r} is a map without a head of its own, expected "
            "labelled samples to fit one on",
            hint="say --calibration SET, a folder of class subfolders, or an .npz with labels",
        )
    source = str(asked.calibration)
    source = f"{source}:ranges" if is_set(source) else source
    return load_samples(source, purpose.preprocess, purpose.class_names, purpose.input_shape)


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """The samples that heads are fitted on, and those that tell how good they are."""

    fit: Samples
    held: Samples
    preprocess: Preprocess

    @classmethod
    def on(cls, samples: Samples, purpose: Purpose) -> "_Fitted":
        order = spread(len(samples))
        count = len(samples) // HELD_OUT
        return cls(
            fit=samples[np.sort(order[count:])],
            held=samples[np.sort(order[:count])],
            preprocess=purpose.preprocess,
        )

    def facts(self, model: Model, inner: Mapping[str, int], lowered: Lowered) -> dict[str, Any]:
        """For the provenance: where the heads are, and each exit's accuracy on held-out samples."""
        feed = model.tensors[model.inputs[0]].spec(model.where)
        reals = RealSamples(self.held.samples, self.preprocess)
        stored = (to_stored(one, feed.dtype, feed.scale, feed.zero_point) for one in reals)
        answers = tflite_logits(lowered.data, lowered.exits, stored) if len(self.held) else {}
        right = {name: rows.argmax(axis=1) == self.held.labels for name, rows in answers.items()}
        return {
            "at": {name: model.tensors[index].name for name, index in inner.items()},
            "fitted_on": len(self.fit),
            "held_out": len(self.held),
            "held_out_accuracy": {k: round(float(v.mean()), 6) for k, v in right.items()},
        }
