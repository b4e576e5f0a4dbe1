"""The lease's row: who may act, under which epoch, and until when by a clock that all share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Row, select, text, update

from cluster.core import ports
from cluster.core.errors import LeaseLost
from cluster.core.types import Timestamp
from cluster.journal_tables import lease_table

RIGHT_ENOUGH = 0.5
"""Seconds that a machine's clock may be off: asking takes time too."""


def common(connection: Connection, now: Timestamp, wall: Callable[[], float]) -> Timestamp:
    """`now`, by this machine's clock `wall`, as everybody reckons who may want the lease: by the
    clock of the database where it is a server, else by that of the machine whose file it is."""
    if connection.dialect.name != "postgresql":
        return now
    there = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar()
    apart = float(there or 0.0) - wall()
    return now if abs(apart) < RIGHT_ENOUGH else Timestamp(now + apart)


def current(connection: Connection) -> Row[Any]:
    return connection.execute(select(lease_table).with_for_update()).one()


def check(connection: Connection, lease: ports.Lease) -> None:
    newest = current(connection).epoch
    if newest != lease.epoch:
        raise LeaseLost(f"lease {lease.epoch} of {lease.holder} was followed by {newest}")


def store(connection: Connection, lease: ports.Lease) -> None:
    connection.execute(
        update(lease_table).values(
            holder=lease.holder, epoch=lease.epoch, expires_at=lease.expires_at
        )
    )
