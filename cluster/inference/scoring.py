"""Scores: what the network compares, and slashes by (protocol.md section 4).

The perceptual hash must equal, bit for bit, what the relay computes from the uploaded PNG with Go's
image/png, nfnt/resize and goimagehash 1.1.0. So every step keeps their number formats:

    pixels --resize 64x64--> integers --grey--> float64 --DCT--> 8x8 --quick-select--> 64 bits

The resize is integer arithmetic, done here as a matrix product in floating point: every partial sum
is a whole number that the float type holds exactly, so the order of additions can't matter. Grey
and DCT are float64, element by element in the library's order; nothing there may be refactored
into something merely equal in real numbers.

How an image reaches the hash depends on its PNG colour type, as it does in Go: grey and true colour
are resized on 8-bit values, palette and 16-bit grey images on 16-bit ones.

The limit is what Pillow gives of a file: it drops the low byte of 16-bit colours, and takes the
transparent shade of a grey image as it stands, where Go scales it with the depth (2 and 4 bits) or
keeps it at 16. So no PNG file of these kinds is scored. Our own results are none of them: they are
8-bit RGB without transparency.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster.core.types import Score
from cluster.inference.dct_constants import DIVISORS

SIZE: Final = 64
_GREY: Final = 0
"""Its colour type in a PNG file's header."""
KEPT: Final = 8
_EXACT_IN_FLOAT32: Final = 2**24
_CHUNK_VALUES: Final = 1 << 20

_Ints = npt.NDArray[np.int64]
_Pixels = npt.NDArray[np.int64] | npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float64]


class UnsupportedPng(ValueError):
    """A whole PNG image, of a kind that the network would score and that can't be scored here."""


def score_images(pngs: Sequence[bytes]) -> Score:
    """The score of an SD or SD_FT result: 8 bytes for each PNG file, in index order.

    Raises `ValueError` for a file that isn't a whole PNG image, `UnsupportedPng` for one whose kind
    is beyond the limit above.
    """
    return Score(b"".join(perceptual_hash(_open(png)) for png in pngs))


def score_llm(file: bytes) -> Score:
    """The score of an LLM result: sha256 of the result file."""
    return Score(hashlib.sha256(file).digest())


def perceptual_hash(image: Image.Image) -> bytes:
    """The 64-bit perceptual hash of `image`, 8 bytes big-endian."""
    pixels, wide = _as_go_decodes(image)
    if pixels.shape[:2] != (SIZE, SIZE):
        pixels = _resize(pixels, 65536 if wide else 256)
    block = _dct(_dct(_grey(pixels, wide)).T[:KEPT]).T[:KEPT]
    values = [float(value) for value in block.ravel()]
    median = _library_median(values)
    bits = 0
    for value in values:
        bits = bits << 1 | (value > median)
    return bits.to_bytes(8, "big")


def _open(png: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG image: {error}") from error
    _check_kind(png, "transparency" in image.info)
    return image


def _check_kind(png: bytes, has_transparent_colour: bool) -> None:
    """By the header, which is the first chunk (after 8 bytes of signature and 4 of its length)."""
    if png[12:16] != b"IHDR":
        raise ValueError("not a PNG image: it doesn't begin with its header")
    depth, colour = png[24], png[25]
    if depth == 16 and colour != _GREY:
        raise UnsupportedPng("16-bit colours aren't scored here")
    if colour == _GREY and depth != 8 and has_transparent_colour:
        raise UnsupportedPng(f"{depth}-bit grey with a transparent shade isn't scored here")


def _as_go_decodes(image: Image.Image) -> tuple[_Pixels, bool]:
    """Colour values premultiplied by alpha, (height, width, 1 or 3), and whether they are 16-bit.

    One channel stands for three equal ones.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int64)[:, :, None], True
    if image.mode == "P":
        return _premultiplied_16(np.asarray(image.convert("RGBA"))), True
    if image.mode in {"LA", "PA", "La", "RGBa"} or (
        image.mode in {"1", "L", "RGB"} and "transparency" in image.info
    ):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        values = np.asarray(image)
        if values.shape[:2] == (SIZE, SIZE):
            # Not resized: Go reads the pixels as 16-bit premultiplied colours.
            return _premultiplied_16(values), True
        if values[..., 3].min(initial=255) == 255:
            return values[..., :3], False
        return values[..., :3].astype(np.int64) * values[..., 3:] // 255, False
    if image.mode in {"1", "L"}:
        return np.asarray(image.convert("L"))[:, :, None], False
    return np.asarray(image.convert("RGB")), False


def _premultiplied_16(rgba: npt.NDArray[np.uint8]) -> _Ints:
    return rgba[..., :3].astype(np.int64) * 257 * rgba[..., 3:] // 255


def _resize(pixels: _Pixels, unit: int) -> _Ints:
    """To 64x64: along x first, then along y; `unit` is the weight of a whole pixel."""
    across = _resize_last_but_one(pixels, unit)
    return _resize_last_but_one(across.transpose(1, 0, 2), unit).transpose(1, 0, 2)


def _resize_last_but_one(pixels: _Pixels, unit: int) -> _Ints:
    """(n, length, channels) to (n, 64, channels): weighted means, truncated."""
    weights = _weights(pixels.shape[1], unit)
    sums = weights.sum(axis=0)
    bound = int(sums.max()) * (255 if unit == 256 else 65535)
    exact: type[np.float32] | type[np.float64] = (
        np.float32 if bound < _EXACT_IN_FLOAT32 else np.float64
    )
    matrix = weights.astype(exact).T
    rows, length, channels = pixels.shape
    result = np.empty((rows, SIZE, channels), dtype=np.int64)
    step = max(1, _CHUNK_VALUES // (length * channels))
    for low in range(0, rows, step):
        part = pixels[low : low + step].astype(exact)
        result[low : low + step] = np.matmul(matrix, part).astype(np.int64) // sums[:, None]
    return result


def _weights(length: int, unit: int) -> _Ints:
    """(length, 64): how much each position counts for each output; positions beyond are clamped."""
    scale = length / SIZE
    taps = 2 * int(max(math.ceil(scale), 1))
    narrowing = min(1.0 / scale, 1.0)
    weights = np.zeros((length, SIZE), dtype=np.int64)
    for out in range(SIZE):
        centre = scale * (out + 0.5) - 0.5
        start = math.trunc(centre) - taps // 2 + 1
        distance = np.abs((centre - start - np.arange(taps)) * narrowing)
        tap_weights = np.trunc(np.maximum(0.0, 1.0 - distance) * unit).astype(np.int64)
        positions = np.clip(np.arange(start, start + taps), 0, length - 1)
        np.add.at(weights[:, out], positions, tap_weights)
    return weights


def _grey(pixels: _Pixels, wide: bool) -> _Floats:
    """Luminance of 8-bit values; of 16-bit ones the library divides blue by 256, not 257."""
    divisors = (257, 257, 256) if wide else (1, 1, 1)
    red, green, blue = (
        (pixels[..., min(channel, pixels.shape[2] - 1)] // divisor).astype(np.float64)
        for channel, divisor in enumerate(divisors)
    )
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _dct(rows: _Floats) -> _Floats:
    """DCT-II of each row, unscaled, by Lee's recursion (1984)."""
    size = rows.shape[1]
    if size == 1:
        return rows
    half = size // 2
    front, back = rows[:, :half], rows[:, : half - 1 : -1]
    even = _dct(front + back)
    odd = _dct((front - back) / np.array(DIVISORS[size]))
    result = np.empty_like(rows)
    result[:, 0::2] = even
    result[:, 1::2] = odd
    result[:, 1:-1:2] += odd[:, 1:]
    return result


def _library_median(values: Sequence[float]) -> float:
    """The mean of the two middle places after the library's quick-select: not always the median."""
    seq = list(values)
    middle = len(seq) // 2
    low, high = 0, len(seq) - 1
    while low != high:
        pivot = low // 2 + high // 2
        value = seq[pivot]
        seq[pivot], seq[high] = seq[high], seq[pivot]
        store = low
        for place in range(low, high):
            if seq[place] < value:
                seq[store], seq[place] = seq[place], seq[store]
                store += 1
        seq[high], seq[store] = seq[store], seq[high]
        if middle <= store:
            high = store
        else:
            low = store + 1
    return seq[middle - 1] / 2 + seq[middle] / 2
