"""A gate in front of every GPU: while it is closed, none comes up, and no attempt at a task goes
beyond its first step. Canaries pass.

So "starting" and "in the middle of a task" are states that tests can wait for, and not moments that
they may miss. The gate is a file, because the GPUs' processes see nothing else of the test.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.inference import Engine, EngineState
from cluster import engines
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import CardUuid, GpuClass
from cluster.inference import canary
from cluster.inference.nvml import Vitals

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Gate:
    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "gate-closed"

    @property
    def closed(self) -> bool:
        return self._file.exists()

    def close(self) -> None:
        self._file.touch()

    def open(self) -> None:
        self._file.unlink(missing_ok=True)

    def pass_through(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait here while it is closed."""
        while self.closed and not given_up():
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class GatedEngine:
    """The shipped engine, but for the gate."""

    engine: Engine
    gate: Gate

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
        def step(done: int, steps: int) -> None:
            on_step(done, steps)
            if done == 1 and order.task != canary.TASK:
                self.gate.pass_through(cancelled)

        return self.engine.run(order, cancelled, step)

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
    gate: Gate, settings: engines.EngineSettings, simulated: GpuClass | None
) -> Callable[[], Engine]:
    """As `engines.engine_factory`."""
    return functools.partial(make, gate, engines.engine_factory(settings, simulated))


def make(gate: Gate, make_engine: Callable[[], Engine]) -> Engine:
    engine = GatedEngine(make_engine(), gate)
    gate.pass_through()
    return engine
