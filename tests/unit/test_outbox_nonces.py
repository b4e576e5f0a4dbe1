"""Nonces that others take, that are missing, or that were never there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chain import outbox_rows as rows
from cluster.chain.outbox_rows import RowState
from cluster.core.errors import ChainError
from cluster.core.lifecycle import WriteState
from cluster.core.record import Claim
from cluster.core.types import Commitment, Wei
from tests.unit.test_outbox import ALICE, BOB, CONTRACT, TASK, World, score
from tests.unit.test_outbox_fees import pass_time
from tests.unit.test_outbox_stuck import GWEI, sent

SCORE = "0x" + b"score".hex()
FUND = f"account:{ALICE}:fund:{BOB}:0"
OTHER = Commitment("0x" + "02" * 32)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.chain.base_fee = GWEI
    yield made
    made.journal.close()


def fund(world: World) -> RowState:
    return world.outbox.ensure_verb(ALICE, f"fund:{BOB}", BOB, b"", Wei(400))


async def funded(world: World) -> None:
    """One payment more is in the chain."""
    world.chain.done.clear()
    fund(world)
    await world.settle()
    world.chain.done.clear()


def forget(world: World, *tx_hashes: str) -> None:
    """Blocks are replaced by others without these, and no pool has them."""
    for tx_hash in tx_hashes:
        del world.chain.mined[tx_hash]
        world.chain.counts[ALICE] -= 1
    world.chain.done.clear()


# --- taken by another -----------------------------------------------------------------------------


async def test_a_nonce_that_another_took_holds_nothing_up_for_long(world: World) -> None:
    await sent(world)
    world.chain.pool.clear()
    world.chain.take_nonce(ALICE)
    await pass_time(world, 60, block_seconds=2)
    row = world.row(score().key)
    assert (row.state, row.reason) == (RowState.REFUSED, "nonce 0 was used by another transaction")
    assert world.outbox.alerts() == ()
    world.outbox.ensure(score())
    await world.settle()
    assert world.chain.done == [SCORE]
    assert [signed.nonce for _, signed in world.signed] == [0, 1]


async def test_writes_behind_a_nonce_that_another_took_go_on_meanwhile(world: World) -> None:
    await sent(world)
    world.chain.pool.clear()
    world.chain.take_nonce(ALICE)
    await pass_time(world, 22, block_seconds=2)
    assert world.row(score().key).state is RowState.SENT
    world.outbox.ensure(score(OTHER, b"other"))
    await world.settle()
    assert world.outbox.writes(OTHER) == {Claim.SCORE: WriteState.DONE}


async def test_what_pays_is_given_up_only_for_another_that_is_found(world: World) -> None:
    fund(world)
    await world.outbox.pump()
    world.chain.pool.clear()
    world.chain.counts[ALICE] = 1  # and nobody knows by what
    world.chain.head += 1
    await pass_time(world, 3600, block_seconds=2, step=5)
    assert world.row(FUND).state is RowState.SENT
    assert any("nonce 0 is spent" in line for line in world.outbox.alerts())
    world.chain.others.append((ALICE, 0, world.chain.head))
    await pass_time(world, 60, block_seconds=2, step=5)
    assert world.row(FUND).state is RowState.REFUSED
    assert world.outbox.alerts() == ()


async def test_one_whose_receipt_is_gone_is_never_paid_again(world: World) -> None:
    """An endpoint without receipts of old, or one that only forgot them."""
    head = [1]
    world.outbox.head = lambda: head[0]
    fund(world)
    await world.outbox.pump()
    world.chain.mine()
    await world.outbox.pump()
    assert world.row(FUND).state is RowState.MINED
    answer = world.chain._answer

    def forgetful(method: str, params: Any) -> Mapping[str, Any]:
        if method in {"eth_getTransactionReceipt", "eth_getTransactionByHash"}:
            return {"result": None}
        return answer(method, params)

    world.chain._answer = forgetful  # type: ignore[method-assign]
    head[0] = world.chain.head = 100
    world.outbox.look_again()
    for _ in range(40):
        await pass_time(world, 15, block_seconds=2, step=5)
        fund(world)
    assert world.row(FUND).state in {RowState.SENT, RowState.MINED, RowState.FINAL}
    assert world.chain.pool == {}
    assert len(world.signed) == 1


async def test_a_receipt_that_is_gone_is_no_reorganisation_while_the_block_is_there(
    world: World,
) -> None:
    world.outbox.head = lambda: 100
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    answer = world.chain._answer

    def forgetful(method: str, params: Any) -> Mapping[str, Any]:
        return {"result": None} if "Receipt" in method else answer(method, params)

    world.chain._answer = forgetful  # type: ignore[method-assign]
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.FINAL


# --- taken back -----------------------------------------------------------------------------------


async def test_a_nonce_is_nobody_elses_as_long_as_what_was_mined_with_it_may_come_back(
    world: World,
) -> None:
    """Its block is replaced, unseen by who follows the heads, and far from as deep as is final."""
    world.outbox.head = lambda: world.chain.head
    world.settings = replace(world.settings, depth=1000)
    world.restart()
    world.outbox.head = lambda: world.chain.head
    fund(world)
    await world.settle()
    assert world.row(FUND).state is RowState.MINED
    forget(world, *world.chain.mined)
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    await pass_time(world, 120, block_seconds=2)
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [0, 1]
    assert world.row(FUND).state is RowState.MINED
    assert world.row(f"account:{ALICE}:pause:0").state is RowState.MINED


async def test_an_endpoint_that_is_behind_takes_nothing_back(world: World) -> None:
    """It counts too few, and hasn't the block either."""
    world.outbox.head = lambda: world.chain.head
    fund(world)
    await world.settle()
    world.chain.counts[ALICE] = 0
    answer = world.chain._answer

    def behind(method: str, params: Any) -> Mapping[str, Any]:
        old = method == "eth_getBlockByNumber" and params[0] != "latest"
        return {"result": None} if old else answer(method, params)

    world.chain._answer = behind  # type: ignore[method-assign]
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    failures = await pass_time(world, 120)
    assert len(failures) == 120
    assert {"nonce 0" in each for each in failures} == {True}
    assert world.row(FUND).state is RowState.MINED
    world.chain.counts[ALICE] = 1
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [0, 1]


async def test_what_was_given_up_comes_before_another_of_its_kind(world: World) -> None:
    """Of three payments, the second lost its place in the chain to another transaction."""
    for _ in range(3):
        await funded(world)
    second = f"account:{ALICE}:fund:{BOB}:1"
    given_up = replace(world.row(second), state=RowState.REFUSED, signed=None, block=None)
    with world.journal.write(world.lease) as connection:
        rows.store(connection, given_up)
    world.now += 1000
    await funded(world)
    assert world.row(second).state is RowState.MINED
    await funded(world)
    assert world.row(f"account:{ALICE}:fund:{BOB}:3").state is RowState.MINED


async def test_what_is_on_its_way_comes_before_what_was_given_up(world: World) -> None:
    await funded(world)
    fund(world)
    await world.outbox.pump()
    given_up = replace(world.row(FUND), state=RowState.REFUSED, signed=None, block=None)
    with world.journal.write(world.lease) as connection:
        rows.store(connection, given_up)
    world.now += 1000
    assert fund(world) is RowState.SENT
    assert world.row(FUND).state is RowState.REFUSED


# --- never taken ----------------------------------------------------------------------------------


def dear_enough(world: World, tx: dict[str, Any]) -> str:
    assert world.chain.base_fee is not None
    cheap = tx["maxFeePerGas"] < world.chain.base_fee
    return "max fee per gas less than block base fee" if cheap else ""


async def test_what_no_longer_offers_enough_to_be_taken_offers_more(world: World) -> None:
    world.chain.rule = lambda tx: dear_enough(world, tx)
    world.chain.faults = ["drop"]
    world.outbox.ensure(score())
    with pytest.raises(ChainError):
        await world.outbox.pump()
    assert world.row(score().key).state is RowState.SIGNED
    world.chain.base_fee = 10 * GWEI
    world.restart()
    await pass_time(world, 40, block_seconds=2)
    world.chain.mine()
    await world.outbox.pump()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


async def test_what_nobody_takes_is_an_alert_until_somebody_does(world: World) -> None:
    world.chain.refuse_sends = True
    world.outbox.ensure(score())
    failures = await pass_time(world, 59, block_seconds=2)
    assert len(failures) > 30
    assert world.outbox.alerts() == ()
    await pass_time(world, 60, block_seconds=2)
    (alert,) = world.outbox.alerts()
    assert "nonce 0 is not taken" in alert and "not today" in alert
    world.chain.refuse_sends = False
    await world.outbox.pump()
    assert world.outbox.alerts() == ()


@pytest.mark.parametrize("version", [0, 1])
async def test_one_that_was_never_known_to_be_sent_and_is_mined_all_the_same(
    world: World, version: int
) -> None:
    """Refused again and again by an endpoint, while another has passed it on."""
    world.chain.refuse_sends = True
    world.outbox.ensure(score())
    await pass_time(world, 40, block_seconds=2)
    signed = world.row(score().key).signed
    assert signed is not None and len(signed.hashes) == 2
    tx_hash = signed.hashes[version]
    world.chain.mined[tx_hash] = True
    world.chain.senders[tx_hash] = ALICE, "0x0"
    world.chain.counts[ALICE] = 1
    await pass_time(world, 30, block_seconds=2)
    assert world.row(score().key).state is RowState.MINED


# --- missing --------------------------------------------------------------------------------------


async def test_a_final_one_that_is_gone_is_sent_again(world: World) -> None:
    world.outbox.head = lambda: 100
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    await world.settle()
    assert world.row(f"account:{ALICE}:pause:0").state is RowState.FINAL
    world.outbox.ensure_verb(ALICE, "resume", CONTRACT, b"resume")
    await world.outbox.pump()
    forget(world, *world.chain.mined)
    await pass_time(world, 180, block_seconds=2)
    await world.settle()
    assert world.chain.counts[ALICE] == 2
    assert world.chain.done == ["0x" + b"pause".hex(), "0x" + b"resume".hex()]
    assert len(world.signed) == 2, "by its own bytes"


async def test_one_that_reverted_in_a_block_that_is_gone_is_looked_for_again(world: World) -> None:
    world.outbox.head = lambda: 1
    world.chain.reverting = {SCORE}
    await sent(world)
    world.chain.mine()
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.REVERTED
    forget(world, *world.chain.mined)
    world.chain.reverting.clear()
    world.outbox.look_again()
    await pass_time(world, 25)
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    assert len(world.signed) == 1


async def test_a_missing_nonce_that_nothing_has_is_filled(world: World) -> None:
    world.chain.reverting = {SCORE}
    world.outbox.ensure(score())
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    await world.outbox.pump()
    first, second = sorted(world.chain.pool, key=lambda h: world.chain.pool[h]["nonce"])
    waiting = world.chain.pool.pop(second)
    world.chain.mine()
    world.chain.pool[second] = waiting
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.REVERTED
    forget(world, first)
    world.chain.refusing = {SCORE: "Wrong task"}
    world.now += 20
    world.outbox.ensure(score())
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.REFUSED, "it has no nonce any more"
    await pass_time(world, 59, block_seconds=2)
    assert len(world.chain.pool) == 1, "a count that is behind isn't acted on at once"
    await pass_time(world, 60, block_seconds=2)
    await world.settle()
    assert world.chain.counts[ALICE] == 2
    assert world.chain.done[-1] == "0x" + b"pause".hex()
    assert world.row(f"account:{ALICE}:fill:0").state is RowState.MINED


async def test_an_endpoint_that_is_behind_for_long_makes_no_harm(world: World) -> None:
    for name in ("pause", "resume"):
        world.outbox.ensure_verb(ALICE, name, CONTRACT, name.encode())
        await world.settle()
    world.now += 100
    world.outbox.ensure_verb(ALICE, "quit", CONTRACT, b"quit")
    await world.outbox.pump()
    world.chain.counts[ALICE] = 0
    await pass_time(world, 200, block_seconds=2)
    world.chain.counts[ALICE] = 2
    await pass_time(world, 60, block_seconds=2)
    await world.settle()
    assert world.chain.counts[ALICE] == 3
    assert [each.decode() for each in map(bytes.fromhex, (d[2:] for d in world.chain.done))] == [
        "pause",
        "resume",
        "quit",
    ]
    assert len(world.signed) == 3


# --- never there ----------------------------------------------------------------------------------


async def test_one_wrong_count_is_not_believed(world: World) -> None:
    world.chain.counts[ALICE] = 1_000_000
    world.outbox.ensure(score())
    with pytest.raises(ChainError, match="asked again"):
        await world.outbox.pump()
    world.chain.counts[ALICE] = 5
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [5]
    assert world.chain.done == [SCORE]


async def test_an_account_that_served_elsewhere_is_taken_over(world: World) -> None:
    world.chain.counts[ALICE] = 5_000
    world.outbox.ensure(score())
    with pytest.raises(ChainError, match="asked again"):
        await world.outbox.pump()
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [5_000]


async def test_a_nonce_out_of_reach_is_given_up_unless_it_pays(world: World) -> None:
    world.chain.counts[ALICE] = world.chain.counts[BOB] = 1_000_000
    world.outbox.ensure(score())
    world.outbox.ensure_verb(BOB, "stake", CONTRACT, b"", Wei(5))
    for _ in range(2):
        try:
            await world.outbox.pump()
        except ChainError:
            world.now += 1
    world.chain.counts[ALICE] = world.chain.counts[BOB] = 5
    await pass_time(world, 120, block_seconds=2)
    assert world.row(score().key).state is RowState.REFUSED
    assert world.row(f"account:{BOB}:stake:0").state is RowState.SENT
    assert any("out of reach" in line for line in world.outbox.alerts())
    world.outbox.ensure(score())
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


async def test_the_lowest_of_what_endpoints_count_is_believed(world: World) -> None:
    async def each(method: str, params: Any) -> list[Mapping[str, Any]]:
        return [{"result": hex(1_000_000)}, await world.chain(method, params)]

    world.outbox._rpc._ask_each = each
    lying = [True]
    answer = world.chain._answer

    def lies(method: str, params: Any) -> Mapping[str, Any]:
        if method == "eth_getTransactionCount" and lying.pop():
            lying.append(False)
            return {"result": hex(1_000_000)}
        return answer(method, params)

    world.chain._answer = lies  # type: ignore[method-assign]
    await sent(world)
    assert [signed.nonce for _, signed in world.signed] == [0]
