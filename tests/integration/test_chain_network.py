"""The on-chain form of the network port against the devnet's contracts on a real chain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak

from cluster.chain.contract import commitment_bytes
from cluster.chain.fees import FeeSettings, first
from cluster.chain.network import ChainNetwork, Contracts
from cluster.chain.outbox import Outbox
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError, ConfigError
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease, Network
from cluster.core.record import Claim
from cluster.core.types import (
    AbortReason,
    AccountView,
    Address,
    Commitment,
    GigaBytes,
    GpuClass,
    ModelId,
    NodeStatus,
    Score,
    Stage,
    TaskError,
    TaskStatus,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal
from devnet.anvil import Anvil
from devnet.deploy import (
    APPLICATION,
    RELAY,
    Deployment,
    deploy,
    dev_account,
    fund,
    public_key,
    sampling_proof,
)

Found = TypeVar("Found")

PATIENCE = 120.0
"""Seconds that anything is waited for. Machines that run tests are slow and busy."""
GPU = GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
MODEL = ModelId("base:org/model")
STAKE = Wei(400 * 10**18)
TIMEOUT = 1800
"""Of tasks, in seconds: far longer than any test."""
NODE = 7
NOBODY = Commitment("0x" + "99" * 32)


async def patiently(look: Callable[[], Awaitable[Found | None]], what: str) -> Found:
    """Look until there is something, for at most `PATIENCE`; fails with `what` was wanted."""
    deadline = time.monotonic() + PATIENCE
    while (found := await look()) is None:
        assert time.monotonic() < deadline, f"after {PATIENCE:.0f} s still not so: {what}"
        await asyncio.sleep(0.05)
    return found


class DevSigner:
    def sign_transaction(self, account: Address, transaction: Mapping[str, int | str], /) -> bytes:
        signer = dev_account(NODE)
        assert str(signer.address) == account
        fields: dict[str, Any] = dict(transaction)
        return bytes(signer.sign_transaction(fields).raw_transaction)


class NoRelay:
    async def now(self) -> float:
        raise NotImplementedError

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        raise NotImplementedError

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        raise NotImplementedError


class World:
    """The network port of one node account, and hands for the application and the relay."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        self.deployment = deployment
        self.ahead = 0.0
        self.rpc = Rpc.http(deployment.rpc_url)
        self.contracts = Contracts.at(self.rpc, deployment.task, deployment.node, deployment.qos)
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        lease = self.journal.acquire("test", self.wall(), 86_400.0)
        assert lease is not None
        self.lease: Lease = lease
        self.outbox = Outbox(
            self.rpc, self.journal, lambda: lease, DevSigner(), self.wall, deployment.chain_id
        )
        self.network = ChainNetwork(
            self.rpc,
            self.contracts,
            self.outbox,
            self.journal,
            lambda: lease,
            NoRelay(),
            (2, 5, 0),
            lambda _: public_key(dev_account(NODE)),
            self.wall,
        )
        self.account = Address(dev_account(NODE).address)

    def wall(self) -> Timestamp:
        return Timestamp(time.time() + self.ahead)

    async def later(self, seconds: int) -> None:
        """Time passes for the node and for the chain, which makes no block meanwhile."""
        await self.rpc.request("evm_increaseTime", seconds)
        self.ahead += seconds

    async def close(self) -> None:
        await self.rpc.close()
        self.journal.close()

    async def send(self, sender: LocalAccount, data: bytes, value: int = 0) -> None:
        transaction: dict[str, Any] = {
            "chainId": self.deployment.chain_id,
            "nonce": await self.rpc.transaction_count(Address(sender.address)),
            **first(await self.rpc.market(), FeeSettings()).fields(),
            "gas": 5_000_000,
            "to": self.deployment.task,
            "value": value,
            "data": data,
        }
        signed = sender.sign_transaction(transaction)
        await self.rpc.send(bytes(signed.raw_transaction))
        sent = "0x" + signed.hash.hex().removeprefix("0x")
        receipt = await patiently(lambda: self.rpc.receipt(sent), "the transaction is in a block")
        assert receipt.succeeded

    async def create(self, number: int) -> Commitment:
        nonce = number.to_bytes(32, "big")
        task = Commitment("0x" + keccak(b"\x01" * 32 + nonce).hex())
        data = self.contracts.task.encode(
            "createTask",
            0,
            commitment_bytes(task),
            nonce,
            [MODEL],
            8,
            "",
            0,
            (2, 5, 0),
            1,
        )
        await self.send(dev_account(APPLICATION), data, 10**16)
        return task

    async def relay(self, function: str, task: Commitment) -> None:
        data = self.contracts.task.encode(function, commitment_bytes(task))
        await self.send(dev_account(RELAY), data)

    async def validate(self, task: Commitment) -> None:
        head = (await self.rpc.head()).number
        info = await self.contracts.task.read("getTask", commitment_bytes(task), block=head)
        proof = sampling_proof(dev_account(APPLICATION), info[3])
        data = self.contracts.task.encode(
            "validateSingleTask", commitment_bytes(task), proof.proof, proof.public_key
        )
        await self.send(dev_account(APPLICATION), data)

    async def until(
        self,
        known: Sequence[Commitment],
        holds: Callable[[AccountView], bool],
        again: Callable[[], Awaitable[None]] | None = None,
    ) -> AccountView:
        """Look until it holds. `again` is done before each look, as a coordinator does it: what
        was refused is tried anew only after a pause."""

        async def look() -> AccountView | None:
            if again is not None:
                await again()
            view = await self.network.look(self.account, known)
            # The block that it is of may be a moment older than what others have just done.
            return view if len(view.tasks) >= len(known) and holds(view) else None

        return await patiently(look, "what is expected of the account")

    async def join(self) -> AccountView:
        fund(self.deployment.rpc_url, self.account, Wei(1000 * 10**18))
        await self.network.join(self.account, GPU, STAKE, [MODEL])
        return await self.until([], lambda view: view.account.status is NodeStatus.AVAILABLE)


@pytest.fixture(scope="module")
def anvil() -> Iterator[Anvil]:
    with Anvil() as chain:
        yield chain


@pytest.fixture
def own_anvil() -> Iterator[Anvil]:
    """A chain whose time the test may move."""
    with Anvil() as chain:
        yield chain


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[[Anvil], World]]:
    """Makes a world on a chain; each has contracts of its own."""
    made: list[World] = []
    running: list[asyncio.Task[None]] = []

    def build(chain: Anvil) -> World:
        deployment = deploy(chain.rpc_url, timeout_seconds=TIMEOUT, sampling_modulus=0)
        world = World(deployment, tmp_path)
        made.append(world)
        running.append(asyncio.create_task(world.network.run()))
        return world

    yield build
    for task in running:
        task.cancel()
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
    for world in made:
        await world.close()


async def test_a_task_from_join_to_payment(anvil: Anvil, make: Callable[[Anvil], World]) -> None:
    world = make(anvil)
    network: Network = world.network
    await world.contracts.check(world.rpc, world.deployment.chain_id)
    before = await network.look(world.account, [NOBODY])
    assert before.account.status is NodeStatus.QUIT
    assert before.account.gpu_class is None and before.tasks == ()

    joined = await world.join()
    assert joined.account.gpu_class == GPU
    assert joined.account.stake == STAKE
    assert joined.moment > before.moment

    task = await world.create(1)
    started = await world.until([], lambda view: view.account.current_task == task)
    (facts,) = started.tasks
    assert facts.stage is Stage.STARTED and facts.selected_node == world.account
    assert facts.started_at is not None and facts.deadline == facts.started_at + TIMEOUT
    assert facts.model_ids == (MODEL,) and facts.abortable and facts.fee == 10**16
    assert abs(started.now - time.time()) < 30

    score = Score(b"12345678")
    await network.submit_score(world.account, task, score)
    await refused(world, task)  # the parameters aren't there yet: simulated, never sent
    await world.relay("reportTaskParametersUploaded", task)
    scored = await world.until(
        [task],
        lambda view: view.tasks[0].stage is Stage.ANSWERED,
        lambda: network.submit_score(world.account, task, score),
    )
    assert scored.tasks[0].score == score
    await done(world, task, Claim.SCORE)

    await world.validate(task)
    await world.until([task], lambda view: view.tasks[0].stage is Stage.WANTED)
    await world.relay("reportTaskResultUploaded", task)
    ended = await world.until([task], lambda view: view.tasks[0].stage is Stage.ENDED)
    assert ended.tasks[0].status is TaskStatus.END_SUCCESS
    assert ended.tasks[0].payment == 10**16
    assert ended.tasks[0].deadline is None and not ended.tasks[0].abortable
    assert ended.account.current_task is None
    await woken(world, "TaskStarted", "TaskScoreReady", "TaskValidated", "TaskEndSuccess")


async def test_an_idle_chain_lets_us_abort_when_the_time_is_up(
    own_anvil: Anvil, make: Callable[[Anvil], World]
) -> None:
    world = make(own_anvil)
    await world.join()
    task = await world.create(2)
    view = await world.until([task], lambda each: each.account.current_task == task)
    await world.network.abort(world.account, task, AbortReason.TIMEOUT)
    await refused(world, task)
    deadline = view.tasks[0].deadline
    assert deadline is not None
    # No block is made meanwhile: the port's clock must pass the deadline all the same.
    await world.later(TIMEOUT + 1)
    after = await world.network.look(world.account, [task])
    assert after.moment == view.moment
    assert after.now >= deadline + 1
    ended = await world.until(
        [task],
        lambda each: each.tasks[0].stage is Stage.ENDED,
        lambda: world.network.abort(world.account, task, AbortReason.TIMEOUT),
    )
    assert ended.tasks[0].status is TaskStatus.END_ABORTED
    assert ended.tasks[0].payment == 0
    assert ended.account.status is NodeStatus.AVAILABLE


async def test_an_error_report_and_the_accounts_verbs(
    anvil: Anvil, make: Callable[[Anvil], World]
) -> None:
    world = make(anvil)
    network = world.network
    await world.join()
    await network.report_model(world.account, ModelId("base:org/other"))
    await network.pause(world.account)
    await world.until([], lambda view: view.account.status is NodeStatus.PAUSED)
    await network.resume(world.account)
    await world.until([], lambda view: view.account.status is NodeStatus.AVAILABLE)
    info = await world.contracts.node.info(world.account, (await world.rpc.head()).number)
    assert info.models == {MODEL, "base:org/other"} and info.version == (2, 5, 0)

    task = await world.create(3)
    await world.relay("reportTaskParametersUploaded", task)
    await network.report_error(world.account, task, TaskError.PARAMETERS_VALIDATION_FAILED)
    view = await world.until([task], lambda view: view.tasks[0].stage is Stage.ANSWERED)
    assert view.tasks[0].error is TaskError.PARAMETERS_VALIDATION_FAILED
    await done(world, task, Claim.ERROR)
    await network.quit(world.account)
    await world.until([], lambda view: view.account.status is NodeStatus.PENDING_QUIT)


async def test_another_chain_no_contract_and_no_endpoint(
    anvil: Anvil, make: Callable[[Anvil], World]
) -> None:
    world = make(anvil)
    with pytest.raises(ConfigError):
        await world.rpc.check(1, world.contracts.addresses())
    with pytest.raises(ConfigError):
        await world.rpc.check(world.deployment.chain_id, {"task": world.account})
    task, node, qos = world.contracts.addresses().values()
    for mixed_up in ((node, task, qos), (task, qos, node)):
        with pytest.raises(ConfigError, match="isn't the"):
            wrong = Contracts.at(world.rpc, *mixed_up)
            await wrong.check(world.rpc, world.deployment.chain_id)
    dead = Rpc.http("http://127.0.0.1:9", timeout=2.0)
    with pytest.raises(ChainError):
        await dead.head()
    await dead.close()


async def write_state(world: World, task: Commitment, claim: Claim, state: WriteState) -> None:
    async def look() -> bool | None:  # noqa: RUF029 - stands for one that awaits
        return world.network.writes(task).get(claim) is state or None

    await patiently(look, f"{claim} becomes {state}")


async def refused(world: World, task: Commitment) -> None:
    (claim,) = world.network.writes(task)
    count = await world.rpc.transaction_count(world.account)
    await write_state(world, task, claim, WriteState.REFUSED)
    assert await world.rpc.transaction_count(world.account) == count


async def done(world: World, task: Commitment, claim: Claim) -> None:
    await write_state(world, task, claim, WriteState.DONE)


async def woken(world: World, *reasons: str) -> None:
    left: set[Any] = set(reasons)
    async with asyncio.timeout(PATIENCE):
        while left:
            wakeup = await world.network.next_wakeup()
            assert wakeup.account == world.account
            left.discard(wakeup.reason)
