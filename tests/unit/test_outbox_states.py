"""How many of the outbox's rows stand where: told at once, however many there ever were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chain import outbox_rows as rows
from cluster.chain.outbox_rows import RowState
from cluster.core.types import Commitment
from tests.unit.journal_plans import plans, scanned
from tests.unit.test_outbox import TASK, World, score


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


def states(world: World) -> dict[RowState, int]:
    with world.journal.read() as connection:
        return {state: count for state, count in rows.states(connection).items() if count}


async def test_those_that_are_done_are_counted_as_they_become_so(world: World) -> None:
    world.chain.refusing["0x" + b"no".hex()] = "Illegal previous task state"
    refused, later = (Commitment("0x" + digits * 32) for digits in ("0b", "0c"))
    world.outbox.ensure(score())
    world.outbox.ensure(score(refused, b"no"))
    assert states(world) == {RowState.NEW: 2}
    await world.settle()
    world.chain.head += world.settings.depth
    world.outbox.head = lambda: world.chain.head
    await world.settle()
    world.outbox.ensure(score(later))
    assert states(world) == {RowState.FINAL: 1, RowState.REFUSED: 1, RowState.NEW: 1}
    # What is tried anew is on its way again.
    world.now += 5
    world.outbox.ensure(score(refused, b"no"))
    assert states(world) == {RowState.FINAL: 1, RowState.NEW: 2}
    world.restart()
    assert states(world) == {RowState.FINAL: 1, RowState.NEW: 2}
    with world.journal.write(world.lease) as connection:
        (row,) = rows.of_task(connection, TASK)
        rows.store(connection, row)
    assert states(world) == {RowState.FINAL: 1, RowState.NEW: 2}, "stored as it was"


async def test_no_more_is_read_than_what_is_on_its_way(world: World) -> None:
    world.outbox.ensure(score())
    await world.settle()
    found = plans(world.journal, lambda: states(world))
    assert not scanned(found)
    assert any("COVERING INDEX ix_outbox_state (state=?)" in plan[0] for plan in found.values())
