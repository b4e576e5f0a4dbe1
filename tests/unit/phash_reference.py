"""The sheet of protocol.md section 4, step by step, in plain Python: slow, and easy to compare."""

from __future__ import annotations

import math

from PIL import Image

from cluster.inference.dct_constants import DIVISORS

Pixel = tuple[int, ...]
Grid = list[list[Pixel]]


def reference(image: Image.Image) -> bytes:
    """Steps 1 to 5 of protocol.md section 4 for 8-bit grey, RGB and RGBA."""
    grid = [[_premultiplied(p) for p in row] for row in _grid(image)]
    return _hash([[_luminance(p) for p in row] for row in _shrink(grid, 256)])


def wide_reference(image: Image.Image) -> bytes:
    """The same for what Go reads as 16-bit colours: palettes (given here as the RGB or RGBA that
    they stand for), 16-bit grey, and RGBA of 64x64, which isn't resized."""
    sixteen = image.mode.startswith("I;16")
    grid = [[p if sixteen else _wide_premultiplied(p) for p in row] for row in _grid(image)]
    return _hash([[_wide_luminance(p) for p in row] for row in _shrink(grid, 65536)])


def _grid(image: Image.Image) -> Grid:
    return [
        [_as_pixel(image.getpixel((x, y))) for x in range(image.width)] for y in range(image.height)
    ]


def _hash(grey: list[list[float]]) -> bytes:
    rows = [_lee(row) for row in grey]
    columns = [_lee([row[x] for row in rows]) for x in range(8)]
    values = [columns[x][y] for y in range(8) for x in range(8)]
    median = _median(list(values))
    return sum(1 << (63 - i) for i, v in enumerate(values) if v > median).to_bytes(8, "big")


def _as_pixel(value: object) -> Pixel:
    return tuple(value) if isinstance(value, tuple) else (value, value, value)  # type: ignore[return-value]


def _shrink(grid: Grid, unit: int) -> Grid:
    """`unit`: what the weight of a whole pixel is."""
    if len(grid) == 64 and len(grid[0]) == 64:
        return grid
    narrow = [_shrink_line(row, unit) for row in grid]
    turned = [_shrink_line([row[x] for row in narrow], unit) for x in range(64)]
    return [[turned[x][y] for x in range(64)] for y in range(64)]


def _premultiplied(pixel: Pixel) -> Pixel:
    if len(pixel) == 3:
        return pixel
    red, green, blue, alpha = pixel
    return red * alpha // 255, green * alpha // 255, blue * alpha // 255


def _wide_premultiplied(pixel: Pixel) -> Pixel:
    red, green, blue, alpha = pixel if len(pixel) == 4 else (*pixel, 255)
    return red * 257 * alpha // 255, green * 257 * alpha // 255, blue * 257 * alpha // 255


def _shrink_line(line: list[Pixel], unit: int) -> list[Pixel]:
    scale = len(line) / 64
    taps = 2 * max(math.ceil(scale), 1)
    out: list[Pixel] = []
    for y in range(64):
        c = scale * (y + 0.5) - 0.5
        start = int(c) - taps // 2 + 1
        sums, total = [0, 0, 0], 0
        for i in range(taps):
            weight = int(unit * max(0.0, 1 - abs(((c - start) - i) * min(1 / scale, 1.0))))
            if weight == 0:
                continue
            pixel = line[min(max(start + i, 0), len(line) - 1)]
            total += weight
            sums = [s + weight * v for s, v in zip(sums, pixel, strict=True)]
        out.append(tuple(s // total for s in sums))
    return out


def _luminance(pixel: Pixel) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def _wide_luminance(pixel: Pixel) -> float:
    """The library divides blue by 256, not 257."""
    return 0.299 * (pixel[0] // 257) + 0.587 * (pixel[1] // 257) + 0.114 * (pixel[2] // 256)


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
