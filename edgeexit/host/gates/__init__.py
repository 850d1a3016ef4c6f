"""
Where users' files come in: each kind of file by its own gate, and all of them onto one road.

Callers see open_model, Asked and Opened. A gate reads one kind of file and says how to lower it,
and how its own framework answers; what follows (schemes, cutting, checks, the bundle) is the
same for all. No gate is imported before a file of its kind comes.
"""

import importlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit.errors import Unsupported, UsageError
from edgeexit.files import open_file
from edgeexit.host.answers import RealSamples
from edgeexit.host.lowered import Lowered
from edgeexit.preprocess import Preprocess

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Answers = "Mapping[str, NDArray[np.float32]]"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """
    What the user says of a model file; a gate takes what its kind of file leaves open.

    *exits* names outputs or inner tensors, earliest first (empty: all outputs); *via* the
    road to take if there are several. Trusting a pickle, or data in other files, is said
    outright or not at all.
    """

    arch: str | None = None
    calibration: Path | str | None = None
    exits: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    via: str | None = None
    is_pickle_trusted: bool = False
    is_external_allowed: bool = False


@dataclass(frozen=True, kw_only=True)
class Opened:
    """
    A network that a gate let in, with nothing left open.

    *lower* makes the multi-exit .tflite; *reference* asks *framework* for the network's own
    answers: exit name -> float32 (N, classes) (None: the file itself is all there is).
    *scheme* says what a file that is quantized already holds ("int8"), None for float ones.
    *input_shape* is (1, ...) in the layout that *preprocess* names; *digest* is the file's;
    *calibration_set* the one that the file names; *provenance* joins the bundle's;
    *packages* are the distributions whose versions decide about the bytes.
    """

    lower: Callable[[], Lowered]
    framework: str | None
    reference: "Callable[[RealSamples], Mapping[str, NDArray[np.float32]]] | None"
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    digest: str
    scheme: str | None = None
    calibration_set: str | None = None
    training_bloom: bytes | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gate:
    """
    One kind of file: who opens it ("module:function"), and what must be installed for it.

    *takes* are the keys of OPTIONS that mean something to it; others are refused, not ignored.
    """

    opener: str
    what: str
    takes: tuple[str, ...] = ("exits",)
    modules: tuple[str, ...] = ()
    extra: str | None = None
    python: tuple[int, int] = (3, 11)


# The distributions that decide about the bytes of what comes from torch.
TORCH_PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")

_TORCH = ("torch", "litert_torch", "ai_edge_quantizer")
_CHECKPOINT = Gate(
    opener="edgeexit.host.gates.checkpoint:open_checkpoint",
    what="a PyTorch checkpoint",
    takes=("arch", "via"),
    modules=_TORCH,
    extra="torch",
)

_PROGRAM = Gate(
    opener="edgeexit.host.gates.program:open_program",
    what="a torch program",
    modules=_TORCH,
    extra="torch",
)

_ONNX = Gate(
    opener="edgeexit.host.gates.onnx:open_onnx",
    what="an ONNX file",
    modules=("onnx", "onnxruntime", "onnx2tf", "ai_edge_quantizer"),
    extra="onnx",
    python=(3, 12),
)

_KERAS = Gate(
    opener="edgeexit.host.gates.keras:open_keras",
    what="a Keras file or a SavedModel",
    takes=("exits", "arch"),
    modules=("tensorflow", "keras", "ai_edge_quantizer"),
    extra="tensorflow",
)

_TFLITE = Gate(opener="edgeexit.host.gates.tflite:open_tflite", what="a .tflite file")

GATES: dict[str, Gate] = {
    ".tflite": _TFLITE,
    ".pt": _CHECKPOINT,
    ".pth": _CHECKPOINT,
    ".th": _CHECKPOINT,
    ".onnx": _ONNX,
    ".pt2": _PROGRAM,
    ".ts": _PROGRAM,
    ".keras": _KERAS,
}
"""Suffix of a model file -> its gate."""

OPTIONS = {
    "exits": ("--exits", "its exits are those of its forward(); edgeexit tune drops some of them"),
    "arch": ("--arch", "leave it out: the file itself holds the network"),
    "via": ("--via", "leave it out: only checkpoints have several roads"),
}
"""What not every gate takes: a key of Asked -> how the user says it, and what to do instead."""


def open_model(path: Path, asked: Asked) -> Opened:
    """
    Open the model file *path* through the gate for its kind.

    UsageError for an absent file, a wrong option and an extra that is not installed (the hint
    says how to get it), Unsupported for kinds that have no gate, BadFile for damaged files.
    """
    gate = _gate_of(path)
    for key, (option, hint) in OPTIONS.items():
        if getattr(asked, key) and key not in gate.takes:
            raise UsageError(f"{path}: {gate.what} takes no {option}", hint=hint)
    check_installed(gate, path)
    module, _, function = gate.opener.partition(":")
    opened: Opened = getattr(importlib.import_module(module), function)(path, asked)
    return opened


def check_installed(gate: Gate, path: Path) -> None:
    """UsageError unless everything that *gate* needs for *path* is installed here."""
    if sys.version_info < gate.python:
        wanted = ".".join(map(str, gate.python))
        raise UsageError(
            f"{path}: {gate.what} needs Python {wanted} or newer, this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}",
            hint=f'python{wanted} -m venv venv; venv/bin/pip install "edgeexit[{gate.extra}]"',
        )
    absent = [name for name in gate.modules if not find_spec(name)]
    if absent:
        raise UsageError(
            f"{path}: {gate.what} needs what is not installed here: {', '.join(absent)}",
            hint=f'pip install "edgeexit[{gate.extra}]" (see README, "Install")',
        )


def _gate_of(path: Path) -> Gate:
    if (path / "saved_model.pb").exists():
        return _KERAS
    gate = GATES.get(path.suffix.lower())
    if gate is None and path.exists():
        _refuse_foreign(path)
    gate = gate or _CHECKPOINT
    return _PROGRAM if gate is _CHECKPOINT and _holds_program(path) else gate


def _holds_program(path: Path) -> bool:
    """Whether a file named like a checkpoint is TorchScript, or an exported program."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # the gate says what is wrong with it
    return "constants.pkl" in names or "archive_format" in names


def _refuse_foreign(path: Path) -> None:
    # Names without a known suffix may be checkpoints (PyTorch asks for none); these are not.
    if path.suffix.lower() in _FOREIGN:
        raise Unsupported(
            f"{path}: {_FOREIGN[path.suffix.lower()]} files have no gate here",
            hint=f"known: {', '.join(GATES)}",
        )


_FOREIGN = {
    ".pb": "TensorFlow graph",
    ".h5": "Keras HDF5",
    ".caffemodel": "Caffe",
    ".mlmodel": "Core ML",
    ".safetensors": "safetensors",
    ".engine": "TensorRT",
}
