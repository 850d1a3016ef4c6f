"""
The gate for torch's programs (.pt2) and TorchScript: files that may run code when they are opened.

Callers see open_program. Hidden here: nothing opens before the user says that the file is
trusted, and then a child process does; what comes back are a .tflite, JSON and arrays.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeexit.errors import BadFile
from edgeexit.files import digest_of, read_bytes, read_npz
from edgeexit.host import apart
from edgeexit.host.answers import RealSamples
from edgeexit.host.gates import TORCH_PACKAGES, Asked, Opened
from edgeexit.host.lowered import Lowered
from edgeexit.host.purpose import Purpose

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 4 << 30
_CHILD = "edgeexit.host.program_child"


def open_program(path: Path, asked: Asked) -> Opened:
    """
    Open a trusted .pt2 or TorchScript file, and lower it.

    BadFile if it is not trusted or damaged; Unsupported for several inputs, shapes that are not
    fixed, and what from_torch does not take.
    """
    where = str(path)
    data = read_bytes(path, limit_bytes=MAX_BYTES)
    if not asked.is_pickle_trusted:
        raise _not_trusted(path)
    purpose = Purpose.said(where, asked.calibration, asked.labels, asked.preprocess)
    told = {
        "where": where,
        "preprocess": purpose.preprocess.to_document(),
        "input_shape": purpose.input_shape,
        "exits": list(asked.exits),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "given.pt2").write_bytes(data)
        found = apart.run(f"{_CHILD}:lower", folder, told, where=where)
        lowered = Lowered(
            data=read_bytes(folder / "net.tflite", limit_bytes=MAX_BYTES),
            exits=found["exits"],
            endings=found["endings"],
        )
    purpose = purpose.fitting(where, tuple(found["shape"]))

    def reference(reals: RealSamples) -> "Mapping[str, NDArray[np.float32]]":
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "given.pt2").write_bytes(data)
            np.save(folder / "samples.npy", reals.samples)
            keys = apart.run(f"{_CHILD}:answer", folder, told, where=where)
            answers = read_npz(folder / "answers.npz")
            return {exit: answers.get(key, kinds="f") for exit, key in keys.items()}

    return Opened(
        lower=lambda: lowered,
        framework="torch",
        reference=reference,
        input_shape=tuple(found["shape"]),
        class_names=purpose.class_names,
        preprocess=purpose.preprocess,
        digest=digest_of(data),
        calibration_set=purpose.calibration_set,
        packages=TORCH_PACKAGES,
    )


def _not_trusted(path: Path) -> BadFile:
    reader = "torch.export.load({!r}).state_dict" if path.suffix == ".pt2" else ""
    reader = (reader or "torch.jit.load({!r}).state_dict()").format(path.name)
    return BadFile(
        f"{path}: holds a program, expected plain weights: reading it could run code from the file",
        hint="if you trust it: --trust-pickle; or save its weights, where your network's code is:\n"
        f"    net = factory(); net.load_state_dict({reader})\n"
        "    from edgeexit.host.checkpoint import save_checkpoint\n"
        "    save_checkpoint('safe.pt', model=net, arch='package.module:factory', kwargs={},"
        " input_shape=[...], class_names=[...], preprocess=...)",
    )
