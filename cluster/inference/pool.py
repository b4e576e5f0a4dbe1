"""The parts near one card, in two tiers: on the device, and waiting in host memory.

    disk ──load──▶ host memory ──move──▶ device
                      ▲  (copy kept)       │
                      └──── sent away ─────┘

Parts are immutable, so as long as there is room the host keeps its copy of a part that moves on to
the device, and sending it away costs nothing; on a CUDA device the copy lies in pinned memory. What
is larger than that room goes to the device without a copy, and is lost when it leaves. A quantized
part is made on the device and is lost when it leaves. In either tier the others lie in a few blocks
each (`cluster.inference.blocks`). Both tiers are bounded, and lose what is worth least
(`cluster.core.eviction`). How much a part takes on the device and how long it takes to bring back
are measured as it moves.

Memory may fail. Of what was read a checksum is kept, by which a part is proven each time that it
comes to the device, and all of them wherever they are when somebody asks (`verify`).

One thread uses a pool; any thread may look at `where`.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Final, Protocol

import structlog
import torch

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.eviction import Popularity, Resident, victims
from cluster.inference.blocks import BLOCK, Block
from cluster.inference.packing import Packing
from cluster.inference.parts import Loader, PartKey, PartSource, bytes_of, look, tensors

FIRST_LOAD_RATE: Final = 1e9
"""Bytes a second, for what has not been loaded yet."""
FIRST_MOVE_RATE: Final = 1e10
RUNS: Final = 64
"""Of which the largest need for memory is remembered: one huge task doesn't count for ever."""
GATHERED: Final = 16 * 2**20
"""Bytes of a block of a part that lies elsewhere: to prove it, that much is gathered at a time."""

_log = structlog.get_logger("pool")

Forms = tuple[tuple[torch.Tensor, torch.dtype, torch.Size], ...]
"""Which tensors a module is made of, and as what; a move changes their data only."""


class Budget(Protocol):
    """How many bytes parts may take on the device."""

    def __call__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A moment's view of both tiers."""

    device: frozenset[PartKey] = frozenset()
    host: frozenset[PartKey] = frozenset()
    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(slots=True)
class _Part:
    source: PartSource
    module: torch.nn.Module
    host: Sequence[torch.Tensor] | None
    """The copies in host memory, in the order of `tensors(module)`; None while there are none."""
    forms: Forms
    packing: Packing
    on_device: bool = False
    digest: bytes = b""
    """Of what was read."""
    host_bytes: int = 0
    device_bytes: int = 0
    load_seconds: float = 0.0
    move_seconds: float = 0.0


@dataclass(slots=True)
class Counts:
    """Since the start: parts loaded from disk, returned from host memory, sent away by tier, and
    those that were found to hold something else than what was read."""

    loads: int = 0
    returns: int = 0
    left_device: int = 0
    left_host: int = 0
    spoilt: int = 0
    load_seconds: float = 0.0
    move_seconds: float = 0.0


@dataclass
class Pool:
    """`host_bytes` bounds the copies in host memory. `kept` holds keys that are never sent away."""

    load: Loader
    device: torch.device
    budget: Budget
    host_bytes: int
    clock: Callable[[], float] = monotonic
    kept: set[PartKey] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)
    _parts: dict[PartKey, _Part] = field(default_factory=dict)
    _popularity: Popularity[PartKey] = field(default_factory=Popularity)
    _where: Whereabouts = Whereabouts()

    def where(self) -> Whereabouts:
        return self._where

    def hold(self, sources: Mapping[str, PartSource]) -> dict[str, torch.nn.Module]:
        """The parts by role, all on the device. Raises `ModelUnavailable`, `DeviceFault` for one
        that doesn't get there as it was read, or out of memory.

        What they hold stays theirs until the next `hold`; nobody else moves parts meanwhile.
        """
        wanted = {source.key: source for source in sources.values()}
        self._popularity.note(wanted)
        try:
            for source in wanted.values():
                self._bring(source, wanted.keys())
        finally:
            self._look()
        return {role: self._parts[source.key].module for role, source in sources.items()}

    def changed(self, sources: Mapping[str, PartSource]) -> frozenset[PartKey]:
        """Which of these are no longer made of the tensors that they were loaded with, or these no
        longer of their types and sizes."""
        return frozenset(
            key
            for key in {source.key for source in sources.values()}
            if (part := self._parts.get(key)) is not None and not _same(part)
        )

    def verify(self, look: Callable[[], None]) -> dict[PartKey, str]:
        """The parts that no longer hold on the card what was read, each with a line that names it.
        To be discarded. Copies in host memory that don't are thrown away: they are no card's fault.

        `look` is called between pieces of them, and may raise.
        """

        def is_spoilt(part: _Part, values: Sequence[torch.Tensor] | None) -> bool:
            # What computing has made another part of is judged by who computes: `changed`.
            kept = values is not None and part.packing.fits(values)
            return kept and part.packing.digest(values or (), look) != part.digest

        found: dict[PartKey, str] = {}
        for key, part in self._parts.items():
            in_host = is_spoilt(part, part.host)
            if part.on_device and is_spoilt(part, tensors(part.module)):
                found[key] = self._spoilt(part, "on the card")
            elif in_host:
                self._spoilt(part, "in host memory")
            if in_host:
                part.host = None
        self._forget_homeless()
        self._look()
        return found

    def discard(self, keys: Collection[PartKey]) -> None:
        """Forget parts altogether: something may have changed them."""
        for key in keys:
            self._parts.pop(key, None)
        self._look()
        release_memory()
        if self.device.type == "cuda":
            release_pinned()

    def clear(self) -> None:
        """Send everything away from the device, in order to begin with all of its memory."""
        for part in list(self._parts.values()):
            self._leave_device(part, frozenset())
        self._forget_homeless()
        self._look()
        release_memory()

    # --- moving ----------------------------------------------------------------------------------

    def _bring(self, source: PartSource, wanted: Collection[PartKey]) -> None:
        part = self._parts.get(source.key)
        if part is not None and not part.on_device:
            self.counts.returns += 1
            if not self._move(part, wanted):
                self._spoilt(part, "after its return to the card")
                part = None
                self.discard([source.key])
        if part is None:
            part = self._load(source, wanted)
            if not part.on_device and not self._move(part, wanted):
                line = self._spoilt(part, "as it came to the card")
                self.discard([source.key])
                raise DeviceFault(DeviceFaultKind.MEMORY_CHANGED, line)
        self._parts[source.key] = part

    def _load(self, source: PartSource, wanted: Collection[PartKey]) -> _Part:
        stays = source.bits is not None
        if stays:
            self._make_device_room(source.device_size, wanted)
        else:
            self._make_host_room(source.size, wanted)
        before, began = _allocated(self.device), self.clock()
        module = self.load(source)
        packing = Packing.of(module, self.device, GATHERED if stays else BLOCK)
        part = _Part(source, module, None, _forms(module), packing, on_device=stays)
        part.device_bytes = bytes_of(module) if stays else packing.plan.used
        part.host_bytes = self._host_size(packing)
        if not stays and self._make_host_room(part.host_bytes, wanted):
            self._copy_to_host(part)
            _point(module, part.host or ())
        part.digest = packing.digest(tensors(module), look)
        part.load_seconds = self.clock() - began
        if stays and self.device.type == "cuda":
            part.device_bytes = _allocated(self.device) - before
        self.counts.loads += 1
        self.counts.load_seconds += part.load_seconds
        if not _homeless(part):
            self._parts[source.key] = part
        return part

    def _move(self, part: _Part, wanted: Collection[PartKey]) -> bool:
        """Whether what is on the device now is what was read."""
        self._make_device_room(part.device_bytes, wanted)
        before, began = _allocated(self.device), self.clock()
        values = part.host
        if values is None or self.device.type == "cuda":
            # Without a copy it was just read, and may be a view into the file.
            there = tensors(part.module) if values is None else values
            values = part.packing.packed(there, self.device, self._device_block)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before what was copied from may be gone
        _point(part.module, values)
        if self.device.type == "cuda":
            part.device_bytes = _allocated(self.device) - before
        part.on_device = True
        arrived = part.packing.digest(tensors(part.module)) == part.digest
        part.move_seconds = self.clock() - began
        self.counts.move_seconds += part.move_seconds
        if self._host_used() > self.host_bytes:
            self._make_host_room(0, wanted)
        return arrived

    def _make_device_room(self, size: int, wanted: Collection[PartKey]) -> None:
        residents = [
            Resident(key, part.device_bytes, _to_device(part), self._popularity.of(key), kept)
            for key, part in self._parts.items()
            if part.on_device
            for kept in [key in wanted or key in self.kept]
        ]
        leaving = victims(residents, size, self.budget())
        quantized = any(self._parts[key].source.bits is not None for key in leaving)
        for key in leaving:
            self._leave_device(self._parts[key], wanted)
        self._forget_homeless()
        if quantized:  # its layers and their weights hold each other until Python looks for such
            release_memory()

    def _leave_device(self, part: _Part, wanted: Collection[PartKey]) -> None:
        if not part.on_device:
            return
        moves = part.source.bits is None
        if part.host is None and moves and self._make_host_room(part.host_bytes, wanted):
            self._copy_to_host(part)
        if part.host is not None:
            _point(part.module, part.host)
        part.on_device = False
        self.counts.left_device += 1

    def _make_host_room(self, size: int, wanted: Collection[PartKey]) -> bool:
        """Whether `size` more bytes fit now. Copies of what is on the device leave for free, and so
        first; what waits there alone is lost with its copy."""
        if size > self.host_bytes:
            return False  # nobody leaves for what never fits
        residents = [
            Resident(key, part.host_bytes, _from_disk(part), self._popularity.of(key), kept)
            for key, part in self._parts.items()
            if part.host is not None
            for kept in [not part.on_device and (key in wanted or key in self.kept)]
        ]
        leaving = victims(residents, size, self.host_bytes)
        for key in leaving:
            self._parts[key].host = None
            self.counts.left_host += 1
        self._forget_homeless()
        if leaving and self.device.type == "cuda":
            release_pinned()
        return self._host_used() + size <= self.host_bytes

    def _forget_homeless(self) -> None:
        for key in [key for key, part in self._parts.items() if _homeless(part)]:
            del self._parts[key]

    def _spoilt(self, part: _Part, where: str) -> str:
        """Counts and tells it; the line."""
        folder = part.source.folder
        line = f"{folder.parent.name}/{folder.name} no longer holds what was read: {where}"
        self.counts.spoilt += 1
        _log.error("weights_changed_in_memory", problem=line)
        return line

    # --- memory for blocks -----------------------------------------------------------------------

    def _copy_to_host(self, part: _Part) -> None:
        there = tensors(part.module)
        part.host = part.packing.packed(there, torch.device("cpu"), self._host_block)

    def _host_block(self, block: Block) -> torch.Tensor:
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # the system has no more to pin: it comes back more slowly
                return torch.empty(block.size, dtype=torch.uint8, pin_memory=True)[: block.used]
        return torch.empty(block.used, dtype=torch.uint8)

    def _device_block(self, block: Block) -> torch.Tensor:
        return torch.empty(block.used, dtype=torch.uint8, device=self.device)

    def _host_size(self, packing: Packing) -> int:
        """Bytes that a part's copy takes."""
        return packing.plan.size if self.device.type == "cuda" else packing.plan.used

    # --- what there is ---------------------------------------------------------------------------

    def _host_used(self) -> int:
        return sum(part.host_bytes for part in self._parts.values() if part.host is not None)

    def _look(self) -> None:
        self._where = Whereabouts(
            frozenset(key for key, part in self._parts.items() if part.on_device),
            frozenset(key for key, part in self._parts.items() if part.host is not None),
            sum(part.device_bytes for part in self._parts.values() if part.on_device),
            self._host_used(),
        )


def _homeless(part: _Part) -> bool:
    return part.host is None and not part.on_device


def _from_disk(part: _Part) -> float:
    """Seconds lost with the copy in host memory: nothing to speak of while it is on the device."""
    seconds = part.load_seconds or part.host_bytes / FIRST_LOAD_RATE
    return seconds * (0.01 if part.on_device else 1.0)


def _to_device(part: _Part) -> float:
    back = part.move_seconds or part.device_bytes / FIRST_MOVE_RATE
    return back + (part.load_seconds if part.host is None else 0.0)


def _point(module: torch.nn.Module, values: Sequence[torch.Tensor]) -> None:
    """Make the module's tensors these, without a copy."""
    for tensor, value in zip(tensors(module), values, strict=True):
        tensor.data = value


def _forms(module: torch.nn.Module) -> Forms:
    return tuple((tensor, tensor.dtype, tensor.shape) for tensor in tensors(module))


def _same(part: _Part) -> bool:
    now = _forms(part.module)
    return len(now) == len(part.forms) and all(
        old is new and (dtype, shape) == (was_dtype, was_shape)
        for (old, was_dtype, was_shape), (new, dtype, shape) in zip(part.forms, now, strict=True)
    )


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_pinned() -> None:
    """Else it stays pinned for what may come, as it does with torch before 2.12."""
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is not None:
        release()


def fixed(limit: int) -> Budget:
    """A budget that was set, for devices whose memory can't be measured."""
    return lambda: limit


class MeasuredBudget:
    """What the card has left for parts, as measured: all of it but what others take, and but the
    most that computing has needed of late (before that is known, a quarter of the card)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: deque[int] = deque(maxlen=RUNS)

    def computed(self, peak: int) -> None:
        """`peak`: the most bytes that a run needed besides the parts."""
        self._peaks.append(peak)

    def __call__(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_reserved(self._device)
        workspace = int(max(self._peaks) * 1.1) if self._peaks else total // 4
        return free + ours - workspace
