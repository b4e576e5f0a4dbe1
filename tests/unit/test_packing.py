"""Tensors packed into blocks are the same tensors, and their checksum tells any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.inference.blocks import Block
from cluster.inference.packing import ROW, Packing, sums
from cluster.inference.parts import tensors

CPU = torch.device("cpu")
WORDS = 2 * ROW + 100
"""Of a block in two rows, and something left over."""


def memory(block: Block) -> torch.Tensor:
    """What is there from before is anything."""
    return torch.full((block.used,), 0xA5, dtype=torch.uint8)


def network(*parameters: torch.Tensor, buffers: tuple[torch.Tensor, ...] = ()) -> torch.nn.Module:
    made = torch.nn.Module()
    for number, each in enumerate(parameters):
        made.register_parameter(f"p{number}", torch.nn.Parameter(each, requires_grad=False))
    for number, each in enumerate(buffers):
        made.register_buffer(f"b{number}", each)
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


FUSED = numbers(6, 5)
ODD: dict[str, torch.Tensor] = {
    "plain": numbers(3, 5),
    "half": numbers(7, dtype=torch.float16),
    "brain": numbers(7, 3, dtype=torch.bfloat16),
    "double": numbers(3, dtype=torch.float64),
    "whole": torch.arange(9),
    "truth": torch.tensor([True, False, True]),
    "one": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "channels last": numbers(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "transposed": numbers(5, 3).T,
    "part of another": FUSED[:2],
    "another part of it": FUSED[3:, 1:3],
    "repeated": torch.ones(1, 3).expand(4, 3),
    "no number": torch.tensor([float("nan"), -0.0, 1e-45]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_packed_stays_as_it_is(name: str) -> None:
    """A layout decides which kernel computes, and so the last bits of a result."""
    tensor = ODD[name]
    there = (*ODD.values(), tensor)
    module = network(*(each for each in there if each.is_floating_point()), buffers=there)
    packed = Packing.of(module, CPU).packed(tensors(module), CPU, memory)
    assert len(packed) == len(tensors(module))
    for was, now in zip(tensors(module), packed, strict=True):
        assert (now.dtype, now.shape, now.stride()) == (was.dtype, was.shape, was.clone().stride())
        assert bits(now) == bits(was)
        assert now.data_ptr() % 64 == 0
        assert now.numel() == 0 or now.data_ptr() != was.data_ptr()
        assert not now.requires_grad


def test_on_a_card_tensors_are_aligned_as_its_own_memory_is() -> None:
    module = network(numbers(100), numbers(100))
    places = Packing.of(module, torch.device("cuda")).plan.places
    assert [place and place.offset for place in places] == [0, 512]


def test_blocks_are_moved_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network(*[numbers(9) for _ in range(20)], buffers=(numbers(3), numbers(4)))
    made = Packing.of(module, CPU)
    first = made.packed(tensors(module), CPU, memory)
    copied: list[int] = []
    real = torch.Tensor.copy_

    def copy_(tensor: torch.Tensor, source: torch.Tensor, **more: bool) -> torch.Tensor:
        copied.append(source.numel())
        return real(tensor, source, **more)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    second = made.packed(first, CPU, memory)
    assert len(copied) == 2, "weights and buffers"
    monkeypatch.undo()
    assert [bits(each) for each in second] == [bits(each) for each in tensors(module)]


def test_deterministic_torch_writes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill what is asked for, gigabytes of it, before anything is copied there."""
    settings: Any = torch.utils.deterministic
    seen: list[bool] = []

    def make(block: Block) -> torch.Tensor:
        seen.append(settings.fill_uninitialized_memory)
        return memory(block)

    monkeypatch.setattr(settings, "fill_uninitialized_memory", True)
    module = network(numbers(3))
    Packing.of(module, CPU).packed(tensors(module), CPU, make)
    assert seen == [False]
    assert settings.fill_uninitialized_memory


# --- the checksum ---------------------------------------------------------------------------------


def digest_of(*parameters: torch.Tensor, buffers: tuple[torch.Tensor, ...] = ()) -> bytes:
    module = network(*parameters, buffers=buffers)
    return Packing.of(module, CPU).digest(tensors(module))


def test_the_checksum_is_of_the_bytes_wherever_they_lie() -> None:
    floats = [each for each in ODD.values() if each.is_floating_point()]
    module = network(*floats)
    made = Packing.of(module, CPU)
    expected = made.digest(tensors(module))
    packed = made.packed(tensors(module), CPU, memory)
    assert made.digest(packed) == expected
    assert made.digest([each.clone() for each in packed]) == expected
    assert made.digest([packed[0].clone(), *packed[1:]]) == expected
    other = Packing.of(module, CPU, most=128)
    assert len(other.plan.blocks) > len(made.plan.blocks)
    assert other.digest(packed) == other.digest(tensors(module))


def test_weights_that_were_made_wider_and_narrow_again_are_the_same() -> None:
    """As the VAE of an SDXL in half precision after each image, which leaves inference tensors."""
    module = network(*[numbers(side, 7, dtype=torch.float16) for side in range(1, 9)])
    made = Packing.of(module, CPU)
    for tensor, value in zip(
        tensors(module), made.packed(tensors(module), CPU, memory), strict=True
    ):
        tensor.data = value
    expected = made.digest(tensors(module))
    with torch.inference_mode():
        module.float()
    assert not made.fits(tensors(module))
    with torch.inference_mode():
        module.half()
    assert made.fits(tensors(module))
    assert made.digest(tensors(module)) == expected
    again = made.packed(tensors(module), CPU, memory)
    assert made.digest(again) == expected


def test_a_single_tensor_that_lies_unaligned_is_proven_too() -> None:
    """As one that is a view into a file."""
    file = torch.zeros(68, dtype=torch.uint8)
    file[4:] = torch.arange(64, dtype=torch.uint8)
    weight = file[4:].view(torch.float32)
    assert digest_of(weight) == digest_of(weight.clone())


def test_buffers_are_not_proven() -> None:
    """Networks reckon them for themselves, some of them as they compute."""
    weights = numbers(8)
    assert digest_of(weights, buffers=(numbers(3),)) == digest_of(
        weights, buffers=(numbers(3) + 1,)
    )
    assert digest_of() == digest_of()


def test_there_is_a_look_after_each_block() -> None:
    module = network(*[numbers(64) for _ in range(4)])
    made, looks = Packing.of(module, CPU, most=512), [0]

    def look() -> None:
        looks[0] += 1

    made.digest(tensors(module), look)
    assert looks[0] == len(made.plan.blocks) == 2


Change = Callable[[torch.Tensor], None]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One to three words of a block, changed in a bit or altogether."""
    where = draw(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=3, unique=True))
    by = [1 << draw(st.integers(0, 62)) for _ in where]

    def change(words: torch.Tensor) -> None:
        for at, bit in zip(where, by, strict=True):
            words[at] ^= bit

    return change


@given(changes())
def test_any_change_of_up_to_three_words_is_found(change: Change) -> None:
    words = torch.arange(WORDS) * 0x5DEECE66D
    before = sums(words.view(torch.uint8))
    assert before == sums(words.clone().view(torch.uint8))
    change(words)
    assert sums(words.view(torch.uint8)) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 1), (0, ROW), (1, ROW + 2), (5, 2 * ROW + 5), (2 * ROW, 2 * ROW + 1)],
    ids=["row", "column", "neither", "left over", "both left over"],
)
@pytest.mark.parametrize("by", [1, 1 << 40, -(1 << 63)], ids=["low", "high", "sign"])
def test_two_changes_that_make_up_for_each_other_are_found(one: int, other: int, by: int) -> None:
    words = torch.arange(WORDS)
    before = sums(words.view(torch.uint8))
    words[one] += by
    words[other] -= by
    assert sums(words.view(torch.uint8)) != before


def test_words_that_changed_places_are_found() -> None:
    words = torch.arange(WORDS)
    before = sums(words.view(torch.uint8))
    pages = words[:1024].clone()
    words[:512], words[512:1024] = pages[512:], pages[:512]
    assert sums(words.view(torch.uint8)) != before


def test_a_page_in_anothers_place_is_found() -> None:
    words = torch.arange(WORDS)
    before = sums(words.view(torch.uint8))
    words[ROW : ROW + 512] = words[:512]
    assert sums(words.view(torch.uint8)) != before


def test_every_bit_of_a_part_counts() -> None:
    weights = [numbers(3, 5), numbers(2, dtype=torch.float16)]
    expected = digest_of(*weights)
    for tensor in weights:
        raw = tensor.view(-1).view(torch.uint8)
        for at in range(raw.numel()):
            for bit in range(8):
                raw[at] ^= 1 << bit
                assert digest_of(*weights) != expected
                raw[at] ^= 1 << bit
    assert digest_of(*weights) == expected
