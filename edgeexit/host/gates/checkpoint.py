"""The gate for PyTorch checkpoints: weights with the name of the code that builds the network."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from edgeexit.errors import UsageError
from edgeexit.host.checkpoint import Checkpoint, load_checkpoint
from edgeexit.host.gates import TORCH_PACKAGES, Asked, Opened
from edgeexit.host.lowered import Lowered
from edgeexit.host.purpose import Purpose
from edgeexit.host.torch_answers import torch_logits
from edgeexit.names import choose, load_attribute
from edgeexit.preprocess import Preprocess

Road = Callable[[nn.Module, tuple[int, ...], Preprocess], Lowered]
"""Lowers a network for one input shape, as edgeexit.host.lower.from_torch."""

USUAL = "litert-torch"
ROADS = {
    USUAL: "edgeexit.host.lower:from_torch",
    "onnx2tf": "edgeexit.host.gates.onnx:from_torch",
    "tensorflow": "edgeexit.host.gates.onnx:from_torch_by_tensorflow",
}
"""What --via may name -> its Road, as "module:function"."""


def open_checkpoint(path: Path, asked: Asked) -> Opened:
    """
    Load the checkpoint *path*, or a plain state_dict if what is asked says what it is.

    Errors as load_checkpoint; UsageError also if labels or preprocessing are given that are not
    those of a checkpoint that states its own.
    """
    via = asked.via or USUAL
    road = cast(Road, load_attribute(choose(via, ROADS, "road (--via)"), "road"))
    purpose = Purpose.told(asked.calibration, asked.labels, asked.preprocess)
    checkpoint = load_checkpoint(path, arch=asked.arch, purpose=purpose)
    _check_asked(path, asked, checkpoint)
    model, shape = checkpoint.model, checkpoint.input_shape
    pruning = checkpoint.metadata.get("pruning")
    return Opened(
        lower=lambda: road(model, shape, checkpoint.preprocess),
        framework="torch",
        reference=lambda reals: torch_logits(model, reals),
        input_shape=shape,
        class_names=checkpoint.class_names,
        preprocess=checkpoint.preprocess,
        digest=checkpoint.digest,
        calibration_set=checkpoint.calibration_set,
        training_bloom=checkpoint.training_bloom,
        provenance={
            "arch": checkpoint.arch,
            **({} if via == USUAL else {"via": via}),
            **({} if pruning is None else {"pruning": _pruning(pruning)}),
        },
        packages=TORCH_PACKAGES,
    )


def _check_asked(path: Path, asked: Asked, checkpoint: Checkpoint) -> None:
    said = checkpoint.preprocess
    told = asked.preprocess and replace(asked.preprocess, layout=said.layout)
    for option, given, found in (
        ("--labels", asked.labels, checkpoint.class_names),
        ("--preprocess", told, said),
    ):
        if given is not None and given != found:
            raise UsageError(
                f"{path}: says otherwise than {option}, and was trained so",
                hint=f"leave out {option}, or save the checkpoint again with what is right",
            )


def _pruning(made: Any) -> Any:
    """What the checkpoint's metadata say of its pruning, without the steps."""
    if not isinstance(made, dict):
        return made
    return {key: made.get(key) for key in ("composition", "before", "after")}
