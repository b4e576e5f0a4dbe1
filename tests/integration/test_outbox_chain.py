"""The outbox on a real chain whose base fee rises, and whose blocks are taken back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from eth_utils.address import to_checksum_address

from cluster.chain.fees import FeeSettings
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import OutboxSettings
from cluster.chain.outbox_rows import Intent, OutboxRow, RowState, by_key
from cluster.chain.rpc import Rpc
from cluster.core.ports import Lease
from cluster.core.types import Address, Timestamp, Wei
from cluster.journal import SqlJournal
from devnet.anvil import Anvil
from devnet.deploy import dev_account
from tests.integration.test_chain_network import NODE, DevSigner

PATIENCE = 30.0
FRIEND = Address(to_checksum_address("0x" + "f1" * 20))
NEVER = 10_000.0
"""Seconds between blocks: the test mines them."""
QUICK: dict[str, Any] = {"replace_after": 1.0, "rebroadcast_after": 0.5, "poll": 0.1, "depth": 6}


class World:
    def __init__(self, anvil: Anvil, folder: Path, **settings: Any) -> None:
        self.rpc = Rpc.http(anvil.rpc_url)
        self.account = Address(dev_account(NODE).address)
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        lease = self.journal.acquire("test", self.wall(), 86_400.0)
        assert lease is not None
        self.lease: Lease = lease
        self.outbox = Outbox(
            self.rpc,
            self.journal,
            lambda: lease,
            DevSigner(),
            self.wall,
            anvil.chain_id,
            OutboxSettings(**QUICK | settings),
        )
        self.head: int | None = None
        self.outbox.head = lambda: self.head

    def wall(self) -> Timestamp:
        return Timestamp(time.time())

    async def mine(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            await self.rpc.request("evm_mine")
        self.head = (await self.rpc.head()).number

    def send(self, key: str) -> None:
        self.outbox.ensure(Intent(key, self.account, FRIEND, b"", Wei(5)))

    def row(self, key: str) -> OutboxRow:
        with self.journal.read() as connection:
            row = by_key(connection, key)
        assert row is not None
        return row

    async def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "it never came"
            await asyncio.sleep(0.05)

    async def paid(self) -> int:
        return await self.rpc.balance(FRIEND, "latest")


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., World]]:
    stack = contextlib.ExitStack()
    made: list[World] = []
    running: list[asyncio.Task[None]] = []

    def build(**settings: Any) -> World:
        anvil = stack.enter_context(Anvil(block_time=NEVER))
        world = World(anvil, tmp_path, **settings)
        made.append(world)
        running.append(asyncio.create_task(world.outbox.run()))
        return world

    with stack:
        yield build
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for world in made:
            await world.rpc.close()
            world.journal.close()


async def test_a_base_fee_that_rises_above_the_offer_is_followed(
    make: Callable[..., World],
) -> None:
    world = make()
    world.send("a")
    await world.until(lambda: world.row("a").state is RowState.SENT)
    first = world.row("a").signed
    assert first is not None
    high = first.offer.fee * 2
    await world.rpc.request("anvil_setNextBlockBaseFeePerGas", hex(high))
    await world.mine()
    assert world.row("a").state is RowState.SENT, "what it offers is too little now"
    assert await world.paid() == 0
    await world.until(lambda: (s := world.row("a").signed) is not None and s.offer.fee > high)
    await world.mine()
    await world.until(lambda: world.row("a").state is RowState.MINED)
    assert await world.paid() == 5
    assert await world.rpc.transaction_count(world.account) == 1
    await world.mine(7)
    await world.until(lambda: world.row("a").state is RowState.FINAL)


async def test_stuck_behind_another_both_are_mined_in_order(make: Callable[..., World]) -> None:
    world = make()
    world.send("a")
    await world.until(lambda: world.row("a").state is RowState.SENT)
    world.send("b")
    await world.until(lambda: world.row("b").state is RowState.SENT)
    first = world.row("a").signed
    assert first is not None
    await world.rpc.request("anvil_setNextBlockBaseFeePerGas", hex(first.offer.fee * 3))
    await world.mine()
    end = time.monotonic() + PATIENCE
    while await world.paid() < 10:
        assert time.monotonic() < end
        await asyncio.sleep(0.5)
        await world.mine()
    await world.until(
        lambda: {world.row(key).state for key in "ab"} <= {RowState.MINED, RowState.FINAL}
    )
    nonces = [signed.nonce for key in "ab" if (signed := world.row(key).signed) is not None]
    assert nonces == [0, 1]


async def test_above_the_ceiling_it_waits_for_the_fee_to_fall(make: Callable[..., World]) -> None:
    world = make(fees=FeeSettings(cap=Wei(10 * 10**9)))
    world.send("a")
    await world.until(lambda: world.row("a").state is RowState.SENT)
    await world.rpc.request("anvil_setNextBlockBaseFeePerGas", hex(50 * 10**9))
    await world.mine()
    await world.until(lambda: bool(world.outbox.alerts()))
    signed = world.row("a").signed
    assert signed is not None
    assert signed.offer.fee <= 10 * 10**9
    end = time.monotonic() + PATIENCE
    while await world.paid() < 5:
        assert time.monotonic() < end
        await world.rpc.request("anvil_setNextBlockBaseFeePerGas", hex(10**9))
        await asyncio.sleep(0.3)
        await world.mine()
    await world.until(lambda: world.row("a").state in {RowState.MINED, RowState.FINAL})


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("told", [True, False])
async def test_what_a_reorganisation_takes_back_comes_to_be_all_the_same(
    make: Callable[..., World], depth: int, told: bool
) -> None:
    world = make()
    await world.mine(8)
    world.send("a")
    await world.until(lambda: world.row("a").state is RowState.SENT)
    await world.mine()
    await world.until(lambda: world.row("a").state is RowState.MINED)
    await world.mine(depth - 1)
    await world.rpc.request("anvil_reorg", depth, [])
    assert await world.rpc.transaction_count(world.account) == 0
    if told:
        world.outbox.look_again()
    await world.mine(8)
    end = time.monotonic() + PATIENCE
    while await world.paid() < 5:
        assert time.monotonic() < end
        await asyncio.sleep(0.2)
        await world.mine()
    await world.mine(8)
    await world.until(lambda: world.row("a").state is RowState.FINAL)
    assert await world.paid() == 5
    assert await world.rpc.transaction_count(world.account) == 1
