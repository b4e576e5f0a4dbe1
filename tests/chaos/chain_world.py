"""An operator's chain side behind endpoints that break, and hands on the chain itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from cluster.chain.contract import commitment_bytes
from cluster.chain.endpoints import Endpoints
from cluster.chain.fees import FeeSettings, first
from cluster.chain.network import ChainNetwork, Contracts, NetworkSettings
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import OutboxSettings
from cluster.chain.outbox_rows import IN_THE_CHAIN, RowState
from cluster.chain.rpc import Rpc, http_transport
from cluster.core.errors import NetworkUnavailable
from cluster.core.types import (
    AccountView,
    Address,
    Commitment,
    NodeStatus,
    Score,
    Stage,
    TaskStatus,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal
from cluster.journal_tables import outbox_table
from devnet.anvil import Anvil
from devnet.compile import load as contract
from devnet.deploy import (
    APPLICATION,
    RELAY,
    connect,
    deploy,
    dev_account,
    fund,
    public_key,
    sampling_proof,
)
from devnet.rpc_proxy import RpcProxy
from tests.integration.test_chain_network import GPU, MODEL, NODE, STAKE, NoRelay

BLOCK_SECONDS = 0.25
PATIENCE = 120.0
TIMEOUT = 3600
"""Of tasks, in seconds: none ever runs out, so none may be lost."""
BUSY_SECONDS = 1.0
"""Between two looks at an account that has something to do, as the coordinator has them too."""
DEEPEST = 12
"""Blocks of a reorganisation."""
MINE: Any = "anvil_mine"
TREASURY = 8
FRIEND = Address(to_checksum_address("0x" + "f1" * 20))
PAYMENTS, PAYMENT = 3, Wei(7)
SETTINGS = OutboxSettings(
    retry_after=0.2,
    recheck_after=2.0,
    rebroadcast_after=1.0,
    replace_after=4.0,
    look_after=1.0,
    displaced_after=3.0,
    poll=0.2,
    depth=14,
)


class Signers:
    def __init__(self) -> None:
        self._keys = {str(dev_account(n).address): dev_account(n) for n in (NODE, TREASURY)}

    def sign_transaction(self, account: Address, transaction: Mapping[str, int | str], /) -> bytes:
        fields: dict[str, Any] = dict(transaction)
        return bytes(self._keys[account].sign_transaction(fields).raw_transaction)


class World:
    """One node account and a treasury."""

    def __init__(self, folder: Path, anvil: Anvil, proxies: Sequence[RpcProxy]) -> None:
        self.deployment = deploy(anvil.rpc_url, timeout_seconds=TIMEOUT, sampling_modulus=0)
        self.direct = Rpc.http(anvil.rpc_url)
        self.account = Address(dev_account(NODE).address)
        self.treasury = Address(dev_account(TREASURY).address)
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        self.true = Contracts.at(
            self.direct, self.deployment.task, self.deployment.node, self.deployment.qos
        )
        fund(anvil.rpc_url, self.account, Wei(1000 * 10**18))
        # The contracts and the account's money are not what is reorganised.
        connect(anvil.rpc_url).provider.make_request(MINE, [hex(DEEPEST + 1)])
        self._proxies = proxies
        self._running: list[asyncio.Task[None]] = []
        self._rpc: Rpc | None = None

    def wall(self) -> Timestamp:
        return Timestamp(time.time())

    def rows(self) -> list[tuple[str, str, str, int | None]]:
        """Account, key, state and nonce of all that was ever to be sent."""
        with self.journal.read() as connection:
            found = connection.execute(outbox_table.select()).all()
        return [(row.account, row.key, row.state, row.nonce) for row in found]

    # --- the operator ----------------------------------------------------------------------------

    def begin(self) -> None:
        """A term of office, from what the journal holds."""
        lease = self.journal.acquire("test", self.wall(), 86_400.0)
        assert lease is not None
        chain_id, contracts = self.deployment.chain_id, self.true.addresses()
        transports = [http_transport(proxy.url, 1.5) for proxy in self._proxies]
        endpoints = Endpoints(transports, chain_id)
        endpoints.contracts = tuple(contracts.values())
        rpc = self._rpc = Rpc(endpoints.send, endpoints.close, endpoints.ask_each)
        outbox = Outbox(rpc, self.journal, lambda: lease, Signers(), self.wall, chain_id, SETTINGS)
        network = ChainNetwork(
            rpc,
            Contracts.at(rpc, *contracts.values()),
            outbox,
            self.journal,
            lambda: lease,
            NoRelay(),
            (2, 5, 0),
            lambda _: public_key(dev_account(NODE)),
            self.wall,
            NetworkSettings(poll=0.2),
            endpoints,
            accounts={self.account},
        )
        loops = (network.run(), self._operate(network), self._pay(network))
        self._running = [asyncio.create_task(loop) for loop in loops]

    async def end(self) -> None:
        """Wherever it is: nothing is finished first."""
        broken = [task.exception() for task in self._running if task.done()]
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        assert not broken, broken
        if self._rpc is not None:
            await self._rpc.close()

    async def _operate(self, network: ChainNetwork) -> None:
        """What a coordinator does: look as it begins, then when it is woken, and with something to
        do now and then. Nothing else makes it look: what isn't woken for is never seen."""
        known: dict[Commitment, None] = {}
        wait: float | None = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await network.next_wakeup()
            try:
                view = await network.look(self.account, list(known))
                known |= dict.fromkeys(facts.commitment for facts in view.tasks)
                wait = BUSY_SECONDS if await self._act(network, view) else None
            except NetworkUnavailable:
                wait = 0.3

    async def _act(self, network: ChainNetwork, view: AccountView) -> bool:
        """Whether there is anything more to do."""
        if view.account.status is NodeStatus.QUIT:
            await network.join(self.account, GPU, STAKE, [MODEL])
            return True
        for facts in view.tasks:
            if facts.status is TaskStatus.PARAMETERS_UPLOADED:
                score = score_of(facts.commitment)
                await network.submit_score(self.account, facts.commitment, score)
        return any(facts.stage is not Stage.ENDED for facts in view.tasks)

    async def _pay(self, network: ChainNetwork) -> None:
        """So many payments, one after the other."""
        prefix = f"account:{self.treasury}:fund:{FRIEND}:"
        while True:
            states = [RowState(state) for _, key, state, _ in self.rows() if key.startswith(prefix)]
            if sum(state in IN_THE_CHAIN for state in states) < PAYMENTS:
                await network.transfer(self.treasury, FRIEND, PAYMENT, "fund")
            await asyncio.sleep(0.3)

    # --- the application and the relay, which take whatever comes to pass ------------------------

    async def carry(self, number: int, reorg: tuple[TaskStatus, int] | None = None) -> Commitment:
        """A task from nothing to its end, and again from wherever a reorganisation left it; one of
        so many blocks comes when the task is first seen in that state or past it. Those before it
        are carried on meanwhile: what is taken back holds the account."""
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end, f"task {number} never came to its end: {self.rows()}"
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
        while True:
            head = (await self.direct.head()).number
            # Between the two questions the chain may become shorter.
            with contextlib.suppress(NetworkUnavailable):
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

    async def settled(self) -> None:
        """No write is on its way any more, and every nonce that was given out is spent."""
        end = time.monotonic() + PATIENCE
        resting = {RowState.MINED, RowState.FINAL, RowState.REFUSED, RowState.REVERTED}
        while not (
            {RowState(state) for _, _, state, _ in self.rows()} <= resting
            and await self._spent(self.account)
            and await self._spent(self.treasury)
            and await self.direct.balance(FRIEND, "latest") >= PAYMENTS * PAYMENT
        ):
            assert time.monotonic() < end, self.rows()
            await asyncio.sleep(0.1)

    async def _spent(self, account: Address) -> bool:
        nonces = [n for each, _, _, n in self.rows() if each == account and n is not None]
        return await self.direct.transaction_count(account) == max(nonces) + 1

    async def assert_right(self, tasks: Sequence[Commitment]) -> None:
        """Every task is answered, by one score; what was to be paid is paid, and once."""
        for task in tasks:
            head = (await self.direct.head()).number
            facts = await self.true.task.task(task, {self.account}, head)
            assert facts is not None
            assert facts.score == score_of(task)
            assert await self._scores_sent(task) == 1
        assert await self.direct.balance(FRIEND, "latest") == PAYMENTS * PAYMENT

    async def _scores_sent(self, task: Commitment) -> int:
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


def commitment(number: int) -> Commitment:
    return Commitment("0x" + keccak(b"\x01" * 32 + number.to_bytes(32, "big")).hex())


def score_of(task: Commitment) -> Score:
    return Score(keccak(text=task)[:8])


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    world.begin()
    try:
        yield
    finally:
        try:
            await world.end()
        finally:
            await world.direct.close()
            world.journal.close()
