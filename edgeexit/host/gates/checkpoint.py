"""The gate for PyTorch checkpoints: weights with the name of the code that builds the network."""

from pathlib import Path
from typing import Any

from edgeexit.host.checkpoint import load_checkpoint
from edgeexit.host.gates import Asked, Opened
from edgeexit.host.lower import from_torch
from edgeexit.host.purpose import Purpose
from edgeexit.host.torch_answers import torch_logits

PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")


def open_checkpoint(path: Path, asked: Asked) -> Opened:
    """
    Load the checkpoint *path*, or a plain state_dict if what is asked says what it is.

    Errors as load_checkpoint.
    """
    purpose = Purpose.told(asked.calibration, asked.labels, asked.preprocess)
    checkpoint = load_checkpoint(path, arch=asked.arch, purpose=purpose)
    model, shape = checkpoint.model, checkpoint.input_shape
    pruning = checkpoint.metadata.get("pruning")
    return Opened(
        lower=lambda: from_torch(model, shape, checkpoint.preprocess),
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
            **({} if pruning is None else {"pruning": _pruning(pruning)}),
        },
        packages=PACKAGES,
    )


def _pruning(made: Any) -> Any:
    """What the checkpoint's metadata say of its pruning, without the steps."""
    if not isinstance(made, dict):
        return made
    return {key: made.get(key) for key in ("composition", "before", "after")}
