"""Counts and sums that the journal keeps of what only grows, so that nobody counts it again: tasks
by outcome with what they were paid, and the outbox's rows that are done with, by state.

Kept within the transaction of what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from cluster import journal_takings as takings
from cluster.core.record import TaskRecord
from cluster.core.types import Wei
from cluster.journal_tables import tallies_table as table

OUTCOMES = "outcome"
"""The kind of the tallies of closed tasks by outcome."""
_NOTHING = Wei(0)


@dataclass(frozen=True, slots=True)
class Tally:
    count: int = 0
    wei: Wei = _NOTHING


def add(connection: Connection, kind: str, name: str, count: int, wei: Wei = _NOTHING) -> None:
    """What is negative is taken back."""
    key = {"kind": kind, "name": name}
    found = connection.execute(select(table).filter_by(**key)).first()
    if found is None:
        connection.execute(insert(table).values(**key, counted=count, wei=str(wei)))
    else:
        sums = {"counted": found.counted + count, "wei": str(int(found.wei) + wei)}
        connection.execute(update(table).filter_by(**key).values(**sums))


def of(connection: Connection, kind: str) -> Mapping[str, Tally]:
    """By name."""
    query = select(table).where(table.c.kind == kind)
    rows = connection.execute(query)
    return {row.name: Tally(row.counted, Wei(int(row.wei))) for row in rows}


def follow(connection: Connection, before: TaskRecord | None, after: TaskRecord) -> None:
    """Keep these and the takings in step with a task: one that is closed counts, one that is opened
    again does not."""
    if before is not None and before.closed_at is not None and after.closed_at is None:
        _closed(connection, before, -1)
    elif after.closed_at is not None:
        _closed(connection, after, 1)


def _closed(connection: Connection, task: TaskRecord, sign: int) -> None:
    assert task.closed_at is not None and task.outcome is not None, "it is closed"  # noqa: S101
    paid = Wei(sign * task.payment)
    takings.add(connection, task.closed_at, task.account, tasks=sign, paid=paid)
    add(connection, OUTCOMES, task.outcome.value, sign, paid)
