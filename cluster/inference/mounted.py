"""An engine and the card that it computes on: what a GPU's actor hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.core.ports import Computed, Order
from cluster.core.types import CardUuid, GpuClass

if TYPE_CHECKING:  # it takes torch with it
    from cluster.inference.engine import Engine, EngineState


@dataclass(slots=True)
class MountedEngine:
    """`models` is the store's root. Any thread may ask for anything but `run`."""

    engine: Engine
    uuid: CardUuid
    models: Path
    _sizes: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_class(self) -> GpuClass:
        return self.engine.gpu_class

    def state(self) -> EngineState:
        return self.engine.state()

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        return self.engine.run(order, cancelled, on_step)

    def smallest(self) -> str | None:
        """The base key of the smallest base model on this machine."""
        keys = self.engine.state().on_disk
        return min(keys, key=lambda key: (self._size(key), key), default=None)

    def _size(self, key: str) -> int:
        """Bytes of weights in the model's folder, looked at once."""
        if key not in self._sizes:
            folder = self.models / key.partition("+")[0]
            try:
                sizes = [file.stat().st_size for file in folder.rglob("*.safetensors")]
            except OSError:  # something is being moved there: look again another time
                return sys.maxsize
            self._sizes[key] = sum(sizes)
        return self._sizes[key]
