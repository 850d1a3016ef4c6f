"""Bundles of the zoo's nets for measurements: random weights, batch statistics of real samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import CHECKOUT
from torch import nn

from edgeexit.bundle import Bundle, load_bundle
from edgeexit.errors import Unsupported
from edgeexit.host.checkpoint import save_checkpoint
from edgeexit.host.convert import convert
from edgeexit.host.zoo import ZOO
from edgeexit.preprocess import Preprocess, fit_sample, real_values
from edgeexit.samples import find_set

SHARED = CHECKOUT.parent / "shared" / "data"


def preprocess_of(name: str) -> Preprocess:
    """Pictures for nets that take maps of 1 or 3 channels, plain arrays for the others."""
    shape = ZOO[name].input_shape
    if len(shape) == 4 and shape[2:] != (49, 10):
        channels = shape[1]
        return Preprocess(
            kind="image",
            size=shape[2:],
            color="gray" if channels == 1 else "rgb",
            scale=1 / 255,
            mean=(0.286,) * channels,
            std=(0.353,) * channels,
            layout="nchw",
        )
    return Preprocess(kind="array", layout="as-is")


def real_samples(name: str, count: int) -> np.ndarray:
    """
    *count* real samples that fit the net: Fashion-MNIST pictures (resized), speech maps of the
    MLPerf Tiny keyword set, or spoken digits folded into windows.
    """
    shape, preprocess = ZOO[name].input_shape, preprocess_of(name)
    if preprocess.kind == "image":
        pictures = find_set("fashion-mnist").split("certificate").samples[:count]
        return np.stack([fit_sample(picture, preprocess) for picture in pictures])
    if shape[2:] == (49, 10):
        with np.load(SHARED / "kws01" / "kws01.npz") as data:
            maps = next(data[key] for key in data if data[key].ndim >= 3)
        return (maps.reshape(-1, *shape[1:])[:count] / 32).astype(np.float32)
    with np.load(SHARED / "fsdd" / "fsdd.npz") as data:
        sound = max((data[key] for key in data), key=lambda array: array.size).reshape(-1)
    size = int(np.prod(shape[1:]))
    windows = sound[: len(sound) // size * size].reshape(-1, *shape[1:]).astype(np.float32)
    loud = windows[np.abs(windows).max(axis=(1, 2)) > np.abs(windows).max() / 100]
    return loud[:: max(1, len(loud) // count)][:count] / 8192


def settle(model: nn.Module, real: np.ndarray, preprocess: Preprocess) -> nn.Module:
    """Give *model* the batch statistics of *real*: else it answers the same to everything."""
    batch = np.moveaxis(real, -1, 1) if preprocess.kind == "image" else real
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(np.ascontiguousarray(batch)))
    return model.eval()


def checkpoint_of(name: str, folder: Path, exits: Sequence[int] | None = None) -> tuple[Path, Path]:
    """
    Write checkpoint and calibration file of the zoo's net *name* below *folder*.

    *exits* are its early exits, as numbers of blocks (None: the net's own).
    """
    net, preprocess = ZOO[name], preprocess_of(name)
    if exits is not None:
        net = replace(net, kwargs={**net.kwargs, "exits": list(exits)})
    samples = real_samples(name, 128)
    if len(samples) < 50:
        raise Unsupported(f"{name}: too few real samples at hand")
    torch.manual_seed(0)
    model = settle(net(), real_values(samples[:32], preprocess), preprocess)
    with torch.no_grad():
        shape = (
            [1, *np.moveaxis(samples, -1, 1).shape[1:]]
            if preprocess.kind == "image"
            else [
                1,
                *samples.shape[1:],
            ]
        )
        classes = model(torch.zeros(shape))[-1].shape[-1]
    path, data = folder / f"{name}.pt", folder / f"{name}.npz"
    save_checkpoint(
        path,
        model=model,
        arch=net.arch,
        kwargs=net.kwargs,
        input_shape=net.input_shape,
        class_names=[f"class {k}" for k in range(classes)],
        preprocess=preprocess,
    )
    np.savez(data, samples=samples, labels=np.arange(len(samples)) % classes)
    return path, data


def bundle_of(name: str, folder: Path, exits: Sequence[int] | None = None) -> Bundle:
    """The int8 bundle of the zoo's net *name*, with these *exits*, made once per *folder*."""
    target = folder / f"{name}.edgeexit"
    if target.is_dir():
        return load_bundle(target)
    path, data = checkpoint_of(name, folder, exits)
    return convert(path, target, data)
