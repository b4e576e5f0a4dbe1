"""What isn't what the task asked for is never scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.types import TaskType
from cluster.inference.diffusion import Made, Pixels, encode
from cluster.inference.parameters import SDParameters, parse

WIDTH, HEIGHT = 128, 192


def params() -> SDParameters:
    size = {"image_width": WIDTH, "image_height": HEIGHT}
    task = {"base_model": "org/base", "prompt": "a cat", "task_config": size}
    read = parse(TaskType.SD, json.dumps(task))
    assert isinstance(read, SDParameters)
    return read


def pixels(*shape: int) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def fault_of(made: Made) -> DeviceFault:
    with pytest.raises(DeviceFault) as caught:
        encode(made, params())
    assert caught.value.kind is DeviceFaultKind.BAD_RESULT
    return caught.value


def test_an_image_as_asked_for_is_taken() -> None:
    file, hashed = encode(Made(pixels(HEIGHT, WIDTH, 3), blanked=False), params())
    assert (file[:4], len(hashed)) == (b"\x89PNG", 8)


@pytest.mark.parametrize(
    "shape",
    [(WIDTH, HEIGHT, 3), (HEIGHT, WIDTH + 8, 3), (HEIGHT - 8, WIDTH, 3), (HEIGHT, WIDTH, 4)],
    ids=str,
)
@pytest.mark.parametrize("blanked", [False, True])
def test_an_image_of_another_size_is_a_bad_result(shape: tuple[int, ...], blanked: bool) -> None:
    assert "shape" in str(fault_of(Made(pixels(*shape), blanked)))


def test_one_colour_is_a_bad_result_unless_it_was_blanked() -> None:
    same = np.full((HEIGHT, WIDTH, 3), 7, dtype=np.uint8)
    assert "one colour" in str(fault_of(Made(same, blanked=False)))
    assert encode(Made(same, blanked=True), params())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_file_that_reads_back_to_something_else_is_a_bad_result(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """As when memory fails between what was made and what was written."""
    write = Image.fromarray

    def fromarray(made: Pixels) -> Image.Image:
        other = made.copy()
        other[5, 6, 1] ^= 1
        return write(other).convert(mode)

    monkeypatch.setattr(Image, "fromarray", fromarray)
    assert "read back" in str(fault_of(Made(pixels(HEIGHT, WIDTH, 3), blanked=False)))
