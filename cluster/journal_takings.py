"""What came in and what gas went out, by the hour and by the day, of each account, in the journal.

Added up as it happens, in the transaction of what it is about: a task that is closed, a write that
is mined; and taken back where the network takes it back. The database adds up what is asked for: an
amount is kept in two numbers that it can hold the sum of.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, Row, func, insert, select, update

from cluster.core.takings import DAY, HOUR, Sums, Takings
from cluster.core.types import Address, Timestamp, Wei
from cluster.journal_tables import MICRO
from cluster.journal_tables import earned_table as table

_NOTHING = Wei(0)
_AMOUNTS = ("tasks", "paid_micro", "paid_wei", "gas_micro", "gas_wei")


def add(
    connection: Connection,
    at: Timestamp,
    account: Address,
    tasks: int = 0,
    paid: Wei = _NOTHING,
    gas: Wei = _NOTHING,
) -> None:
    """Add to the hour and the day of `at`; what is negative is taken back."""
    more = Sums(tasks, paid, gas)
    for span in (HOUR, DAY):
        key = {"span": span, "number": int(at // span), "account": account}
        found = connection.execute(select(table).filter_by(**key)).first()
        if found is None:
            connection.execute(insert(table).values(**key, **_columns(more)))
        else:
            changed = _columns(_sums(found) + more)
            connection.execute(update(table).filter_by(**key).values(**changed))


def between(connection: Connection, span: int, first: int, last: int) -> Takings:
    """Of the hours or days (`span`: `HOUR` or `DAY`) with these numbers and those between them."""

    def by(column: Column[Any]) -> dict[Any, Sums]:
        sums = [func.sum(table.c[name]).label(name) for name in _AMOUNTS]
        here = (table.c.span == span) & table.c.number.between(first, last)
        query = select(column.label("name"), *sums).where(here).group_by(column)
        return {row.name: _sums(row) for row in connection.execute(query)}

    accounts = {Address(account): sums for account, sums in by(table.c.account).items()}
    return Takings(by(table.c.number), accounts)


def _columns(sums: Sums) -> dict[str, int]:
    amounts = (sums.tasks, *divmod(sums.paid, MICRO), *divmod(sums.gas, MICRO))
    return dict(zip(_AMOUNTS, amounts, strict=True))


def _sums(row: Row[Any]) -> Sums:
    # PostgreSQL's sums are decimals.
    tasks, paid, paid_wei, gas, gas_wei = (int(row._mapping[name]) for name in _AMOUNTS)
    return Sums(tasks, Wei(paid * MICRO + paid_wei), Wei(gas * MICRO + gas_wei))
