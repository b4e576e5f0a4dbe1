"""An engine and the card that it computes on: what a GPU's actor hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.core.errors import ModelUnavailable
from cluster.core.ports import Computed, Order
from cluster.core.types import CardUuid, GpuClass
from cluster.models.store import read_index

if TYPE_CHECKING:  # it takes torch with it
    from cluster.inference.engine import Engine, EngineState

_MAKES_IMAGES: Final = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})


@dataclass(slots=True)
class MountedEngine:
    """`models` is the store's root. Any thread may ask for anything but `run`."""

    engine: Engine
    uuid: CardUuid
    models: Path
    _sizes: dict[str, int | None] = field(default_factory=dict)

    @property
    def gpu_class(self) -> GpuClass:
        return self.engine.gpu_class

    def state(self) -> EngineState:
        return self.engine.state()

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        return self.engine.run(order, cancelled, on_step)

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        self.engine.prefetch(order, wanted)

    def smallest(self) -> str | None:
        """The base key of the smallest model on this machine that makes images by itself."""
        sizes = {key: self._size(key) for key in self.engine.state().on_disk}
        fit = [(size, key) for key, size in sizes.items() if size is not None]
        return min(fit)[1] if fit else None

    def _size(self, key: str) -> int | None:
        """Bytes of weights in the model's folder, looked at once; None for one of another kind."""
        if key not in self._sizes:
            folder = self.models / key.partition("+")[0]
            try:
                size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
                fits = read_index(folder).pipeline in _MAKES_IMAGES
            except ModelUnavailable:
                size, fits = 0, False
            except OSError:  # something is being moved there: look again another time
                return sys.maxsize
            self._sizes[key] = size if fits else None
        return self._sizes[key]
