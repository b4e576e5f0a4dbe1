"""What is offered, and paid, while a transaction isn't mined; and what an operator hears of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.chain.fees import FeeSettings
from cluster.chain.outbox_ports import OutboxSettings
from cluster.chain.outbox_rows import RowState
from cluster.core.errors import ChainError
from cluster.core.types import Wei
from tests.unit.test_outbox import ALICE, CONTRACT, World, score
from tests.unit.test_outbox_stuck import GWEI, later, pooled, sent


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.chain.base_fee = GWEI
    yield made
    made.journal.close()


async def pass_time(
    world: World, seconds: int, block_seconds: int | None = None, step: int = 1
) -> list[str]:
    """Pump in every so many seconds; a block is made in so many, or none. The failures' words."""
    failures: list[str] = []
    for second in range(0, seconds, step):
        world.now += step
        if block_seconds and second % block_seconds == 0:
            world.chain.head += 1
        try:
            await world.outbox.pump()
        except ChainError as error:
            failures.append(str(error))
    return failures


def versions(world: World) -> int:
    signed = world.row(score().key).signed
    assert signed is not None
    return len(signed.hashes)


async def test_without_a_block_nothing_is_offered_more(world: World) -> None:
    await sent(world)
    await pass_time(world, 1200)
    assert versions(world) == 1
    world.chain.mine()
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.MINED


async def test_what_the_market_left_behind_follows_it_at_once(world: World) -> None:
    await sent(world)
    world.chain.base_fee = 5 * GWEI
    await later(world, blocks=1)
    assert [tx["maxFeePerGas"] for tx in pooled(world)] == [3 * GWEI, 11 * GWEI]


async def test_what_is_paid_anyway_has_a_bound_of_its_own(world: World) -> None:
    await sent(world)
    await pass_time(world, 3600, block_seconds=2, step=2)
    newest = pooled(world)[-1]
    assert 10 * GWEI <= newest["maxPriorityFeePerGas"] <= 20 * GWEI
    assert any("stuck at nonce 0" in line for line in world.outbox.alerts())


async def test_a_stuck_one_costs_few_calls_however_many_versions_it_has(world: World) -> None:
    await sent(world)
    await pass_time(world, 300, block_seconds=2)
    assert versions(world) > 5
    calls = 0
    answer = world.chain._answer

    def counted(method: str, params: Any) -> Mapping[str, Any]:
        nonlocal calls
        calls += 1
        return answer(method, params)

    world.chain._answer = counted  # type: ignore[method-assign]
    await pass_time(world, 60, block_seconds=2)
    assert calls <= 60 * 2.5


async def test_the_step_and_the_ceiling_are_set(world: World) -> None:
    world.settings = OutboxSettings(fees=FeeSettings(step=100, cap=Wei(7 * GWEI)))
    world.restart()
    await sent(world)
    await later(world)
    assert [tx["maxFeePerGas"] for tx in pooled(world)] == [3 * GWEI, 6 * GWEI]
    await later(world)
    assert len(world.chain.pool) == 2


def rich_enough(world: World, tx: dict[str, Any]) -> str:
    needs = tx["maxFeePerGas"] * tx["gas"] + tx["value"]
    return "insufficient funds for gas * price + value" if needs > world.chain.balance else ""


async def test_no_version_is_made_that_the_account_couldnt_pay(world: World) -> None:
    world.chain.rule = lambda tx: rich_enough(world, tx)
    world.chain.balance = 4 * GWEI * 104_000
    await sent(world)
    await pass_time(world, 120, block_seconds=2)
    assert versions(world) == 2, "3 gwei, 3.75 gwei, and no more"
    (alert,) = world.outbox.alerts()
    assert "top it up" in alert
    assert ALICE in alert
    # Dropped by all, what can be paid is what is sent again.
    world.chain.pool.clear()
    await pass_time(world, 60, block_seconds=2)
    assert [tx["maxFeePerGas"] for tx in world.chain.pool.values()] == [375 * GWEI // 100]


async def test_an_alert_ends_with_what_it_tells_of(world: World) -> None:
    world.settings = OutboxSettings(fees=FeeSettings(cap=Wei(3 * GWEI)))
    world.restart()
    await sent(world)
    await later(world)
    assert len(world.outbox.alerts()) == 1
    world.chain.mine()
    await world.outbox.pump()
    assert world.outbox.alerts() == ()


async def test_one_problem_hides_no_other(world: World) -> None:
    world.settings = OutboxSettings(fees=FeeSettings(cap=Wei(3 * GWEI)))
    world.restart()
    await sent(world)
    await later(world)
    world.chain.balance = 10
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    with pytest.raises(ChainError):
        await world.outbox.pump()
    lines = world.outbox.alerts()
    assert any("stuck at nonce 0" in line for line in lines)
    assert any("has 10 wei" in line for line in lines)


async def test_what_is_to_be_paid_and_stays_away_is_given_up(world: World) -> None:
    """An account that was robbed before it joined: whoever wanted it looks again."""
    world.chain.balance = 10
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join", Wei(400))
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    world.now += world.settings.refused_after - 1
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    assert world.outbox.movements()[ALICE].is_open
    world.now += 2
    await world.outbox.pump()
    there = world.outbox.movements()[ALICE]
    assert not there.is_open
    assert there.lacks == 0
    (refusal,) = there.refused
    assert refusal.reason == "10 wei are there, and it pays 400"
    assert world.outbox.alerts() == ()
    assert world.chain.pool == {}
    # It is there again in time: nothing was forgotten of that.
    world.chain.balance = 10**18
    world.now += 1000
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join", Wei(400))
    await world.settle()
    assert world.chain.counts[ALICE] == 1


async def test_a_tasks_answer_is_never_given_up_for_money(world: World) -> None:
    world.chain.balance = 0
    world.outbox.ensure(score())
    for _ in range(3):
        with pytest.raises(ChainError, match="top it up"):
            await world.outbox.pump()
        world.now += world.settings.refused_after
    world.chain.balance = 10**18
    await world.settle()
    assert world.chain.counts[ALICE] == 1


async def test_too_little_for_what_is_to_be_paid_is_an_alert_too(world: World) -> None:
    """Endpoints don't simulate what can't be paid: they refuse it."""
    world.chain.balance = 10
    answer = world.chain._answer

    def refusing(method: str, params: Any) -> Mapping[str, Any]:
        if method in {"eth_call", "eth_estimateGas"}:
            return {"error": {"code": -32003, "message": "Insufficient funds"}}
        return answer(method, params)

    world.chain._answer = refusing  # type: ignore[method-assign]
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join", Wei(400))
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    assert world.outbox.movements()[ALICE].lacks == 390
    assert any("has 10 wei and needs 400" in line for line in world.outbox.alerts())
