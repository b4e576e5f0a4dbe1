"""How SQLite finds what the journal asks it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event

from cluster.journal import SqlJournal

Plan = tuple[str, ...]


def plans(journal: SqlJournal, act: Callable[[], object]) -> dict[str, Plan]:
    """By each statement that `act` has the database carry out, how it does."""
    asked: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, statement: str, values: Any, *_: object) -> None:
        asked.append((statement, values))

    database = journal._database
    event.listen(database, "before_cursor_execute", note)
    try:
        act()
    finally:
        event.remove(database, "before_cursor_execute", note)
    with journal.read() as connection:
        return {
            statement: tuple(
                str(row.detail)
                for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
            )
            for statement, values in asked
            if not statement.startswith(("BEGIN", "PRAGMA"))
        }


def scanned(found: dict[str, Plan]) -> list[str]:
    """Of the plans, the lines by which a whole table, or a whole index, is read."""
    assert found, "nothing was asked"
    return [line for plan in found.values() for line in plan if line.startswith("SCAN")]
