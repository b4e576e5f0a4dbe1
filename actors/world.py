"""What the coordinator stands on: all that is passed in, and what can change while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from actors.fleet import FleetSettings
from actors.pool import RayGpuPool
from actors.safeguards import SafeguardSettings
from actors.stores import RayStores
from cluster.chain.endpoints import EndpointView
from cluster.core.errors import ConfigError
from cluster.core.lifecycle import Policy
from cluster.core.ports import Artifacts, Lease, Network
from cluster.core.types import (
    Address,
    AttemptId,
)
from cluster.journal import SqlJournal
from cluster.logs import Level
from cluster.metrics import Metrics
from cluster.tracing import NoTraces, Traces


class RunningNetwork(Network, Protocol):
    """A network with loops of its own (watcher, outbox), which run while a term lasts."""

    async def run(self) -> None: ...

    def endpoints(self) -> tuple[EndpointView, ...]:
        """How each endpoint that the network is reached by does now."""
        ...

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, in words."""
        ...

    def trouble(self) -> str | None:
        """Why nothing is heard of the network, in words; None when all is well."""
        ...


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What can change while the coordinator runs."""

    policy: Policy
    fleet: FleetSettings
    safeguards: SafeguardSettings
    level: Level


def _nothing_to_reload() -> tuple[LiveSettings, tuple[str, ...]]:
    raise ConfigError("this coordinator's configuration came from no file")


@dataclass(frozen=True, slots=True)
class World:
    """Everything around the coordinator; `cluster.assembly.assemble` makes it."""

    version: str
    config_digest: str
    chain_id: int
    treasury: Address
    accounts: Mapping[int, Address]
    journal: SqlJournal
    artifacts: Artifacts
    pool: RayGpuPool
    stores: RayStores
    open_network: Callable[
        [Callable[[], Lease]], contextlib.AbstractAsyncContextManager[RunningNetwork]
    ]
    metrics: Metrics
    policy: Policy
    fleet: FleetSettings
    lease_seconds: float
    clock: Callable[[], float]
    new_attempt_id: Callable[[], AttemptId]
    safeguards: SafeguardSettings = SafeguardSettings()
    ray_address: str = ""
    explorer: str | None = None
    """A URL with `{hash}` in it, for people."""
    reload: Callable[[], tuple[LiveSettings, tuple[str, ...]]] = _nothing_to_reload
    set_level: Callable[[Level], None] = lambda _level: None
    traces: Traces = NoTraces()
