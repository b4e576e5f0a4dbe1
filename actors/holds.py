"""Cards in use by something that isn't a task's attempt: a canary, a second opinion."""

from __future__ import annotations

from cluster.core.types import GpuId


class Holds:
    """Taken and given back within one turn of the event loop, so no two ever take the same card."""

    def __init__(self) -> None:
        self._held: set[GpuId] = set()

    def __contains__(self, gpu: GpuId) -> bool:
        return gpu in self._held

    def take(self, gpu: GpuId) -> None:
        assert gpu not in self._held, f"{gpu} is held already"  # noqa: S101
        self._held.add(gpu)

    def give_back(self, gpu: GpuId) -> None:
        self._held.discard(gpu)
