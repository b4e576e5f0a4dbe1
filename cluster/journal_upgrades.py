"""What makes the journal's tables of one version those of the next, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import Connection, inspect, select, text, update

from cluster import journal_tallies as tallies
from cluster.core.types import Wei
from cluster.journal_tables import MICRO, cursors_table, metadata

SCHEMA = "4"
_COLUMNS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "1": (("outbox", "offer", "TEXT"), ("outbox", "block", "BIGINT")),
    "2": (("outbox", "cost", "TEXT"),),
    "3": (
        ("bundles", "gpu", "TEXT NOT NULL DEFAULT ''"),
        ("bundles", "fault", "TEXT NOT NULL DEFAULT ''"),
    ),
}
"""By the schema that a journal has: the tables' columns, with their types, that the next one has
more. Whole tables are there by then."""


def upgrade(connection: Connection) -> None:
    """One version after the other, all of them or none; what is newer is left alone."""
    place = cursors_table.c.key == "schema"
    # Locked, where a transaction alone keeps no other out that upgrades.
    query = select(cursors_table.c.value).where(place).with_for_update()
    found = connection.execute(query).scalar() or ""
    while found in _COLUMNS:
        for column in _COLUMNS[found]:
            _add_column(connection, *column)
        if found == "3":
            for statement in _filled(connection):
                connection.execute(text(statement))
            _count(connection)
        found = str(int(found) + 1)
        connection.execute(update(cursors_table).where(place).values(value=found))
    if found == SCHEMA:
        _make_indexes(connection)


def _add_column(connection: Connection, table: str, column: str, kind: str) -> None:
    """A table that wasn't there was made with it."""
    if all(each["name"] != column for each in inspect(connection).get_columns(table)):
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {column} {kind}"))


def _make_indexes(connection: Connection) -> None:
    """A table that was there already has those that it was made with."""
    for table in metadata.tables.values():
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _filled(connection: Connection) -> Iterator[str]:
    """What puts into the new tables what follows from the others."""
    yield from _names(connection)
    if inspect(connection).has_table("takings"):
        yield from _sums()


def _sums() -> Iterator[str]:
    """By the hour as they were, and by the day. The former table is left to whoever acts still."""
    amounts = ", ".join((*_parts("paid"), *_parts("gas")))
    names = ("tasks", "paid_micro", "paid_wei", "gas_micro", "gas_wei")
    hours = f"SELECT 3600, hour, account, tasks, {amounts} FROM takings"  # noqa: S608
    yield f"INSERT INTO earned (span, number, account, {', '.join(names)}) {hours}"  # noqa: S608
    sums = ", ".join(f"SUM({name})" for name in names)
    yield (
        f"INSERT INTO earned (span, number, account, {', '.join(names)})"  # noqa: S608
        f" SELECT 86400, number / 24, account, {sums} FROM earned WHERE span = 3600"
        " GROUP BY number / 24, account"
    )


def _count(connection: Connection) -> None:
    micro, wei = _parts("payment")
    closed = (
        f"SELECT outcome, COUNT(*), SUM({micro}), SUM({wei}) FROM tasks"  # noqa: S608
        " WHERE closed_seq IS NOT NULL GROUP BY outcome"
    )
    for outcome, count, whole, rest in connection.execute(text(closed)):
        paid = Wei(int(whole) * MICRO + int(rest))
        tallies.add(connection, tallies.OUTCOMES, outcome, count, paid)
    states = "SELECT state, COUNT(*) FROM outbox WHERE state IN ('final', 'reverted', 'refused')"
    for state, count in connection.execute(text(f"{states} GROUP BY state")):
        tallies.add(connection, "outbox", state, count)


def _parts(column: str) -> tuple[str, str]:
    """Of wei as a text, perhaps with a sign: how many `MICRO`, and the rest."""
    sign = f"(CASE WHEN substr({column}, 1, 1) = '-' THEN -1 ELSE 1 END)"
    digits = f"ltrim({column}, '-')"
    long = f"length({digits}) > 12"
    first = f"CAST(substr({digits}, 1, length({digits}) - 12) AS BIGINT)"
    begins = f"CASE WHEN {long} THEN length({digits}) - 11 ELSE 1 END"
    rest = f"CAST(substr({digits}, {begins}) AS BIGINT)"
    return f"{sign} * CASE WHEN {long} THEN {first} ELSE 0 END", f"{sign} * {rest}"


def _names(connection: Connection) -> Iterator[str]:
    """Of attempts, and of transactions that others took the place of."""
    if connection.dialect.name == "postgresql":
        attempt = "CAST(body AS json) ->> 'attempt_id'"
        replaced = "CROSS JOIN LATERAL json_array_elements_text(CAST(offer AS json) -> 'replaced')"
        each = "AS former(value)"
    else:
        attempt = "json_extract(body, '$.attempt_id')"
        replaced, each = "CROSS JOIN json_each(offer, '$.replaced')", "AS former"
    yield (
        f"INSERT INTO task_names SELECT DISTINCT {attempt}, commitment FROM task_events"  # noqa: S608
        " WHERE kind = 'attempt_started'"
    )
    yield (
        f"INSERT INTO task_names SELECT DISTINCT former.value, task FROM outbox {replaced} {each}"  # noqa: S608
        " WHERE task IS NOT NULL AND offer IS NOT NULL"
    )
