"""Ask a torch network for its answers to real samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edgeexit.host.answers import RealSamples, finite
from edgeexit.host.model import exit_answers

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextmanager
def _one_thread() -> Iterator[None]:
    # On maps this small, torch's threads mostly wait for each other: 5 times slower when the
    # machine is busy.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_logits(model: nn.Module, reals: RealSamples) -> "dict[str, NDArray[np.float32]]":
    """
    The answers of *model* (set to eval mode): exit name -> logits float32 (N, classes).

    They are what it answers with: one logit stays one (N, 1). One sample at a time, as on the
    board. BadFile if a logit is not finite.
    """
    rows: dict[str, list[NDArray[np.float32]]] = {}
    is_nchw = reals.preprocess.layout == "nchw"
    model.eval()
    with torch.inference_mode(), _one_thread():
        for real in reals:
            moved = np.moveaxis(real, -1, 0) if is_nchw else real
            x = torch.from_numpy(np.ascontiguousarray(moved[None]))
            for name, answer in exit_answers(model, x).items():
                rows.setdefault(name, []).append(answer.numpy()[0].astype(np.float32))
    return {name: finite(name, np.stack(logits)) for name, logits in rows.items()}
