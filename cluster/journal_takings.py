"""What came in and what gas went out, by the hour and account, in the journal.

Added up as it happens, in the transaction of what it is about: a task that is closed, a write that
is mined; and taken back where the network takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from cluster.core.types import Address, Timestamp, Wei
from cluster.journal_tables import takings_table as table

HOUR = 3600
_NOTHING = Wei(0)


@dataclass(frozen=True, slots=True)
class Takings:
    """Of one account in the hour that begins at `since` (unix time): tasks closed, and wei."""

    since: Timestamp
    account: Address
    tasks: int
    paid: Wei
    gas: Wei


def add(
    connection: Connection,
    at: Timestamp,
    account: Address,
    tasks: int = 0,
    paid: Wei = _NOTHING,
    gas: Wei = _NOTHING,
) -> None:
    """Add to the hour of `at`; what is negative is taken back."""
    hour = int(at // HOUR)
    place = (table.c.hour == hour) & (table.c.account == account)
    found = connection.execute(select(table).where(place)).first()
    if found is None:
        values = {"tasks": tasks, "paid": str(paid), "gas": str(gas)}
        connection.execute(insert(table).values(hour=hour, account=account, **values))
        return
    values = {
        "tasks": found.tasks + tasks,
        "paid": str(int(found.paid) + paid),
        "gas": str(int(found.gas) + gas),
    }
    connection.execute(update(table).where(place).values(**values))


def since(connection: Connection, at: Timestamp) -> tuple[Takings, ...]:
    """From the hour of `at` on, the oldest first."""
    query = (
        select(table).where(table.c.hour >= int(at // HOUR)).order_by(table.c.hour, table.c.account)
    )
    return tuple(
        Takings(
            Timestamp(float(row.hour * HOUR)),
            Address(row.account),
            row.tasks,
            Wei(int(row.paid)),
            Wei(int(row.gas)),
        )
        for row in connection.execute(query)
    )
