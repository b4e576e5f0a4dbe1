"""A whole network on one machine: chain, contracts, relay, tiny models, a funded operator.

`Devnet` starts the parts and stops them again, in the process that makes it. What it leaves in its
folder is what others need: `devnet.json` (addresses), `operator.yaml` (a configuration to `up`
with) and `seed` (the operator's phrase, made afresh, worth nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from eth_account.hdaccount import generate_mnemonic
from eth_account.types import Language

from cluster.core.errors import ConfigError
from cluster.core.types import Address, GigaBytes, Wei
from cluster.identity import TREASURY, Identity
from devnet.anvil import Anvil, free_port
from devnet.application import Application, TaskChange
from devnet.deploy import DEPLOYER, RELAY, Deployment, deploy, dev_account, fund
from devnet.models import make_models
from devnet.relay import RelayServer
from devnet.tasks import TaskSpec, load_tasks

APPLICATION = 2
"""The dev account that creates tasks."""
CNX = 10**18
FUNDS = Wei(1000 * CNX)
"""Of the treasury, for each node account and once more."""
"""What each node account gets: its stake of 400 CNX and gas for ever."""
DEFAULT_PORT = 8000
"""Where `crynux-cluster status` looks by itself."""
MODELS = Path(".devnet/models")
"""Shared by every devnet of this checkout."""
STATE = "devnet.json"
STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SimulatedCards:
    name: str
    vram: GigaBytes
    count: int


CARDS: Sequence[SimulatedCards] = (
    SimulatedCards("NVIDIA GeForce RTX 4090", GigaBytes(24), 3),
    SimulatedCards("NVIDIA A100-SXM4-80GB", GigaBytes(80), 1),
)


@dataclass(frozen=True, slots=True)
class State:
    """What `devnet.json` says to whoever wants to use this devnet: the process that it lives in,
    and when that was started, because pids are used again."""

    pid: int
    started: int
    relay_url: str
    deployment: Deployment


class Devnet:
    """Use as a context manager. `port` is wanted for the operator; one that is taken is avoided."""

    def __init__(
        self,
        directory: Path,
        *,
        block_time: float = 1.0,
        task_timeout: int = 180,
        rpc: str | None = None,
        models: Path | None = None,
        cards: Sequence[SimulatedCards] = CARDS,
        port: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.models = (models or MODELS).resolve()
        self.config_file = self.directory / "operator.yaml"
        self._block_time = block_time
        self._task_timeout = task_timeout
        self._rpc = rpc
        self._cards = cards
        self._port = port
        self._settings = settings or {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _state(self) -> State:
        pid = os.getpid()
        return State(pid, started(pid) or 0, self.relay_url, self.deployment)

    def application(self, out: Path | None = None) -> Application:
        """The application account, with the owner's right to choose which tasks are sampled."""
        return application(self._state(), out)

    def _start(self, stack: contextlib.ExitStack) -> None:
        refuse_if_running(self.directory)
        for old in ("relay", "operator"):
            shutil.rmtree(self.directory / old, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        make_models(self.models)
        rpc_url = self._rpc
        if rpc_url is None:
            log = self.directory / "anvil.log"
            anvil = stack.enter_context(Anvil(block_time=self._block_time, log_path=log))
            rpc_url = anvil.rpc_url
        self.deployment = deploy(rpc_url, timeout_seconds=self._task_timeout)
        relay = stack.enter_context(
            RelayServer(
                rpc_url,
                self.deployment.task,
                self.directory / "relay",
                "0x" + bytes(dev_account(RELAY).key).hex(),
            )
        )
        self.relay_url = relay.url
        self.operator_port = wanted_or_free(self._port)
        self.operator_url = f"http://127.0.0.1:{self.operator_port}"
        self._make_operator(rpc_url)
        state = self.directory / STATE
        state.write_text(json.dumps(asdict(self._state()), indent=2))
        stack.callback(state.unlink, missing_ok=True)

    def _make_operator(self, rpc_url: str) -> None:
        """A new identity with a funded treasury, and the configuration that uses it."""
        count = sum(cards.count for cards in self._cards)
        seed = self.directory / "seed"
        seed.unlink(missing_ok=True)
        phrase = generate_mnemonic(12, Language.ENGLISH)
        with os.fdopen(os.open(seed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(phrase + "\n")
        identity = Identity.from_phrase(phrase)
        # The operator funds its node accounts itself.
        fund(rpc_url, identity.address(TREASURY), Wei(FUNDS * (count + 1)))
        self.config_file.write_text(yaml.safe_dump(self._config(rpc_url, count), sort_keys=False))

    def _config(self, rpc_url: str, accounts: int) -> dict[str, Any]:
        deployment = self.deployment
        config: dict[str, Any] = {
            "identity": {"seed_file": "seed", "accounts": accounts},
            "network": {
                "rpc_url": rpc_url,
                "chain_id": deployment.chain_id,
                "devnet": True,
                "contracts": {
                    "task": deployment.task,
                    "node": deployment.node,
                    "qos": deployment.qos,
                },
                "relay_url": self.relay_url,
                "block_poll_seconds": min(1.0, self._block_time),
            },
            "ray": {"simulated_gpus": [asdict(cards) for cards in self._cards]},
            "journal": {"url": "sqlite:///operator/journal.db"},
            "artifacts": {"path": "operator/artifacts"},
            "models": {"root": str(self.models), "sources": []},
            "serve": {"host": "127.0.0.1", "port": self.operator_port},
            "logs": {"format": "console"},
        }
        for section, values in self._settings.items():
            config[section] = {**config.get(section, {}), **values}
        return config


def application(state: State, out: Path | None = None) -> Application:
    return Application(
        state.deployment.rpc_url,
        state.deployment,
        state.relay_url,
        dev_account(APPLICATION),
        owner=dev_account(DEPLOYER),
        out=out,
        clock=time.time,
        random=secrets.token_bytes,
    )


def wanted_or_free(wanted: int | None) -> int:
    """`wanted` if it is free, else a port that is."""
    try:
        with socket.create_server(("127.0.0.1", wanted or 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError:
        return free_port()


def read_state(directory: Path) -> State:
    """What runs in `directory`; raises `ConfigError` when nothing does."""
    file = directory / STATE
    try:
        raw = json.loads(file.read_text())
        places = raw["deployment"]
        deployment = Deployment(
            places["rpc_url"],
            places["chain_id"],
            *(Address(places[name]) for name in ("task", "node", "qos")),
        )
        if not all(type(raw[each]) is int for each in ("pid", "started")):
            raise TypeError("its process is no number")
        state = State(raw["pid"], raw["started"], raw["relay_url"], deployment)
    except FileNotFoundError:
        raise ConfigError(f"no devnet runs in {directory}: start one with 'devnet up'") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: unreadable ({error}): delete it") from error
    if started(state.pid) != state.started:
        file.unlink(missing_ok=True)
        raise ConfigError(f"the devnet of {directory} is gone: start one with 'devnet up'")
    return state


def refuse_if_running(directory: Path) -> None:
    try:
        pid = read_state(directory).pid
    except ConfigError:
        return
    raise ConfigError(f"a devnet already runs in {directory} (process {pid}): 'devnet down' first")


def started(pid: int) -> int | None:
    """When the living process was started, in the kernel's ticks; None where there is none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in {"Z", "X"} else int(rest[18])


# --- the command line's verbs --------------------------------------------------------------------


def up(
    directory: Path,
    *,
    block_time: float = 1.0,
    task_timeout: int = 180,
    rpc: str | None = None,
    models: Path | None = None,
) -> int:
    """Run a devnet until SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"starting a devnet in {directory} ...", flush=True)
    options: dict[str, Any] = {"block_time": block_time, "task_timeout": task_timeout}
    with Devnet(directory, rpc=rpc, models=models, port=DEFAULT_PORT, **options) as devnet:
        where = devnet.deployment
        print(
            f"chain      {where.rpc_url} (chain id {where.chain_id})\n"
            f"contracts  task {where.task}, node {where.node}, qos {where.qos}\n"
            f"relay      {devnet.relay_url}\n"
            f"models     {devnet.models}\n\n"
            f"operator   crynux-cluster up --config {devnet.config_file}\n"
            f"           crynux-cluster status --url {devnet.operator_url}\n"
            f"tasks      crynux-cluster devnet send --dir {directory} FILE\n"
            f"stop       Ctrl-C here, or crynux-cluster devnet down --dir {directory}",
            flush=True,
        )
        stop.wait()
        print("stopping the devnet", flush=True)
    return 0


def down(directory: Path) -> int:
    """Stop the devnet that runs in `directory` and wait until it is gone."""
    state = read_state(directory)
    pid = state.pid
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while started(pid) == state.started and time.monotonic() < deadline:
        time.sleep(0.1)
    if started(pid) == state.started:
        print(f"the devnet (process {pid}) does not stop")
        return 1
    print(f"stopped the devnet in {directory}")
    return 0


def send(file: Path, directory: Path) -> int:
    """Create the tasks in `file`, follow them to their ends; 0 if all ended as expected."""
    specs: tuple[TaskSpec, ...] = load_tasks(file)
    state = read_state(directory)
    out = directory / "results"

    def on_change(change: TaskChange) -> None:
        node = f" on {change.node}" if change.node else ""
        print(f"{change.name:20} {change.status.label}{node}", flush=True)

    reports = asyncio.run(application(state, out).run(specs, on_change))
    print()
    for report in reports:
        print(f"{report.name:20} {report.actual_end} ({report.verdict}) {report.problem}")
        for saved in report.files:
            print(f"{'':20} {saved}")
    return 0 if all(report.as_expected for report in reports) else 1
