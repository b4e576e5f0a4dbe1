"""How the process of a card makes its engine, and that of a machine's store its keeper.

What they need is told to them by value: torch and the like are imported there and nowhere else.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import logs
from cluster.config import Config
from cluster.core.types import CardUuid, GpuClass
from cluster.models.keeper import Keeper
from cluster.models.settings import StoreSettings

if TYPE_CHECKING:
    from cluster.inference.mounted import MountedEngine


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a card's actor is told of the configuration: nothing secret, nothing of the chain."""

    models: StoreSettings
    platform: str
    host_bytes: int
    preload: tuple[str, ...]
    said: logs.Settings
    full_loras: bool = False

    @classmethod
    def of(cls, config: Config) -> EngineSettings:
        host_bytes = int(config.gpu.host_memory_gb * 2**30)
        models = config.models
        said = logs.Settings(config.logs.level, config.logs.format)
        full_loras = config.gpu.lora_strength == "full"
        return cls(
            models.store(), config.ray.platform, host_bytes, models.preload, said, full_loras
        )


def make_keeper(settings: StoreSettings, said: logs.Settings) -> Keeper:
    """The keeper of a machine's store, in a process of its own."""
    said.setup()
    from cluster.models.assembly import open_keeper

    return open_keeper(settings)


def engine_factory(
    settings: EngineSettings, simulated: GpuClass | None
) -> Callable[[], MountedEngine]:
    """How the actor of a card makes its engine; torch is imported there and nowhere else."""
    return functools.partial(make_engine, settings, simulated)


def make_engine(settings: EngineSettings, simulated: GpuClass | None) -> MountedEngine:
    settings.said.setup()
    # It warns about optional parts that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cluster.inference import devices

    devices.prepare(os.environ)
    loading_threads = None
    if simulated is not None:
        device = devices.simulated(0, simulated.name, simulated.vram)
    else:
        device = devices.claim(settings.platform, os.environ)
        loading_threads = devices.share_of_cores(len(os.sched_getaffinity(0)))

    # From here on torch is there.
    from cluster.inference import engine
    from cluster.inference.mounted import MountedEngine
    from cluster.models.assembly import open_keeper

    # One thread: cards share the machine's cores, and what is computed there depends on the number.
    limits = engine.Limits(
        host_bytes=settings.host_bytes, threads=1, loading_threads=loading_threads
    )
    keeper = open_keeper(settings.models)
    made = engine.Engine(device, keeper.store, time.time, limits, settings.full_loras)
    return MountedEngine(made, CardUuid(device.uuid), keeper, settings.preload, device.simulated)
