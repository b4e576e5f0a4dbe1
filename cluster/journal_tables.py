"""The journal's tables."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData()
MICRO = 10**12
"""Wei in a millionth of a CNX."""
_BigSerial = BigInteger().with_variant(Integer, "sqlite")

lease_table = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("holder", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_at", Double, nullable=False),
)
tasks_table = Table(
    "tasks",
    metadata,
    Column("commitment", Text, primary_key=True),
    Column("last_seq", BigInteger, nullable=False),
    Column("closed_seq", BigInteger, index=True),
    Column("account", Text, nullable=False),
    Column("outcome", Text, index=True),
    Column("payment", Text, nullable=False),
)
"""One row per task, so that open ones are found without reading the history."""
events_table = Table(
    "task_events",
    metadata,
    Column("seq", _BigSerial, primary_key=True, autoincrement=True),
    Column("commitment", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),
    Index("task_events_by_task", "commitment", "seq"),
)
outbox_table = Table(
    "outbox",
    metadata,
    Column("seq", _BigSerial, primary_key=True, autoincrement=True),
    Column("key", Text, nullable=False, unique=True),
    Column("account", Text, nullable=False, index=True),
    Column("task", Text, index=True),
    Column("claim", Text),
    Column("recipient", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("value", Text, nullable=False),
    Column("state", Text, nullable=False, index=True),
    Column("nonce", BigInteger),
    Column("raw", LargeBinary),
    Column("tx_hash", Text, index=True),
    Column("sent_at", Double),
    Column("updated_at", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("offer", Text),
    Column("block", BigInteger),
    Column("cost", Text),
    Index("outbox_by_nonce", "account", "nonce"),
    Index("outbox_by_owner", "account", "task"),
)
names_table = Table(
    "task_names",
    metadata,
    Column("name", Text, primary_key=True),
    Column("commitment", Text, primary_key=True),
)
"""What else leads to a task: its attempts' ids, and hashes of its transactions that the outbox's
row doesn't have any more."""
earned_table = Table(
    "earned",
    metadata,
    Column("span", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("account", Text, primary_key=True),
    Column("tasks", Integer, nullable=False),
    Column("paid_micro", BigInteger, nullable=False),
    Column("paid_wei", BigInteger, nullable=False),
    Column("gas_micro", BigInteger, nullable=False),
    Column("gas_wei", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Sums by the hour and by the day (`span`: its seconds; `number`: unix time / span) and account,
kept as tasks close and gas is spent: the history itself is too long to be added up for each look.
An amount is `*_micro` * `MICRO` + `*_wei`, so that the database can add it up."""
tallies_table = Table(
    "tallies",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("counted", BigInteger, nullable=False),
    Column("wei", Text, nullable=False),
)
bundles_table = Table(
    "bundles",
    metadata,
    Column("seq", _BigSerial, primary_key=True, autoincrement=True),
    Column("commitment", Text, nullable=False, index=True),
    Column("attempt", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("body", Text, nullable=False),
    Column("gpu", Text, nullable=False, server_default=""),
    Column("fault", Text, nullable=False, server_default=""),
    Index("bundles_by_gpu", "gpu", "fault", "seq"),
    Index("bundles_by_fault", "fault", "seq"),
)
"""All that was known where an attempt failed, as JSON: of each card and fault the first and the
newest few."""
audit_table = Table(
    "audit",
    metadata,
    Column("seq", _BigSerial, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("who", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("arguments", Text, nullable=False),
    Column("outcome", Text, nullable=False),
)
"""What operators had done, and what came of it."""
cursors_table = Table(
    "cursors",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
accounts_table = Table(
    "accounts",
    metadata,
    Column("path_index", Integer, primary_key=True, autoincrement=False),
    Column("address", Text, nullable=False, unique=True),
    Column("gpu_name", Text, nullable=False),
    Column("gpu_vram", Integer, nullable=False),
)
