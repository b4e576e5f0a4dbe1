"""A whole operator on a whole devnet, for tests: real chain, relay, Ray, Serve and pipelines.

One serves all tests of a session (operator_start.py); they replace and kill parts of it, and leave
it able to take tasks.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from web3 import HTTPProvider, Web3

from actors.coordinator import NAME, CoordinatorActor
from actors.inference import Report
from cluster.chain import outbox_rows
from cluster.chain.contract import commitment_bytes
from cluster.chain.outbox_rows import IN_THE_CHAIN, OutboxRow
from cluster.config import Config
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Outcome,
    ResultStored,
    ResultUploaded,
)
from cluster.core.types import Commitment, GigaBytes, GpuClass, GpuState, TaskType
from cluster.journal import SqlJournal
from cluster.status import GpuStatus, Status
from devnet.application import TaskChange, TaskReport
from devnet.compile import load as contract
from devnet.demo_tasks import FEE, parameters
from devnet.hub import Hub
from devnet.models import SD15
from devnet.network import Devnet, SimulatedCards
from devnet.rpc_proxy import RpcProxy
from devnet.tasks import TaskSpec
from tests.integration.operator_crashes import Fuse, assemble
from tests.integration.operator_gate import Gate
from tests.integration.operator_odd import Oddity

HUB_BASE, HUB_LORA, HUB_PINNED = "hub/base", "hub/lora", "hub/pinned"
"""Models that only the hub has."""
PINNED = f"lora:{HUB_PINNED}"
TASK_TIMEOUT = 900
"""Far longer than any task takes, however often the coordinator is killed meanwhile."""
TEST_SECONDS = 1500
"""What a test may take before it counts as hung."""
PATIENCE = 400.0
"""How long anything is waited for. Machines that run tests are slow and busy."""
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

Found = TypeVar("Found")


def task(
    name: str,
    *,
    steps: int = 6,
    seed: int = 1,
    base: str = SD15[0],
    lora: str = "",
    **more: Any,
) -> TaskSpec:
    """A task for any card; `more` are fields of `TaskSpec`."""
    args = parameters(base, "a red fox in the snow", seed)
    args["task_config"]["steps"] = steps
    if lora:
        args["lora"] = {"model": lora, "weight": 80}
    fields: dict[str, Any] = {
        "parameters": args,
        "model_ids": (f"base:{base}",),
        "min_vram": 8,
        "fee": FEE,
        **more,
    }
    return TaskSpec(name=name, type=TaskType.SD, **fields)


async def answer_of(call: Any, seconds: float = 10.0) -> Any:
    """What an actor answers; raises `RayError` when it is gone, or doesn't within the time. The ten
    seconds are for what is asked again."""
    return await asyncio.to_thread(functools.partial(ray.get, call, timeout=seconds))


@dataclass(slots=True)
class Sent:
    """Tasks on their way: `commitments` by name fill as the tasks start."""

    run: asyncio.Task[list[TaskReport]]
    commitments: dict[str, Commitment]

    async def ended(self) -> list[TaskReport]:
        async with asyncio.timeout(PATIENCE + TASK_TIMEOUT):
            return await self.run


@dataclass
class OperatorWorld:
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
    def folder(self) -> Path:
        return self.devnet.directory

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

    async def until_true(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"after {PATIENCE:.0f} s still not so: {what}"
            await asyncio.sleep(0.2)

    async def until(
        self,
        look: Callable[[], Awaitable[Found | None]],
        what: str,
        seconds: float = PATIENCE,
    ) -> Found:
        """Look until there is something (neither None nor False); fails with `what` was wanted."""
        deadline = time.monotonic() + seconds
        while True:
            found = await look()
            if found is not None and found is not False:
                return found
            assert time.monotonic() < deadline, f"after {seconds:.0f} s still not so: {what}"
            await asyncio.sleep(0.2)

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

    # --- tasks -----------------------------------------------------------------------------------

    def send(self, *specs: TaskSpec) -> Sent:
        commitments: dict[str, Commitment] = {}

        def on_change(change: TaskChange) -> None:
            if change.name not in commitments:
                commitments[change.name] = change.commitment
                self.sent.append(change.commitment)

        application = self.devnet.application(self.folder / "images")
        return Sent(asyncio.create_task(application.run(specs, on_change)), commitments)

    async def closed(self, commitment: Commitment) -> tuple[Event, ...]:
        """The task's events once the operator has closed it too."""

        def ended() -> bool:
            events = self.events(commitment)
            return bool(events) and isinstance(events[-1], Closed)

        await self.until_true(ended, f"the operator has closed {commitment}")
        return self.events(commitment)

    def events(self, commitment: Commitment) -> tuple[Event, ...]:
        return tuple(event for event, _ in self.journal.story(commitment))

    async def assert_paid_once(self, report: TaskReport) -> tuple[Event, ...]:
        """Paid, with one score: one computed, one claimed, one transaction stored and mined."""
        assert report.as_expected, f"{report.actual_end} {report.problem}"
        events = await self.closed(report.commitment)
        kinds = [type(event) for event in events]
        assert kinds.count(ResultStored) == 1
        assert events.count(Claimed(Claim.SCORE)) == 1
        assert [e for e in events if isinstance(e, Claimed)] == [Claimed(Claim.SCORE)]
        # None when we were killed at that moment, and the network had ended the task since.
        assert kinds.count(ResultUploaded) <= 1
        assert isinstance(events[-1], Closed)
        assert events[-1] == Closed(Outcome.SUCCESS, events[-1].payment)
        assert events[-1].payment > 0
        await self.until_true(
            lambda: all(row.state in IN_THE_CHAIN for row in self.outbox(report.commitment)),
            "the outbox has seen the receipt",
        )
        (row,) = self.outbox(report.commitment)
        assert row.intent.claim is Claim.SCORE
        assert row.signed is not None
        mined = self.score_transactions(report.commitment)
        assert mined == [(row.signed.tx_hash, 1)], "one transaction carried the score"
        return events

    def outbox(self, commitment: Commitment) -> tuple[OutboxRow, ...]:
        with self.journal.read() as connection:
            return outbox_rows.of_task(connection, commitment)

    def gpus_of(self, events: Sequence[Event]) -> list[str]:
        return [event.gpu_id for event in events if isinstance(event, AttemptStarted)]

    # --- the chain -------------------------------------------------------------------------------

    @functools.cached_property
    def web3(self) -> Web3:
        return Web3(HTTPProvider(self.devnet.deployment.rpc_url))

    def score_transactions(self, commitment: Commitment) -> list[tuple[str, int]]:
        """Hash and status of every `submitTaskScore` for the task, in whichever block it is."""
        eth = self.web3.eth
        place = Web3.to_checksum_address(self.devnet.deployment.task)
        tasks = eth.contract(place, abi=contract("VSSTask").abi)
        found = []
        for number in range(eth.block_number + 1):
            for each in eth.get_block(number, full_transactions=True)["transactions"]:
                transaction = cast(Any, each)
                if transaction["to"] != place:
                    continue
                function, arguments = tasks.decode_function_input(transaction["input"])
                named = arguments.get("taskIDCommitment") == commitment_bytes(commitment)
                if function.fn_name == "submitTaskScore" and named:
                    status = eth.get_transaction_receipt(transaction["hash"])["status"]
                    found.append((transaction["hash"].to_0x_hex(), status))
        return found

    def pass_time(self, seconds: int) -> None:
        """The chain's time jumps ahead, for good."""
        answer = self.web3.provider.make_request(cast(Any, "evm_increaseTime"), [seconds])
        assert "error" not in answer, answer

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
