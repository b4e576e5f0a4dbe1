"""Where tensors lie in blocks: each somewhere of its own, and little of a block empty."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.inference.blocks import BLOCK, ROUND, SPARE, Plan, plan

MIB = 2**20
SIZES = st.lists(
    st.one_of(st.integers(0, 4096), st.integers(0, 64 * MIB), st.integers(0, 3 * BLOCK)),
    max_size=60,
)
ALIGNED = st.sampled_from([64, 512])


def up(size: int, step: int) -> int:
    return -(-size // step) * step


def spans(made: Plan, sizes: list[int]) -> list[list[tuple[int, int]]]:
    """Of each block, where its tensors begin and end, in order."""
    found: list[list[tuple[int, int]]] = [[] for _ in made.blocks]
    for place, size in zip(made.places, sizes, strict=True):
        assert (place is None) is (size == 0)
        if place is not None:
            found[place.block].append((place.offset, place.offset + size))
    return [sorted(each) for each in found]


@given(SIZES, ALIGNED)
def test_each_tensor_has_bytes_of_its_own(sizes: list[int], aligned: int) -> None:
    made = plan(sizes, aligned)
    assert made == plan(sizes, aligned)
    for block, there in zip(made.blocks, spans(made, sizes), strict=True):
        assert there, "no block is empty"
        assert all(begin % aligned == 0 for begin, _ in there)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(there))
        assert block.used == up(there[-1][1], ROUND) <= block.size


@given(SIZES, ALIGNED)
def test_blocks_are_what_torch_pins(sizes: list[int], aligned: int) -> None:
    """Powers of two, and of the size that was chosen but for a tensor that is larger."""
    made = plan(sizes, aligned)
    for block, there in zip(made.blocks, spans(made, sizes), strict=True):
        assert block.size.bit_count() == 1
        largest = max(end - begin for begin, end in there)
        assert block.size <= BLOCK or block.size < 2 * largest


@given(SIZES, ALIGNED)
def test_no_block_leaves_out_what_would_fit(sizes: list[int], aligned: int) -> None:
    made = plan(sizes, aligned)
    assert made.size < 2 * sum(up(size, aligned) for size in sizes) + 1
    there = spans(made, sizes)
    for number, block in enumerate(made.blocks[:-1]):
        smallest = min(end - begin for each in there[number + 1 :] for begin, end in each)
        assert up(there[number][-1][1], aligned) + smallest > block.size
    for block, last in zip(made.blocks[-1:], there[-1:], strict=True):
        taken = sum(up(end - begin, aligned) for begin, end in last)
        largest = max(end - begin for begin, end in last)
        assert block.size - taken <= SPARE or block.size < 2 * up(largest, aligned)


@given(st.lists(st.integers(1, MIB), min_size=1, max_size=400), ALIGNED)
def test_small_tensors_take_about_their_bytes(sizes: list[int], aligned: int) -> None:
    bytes_of_all = sum(up(size, aligned) for size in sizes)
    made = plan(sizes, aligned)
    assert made.size <= bytes_of_all + SPARE + MIB * (len(made.blocks) - 1)
    assert len(made.blocks) <= bytes_of_all // BLOCK + 9


def test_the_last_block_is_halved_as_long_as_too_much_is_empty() -> None:
    sizes = [MIB] * 159 + [1000]
    assert [block.size // MIB for block in plan(sizes, 512).blocks] == [128, 32]
    assert [block.size // MIB for block in plan([33 * MIB], 512).blocks] == [64]


def test_beside_a_tensor_that_is_larger_than_a_block_others_lie() -> None:
    made = plan([100 * MIB, 300 * MIB, 100 * MIB], 512)
    assert [block.size // MIB for block in made.blocks] == [512]
    assert [place and place.offset // MIB for place in made.places] == [300, 0, 400]


def test_blocks_may_be_smaller() -> None:
    made = plan([10 * MIB] * 4, 512, 32 * MIB)
    assert [block.size // MIB for block in made.blocks] == [32, 16]
    assert made.used == 40 * MIB


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_of_nothing_there_is_no_block(sizes: list[int]) -> None:
    assert plan(sizes, 64) == Plan(64, (), (None,) * len(sizes))


def test_two_plans_behind_each_other_share_no_block() -> None:
    first, second = plan([1000, 0], 512), plan([0, 10, 20], 512)
    both = first.then(second)
    assert both.blocks == first.blocks + second.blocks
    assert both.places[:2] == first.places
    assert [place and (place.block, place.offset) for place in both.places[2:]] == [
        None,
        (1, 512),
        (1, 0),
    ]
