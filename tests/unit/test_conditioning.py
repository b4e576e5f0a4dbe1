"""A ControlNet's image: hostile data URLs by verdict, and methods by pixels worked out apart."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from cluster.core.errors import TaskInvalid, TaskUnsupported
from cluster.inference import conditioning
from cluster.inference.conditioning import conditioning_image, image_from_dataurl
from cluster.inference.controlnet_parameters import METHODS
from cluster.inference.parameters import ControlnetArgs

Pixels = npt.NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def conditioned(
    image: Image.Image,
    method: str | None,
    size: tuple[int, int] = (64, 64),
    args: dict[str, int] | None = None,
) -> Image.Image:
    preprocess = None if method is None else {"method": method, "args": args}
    fields = {"model": "o/c", "image_dataurl": url(encoded(image)), "preprocess": preprocess}
    return conditioning_image(ControlnetArgs.model_validate(fields), *size)


def scene(columns: int, rows: int) -> Image.Image:
    """Blocks, slopes and waves, with edges of several strengths."""
    y, x = np.mgrid[:rows, :columns]
    waves = 127 + 120 * np.sin(x / 5 + y / 9)
    blocks = 60 * ((x // 17 + y // 13) % 4)
    return Image.fromarray(np.stack([waves, blocks, 255 * y / rows], axis=2).astype(np.uint8))


SMALL = scene(20, 30)


# --- the image --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("media_type", ["png", "jpeg", "x-whatever", "svg+xml;charset=utf-8"])
def test_formats_by_content_and_not_by_media_type(kind: str, media_type: str) -> None:
    data = encoded(SMALL, kind)
    read = image_from_dataurl(url(data, media_type))
    assert (read.format, read.size) == (kind, (20, 30))
    assert np.array_equal(np.asarray(read), np.asarray(Image.open(io.BytesIO(data))))


def test_base64_alone_and_with_line_breaks() -> None:
    plain = np.asarray(SMALL)
    bare = base64.b64encode(encoded(SMALL)).decode()
    wrapped = "data:image/png;base64,\r\n" + "\r\n".join(
        bare[start : start + 76] for start in range(0, len(bare), 76)
    )
    for text in (bare, wrapped, bare + "\n"):
        assert np.array_equal(np.asarray(image_from_dataurl(text)), plain)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data:image/png;base64,",
        " \n",
        "!",
        "aGVsb",
        "data:image/png;base64,aGVsb",
        "data:image/png;base64,a!G!V!s!b",
        url(b"hello"),
        url(b"hello, this is no image at all, is it?"),
    ],
)
def test_what_certainly_holds_no_image_is_the_tasks_fault(text: str) -> None:
    with pytest.raises(TaskInvalid, match="image_dataurl") as caught:
        image_from_dataurl(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/cat.png",
        "data:image/svg+xml,%3Csvg/%3E",
        "data:text/plain;base64,aGVsbG8=",
        "DATA:IMAGE/PNG;BASE64," + base64.b64encode(encoded(SMALL)).decode(),
        url(encoded(SMALL)).rstrip("=") + "!",
        url(encoded(SMALL))[:-1] + "_",
        "data:image/png;base64,aGVs=bG8",
        "data:image/png;base64,AAA;base64," + base64.b64encode(encoded(SMALL)).decode(),
        "data:image/png;base64,AAA;base64,AAAA",
        "data:image/png;base64,;base64,",
        url(encoded(SMALL, "TIFF")),
        url(encoded(SMALL, "TGA")),
        url(encoded(SMALL, "PPM")),
        url(encoded(SMALL)[:30]),
        url(encoded(SMALL)[:-40]),
        url(encoded(SMALL, "JPEG")[:400]),
        url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        url(b"P1 1 1 1 and so on"),
        url(b"GIF89a but not really, I fear"),
        url(b"one line\nand another, as some formats have at their head"),
        url(bytes(100)),
        url(b"....ftypheic" + bytes(50)),
    ],
    ids=lambda text: text[:45],
)
def test_what_others_may_open_is_never_the_tasks_fault(text: str) -> None:
    with pytest.raises(TaskUnsupported, match="image_dataurl"):
        image_from_dataurl(text)


def test_too_many_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = url(encoded(SMALL))
    monkeypatch.setattr(conditioning, "MAX_CHARACTERS", len(text))
    image_from_dataurl(text)
    monkeypatch.setattr(conditioning, "MAX_CHARACTERS", len(text) - 1)
    with pytest.raises(TaskUnsupported, match="characters"):
        image_from_dataurl(text)


@pytest.mark.parametrize("side", [4097, 20_000, 2**31 - 1])
def test_too_many_pixels_are_never_decoded(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    # Without any pixels in it, decoding would be another error.
    data = b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(TaskUnsupported, match=r"pixels|DecompressionBomb"):
        image_from_dataurl(url(data))


@given(st.text() | st.binary().map(url) | st.binary().map(lambda d: base64.b64encode(d).decode()))
def test_any_text_gets_an_image_or_a_verdict(text: str) -> None:
    try:
        image_from_dataurl(text).getpixel((0, 0))
    except (TaskInvalid, TaskUnsupported) as error:
        assert "\n" not in str(error)


FILES = [encoded(SMALL, kind) for kind in conditioning.FORMATS]


@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4))))
def test_a_damaged_image_is_never_the_tasks_fault(
    data: bytes, changes: list[tuple[int, bytes]]
) -> None:
    for place, content in changes:
        start = place % len(data)
        data = data[:start] + content + data[start + len(content) :]
    with contextlib.suppress(TaskUnsupported):
        image_from_dataurl(url(data))


@given(st.sampled_from(FILES), st.integers(8, 10**6))
def test_a_truncated_image_is_never_the_tasks_fault(data: bytes, length: int) -> None:
    try:
        image_from_dataurl(url(data[: length % len(data)]))
    except TaskUnsupported:
        pass
    except TaskInvalid:
        assert length % len(data) < 8


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=8))
def test_nothing_that_pillow_opens_is_called_no_image(text: str) -> None:
    data = text.encode()
    try:
        image_from_dataurl(url(data))
    except TaskInvalid:
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(data))
    except TaskUnsupported:
        pass


# --- without a method -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_without_a_method_it_stays_as_it_is(mode: str) -> None:
    image = SMALL.convert(mode)
    made = conditioned(image, None, size=(512, 64))
    assert (made.mode, made.size) == (mode, (20, 30))
    assert np.array_equal(np.asarray(made.convert("RGB")), np.asarray(image.convert("RGB")))


def test_deep_pixels_are_not_run() -> None:
    deep = Image.fromarray(np.full((64, 64), 1000, np.uint16))
    for method in (None, "canny"):
        with pytest.raises(TaskUnsupported, match="kind I"):
            conditioned(deep, method)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"canny", "shuffle"}) + ["dwpose"])
def test_other_methods_are_not_run(method: str) -> None:
    with pytest.raises(TaskUnsupported, match="preprocess") as caught:
        conditioned(SMALL, method)
    assert method in str(caught.value)


# --- sides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((512, 768), 512, (512, 768)),
        ((640, 480), 512, (704, 512)),
        ((480, 640), 512, (512, 704)),
        ((96, 96), 96, (128, 128)),
        ((160, 160), 160, (128, 128)),
        ((224, 224), 224, (256, 256)),
        ((33, 100), 33, (64, 128)),
        ((64, 64), 2048, (2048, 2048)),
        ((1000, 64), 128, (1984, 128)),
    ],
)
def test_sides_are_rounded_to_multiples_of_64_and_halves_to_even_ones(
    size: tuple[int, int], resolution: int, expected: tuple[int, int]
) -> None:
    assert conditioning._resized(size[1], size[0], resolution) == expected[::-1]


@pytest.mark.parametrize(
    ("size", "result"),
    [((32, 64), (64, 64)), ((64, 64), (32, 512)), ((16_384, 64), (2048, 2048))],
    ids=["a small image", "a small result", "a wide image"],
)
def test_sides_out_of_bounds(size: tuple[int, int], result: tuple[int, int]) -> None:
    with pytest.raises(TaskUnsupported, match="the resized image"):
        conditioned(Image.new("L", size), "canny", size=result)


# --- canny ------------------------------------------------------------------------------------


def halves(left: object, right: object, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (64, 64), left)  # type: ignore[arg-type]
    image.paste(right, (32, 0, 64, 64))  # type: ignore[arg-type]
    return image


def test_one_edge_by_hand() -> None:
    # A step has the same gradient on both sides; the left one is taken.
    made = conditioned(halves("black", "white"), "canny")
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[:, 31] = 255
    assert made.mode == "RGB"
    assert np.array_equal(np.asarray(made), expected)


@pytest.mark.parametrize(
    ("step", "thresholds", "found"),
    [
        (30, {}, False),
        (40, {}, False),
        (60, {}, True),
        (40, {"low_threshold": 100, "high_threshold": 150}, True),
        (60, {"high_threshold": 250}, False),
        (60, {"low_threshold": 230, "high_threshold": 250}, False),
    ],
)
def test_thresholds_are_on_four_times_the_step(
    step: int, thresholds: dict[str, int], found: bool
) -> None:
    made = conditioned(halves((0, 0, 0), (step, step, step)), "canny", args=thresholds)
    assert np.asarray(made).any() == found


@pytest.mark.parametrize(
    ("size", "detected", "result", "answered"),
    [
        ((64, 64), (64, 64), (64, 64), (64, 64)),
        ((64, 64), (64, 64), (512, 192), (192, 192)),
        ((100, 70), (128, 64), (136, 200), (256, 128)),
        ((150, 200), (128, 192), (64, 64), (64, 128)),
    ],
)
def test_edges_between_two_resizings(
    size: tuple[int, int],
    detected: tuple[int, int],
    result: tuple[int, int],
    answered: tuple[int, int],
) -> None:
    pixels = cv2.resize(np.asarray(scene(*size)), detected, interpolation=cv2.INTER_AREA)
    edges = cv2.resize(cv2.Canny(pixels, 40, 90), answered, interpolation=cv2.INTER_LINEAR)
    made = conditioned(scene(*size), "canny", result, {"low_threshold": 40, "high_threshold": 90})
    assert np.asarray(made).any()
    assert np.array_equal(np.asarray(made), np.stack([edges] * 3, axis=2))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (halves(0, 255, "L"), True),
        (halves(0, 1, "1"), False),  # as numbers they are 0 and 1
        (halves((0, 0, 0, 0), (255, 255, 255, 255), "RGBA"), False),  # nothing on white is white
        (halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"), True),
    ],
    ids=["grey", "bits", "clear beside white", "black beside clear"],
)
def test_kinds_of_pixels(image: Image.Image, found: bool) -> None:
    assert np.asarray(conditioned(image, "canny")).any() == found


def test_a_palette_counts_by_its_indices() -> None:
    image = halves(0, 255, "P")
    image.putpalette([7] * 768)
    assert np.asarray(conditioned(image, "canny")).any()


def test_two_channels_are_not_run() -> None:
    with pytest.raises(TaskUnsupported, match="kind LA"):
        conditioned(halves((0, 0), (9, 9), "LA"), "canny")


@pytest.mark.parametrize("value", [-1, 2**15, 2**40, 10**4000])
@pytest.mark.parametrize("name", ["low_threshold", "high_threshold"])
def test_thresholds_out_of_range(name: str, value: int) -> None:
    with pytest.raises(TaskUnsupported, match=name) as caught:
        conditioned(scene(64, 64), "canny", args={name: value})
    assert len(str(caught.value)) < 100


# --- shuffle ----------------------------------------------------------------------------------


def bicubic(noise: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """OpenCV's bicubic (A = -0.75) along the first axis, edges repeated, in plain numpy."""
    place = (np.arange(length) + 0.5) * len(noise) / length - 0.5
    start = np.floor(place).astype(int)
    result = np.zeros((length, *noise.shape[1:]))
    for tap in range(-1, 3):
        distance = np.abs(place - (start + tap))
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, far)
        taken = noise[np.clip(start + tap, 0, len(noise) - 1)]
        result += weight.reshape(-1, *[1] * (noise.ndim - 1)) * taken
    return result


def flow(draws: np.random.RandomState, rows: int, columns: int, grain: int) -> Any:
    noise = draws.uniform(0, 1, (rows // grain + 2, columns // grain + 2))
    grown = bicubic(bicubic(noise, rows + 2 * grain).T, columns + 2 * grain).T
    cut = grown[grain : grain + rows, grain : grain + columns]
    return (cut - cut.min()) / (cut - cut.min()).max()


@pytest.mark.parametrize(("size", "grain"), [((128, 64), None), ((64, 128), 20), ((128, 128), 100)])
def test_shuffle_follows_the_flow_that_is_drawn(size: tuple[int, int], grain: int | None) -> None:
    columns, rows = size
    y, x = np.mgrid[:rows, :columns]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    draws = np.random.RandomState(7)
    across = flow(draws, rows, columns, grain or 256) * (columns - 1)
    down = flow(draws, rows, columns, grain or 256) * (rows - 1)
    np.random.seed(7)
    made = np.asarray(conditioned(image, "shuffle", size, {"f": grain} if grain else None))
    assert made.shape == (rows, columns, 3)
    assert np.abs(made[:, :, 0] - across).max() < 1
    assert np.abs(made[:, :, 1] - down).max() < 1
    assert np.random.random() == draws.random_sample()


def test_only_shuffle_draws() -> None:
    np.random.seed(7)
    conditioned(SMALL.resize((64, 64)), "canny")
    conditioned(SMALL, None)
    assert np.random.random() == np.random.RandomState(7).random_sample()


def test_shuffle_to_other_sizes() -> None:
    np.random.seed(1)
    flat = Image.new("RGB", (100, 70), (10, 20, 30))
    made = np.asarray(conditioned(flat, "shuffle", (256, 128), {"h": 33, "w": 9}))
    assert made.shape == (128, 256, 3)
    assert (made == (10, 20, 30)).all()


@pytest.mark.parametrize(
    "args",
    [
        {"f": 0},
        {"f": -1},
        {"f": 1025},
        {"h": 0},
        {"w": -5},
        {"w": 2**15},
        {"h": 8192, "w": 8192},
        {"h": 500, "w": 32_000, "f": 1024},
        {"h": 1, "w": 1},
    ],
    ids=str,
)
def test_shuffles_out_of_range(args: dict[str, int]) -> None:
    with pytest.raises(TaskUnsupported, match=r"preprocess\.args"):
        conditioned(scene(64, 64), "shuffle", args=args)


def test_the_pixels_of_controlnet_aux() -> None:
    """What controlnet_aux 0.0.7 itself makes of one image, with OpenCV 4.10 and 4.14."""
    image = scene(150, 110)
    np.random.seed(3)
    made = [
        conditioned(image, "canny", (192, 256)),
        conditioned(image, "shuffle", (192, 256), {"f": 40}),
    ]
    assert [zlib.crc32(picture.tobytes()) for picture in made] == [2394964209, 3221026916]


def test_needs_no_torch() -> None:
    code = "import sys, cluster.inference.conditioning\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
