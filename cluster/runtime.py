"""The supervisor: it makes sure that the coordinator and the Serve application exist with this
version and this configuration, watches them, and repairs. It keeps nothing itself, so it can be
killed and started again at any time. What the coordinator is made of: `cluster.assembly`.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
import structlog
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors.coordinator import CoordinatorActor
from actors.names import NAME, REFUSED
from actors.pool import simulated_resource
from actors.precedence import RAY_SETTINGS
from cluster import logs, ray_logs, ray_start
from cluster.api.tokens import is_loopback, read_token
from cluster.assembly import assemble_from, key_file_of, open_endpoints
from cluster.chain.starting import check_contracts
from cluster.config import Config
from cluster.core.errors import ChainError, ClusterError, ConfigError
from cluster.core.types import GigaBytes, GpuClass
from cluster.handover import Handover
from cluster.keystore import PASSWORD
from cluster.releases import Digests, release_of

LOOK_SECONDS = 2.0
SILENT_LOOKS = 5
"""After so many looks without an answer the coordinator's process is begun anew."""
ANSWER_SECONDS = 10.0
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
    key_file_of(config)
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
    """Join the configured Ray cluster, or start one here; True when it was started here.

    Raises `ConfigError` where there can't be one, `ClusterError` where it doesn't come up in time.
    """
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
        if own:
            ray_start.start(ray.init, ray.shutdown, options)
        else:
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        # Not there, not an address, or of another version of Ray or Python.
        where = "can't start one here" if own else f"can't join the one at {address}"
        raise ConfigError(f"ray.address: no Ray cluster: {where}: {error}") from error
    except Exception as error:
        # Ray raises nothing narrower when a part of it isn't up after the half minute it gives it.
        raise ClusterError(
            f"Ray didn't start: {error} Is this machine too busy, or short of memory? Start again; "
            "its logs are below /tmp/ray/session_latest/logs"
        ) from error
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
        text = ray_logs.is_text(self._config.logs.format, sys.stderr.isatty())
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": where.host, "port": where.port},
            logging_config={"log_level": "WARNING", "encoding": "TEXT" if text else "JSON"},
        )
        serve.run(self._build_api(self._config), name=APPLICATION, route_prefix="/")
        self._served = self._release
        self._log.info("api_deployed", url=f"http://{where.host}:{where.port}")
