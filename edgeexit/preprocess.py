"""
From a picture or a row of sensor values to the network's input tensor, the same way everywhere.

Callers see Preprocess (the schema), load_image and fit_sample (anything -> a *sample*),
real_values (samples -> float32, for training) and InputStage (one sample -> the input tensor,
for running). A sample is what a calibration set holds: uint8 (H, W, C) for images, float32 of
any shape for arrays. Hidden here: an image's input tensor is a table of 256 entries per channel,
made by the very formulas that real_values and quantize apply, so train, convert, evaluate and
run cannot disagree. Pixels are resized and recoloured by Pillow's fixed-point code, which is the
same on x86 and ARM.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.names import choose
from edgeexit.pictures import opaque, open_picture

KINDS = ("image", "array")
CHANNELS = {"gray": 1, "rgb": 3, "bgr": 3}
LAYOUTS = {"image": ("nchw", "nhwc"), "array": ("as-is",)}
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_SIDE = 4096
SMALLEST = 1e-9  # that float32 still divides by without going beyond its range
IMAGE_KEYS = ("kind", "size", "resize", "filter", "color", "scale", "mean", "std", "layout")
ARRAY_KEYS = ("kind", "scale", "mean", "std", "layout")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """
    How a sample becomes real numbers: real = (stored * scale - mean) / std, in float32.

    size is (H, W). mean and std hold one number for all channels, or one per channel: the last
    axis of an image sample, the first axis of an array sample. layout is the one of the torch
    network's input: "nchw" or "nhwc" for images (the .tflite side is always NHWC), "as-is" for
    arrays. resize, filter and color concern images only. A wrong field is a UsageError.
    """

    kind: str
    size: tuple[int, int] | None = None
    resize: str = "stretch"
    filter: str = "bilinear"
    color: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"kind: expected image or array, found {self.kind!r}")
        if self.layout not in LAYOUTS[self.kind]:
            wanted = " or ".join(LAYOUTS[self.kind])
            raise UsageError(f"layout: expected {wanted} for {self.kind}s, found {self.layout!r}")
        if self.kind == "image":
            self._check_image()
        elif self.size is not None:
            raise UsageError("size: is for images, found one for arrays")
        longest = max(len(self.mean), len(self.std))
        lengths = {1, longest if self.kind == "array" else self.channels}
        for key, values in (("mean", self.mean), ("std", self.std)):
            if not values or len(values) not in lengths:
                wanted = " or ".join(map(str, sorted(lengths)))
                raise UsageError(f"{key}: expected {wanted} numbers, found {len(values)}")
            if not all(map(math.isfinite, values)):
                raise UsageError(f"{key}: expected finite numbers, found {list(values)}")
        most = 1 / SMALLEST
        for key, values in (("scale", (self.scale,)), ("std", self.std)):
            if not SMALLEST <= min(values) <= max(values) <= most:
                raise UsageError(
                    f"{key}: expected numbers of {SMALLEST:g} to {most:g}, found {list(values)}"
                )
        if max(map(abs, self.mean)) > most:
            raise UsageError(f"mean: expected numbers up to {most:g}, found {list(self.mean)}")

    def _check_image(self) -> None:
        if self.size is None or not all(1 <= side <= MAX_SIDE for side in self.size):
            raise UsageError(f"size: expected [H, W] of 1 to {MAX_SIDE}, found {self.size}")
        choose(self.resize, RESIZES, "way to resize")
        choose(self.filter, FILTERS, "resize filter")
        choose(self.color, CHANNELS, "colour order")

    @property
    def channels(self) -> int:
        """1 for gray, 3 for rgb and bgr. UsageError for arrays."""
        if self.kind != "image":
            raise UsageError("arrays have no colour channels")
        return CHANNELS[self.color]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a sample. UsageError for arrays, whose shape the network's input gives."""
        if self.size is None:
            raise UsageError("arrays have no size of their own")
        return (*self.size, self.channels)

    def to_document(self) -> dict[str, Any]:
        """The schema as plain values, for JSON and TOML; the reader is from_table."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "size": list(self.size or ()),
            "resize": self.resize,
            "filter": self.filter,
            "color": self.color,
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
            "layout": self.layout,
        }
        keys = IMAGE_KEYS if self.kind == "image" else ARRAY_KEYS
        return {key: values[key] for key in keys}

    @classmethod
    def from_table(cls, table: Table) -> "Preprocess":
        """Read what to_document wrote. A missing, misspelt or wrong key is BadFile."""
        kind = table.get("kind", str)
        is_image = kind != "array"
        table.only(*(IMAGE_KEYS if is_image else ARRAY_KEYS))
        try:
            return cls(
                kind=kind,
                size=_pair(table.list_of("size", int, length=2)) if is_image else None,
                resize=table.find("resize", str, "stretch"),
                filter=table.find("filter", str, "bilinear"),
                color=table.find("color", str, "rgb"),
                scale=table.get("scale", float),
                mean=tuple(table.list_of("mean", float)),
                std=tuple(table.list_of("std", float)),
                layout=table.get("layout", str),
            )
        except UsageError as error:
            raise BadFile(f"{table.where}: {error}", hint=error.hint) from error


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


# ---------------------------------------------------------------- pictures -> samples


def _stretch(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, how)


def _crop(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    # The largest centred rectangle of the wanted shape; its edges may fall between pixels.
    ratio = min(image.width / size[0], image.height / size[1])
    left = (image.width - size[0] * ratio) / 2
    top = (image.height - size[1] * ratio) / 2
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(image.width - left, image.width),
        min(image.height - top, image.height),
    )
    return image if image.size == size else image.resize(size, how, box=box)


def _letterbox(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    # Centred on black; an odd pixel of border goes to the right and to the bottom.
    if image.size == size:
        return image
    ratio = min(size[0] / image.width, size[1] / image.height)
    inner = (
        min(size[0], max(1, math.floor(image.width * ratio + 0.5))),
        min(size[1], max(1, math.floor(image.height * ratio + 0.5))),
    )
    canvas = Image.new(image.mode, size)
    corner = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    canvas.paste(image.resize(inner, how), corner)
    return canvas


RESIZES: dict[str, Callable[[Image.Image, tuple[int, int], Image.Resampling], Image.Image]] = {
    "stretch": _stretch,
    "crop": _crop,
    "letterbox": _letterbox,
}


def load_image(source: Path | str | bytes | IO[bytes], preprocess: Preprocess) -> NDArray[np.uint8]:
    """
    One picture (a path, its bytes, or an open file) as a sample: uint8 (H, W, C).

    Turned upright by its EXIF tag, laid over white where transparent, 16 bits cut to 8, the
    first frame of an animation. UsageError if there is no such file; BadFile if it is not a
    picture, is truncated, or has too many pixels.
    """
    return _to_sample(open_picture(source), preprocess)


def _to_sample(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """*image* (mode L or RGB) in the colour and size that *preprocess* asks for."""
    height, width, channels = preprocess.sample_shape
    image = image.convert("L" if preprocess.color == "gray" else "RGB")
    image = RESIZES[preprocess.resize](image, (width, height), FILTERS[preprocess.filter])
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels[..., ::-1] if preprocess.color == "bgr" else pixels)


def fit_sample(
    sample: Any, preprocess: Preprocess, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """
    *sample* in the form that a calibration set holds.

    Images: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any size -> uint8 of sample_shape.
    Three channels stand in the order of *preprocess* (a gray network's are taken as RGB), a
    fourth is alpha over white. Arrays: integers or floats, finite, of *shape* if that is
    given -> float32. Anything else is a UsageError.
    """
    values = np.asarray(sample)
    if preprocess.kind == "array":
        return _fit_array(values, shape)
    if values.dtype != np.uint8:
        raise UsageError(
            f"sample: {values.dtype}, expected uint8 pixels (0 to 255)",
            hint="scaling, mean and std are applied by edgeexit itself",
        )
    if values.ndim == 2:
        values = values[..., np.newaxis]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        raise UsageError(
            f"sample: shape {values.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if values.shape == preprocess.sample_shape:
        return values
    if preprocess.color == "bgr" and values.shape[2] == 3:
        values = values[..., ::-1]
    pixels = np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values)
    return _to_sample(opaque(Image.fromarray(pixels)), preprocess)


def _fit_array(values: NDArray[Any], shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    if values.dtype.kind not in "iuf":
        raise UsageError(f"sample: {values.dtype}, expected numbers (float32)")
    if shape is not None and values.shape != shape:
        raise UsageError(f"sample: shape {values.shape}, expected {shape}")
    with np.errstate(over="ignore"):
        single = values.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise UsageError("sample: holds NaN or infinity, expected finite numbers")
    return single


# ---------------------------------------------------------------- samples -> numbers


def real_values(samples: NDArray[Any], preprocess: Preprocess) -> NDArray[np.float32]:
    """
    The real numbers of a batch of samples, float32 of the same shape (images stay NHWC).

    *samples* is uint8 (N, H, W, C) or float32 (N, ...), as fit_sample or a set gives them.
    """
    if preprocess.kind == "array":
        out = np.empty(samples.shape, np.float32)
        _normalise(samples.astype(np.float32, copy=False), preprocess, out, first_axis=1)
        return out
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] != preprocess.channels:
        raise UsageError(
            f"samples: {samples.dtype} {samples.shape}, expected uint8 (N, H, W, "
            f"{preprocess.channels})"
        )
    tables = _real_tables(preprocess)
    if len(tables) == 1:
        return np.take(tables[0], samples)
    out = np.empty(samples.shape, np.float32)
    for channel, table in enumerate(tables):
        out[..., channel] = table[samples[..., channel]]
    return out


def _normalise(
    stored: NDArray[Any], preprocess: Preprocess, out: NDArray[np.float32], *, first_axis: int
) -> None:
    """Float32 (stored * scale - mean) / std into *out*; channels lie along *first_axis*."""
    tail = (1,) * (stored.ndim - first_axis - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(stored, np.float32(preprocess.scale), out=out)
        np.subtract(out, _along(preprocess.mean, tail), out=out)
        np.divide(out, _along(preprocess.std, tail), out=out)


def _along(values: tuple[float, ...], tail: tuple[int, ...]) -> NDArray[np.float32]:
    single = np.array(values, np.float32)
    return single if len(values) == 1 else single.reshape(-1, *tail)


def _real_tables(preprocess: Preprocess) -> list[NDArray[np.float32]]:
    """Float32 (256,) for each channel, or just one if the channels share mean and std."""
    count = max(len(preprocess.mean), len(preprocess.std))
    stored = np.broadcast_to(np.arange(256, dtype=np.float32), (count, 256))
    out = np.empty((count, 256), np.float32)
    _normalise(stored, preprocess, out, first_axis=0)
    return [out[0]] if (out == out[0]).all() else list(out)


def quantize(
    real: NDArray[Any], dtype: str, scale: float, zero_point: int, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """
    The stored integers nearest to float32 *real*: clip(rint(real / scale) + zero_point).

    Computed in float64 and rounded half to even, so every machine gets the same integers.
    *out* (of *dtype*) is filled and returned if given. A *dtype* of "float32" copies.
    """
    out = np.empty(real.shape, dtype) if out is None else out
    if dtype == "float32":
        np.copyto(out, real)
        return out
    limits = np.iinfo(dtype)
    with np.errstate(over="ignore"):
        stored = np.divide(real, scale, dtype=np.float64)
    np.rint(stored, out=stored)
    np.add(stored, zero_point, out=stored)
    np.clip(stored, limits.min, limits.max, out=stored)
    np.copyto(out, stored, casting="unsafe")
    return out


class InputStage:
    """
    Makes the network's input tensor out of one sample; the first step of every timed call.

    *shape*, *dtype*, *scale* and *zero_point* describe the tensor in the .tflite: (1, H, W, C)
    for images, (1, ...) for arrays. The array that a call returns is the same one each time: it
    is overwritten by the next call, and one stage serves one thread. A sample that does not fit
    is a UsageError; an image of another size is fitted first.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        shape: tuple[int, ...],
        dtype: str,
        scale: float,
        zero_point: int,
    ) -> None:
        if dtype != "float32" and (dtype not in ("int8", "uint8", "int16") or not scale > 0):
            raise BadFile(
                f"input tensor: {dtype} with scale {scale}, expected float32 or int8 with a scale"
            )
        self._preprocess = preprocess
        self._dtype, self._scale, self._zero_point = dtype, scale, zero_point
        self._buffer = np.zeros(shape, dtype)
        self.sample_shape = tuple(shape[1:])
        if preprocess.kind == "image" and tuple(shape) != (1, *preprocess.sample_shape):
            raise BadFile(
                f"input tensor: shape {tuple(shape)}, preprocessing makes "
                f"{(1, *preprocess.sample_shape)}"
            )
        self._fill = self._prepare_table() if preprocess.kind == "image" else self._array
        # A uint8 image of the right shape goes straight to the table; float samples are always
        # checked for NaN. numpy keeps one dtype object, so `is` suffices (else: the slow way).
        self._direct = np.dtype(np.uint8) if preprocess.kind == "image" else None

    def __call__(self, sample: Any) -> NDArray[Any]:
        """The input tensor for *sample*; valid until the next call."""
        if (
            type(sample) is not np.ndarray
            or sample.shape != self.sample_shape
            or sample.dtype is not self._direct
        ):
            sample = fit_sample(sample, self._preprocess, self.sample_shape)
        self._fill(sample)
        return self._buffer

    def _array(self, sample: NDArray[Any]) -> None:
        real = real_values(sample[np.newaxis], self._preprocess)
        quantize(real, self._dtype, self._scale, self._zero_point, out=self._buffer)

    def _prepare_table(self) -> Callable[[NDArray[Any]], None]:
        tables = [
            quantize(real, self._dtype, self._scale, self._zero_point)
            for real in _real_tables(self._preprocess)
        ]
        if self._buffer.itemsize > 1:
            return self._wide(tables)
        # bytes.translate is the quickest 256-entry table on both x86 and ARM (0.7 us for
        # 28x28x1 against 1.4 us for ndarray.take, 2.4 us for np.take).
        stored = [table.tobytes() for table in tables]
        flat = self._buffer.view(np.uint8).reshape(-1)
        if len(stored) == 1:
            return _one_table(flat.data, stored[0])
        return _table_per_channel(flat, stored)

    def _wide(self, tables: list[NDArray[Any]]) -> Callable[[NDArray[Any]], None]:
        image = self._buffer[0]

        def one(sample: NDArray[Any]) -> None:
            tables[0].take(sample, None, image, "clip")

        def per_channel(sample: NDArray[Any]) -> None:
            for channel, table in enumerate(tables):
                image[..., channel] = table[sample[..., channel]]

        return one if len(tables) == 1 else per_channel


def _one_table(target: memoryview, table: bytes) -> Callable[[NDArray[Any]], None]:
    def fill(sample: NDArray[Any]) -> None:
        target[:] = sample.tobytes().translate(table)

    return fill


def _table_per_channel(
    flat: NDArray[np.uint8], tables: list[bytes]
) -> Callable[[NDArray[Any]], None]:
    planes = [(flat[c :: len(tables)], table) for c, table in enumerate(tables)]

    def fill(sample: NDArray[Any]) -> None:
        for channel, (plane, table) in enumerate(planes):
            plane[:] = np.frombuffer(sample[..., channel].tobytes().translate(table), np.uint8)

    return fill
