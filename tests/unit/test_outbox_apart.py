"""One account's trouble is no other account's: slow calls, odd answers, or a bug."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.chain.outbox_rows import RowState
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError, LeaseLost
from cluster.core.lifecycle import WriteState
from cluster.core.record import Claim
from cluster.core.types import Commitment, Timestamp
from tests.unit.test_outbox import ALICE, BOB, CONTRACT, TASK, World, pumping, score

OTHER = Commitment("0x" + "02" * 32)
DONE = {Claim.SCORE: WriteState.DONE}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def until_scored(world: World, task: Commitment) -> None:
    while world.outbox.writes(task) != DONE:  # noqa: ASYNC110
        world.chain.mine()
        await asyncio.sleep(0.01)


async def test_an_accounts_slow_call_holds_no_other_account_up(world: World) -> None:
    gate = asyncio.Event()

    async def slow(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        if method == "eth_call" and params[0].get("from") == BOB:
            await gate.wait()
        return await world.chain(method, params)

    async with pumping(world, poll=0.02):
        world.outbox._rpc = Rpc(slow)
        world.outbox.ensure_verb(BOB, "pause", CONTRACT, b"pause")
        await asyncio.sleep(0.1)
        world.outbox.ensure(score())
        await until_scored(world, TASK)
        assert world.row(f"account:{BOB}:pause:0").state is RowState.NEW
        gate.set()
        while world.row(f"account:{BOB}:pause:0").state is RowState.NEW:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_comes_while_its_account_is_busy_waits_for_no_poll(world: World) -> None:
    gate = asyncio.Event()

    async def slow(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        if method == "eth_sendRawTransaction":
            await gate.wait()
        return await world.chain(method, params)

    async with pumping(world, poll=1000.0):
        world.outbox._rpc = Rpc(slow)
        world.outbox.ensure(score())
        while world.row(score().key).state is RowState.NEW:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        other = score(OTHER, b"other")
        world.outbox.ensure(other)
        gate.set()
        while world.row(other.key).state is not RowState.SENT:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_bug_in_ones_writes_stops_no_others(world: World) -> None:
    sign = world.outbox._signer.sign_transaction

    def breaking(account: Any, transaction: Any) -> bytes:
        if account == BOB:
            raise ZeroDivisionError("a bug")
        return sign(account, transaction)

    async with pumping(world, poll=0.02):
        world.outbox._signer.sign_transaction = breaking  # type: ignore[method-assign]
        world.outbox.ensure(score(OTHER, b"bobs", BOB))
        await asyncio.sleep(0.1)
        world.outbox.ensure(score())
        await until_scored(world, TASK)
        assert world.row(score(OTHER).key).state is RowState.NEW
        (alert,) = world.outbox.alerts()
        assert BOB in alert and "ZeroDivisionError" in alert


async def test_a_lost_lease_ends_it(world: World) -> None:
    world.outbox.ensure(score())
    assert world.journal.acquire("other", Timestamp(world.now + 100), 60.0) is not None
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(60):
            await world.outbox.run()
    assert caught.group_contains(LeaseLost)


@pytest.mark.parametrize("number", [2**63, 2**70, 2**255])
async def test_a_number_that_cant_be_is_no_answer(world: World, number: int) -> None:
    world.chain.counts[ALICE] = number
    world.outbox.ensure(score())
    with pytest.raises(ChainError):
        await world.outbox.pump()
    world.chain.counts[ALICE] = 0
    await world.outbox.pump()
    world.chain.mine()
    (tx_hash,) = world.chain.mined
    world.chain.blocks[tx_hash] = number
    with pytest.raises(ChainError):
        await world.outbox.pump()
    world.chain.blocks[tx_hash] = 1
    await world.outbox.pump()
    assert world.outbox.writes(TASK) == DONE
