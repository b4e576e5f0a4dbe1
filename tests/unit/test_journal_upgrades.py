"""A journal of the version before, taken over with all that is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import inspect

from cluster import journal_takings
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState
from cluster.core.record import Closed, Outcome
from cluster.core.takings import DAY, HOUR, Sums
from cluster.core.types import Address, AttemptId, Commitment, Timestamp, Wei
from cluster.journal import SqlJournal
from cluster.journal_history import Bundle, bundles_of, keep_bundle
from cluster.journal_tables import metadata
from cluster.story import story_of
from tests.unit import old_journals as old


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'journal.db'}"


@pytest.fixture
def taken(url: str) -> SqlJournal:
    """Over from the version before."""
    old.make(url)
    return SqlJournal(url)


@pytest.mark.parametrize("name", [old.TASK, old.TASK[:12], old.ATTEMPT, old.SENT, old.REPLACED])
def test_an_old_journals_tasks_are_found_by_any_id(taken: SqlJournal, name: str) -> None:
    assert story_of(taken, name).commitment == old.TASK
    taken.close()


def test_an_old_journal_gets_the_tables_and_indexes_of_a_new_one(
    url: str, taken: SqlJournal
) -> None:
    SqlJournal(url).close()
    assert taken.cursor("schema") == "4"
    with taken.read() as connection:
        there = inspect(connection)
        for name, table in metadata.tables.items():
            columns = {each["name"] for each in there.get_columns(name)}
            assert columns == {each.name for each in table.columns}, name
            indexes = {each["name"] for each in there.get_indexes(name)}
            assert indexes >= {each.name for each in table.indexes}, name
    assert taken.acquire("me", Timestamp(1.0), 10.0) is not None
    taken.close()


def test_an_old_journals_sums_are_there_by_the_hour_and_by_the_day(taken: SqlJournal) -> None:
    first, day = old.HOUR, old.HOUR // 24
    hours = taken.takings(HOUR, 0, first + 99)
    assert hours.steps == {
        first: Sums(2, Wei(old.PAID), Wei(9)),
        first + 23: Sums(0, Wei(-old.BACK)),
        first + 24: Sums(-1, Wei(-5), Wei(10**9)),
    }
    days = taken.takings(DAY, 0, day + 9)
    assert days.steps == {
        day: Sums(2, Wei(old.PAID - old.BACK), Wei(9)),
        day + 1: Sums(-1, Wei(-5), Wei(10**9)),
    }
    assert days.accounts == hours.accounts
    lease = taken.acquire("me", Timestamp(1.0), 10.0)
    assert lease is not None
    with taken.write(lease) as connection:
        at = Timestamp(float(first * HOUR))
        journal_takings.add(connection, at, Address(old.ACCOUNT), 1, Wei(old.BACK))
    assert taken.takings(DAY, day, day).steps == {day: Sums(3, Wei(old.PAID), Wei(9))}
    taken.close()


def test_an_old_journals_tasks_and_transactions_are_counted_once(
    url: str, taken: SqlJournal
) -> None:
    again = SqlJournal(url)
    for journal in (taken, again):
        assert journal.totals() == ({Outcome.SUCCESS: 1, Outcome.LOST: 1}, old.PAID)
        with journal.read() as connection:
            states = outbox_rows.states(connection)
        assert states == {RowState.FINAL: 1, RowState.REFUSED: 1, RowState.MINED: 1}
    lease = taken.acquire("me", Timestamp(1.0), 10.0)
    assert lease is not None
    taken.append(lease, Commitment(old.OPEN), Closed(Outcome.SUCCESS, Wei(1)), Timestamp(9.0))
    assert again.totals() == ({Outcome.SUCCESS: 2, Outcome.LOST: 1}, old.PAID + 1)
    for journal in (taken, again):
        journal.close()


def test_an_old_journals_bundles_stay(taken: SqlJournal) -> None:
    lease = taken.acquire("me", Timestamp(1.0), 10.0)
    assert lease is not None
    old_one = Bundle(AttemptId(old.ATTEMPT), Timestamp(4.0), {"gpu": "n-0"})
    new_one = Bundle(AttemptId("b"), Timestamp(5.0), {}, "n-0", "DeviceFault")
    with taken.write(lease) as connection:
        keep_bundle(connection, Commitment(old.TASK), new_one)
        assert bundles_of(connection, Commitment(old.TASK)) == (old_one, new_one)
    taken.close()
