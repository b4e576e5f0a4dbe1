"""A whole operator on a whole devnet, for tests: real chain, relay, Ray, Serve and pipelines.

One serves all tests of a session (operator_start.py); they replace and kill parts of it, and leave
it able to take tasks.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from web3 import Web3

from actors.coordinator import CoordinatorActor
from actors.inference import Report
from actors.names import NAME
from cluster.config import Config
from cluster.core.types import Commitment, GigaBytes, GpuClass, GpuState
from cluster.journal import SqlJournal
from cluster.status import GpuStatus, Status
from devnet.compile import load as contract
from devnet.hub import Hub
from devnet.network import Devnet, SimulatedCards
from devnet.rpc_proxy import RpcProxy
from tests.integration.operator_crashes import Fuse, assemble
from tests.integration.operator_gate import Gate
from tests.integration.operator_odd import Oddity
from tests.integration.task_world import PATIENCE as PATIENCE
from tests.integration.task_world import TASK_TIMEOUT as TASK_TIMEOUT
from tests.integration.task_world import TEST_SECONDS as TEST_SECONDS
from tests.integration.task_world import Found, TaskWorld
from tests.integration.task_world import Sent as Sent
from tests.integration.task_world import task as task

HUB_BASE, HUB_LORA, HUB_PINNED = "hub/base", "hub/lora", "hub/pinned"
"""Models that only the hub has."""
PINNED = f"lora:{HUB_PINNED}"
CARDS = (
    SimulatedCards("NVIDIA GeForce RTX 4090", GigaBytes(24), 2),
    SimulatedCards("NVIDIA A100-SXM4-80GB", GigaBytes(80), 1),
)
LATE_CARD = GpuClass("NVIDIA L4+docker", GigaBytes(8))
"""A card that no node has at first, smaller than the others; an account is there for it."""
ACCOUNTS = sum(cards.count for cards in CARDS) + 1
AWAY = "the coordinator is away: "
BROKEN = ("term_broke", "lease_lost", "IllegalMove", "Traceback")
"""What a coordinator's log never says while everything goes as it should."""


async def answer_of(call: Any, seconds: float = 10.0) -> Any:
    """What an actor answers; raises `RayError` when it is gone, or doesn't within the time. The ten
    seconds are for what is asked again."""
    return await asyncio.to_thread(functools.partial(ray.get, call, timeout=seconds))


@dataclass
class OperatorWorld(TaskWorld):
    devnet: Devnet
    config: Config
    journal: SqlJournal
    hub: Hub
    rpc: RpcProxy
    """What the operator sees the chain through."""
    sent: list[Commitment] = field(default_factory=list)
    """The tasks of the present test."""
    _log_start: int = 0

    @property
    def fuse(self) -> Fuse:
        return Fuse(self.folder)

    @property
    def gate(self) -> Gate:
        return Gate(self.folder)

    @property
    def oddity(self) -> Oddity:
        return Oddity(self.folder)

    # --- the operator's parts --------------------------------------------------------------------

    def start_coordinator(self, name: str = NAME) -> ActorHandle[Any]:
        """As `cluster.runtime.Supervisor` does it, but for the crash points."""
        options: dict[str, Any] = {
            "name": name,
            "namespace": self.config.ray.namespace,
            "lifetime": "detached",
            "resources": {"node:__internal_head__": 0.001},
            "max_concurrency": 100,
        }
        actor_class = cast(Any, CoordinatorActor)
        return cast(
            ActorHandle[Any],
            actor_class.options(**options).remote(
                functools.partial(assemble, self.config, self.folder)
            ),
        )

    def coordinator(self, name: str = NAME) -> ActorHandle[Any]:
        return ray.get_actor(name, self.config.ray.namespace)

    def kill_coordinator(self) -> None:
        """Its process dies; Ray begins it anew."""
        ray.kill(self.coordinator(), no_restart=False)

    async def status(self, name: str = NAME) -> Status | None:
        """None while the coordinator doesn't answer."""
        try:
            handle = self.coordinator(name)
            answer = await answer_of(handle.status.remote())
        except (RayError, ValueError):
            return None
        return Status.model_validate(answer)

    def gpu_actor(self, gpu_id: str) -> ActorHandle[Any]:
        return ray.get_actor(f"gpu:{gpu_id}", self.config.ray.namespace)

    async def gpu_report(self, gpu_id: str) -> Report:
        """Asked until it answers: importing torch, it may be too busy for some seconds."""

        async def look() -> Report | None:
            try:
                return cast(Report, await answer_of(self.gpu_actor(gpu_id).report.remote()))
            except (RayError, ValueError):
                return None

        return await self.until(look, f"the actor of {gpu_id} answers")

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as http:
            return await http.get(f"{self.devnet.operator_url}{path}")

    async def post(self, path: str, body: object) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as http:
            return await http.post(f"{self.devnet.operator_url}{path}", json=body)

    async def missing(self) -> tuple[str, ...]:
        """What /readyz finds missing, in words; its code says the same."""
        answer = await self.get("/readyz")
        body: dict[str, Any] = answer.json()
        assert answer.status_code == (503 if body["missing"] else 200)
        assert body["ready"] == (not body["missing"])
        return tuple(body["missing"])

    async def hear(self, words: str) -> None:
        """Wait until /readyz says so."""

        async def look() -> bool:
            return any(each.startswith(words) for each in await self.missing())

        await self.until(look, f"/readyz says {words!r}")

    async def hear_nothing_missing(self) -> None:
        async def look() -> bool:
            return not await self.missing()

        await self.until(look, "/readyz says yes")

    # --- waiting ---------------------------------------------------------------------------------

    async def until_status(
        self, find: Callable[[Status], Found | None], what: str, name: str = NAME
    ) -> Found:
        async def look() -> Found | None:
            status = await self.status(name)
            return None if status is None else find(status)

        return await self.until(look, what)

    async def until_serving(self) -> None:
        """Every card is ready and every card's account takes tasks."""

        def serving(status: Status) -> bool:
            free = [gpu for gpu in status.gpus if gpu.state is GpuState.READY]
            joined = [each for each in status.accounts if each.status == "available"]
            cards = sum(cards.count for cards in CARDS)
            return status.acting and len(free) >= cards and len(joined) >= cards

        await self.until_status(serving, "all cards are ready and their accounts joined")

    async def computing(self, commitment: Callable[[], Commitment | None]) -> GpuStatus:
        """Wait until a card is in the middle of the task, where the closed gate holds it."""

        def find(status: Status) -> GpuStatus | None:
            wanted = commitment()
            for gpu in status.gpus:
                if wanted is not None and gpu.task == wanted and (gpu.step or 0) > 0:
                    return gpu
            return None

        return await self.until_status(find, "a GPU is in the middle of the task")

    # --- the chain -------------------------------------------------------------------------------

    def declared(self, account: str) -> frozenset[str]:
        """The models that the network holds the account to have."""
        place = Web3.to_checksum_address(self.devnet.deployment.node)
        nodes = self.web3.eth.contract(place, abi=contract("Node").abi)
        info = nodes.functions.getNodeInfo(Web3.to_checksum_address(account)).call()
        return frozenset(info[-1])

    # --- what there is to say --------------------------------------------------------------------

    def begin(self) -> None:
        """A test begins here."""
        self.sent.clear()
        self.fuse.disarm()
        self.gate.open()
        self.rpc.heal()
        self._log_start = len(self.log())
        self.first_block = self.web3.eth.block_number

    def log(self) -> str:
        try:
            return (self.folder / "coordinator.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def complaints(self) -> list[str]:
        """The lines of the coordinators' log, since the test began, that mustn't be there."""
        lines = self.log()[self._log_start :].splitlines()
        return [line for line in lines if any(word in line for word in BROKEN)]

    def explain(self) -> str:
        """The stories of the test's tasks and the end of the coordinators' log."""
        lines: list[str] = []
        for commitment in self.sent:
            lines.append(f"story of {commitment}")
            for event, at in self.journal.story(commitment):
                lines.append(f"  {at:.2f} {str(event)[:300]}")
            for row in self.outbox(commitment):
                lines.append(f"  outbox: {row.intent.key} {row.state.value} {row.reason}")
        lines.append("coordinator.log, its end")
        lines += [f"  {line}" for line in self.log()[self._log_start :].splitlines()[-80:]]
        return "\n".join(lines)
