"""Transactions that aren't mined, and blocks that are taken back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from cluster.chain.fees import FeeSettings
from cluster.chain.outbox_ports import ChainEvent, OutboxSettings
from cluster.chain.outbox_rows import Intent, RowState, task_intent
from cluster.core.errors import ChainError, ConfigError
from cluster.core.lifecycle import WriteState
from cluster.core.record import Claim
from cluster.core.types import Address, Commitment, Wei
from cluster.journal import SqlJournal
from tests.unit.test_outbox import ALICE, SPENT, TASK, World, gas, score

GWEI = 10**9
OTHER = Commitment("0x" + "02" * 32)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.chain.base_fee = 10 * GWEI
    yield made
    made.journal.close()


def pooled(world: World) -> list[dict[str, Any]]:
    return sorted(world.chain.pool.values(), key=lambda tx: int(tx["maxFeePerGas"]))


async def sent(world: World) -> None:
    world.outbox.ensure(score())
    await world.outbox.pump()


async def later(world: World, seconds: float = 31.0, blocks: int = 3) -> None:
    world.now += seconds
    world.chain.head += blocks
    await world.outbox.pump()


# --- stuck ---------------------------------------------------------------------------------------


async def test_offers_as_the_chain_has_them(world: World) -> None:
    await sent(world)
    (tx,) = world.chain.pool.values()
    assert (tx["maxFeePerGas"], tx["maxPriorityFeePerGas"], tx["type"]) == (21 * GWEI, GWEI, 2)
    assert "gasPrice" not in tx


async def test_a_stuck_one_is_replaced_with_its_nonce_at_a_higher_fee(world: World) -> None:
    await sent(world)
    await later(world, 29.0)
    assert len(world.chain.pool) == 1
    await later(world, 2.0)
    first, second = pooled(world)
    assert first["nonce"] == second["nonce"] == 0
    assert second["maxFeePerGas"] >= first["maxFeePerGas"] * 1.25
    assert second["maxPriorityFeePerGas"] >= first["maxPriorityFeePerGas"] * 1.25
    same = ("to", "value", "data", "gas", "account", "chainId")
    assert {k: first[k] for k in same} == {k: second[k] for k in same}


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_whichever_of_them_is_mined_the_write_is_done(world: World, which: int) -> None:
    await sent(world)
    await later(world)
    await later(world)
    txs = sorted(world.chain.pool, key=lambda h: int(world.chain.pool[h]["maxFeePerGas"]))
    assert len(txs) == 3
    world.chain.pool = {txs[which]: world.chain.pool[txs[which]]}
    world.restart()
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    assert world.chain.done == ["0x" + b"score".hex()]


async def test_nothing_is_offered_above_the_cap_and_the_operator_hears_of_it(world: World) -> None:
    world.settings = OutboxSettings(fees=FeeSettings(cap=Wei(25 * GWEI)))
    world.restart()
    await sent(world)
    await later(world)
    assert len(world.chain.pool) == 1, "a quarter more would be above it"
    (alert,) = world.outbox.alerts()
    assert ALICE in alert
    assert "stuck at nonce 0" in alert
    world.chain.mine()
    await world.outbox.pump()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


async def test_only_the_one_whose_turn_it_is_is_replaced(world: World) -> None:
    await sent(world)
    world.outbox.ensure(Intent("account:verb", ALICE, score().recipient, b"verb"))
    await world.outbox.pump()
    await later(world)
    nonces = sorted(tx["nonce"] for tx in world.chain.pool.values())
    assert nonces == [0, 0, 1]
    await world.settle()
    assert world.chain.counts[ALICE] == 2


async def test_with_the_deadline_near_it_offers_more_and_waits_less(world: World) -> None:
    world.outbox.seconds_left = lambda _intent: 50.0
    await sent(world)
    (tx,) = world.chain.pool.values()
    assert tx["maxPriorityFeePerGas"] == 2 * GWEI
    world.outbox.seconds_left = lambda _intent: 20.0
    await later(world, 8.0)
    assert pooled(world)[-1]["maxPriorityFeePerGas"] == 4 * GWEI


async def test_too_little_gas_money_is_an_alert_until_there_is_enough(world: World) -> None:
    world.chain.balance = 1000
    world.outbox.ensure(score())
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    assert world.chain.pool == {}
    (alert,) = world.outbox.alerts()
    assert "has 1000 wei" in alert
    world.chain.balance = 10**18
    await world.settle()
    assert world.outbox.alerts() == ()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


async def test_a_clock_that_is_set_back_holds_nothing_up(world: World) -> None:
    await sent(world)
    world.chain.pool.clear()
    world.now -= 3600
    await later(world, 1.0)
    assert len(world.chain.pool) == 1
    world.chain.pool.clear()
    world.chain.refusing["0x" + b"other".hex()] = "Timeout not reached"
    other = task_intent(ALICE, OTHER, Claim.ABORT, score().recipient, b"other")
    world.outbox.ensure(other)
    await later(world, 1.0)
    world.now -= 3600
    assert world.outbox.ensure(other) is RowState.NEW
    await later(world, 31.0)
    assert len(world.chain.pool) == 1


# --- taken back ----------------------------------------------------------------------------------


def take_back(world: World, keep_in_pool: bool) -> None:
    """The block with the score is replaced by one without it."""
    (tx_hash,) = world.chain.mined
    del world.chain.mined[tx_hash]
    world.chain.done.clear()
    world.chain.counts[ALICE] = 0
    if keep_in_pool:
        raw = world.signed[0][1].raw
        world.chain.pool[tx_hash] = json.loads(raw)


async def test_what_is_counted_is_told(world: World) -> None:
    heard: list[object] = []

    class Told:
        def happened(self, event: ChainEvent) -> None:
            heard.append(event)

        def spent(self, account: Address, wei: Wei) -> None:
            heard.append((account, wei))

    world.outbox.told = Told()
    await sent(world)
    await later(world, 31.0)
    world.chain.mine()
    await world.settle()
    assert heard == ["replaced", (ALICE, SPENT)]


async def test_final_once_deep_enough(world: World) -> None:
    world.outbox.head = lambda: 12
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    row = world.row(score().key)
    assert (row.state, row.block) == (RowState.MINED, 1)
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.MINED
    world.outbox.head = lambda: 13
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.FINAL
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    world.chain.faults = ["drop"]
    await world.outbox.pump()  # and nobody asks for it any more


@pytest.mark.parametrize("keep_in_pool", [True, False])
@pytest.mark.parametrize("noticed", [True, False])
async def test_what_a_reorganisation_took_back_is_sent_again(
    world: World, keep_in_pool: bool, noticed: bool
) -> None:
    head = [2]
    world.outbox.head = lambda: head[0]
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    take_back(world, keep_in_pool)
    if noticed:
        world.outbox.look_again()
        assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.OPEN}
        world.now += 21
    else:
        head[0] = 20
    world.restart()
    world.outbox.head = lambda: head[0]
    await world.settle()
    assert world.row(score().key).state in {RowState.MINED, RowState.FINAL}
    assert world.chain.done == ["0x" + b"score".hex()]
    assert len(world.chain.mined) == 1
    assert world.chain.counts[ALICE] == 1, "the same bytes with the same nonce"
    assert gas(world) == SPENT, "it was paid once"


async def test_mined_in_another_block_waits_for_that_one_to_be_deep(world: World) -> None:
    world.outbox.head = lambda: 13
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    (tx_hash,) = world.chain.mined
    world.chain.blocks[tx_hash] = 5
    await world.outbox.pump()
    row = world.row(score().key)
    assert (row.state, row.block) == (RowState.MINED, 5)
    world.outbox.head = lambda: 17
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.FINAL


async def test_reverted_after_a_reorganisation_is_refused_and_tried_anew(world: World) -> None:
    head = [2]
    world.outbox.head = lambda: head[0]
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    (tx_hash,) = world.chain.mined
    world.chain.mined[tx_hash] = False
    world.chain.done.clear()
    head[0] = 20
    await world.outbox.pump()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.REFUSED}
    world.now += 5
    world.outbox.ensure(score())
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


# --- journals of the version before --------------------------------------------------------------


async def test_a_journal_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    world = World(tmp_path)
    await sent(world)
    world.journal.close()
    file = tmp_path / "journal.db"
    with sqlite3.connect(file) as connection:
        connection.execute("ALTER TABLE outbox DROP COLUMN offer")
        connection.execute("ALTER TABLE outbox DROP COLUMN block")
        connection.execute("ALTER TABLE outbox DROP COLUMN cost")
        connection.execute("DROP TABLE earned")
        connection.execute("DROP INDEX outbox_by_nonce")
        connection.execute("UPDATE cursors SET value = '1' WHERE key = 'schema'")
    connection.close()
    world.start()
    with world.journal.read() as database:
        indexes = {each["name"] for each in inspect(database).get_indexes("outbox")}
    assert "outbox_by_nonce" in indexes
    assert world.row(score().key).state is RowState.SENT
    await later(world, 100.0)
    assert len(world.chain.pool) == 1, "without knowing what it offers nothing is replaced"
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    world.journal.close()


def test_a_journal_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    World(tmp_path).journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("UPDATE cursors SET value = '99' WHERE key = 'schema'")
    connection.close()
    with pytest.raises(ConfigError, match="schema 99"):
        SqlJournal(f"sqlite:///{tmp_path / 'journal.db'}")
