"""Starts and stops the whole operator of operator_world.py, and a machine that joins it.

That takes the better part of a minute: each GPU's process imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.exceptions import RayError

import serve_app
from actors.pool import simulated_resource
from cluster import runtime
from cluster.config import Config, load
from cluster.core.types import GpuClass
from cluster.journal import SqlJournal
from devnet.hub import Hub
from devnet.models import SD15, SD15_LORA, make_models
from devnet.network import Devnet
from devnet.rpc_proxy import RpcProxy
from tests.integration.operator_crashes import CONFIG
from tests.integration.operator_world import (
    ACCOUNTS,
    AWAY,
    CARDS,
    HUB_BASE,
    HUB_LORA,
    HUB_PINNED,
    LATE_CARD,
    PATIENCE,
    PINNED,
    TASK_TIMEOUT,
    OperatorWorld,
)

MODELS = Path(".devnet/models")
HUB_MODELS = {HUB_BASE: SD15[1], HUB_LORA: SD15_LORA, HUB_PINNED: SD15_LORA}
"""By name on the hub, and what they are copies of."""
BLOCK_SECONDS = 0.5
LEASE_SECONDS = 15.0
"""Where two coordinators run, the one that acts must not lose it because the machine is busy."""
PAUSE_SECONDS = 20.0
"""Until an account whose card has left may serve as another class, which tests wait for."""
SERVE_PATIENCE = (
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S",
)
"""Serve replaces a proxy that is slower to start or to answer (5 and 10 s by itself)."""


def _models(root: Path, hub: Hub) -> dict[str, Any]:
    """The configuration of a store in which all tiny models lie, but for those that only the hub
    has: one that is to be there before the accounts join, and those that come when they are asked
    for."""
    for path in MODELS.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(MODELS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name, original in HUB_MODELS.items():
        hub.add(name, MODELS / original)
    return {
        "root": str(root),
        "sources": ["hub"],
        "hub": {"endpoint": hub.url},
        "web": {"allow_hosts": [f"localhost:{hub.port}"]},  # where the hub keeps large files
        "pin": [PINNED],
        "spare_gb": 0.01,
    }


@contextlib.contextmanager
def operator_world(folder: Path) -> Iterator[OperatorWorld]:
    """Start everything."""
    with Hub() as hub:
        yield from _operator_world(folder, hub)


def _operator_world(folder: Path, hub: Hub) -> Iterator[OperatorWorld]:
    make_models(MODELS)
    settings = {
        "identity": {"accounts": ACCOUNTS},
        "lease": {"ttl_seconds": LEASE_SECONDS},
        "policy": {"retry_backoff": 0.2},
        "fleet": {"pause_after_seconds": PAUSE_SECONDS},
        # Their processes are killed on purpose, more often than good cards' die.
        "canary": {"strikes": 0},
        "models": _models(folder / "models", hub),
    }
    with contextlib.ExitStack() as stack:
        devnet = stack.enter_context(
            Devnet(
                folder,
                block_time=BLOCK_SECONDS,
                task_timeout=TASK_TIMEOUT,
                models=MODELS,
                cards=CARDS,
                settings=settings,
            )
        )
        rpc = stack.enter_context(RpcProxy(devnet.deployment.rpc_url))
        config_file = devnet.directory / CONFIG
        said = yaml.safe_load(devnet.config_file.read_text())
        said["network"]["rpc_url"] = rpc.url
        config_file.write_text(yaml.safe_dump(said))
        config = load(config_file)
        world = OperatorWorld(devnet, config, SqlJournal(config.journal.url), hub, rpc)
        with pytest.MonkeyPatch.context() as patch:
            for name in SERVE_PATIENCE:
                patch.setenv(name, "120")
            runtime.connect(config)
        try:
            _serve(config)
            world.gate.close()
            asyncio.run(world.hear(f"{AWAY}it has not been started, or it is being replaced"))
            world.start_coordinator()
            asyncio.run(world.hear("no GPU is ready: "))
            world.gate.open()
            asyncio.run(world.hear_nothing_missing())
            asyncio.run(world.until_serving())
            yield world
        finally:
            _stop(world)


def _serve(config: Config) -> None:
    """Tried again when it fails for want of time, as the supervisor does it."""
    options = {"host": config.serve.host, "port": config.serve.port}
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options)
            application = serve_app.build(config)
            serve.run(application, name=runtime.APPLICATION, route_prefix="/")
        except (RayError, TimeoutError):
            if time.monotonic() > deadline:
                raise
        else:
            return


def _stop(world: OperatorWorld) -> None:
    try:
        # Only for the sake of order: what is too slow for it is killed with Ray.
        with contextlib.suppress(RayError, TimeoutError):
            serve.shutdown()  # type: ignore[no-untyped-call]
        with contextlib.suppress(ValueError, RayError):
            ray.get(world.coordinator().stop.remote(), timeout=30)
    finally:
        ray.shutdown()
        world.journal.close()


@contextlib.contextmanager
def late_node(gpu_class: GpuClass = LATE_CARD) -> Iterator[tuple[str, Callable[[], None]]]:
    """A Ray node with one such card that joins our cluster: its id, and what makes it vanish."""
    from ray._private import worker
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)
    head = worker._global_node
    assert head is not None
    cluster.head_node, cluster.redis_address = head, head.redis_address
    node = cluster.add_node(
        wait=False,
        num_cpus=1,
        node_ip_address="127.0.0.1",
        resources={simulated_resource(gpu_class): 1},
    )

    def vanish() -> None:
        cluster.remove_node(node, allow_graceful=False)

    try:
        yield node.node_id, vanish
    finally:
        if node in cluster.worker_nodes:
            vanish()
