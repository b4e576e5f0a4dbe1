"""What the devnet's relay keeps and what it owes the chain.

An upload and the report of it that is owed are stored in one transaction; a thread pays the
reports, so a relay that restarts owes and pays the same ones. A report is due only while the chain
is in the state before it, so none is ever made twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_account import Account
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3Exception

from cluster.chain.abi import TASK_ABI
from cluster.core.types import Commitment, TaskStatus
from devnet.tasks import ChainTask, fees, from_chain

log = logging.getLogger(__name__)

VALIDATED = frozenset({TaskStatus.VALIDATED, TaskStatus.GROUP_VALIDATED})
_REPORT_GAS = 3_000_000
_REPORTS_A_TURN = 8

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
  commitment TEXT PRIMARY KEY, task_args TEXT NOT NULL, creator TEXT NOT NULL,
  selected_node TEXT NOT NULL, results INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS reports (
  commitment TEXT NOT NULL, kind TEXT NOT NULL, pending INTEGER NOT NULL DEFAULT 1,
  PRIMARY KEY (commitment, kind)) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Row:
    commitment: Commitment
    task_args: str
    creator: str
    selected_node: str
    results: int


@dataclass(frozen=True, slots=True)
class Report:
    commitment: Commitment
    kind: str
    """`parameters` or `result`."""


_CALLS = {"parameters": "reportTaskParametersUploaded", "result": "reportTaskResultUploaded"}
_DUE = {"parameters": frozenset({TaskStatus.STARTED}), "result": VALIDATED}


class Store:
    """Uploads and owed reports. One connection, one lock."""

    def __init__(self, data_dir: Path) -> None:
        self._dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(
            data_dir / "relay.sqlite3", check_same_thread=False, isolation_level=None
        )
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _SCHEMA)
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def task(self, commitment: str) -> Row | None:
        with self._lock:
            row = self._db.execute(
                "SELECT commitment, task_args, creator, selected_node, results FROM tasks"
                " WHERE commitment = ?",
                (commitment,),
            ).fetchone()
        return None if row is None else Row(*row)

    def add_task(self, commitment: str, args: str, creator: str, node: str) -> bool:
        """False when it was there already."""
        with self._transaction() as db:
            added = db.execute(
                "INSERT OR IGNORE INTO tasks (commitment, task_args, creator, selected_node)"
                " VALUES (?, ?, ?, ?)",
                (commitment, args, creator, node),
            ).rowcount
            if added:
                db.execute(
                    "INSERT INTO reports (commitment, kind) VALUES (?, 'parameters')",
                    (commitment,),
                )
        return bool(added)

    def add_results(self, commitment: str, count: int) -> None:
        with self._transaction() as db:
            db.execute("UPDATE tasks SET results = ? WHERE commitment = ?", (count, commitment))
            db.execute(
                "INSERT OR IGNORE INTO reports (commitment, kind) VALUES (?, 'result')",
                (commitment,),
            )

    def pending(self, limit: int) -> list[Report]:
        with self._lock:
            rows = self._db.execute(
                "SELECT commitment, kind FROM reports WHERE pending = 1 ORDER BY rowid LIMIT ?",
                (limit,),
            ).fetchall()
        return [Report(*row) for row in rows]

    def settle(self, report: Report) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE reports SET pending = 0 WHERE commitment = ? AND kind = ?",
                (report.commitment, report.kind),
            )

    def path(self, commitment: str, name: str) -> Path:
        return self._dir / "tasks" / commitment / name

    def write(self, commitment: str, name: str, data: bytes) -> None:
        """On return the whole file is there under its name."""
        path = self.path(commitment, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


class Chain:
    """The task contract as the relay uses it; blocking."""

    def __init__(self, rpc_url: str, task_contract: str, relay_key: str) -> None:
        self._web3 = Web3(HTTPProvider(rpc_url, request_kwargs={"timeout": 10}))
        self._contract: Any = self._web3.eth.contract(
            address=Web3.to_checksum_address(task_contract), abi=TASK_ABI
        )
        self._account: Any = Account.from_key(relay_key)

    def task(self, commitment: str) -> ChainTask | None:
        return from_chain(self._contract.functions.getTask(bytes.fromhex(commitment[2:])).call())

    def send(self, reports: Sequence[Report]) -> None:
        """Send the reports, in order, and wait until they are in blocks."""
        eth = self._web3.eth
        nonce = eth.get_transaction_count(self._account.address, "latest")
        fields = {"gas": _REPORT_GAS, "chainId": eth.chain_id} | fees(eth.get_block("latest"))
        hashes = []
        for offset, report in enumerate(reports):
            call = self._contract.functions[_CALLS[report.kind]]
            transaction = call(bytes.fromhex(report.commitment[2:])).build_transaction(
                {"from": self._account.address, "nonce": nonce + offset, **fields}
            )
            signed = self._account.sign_transaction(transaction)
            hashes.append(eth.send_raw_transaction(signed.raw_transaction))
        for sent in hashes:
            eth.wait_for_transaction_receipt(sent, timeout=30)


class Reporter:
    """Pays the owed reports from a thread of its own."""

    def __init__(self, store: Store, chain: Chain, pause_seconds: float = 0.5) -> None:
        self._store = store
        self._chain = chain
        self._pause = pause_seconds
        self._owed = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay-reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._owed.set()
        self._thread.join()

    def wake(self) -> None:
        self._owed.set()

    def turn(self) -> bool:
        """One turn: settle what isn't due any more, send what is. Whether anything was sent."""
        due = []
        for report in self._store.pending(_REPORTS_A_TURN):
            task = self._chain.task(report.commitment)
            if task is not None and task.status in _DUE[report.kind]:
                due.append(report)
            else:
                self._store.settle(report)
        if due:
            self._chain.send(due)
        return bool(due)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._owed.clear()
            try:
                busy = self.turn()
            except (Web3Exception, OSError, ValueError) as error:
                log.warning("relay: reporting failed, trying again: %s", error)
                self._stopped.wait(self._pause)
                continue
            if not busy:
                self._owed.wait(self._pause)
