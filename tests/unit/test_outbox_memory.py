"""What each turn and each look ask of the outbox is remembered until one of its rows changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection

from cluster.chain import outbox
from cluster.chain.outbox_rows import OutboxRow, RowState
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError
from cluster.core.lifecycle import WriteState
from cluster.core.record import Claim
from cluster.core.types import Commitment, Timestamp, Wei
from tests.unit.test_outbox import ALICE, BOB, TASK, FakeSigner, World, score


class Counted(World):
    """Counts what is read of its journal."""

    reads = 0

    def start(self) -> None:
        super().start()
        read = self.journal.read

        @contextmanager
        def counted() -> Iterator[Connection]:
            self.reads += 1
            with read() as connection:
                yield connection

        self.journal.read = counted  # type: ignore[method-assign]

    def is_as_stored(self) -> bool:
        """Whether it answers as one does that has just read it all."""
        there = self.outbox
        new = outbox.Outbox(
            Rpc(self.chain),
            self.journal,
            lambda: self.lease,
            FakeSigner(),
            lambda: Timestamp(self.now),
            1,
            self.settings,
        )
        new._lacking = there._lacking
        same = there.writes(TASK) == new.writes(TASK) and there.movements() == new.movements()
        before = self.reads
        there.writes(TASK)
        there.movements()
        return same and self.reads == before


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Counted]:
    made = Counted(tmp_path)
    yield made
    made.journal.close()


async def test_it_follows_every_change(world: Counted) -> None:
    assert world.is_as_stored()
    data = "0x" + b"score".hex()
    world.chain.refusing[data] = "Illegal previous task state"
    world.outbox.ensure(score())
    assert world.is_as_stored()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.OPEN}
    world.outbox.ensure_verb(ALICE, "fund", BOB, b"", Wei(5))
    assert world.is_as_stored()
    assert world.outbox.movements()[ALICE].owes == 5 and world.outbox.movements()[BOB].paying
    await world.outbox.pump()
    assert world.is_as_stored()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.REFUSED}
    world.now += 5
    del world.chain.refusing[data]
    world.outbox.ensure(score())
    for _ in range(4):
        await world.outbox.pump()
        assert world.is_as_stored()
        world.chain.mine()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    assert world.outbox.movements()[BOB].paid_block > 0
    world.outbox.look_again()
    assert world.is_as_stored()


async def test_what_is_lacking_and_what_was_refused_show_at_once(world: Counted) -> None:
    world.outbox.ensure_verb(ALICE, "fund", BOB, b"", Wei(5))
    assert world.outbox.movements()[ALICE].lacks == 0
    world.chain.balance = 1
    with pytest.raises(ChainError, match="needs"):
        await world.outbox.pump()
    assert world.outbox.movements()[ALICE].lacks > 0
    world.chain.balance = 10**20
    world.chain.refusing["0x"] = "no"
    await world.outbox.pump()
    found = world.outbox.movements()
    assert found[ALICE].lacks == 0
    assert [each.reason for each in found[BOB].refused] == ["no"]


async def test_what_a_task_writes_or_an_account_lacks_has_no_account_read_again(
    world: Counted,
) -> None:
    world.outbox.ensure_verb(ALICE, "fund", BOB, b"", Wei(5))
    world.chain.balance = 1
    world.outbox.movements()
    with pytest.raises(ChainError, match="needs"):
        await world.outbox.pump()
    before = world.reads
    assert world.outbox.movements()[ALICE].lacks > 0
    world.outbox._lacking.clear()
    assert world.outbox.movements()[ALICE].lacks == 0
    row = OutboxRow(1, score(), RowState.REVERTED, None, None, Timestamp(world.now), "no")
    world.outbox._refusals.resolved(row)
    assert world.outbox.movements()[ALICE].owes == 5
    assert world.reads == before


def test_what_is_there_already_is_not_taken_for_unwritten(world: Counted) -> None:
    """As after a commit that came to be while its answer was lost."""
    world.outbox.writes(TASK)
    remembered = dict(world.outbox._written)
    world.outbox.ensure(score())
    world.outbox._written.update(remembered)
    world.outbox.ensure(score())
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.OPEN}


def test_no_more_tasks_than_so_many_are_remembered(
    world: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_MOST_WRITTEN", 3)
    for number in range(10):
        assert world.outbox.writes(Commitment(f"0x{number:064x}")) == {}
        assert len(world.outbox._written) <= 3
