"""A journal as the version before made it (schema 3), with what two tasks left in it."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import create_engine, text

TASK, LOST, OPEN = "0x" + "ab" * 32, "0x" + "cd" * 32, "0x" + "12" * 32
ACCOUNT = "0x" + "11" * 20
ATTEMPT = "5fe68c04de8c"
SENT, REPLACED = "0x" + "ef" * 32, "0x" + "e0" * 32
PAID, BACK = 7 * 10**18 + 5, 3 * 10**12 + 1
HOUR = 480_000
"""Of its takings; it begins a day."""

_TABLES = (
    "CREATE TABLE lease (id INTEGER NOT NULL PRIMARY KEY, holder TEXT NOT NULL,"
    " epoch BIGINT NOT NULL, expires_at {double} NOT NULL)",
    "CREATE TABLE tasks (commitment TEXT NOT NULL PRIMARY KEY, last_seq BIGINT NOT NULL,"
    " closed_seq BIGINT, account TEXT NOT NULL, outcome TEXT, payment TEXT NOT NULL)",
    "CREATE INDEX ix_tasks_closed_seq ON tasks (closed_seq)",
    "CREATE INDEX ix_tasks_outcome ON tasks (outcome)",
    "CREATE TABLE task_events (seq {serial}, commitment TEXT NOT NULL, at {double} NOT NULL,"
    " kind TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX task_events_by_task ON task_events (commitment, seq)",
    "CREATE TABLE outbox (seq {serial}, key TEXT NOT NULL UNIQUE, account TEXT NOT NULL,"
    " task TEXT, claim TEXT, recipient TEXT NOT NULL, data {blob} NOT NULL, value TEXT NOT NULL,"
    " state TEXT NOT NULL, nonce BIGINT, raw {blob}, tx_hash TEXT, sent_at {double},"
    " updated_at {double} NOT NULL, reason TEXT NOT NULL, offer TEXT, block BIGINT, cost TEXT)",
    "CREATE INDEX ix_outbox_account ON outbox (account)",
    "CREATE INDEX ix_outbox_task ON outbox (task)",
    "CREATE INDEX ix_outbox_state ON outbox (state)",
    "CREATE INDEX outbox_by_nonce ON outbox (account, nonce)",
    "CREATE TABLE takings (hour BIGINT NOT NULL, account TEXT NOT NULL, tasks INTEGER NOT NULL,"
    " paid TEXT NOT NULL, gas TEXT NOT NULL, PRIMARY KEY (hour, account))",
    "CREATE TABLE bundles (seq {serial}, commitment TEXT NOT NULL, attempt TEXT NOT NULL,"
    " at {double} NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX ix_bundles_commitment ON bundles (commitment)",
    "CREATE TABLE audit (seq {serial}, at {double} NOT NULL, who TEXT NOT NULL,"
    " action TEXT NOT NULL, arguments TEXT NOT NULL, outcome TEXT NOT NULL)",
    "CREATE TABLE cursors (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE accounts (path_index INTEGER NOT NULL PRIMARY KEY, address TEXT NOT NULL UNIQUE,"
    " gpu_name TEXT NOT NULL, gpu_vram INTEGER NOT NULL)",
)
_TYPES = {
    "sqlite": {"double": "DOUBLE", "serial": "INTEGER PRIMARY KEY", "blob": "BLOB"},
    "postgresql": {"double": "FLOAT8", "serial": "BIGSERIAL PRIMARY KEY", "blob": "BYTEA"},
}
_EVENTS = (
    (TASK, 1.0, "seen", {"account": ACCOUNT, "fee": PAID, "model_ids": [], "task_type": 0}),
    (TASK, 2.0, "parameters_fetched", {"parameters": "{}"}),
    (TASK, 3.0, "attempt_started", {"attempt_id": ATTEMPT, "gpu_id": "n-0"}),
    (TASK, 4.0, "attempt_failed", {"attempt_id": ATTEMPT, "detail": "gone", "fault": "device"}),
    (TASK, 5.0, "closed", {"outcome": "EndSuccess", "payment": PAID}),
    (LOST, 6.0, "seen", {"account": ACCOUNT, "fee": 1, "model_ids": [], "task_type": 0}),
    (LOST, 7.0, "closed", {"outcome": "Lost", "payment": 0}),
    (
        "0x" + "12" * 32,
        8.0,
        "seen",
        {"account": ACCOUNT, "fee": 1, "model_ids": [], "task_type": 0},
    ),
)
_TASKS: tuple[tuple[str, int, int | None, str | None, int], ...] = (
    (TASK, 5, 5, "EndSuccess", PAID),
    (LOST, 7, 7, "Lost", 0),
    (OPEN, 8, None, None, 0),
)
_TAKINGS = ((HOUR, 2, PAID, 9), (HOUR + 23, 0, -BACK, 0), (HOUR + 24, -1, -5, 10**9))
_OUTBOX: tuple[tuple[str, str | None, str | None, str, str | None, Any], ...] = (
    (f"task:{TASK}:score", TASK, "score", "final", SENT, {"replaced": [REPLACED]}),
    (f"task:{LOST}:abort", LOST, "abort", "refused", None, None),
    (f"account:{ACCOUNT}:join:0", None, None, "mined", "0x01", {"replaced": []}),
)


def make(url: str) -> None:
    """In a database that is empty."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for statement in _TABLES:
            connection.execute(text(statement.format(**_TYPES[engine.dialect.name])))

        def put(table: str, **values: object) -> None:
            names = ", ".join(values)
            places = ", ".join(f":{name}" for name in values)
            statement = f"INSERT INTO {table} ({names}) VALUES ({places})"  # noqa: S608
            connection.execute(text(statement), values)

        put("lease", id=1, holder="", epoch=3, expires_at=0.0)
        put("cursors", key="schema", value="3")
        for task, at, kind, body in _EVENTS:
            put("task_events", commitment=task, at=at, kind=kind, body=json.dumps(body))
        for task, last, closed, outcome, paid in _TASKS:
            row = {"last_seq": last, "closed_seq": closed, "outcome": outcome}
            put("tasks", commitment=task, account=ACCOUNT, payment=str(paid), **row)
        for hour, tasks, paid, gas in _TAKINGS:
            sums = {"tasks": tasks, "paid": str(paid), "gas": str(gas)}
            put("takings", hour=hour, account=ACCOUNT, **sums)
        for key, of, claim, state, tx_hash, offer in _OUTBOX:
            said = None if offer is None else json.dumps({"fee": 1, "gas": 1, "at": 1.0, **offer})
            raw = None if tx_hash is None else b"raw"
            row = {"task": of, "claim": claim, "state": state, "tx_hash": tx_hash, "offer": said}
            fixed = {"recipient": ACCOUNT, "data": b"", "value": "0", "nonce": 1, "reason": ""}
            put("outbox", key=key, account=ACCOUNT, raw=raw, updated_at=1.0, **row, **fixed)
        put("bundles", commitment=TASK, attempt=ATTEMPT, at=4.0, body='{"gpu": "n-0"}')
    engine.dispose()
