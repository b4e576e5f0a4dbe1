"""What people ask of the journal: found by an index, and never in the way of its writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.coordinator import MOST_EARNED
from cluster import lookups
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState, Signed, task_intent
from cluster.core.ports import Lease
from cluster.core.record import AttemptStarted, Claim, Closed, Outcome, ParametersFetched, Seen
from cluster.core.types import Address, AttemptId, Commitment, GpuId, TaskType, Timestamp, Wei
from cluster.earnings import Earnings, Step
from cluster.journal import SqlJournal
from cluster.journal_history import _after
from cluster.lookups import Lookups, TooBusy
from cluster.story import UnknownTask, find, story_of
from tests.unit.journal_plans import plans, scanned
from tests.unit.test_term import Office

TASK = Commitment("0x" + "ab" * 32)
ALICE = Address("0x" + "11" * 20)
ATTEMPT = AttemptId("5fe68c04de8c")
FIRST, SECOND = "0x" + "e1" * 32, "0x" + "e2" * 32


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqlJournal]:
    opened = SqlJournal(f"sqlite:///{tmp_path / 'journal.db'}")
    yield opened
    opened.close()


@pytest.fixture
def lease(journal: SqlJournal) -> Lease:
    """After an attempt, and a transaction that another took the place of."""
    lease = journal.acquire("me", Timestamp(0.0), 10.0)
    assert lease is not None
    seen = Seen(ALICE, TaskType.SD, (), Wei(1))
    for event in (seen, ParametersFetched("{}"), AttemptStarted(ATTEMPT, GpuId("n-0"))):
        journal.append(lease, TASK, event, Timestamp(1.0))
    with journal.write(lease) as connection:
        intent = task_intent(ALICE, TASK, Claim.SCORE, ALICE, b"data")
        outbox_rows.add(connection, intent, Timestamp(2.0))
        for signed in (Signed(7, b"1", FIRST), Signed(7, b"2", SECOND, replaced=(FIRST,))):
            (row,) = outbox_rows.of_task(connection, TASK)
            outbox_rows.store(connection, replace(row, signed=signed, state=RowState.SENT))
    return lease


IDS = [TASK, TASK[2:], TASK[:10], TASK[2:12], ATTEMPT, SECOND, FIRST]


@pytest.mark.parametrize("name", IDS)
def test_a_task_is_found_by_any_of_its_ids(journal: SqlJournal, lease: Lease, name: str) -> None:
    assert find(journal, name) == TASK
    assert story_of(journal, name).commitment == TASK


def test_a_task_is_found_by_its_first_digits_among_neighbours(
    journal: SqlJournal, lease: Lease
) -> None:
    seen = Seen(ALICE, TaskType.SD, (), Wei(1))
    others = [Commitment(f"0xcdcdcdc{digit}" + digit * 56) for digit in "089abef"]
    for other in others:
        journal.append(lease, other, seen, Timestamp(1.0))
    for other in others:
        assert find(journal, other[:10]) == other
    with pytest.raises(UnknownTask, match="no task is known"):
        find(journal, "0xcdcdcdc7")


@pytest.mark.parametrize("name", IDS)
def test_a_task_is_found_by_an_index(journal: SqlJournal, lease: Lease, name: str) -> None:
    assert not scanned(plans(journal, lambda: story_of(journal, name)))


@pytest.mark.parametrize("name", ["deadbeef", "9" * 12, "0x" + "9" * 64, "zz", "%", ""])
def test_what_names_no_task_costs_no_more(journal: SqlJournal, lease: Lease, name: str) -> None:
    def look() -> None:
        with pytest.raises(UnknownTask):
            find(journal, name)

    assert not scanned(plans(journal, look))


def test_a_whole_commitment_is_looked_for_once(journal: SqlJournal, lease: Lease) -> None:
    (plan,) = plans(journal, lambda: find(journal, TASK)).values()
    assert "(commitment=?)" in plan[0]


DIGITS = st.text("0123456789abcdef", min_size=8, max_size=16).map("0x".__add__)


@given(DIGITS, DIGITS)
def test_a_range_holds_all_that_begin_so_and_nothing_else(digits: str, other: str) -> None:
    end = _after(digits)
    for each in (other, digits, digits + other[2:], digits[:-1] + other[2:]):
        assert (digits <= each < end) == each.startswith(digits)


# --- in nobody's way ------------------------------------------------------------------------------


@pytest.fixture
def stuck(journal: SqlJournal) -> Iterator[Callable[[SqlJournal], str]]:
    """A look that holds its connection until the test is over."""
    over = threading.Event()

    def look(reader: SqlJournal) -> str:
        with reader.read():
            over.wait(30)
        return "seen"

    yield look
    over.set()


async def test_who_asks_too_much_is_told_so_at_once_and_the_loop_writes_on(
    journal: SqlJournal,
    lease: Lease,
    stuck: Callable[[SqlJournal], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookups, "MOST_WAITING", 4)
    asked = Lookups(journal)
    most = lookups.THREADS + 4
    waiting = [asyncio.create_task(asked.ask(stuck)) for _ in range(most)]
    await asyncio.sleep(0)
    with pytest.raises(TooBusy):
        await asked.ask(stuck)
    for task in waiting[lookups.THREADS :]:
        # Who gives up gives way to others; what runs goes on and counts.
        task.cancel()
    await asyncio.sleep(0)
    for number in range(40):
        journal.set_cursor(lease, "logs", str(number))
    assert await asyncio.to_thread(journal.cursor, "logs") == "39", "their threads are others too"
    again = [asyncio.create_task(asked.ask(stuck)) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(TooBusy):
        await asked.ask(stuck)
    for task in (*again, *waiting):
        task.cancel()
    asked.close()


async def test_what_is_looked_up_comes_back_and_nothing_is_written(
    journal: SqlJournal, lease: Lease
) -> None:
    asked = Lookups(journal)
    assert await asked.ask(lambda reader: find(reader, ATTEMPT)) == TASK
    with pytest.raises(UnknownTask):
        await asked.ask(lambda reader: find(reader, "deadbeef"))

    with pytest.raises(Exception, match="read-?only"):
        await asked.ask(lambda reader: reader.set_cursor(lease, "logs", "no"))
    assert journal.cursor("logs") is None
    asked.close()


# --- money ----------------------------------------------------------------------------------------


async def test_earnings_are_asked_for_once_a_minute_however_many_look(tmp_path: Path) -> None:
    office = Office(tmp_path)
    lease = office.journal.acquire("me", office.now(), 10.0)
    assert lease is not None

    async def earned(days: float, step: Step) -> int:
        plain = await office.coordinator.earnings(office.now() - days * 86_400, step)
        return Earnings.model_validate(plain).tasks

    def close(task: str) -> None:
        for event in (Seen(ALICE, TaskType.SD, (), Wei(1)), Closed(Outcome.SUCCESS, Wei(1))):
            office.journal.append(lease, Commitment(task), event, office.now())

    close("0x01")
    assert await asyncio.gather(*(earned(3.0, "day") for _ in range(40))) == [1] * 40
    close("0x02")
    assert await earned(3.0, "day") == 1, "as it was a moment ago"
    assert await earned(400.0, "hour") == 2
    for days in range(100, 100 + MOST_EARNED):
        assert await earned(float(days), "day") == 2
    assert await earned(3.0, "day") == 2, "of many questions the oldest is forgotten"
