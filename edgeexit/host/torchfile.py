"""
Read what torch.save wrote, without running anything in it.

Callers see unpack, load_plain, is_whole and finite_state. Hidden here: what a .pt file can do to
its reader: hold code, grow when it is unpacked, claim tensors larger than itself.
"""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from edgeexit.errors import BadFile


def unpack(data: bytes, where: str) -> dict[str, Any]:
    """The dict in the file, read without running anything in it."""
    if not data.startswith((b"PK", b"\x80")):
        raise BadFile(
            f"{where}: is no PyTorch file, expected a checkpoint",
            hint="a recipe is for: edgeexit train RECIPE.toml",
        )
    try:
        unpacked_bytes = _unpacked_bytes(data)
        if unpacked_bytes <= len(data):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                document = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no narrower contract for damaged files
        raise _not_loaded(error, where) from error
    if unpacked_bytes > len(data):
        raise BadFile(f"{where}: {unpacked_bytes} bytes unpacked from {len(data)}")
    if not isinstance(document, dict):
        raise BadFile(f"{where}: holds a {type(document).__name__}, expected a checkpoint")
    return document


def load_plain(data: bytes) -> Any:
    """
    What torch.save wrote, if it is weights and plain values; else any exception.

    ValueError for an archive that grows: a small file must not fill the memory.
    """
    if _unpacked_bytes(data) > len(data):
        raise ValueError("more bytes unpacked than packed")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpacked_bytes(data: bytes) -> int:
    """torch.save does not compress: an archive that grows is meant to fill the memory."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _not_loaded(error: Exception, where: str) -> BadFile:
    text = str(error)
    is_code = "TorchScript" in text or "GLOBAL" in text or "Unsupported class" in text
    is_code = is_code or (isinstance(error, pickle.UnpicklingError) and "Unsupported" in text)
    if is_code:
        return BadFile(
            f"{where}: holds a pickled or scripted network, expected plain weights: reading it "
            "would run code from the file",
            hint="if you trust it, save its weights, where your network's code is:\n"
            f"    net = torch.load({Path(where).name!r}, weights_only=False)\n"
            "    from edgeexit.host.checkpoint import save_checkpoint\n"
            "    save_checkpoint('safe.pt', model=net, arch='package.module:factory', kwargs={},"
            " input_shape=[...], class_names=[...], preprocess=...)",
        )
    return BadFile(
        f"{where}: not a sound .pt file ({type(error).__name__}): truncated, damaged, or of "
        "another kind",
        hint="copy or make it again",
    )


def is_whole(tensor: torch.Tensor) -> bool:
    """Plain, dense, and not larger than the bytes that the file holds for it."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def finite_state(values: dict[Any, Any], where: str) -> dict[str, torch.Tensor]:
    """The weights, every one a plain dense tensor of finite numbers."""
    for name, tensor in values.items():
        place = f"{where}: state_dict: {name}"
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadFile(f"{place}: expected a tensor, found {type(tensor).__name__}")
        if not is_whole(tensor):
            raise BadFile(f"{place}: expected a dense tensor that the file holds in full")
        if not bool(torch.isfinite(tensor).all()):
            raise BadFile(
                f"{place}: holds NaN or infinity", hint="the training diverged: train again"
            )
    return values
