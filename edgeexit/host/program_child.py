"""
Open a .pt2 or TorchScript file, which may run code: run by apart.run only, in a process of its own.

The parent sees lower and answer. Hidden here: both kinds become a plain torch module that the
common lowering takes. A program has no eval(), for its mode is in its graph; TorchScript goes
through torch's own converter to a program, which needs the input's shape.
"""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.files import Table
from edgeexit.host.answers import RealSamples
from edgeexit.host.lower import from_torch
from edgeexit.host.model import exit_answers
from edgeexit.host.purpose import Purpose
from edgeexit.host.quiet import quietly
from edgeexit.host.torch_answers import torch_logits
from edgeexit.names import choose
from edgeexit.preprocess import Preprocess

GIVEN = "given.pt2"
LITE = "net.tflite"
SAMPLES = "samples.npy"
ANSWERS = "answers.npz"


def lower(folder: Path, **told: Any) -> dict[str, Any]:
    """Write the multi-exit .tflite of GIVEN into *folder*; returns the rest of it and its shape."""
    module, purpose = _open(folder, **told)
    assert purpose.input_shape is not None
    lowered = from_torch(module, purpose.input_shape, purpose.preprocess)
    (folder / LITE).write_bytes(lowered.data)
    return {
        "shape": purpose.input_shape,
        "exits": dict(lowered.exits),
        "endings": dict(lowered.endings),
    }


def answer(folder: Path, **told: Any) -> dict[str, str]:
    """Write the answers to SAMPLES, as a set holds them, into ANSWERS; exit -> array name."""
    module, purpose = _open(folder, **told)
    samples = np.load(folder / SAMPLES, allow_pickle=False)
    found = torch_logits(module, RealSamples(samples, purpose.preprocess))
    keys = {name: f"exit_{k}" for k, name in enumerate(found)}
    arrays: dict[str, Any] = {keys[name]: logits for name, logits in found.items()}
    with (folder / ANSWERS).open("wb") as file:
        np.savez(file, **arrays)
    return keys


def _open(
    folder: Path,
    *,
    where: str,
    preprocess: Mapping[str, Any],
    input_shape: Sequence[int] | None,
    exits: Sequence[str],
) -> tuple[nn.Module, Purpose]:
    purpose = Purpose(
        class_names=(),
        preprocess=Preprocess.from_table(Table(preprocess, "preprocess")),
        input_shape=None if input_shape is None else tuple(input_shape),
    )
    data = (folder / GIVEN).read_bytes()
    with quietly():
        inner, purpose = _reader(data, where)(data, where, purpose)
    return _Chosen(inner, exits), purpose


def _reader(data: bytes, where: str) -> Callable[[bytes, str, Purpose], tuple[nn.Module, Purpose]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            is_program = any(name.endswith("/archive_format") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise _damaged(error, where) from error
    return _program if is_program else _script


class _Chosen(nn.Module):
    """A network whose exits have names; all of them, or those that were asked for."""

    def __init__(self, inner: nn.Module, exits: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.exits = inner, tuple(exits)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = exit_answers(self.inner, x)
        return {name: choose(name, found, "exit") for name in self.exits or found}


def _program(data: bytes, where: str, purpose: Purpose) -> tuple[nn.Module, Purpose]:
    try:
        program = torch.export.load(io.BytesIO(data))
    except Exception as error:  # zip, JSON, pickle and torch's own errors
        raise _damaged(error, where) from error
    shapes = {
        node.name: node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    }
    if len(shapes) != 1:
        raise Unsupported(
            f"{where}: takes {len(shapes)} inputs ({', '.join(shapes)}), expected one"
        )
    ((name, value),) = shapes.items()
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.dim() < 2:
        raise Unsupported(f"{where}: input {name!r} is no float32 tensor of samples")
    batch, *rest = value.shape
    if any(not isinstance(length, int) for length in rest):
        shown = ", ".join(map(str, value.shape))
        raise Unsupported(
            f"{where}: input {name!r} has the shape [{shown}], expected fixed lengths",
            hint="export it with the one size that the board will see",
        )
    if isinstance(batch, int) and batch != 1:
        raise Unsupported(
            f"{where}: input {name!r} takes {batch} samples at once, expected 1",
            hint="export it with a batch of 1, or with a dynamic one",
        )
    return _settled(program), purpose.fitting(where, (1, *map(int, rest)))


def _script(data: bytes, where: str, purpose: Purpose) -> tuple[nn.Module, Purpose]:
    from torch._export.converter import TS2EPConverter

    preprocess, shape = purpose.preprocess, purpose.input_shape
    if preprocess.kind == "image":
        height, width, channels = preprocess.sample_shape
        axes = {"nchw": (channels, height, width), "nhwc": (height, width, channels)}
        shape = (1, *axes[preprocess.layout])
    if shape is None:
        raise UsageError(
            f"{where}: TorchScript does not say the shape of its input",
            hint="name a calibration set, which does: --calibration SET",
        )
    try:
        script = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises RuntimeError and others for damaged files
        raise _damaged(error, where) from error
    try:
        program = TS2EPConverter(script, (torch.zeros(shape),)).convert()
    except Exception as error:  # torch raises a score of unrelated types
        raise Unsupported(
            f"{where}: this TorchScript cannot be made a program: {_first(error)}",
            hint="export the network itself: torch.export.save(torch.export.export(net, (x,)), "
            "'net.pt2')",
        ) from error
    return _settled(program), purpose.fitting(where, shape, preprocess.layout)


def _settled(program: torch.export.ExportedProgram) -> nn.Module:
    module: nn.Module = program.module(check_guards=False)
    # Its mode is in its graph, and torch makes train() and eval() raise.
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    module.eval = lambda: module  # type: ignore[method-assign]
    return module


def _damaged(error: Exception, where: str) -> BadFile:
    return BadFile(
        f"{where}: torch does not read it: {_first(error)}", hint="copy or make it again"
    )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
