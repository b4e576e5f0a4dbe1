"""What accounts were sent for gas, against what their transactions cost: the difference is what
whoever else has an account's key could have taken."""

from __future__ import annotations

from sqlalchemy import Connection, select

from cluster.chain.outbox_rows import REFUSED
from cluster.core.takings import HOUR
from cluster.core.types import Address, Timestamp, Wei
from cluster.journal_tables import MICRO, earned_table, outbox_table

GAS = "gas"
"""The verb of such a payment."""
WINDOW = 24 * HOUR


def gone(connection: Connection, treasury: Address, account: Address, now: Timestamp) -> Wei:
    """How much more it was sent for gas in the last 24 hours than its transactions cost; those of
    the hour in which they began count whole."""
    sent = _sent(connection, treasury, account, now - WINDOW)
    return Wei(max(0, sent - _cost(connection, account, now)))


def _sent(connection: Connection, treasury: Address, account: Address, since: float) -> int:
    """What is on its way too."""
    rows, prefix = outbox_table.c, f"account:{treasury}:{GAS}:{account}:"
    query = select(rows.value).where(
        rows.account == treasury,
        rows.recipient == account,
        rows.key.startswith(prefix, autoescape=True),
        rows.updated_at >= since,
        rows.state.not_in([state.value for state in REFUSED]),
    )
    return sum(int(value) for value in connection.execute(query).scalars())


def _cost(connection: Connection, account: Address, now: float) -> int:
    rows = earned_table.c
    hours = range(int((now - WINDOW) // HOUR), int(now // HOUR) + 1)
    query = select(rows.gas_micro, rows.gas_wei).where(
        rows.span == HOUR, rows.number.in_(hours), rows.account == account
    )
    return sum(row.gas_micro * MICRO + row.gas_wei for row in connection.execute(query))
