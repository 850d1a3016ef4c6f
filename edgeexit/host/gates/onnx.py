"""
The gate for ONNX files: onnx2tf makes the float .tflite, onnxruntime is the one to agree with.

Callers see open_onnx, and from_torch, by which a torch network takes the same road. Neither needs
torch in the environment of onnx2tf, nor onnx2tf in torch's: each asks for another LiteRT. Hidden
here: everything that touches the file runs in a child process (edgeexit.host.onnx_child), and
only onnx2tf's float file is taken; its own int8 failed on three networks of three.
"""

import importlib.util
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit import cut
from edgeexit.errors import ParityError, UsageError
from edgeexit.files import digest_of, read_bytes, read_npz
from edgeexit.host import apart
from edgeexit.host.answers import RealSamples
from edgeexit.host.gates import Asked, Opened
from edgeexit.host.lowered import Lowered, named, signature_outputs
from edgeexit.host.onnx_child import ANSWERS, FLOAT, GIVEN, INPUTS, MAX_BYTES, WHOLE
from edgeexit.host.purpose import Purpose
from edgeexit.host.tidy import tidy
from edgeexit.preprocess import Preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

PACKAGES = ("onnx2tf", "onnx", "onnxruntime", "onnxsim", "ai-edge-quantizer", "ai-edge-litert")
OTHER_PYTHON = "EDGEEXIT_ONNX_PYTHON"
TENSORFLOW_PYTHON = "EDGEEXIT_TENSORFLOW_PYTHON"
TIMEOUT_S = 900.0


def open_onnx(path: Path, asked: Asked) -> Opened:
    """
    Open the ONNX file *path*; what it is for, the calibration set or the user's files say.

    Exits are its outputs or the tensors that *asked* names. UsageError for an absent file, an
    unknown tensor, and data in other files that were not allowed; BadFile for damaged ones;
    Unsupported for what cannot be lowered.
    """
    purpose = Purpose.said(str(path), asked.calibration, asked.labels, asked.preprocess)
    data = read_bytes(path, limit_bytes=MAX_BYTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / GIVEN).write_bytes(data)
        external = str(path.parent.resolve()) if asked.is_external_allowed else None
        facts = _child("look", folder, str(path), exits=asked.exits, external_from=external)
        whole = (folder / WHOLE).read_bytes()
    shape = tuple(facts["shape"])
    where = f"{path}: input {facts['input']!r}"
    purpose = purpose.fitting(where, shape, _layout(shape, purpose.preprocess))
    preprocess = purpose.preprocess
    exits = list(facts["exits"])
    return Opened(
        lower=lambda: _lowered(whole, str(path), exits, shape, preprocess),
        framework="onnxruntime",
        reference=lambda reals: _answers(whole, str(path), exits, reals),
        input_shape=shape,
        class_names=purpose.class_names,
        preprocess=preprocess,
        # Weights in other files belong to the network, too.
        digest=digest_of(data + (facts["external"] or "").encode()),
        calibration_set=purpose.calibration_set,
        provenance={"onnx": {key: facts[key] for key in ("producer", "ir", "opset")}},
        packages=PACKAGES,
    )


@dataclass(frozen=True, kw_only=True)
class _Other:
    """onnx2tf in another interpreter, and which of its backends writes the .tflite."""

    python: str | None = None  # None: this interpreter
    backend: str = "flatbuffer_direct"


def from_torch(model: "nn.Module", input_shape: tuple[int, ...], preprocess: Preprocess) -> Lowered:
    """
    Lower a torch network (as edgeexit.host.lower.from_torch) by way of ONNX and onnx2tf.

    onnx2tf runs in the interpreter that $EDGEEXIT_ONNX_PYTHON names. UsageError if there is
    none, or if this environment cannot export ONNX.
    """
    python = _other_python("onnx2tf", OTHER_PYTHON, "onnx")
    return _through_onnx(model, input_shape, preprocess, "onnx2tf", _Other(python=python))


def from_torch_by_tensorflow(
    model: "nn.Module", input_shape: tuple[int, ...], preprocess: Preprocess
) -> Lowered:
    """
    As from_torch, but TensorFlow's own converter writes the file.

    $EDGEEXIT_TENSORFLOW_PYTHON names the interpreter: onnx2tf with TensorFlow beside it.
    """
    python = _other_python("tensorflow", TENSORFLOW_PYTHON, "onnx-tensorflow")
    other = _Other(python=python, backend="tf_converter")
    return _through_onnx(model, input_shape, preprocess, "tensorflow", other)


def _other_python(via: str, variable: str, extra: str) -> str:
    python = os.environ.get(variable)
    if not python:
        raise UsageError(
            f"--via {via}: ${variable} is not set, expected a Python with edgeexit[{extra}]",
            hint=f'python3.12 -m venv {extra}; {extra}/bin/pip install "edgeexit[{extra}]"; '
            f"export {variable}=$PWD/{extra}/bin/python",
        )
    return python


def _through_onnx(
    model: "nn.Module",
    input_shape: tuple[int, ...],
    preprocess: Preprocess,
    via: str,
    other: _Other,
) -> Lowered:
    absent = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if absent:
        raise UsageError(
            f"--via {via}: needs what is not installed here: {', '.join(absent)}",
            hint='pip install "edgeexit[onnx-export]"',
        )
    from edgeexit.host.onnx_export import exported

    exits, data = exported(model, input_shape)
    where = "the network as ONNX"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / GIVEN).write_bytes(data)
        _child("look", folder, where, other.python, exits=(), external_from=None)
        whole = (folder / WHOLE).read_bytes()
    return _lowered(whole, where, exits, input_shape, preprocess, other)


def _layout(shape: tuple[int, ...], preprocess: Preprocess) -> str:
    """ONNX files take pictures channels-first, unless only channels-last fits."""
    is_last = preprocess.kind == "image" and shape == (1, *preprocess.sample_shape)
    first = (shape[0], shape[-1], *shape[1:-1])
    return "nhwc" if is_last and shape != first else "nchw"


def _child(
    function: str, folder: Path, where: str, python: str | None = None, **arguments: Any
) -> Any:
    return apart.run(
        f"edgeexit.host.onnx_child:{function}",
        folder,
        {"where": where, **arguments},
        where=where,
        python=python,
        timeout_s=TIMEOUT_S,
    )


def _lowered(
    whole: bytes,
    where: str,
    exits: list[str],
    shape: tuple[int, ...],
    preprocess: Preprocess,
    other: _Other = _Other(),
) -> Lowered:
    is_turned = preprocess.kind == "image" and preprocess.layout == "nchw"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WHOLE).write_bytes(whole)
        told = {"is_shape_kept": not is_turned, "backend": other.backend}
        _child("lower", folder, where, other.python, **told)
        data = (folder / FLOAT).read_bytes()
    bound = signature_outputs(data)
    found = {one: bound[f"exit_{k}"] for k, one in enumerate(exits)}
    lowered = named(*tidy(data, found, where), where)
    ((feed,), _) = cut.model_io(lowered.data, where)
    wanted = (shape[0], *shape[2:], shape[1]) if is_turned else shape
    if feed.shape != wanted:
        raise ParityError(
            f"{where}: onnx2tf made an input of shape {feed.shape}, expected {wanted}",
            hint="please report this network",
        )
    return lowered


def _answers(
    whole: bytes, where: str, exits: list[str], reals: RealSamples
) -> "Mapping[str, NDArray[np.float32]]":
    is_turned = reals.preprocess.kind == "image" and reals.preprocess.layout == "nchw"
    rows = np.stack([np.moveaxis(real, -1, 0) if is_turned else real for real in reals])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WHOLE).write_bytes(whole)
        buffer = io.BytesIO()
        np.save(buffer, rows)
        (folder / INPUTS).write_bytes(buffer.getvalue())
        _child("answer", folder, where)
        arrays = read_npz(folder / ANSWERS)
        found = {one: arrays.get(f"exit_{k}", kinds="f") for k, one in enumerate(exits)}
    return {one: logits.reshape(len(logits), -1) for one, logits in found.items()}
