"""Durable facts: the lease, every task's events, the outbox's rows, cursors, account assignments.

SQLite by default, PostgreSQL by URL, through the same statements. A write is one transaction that
begins by checking the lease's epoch, under a lock that no second writer passes: SQLite takes its
write lock at BEGIN IMMEDIATE, PostgreSQL locks the lease's row. So a coordinator that has lost the
lease can't write anything, however late it wakes up. Epochs only grow; each acquisition takes one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    case,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from cluster import journal_lease as lease_rows
from cluster import journal_takings as takings
from cluster import journal_tallies as tallies
from cluster.core import ports
from cluster.core.errors import ConfigError, IllegalMove
from cluster.core.record import (
    AttemptStarted,
    Closed,
    Event,
    Outcome,
    ParametersFetched,
    Seen,
    TaskRecord,
    apply,
    begin,
    fold,
)
from cluster.core.takings import Takings
from cluster.core.types import (
    Address,
    Commitment,
    GigaBytes,
    GpuClass,
    Timestamp,
    Wei,
)
from cluster.journal_engine import make_tables, open_engine
from cluster.journal_events import decode_event, encode_event
from cluster.journal_history import add_name
from cluster.journal_tables import (
    accounts_table,
    cursors_table,
    events_table,
    lease_table,
    outbox_table,
    tasks_table,
)
from cluster.journal_upgrades import SCHEMA, upgrade

_SLASHED = "slashed:"
"""Begins the key of a mark, among the cursors, that an account lost its stake."""
_CLEARED = "cleared:"
"""Begins the key of how many invalidated tasks of an account the operator has seen to."""
_OWNER = "owner"
HOST = "host"
"""The key, among the cursors, of the machine whose coordinator acted last."""
STANDING = "standing:"
"""Begins the key of what an account is expected to be (`cluster.core.standing`)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A derived account (by its index) and the class of GPU that it stands for."""

    index: int
    address: Address
    gpu_class: GpuClass


_BARE_KIND, _BARE_TEXT = encode_event(ParametersFetched(""))
_BARE_BODY = case(
    (events_table.c.kind == _BARE_KIND, _BARE_TEXT),
    else_=events_table.c.body,
)
"""An event's body, but for parameters their form alone."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose facts a journal holds, and of which contracts: to any other they mean nothing."""

    chain_id: int
    task: Address
    node: Address
    qos: Address
    treasury: Address


_OWNED = {
    "chain_id": "network.chain_id",
    "task": "network.contracts.task",
    "node": "network.contracts.node",
    "qos": "network.contracts.qos",
    "treasury": "identity.seed_file's account",
}
"""What an operator calls the fields of `Owner`."""


class SqlJournal:
    """`ports.Journal`, and the transactions in which the outbox and others keep their rows."""

    def __init__(
        self,
        url: str,
        look_only: bool = False,
        wall: Callable[[], float] = time.time,
        most: int | None = None,
    ) -> None:
        """Opens the database, and makes its tables where it is new; with `look_only` it is left as
        it is, and may be of another version. `wall` is this machine's clock; `most`: how many
        connections it may have. Raises `ConfigError`."""
        self._url = url
        self._wall = wall
        self._database = open_engine(url, look_only, most)
        self._folds: dict[Commitment, tuple[int, TaskRecord]] = {}
        self._assigned: tuple[int, tuple[Assignment, ...]] | None = None
        """With the epoch of the lease under which they were read."""
        if look_only:
            return
        try:
            self._prepare()
        except DBAPIError as error:
            raise ConfigError(f"the journal can't be opened: {error.orig}") from error

    def _prepare(self) -> None:
        with self._transaction() as connection:
            make_tables(connection)
        try:
            with self._transaction() as connection:
                if connection.execute(select(lease_table.c.id)).first() is None:
                    connection.execute(
                        insert(lease_table).values(id=1, holder="", epoch=0, expires_at=0.0)
                    )
                    connection.execute(insert(cursors_table).values(key="schema", value=SCHEMA))
        except IntegrityError:
            pass  # another process made the rows at the same moment
        with self._transaction() as connection:
            upgrade(connection)
        found = self.cursor("schema")
        if found != SCHEMA:
            raise ConfigError(f"the journal has schema {found}, this version needs {SCHEMA}")

    def reader(self, most: int) -> SqlJournal:
        """The same journal to look at only, by connections of its own."""
        return SqlJournal(self._url, look_only=True, wall=self._wall, most=most)

    def bind(self, owner: Owner) -> None:
        """Write down whose journal it is. Raises `ConfigError` when it holds another's facts; an
        empty one is anyone's."""
        with suppress(IntegrityError), self._transaction() as connection:
            # Suppressed: another process binds it at the same moment, and is compared with below.
            if _is_empty(connection):
                connection.execute(delete(cursors_table).where(cursors_table.c.key == _OWNER))
            known = connection.execute(
                select(cursors_table.c.value).where(cursors_table.c.key == _OWNER)
            ).scalar()
            if known is None:
                ours = json.dumps(asdict(owner), sort_keys=True)
                connection.execute(insert(cursors_table).values(key=_OWNER, value=ours))
        self._compare(owner)

    def check_owner(self, owner: Owner) -> None:
        """As `bind`, but nothing is written."""
        with self.read() as connection:
            if _is_empty(connection):
                return
        self._compare(owner)

    def schema(self) -> str | None:
        """Of the tables, as they are; None where there are none. Raises `ConfigError`."""
        try:
            with self.read() as connection:
                if not inspect(connection).has_table(cursors_table.name):
                    return None
            return self.cursor("schema")
        except DBAPIError as error:
            raise ConfigError(f"the journal can't be opened: {error.orig}") from error

    def _compare(self, owner: Owner) -> None:
        found = json.loads(self.cursor(_OWNER) or "{}")
        for name, value in asdict(owner).items():
            if found.get(name) != value:
                raise ConfigError(
                    f"journal.url: this journal was begun with {_OWNED[name]} {found.get(name)},"
                    f" now it is {value}: put the former back, or name another journal"
                )

    def close(self) -> None:
        self._database.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with (
            self._database.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def write(self, lease: ports.Lease) -> Iterator[Connection]:
        """A transaction under the lease; raises `LeaseLost`, having written nothing."""
        with self._transaction() as connection:
            lease_rows.check(connection, lease)
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._database.connect() as connection:
            yield connection

    # --- lease

    def acquire(self, holder: str, now: Timestamp, ttl: float) -> ports.Lease | None:
        with self._transaction() as connection:
            held = lease_rows.current(connection)
            now = lease_rows.common(connection, now, self._wall)
            if held.holder not in {"", holder} and held.expires_at > now:
                return None
            lease = ports.Lease(holder, held.epoch + 1, Timestamp(now + ttl))
            lease_rows.store(connection, lease)
            return lease

    def holder(self, now: float) -> tuple[str, float]:
        """Who holds the lease and for how many seconds more; an empty name when nobody does."""
        with self.read() as connection:
            held = connection.execute(select(lease_table)).one()
            now = lease_rows.common(connection, Timestamp(now), self._wall)
        left = held.expires_at - now
        return (held.holder, left) if held.holder and left > 0 else ("", 0.0)

    def renew(self, lease: ports.Lease, now: Timestamp, ttl: float) -> ports.Lease:
        with self.write(lease) as connection:
            ends = lease_rows.common(connection, now, self._wall) + ttl
            renewed = replace(lease, expires_at=Timestamp(ends))
            lease_rows.store(connection, renewed)
            return renewed

    def release(self, lease: ports.Lease) -> None:
        with self.write(lease) as connection:
            lease_rows.store(connection, replace(lease, holder="", expires_at=Timestamp(0)))

    # --- tasks

    def append(
        self, lease: ports.Lease, task: Commitment, event: Event, at: Timestamp
    ) -> TaskRecord:
        """As the port says; raises `IllegalMove` for an event that can't follow those stored."""
        with self.write(lease) as connection:
            before = self._record(connection, task)
            after = _after(task, before, event, at)
            kind, body = encode_event(event)
            written = connection.execute(
                insert(events_table).values(commitment=task, at=at, kind=kind, body=body)
            )
            seq = int(_inserted(written.inserted_primary_key))
            _mark(connection, after, seq, first=before is None)
            tallies.follow(connection, before, after)
            if isinstance(event, AttemptStarted):
                add_name(connection, task, event.attempt_id)
        # Only now: a transaction that fails must not leave a fold of what was never stored.
        if isinstance(event, Closed):
            self._folds.pop(task, None)
        else:
            self._folds[task] = (seq, after)
        return after

    def _record(self, connection: Connection, task: Commitment) -> TaskRecord | None:
        """The task's fold; a cached one only if nothing was stored since by anyone."""
        last = connection.execute(
            select(tasks_table.c.last_seq).where(tasks_table.c.commitment == task)
        ).scalar()
        if last is None:
            return None
        cached = self._folds.get(task)
        if cached is not None and cached[0] == last:
            return cached[1]
        return fold(task, _history(connection, task))

    def open_records(self) -> tuple[TaskRecord, ...]:
        with self.read() as connection:
            opened = (
                select(tasks_table.c.commitment)
                .where(tasks_table.c.closed_seq.is_(None))
                .order_by(tasks_table.c.last_seq)
            )
            return self._records(connection, connection.execute(opened))

    def recent_records(self, limit: int) -> tuple[TaskRecord, ...]:
        with self.read() as connection:
            closed = (
                select(tasks_table.c.commitment)
                .where(tasks_table.c.closed_seq.is_not(None))
                .order_by(tasks_table.c.closed_seq.desc())
                .limit(limit)
            )
            tasks = [Commitment(row.commitment) for row in connection.execute(closed)]
            # The database leaves their parameters out, which may be large.
            records = (fold(task, _history(connection, task, _BARE_BODY)) for task in tasks)
            return tuple(replace(record, parameters=None) for record in records)

    def totals(self) -> tuple[Counter[Outcome], Wei]:
        """Closed tasks by outcome, and what they paid in all."""
        with self.read() as connection:
            found = tallies.of(connection, tallies.OUTCOMES)
        outcomes = Counter({Outcome(name): each.count for name, each in found.items()})
        return outcomes, Wei(sum(each.wei for each in found.values()))

    def slashed_accounts(self) -> frozenset[Address]:
        """Accounts that lost their stake, marked so or by a task closed as invalidated, and that
        the operator hasn't cleared since."""
        with self.read() as connection:
            cleared = _cursors(connection, _CLEARED)
            lost = {
                account
                for account, count in _invalidated(connection).items()
                if count > int(cleared.get(account, "0"))
            }
            return frozenset(map(Address, lost | _cursors(connection, _SLASHED).keys()))

    def mark_slashed(self, lease: ports.Lease, account: Address, at: Timestamp) -> None:
        """Remember that the account lost its stake, whatever becomes of its task's record."""
        self.set_cursor(lease, f"{_SLASHED}{account}", str(at))

    def clear_slashed(self, lease: ports.Lease, account: Address) -> None:
        """The operator knows: the account may be staked again. Its tasks' stories stay."""
        with self.write(lease) as connection:
            connection.execute(
                delete(cursors_table).where(cursors_table.c.key == f"{_SLASHED}{account}")
            )
            count = str(_invalidated(connection).get(account, 0))
            _set_cursor(connection, f"{_CLEARED}{account}", count)

    def _records(self, connection: Connection, found: Any) -> tuple[TaskRecord, ...]:
        tasks = [Commitment(row.commitment) for row in found]
        records = (self._record(connection, task) for task in tasks)
        return tuple(record for record in records if record is not None)

    def takings(self, span: int, first: int, last: int) -> Takings:
        """What came in and what gas went out: `journal_takings.between`."""
        with self.read() as connection:
            return takings.between(connection, span, first, last)

    def story(self, task: Commitment) -> tuple[tuple[Event, Timestamp], ...]:
        with self.read() as connection:
            return _history(connection, task)

    # --- cursors and accounts

    def cursor(self, key: str) -> str | None:
        with self.read() as connection:
            return connection.execute(
                select(cursors_table.c.value).where(cursors_table.c.key == key)
            ).scalar()

    def cursors(self, prefix: str) -> Mapping[str, str]:
        """All whose keys begin so, by what follows."""
        with self.read() as connection:
            return _cursors(connection, prefix)

    def set_cursor(self, lease: ports.Lease, key: str, value: str) -> None:
        with self.write(lease) as connection:
            _set_cursor(connection, key, value)

    def assign(self, lease: ports.Lease, assignment: Assignment) -> None:
        """Store an account's class, or change it. Raises `IllegalMove` for another address."""
        values = {
            "gpu_name": assignment.gpu_class.name,
            "gpu_vram": assignment.gpu_class.vram,
        }
        index, address = accounts_table.c.path_index, assignment.address
        with self.write(lease) as connection:
            found = connection.execute(
                select(accounts_table.c.address).where(index == assignment.index)
            ).scalar()
            if found is None:
                connection.execute(
                    insert(accounts_table).values(
                        path_index=assignment.index, address=address, **values
                    )
                )
            elif found == address:
                connection.execute(
                    update(accounts_table).where(index == assignment.index).values(**values)
                )
            else:
                raise IllegalMove(f"account {assignment.index} is {found}, not {address}")
        self._assigned = None

    def assigned(self, lease: ports.Lease) -> tuple[Assignment, ...]:
        """As `assignments`, for the lease's holder: while it is held nobody else writes them, so
        they are read once."""
        if self._assigned is None or self._assigned[0] != lease.epoch:
            self._assigned = lease.epoch, self.assignments()
        return self._assigned[1]

    def assignments(self) -> tuple[Assignment, ...]:
        with self.read() as connection:
            rows = connection.execute(select(accounts_table).order_by(accounts_table.c.path_index))
            return tuple(
                Assignment(
                    row.path_index,
                    Address(row.address),
                    GpuClass(row.gpu_name, GigaBytes(row.gpu_vram)),
                )
                for row in rows
            )


def _is_empty(connection: Connection) -> bool:
    facts = (tasks_table.c.commitment, outbox_table.c.seq, accounts_table.c.address)
    return all(connection.execute(select(each).limit(1)).first() is None for each in facts)


def _cursors(connection: Connection, prefix: str) -> dict[str, str]:
    query = select(cursors_table).where(cursors_table.c.key.startswith(prefix, autoescape=True))
    return {row.key.removeprefix(prefix): row.value for row in connection.execute(query)}


def _set_cursor(connection: Connection, key: str, value: str) -> None:
    changed = connection.execute(
        update(cursors_table).where(cursors_table.c.key == key).values(value=value)
    )
    if changed.rowcount == 0:
        connection.execute(insert(cursors_table).values(key=key, value=value))


def _invalidated(connection: Connection) -> dict[str, int]:
    """How many tasks cost each account its stake."""
    query = (
        select(tasks_table.c.account, func.count())
        .where(tasks_table.c.outcome == Outcome.INVALIDATED.value)
        .group_by(tasks_table.c.account)
    )
    return {account: count for account, count in connection.execute(query)}


def _after(task: Commitment, before: TaskRecord | None, event: Event, at: Timestamp) -> TaskRecord:
    if before is not None:
        return apply(before, event, at)
    if not isinstance(event, Seen):
        raise IllegalMove(f"{task}: a history begins with Seen, not {type(event).__name__}")
    return begin(task, event, at)


def _mark(connection: Connection, record: TaskRecord, seq: int, first: bool) -> None:
    """Keep the task's row in step with its history."""
    outcome = record.outcome
    values = {
        "last_seq": seq,
        "closed_seq": None if outcome is None else seq,
        "account": record.account,
        "outcome": None if outcome is None else outcome.value,
        "payment": str(record.payment),
    }
    task = record.commitment
    if first:
        connection.execute(insert(tasks_table).values(commitment=task, **values))
    else:
        connection.execute(
            update(tasks_table).where(tasks_table.c.commitment == task).values(**values)
        )


def _history(
    connection: Connection, task: Commitment, body: ColumnElement[str] = events_table.c.body
) -> tuple[tuple[Event, Timestamp], ...]:
    rows = connection.execute(
        select(events_table.c.at, events_table.c.kind, body.label("body"))
        .where(events_table.c.commitment == task)
        .order_by(events_table.c.seq)
    )
    return tuple((decode_event(row.kind, row.body), Timestamp(row.at)) for row in rows)


def _inserted(key: Row[Any] | None) -> Any:
    assert key is not None, "one row was inserted"  # noqa: S101
    return key[0]
