"""A card that computes something else than its class, for as long as a file names it.

The file is all that the GPUs' processes see of the test; each is known by its actor's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from actors.inference import Engine, EngineState
from actors.pool import EngineFactory
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import CardUuid, GpuClass, Score
from cluster.inference import canary
from cluster.inference.nvml import Vitals


@dataclass(frozen=True, slots=True)
class Oddity:
    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "odd-card"

    def of(self, gpu_id: str) -> None:
        self._file.write_text(f"gpu:{gpu_id}")

    def end(self) -> None:
        self._file.unlink(missing_ok=True)

    def has(self, actor: str) -> bool:
        try:
            return self._file.read_text() == actor
        except FileNotFoundError:
            return False


@dataclass(frozen=True, slots=True)
class OddEngine:
    """The engine within, but for the scores of an odd card."""

    engine: Engine
    oddity: Oddity
    actor: str

    @property
    def gpu_class(self) -> GpuClass:
        return self.engine.gpu_class

    @property
    def uuid(self) -> CardUuid:
        return self.engine.uuid

    def candidates(self) -> tuple[canary.Candidate, ...]:
        return self.engine.candidates()

    def software(self) -> str:
        return self.engine.software()

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        computed = self.engine.run(order, cancelled, on_step)
        if not self.oddity.has(self.actor):
            return computed
        return replace(computed, score=Score(bytes(255 - byte for byte in computed.score)))

    def state(self) -> EngineState:
        return self.engine.state()

    def usage(self) -> CardUse:
        return self.engine.usage()

    def vitals(self) -> Vitals:
        return self.engine.vitals()

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        self.engine.prefetch(order, wanted)

    def has_to_tend(self) -> bool:
        return self.engine.has_to_tend()

    def tend(self, look: Callable[[], None]) -> tuple[str, ...]:
        return self.engine.tend(look)


def engine_factory(
    oddity: Oddity, within: EngineFactory, simulated: GpuClass | None
) -> Callable[[], Engine]:
    return functools.partial(_make, oddity, within(simulated))


def _make(oddity: Oddity, make_engine: Callable[[], Engine]) -> Engine:
    actor = ray.get_runtime_context().get_actor_name()
    assert actor is not None
    return OddEngine(make_engine(), oddity, actor)
