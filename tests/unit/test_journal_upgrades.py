"""A journal of the version before, taken over with all that is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import inspect

from cluster.core.types import Timestamp
from cluster.journal import SqlJournal
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
