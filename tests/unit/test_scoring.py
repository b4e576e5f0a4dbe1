"""The score against the shared vectors, and against a slow, literal reading of the sheet."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.inference.dct_constants import DIVISORS
from cluster.inference.scoring import UnsupportedPng, perceptual_hash, score_images, score_llm
from tests.unit.phash_reference import reference, wide_reference

PHASH = Path(__file__).parent.parent / "data" / "phash"
VECTORS: dict[str, str] = json.loads((PHASH / "vectors.json").read_text())


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_vectors(name: str) -> None:
    png = (PHASH / name).read_bytes()
    assert score_images([png]).hex() == VECTORS[name]


def test_score_is_the_hashes_in_order() -> None:
    names = ["mode_L.png", "shapes_512x512.png", "noise_8x8.png"]
    score = score_images([(PHASH / name).read_bytes() for name in names])
    assert score.hex() == "".join(VECTORS[name] for name in names)
    assert score_images([]) == b""


@pytest.mark.parametrize("file", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_png_is_refused(file: bytes) -> None:
    with pytest.raises(ValueError, match="not a PNG"):
        score_images([file])


def test_a_cut_off_png_is_refused() -> None:
    png = (PHASH / "shapes_512x512.png").read_bytes()
    with pytest.raises(ValueError, match="not a PNG"):
        score_images([png[: len(png) // 2]])


def test_llm_score() -> None:
    assert score_llm(b"{}") == hashlib.sha256(b"{}").digest()


def test_divisors_are_the_shared_ones() -> None:
    shared = json.loads((PHASH / "dct_constants.json").read_text())
    assert {int(size): tuple(values) for size, values in shared.items()} == DIVISORS


# --- against the sheet, read literally -------------------------------------------------------


def _picture(width: int, height: int, mode: str, seed: int, smooth: bool) -> Image.Image:
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    if smooth:
        x = np.linspace(0, 1, width)[None, :, None]
        y = np.linspace(0, 1, height)[:, None, None]
        a, b, c = rng.normal(size=(3, channels)) * 4
        values = 127.5 + 127.5 * np.sin(a * x + b * y + c)
    else:
        values = rng.integers(0, 256, (height, width, channels)).astype(np.float64)
    array = values.astype(np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


SIDES = st.one_of(st.integers(1, 150), st.sampled_from([1, 2, 63, 64, 65, 128]))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["L", "RGB", "RGBA"]), st.integers(0, 2**32), st.booleans())
def test_equals_the_literal_reading(
    width: int, height: int, mode: str, seed: int, smooth: bool
) -> None:
    if mode == "RGBA" and width == height == 64:
        mode = "RGB"  # read as 16-bit colours there: see test_transparency_at_64x64
    image = _picture(width, height, mode, seed, smooth)
    assert perceptual_hash(image) == reference(image)


@pytest.mark.parametrize("size", [(1, 1500), (1500, 1), (2000, 3), (3, 777), (64, 900), (900, 64)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_extreme_shapes(size: tuple[int, int], mode: str) -> None:
    image = _picture(*size, mode, 7, smooth=False)
    assert perceptual_hash(image) == reference(image)


def test_huge_sums_stay_exact() -> None:
    """Weighted sums beyond float32's whole numbers: 2^24 is passed at a side of 16448."""
    image = _picture(40000, 2, "RGB", 3, smooth=False)
    assert perceptual_hash(image) == reference(image)


# --- other PNG colour types, as Go decodes them -----------------------------------------------


def _reread(image: Image.Image, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(io.BytesIO(file.getvalue()))


def test_opaque_forms_of_one_picture_agree_at_64x64() -> None:
    """Without a resize, all forms carry the same values."""
    grey = _picture(64, 64, "L", 5, smooth=True)
    want = perceptual_hash(grey)
    assert perceptual_hash(grey.convert("RGB")) == want
    assert perceptual_hash(grey.convert("RGBA")) == want
    assert perceptual_hash(_reread(grey.convert("LA"))) == want
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert _reread(wide).mode == "I;16"
    assert perceptual_hash(_reread(wide)) == want


def test_grey_with_alpha_is_rgba() -> None:
    rgba = _picture(90, 70, "RGBA", 11, smooth=True)
    grey, alpha = rgba.convert("L"), rgba.getchannel("A")
    with_alpha = Image.merge("LA", [grey, alpha])
    assert perceptual_hash(_reread(with_alpha)) == reference(with_alpha.convert("RGBA"))


def test_a_transparent_colour_is_alpha() -> None:
    image = _picture(80, 80, "L", 2, smooth=True).convert("RGB")
    colour = image.getpixel((40, 40))
    read = _reread(image, transparency=colour)
    assert read.mode == "RGB"
    assert perceptual_hash(read) == reference(read.convert("RGBA"))


WIDE_SIZES = [(200, 120), (64, 100), (30, 70), (1, 90), (150, 64), (65, 63)]
SEEDS = range(3)


def _pale(width: int, height: int, seed: int) -> Image.Image:
    """RGB in few shades, so that the rounding of a resize decides bits of the hash."""
    return _picture(width, height, "RGB", seed, smooth=False).point(lambda v: 100 + v // 16)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", WIDE_SIZES, ids=str)
def test_palettes_are_resized_on_16_bits(size: tuple[int, int], seed: int) -> None:
    read = _reread(_pale(*size, seed).quantize(64))
    assert read.mode == "P"
    assert perceptual_hash(read) == wide_reference(read.convert("RGB"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [*WIDE_SIZES, (64, 64)], ids=str)
def test_palettes_may_have_transparent_colours(size: tuple[int, int], seed: int) -> None:
    read = _reread(_pale(*size, seed).quantize(16), transparency=bytes(range(240, 256)))
    assert (read.mode, "transparency" in read.info) == ("P", True)
    assert perceptual_hash(read) == wide_reference(read.convert("RGBA"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [*WIDE_SIZES, (64, 64)], ids=str)
def test_16_bit_grey_is_resized_on_16_bits(size: tuple[int, int], seed: int) -> None:
    values = np.random.default_rng(seed).integers(30000, 30600, size[::-1]).astype(np.uint16)
    read = _reread(Image.fromarray(values))
    assert read.mode == "I;16"
    assert perceptual_hash(read) == wide_reference(read)


def test_8_bits_would_show() -> None:
    """In the tests above: the two readings of their pictures differ."""
    palettes = [_pale(*size, seed).quantize(64) for size in WIDE_SIZES for seed in SEEDS]
    pictures = [palette.convert("RGB") for palette in palettes]
    assert any(wide_reference(picture) != reference(picture) for picture in pictures)


def test_transparency_at_64x64() -> None:
    """Not resized, so Go's 16-bit premultiplied colours are read; blue is divided by 256 there."""
    image = _picture(64, 64, "RGBA", 4, smooth=True)
    assert perceptual_hash(image) == wide_reference(image)


# --- what Pillow doesn't read as Go does ------------------------------------------------------


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(depth: int, colour: int, transparent: bytes = b"") -> bytes:
    """A whole PNG image of 8x8 pixels: 64 bits of them a row for every bit of depth and channel."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = (b"\0" + bytes([17]) * (depth * channels)) * 8
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)),
            _chunk(b"PLTE", bytes(range(96))) if colour == 3 else b"",
            _chunk(b"tRNS", transparent) if transparent else b"",
            _chunk(b"IDAT", zlib.compress(rows)),
            _chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize(
    ("depth", "colour", "transparent"),
    [
        (16, 2, b""),
        (16, 2, bytes(6)),
        (16, 4, b""),
        (16, 6, b""),
        (1, 0, b"\0\1"),
        (2, 0, b"\0\1"),
        (4, 0, b"\0\1"),
        (16, 0, b"\0\1"),
    ],
)
def test_what_would_be_scored_wrong_is_refused(depth: int, colour: int, transparent: bytes) -> None:
    with pytest.raises(UnsupportedPng):
        score_images([_png(depth, colour, transparent)])


@pytest.mark.parametrize(
    ("depth", "colour", "transparent"),
    [
        *((depth, 0, b"") for depth in (1, 2, 4, 8, 16)),
        (8, 0, b"\0\1"),
        (8, 2, b""),
        (8, 2, bytes(6)),
        *((depth, 3, transparent) for depth in (1, 2, 4, 8) for transparent in (b"", b"\1")),
        (8, 4, b""),
        (8, 6, b""),
    ],
)
def test_every_other_kind_is_scored(depth: int, colour: int, transparent: bytes) -> None:
    assert len(score_images([_png(depth, colour, transparent)])) == 8


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_shallow_grey_is_scaled_to_8_bits(depth: int) -> None:
    """As Go does it: the lowest shade is black, the highest white."""
    read = Image.open(io.BytesIO(_png(depth, 0)))
    read.load()
    shades = [17 >> (8 - depth - shift) & (1 << depth) - 1 for shift in range(0, 8, depth)]
    line = [shade * 255 // ((1 << depth) - 1) for shade in shades]
    want = Image.fromarray(np.array([(line * depth)[:8]] * 8, dtype=np.uint8))
    assert score_images([_png(depth, 0)]) == reference(want)


def test_the_header_comes_first() -> None:
    png = _png(8, 2)
    with pytest.raises(ValueError, match="not a PNG"):
        score_images([png[:8] + _chunk(b"tEXt", b"a\0b") + png[8:]])
