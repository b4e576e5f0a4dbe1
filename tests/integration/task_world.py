"""Tasks on a devnet, and what became of them by the chain and by the operator's journal."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from web3 import HTTPProvider, Web3

from cluster.chain import outbox_rows
from cluster.chain.contract import commitment_bytes
from cluster.chain.outbox_rows import IN_THE_CHAIN, OutboxRow
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
from cluster.core.types import Commitment, TaskType
from cluster.journal import SqlJournal
from devnet.application import TaskChange, TaskReport
from devnet.compile import load as contract
from devnet.demo_tasks import FEE, parameters
from devnet.models import SD15
from devnet.network import Devnet
from devnet.tasks import TaskSpec

TASK_TIMEOUT = 900
"""Far longer than any task takes, however often the coordinator is killed meanwhile."""
TEST_SECONDS = 1500
"""What a test may take before it counts as hung."""
PATIENCE = 400.0
"""How long anything is waited for. Machines that run tests are slow and busy."""

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


@dataclass(slots=True)
class Sent:
    """Tasks on their way: `commitments` by name fill as the tasks start."""

    run: asyncio.Task[list[TaskReport]]
    commitments: dict[str, Commitment]

    async def ended(self) -> list[TaskReport]:
        async with asyncio.timeout(PATIENCE + TASK_TIMEOUT):
            return await self.run


class TaskWorld:
    devnet: Devnet
    journal: SqlJournal
    sent: list[Commitment]
    """The tasks of the present test."""
    first_block: int = 0
    """Before which no transaction can be about any of them."""

    @property
    def folder(self) -> Path:
        return self.devnet.directory

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
        place = self.devnet.deployment.task.lower()
        tasks = eth.contract(Web3.to_checksum_address(place), abi=contract("VSSTask").abi)
        found = []
        for number in range(self.first_block, eth.block_number + 1):
            # As the node says it: web3 would make objects of all that is in thousands of blocks.
            block = self._asked("eth_getBlockByNumber", hex(number), True)
            for transaction in block["transactions"]:
                if (transaction["to"] or "").lower() != place:
                    continue
                function, arguments = tasks.decode_function_input(transaction["input"])
                named = arguments.get("taskIDCommitment") == commitment_bytes(commitment)
                if function.fn_name == "submitTaskScore" and named:
                    status = eth.get_transaction_receipt(transaction["hash"])["status"]
                    found.append((transaction["hash"], status))
        return found

    def pass_time(self, seconds: int) -> None:
        """The chain's time jumps ahead, for good."""
        self._asked("evm_increaseTime", seconds)

    def _asked(self, method: str, *parameters: object) -> Any:
        answer = self.web3.provider.make_request(cast(Any, method), list(parameters))
        assert "error" not in answer, answer
        return answer["result"]
