"""The score against the shared vectors, and against a slow, literal reading of the sheet."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.inference.dct_constants import DIVISORS
from cluster.inference.scoring import perceptual_hash, score_images, score_llm

PHASH = Path(__file__).parent.parent / "data" / "phash"
VECTORS: dict[str, str] = json.loads((PHASH / "vectors.json").read_text())

Pixel = tuple[int, ...]
Grid = list[list[Pixel]]


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


def test_a_megapixel_takes_under_50_ms() -> None:
    image = Image.open(PHASH / "grad_1024x1024.png").convert("RGB")
    perceptual_hash(image)

    def seconds() -> float:
        began = time.process_time()
        perceptual_hash(image)
        return time.process_time() - began

    assert min(seconds() for _ in range(5)) < 0.05


# --- the sheet, step by step, in plain Python -------------------------------------------------


def reference(image: Image.Image) -> bytes:
    """Steps 1 to 5 of protocol.md section 4 for 8-bit grey, RGB and RGBA."""
    grid: Grid = [
        [_as_pixel(image.getpixel((x, y))) for x in range(image.width)] for y in range(image.height)
    ]
    grey = [[_luminance(p) for p in row] for row in _shrink(grid)]
    rows = [_lee(row) for row in grey]
    columns = [_lee([row[x] for row in rows]) for x in range(8)]
    values = [columns[x][y] for y in range(8) for x in range(8)]
    median = _median(list(values))
    return sum(1 << (63 - i) for i, v in enumerate(values) if v > median).to_bytes(8, "big")


def _as_pixel(value: object) -> Pixel:
    return tuple(value) if isinstance(value, tuple) else (value, value, value)  # type: ignore[return-value]


def _shrink(grid: Grid) -> Grid:
    if len(grid) == 64 and len(grid[0]) == 64:
        return [[_premultiplied(p) for p in row] for row in grid]
    narrow = [_shrink_line([_premultiplied(p) for p in row]) for row in grid]
    turned = [_shrink_line([row[x] for row in narrow]) for x in range(64)]
    return [[turned[x][y] for x in range(64)] for y in range(64)]


def _premultiplied(pixel: Pixel) -> Pixel:
    if len(pixel) == 3:
        return pixel
    red, green, blue, alpha = pixel
    return red * alpha // 255, green * alpha // 255, blue * alpha // 255


def _shrink_line(line: list[Pixel]) -> list[Pixel]:
    scale = len(line) / 64
    taps = 2 * max(math.ceil(scale), 1)
    out: list[Pixel] = []
    for y in range(64):
        c = scale * (y + 0.5) - 0.5
        start = int(c) - taps // 2 + 1
        sums, total = [0, 0, 0], 0
        for i in range(taps):
            weight = int(256 * max(0.0, 1 - abs(((c - start) - i) * min(1 / scale, 1.0))))
            if weight == 0:
                continue
            pixel = line[min(max(start + i, 0), len(line) - 1)]
            total += weight
            sums = [s + weight * v for s, v in zip(sums, pixel, strict=True)]
        out.append(tuple(s // total for s in sums))
    return out


def _luminance(pixel: Pixel) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def _lee(values: list[float]) -> list[float]:
    n = len(values)
    if n == 1:
        return values
    h = n // 2
    even = _lee([values[i] + values[n - 1 - i] for i in range(h)])
    odd = _lee([(values[i] - values[n - 1 - i]) / DIVISORS[n][i] for i in range(h)])
    out: list[float] = []
    for i in range(h):
        out.append(even[i])
        out.append(odd[i] + odd[i + 1] if i < h - 1 else odd[i])
    return out


def _median(seq: list[float]) -> float:
    low, hi, k = 0, 63, 32
    while low < hi:
        pivot_index = low // 2 + hi // 2
        pivot = seq[pivot_index]
        seq[pivot_index], seq[hi] = seq[hi], seq[pivot_index]
        store = low
        for i in range(low, hi):
            if seq[i] < pivot:
                seq[store], seq[i] = seq[i], seq[store]
                store += 1
        seq[hi], seq[store] = seq[store], seq[hi]
        if k <= store:
            hi = store
        else:
            low = store + 1
    return seq[31] / 2 + seq[32] / 2


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


def test_palette_is_resized_on_16_bits() -> None:
    """Close to the 8-bit hash, by the finer rounding not always equal to it."""
    image = _picture(200, 120, "RGB", 9, smooth=True).quantize(64)
    got, near = perceptual_hash(_reread(image)), reference(image.convert("RGB"))
    assert (int.from_bytes(got) ^ int.from_bytes(near)).bit_count() <= 8


def test_transparency_at_64x64() -> None:
    """Not resized, so Go's 16-bit premultiplied colours are read; blue is divided by 256 there."""
    image = _picture(64, 64, "RGBA", 4, smooth=True)
    values = np.asarray(image).astype(np.int64)
    wide = values[..., :3] * 257 * values[..., 3:] // 255
    grey = 0.299 * (wide[..., 0] // 257) + 0.587 * (wide[..., 1] // 257)
    grey = grey + 0.114 * (wide[..., 2] // 256)
    rows = [_lee([float(v) for v in row]) for row in grey]
    columns = [_lee([row[x] for row in rows]) for x in range(8)]
    flat = [columns[x][y] for y in range(8) for x in range(8)]
    median = _median(list(flat))
    want = sum(1 << (63 - i) for i, v in enumerate(flat) if v > median)
    assert int.from_bytes(perceptual_hash(image)) == want
