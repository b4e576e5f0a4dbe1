"""A part's tensors in blocks of memory: packed together, moved together, and proven by checksum.

Each keeps its dtype, shape and strides, as `clone()` would keep them; kernels are chosen by them.
What the tensors are now may be other memory than the blocks that they were packed into (a network
that was made wider for a while and narrowed again): then it is gathered, a block at a time.

The checksum is of parameters alone. Buffers are what networks reckon for themselves, and some do
as they compute (the frequencies of long texts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.utils.deterministic

from cluster.inference.blocks import BLOCK, Block, Plan, plan

ROW: Final = 2048
"""Words of 64 bits in a row of a checksum."""
ALIGNED: Final = {"cuda": 512}
"""As torch's own memory is aligned there."""
ALIGNED_ELSEWHERE: Final = 64

Make = Callable[[Block], torch.Tensor]
"""Gives memory for what is used of a block, as bytes; what they are doesn't matter."""


@dataclass(frozen=True, slots=True)
class _Form:
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a module's tensors lie in blocks, in the order of `parts.tensors`: its parameters first,
    and no buffer in a block of theirs."""

    plan: Plan
    _forms: tuple[_Form, ...]
    _parameters: int
    _proven: int
    """How many blocks hold parameters."""
    _members: tuple[tuple[int, ...], ...]
    """Of each block, which tensors lie there."""

    @classmethod
    def of(cls, module: torch.nn.Module, device: torch.device, most: int = BLOCK) -> Packing:
        aligned = ALIGNED.get(device.type, ALIGNED_ELSEWHERE)
        parameters, buffers = list(module.parameters()), list(module.buffers())
        proven = plan([each.nbytes for each in parameters], aligned, most)
        whole = proven.then(plan([each.nbytes for each in buffers], aligned, most))
        members: list[list[int]] = [[] for _ in whole.blocks]
        for index, place in enumerate(whole.places):
            if place is not None:
                members[place.block].append(index)
        forms = tuple(
            _Form(each.dtype, each.shape, _stride(each)) for each in (*parameters, *buffers)
        )
        found = tuple(tuple(each) for each in members)
        return cls(whole, forms, len(parameters), len(proven.blocks), found)

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the parameters are still of the types and sizes that were packed."""
        return len(tensors) >= self._parameters and all(
            (tensor.dtype, tensor.shape) == (form.dtype, form.shape)
            for tensor, form in zip(
                tensors[: self._parameters], self._forms[: self._parameters], strict=True
            )
        )

    def packed(
        self, tensors: Sequence[torch.Tensor], device: torch.device, make: Make
    ) -> list[torch.Tensor]:
        """Copies of the tensors on the device, in blocks that `make` gives there. From the host
        they are on their way yet."""
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for number, block in enumerate(self.plan.blocks):
                with _unfilled():
                    made = make(block)
                found |= self._fill(number, made, tensors)
            return [
                found[index]
                if index in found
                else torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device)
                for index, form in enumerate(self._forms)
            ]

    def digest(
        self, tensors: Sequence[torch.Tensor], look: Callable[[], None] = lambda: None
    ) -> bytes:
        """Of the parameters' bytes, the same on every device. A change of up to three words of 64
        bits in a block makes another one, and so does nearly any change of more. `look` is called
        after each block, and may raise."""
        digest = hashlib.blake2b(digest_size=16)
        with torch.no_grad():
            for number, block in enumerate(self.plan.blocks[: self._proven]):
                lying = self._lying(number, tensors)
                if lying is None:
                    with _unfilled():
                        device = tensors[self._members[number][0]].device
                        lying = torch.empty(block.used, dtype=torch.uint8, device=device)
                    self._fill(number, lying, tensors)
                digest.update(sums(lying))
                look()
        return digest.digest()

    # --- inside ----------------------------------------------------------------------------------

    def _fill(
        self, number: int, block: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Copy into the block what belongs there, zeros between; its tensors there by index."""
        views = dict(self._views(number, block))
        if (lying := self._lying(number, tensors)) is not None:
            block.copy_(lying, non_blocking=block.is_cuda)
            return views
        for index, view in views.items():
            view.copy_(tensors[index].detach(), non_blocking=block.is_cuda)
            begin = self._offset(index) + view.nbytes
            end = min(-(-begin // self.plan.aligned) * self.plan.aligned, block.numel())
            if begin < end:
                block[begin:end].zero_()
        return views

    def _views(self, number: int, block: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        typed: dict[torch.dtype, torch.Tensor] = {}
        for index in self._members[number]:
            form = self._forms[index]
            if form.dtype not in typed:
                typed[form.dtype] = block.view(form.dtype)
            begin = self._offset(index) // form.dtype.itemsize
            yield index, typed[form.dtype].as_strided(form.shape, form.stride, begin)

    def _lying(self, number: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The block as bytes, if the tensors lie just so somewhere; None where they don't."""
        block, members = self.plan.blocks[number], self._members[number]
        first = tensors[members[0]].detach()
        if len(members) == 1:
            if first.nbytes != block.used or first.stride() != self._forms[members[0]].stride:
                return None
            return first.as_strided((first.numel(),), (1,)).view(torch.uint8)
        storage = first.untyped_storage()
        begin = storage.data_ptr()
        if storage.nbytes() not in {block.used, block.size} or any(
            tensors[index].data_ptr() != begin + self._offset(index) for index in members
        ):
            return None
        whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage)
        return whole[: block.used]

    def _offset(self, index: int) -> int:
        place = self.plan.places[index]
        assert place is not None, "asked of members of a block only"  # noqa: S101
        return place.offset


def sums(block: torch.Tensor) -> bytes:
    """Wrapping sums of the block's rows, of its columns, and the words that are left over.

    One wrong word shows in its row's sum. Two that make up for each other in a row show in their
    columns' sums, two in a column in their rows', and three leave a row or a column with one alone.
    """
    if block.storage_offset() % torch.int64.itemsize:
        block = block.clone()
    words = block.view(torch.int64)
    rows = words.numel() // ROW
    grid, rest = words[: rows * ROW].view(rows, ROW), words[rows * ROW :]
    return torch.cat((grid.sum(1), grid.sum(0), rest)).cpu().numpy().tobytes()


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """As `clone()` has it: the tensor's own, unless it has gaps or overlaps."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor.detach(), device="meta").stride()


@contextmanager
def _unfilled() -> Iterator[None]:
    """Fresh memory as it comes: all of it is written anyway, and torch's deterministic mode would
    write it once before."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
