"""The journal's database: opened, tuned, its tables made and upgraded. SQLite or PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from cluster import quarantine_rows
from cluster.core.errors import ConfigError
from cluster.journal_tables import cursors_table, metadata, outbox_table

SCHEMA = "3"
_UPGRADES = {
    "1": (
        "ALTER TABLE outbox ADD COLUMN offer TEXT",
        "ALTER TABLE outbox ADD COLUMN block BIGINT",
    ),
    "2": ("ALTER TABLE outbox ADD COLUMN cost TEXT",),
}
"""By the schema that a journal has: what makes the next one of it."""
_SWITCH_TRIES = 100
_MAKING = 0x63727978
"""PostgreSQL's advisory lock of whoever makes the tables; any number that is nobody else's."""


def open_engine(url: str, look_only: bool = False) -> Engine:
    """`look_only`: nothing is made or written, whatever is asked of it."""
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(
                drivername="postgresql+psycopg"
            )  # the driver that is ours to install
        engine = create_engine(
            parsed,
            pool_pre_ping=not url.startswith("sqlite"),
            # They are in the text of errors otherwise, and prompts among them.
            hide_parameters=True,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the journal's URL needs a package that isn't installed ({error.name}); "
            "for PostgreSQL: pip install '.[postgres]'"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"the journal's URL can't be used: {error}") from error
    if engine.dialect.name == "sqlite":
        if look_only:
            _only_look(engine)
            return engine
        _make_folder(parsed.database)
        _tune_sqlite(engine)
    return engine


def file_of(url: str) -> Path | None:
    """Of a database that is a file."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _only_look(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        for pragma in ("busy_timeout=5000", "query_only=ON"):
            connection.execute(f"PRAGMA {pragma}")


def _make_folder(database: str | None) -> None:
    if not database or database == ":memory:":
        return
    try:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the journal's folder can't be made: {error}") from error


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # The driver's own implicit BEGIN would come too late to be IMMEDIATE.
        connection.isolation_level = None
        for pragma in ("busy_timeout=30000", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        _write_ahead(connection)

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def upgrade(connection: Connection) -> None:
    """One version after the other, each whole or not at all; what is newer is left alone."""
    place = cursors_table.c.key == "schema"
    while True:
        found = connection.execute(select(cursors_table.c.value).where(place)).scalar() or ""
        if found not in _UPGRADES:
            return
        for statement in _UPGRADES[found]:
            connection.execute(text(statement))
        newer = str(int(found) + 1)
        connection.execute(update(cursors_table).where(place).values(value=newer))


def _write_ahead(connection: Any) -> None:
    """The file's mode for good. The switch waits for no lock, whatever the timeout, so while
    another process makes it, it is tried again."""
    for _ in range(_SWITCH_TRIES):
        with suppress(sqlite3.OperationalError):
            if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal":
                return
        time.sleep(0.05)
    connection.execute("PRAGMA journal_mode=WAL")


def make_tables(connection: Connection) -> None:
    """Those that aren't there."""
    if connection.dialect.name == "postgresql":
        # "If it isn't there" is no protection there from another who finds the same.
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MAKING})"))
    metadata.create_all(connection)
    for index in outbox_table.indexes:
        # A table that was there already has those that it was made with.
        index.create(connection, checkfirst=True)
    quarantine_rows.metadata.create_all(connection)
