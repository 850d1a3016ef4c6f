"""
Open picture files of any kind as plain 8-bit gray or RGB.

Callers see open_picture and opaque. Hidden here: Pillow's thirty modes, its warnings and the
many exceptions its decoders raise on hostile bytes; only formats decoded without other
programs are tried, and no pixel is unpacked before their number is known.
"""

import io
import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from edgeexit.errors import BadFile
from edgeexit.files import open_file

# Never EPS or PDF: Pillow hands those to other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# 64 megapixels, the largest Raspberry Pi camera; 192 MiB once unpacked as RGB.
MAX_PIXELS = 64 << 20
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
)


def open_picture(source: Path | str | bytes | IO[bytes]) -> Image.Image:
    """
    The first frame of a picture, upright and opaque, as mode L or RGB.

    *source* is a path, the file's bytes, or an open binary file. UsageError if the path is not
    a file; BadFile if the content is no picture, is truncated, or holds more than MAX_PIXELS.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "picture")
    if not isinstance(source, str | os.PathLike):
        return _decode(source, str(getattr(source, "name", "picture")))
    with open_file(Path(source)) as file:
        return _decode(file, str(source))


def _decode(file: IO[bytes], where: str) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns about odd metadata, which changes no pixel. Its own size warning starts
        # above our limit.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise _too_large(where, str(error)) from error
        except Exception as error:
            raise BadFile(
                f"{where}: not a picture ({type(error).__name__})",
                hint=f"readable: {', '.join(FORMATS)}",
            ) from error
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise _too_large(where, f"{image.width} x {image.height} pixels")
        if pixels == 0:
            raise BadFile(f"{where}: picture without pixels")
        try:
            image.load()
            return opaque(ImageOps.exif_transpose(image))
        except BadFile as error:
            raise BadFile(f"{where}: {error}", hint=error.hint) from error
        except Exception as error:
            # The one door to Pillow's decoders: damaged bytes raise almost anything there.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadFile(f"{where}: truncated or damaged picture: {reason}") from error


def _too_large(where: str, fact: str) -> BadFile:
    return BadFile(
        f"{where}: {fact}, expected at most {MAX_PIXELS} pixels", hint="make the picture smaller"
    )


def opaque(image: Image.Image) -> Image.Image:
    """*image* of any mode as L or RGB: alpha over white, 16 bits cut to their upper 8."""
    if image.mode.startswith("I"):
        return _upper_byte(image)
    if image.mode == "F":
        raise BadFile("floating-point pixels, expected 8 or 16 bits a channel")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":  # Pillow has no direct way from premultiplied gray
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _upper_byte(image: Image.Image) -> Image.Image:
    # As Pillow itself does for 16-bit colour. Mode "I" is how some versions give 16-bit gray.
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BadFile("32-bit pixels, expected 8 or 16 bits a channel")
    return Image.fromarray((values >> 8).astype(np.uint8))
