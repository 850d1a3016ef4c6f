"""
The gate for Keras files and SavedModel folders, by way of TensorFlow's converter.

Callers see open_keras. Hidden here: TensorFlow never enters this process; a child opens a copy of
the file, and what comes back are a .tflite and arrays. Outputs are bound by name, for the
converter changes their order.
"""

import importlib.metadata
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.errors import BadFile
from edgeexit.files import digest_of, json_bytes, read_bytes, read_npz
from edgeexit.host import apart
from edgeexit.host.answers import RealSamples
from edgeexit.host.gates import Asked, Opened
from edgeexit.host.lowered import by_depth, named, signature_outputs
from edgeexit.host.purpose import Purpose
from edgeexit.tflite import read_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 4 << 30
PACKAGES = ("keras", "ai-edge-quantizer", "ai-edge-litert")
_CHILD = "edgeexit.host.keras_child"


def open_keras(path: Path, asked: Asked) -> Opened:
    """
    Open a Keras file, or a SavedModel folder, and lower it.

    Code inside it does not run unless it is trusted; *asked*.arch names a class of the user's.
    BadFile for damaged files and for code that is not trusted; Unsupported for several inputs,
    shapes that are not fixed, and operators without a TFLite counterpart.
    """
    where = str(path)
    purpose = Purpose.said(where, asked.calibration, asked.labels, asked.preprocess)
    told = {
        "where": where,
        "exits": list(asked.exits),
        "arch": asked.arch,
        "home": str(Path.cwd()),
        "is_trusted": asked.is_pickle_trusted,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied, digest = _copy(path, folder)
        found = apart.run(f"{_CHILD}:lower", folder, {**told, "name": copied}, where=where)
        data = read_bytes(folder / "net.tflite", limit_bytes=MAX_BYTES)
    bound = signature_outputs(data)
    exits = {exit: bound[key] for exit, key in found["exits"].items()}
    if not asked.exits:  # a signature's outputs have no order, and a dict's any
        exits = by_depth(read_model(data, where), exits)
    shape = tuple(found["shape"])
    purpose = purpose.fitting(where, shape, "nhwc")

    def reference(reals: RealSamples) -> "Mapping[str, NDArray[np.float32]]":
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copied, again = _copy(path, folder)
            if again != digest:
                raise BadFile(f"{where}: was changed while it was converted")
            np.save(folder / "samples.npy", np.stack(list(reals)))
            keys = apart.run(f"{_CHILD}:answer", folder, {**told, "name": copied}, where=where)
            answers = read_npz(folder / "answers.npz")
            return {exit: answers.get(key) for exit, key in keys.items()}

    return Opened(
        lower=lambda: named(data, exits, where),
        framework="tensorflow",
        reference=reference,
        input_shape=shape,
        class_names=purpose.class_names,
        preprocess=purpose.preprocess,
        digest=digest,
        calibration_set=purpose.calibration_set,
        packages=(_tensorflow(), *PACKAGES),
    )


def _tensorflow() -> str:
    """The distribution that TensorFlow came in: the one without GPU code, or the whole."""
    try:
        importlib.metadata.version("tensorflow-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "tensorflow"
    return "tensorflow-cpu"


def _copy(path: Path, folder: Path) -> tuple[str, str]:
    """Copy what *path* holds into *folder*; returns its name there and its digest."""
    if not path.is_dir():
        data = read_bytes(path, limit_bytes=MAX_BYTES)
        (folder / "net.keras").write_bytes(data)
        _check_archive(folder / "net.keras", str(path))
        return "net.keras", digest_of(data)
    digests: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            inner = file.relative_to(path)
            data = read_bytes(file, limit_bytes=MAX_BYTES)
            (folder / "net" / inner).parent.mkdir(parents=True, exist_ok=True)
            (folder / "net" / inner).write_bytes(data)
            digests[inner.as_posix()] = digest_of(data)
    return "net", digest_of(json_bytes(digests))


def _check_archive(path: Path, where: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise BadFile(
            f"{where}: is no Keras 3 file (a zip archive), or damaged",
            hint="save the model again: model.save('net.keras')",
        ) from error
    if unpacked > MAX_BYTES:
        raise BadFile(f"{where}: {unpacked} bytes unpacked, expected at most {MAX_BYTES}")
