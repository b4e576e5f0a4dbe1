"""The image that steers a ControlNet: from a data URL in hostile parameters, made ready.

The network's nodes take the base64 out of the URL, open it with Pillow whatever its media type
says, and hand it to controlnet_aux (0.0.7) with the image's shorter side as the resolution to
detect at and the result's shorter side as the one to answer at. Of that package's methods those
that need no trained weights are here, with its steps and roundings, for the same pixels:

    pixels ─ three channels ─ sides to multiples of 64 ─ detect ─ sides to the result's, bilinear

The others' weights exist as pickles only, which are never loaded (design.md, rule 6).

Without a method the image goes to the pipeline as it was opened, in its own mode: the pipeline
resizes before it converts to RGB, so converting first would change the result.
"""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cluster.core.errors import TaskInvalid, TaskUnsupported
from cluster.inference.controlnet_parameters import (
    Canny,
    CannyArgs,
    MediapipeFace,
    Other,
    Shuffle,
    ShuffleArgs,
)
from cluster.inference.parameters import ControlnetArgs

Pixels = npt.NDArray[np.uint8]

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_CHARACTERS: Final = 4 * 2**20
MAX_PIXELS: Final = 4096 * 4096
"""Of the image, and of what is made of it on the way."""
MAX_SIDE: Final = 2**15 - 2
"""OpenCV's remapping counts in 16 bits."""
MAX_THRESHOLD: Final = 2**15 - 1
"""OpenCV takes what an int holds; a gradient of 8-bit pixels is below 2041."""
MAX_GRAIN: Final = 1024
SIDE_STEP: Final = 64
SHUFFLE_GRAIN: Final = 256

PLAIN_MODES: Final = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
DETECTED_MODES: Final = PLAIN_MODES - {"LA"}
"""Deeper ones are cut to 8 bits in ways that differ by Pillow's version; two channels no method
takes."""


def conditioning_image(args: ControlnetArgs, width: int, height: int) -> Image.Image:
    """The image for the pipeline's call; `width` and `height` are the result's.

    Draws from numpy's global generator (`shuffle` alone), which must be seeded as the task says
    and not used in between. Raises `TaskInvalid` or `TaskUnsupported`.
    """
    image = image_from_dataurl(args.image_dataurl)
    match args.preprocess:
        case None:
            _check_mode(image, PLAIN_MODES)
            return image
        case Canny(args=canny):
            return canny_edges(image, canny or CannyArgs(), min(width, height))
        case Shuffle(args=shuffle):
            return shuffled(image, shuffle or ShuffleArgs(), min(width, height))
        case MediapipeFace():
            raise _unsupported("preprocess: mediapipe_face needs a package that is not used here")
        case Other(method=method):
            raise _unsupported(f"preprocess: {method[:100]!r} is not a method that is known here")
        case other:
            raise _unsupported(
                f"preprocess: {other.method} needs weights that come as pickles only"
            )


# --- the image --------------------------------------------------------------------------------

_PREFIX: Final = re.compile(r"data:image/[^,\n]+;base64,")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_WHITE_SPACE: Final = re.compile(r"[ \t\r\n]+")
_ODD_BASE64: Final = re.compile(r"[^=:_-]*")
_PROSE: Final = re.compile(rb"[A-Za-z0-9][ -~]*")
_SMALLEST: Final = 8
"""Bytes: no format has a smaller file with a pixel in it."""
_UNREADABLE: Final = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise over damaged files."""


def image_from_dataurl(text: str) -> Image.Image:
    """The image in a data URL, or in base64 alone, which the network's nodes take as well.

    Raises `TaskInvalid` for what certainly holds no image, `TaskUnsupported` for all else that
    can't be opened here.
    """
    data = _decoded(text)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if _is_no_image(data):
            raise TaskInvalid("controlnet.image_dataurl: no image of any kind") from None
        raise _unsupported(f"image_dataurl: not one of {', '.join(FORMATS)}") from None
    except _UNREADABLE as error:
        raise _unreadable(error) from None
    if image.width * image.height > MAX_PIXELS:
        raise _unsupported(f"image_dataurl: more than {MAX_PIXELS} pixels")
    try:
        image.load()
    except _UNREADABLE as error:
        raise _unreadable(error) from None
    return image


def _decoded(text: str) -> bytes:
    if not text:
        raise TaskInvalid("controlnet.image_dataurl: empty")
    if len(text) > MAX_CHARACTERS:
        raise _unsupported(f"image_dataurl: longer than {MAX_CHARACTERS} characters")
    prefix = _PREFIX.match(text)
    payload = _WHITE_SPACE.sub("", text[prefix.end() :] if prefix else text)
    if prefix and ";base64," in payload:
        raise _unsupported("image_dataurl: readers differ on where its base64 begins")
    if _BASE64.fullmatch(payload) and len(payload) % 4 == 0:
        return base64.b64decode(payload)
    if _ODD_BASE64.fullmatch(payload):
        # Lenient readers skip other characters and mend the padding, but one character more than
        # whole groups of four is no byte to any of them.
        count = len(re.findall(r"[A-Za-z0-9+/]", payload))
        if count == 0 or count % 4 == 1:
            raise TaskInvalid("controlnet.image_dataurl: not base64")
    raise _unsupported("image_dataurl: not base64 that all readers read alike")


def _is_no_image(data: bytes) -> bool:
    """Whether it is certain that no reader, ours or another's, finds an image in it.

    Too short, or one line of plain text that begins as no format does. More can't be certain: there
    are formats without a mark at their head.
    """
    if len(data) < _SMALLEST:
        return True
    if not _PROSE.fullmatch(data) or b"PCD_" in data:
        return False
    Image.init()
    return not any(accept and accept(data[:16]) for _, accept in Image.OPEN.values())


def _unreadable(error: Exception) -> TaskUnsupported:
    return _unsupported(f"image_dataurl: an image that can't be read ({type(error).__name__})")


def _unsupported(line: str) -> TaskUnsupported:
    return TaskUnsupported(f"controlnet.{line}")


def _check_mode(image: Image.Image, modes: frozenset[str]) -> None:
    if image.mode not in modes:
        raise _unsupported(f"image_dataurl: pixels of the kind {image.mode}")


# --- methods ----------------------------------------------------------------------------------


def canny_edges(image: Image.Image, args: CannyArgs, resolution: int) -> Image.Image:
    """White edges on black. The resolution is the result's shorter side, in pixels."""
    for name, value in (("low", args.low_threshold), ("high", args.high_threshold)):
        if not 0 <= value <= MAX_THRESHOLD:
            raise _unsupported(f"preprocess.args.{name}_threshold: not within 0 to {MAX_THRESHOLD}")
    pixels = _at_detection(image)
    edges = cv2.Canny(pixels, args.low_threshold, args.high_threshold)
    return _answer(np.repeat(edges[:, :, None], 3, axis=2), pixels, resolution)


def shuffled(image: Image.Image, args: ShuffleArgs, resolution: int) -> Image.Image:
    """Its colours carried about by a smooth random flow, first drawn for x, then for y."""
    pixels = _at_detection(image)
    rows = pixels.shape[0] if args.h is None else args.h
    columns = pixels.shape[1] if args.w is None else args.w
    grain = SHUFFLE_GRAIN if args.f is None else args.f
    if not 1 <= grain <= MAX_GRAIN:
        raise _unsupported(f"preprocess.args.f: not within 1 to {MAX_GRAIN}")
    _check_size("preprocess.args", rows, columns)
    x = _noise(rows, columns, grain) * float(pixels.shape[1] - 1)
    y = _noise(rows, columns, grain) * float(pixels.shape[0] - 1)
    flow = np.stack([x, y], axis=2).astype(np.float32)
    # The stubs want a second map, which such a flow must not have.
    moved = cv2.remap(pixels, flow, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
    return _answer(moved, pixels, resolution)


def _noise(rows: int, columns: int, grain: int) -> npt.NDArray[np.float64]:
    """Smooth noise over 0..1: numbers a `grain` apart, bicubic in between, a margin cut off."""
    if (rows + 2 * grain) * (columns + 2 * grain) > 2 * MAX_PIXELS:
        raise _unsupported("preprocess.args: a flow of too many pixels")
    drawn = np.random.uniform(0, 1, size=(rows // grain + 2, columns // grain + 2, 1))
    grown = cv2.resize(
        drawn, (columns + 2 * grain, rows + 2 * grain), interpolation=cv2.INTER_CUBIC
    )
    noise = grown[grain : grain + rows, grain : grain + columns]
    noise = noise - np.min(noise)
    top = np.max(noise)
    if not top > 0:
        raise _unsupported("preprocess.args: a flow too small to be random")
    return np.asarray(noise / top, np.float64)


def _at_detection(image: Image.Image) -> Pixels:
    """Three channels, with sides that are multiples of 64, about as large as the image."""
    _check_mode(image, DETECTED_MODES)
    size = _resized(image.height, image.width, min(image.size))
    pixels = _three_channels(np.array(image, dtype=np.uint8))
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def _three_channels(pixels: Pixels) -> Pixels:
    """As the network has it: palette indices are greys, a fourth channel is opacity on white."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    colour = pixels[:, :, :3].astype(np.float32)
    opacity = pixels[:, :, 3:].astype(np.float32) / 255.0
    blended = colour * opacity + 255.0 * (1.0 - opacity)
    return np.asarray(blended.clip(0, 255).astype(np.uint8))


def _resized(rows: int, columns: int, resolution: int) -> tuple[int, int]:
    """(rows, columns) with the shorter side at the resolution, both rounded to multiples of 64.

    Halves go to the even multiple. Raises `TaskUnsupported` where a side rounds to nothing, on
    which the network's nodes fail, or where it grows out of bounds.
    """
    factor = float(resolution) / min(rows, columns)
    size = (
        round(rows * factor / SIDE_STEP) * SIDE_STEP,
        round(columns * factor / SIDE_STEP) * SIDE_STEP,
    )
    _check_size("image_dataurl: the resized image", *size)
    return size


def _check_size(what: str, rows: int, columns: int) -> None:
    if not (0 < min(rows, columns) <= max(rows, columns) <= MAX_SIDE):
        raise _unsupported(f"{what}: sides are not within 1 to {MAX_SIDE}")
    if rows * columns > MAX_PIXELS:
        raise _unsupported(f"{what}: more than {MAX_PIXELS} pixels")


def _answer(detected: Pixels, pixels: Pixels, resolution: int) -> Image.Image:
    rows, columns = _resized(pixels.shape[0], pixels.shape[1], resolution)
    return Image.fromarray(
        cv2.resize(detected, (columns, rows), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    )
