"""Tasks carried through whatever endpoints and chains do, by schedules that hypothesis draws.

Two endpoints that break, each in its own way and time, on a real chain that is reorganised up to
twelve blocks deep. At the end: every task that the chain still had for us is answered, by one
score, with no gap in the account's nonces.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from eth_utils.crypto import keccak
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from cluster.chain.contract import commitment_bytes
from cluster.chain.endpoints import Endpoints
from cluster.chain.fees import FeeSettings, first
from cluster.chain.network import ChainNetwork, Contracts, NetworkSettings
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import OutboxSettings
from cluster.chain.outbox_rows import RowState
from cluster.chain.rpc import Rpc, http_transport
from cluster.core.errors import NetworkUnavailable
from cluster.core.types import Address, Commitment, NodeStatus, Score, TaskStatus, Timestamp, Wei
from cluster.journal import SqlJournal
from cluster.journal_tables import outbox_table
from devnet.anvil import Anvil
from devnet.compile import load as contract
from devnet.deploy import APPLICATION, RELAY, deploy, dev_account, fund, public_key, sampling_proof
from devnet.rpc_proxy import KINDS, RpcProxy
from tests.integration.test_chain_network import GPU, MODEL, NODE, STAKE, DevSigner, NoRelay

TASKS = 3
BLOCK_SECONDS = 0.25
PATIENCE = 120.0
TIMEOUT = 3600
"""Of tasks, in seconds: none ever runs out, so none may be lost."""
SETTINGS = OutboxSettings(
    retry_after=0.2,
    recheck_after=2.0,
    rebroadcast_after=1.0,
    replace_after=4.0,
    displaced_after=3.0,
    poll=0.2,
    depth=14,
)


@dataclass(frozen=True)
class Event:
    """`at` and `seconds` in tenths, for `shrink`ing; `where`: 0, 1, or 2 for both endpoints."""

    at: int
    kind: str
    where: int
    seconds: int
    share: int
    """Of ten calls."""


EVENTS = st.lists(
    st.one_of(
        st.builds(
            Event,
            st.integers(0, 60),
            st.sampled_from(KINDS),
            st.integers(0, 2),
            st.integers(1, 25),
            st.sampled_from([3, 6, 10]),
        ),
        st.builds(
            Event, st.integers(0, 60), st.just("reorg"), st.just(0), st.integers(1, 12), st.just(10)
        ),
    ),
    max_size=10,
)
EVERY_REORG = [Event(4 + 6 * n, "reorg", 0, depth, 10) for n, depth in enumerate((1, 2, 3, 6, 12))]
OUTAGE = [Event(5, "drop", 2, 60, 10), Event(20, "reorg", 0, 6, 10)]
LOST = [Event(0, "lose", 2, 80, 6), Event(30, "429", 0, 20, 10)]


class World:
    """One operator account behind two breaking endpoints, and hands on the chain itself."""

    def __init__(self, folder: Path, anvil: Anvil, proxies: Sequence[RpcProxy]) -> None:
        self.deployment = deploy(anvil.rpc_url, timeout_seconds=TIMEOUT, sampling_modulus=0)
        self.direct = Rpc.http(anvil.rpc_url)
        self.account = Address(dev_account(NODE).address)
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        lease = self.journal.acquire("test", self.wall(), 86_400.0)
        assert lease is not None
        self.endpoints = Endpoints([http_transport(proxy.url, 1.5) for proxy in proxies], None)
        self.rpc = Rpc(self.endpoints.send, self.endpoints.close)
        self.contracts = Contracts.at(
            self.rpc, self.deployment.task, self.deployment.node, self.deployment.qos
        )
        chain_id = self.deployment.chain_id
        self.outbox = Outbox(
            self.rpc, self.journal, lambda: lease, DevSigner(), self.wall, chain_id, SETTINGS
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
            NetworkSettings(poll=0.2),
            self.endpoints,
        )
        self.true = Contracts.at(
            self.direct, self.deployment.task, self.deployment.node, self.deployment.qos
        )
        fund(anvil.rpc_url, self.account, Wei(1000 * 10**18))

    def wall(self) -> Timestamp:
        return Timestamp(time.time())

    async def close(self) -> None:
        await self.rpc.close()
        await self.direct.close()
        self.journal.close()

    # --- the operator ----------------------------------------------------------------------------

    async def operate(self) -> None:
        """What a coordinator does, for ever: look, join, answer."""
        known: dict[Commitment, None] = {}
        while True:
            with contextlib.suppress(NetworkUnavailable):
                view = await self.network.look(self.account, list(known))
                if view.account.status is NodeStatus.QUIT:
                    await self.network.join(self.account, GPU, STAKE, [MODEL])
                for facts in view.tasks:
                    known[facts.commitment] = None
                    if facts.status is TaskStatus.PARAMETERS_UPLOADED:
                        score = score_of(facts.commitment)
                        await self.network.submit_score(self.account, facts.commitment, score)
            await asyncio.sleep(0.1)

    # --- the application and the relay, which take whatever comes to pass ------------------------

    async def carry(self, number: int, reorg: tuple[TaskStatus, int] | None = None) -> Commitment:
        """A task from nothing to its end, and again from wherever a reorganisation left it; one of
        so many blocks comes when the task is first seen in that state or past it. Those before it
        are carried on meanwhile: what is taken back holds the account."""
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end, f"task {number} never came to its end"
            status = await self._status(number)
            if reorg is not None and status is not None and status >= reorg[0]:
                await self.direct.request("anvil_reorg", reorg[1], [])
                reorg = None
                continue
            if status is TaskStatus.END_SUCCESS:
                return commitment(number)
            for each in range(1, number + 1):
                with contextlib.suppress(NetworkUnavailable):
                    await self._move(commitment(each), each, await self._status(each))
            await asyncio.sleep(0.1)

    async def _status(self, number: int) -> TaskStatus | None:
        head = (await self.direct.head()).number
        facts = await self.true.task.task(commitment(number), {self.account}, head)
        return None if facts is None else facts.status

    async def _move(self, task: Commitment, number: int, status: TaskStatus | None) -> None:
        node = await self.true.node.info(self.account, (await self.direct.head()).number)
        encode, named = self.true.task.encode, commitment_bytes(task)
        if status is None:
            if node.status is NodeStatus.AVAILABLE:
                nonce = number.to_bytes(32, "big")
                what = (0, named, nonce, [MODEL], 8, "", 0, (2, 5, 0), 1)
                await self._send(APPLICATION, encode("createTask", *what), 10**16)
        elif status is TaskStatus.STARTED:
            await self._send(RELAY, encode("reportTaskParametersUploaded", named))
        elif status is TaskStatus.SCORE_READY:
            head = (await self.direct.head()).number
            info = await self.true.task.read("getTask", named, block=head)
            proof = sampling_proof(dev_account(APPLICATION), info[3])
            said = encode("validateSingleTask", named, proof.proof, proof.public_key)
            await self._send(APPLICATION, said)
        elif status is TaskStatus.VALIDATED:
            await self._send(RELAY, encode("reportTaskResultUploaded", named))

    async def _send(self, who: int, data: bytes, value: int = 0) -> None:
        sender = dev_account(who)
        transaction: dict[str, Any] = {
            "chainId": self.deployment.chain_id,
            "nonce": await self.direct.transaction_count(Address(sender.address)),
            **first(await self.direct.market(), FeeSettings(), 4).fields(),
            "gas": 5_000_000,
            "to": self.deployment.task,
            "value": value,
            "data": data,
        }
        await self.direct.send(bytes(sender.sign_transaction(transaction).raw_transaction))
        await asyncio.sleep(BLOCK_SECONDS * 2)

    # --- what there is at the end ----------------------------------------------------------------

    async def scores_sent(self, task: Commitment) -> int:
        """Transactions in the chain, as it is now, that carried a score of the task to success."""
        sent = 0
        abi = contract("VSSTask").abi
        selector = self.true.task.encode("submitTaskScore", commitment_bytes(task), b"")[:4]
        assert abi
        for number in range((await self.direct.head()).number + 1):
            # By hash: asked for whole, anvil doesn't find a block with what was mined twice.
            block = await self.direct.request("eth_getBlockByNumber", hex(number), False)
            for tx_hash in block["transactions"]:
                each = await self.direct.request("eth_getTransactionByHash", tx_hash)
                data = bytes.fromhex(each["input"][2:])
                if data[:4] == selector and commitment_bytes(task) in data:
                    receipt = await self.direct.receipt(each["hash"])
                    sent += receipt is not None and receipt.succeeded
        return sent

    def rows(self) -> list[tuple[str, str, int | None]]:
        with self.journal.read() as connection:
            found = connection.execute(outbox_table.select()).all()
        return [(row.key, row.state, row.nonce) for row in found]


def commitment(number: int) -> Commitment:
    return Commitment("0x" + keccak(b"\x01" * 32 + number.to_bytes(32, "big")).hex())


def score_of(task: Commitment) -> Score:
    return Score(keccak(text=task)[:8])


async def play(events: Sequence[Event], anvil: Anvil, proxies: Sequence[RpcProxy]) -> None:
    """Let it all happen, each at its time."""
    began = time.monotonic()
    direct = Rpc.http(anvil.rpc_url)
    try:
        for event in sorted(events, key=lambda each: each.at):
            await asyncio.sleep(max(began + event.at / 10 - time.monotonic(), 0.0))
            if event.kind == "reorg":
                depth = min(event.seconds, (await direct.head()).number - 1)
                with contextlib.suppress(NetworkUnavailable):
                    await direct.request("anvil_reorg", depth, [])
                continue
            for index, proxy in enumerate(proxies):
                if event.where in {index, 2}:
                    proxy.fail(event.kind, event.seconds / 10, event.share / 10)
    finally:
        await direct.close()


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(world.network.run()), asyncio.create_task(world.operate())]
    try:
        yield
        assert not any(task.done() for task in tasks), [t.exception() for t in tasks if t.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.close()


async def run(events: Sequence[Event], folder: Path) -> None:
    with (
        Anvil(block_time=BLOCK_SECONDS) as anvil,
        RpcProxy(anvil.rpc_url, 1) as one,
        RpcProxy(anvil.rpc_url, 2) as other,
    ):
        world = World(folder, anvil, (one, other))
        async with running(world):
            happening = asyncio.create_task(play(events, anvil, (one, other)))
            tasks = [await world.carry(number) for number in range(1, TASKS + 1)]
            await happening
            one.heal()
            other.heal()
            # What happened at last may have taken something back.
            tasks = [await world.carry(number) for number in range(1, TASKS + 1)]
            await settled(world)
            await assert_answered_once(world, tasks)


async def assert_answered_once(world: World, tasks: Sequence[Commitment]) -> None:
    for task in tasks:
        head = (await world.direct.head()).number
        facts = await world.true.task.task(task, {world.account}, head)
        assert facts is not None
        assert facts.score == score_of(task)
        assert await world.scores_sent(task) == 1


async def settled(world: World) -> None:
    """No write is on its way any more, and every nonce that was given out is spent."""
    end = time.monotonic() + PATIENCE
    resting = {RowState.MINED.value, RowState.FINAL.value, RowState.REFUSED.value}
    resting |= {RowState.REVERTED.value}
    while True:
        states = {state for _, state, _ in world.rows()}
        nonces = [nonce for _, _, nonce in world.rows() if nonce is not None]
        count = await world.direct.transaction_count(world.account)
        if states <= resting and count == max(nonces) + 1:
            return
        assert time.monotonic() < end, world.rows()
        await asyncio.sleep(0.1)


@pytest.mark.timeout(900)
@settings(
    max_examples=4,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(EVENTS)
@example(EVERY_REORG)
@example(OUTAGE)
@example(LOST)
def test_no_task_is_lost_and_none_is_answered_twice(events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(events, Path(folder)))


POINTS = (
    TaskStatus.STARTED,
    TaskStatus.PARAMETERS_UPLOADED,
    TaskStatus.SCORE_READY,
    TaskStatus.VALIDATED,
    TaskStatus.END_SUCCESS,
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", [1, 3, 12])
def test_a_reorganisation_at_every_point_of_a_task(depth: int, tmp_path: Path) -> None:
    asyncio.run(reorganised(depth, tmp_path))


async def reorganised(depth: int, folder: Path) -> None:
    with (
        Anvil(block_time=BLOCK_SECONDS) as anvil,
        RpcProxy(anvil.rpc_url, 1) as one,
        RpcProxy(anvil.rpc_url, 2) as other,
    ):
        world = World(folder, anvil, (one, other))
        # The contracts and the account's money are not what is reorganised.
        await world.direct.request("anvil_mine", hex(depth))
        async with running(world):
            for number, point in enumerate(POINTS, 1):
                await world.carry(number, (point, depth))
            # The last one may have taken an earlier task back.
            tasks = [await world.carry(number) for number in range(1, len(POINTS) + 1)]
            await settled(world)
            await assert_answered_once(world, tasks)
