"""The same picture gives the same tensor everywhere, whatever kind of file it came in."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeexit import pictures
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.preprocess import (
    InputStage,
    Preprocess,
    fit_sample,
    load_image,
    quantize,
    real_values,
)

RNG = np.random.default_rng(0)
RGB = Preprocess(kind="image", size=(6, 8), scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2,))
GRAY = Preprocess(kind="image", size=(6, 8), color="gray", scale=1 / 255)
BGR = Preprocess(kind="image", size=(6, 8), color="bgr", scale=1 / 255)
ARRAY = Preprocess(kind="array", layout="as-is", scale=0.5, mean=(1.0, 2.0), std=(2.0, 4.0))
PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("preprocess", [RGB, GRAY, BGR])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "float32"])
def test_running_and_training_see_the_same_numbers(preprocess: Preprocess, dtype: str) -> None:
    stage = InputStage(preprocess, (1, *preprocess.sample_shape), dtype, 0.0187, -3)
    for height, width in [(6, 8), (19, 5)]:
        picture = encoded(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)))

        sample = load_image(picture, preprocess)

        real = real_values(sample[np.newaxis], preprocess)
        assert (stage(sample) == quantize(real, dtype, 0.0187, -3)).all()


def test_a_float_array_is_normalised_along_its_first_axis() -> None:
    sample = RNG.normal(size=(2, 5)).astype(np.float32)
    stage = InputStage(ARRAY, (1, 2, 5), "int8", 0.01, 4)

    expected = (sample * 0.5 - [[1], [2]]) / [[2], [4]]

    np.testing.assert_allclose(real_values(sample[None], ARRAY)[0], expected, rtol=1e-5)
    assert (stage(sample) == quantize(real_values(sample[None], ARRAY), "int8", 0.01, 4)).all()


def test_quantizing_rounds_half_to_even_and_clips() -> None:
    real = np.array([0.5, 1.5, -0.5, 1e30, -1e30], np.float32)

    assert quantize(real, "int8", 1.0, 0).tolist() == [0, 2, 0, 127, -128]


def test_the_buffer_is_reused_and_views_are_taken() -> None:
    stage = InputStage(RGB, (1, 6, 8, 3), "int8", 0.02, 0)

    plain = stage(PIXELS).copy()

    assert stage(PIXELS) is stage(PIXELS)
    assert (stage(np.asfortranarray(PIXELS)) == plain).all()
    assert (stage(PIXELS[::-1]) == plain[:, ::-1]).all()


@pytest.mark.parametrize("preprocess", [RGB, GRAY, ARRAY])
def test_the_schema_survives_a_document(preprocess: Preprocess) -> None:
    assert Preprocess.from_table(Table(preprocess.to_document(), "x")) == preprocess


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "video"),
        ("size", [0, 3]),
        ("size", [3]),
        ("resize", "squash"),
        ("filter", "blur"),
        ("color", "cmyk"),
        ("scale", 0.0),
        ("mean", [0.0, 1.0]),
        ("std", [0.0]),
        ("std", []),
        ("std", [1e-300]),
        ("mean", [1e300]),
        ("scale", 1e-30),
        ("mean", [float("nan")]),
        ("layout", "hwcn"),
        ("sise", 1),
    ],
)
def test_a_wrong_schema_names_its_key(key: str, value: object) -> None:
    document = RGB.to_document() | {key: value}
    with pytest.raises(BadFile, match=r"x: .*"):
        Preprocess.from_table(Table(document, "x"))


# ---------------------------------------------------------------- kinds of pictures


def test_exif_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    turned = Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_90)

    assert (load_image(encoded(turned, exif=exif), RGB) == PIXELS).all()


def test_transparent_pixels_become_white() -> None:
    rgba = np.dstack([PIXELS, np.full((6, 8), 255, np.uint8)])
    rgba[0, 0, 3] = 0

    sample = load_image(encoded(Image.fromarray(rgba)), RGB)

    assert sample[0, 0].tolist() == [255, 255, 255]
    assert (sample[1:] == PIXELS[1:]).all()
    assert (fit_sample(rgba, RGB) == sample).all()


def test_palette_and_its_transparency() -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])

    assert load_image(encoded(image), RGB)[0, 0].tolist() == [10, 20, 30]
    assert load_image(encoded(image, transparency=1), RGB)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_byte(kind: str) -> None:
    deep = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)

    sample = load_image(encoded(Image.fromarray(deep), kind), GRAY)

    assert (sample[..., 0] == deep >> 8).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "RGBA", "YCbCr"])
def test_every_mode_of_white_is_white(mode: str) -> None:
    image = Image.new("RGB", (8, 6), "white").convert(mode)

    for preprocess in (RGB, GRAY):
        sample = load_image(encoded(image, "TIFF"), preprocess)
        assert sample.shape == preprocess.sample_shape
        assert (sample == 255).all()


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (8, 6), value) for value in (0, 255)]

    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])

    assert (load_image(data, GRAY) == 0).all()


def test_blue_comes_first_in_bgr() -> None:
    assert (load_image(encoded(Image.fromarray(PIXELS)), BGR) == PIXELS[..., ::-1]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_cut_or_damaged_picture_is_a_bad_file(kind: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)

    with pytest.raises(BadFile):
        load_image(data[: len(data) // 2], RGB)
    for seed in range(30):
        hurt = bytearray(data)
        for place in np.random.default_rng(seed).integers(0, min(len(data), 300), 8):
            hurt[place] ^= 0xFF
        try:
            load_image(bytes(hurt), RGB)
        except BadFile as error:
            assert "\n" not in str(error)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="not a picture"):
        load_image(b"hello", RGB)
    with pytest.raises(BadFile, match="floating-point"):
        load_image(encoded(Image.new("F", (8, 6)), "TIFF"), RGB)
    with pytest.raises(UsageError, match="no such file"):
        load_image(tmp_path / "none.png", RGB)
    with pytest.raises(UsageError, match="folder"):
        load_image(tmp_path, RGB)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(Image.new("1", (9000, 9000)))
    with pytest.raises(BadFile, match="at most"):
        load_image(picture, GRAY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadFile, match="at most"):
        load_image(picture, GRAY)
    assert pictures.MAX_PIXELS == 64 << 20


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (33, 20), (8, 6)])
def test_any_size_is_resized(resize: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(kind="image", size=(6, 8), resize=resize)

    sample = load_image(encoded(Image.new("RGB", size, "white")), preprocess)

    assert sample.shape == (6, 8, 3)
    assert sample.max() == 255
    if resize != "letterbox":
        assert sample.min() == 255


@pytest.mark.parametrize(
    "sample",
    [
        np.zeros((6, 8, 3), np.float32),
        np.zeros((6, 8, 2), np.uint8),
        np.zeros((6,), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        "text",
        None,
    ],
)
def test_a_wrong_image_sample_is_refused(sample: object) -> None:
    with pytest.raises(UsageError, match="sample: "):
        InputStage(RGB, (1, 6, 8, 3), "int8", 0.02, 0)(sample)


@pytest.mark.parametrize(
    "sample",
    [
        np.full((2, 5), np.nan),
        np.full((2, 5), 1e300),
        np.zeros((5, 2)),
        np.zeros((2, 5), complex),
        np.zeros((2, 5), bool),
    ],
)
def test_a_wrong_array_sample_is_refused(sample: NDArray[Any]) -> None:
    with pytest.raises(UsageError, match="sample: "):
        InputStage(ARRAY, (1, 2, 5), "float32", 0.0, 0)(sample)


def test_a_tensor_that_cannot_hold_the_sample_is_refused() -> None:
    for shape, dtype, scale in [
        ((1, 8, 6, 3), "int8", 0.1),
        ((1, 6, 8, 3), "int8", 0.0),
        ((1, 6, 8, 3), "int32", 0.1),
    ]:
        with pytest.raises(BadFile, match="input tensor"):
            InputStage(RGB, shape, dtype, scale, 0)
