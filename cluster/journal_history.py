"""What the journal keeps for people: bundles of failed attempts, what operators had done, and
the tasks that cost a stake.

Every function works within a transaction of the caller's: one under the lease where it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, select

from cluster.core.record import Outcome
from cluster.core.types import Address, AttemptId, Commitment, Timestamp
from cluster.journal_tables import (
    audit_table,
    bundles_table,
    events_table,
    names_table,
    outbox_table,
)
from cluster.journal_tables import tasks_table as tasks

MOST_BUNDLES = 500
FIRST_BUNDLES, NEWEST_BUNDLES = 2, 8
"""Of one card and fault."""
MOST_AUDITED = 100_000
LEAST_DIGITS = 8
"""Of a commitment, by which a task may be called."""
_HASH_DIGITS = 64
_HEX = dict(zip("0123456789abcdef", "123456789abcdefg", strict=True))
"""By a digit, what comes right after it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """`body` is plain JSON values; it holds the task's parameters, which are someone's prompt.
    `gpu` and `fault`: what failed where, as far as it was written down."""

    attempt: AttemptId
    at: Timestamp
    body: Mapping[str, Any]
    gpu: str = ""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Audited:
    at: Timestamp
    who: str
    action: str
    arguments: Mapping[str, Any]
    outcome: str


@dataclass(frozen=True, slots=True)
class Invalidated:
    """A task that cost its account the stake."""

    task: Commitment
    account: Address
    at: Timestamp


def invalidated(connection: Connection) -> tuple[Invalidated, ...]:
    """The newest first."""
    query = (
        select(tasks.c.commitment, tasks.c.account, events_table.c.at)
        .join(events_table, events_table.c.seq == tasks.c.closed_seq)
        .where(tasks.c.outcome == Outcome.INVALIDATED.value)
        .order_by(tasks.c.closed_seq.desc())
    )
    return tuple(
        Invalidated(Commitment(row.commitment), Address(row.account), Timestamp(row.at))
        for row in connection.execute(query)
    )


def keep_bundle(connection: Connection, task: Commitment, bundle: Bundle) -> None:
    """Store it. Of each card and fault the first and the newest few are kept, and beyond
    `MOST_BUNDLES` those of the fault that has most make room: what fails every second pushes out
    only its like."""
    values = {"commitment": task, "attempt": bundle.attempt, "at": bundle.at}
    like = {"gpu": bundle.gpu, "fault": bundle.fault}
    body = json.dumps(bundle.body, default=str)
    connection.execute(insert(bundles_table).values(**values, **like, body=body))
    same = (bundles_table.c.gpu == bundle.gpu) & (bundles_table.c.fault == bundle.fault)
    _thin(connection, same, FIRST_BUNDLES + NEWEST_BUNDLES)
    count, fault = func.count(), bundles_table.c.fault
    faults = connection.execute(select(fault, count).group_by(fault).order_by(count.desc())).all()
    if (over := sum(each[1] for each in faults) - MOST_BUNDLES) > 0:
        most, has = faults[0]
        _thin(connection, fault == most, has - over)


def _thin(connection: Connection, which: ColumnElement[bool], most: int) -> None:
    """Down to `most`; the first few stay, and the oldest behind them go."""
    seq = bundles_table.c.seq
    found = connection.execute(select(seq).where(which).order_by(seq)).scalars().all()
    over = max(len(found) - most, 0)
    if gone := found[FIRST_BUNDLES : FIRST_BUNDLES + over]:
        connection.execute(delete(bundles_table).where(seq.in_(gone)))


def bundles_of(connection: Connection, task: Commitment) -> tuple[Bundle, ...]:
    """The oldest first."""
    query = (
        select(bundles_table)
        .where(bundles_table.c.commitment == task)
        .order_by(bundles_table.c.seq)
    )
    return tuple(
        Bundle(AttemptId(row.attempt), Timestamp(row.at), json.loads(row.body), row.gpu, row.fault)
        for row in connection.execute(query)
    )


def note_action(connection: Connection, done: Audited) -> None:
    values = {
        "at": done.at,
        "who": done.who,
        "action": done.action,
        "arguments": json.dumps(done.arguments),
        "outcome": done.outcome,
    }
    connection.execute(insert(audit_table).values(**values))
    _keep_newest(connection, audit_table, MOST_AUDITED)


def actions(connection: Connection, limit: int) -> tuple[Audited, ...]:
    """The newest first."""
    query = select(audit_table).order_by(audit_table.c.seq.desc()).limit(limit)
    return tuple(
        Audited(Timestamp(row.at), row.who, row.action, json.loads(row.arguments), row.outcome)
        for row in connection.execute(query)
    )


def find_task(connection: Connection, name: str) -> tuple[Commitment, ...]:
    """The tasks that `name` may mean, two at most: a commitment or its first digits, an attempt's
    id, or a transaction's hash. Each look is by an index, however long the journal is."""
    name = name.lower()
    digits = name if name.startswith("0x") else f"0x{name}"
    for query in _lookups(name, digits):
        found = connection.execute(query.limit(2)).scalars()
        if commitments := tuple(map(Commitment, found)):
            return commitments
    return ()


def _lookups(name: str, digits: str) -> Iterator[Select[Any]]:
    yield select(tasks.c.commitment).where(tasks.c.commitment == digits)
    if LEAST_DIGITS <= len(digits) - 2 < _HASH_DIGITS and (end := _after(digits)):
        # Not LIKE, for which neither database uses the key.
        begins = (tasks.c.commitment >= digits) & (tasks.c.commitment < end)
        yield select(tasks.c.commitment).where(begins)
    sent = (outbox_table.c.tx_hash == digits) & outbox_table.c.task.is_not(None)
    yield select(outbox_table.c.task).where(sent)
    yield select(names_table.c.commitment).where(names_table.c.name.in_([name, digits])).distinct()


def _after(digits: str) -> str:
    """What comes right after all that begin with these hexadecimal digits, in any collation, which
    has the digits before the letters; empty for what isn't such."""
    if not set(digits[2:]) <= _HEX.keys():
        return ""
    return digits[:-1] + _HEX[digits[-1]]


def add_name(connection: Connection, task: Commitment, name: str) -> None:
    """From now on the task is found by `name` too."""
    values = {"name": name.lower(), "commitment": task}
    known = select(names_table).filter_by(**values)
    if connection.execute(known).first() is None:
        connection.execute(insert(names_table).values(**values))


def _keep_newest(connection: Connection, table: Any, most: int) -> None:  # noqa: ANN401 - a table
    newest = connection.execute(select(func.max(table.c.seq))).scalar() or 0
    connection.execute(delete(table).where(table.c.seq <= newest - most))
