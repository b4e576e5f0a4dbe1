"""Where tensors lie in a few blocks of memory, so that pinned memory holds about their bytes.

Of pinned memory torch takes a power of two for each request (`CachingHostAllocator::allocate`), so
a tensor with a request of its own may take nearly twice its bytes. Here blocks are such powers, and
filled by the largest that still fits; what a last block would leave empty is halved away:

    159 MiB of a VAE    128 ■■■■■■■■  32 ■■
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

BLOCK: Final = 256 * 2**20
"""Bytes of a block, but for a tensor that is larger."""
SPARE: Final = 4 * 2**20
"""Bytes that the last block may have too many."""
ROUND: Final = 64
"""Bytes of which what is used of a block is a multiple, and more than any number takes."""


@dataclass(frozen=True, slots=True)
class Block:
    """`size` is a power of two, of which the first `used` bytes hold tensors."""

    size: int
    used: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes begin."""

    block: int
    offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`places` are in the tensors' order, None for one without bytes; each begins at a multiple of
    `aligned`."""

    aligned: int
    blocks: tuple[Block, ...]
    places: tuple[Place | None, ...]

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def used(self) -> int:
        return sum(block.used for block in self.blocks)

    def then(self, more: Plan) -> Plan:
        """This one, and the other's tensors behind in blocks of their own."""
        first = len(self.blocks)
        places = (each and replace(each, block=each.block + first) for each in more.places)
        return Plan(self.aligned, self.blocks + more.blocks, (*self.places, *places))


def plan(sizes: Sequence[int], aligned: int, most: int = BLOCK) -> Plan:
    """Blocks for tensors of these sizes, in bytes, each block of at most `most` where no tensor is
    larger. `aligned` and `most` are powers of two, the first no less than `ROUND`.

    All blocks together have less than twice the tensors' bytes (rounded up to `aligned`), and with
    tensors that are small beside a block, little more than these.
    """
    places: list[Place | None] = [None] * len(sizes)
    blocks: list[Block] = []
    left = sorted((n for n, size in enumerate(sizes) if size), key=lambda n: -sizes[n])
    while left:
        size = _next_size([_up(sizes[n], aligned) for n in left], most)
        end, later = 0, []
        for n in left:
            begin = _up(end, aligned)
            if begin + sizes[n] <= size:
                places[n] = Place(len(blocks), begin)
                end = begin + sizes[n]
            else:
                later.append(n)
        blocks.append(Block(size, _up(end, ROUND)))
        left = later
    return Plan(aligned, tuple(blocks), tuple(places))


def _next_size(left: Sequence[int], most: int) -> int:
    """Of the next block, for what is left, the largest first."""
    size = min(_power(sum(left)), most)
    if size - sum(left) > SPARE:
        size //= 2
    return max(size, _power(left[0]))


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
