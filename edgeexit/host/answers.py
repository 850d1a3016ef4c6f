"""
Ask a .tflite for its answers to real samples, and compare them with what others answer.

Callers see RealSamples (preprocessed on demand, so that a large set never lies in memory as
floats), tflite_logits, finite and check_parity. Hidden here: what makes a comparison prove
something. A network whose answers hardly differ from sample to sample would pass any check, so
that is refused as well.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.errors import BadFile, ParityError
from edgeexit.interpreter import open_interpreter
from edgeexit.preprocess import Preprocess, real_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = 1e-4  # of the largest |logit| of an exit
DISTINCT_ANSWERS = 50  # with fewer different answers, agreement proves nothing


def spread(count: int) -> "NDArray[np.int64]":
    """
    The numbers 0..count-1 in a fixed order in which every beginning is spread over all of them.

    Samples often come sorted or in turns by class; taking the first n, or every n-th, would
    then see some classes only. (Knuth's multiplicative hash: the same on every machine.)
    """
    hashed = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(1 << 32)
    return np.argsort(hashed, kind="stable")


@dataclass(frozen=True)
class RealSamples:
    """
    Samples as the network sees them, one at a time: float32 (H, W, C), or (...) for arrays.

    *samples* is uint8 (N, H, W, C) or float32 (N, ...), as a calibration set holds them.
    """

    samples: "NDArray[Any]"
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> "Iterator[NDArray[np.float32]]":
        for k in range(len(self.samples)):
            yield real_values(self.samples[k : k + 1], self.preprocess)[0]

    def __getitem__(self, which: "NDArray[np.int64]") -> "RealSamples":
        return RealSamples(self.samples[which], self.preprocess)

    def first(self, count: int) -> "RealSamples":
        """At most *count* of them, spread over all (see spread)."""
        return self[spread(len(self))[:count]]


def tflite_logits(
    data: bytes, exits: Mapping[str, str], inputs: "Iterable[NDArray[Any]]"
) -> "dict[str, NDArray[Any]]":
    """
    The answers of a .tflite with one input: exit name -> logits (N, classes) as they come.

    *exits* maps exits to output tensors; *inputs* are input tensors without their batch axis.
    BadFile if a logit is not finite.
    """
    network = open_interpreter(data)
    (feed,) = network.inputs.values()
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in exits}
    for one in inputs:
        feed[...] = one[None]
        network.invoke()
        for name, tensor in exits.items():
            rows[name].append(network.outputs[tensor][0].copy())
    return {name: finite(name, np.stack(logits)) for name, logits in rows.items()}


def finite(exit: str, answers: "NDArray[Any]") -> "NDArray[Any]":
    """The *answers* (or features) of an exit; BadFile unless all of them are finite."""
    if not np.isfinite(answers).all():
        raise BadFile(
            f"exit {exit!r}: the network answers NaN or infinity to real samples",
            hint="check its weights, and the mean and std of its preprocessing",
        )
    return answers


def check_parity(
    expected: "Mapping[str, NDArray[np.float32]]",
    found: "Mapping[str, NDArray[np.float32]]",
    reals: RealSamples,
    *,
    logits: "Mapping[str, NDArray[np.float32]] | None" = None,
    must_differ: bool = True,
) -> dict[str, float]:
    """
    Compare a framework's answers *expected* with the lowered network's, both to *reals*.

    Returns exit name -> largest difference over the exit's largest |logit|. ParityError if
    that exceeds TOLERANCE anywhere, or if the answers differ so little among themselves that
    equality proves nothing: fewer than DISTINCT_ANSWERS (or than there are distinct samples)
    when counted in steps of the tolerance. Without *must_differ* that passes. *logits* are looked
    at in their place where the answers are probabilities, which are mostly 0 and 1.
    """
    flat = reals.samples.reshape(len(reals), -1)
    wanted = min(DISTINCT_ANSWERS, len({row.tobytes() for row in flat}))
    errors: dict[str, float] = {}
    for name, answers in expected.items():
        peak = _peak(answers)
        distinct = _distinct(answers if logits is None else logits[name])
        if must_differ and distinct < wanted:
            raise ParityError(
                f"exit {name!r}: {distinct} distinct answers to {len(reals)} samples, expected "
                f"{wanted} or more: comparing them would prove nothing",
                hint="train the network, or re-estimate its batch statistics on real samples",
            )
        errors[name] = float(np.abs(found[name] - answers).max()) / peak
        if not errors[name] <= TOLERANCE:
            raise ParityError(
                f"exit {name!r}: the lowered network strays from the given one by "
                f"{errors[name]:.1e} of its largest logit, expected at most {TOLERANCE:.0e}",
                hint="an operator is lowered wrongly: please report this network",
            )
    return errors


def _peak(values: "NDArray[np.float32]") -> float:
    return max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))


def _distinct(values: "NDArray[np.float32]") -> int:
    steps = np.rint(values.astype(np.float64) / (_peak(values) * TOLERANCE))
    return len(np.unique(steps, axis=0))
