"""The journal's database: opened, tuned, its tables made. SQLite or PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from cluster import quarantine_rows
from cluster.core.errors import ConfigError
from cluster.journal_tables import metadata

_SWITCH_TRIES = 100
LONGEST_LOOK_MS = 30_000
_MAKING = 0x63727978
"""PostgreSQL's advisory lock of whoever makes the tables; any number that is nobody else's."""

_PATIENCE = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""libpq's, in seconds and, of the last, milliseconds: a server or a network that swallows what it
is sent is an error after some ten seconds, not after the quarter of an hour of the kernel's."""
_BY_LIBPQ = frozenset({"psycopg", "psycopg2"})


def open_engine(url: str, look_only: bool = False, most: int | None = None) -> Engine:
    """`look_only`: nothing is made or written, whatever is asked of it. `most`: how many
    connections it has at a time. A URL's own options go before `_PATIENCE`."""
    pool: dict[str, Any] = {} if most is None else {"pool_size": most, "max_overflow": 0}
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(
                drivername="postgresql+psycopg"
            )  # the driver that is ours to install
        if _takes_patience(parsed):
            parsed = parsed.set(query={**_PATIENCE, **parsed.query})
        engine = create_engine(
            parsed,
            pool_pre_ping=not url.startswith("sqlite"),
            # They are in the text of errors otherwise, and prompts among them.
            hide_parameters=True,
            **pool,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the journal's URL needs a package that isn't installed ({error.name}); "
            "for PostgreSQL: pip install '.[postgres]'"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"the journal's URL can't be used: {error}") from error
    if look_only:
        _only_look(engine)
    elif engine.dialect.name == "sqlite":
        _make_folder(parsed.database)
        _tune_sqlite(engine)
    return engine


def _takes_patience(url: URL) -> bool:
    return url.get_backend_name() == "postgresql" and url.get_driver_name() in _BY_LIBPQ


def file_of(url: str) -> Path | None:
    """Of a database that is a file."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _only_look(engine: Engine) -> None:
    settings: tuple[str, ...] = ("PRAGMA busy_timeout=5000", "PRAGMA query_only=ON")
    if engine.dialect.name == "postgresql":
        settings = (
            "SET default_transaction_read_only = on",
            # Who asked has given up long before.
            f"SET statement_timeout = {LONGEST_LOOK_MS}",
        )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        for setting in settings:
            connection.execute(setting)
        connection.commit()


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
    quarantine_rows.metadata.create_all(connection)
