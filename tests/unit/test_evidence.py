"""What a slashed task computed is kept, and shown, until somebody has seen to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors import evidence as module
from actors.evidence import Evidence
from cluster.core.errors import ClusterError
from cluster.core.record import Closed, Outcome
from cluster.core.types import Address, Commitment, Stage, TaskStatus, Wei
from tests.unit.actor_fakes import ALICE, BOB, DONE, FILES, OTHER, TASK, facts_of
from tests.unit.actor_house import House

DAY = 86_400.0


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def evidence(house: House) -> Evidence:
    return Evidence(house.ledger, house.artifacts, house.clock)


def keep(house: House, task: Commitment, account: Address, outcome: Outcome) -> None:
    """A task that was computed, and ended so."""
    asyncio.run(house.artifacts.put(task, FILES))
    house.open(task, Closed(outcome, Wei(0)), account=account)


def kept(house: House) -> set[Commitment]:
    asyncio.run(evidence(house).tidy())
    return {task for task in TASKS if house.artifacts.where(task) is not None}


TASKS = [Commitment(f"0x{number:064x}") for number in range(40)]


def contents(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in Path(folder).iterdir()]


async def test_a_task_that_is_invalidated_keeps_its_files(house: House) -> None:
    house.network.add(facts_of())
    house.pool.outcomes = [DONE]
    await house.turns(4)
    assert house.network.tasks[TASK].score == DONE.score
    house.network.move(TASK, stage=Stage.ENDED, status=TaskStatus.END_INVALIDATED)
    await house.turns(2)
    assert house.kinds()[-1] == "Closed"
    where = house.artifacts.where(TASK)
    assert where is not None
    assert contents(where) == [FILES[0][1]]
    (alert,) = evidence(house).alerts()
    assert TASK in alert
    assert ALICE in alert
    assert where in alert


async def test_other_ends_leave_nothing(house: House) -> None:
    house.network.add(facts_of())
    house.pool.outcomes = [DONE]
    await house.turns(4)
    house.network.move(TASK, stage=Stage.ENDED, status=TaskStatus.END_GROUP_REFUND)
    await house.turns(2)
    assert house.kinds()[-1] == "Closed"
    assert house.artifacts.where(TASK) is None
    assert evidence(house).alerts() == ()


def test_they_go_when_the_account_is_cleared(house: House) -> None:
    keep(house, TASKS[0], ALICE, Outcome.INVALIDATED)
    keep(house, TASKS[1], BOB, Outcome.INVALIDATED)
    keep(house, TASKS[2], BOB, Outcome.LOST)
    assert kept(house) == set(TASKS[:3])
    house.ledger.clear_slashed(ALICE)
    assert len(evidence(house).alerts()) == 1
    assert kept(house) == {TASKS[1], TASKS[2]}, "what is lost may be wanted yet"


def test_the_oldest_go_first_and_none_is_kept_for_ever(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    for task in TASKS[:5]:
        keep(house, task, ALICE, Outcome.INVALIDATED)
        house.clock.now += DAY
    assert kept(house) == set(TASKS[2:5])
    house.clock.now += module.KEPT_SECONDS - 2.5 * DAY
    assert kept(house) == set(TASKS[3:5])
    house.clock.now += 10 * DAY
    assert kept(house) == set()
    assert evidence(house).alerts() == ()


def test_files_that_cant_be_removed_stop_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(house, TASKS[0], ALICE, Outcome.INVALIDATED)
    keep(house, TASKS[1], ALICE, Outcome.INVALIDATED)
    house.ledger.clear_slashed(ALICE)
    drop = house.artifacts.drop

    async def stubborn(task: Commitment) -> None:
        if task == TASKS[1]:
            raise ClusterError("it is in use")
        await drop(task)

    monkeypatch.setattr(house.artifacts, "drop", stubborn)
    assert kept(house) == {TASKS[1]}


def test_tasks_of_another_kind_are_no_evidence(house: House) -> None:
    keep(house, OTHER, ALICE, Outcome.SUCCESS)
    assert evidence(house).alerts() == ()
