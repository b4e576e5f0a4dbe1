"""Composition root: the world around the coordinator, made inside the coordinator's own process.

The key is read there and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
import ray
import structlog

import cluster
from actors.canary import CanarySettings
from actors.fleet import FleetSettings
from actors.pool import RayGpuPool
from actors.safeguards import SafeguardSettings
from actors.stores import RayStores
from actors.world import LiveSettings, RunningNetwork, World
from cluster import config as configuration
from cluster import logs
from cluster.artifacts import FolderArtifacts
from cluster.chain.endpoints import Endpoints
from cluster.chain.heads import Heads
from cluster.chain.network import ChainNetwork, Contracts, NetworkSettings
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import OutboxSettings, Told
from cluster.chain.rpc import Rpc, http_transport
from cluster.chain.starting import check_contracts
from cluster.config import Config
from cluster.core.errors import ChainError, ConfigError
from cluster.core.ports import Lease
from cluster.core.strikes import Limit
from cluster.core.types import Address, AttemptId, Timestamp
from cluster.engines import EngineSettings, engine_factory, make_keeper
from cluster.handover import take
from cluster.identity import TREASURY, Identity, password_from
from cluster.journal import Owner, SqlJournal
from cluster.metrics import Metrics
from cluster.network_metrics import RelayCall, RelayResult
from cluster.relay.client import RelayClient
from cluster.releases import LIVE, Digests, release_of
from cluster.tracing import make_traces

RPC_SECONDS = 10.0


def unlock(config: Config, prompt: Callable[[], str] | None = None) -> Identity:
    """The operator's identity; raises `ConfigError` where key or password is missing or wrong."""
    key_file, password_file = key_file_of(config), config.identity.password_file
    password = functools.partial(password_from, password_file, os.environ, prompt)
    return Identity.load(key_file, password)


def key_file_of(config: Config) -> Path:
    if config.identity.key_file is None:
        raise ConfigError(
            "identity: no key; name a keystore (identity.keystore_file, made by crynux-cluster "
            "keys new) or a file with a BIP-39 phrase (identity.seed_file)"
        )
    return config.identity.key_file


def assemble_from(file: Path, asked: Digests, handover: Path | None = None) -> World:
    """`assemble` for the supervisor that wants the configuration with these digests.

    The file is read here, on the head, because an actor's arguments are kept by Ray, and the
    configuration may hold credentials. Raises `ConfigError`.
    """
    config = configuration.load(file)
    world = assemble(config, handover, asked)
    if configuration.digest(config) != asked.whole:
        # Ray began us anew after an edit. To the supervisor we are still what it asked for, and so
        # are the cards, which go on as they are: it would else replace us again and again until
        # it is itself begun anew.
        structlog.get_logger("coordinator").warning("configuration_edited", file=str(file))
    return replace(world, reload=Reloading(file, config, world.accounts).again)


def assemble(config: Config, handover: Path | None = None, asked: Digests | None = None) -> World:
    """The world around the coordinator; the password may be in the folder `handover`. It passes
    for the configuration with the digests `asked`. Raises `ConfigError` when key or configuration
    is wrong."""
    logs.setup(config.logs.level, config.logs.format)
    identity = unlock(config, None if handover is None else functools.partial(take, handover))
    journal = SqlJournal(config.journal.url)
    journal.bind(owner(config, identity))
    accounts = {index: identity.address(index) for index in tended(config, journal)}
    config.fleet.check_accounts(accounts)
    digests = asked or Digests.of(config)
    network = config.network
    where = "|".join((str(network.chain_id), *network.contracts.addresses))
    metrics = Metrics(cluster.__version__, digests.whole, where)
    engines = EngineSettings.of(config)
    return World(
        version=cluster.__version__,
        config_digest=digests.whole,
        chain_id=config.network.chain_id,
        treasury=identity.address(TREASURY),
        accounts=accounts,
        journal=journal,
        artifacts=FolderArtifacts(config.artifacts.path),
        pool=RayGpuPool(
            functools.partial(engine_factory, engines),
            release_of(digests.cards),
            allow_simulated=config.network.devnet,
            stall_seconds=config.gpu.stall_seconds,
        ),
        stores=RayStores(
            functools.partial(make_keeper, config.models.store(), engines.said)
            if config.models.sources
            else None,
            release_of(digests.cards),
            tuple(sorted({*config.models.preload_ids, *config.models.pin})),
        ),
        open_network=functools.partial(
            open_network,
            config,
            identity,
            journal,
            called=metrics.network.rpc_called,
            told=metrics,
            relay_called=metrics.network.relay_called,
        ),
        metrics=metrics,
        policy=config.policy.policy,
        fleet=fleet_settings(config),
        lease_seconds=config.lease.ttl_seconds,
        clock=time.time,
        new_attempt_id=lambda: AttemptId(uuid.uuid4().hex[:12]),
        safeguards=safeguard_settings(config),
        ray_address=ray.get_runtime_context().gcs_address if ray.is_initialized() else "",
        explorer=config.network.explorer_url,
        set_level=lambda level: logs.setup(level, config.logs.format),
        traces=make_traces(config.tracing.endpoint, cluster.__version__),
    )


def tended(config: Config, journal: SqlJournal) -> list[int]:
    """The accounts to look after: those of the configuration, and those that were ever used before
    it had fewer, for they may still have stakes."""
    used = {each.index for each in journal.assignments()}
    return sorted({*range(1, config.identity.accounts + 1), *used})


class Reloading:
    """The configuration's file, read again while the coordinator runs."""

    def __init__(self, file: Path, config: Config, accounts: Mapping[int, Address]) -> None:
        self._file = file
        self._running = config
        self._accounts = accounts

    def again(self) -> tuple[LiveSettings, tuple[str, ...]]:
        """What can change as it is now, and the keys that have changed. Raises `ConfigError`, also
        where something changed that can't while it runs."""
        fresh = configuration.load(self._file)
        changed = configuration.changes(self._running, fresh)
        fixed = [key for key in changed if key.split(".")[0] not in LIVE and key not in LIVE]
        if fixed:
            raise ConfigError(
                f"{self._file}: {', '.join(fixed)} can't change while it runs; nothing was taken "
                "over: start `crynux-cluster up` anew for it"
            )
        fresh.fleet.check_accounts(self._accounts)
        self._running = fresh
        live = LiveSettings(
            fresh.policy.policy, fleet_settings(fresh), safeguard_settings(fresh), fresh.logs.level
        )
        return live, changed


def safeguard_settings(config: Config) -> SafeguardSettings:
    return SafeguardSettings(
        CanarySettings(config.canary.interval_seconds, config.canary.model),
        config.verify.fraction,
        Limit(config.canary.strikes, config.canary.strike_window_seconds),
    )


def fleet_settings(config: Config) -> FleetSettings:
    fleet = config.fleet
    return FleetSettings(
        fleet.policy(config.network.stake),
        _fixed(fleet.slots_per_gpu),
        fleet.max_slots,
        fleet.pause_after_seconds,
        fleet.auto,
        config.identity.accounts,
        {f"{each.gpu}+{config.ray.platform}": _fixed(each.slots) for each in fleet.slots_by_gpu},
    )


def _fixed(slots: int | Literal["auto"]) -> int | None:
    return None if slots == "auto" else slots


def owner(config: Config, identity: Identity) -> Owner:
    """Whose journal this configuration's is."""
    return Owner(
        config.network.chain_id,
        *config.network.contracts.addresses,
        treasury=identity.address(TREASURY),
    )


@contextlib.asynccontextmanager
async def open_network(
    config: Config,
    identity: Identity,
    journal: SqlJournal,
    lease: Callable[[], Lease],
    make_outbox: Callable[..., Outbox] = Outbox,
    called: Callable[[str, str], None] = lambda _method, _result: None,
    told: Told | None = None,
    relay_called: Callable[[RelayCall, RelayResult], None] = lambda _call, _result: None,
) -> AsyncIterator[RunningNetwork]:
    """The on-chain form of the network, for one term of office."""
    network = config.network
    endpoints = open_endpoints(config, called)
    rpc = Rpc(endpoints.send, endpoints.close, endpoints.ask_each)
    try:
        with contextlib.suppress(ChainError, TimeoutError):
            # Not reached is waited out; another chain, or no contracts on it, is never right.
            # The lease is renewed only once we have begun.
            async with asyncio.timeout(config.lease.ttl_seconds / 2):
                await check_contracts(endpoints, network.contracts.addresses, network.chain_id)
        async with httpx.AsyncClient(timeout=30.0, follow_redirects=False) as http:
            outbox = make_outbox(
                rpc,
                journal,
                lease,
                identity,
                wall_clock,
                network.chain_id,
                OutboxSettings(fees=network.fees),
            )
            yield ChainNetwork(
                rpc,
                Contracts.at(rpc, *network.contracts.addresses),
                outbox,
                journal,
                lease,
                RelayClient(network.relay_url, http, identity, time.time, called=relay_called),
                network.version,
                identity.public_key,
                wall_clock,
                NetworkSettings(
                    poll=network.block_poll_seconds, stalled_after=network.stalled_after_seconds
                ),
                endpoints,
                Heads(network.ws_urls),
                told,
                _own(config, identity, journal),
            )
    finally:
        await rpc.close()


def _own(config: Config, identity: Identity, journal: SqlJournal) -> frozenset[Address]:
    """The accounts to hear of: the configured ones, and those that ever served."""
    configured = {identity.address(i) for i in range(1, config.identity.accounts + 1)}
    return frozenset(configured | {each.address for each in journal.assignments()})


def open_endpoints(
    config: Config, called: Callable[[str, str], None] = lambda _method, _result: None
) -> Endpoints:
    """All configured RPC endpoints, in their order."""
    network = config.network
    found = network.all_endpoints
    # With others to ask, one that is slow needn't be waited for as long.
    timeout = RPC_SECONDS if len(found) == 1 else RPC_SECONDS / 2
    transports = [
        replace(
            http_transport(each.url, timeout), priority=each.priority, rate=each.calls_per_second
        )
        for each in found
    ]
    chain_id, rate = network.chain_id, network.rpc_calls_per_second
    endpoints = Endpoints(transports, chain_id, rate, called=called)
    endpoints.contracts = network.contracts.addresses
    return endpoints


def wall_clock() -> Timestamp:
    return Timestamp(time.time())
