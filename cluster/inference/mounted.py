"""An engine, the card that it computes on and the store that brings its models: what a GPU's actor
hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

from cluster.core.errors import ModelUnavailable
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import CardUuid, GpuClass, TaskType, Tier
from cluster.inference import devices
from cluster.inference.canary import Candidate
from cluster.inference.needs import refs_of
from cluster.inference.nvml import NoDriver, Vitals
from cluster.inference.parameters import parse
from cluster.models.disk import Manifest
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef
from cluster.models.store import read_index

if TYPE_CHECKING:  # it takes torch with it
    from cluster.inference.engine import Engine, EngineState

MOST_CANDIDATES: Final = 16
AGAIN_SECONDS: Final = 60.0
_END: Final = 64 * 2**10
_DIGITS: Final = 16
_MAKES_IMAGES: Final = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})


@dataclass(slots=True)
class MountedEngine:
    """`preload` are base models (`name[+variant]`) that are brought to the card as soon as they are
    on disk. Any thread may ask for anything but `run` and `tend`."""

    engine: Engine
    uuid: CardUuid
    keeper: Keeper
    preload: Sequence[str] = ()
    simulated: bool = False
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _preloaded: set[str] = field(default_factory=set)
    _hits: int = 0

    @property
    def gpu_class(self) -> GpuClass:
        return self.engine.gpu_class

    def state(self) -> EngineState:
        """What is on disk may have come by another process of the machine."""
        return replace(self.engine.state(), on_disk=self.keeper.store.on_disk())

    def usage(self) -> CardUse:
        return replace(self.engine.usage(), hits=self._hits)

    def vitals(self) -> Vitals:
        """How the card does; nothing is known of one that isn't NVIDIA's. Raises `DeviceFault`."""
        if self.simulated:
            return Vitals()
        try:
            return devices.vitals(self.uuid)
        except NoDriver:
            return Vitals()

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        """Fetch what is missing, and compute. Raises what `Keeper.ensure` and `Engine.run` do."""
        wanted = Wanted(order.deadline, cancelled, lambda: on_step(0, 0))
        began, refs = monotonic(), self._refs(order)
        with self.keeper.held(refs, wanted) as brought:
            waited = monotonic() - began
            self._hits += 0 if brought else len(refs)
            computed = self.engine.run(order, cancelled, on_step)
        return replace(
            computed,
            seconds=computed.seconds + (waited if brought else 0.0),
            load_seconds=computed.load_seconds + waited,
            tier=Tier.AWAY if brought else computed.tier,
        )

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        """Fetch an order's models to the disk and read them into memory, beside what computes."""
        asked = Wanted(order.deadline, lambda: not wanted())
        with self.keeper.held(self._refs(order), asked):
            self.engine.prefetch(order, wanted)

    def _refs(self, order: Order) -> tuple[ModelRef, ...]:
        with self.keeper.telling(f"task {order.task}"):
            return refs_of(parse(TaskType(order.task_type), order.parameters))

    def has_to_tend(self) -> bool:
        return any(self._may_be_preloaded())

    def tend(self) -> tuple[str, ...]:
        """Bring to the card what is to be kept there and has come; lines on what couldn't be."""
        names = self._may_be_preloaded()
        self._preloaded.update(names)
        return self.engine.preload(names)

    def _may_be_preloaded(self) -> tuple[str, ...]:
        if len(self._preloaded) == len(set(self.preload)):
            return ()
        here = self.keeper.store.on_disk()
        return tuple(n for n in self.preload if n in here and n not in self._preloaded)

    def candidates(self) -> tuple[Candidate, ...]:
        """Models on this machine that make images by themselves: those that the operator has put
        here or pinned first, and of these the smallest."""
        here = self.keeper.store.on_disk()
        self._seen = {key: self._looked_at(key, self._seen.get(key)) for key in here}
        fit = [
            (not found.own, each.size, found.model, found)
            for each in self._seen.values()
            if (found := each.found) is not None
        ]
        return tuple(each[-1] for each in sorted(fit, key=lambda each: each[:-1])[:MOST_CANDIDATES])

    def _looked_at(self, key: str, before: _Seen | None) -> _Seen:
        """What lies there, looked into again when it was replaced."""
        name, _, variant = key.partition("+")
        ref = ModelRef("base", name, variant)
        try:
            if before is not None and before.stands():
                return before
            folder = self.keeper.store.find(ref)
            stamp = _stamp(folder)
            if read_index(folder).pipeline not in _MAKES_IMAGES:
                return _Seen(folder, stamp)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
            fetched = folder == self.keeper.disk.model(ref.key)
            manifest = self.keeper.disk.manifest(ref.key) if fetched else None
            own = manifest is None or ref in self.keeper.pinned
            contents = _contents(folder, files) if manifest is None else _listed(manifest)
        except (ModelUnavailable, OSError):  # no model of that kind, or it is being moved
            return _Seen(None, (), again_at=monotonic() + AGAIN_SECONDS)
        return _Seen(folder, stamp, size, Candidate(key, contents, own))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A base model's folder as it was looked into; `found` is None for one of another kind. One
    that couldn't be looked into has no folder, and is tried again at that time."""

    folder: Path | None
    stamp: tuple[int, ...]
    size: int = 0
    found: Candidate | None = None
    again_at: float = 0.0

    def stands(self) -> bool:
        """Raises `OSError` where it is gone."""
        if self.folder is None:
            return monotonic() < self.again_at
        return _stamp(self.folder) == self.stamp


def _stamp(folder: Path) -> tuple[int, ...]:
    """Another one when the folder was replaced, or its index written anew."""
    index = folder / "model_index.json"
    found = [folder.stat(), *([index.stat()] if index.is_file() else ())]
    return tuple(number for stat in found for number in (stat.st_ino, stat.st_mtime_ns))


def _listed(manifest: Manifest) -> str:
    """A digest of what was fetched."""
    lines = sorted(f"{file.path} {file.sha256}" for file in manifest.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


def _contents(folder: Path, files: Sequence[Path]) -> str:
    """A digest of a folder's files: their sizes, beginnings and ends, which differ where weights
    were trained anew."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_END))
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()[:_DIGITS]
