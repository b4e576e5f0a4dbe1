"""Composition root and supervisor.

`assemble` makes the world around the coordinator, inside the coordinator's own process: the key is
read there and nowhere else. `up` is the supervisor: it makes sure that the coordinator and the
Serve application exist with this version and this configuration, watches them, and repairs. It
keeps nothing itself, so it can be killed and started again at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import ray
import structlog
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

import cluster
from actors.canary import CanarySettings
from actors.coordinator import NAME, REFUSED, CoordinatorActor
from actors.fleet import FleetSettings
from actors.pool import RayGpuPool, simulated_resource
from actors.precedence import RAY_SETTINGS
from actors.safeguards import SafeguardSettings
from actors.stores import RayStores
from actors.world import LiveSettings, RunningNetwork, World
from cluster import config as configuration
from cluster import logs
from cluster.api.guard import is_loopback, read_token
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
from cluster.core.types import Address, AttemptId, GigaBytes, GpuClass, Timestamp
from cluster.engines import EngineSettings, engine_factory, make_keeper
from cluster.handover import Handover, take
from cluster.identity import TREASURY, Identity, password_from
from cluster.journal import Owner, SqlJournal
from cluster.keystore import PASSWORD
from cluster.metrics import Metrics, RelayCall, RelayResult
from cluster.relay.client import RelayClient
from cluster.releases import LIVE, Digests, release_of
from cluster.tracing import make_traces

LOOK_SECONDS = 2.0
SILENT_LOOKS = 5
"""After so many looks without an answer the coordinator's process is begun anew."""
ANSWER_SECONDS = 10.0
RPC_SECONDS = 10.0
APPLICATION = "crynux"
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a Ray that is begun here, as the chart has it: results pass through it. By itself Ray takes a
third of the memory, and its files from /tmp where /dev/shm is smaller."""


def simulated_classes(config: Config) -> dict[GpuClass, int]:
    """The simulated cards that this configuration declares, by the class the network will see."""
    counts: dict[GpuClass, int] = {}
    for gpus in config.ray.simulated_gpus:
        gpu_class = GpuClass(f"{gpus.name}+{config.ray.platform}", GigaBytes(gpus.vram))
        counts[gpu_class] = counts.get(gpu_class, 0) + gpus.count
    return counts


def unlock(config: Config, prompt: Callable[[], str] | None = None) -> Identity:
    """The operator's identity; raises `ConfigError` where key or password is missing or wrong."""
    key_file, password_file = _key_file(config), config.identity.password_file
    password = functools.partial(password_from, password_file, os.environ, prompt)
    return Identity.load(key_file, password)


def _key_file(config: Config) -> Path:
    if config.identity.key_file is None:
        raise ConfigError(
            "identity: no key; name a keystore (identity.keystore_file, made by crynux-cluster "
            "keys new) or a file with a BIP-39 phrase (identity.seed_file)"
        )
    return config.identity.key_file


# --- inside the actors ---------------------------------------------------------------------------


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
            called=metrics.rpc_called,
            told=metrics,
            relay_called=metrics.relay_called,
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
        CanarySettings(config.canary.interval_seconds, config.canary.model), config.verify.fraction
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


# --- the supervisor ------------------------------------------------------------------------------


def up(config: Config, file: Path, build_api: Callable[[Config], serve.Application]) -> int:
    """Bring everything up and keep it so until SIGINT or SIGTERM; returns the exit code.

    `file` is where `config` was read; the cluster's head must have it at the same path.
    `build_api` gives the Serve application for a configuration (`serve_app.build`).
    Raises `ConfigError` for what the operator has to mend, before anything is started.
    """
    logs.setup(config.logs.level, config.logs.format)
    check(config)
    with contextlib.ExitStack() as stack:
        handover = hand_over(config)
        if handover is not None:
            stack.callback(handover.remove)
        stop = threading.Event()
        _heed(stop)
        own_cluster = connect(config)
        # Ray has put handlers of its own there: by SIGTERM's we would be aborted, and stop nothing.
        _heed(stop)
        stack.callback(ray.shutdown)
        supervisor = Supervisor(config, file.resolve(), build_api, handover)
        if own_cluster:
            stack.callback(supervisor.take_down)
        while not stop.is_set():
            supervisor.look()
            stop.wait(LOOK_SECONDS)
    return 0


def _heed(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def hand_over(config: Config) -> Handover | None:
    """The keystore's password for the coordinator of a Ray that is begun here: from the environment
    that we were begun with, where nothing that we begin will find it, or from the terminal. In a
    Ray that runs already, the coordinator finds it for itself."""
    settings = config.identity
    if config.ray.address is not None:
        return None
    given = os.environ.pop(PASSWORD, "")
    if settings.keystore_file is None or settings.password_file is not None:
        return None
    if given:
        return Handover.of(given)
    return Handover.asked(settings.keystore_file) if sys.stdin.isatty() else None


def check(config: Config) -> None:
    """Find what is wrong with the operator's surroundings before anything runs. Key and journal are
    the coordinator's, who says what is wrong with them."""
    _key_file(config)
    token = read_token(config.serve.token_file)
    if token is None and not is_loopback(config.serve.host):
        structlog.get_logger("supervisor").warning(
            "api_without_token", host=config.serve.host, mend="set serve.token_file to act by it"
        )
    _check_folder("artifacts.path", config.artifacts.path)
    if config.ray.address is None:
        # Elsewhere it is the head's port that matters, which isn't ours to try.
        _check_port(config.serve.host, config.serve.port)
    try:
        asyncio.run(_check_chain(config))
    except ChainError as error:
        # The chain may come back while we run; a wrong one never turns right.
        structlog.get_logger("supervisor").warning("chain_not_reached", error=str(error))


def _check_folder(key: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{key}: can't write in {path}: {error.strerror}") from None


def _cause(error: BaseException) -> str:
    """The last line of what an actor died of, as a person wants to read it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"serve.port: can't listen on {host}:{port} ({error.strerror}); choose another"
        ) from None


async def _check_chain(config: Config) -> None:
    endpoints = open_endpoints(config)
    try:
        network = config.network
        await check_contracts(endpoints, network.contracts.addresses, network.chain_id)
    finally:
        await endpoints.close()


def connect(config: Config) -> bool:
    """Join the configured Ray cluster, or start one here; True when it was started here."""
    address = config.ray.address
    own = address is None
    options: dict[str, Any] = {
        "namespace": config.ray.namespace,
        "log_to_driver": own,
        "configure_logging": False,
    }
    if own:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_system_config": RAY_SETTINGS,
            "resources": {
                simulated_resource(gpu_class): count
                for gpu_class, count in simulated_classes(config).items()
            },
        }
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        # Not there, not an address, or of another version of Ray or Python.
        where = "can't start one here" if own else f"can't join the one at {address}"
        raise ConfigError(f"ray.address: no Ray cluster: {where}: {error}") from error
    return own


class Refused(Exception):
    """The coordinator says what the operator has to mend."""


class Supervisor:
    """Looks at what runs and repairs it, once per `look`."""

    def __init__(
        self,
        config: Config,
        file: Path,
        build_api: Callable[[Config], serve.Application],
        handover: Handover | None = None,
    ) -> None:
        self._config = config
        self._file = file
        self._build_api = build_api
        self._handover = handover
        self._created = False
        self._was_well = False
        self._digests = Digests.of(config)
        self._release = release_of(self._digests.whole)
        self._served: str | None = None
        self._silent = 0
        self._log = structlog.get_logger("supervisor")

    def look(self) -> None:
        """Raises `ConfigError` where the coordinator that was begun here has never been well, for
        what the operator has to mend."""
        try:
            self._tend_coordinator()
            self._tend_api()
        except Refused as refused:
            raise ConfigError(str(refused)) from None
        except Exception as error:  # noqa: BLE001 - the top of a supervised loop
            self._log.warning("repair_failed", error=f"{type(error).__name__}: {error}")

    def take_down(self) -> None:
        """Stop what this process started; the coordinator gives its lease back."""
        serve.shutdown()  # type: ignore[no-untyped-call]
        coordinator = self._coordinator()
        if coordinator is not None:
            self._stop(coordinator)

    def _stop(self, coordinator: ActorHandle[Any]) -> None:
        """Have it give its lease back; one that doesn't answer loses it by time."""
        try:
            ray.get(coordinator.stop.remote(), timeout=ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            self._log.warning("coordinator_did_not_stop", error=type(error).__name__)

    def _tend_coordinator(self) -> None:
        coordinator = self._coordinator() or self._create_coordinator()
        try:
            running = cast(Any, ray.get(coordinator.release.remote(), timeout=ANSWER_SECONDS))
        except (RayActorError, GetTimeoutError) as error:
            # Ray restarts a dead one by itself; the next look finds it.
            self._silent += 1
            self._log.warning("coordinator_silent", looks=self._silent, error=_cause(error))
            if self._silent >= SILENT_LOOKS:
                self._silent = 0
                ray.kill(coordinator, no_restart=False)
            return
        self._silent = 0
        if running.startswith(REFUSED):
            self._mend_refusal(coordinator, running.removeprefix(REFUSED))
            return
        self._was_well = True
        if running != self._release:
            self._log.info("coordinator_replaced", old=running, new=self._release)
            self._stop(coordinator)
            ray.kill(coordinator, no_restart=True)
            self._create_coordinator()

    def _mend_refusal(self, coordinator: ActorHandle[Any], why: str) -> None:
        if self._was_well:
            # Something is away, or Ray began it anew without a password. It stays the same actor,
            # whose lease is its own.
            self._log.error("coordinator_refuses", why=why)
            self._offer_password()
            ray.kill(coordinator, no_restart=False)
            return
        ray.kill(coordinator, no_restart=True)
        if self._created:
            raise Refused(why)
        self._create_coordinator()

    def _offer_password(self) -> None:
        if self._handover is not None:
            self._handover.offer()

    def _coordinator(self) -> ActorHandle[Any] | None:
        try:
            return ray.get_actor(NAME, self._config.ray.namespace)
        except ValueError:
            return None

    def _create_coordinator(self) -> ActorHandle[Any]:
        self._log.info("coordinator_created", release=self._release)
        actor_class = cast(Any, CoordinatorActor)
        options: dict[str, Any] = {
            "name": NAME,
            "namespace": self._config.ray.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "resources": {"node:__internal_head__": 0.001},
            "max_concurrency": 100,
        }
        self._created = True
        self._offer_password()
        folder = None if self._handover is None else self._handover.folder
        make_world = functools.partial(assemble_from, self._file, self._digests, folder)
        return cast(ActorHandle[Any], actor_class.options(**options).remote(make_world))

    def _tend_api(self) -> None:
        running = serve.status().applications.get(APPLICATION)
        healthy = running is not None and running.status in ("RUNNING", "DEPLOYING")
        if healthy and self._served == self._release:
            return
        where = self._config.serve
        serve.start(
            proxy_location="HeadOnly", http_options={"host": where.host, "port": where.port}
        )
        serve.run(self._build_api(self._config), name=APPLICATION, route_prefix="/")
        self._served = self._release
        self._log.info("api_deployed", url=f"http://{where.host}:{where.port}")
