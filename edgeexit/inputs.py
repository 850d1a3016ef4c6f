"""
What `run` reads: pictures, folders, patterns, .npy and .npz files, frames on standard input.

Callers see read_inputs: a stream of named samples in which a bad one is an error *value*, so
that the others go on. A frame is a 4-byte little-endian length and that many bytes, which are
an encoded picture or a .npy file.
"""

import glob
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.files import parse_npy, read_bytes, read_npz
from edgeexit.labelled import pictures_in
from edgeexit.preprocess import Preprocess, load_image

STDIN = "-"
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")
_NPY = b"\x93NUMPY"

Item = tuple[str, "NDArray[Any] | EdgeExitError"]


def read_inputs(
    names: Sequence[str], preprocess: Preprocess, shape: tuple[int, ...], stdin: IO[bytes]
) -> Iterator[Item]:
    """
    The samples of *names*, one by one: (name, sample), or (name, error) where one is bad.

    A name is a picture, a folder of pictures, a .npy or .npz file, a pattern, or "-" for frames
    on *stdin*. *shape* is the sample's shape without the batch axis, for arrays. One .npy holds
    one sample or a batch; an .npz a batch called `samples`.
    """
    for name in names:
        try:
            if not name:
                # A variable that is not set; pathlib would take it for the folder that we are in.
                raise UsageError("an empty name, expected a picture, a folder or an array file")
            if name == STDIN:
                yield from _frames(stdin, preprocess, shape)
                continue
            for path in _paths(name):
                try:
                    yield from _file(path, preprocess, shape)
                except EdgeExitError as error:
                    yield str(path), error
        except EdgeExitError as error:
            yield name, error


def _paths(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = pictures_in(path)
        if not found:
            raise UsageError(f"{path}: no pictures in this folder")
        return found
    if not path.exists() and glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (takes "~" and "/" alike)
        if not matches:
            raise UsageError(f"{name}: nothing matches")
        return [
            path
            for match in map(Path, matches)
            for path in (pictures_in(match) if match.is_dir() else [match])
        ]
    return [path]


def _file(path: Path, preprocess: Preprocess, shape: tuple[int, ...]) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        samples = read_npz(path).get("samples", kinds="iuf")
        yield from _several(str(path), samples)
    elif suffix == ".npy":
        yield from _array(str(path), read_bytes(path), preprocess, shape)
    elif preprocess.kind == "array":
        raise UsageError(f"{path}: expected a .npy or .npz file: this bundle takes arrays")
    else:
        yield str(path), load_image(path, preprocess)


def _several(name: str, samples: NDArray[Any]) -> Iterator[Item]:
    if samples.ndim < 2 or samples.size == 0:
        raise BadFile(f"{name}: samples: shape {samples.shape}, expected (N, ...) with N > 0")
    for index, sample in enumerate(samples):
        yield f"{name}[{index}]", sample


def _array(
    name: str, data: bytes, preprocess: Preprocess, shape: tuple[int, ...]
) -> Iterator[Item]:
    if not data.startswith(_NPY):
        raise BadFile(f"{name}: not a .npy file")
    values: NDArray[Any] = parse_npy(data, name)
    if values.dtype.kind not in "iuf":
        raise BadFile(f"{name}: {values.dtype}, expected numbers")
    if preprocess.kind == "array":
        is_one = values.shape == shape
    else:
        # (H, W) or (H, W, C); three axes that end in another number are (N, H, W).
        is_one = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))
    if is_one:
        yield name, values
    else:
        yield from _several(name, values)


def _frames(stdin: IO[bytes], preprocess: Preprocess, shape: tuple[int, ...]) -> Iterator[Item]:
    index = 0
    while head := _read(stdin, _LENGTH.size):
        name = f"{STDIN}[{index}]"
        index += 1
        if len(head) < _LENGTH.size:
            raise BadFile(f"{name}: stream ends within a frame's length")
        (length,) = _LENGTH.unpack(head)
        if not 0 < length <= MAX_FRAME_BYTES:
            raise BadFile(
                f"{name}: frame of {length} bytes, expected 1 to {MAX_FRAME_BYTES}",
                hint="a frame is a 4-byte little-endian length and a picture or .npy of that size",
            )
        data = _read(stdin, length)
        if len(data) < length:
            raise BadFile(f"{name}: stream ends after {len(data)} of {length} bytes")
        try:
            if data.startswith(_NPY):
                yield from _array(name, data, preprocess, shape)
            else:
                yield name, load_image(data, preprocess)
        except EdgeExitError as error:
            yield name, error


def _read(stream: IO[bytes], count: int) -> bytes:
    # A pipe may hand out less than what was asked for before it ends.
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
