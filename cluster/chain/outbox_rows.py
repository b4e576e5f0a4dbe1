"""The outbox's rows in the journal, and the pure rules on how a row may move."""

from __future__ import annotations

import enum
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Select, func, insert, select, update

from cluster import journal_tallies as tallies
from cluster.chain.fees import Offer
from cluster.chain.reverts import Verdict, verdict
from cluster.core.errors import IllegalMove
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Movement
from cluster.core.record import Claim
from cluster.core.types import Address, Commitment, Timestamp, Wei
from cluster.journal_history import add_name
from cluster.journal_tables import outbox_table as table


class RowState(enum.Enum):
    """NEW → SIGNED → SENT → MINED → FINAL, or REVERTED, or NEW → REFUSED with nothing ever sent.

    MINED goes back to SENT when its block is replaced by another without it.
    """

    NEW = "new"
    SIGNED = "signed"
    """Nonce and bytes are stored; from here on they may be on the chain at any moment."""
    SENT = "sent"
    MINED = "mined"
    """In a block that may yet be replaced."""
    FINAL = "final"
    """So deep that it is counted on."""
    REVERTED = "reverted"
    REFUSED = "refused"
    """The simulation reverted, or another transaction took the nonce."""


IN_FLIGHT = frozenset({RowState.SIGNED, RowState.SENT})
UNRESOLVED = IN_FLIGHT | {RowState.NEW, RowState.MINED}
IN_THE_CHAIN = frozenset({RowState.MINED, RowState.FINAL})
REFUSED = frozenset({RowState.REFUSED, RowState.REVERTED})
FILL = "fill"
"""The verb of a transfer of nothing, which stands for a nonce that is missing."""
_STATES = "outbox"
"""The kind of the tallies of rows that are done with."""
REPORT = "model"
"""The verb of a write that says which model an account holds."""
LONGEST_WAIT = 900.0
"""Seconds, before an account's own write is tried again, however often it was refused."""
_ANSWERS = frozenset({Claim.SCORE, Claim.ERROR})

WRITE_STATES: Mapping[RowState, WriteState] = {
    RowState.NEW: WriteState.OPEN,
    RowState.SIGNED: WriteState.OPEN,
    RowState.SENT: WriteState.OPEN,
    RowState.MINED: WriteState.DONE,
    RowState.FINAL: WriteState.DONE,
    RowState.REVERTED: WriteState.REFUSED,
    RowState.REFUSED: WriteState.REFUSED,
}


@dataclass(frozen=True, slots=True)
class Intent:
    """A transaction that must come to be once. `key` is its identity."""

    key: str
    account: Address
    recipient: Address
    data: bytes
    value: Wei = Wei(0)
    task: Commitment | None = None
    claim: Claim | None = None

    @property
    def is_answer(self) -> bool:
        return self.claim in _ANSWERS

    @property
    def verb(self) -> str:
        """Of an account's own write: what it does, or what a payment is for."""
        return self.key.split(":")[2]


def task_intent(
    account: Address, task: Commitment, claim: Claim, recipient: Address, data: bytes
) -> Intent:
    key = f"task:{task}:{claim.value}"
    return Intent(key, account, recipient, data, task=task, claim=claim)


@dataclass(frozen=True, slots=True)
class Signed:
    """The bytes that are sent. `replaced` are the hashes of those that they replace: of all of
    them, which have one nonce, one is mined at most. `offer` and `gas` are 0 where an older version
    signed. `block`: the chain's newest when it was signed; `mined`: the one that it was last seen
    in, also when that was taken back."""

    nonce: int
    raw: bytes
    tx_hash: str
    offer: Offer = Offer(Wei(0))  # noqa: RUF009 - frozen
    gas: int = 0
    at: Timestamp = Timestamp(0.0)
    replaced: tuple[str, ...] = ()
    block: int = 0
    mined: int | None = None

    @property
    def hashes(self) -> tuple[str, ...]:
        """The newest first."""
        return (self.tx_hash, *reversed(self.replaced))


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """`sent_at`: the last broadcast; `updated_at`: when the state last changed; `block`: where it
    was mined."""

    seq: int
    intent: Intent
    state: RowState
    signed: Signed | None
    sent_at: Timestamp | None
    updated_at: Timestamp
    reason: str
    block: int | None = None
    cost: Wei = Wei(0)
    """Of its gas, as far as it was mined."""

    @property
    def order(self) -> tuple[bool, int, bool, int]:
        """Those that have a nonce by nonce; then tasks' writes before the account's own, by age."""
        nonce = 0 if self.signed is None else self.signed.nonce
        return self.signed is None, nonce, self.intent.task is None, self.seq


@dataclass(frozen=True, slots=True)
class Patience:
    """`retry`: seconds before a refused row is tried again; `recheck`: before one that was mined,
    but that the caller still misses, is looked for again (its block may have been replaced), and
    before one is tried again that the contract says is done or lost."""

    retry: float
    recheck: float

    def of_own(self, refused: int) -> float:
        """Of an account's own write, which was refused so often in a row: it has no deadline, and
        what refuses it rarely passes in a second. What reverts costs gas each time."""
        return min(self.recheck * 2.0 ** min(refused - 1, 10), LONGEST_WAIT)

    def after(self, reason: str) -> float:
        hopeless = verdict(reason) in {Verdict.DONE, Verdict.LOST}
        return self.recheck if hopeless else self.retry


def rearm(
    row: OutboxRow, intent: Intent, now: Timestamp, patience: Patience, refused: int = 1
) -> OutboxRow:
    """The row after another `ensure`; the row itself when nothing changes. `refused`: how often in
    a row it was.

    Raises `IllegalMove` when a task's answer would become another one.
    """
    same = replace(row.intent, key=intent.key) == intent
    if not same and (intent.is_answer or row.intent.is_answer):
        raise IllegalMove(f"{intent.key}: another answer than the one stored")
    age = now - row.updated_at
    if age < 0:
        age = float("inf")  # the clock was set back: nothing waits for as long
    wait = patience.of_own(refused) if intent.task is None else patience.after(row.reason)
    if row.state in REFUSED and age >= wait:
        return replace(
            row,
            intent=intent,
            state=RowState.NEW,
            signed=None,
            sent_at=None,
            updated_at=now,
            reason="",
            block=None,
            cost=Wei(0),
        )
    mined = row.state in IN_THE_CHAIN
    if mined and intent.task is not None and age >= patience.recheck:
        return replace(row, state=RowState.SENT, updated_at=now, block=None)
    return row


def check_sole_answer(intent: Intent, others: tuple[OutboxRow, ...]) -> None:
    """Raises `IllegalMove` when the task has the other kind of answer already, in any state."""
    if intent.is_answer and any(row.intent.is_answer for row in others):
        raise IllegalMove(f"{intent.key}: the task has another answer already")


# --- storage ------------------------------------------------------------------------------------


def _row(found: Any) -> OutboxRow:
    intent = Intent(
        key=found.key,
        account=Address(found.account),
        recipient=Address(found.recipient),
        data=found.data,
        value=Wei(int(found.value)),
        task=None if found.task is None else Commitment(found.task),
        claim=None if found.claim is None else Claim(found.claim),
    )
    signed = None if found.raw is None else _signed(found)
    sent_at = None if found.sent_at is None else Timestamp(found.sent_at)
    return OutboxRow(
        found.seq,
        intent,
        RowState(found.state),
        signed,
        sent_at,
        Timestamp(found.updated_at),
        found.reason,
        found.block,
        Wei(int(found.cost or 0)),
    )


def _signed(found: Any) -> Signed:
    said = json.loads(found.offer) if found.offer else {"fee": 0, "gas": 0, "at": found.updated_at}
    tip = said.get("tip")
    return Signed(
        found.nonce,
        found.raw,
        found.tx_hash,
        Offer(Wei(said["fee"]), None if tip is None else Wei(tip)),
        said["gas"],
        Timestamp(said["at"]),
        tuple(said.get("replaced", ())),
        said.get("block", 0),
        said.get("mined"),
    )


def _offer_text(signed: Signed) -> str:
    said = {"fee": signed.offer.fee, "tip": signed.offer.tip, "gas": signed.gas, "at": signed.at}
    where = {"block": signed.block, "mined": signed.mined}
    return json.dumps({**said, **where, "replaced": signed.replaced})


def _columns(row: OutboxRow) -> dict[str, object]:
    intent, signed = row.intent, row.signed
    return {
        "key": intent.key,
        "account": intent.account,
        "task": intent.task,
        "claim": None if intent.claim is None else intent.claim.value,
        "recipient": intent.recipient,
        "data": intent.data,
        "value": str(intent.value),
        "state": row.state.value,
        "nonce": None if signed is None else signed.nonce,
        "raw": None if signed is None else signed.raw,
        "tx_hash": None if signed is None else signed.tx_hash,
        "sent_at": row.sent_at,
        "updated_at": row.updated_at,
        "reason": row.reason,
        "offer": None if signed is None else _offer_text(signed),
        "block": row.block,
        "cost": str(row.cost),
    }


def _rows(connection: Connection, query: Select[Any]) -> tuple[OutboxRow, ...]:
    return tuple(_row(found) for found in connection.execute(query.order_by(table.c.seq)))


def by_key(connection: Connection, key: str) -> OutboxRow | None:
    return next(iter(_rows(connection, select(table).where(table.c.key == key))), None)


def of_task(connection: Connection, task: Commitment) -> tuple[OutboxRow, ...]:
    return _rows(connection, select(table).where(table.c.task == task))


def unresolved(connection: Connection) -> tuple[OutboxRow, ...]:
    states = [state.value for state in UNRESOLVED]
    return _rows(connection, select(table).where(table.c.state.in_(states)))


def due(connection: Connection, deep: int | None) -> tuple[OutboxRow, ...]:
    """Those that something can be done for: of what was mined, what lies as `deep` or deeper; none
    of that where the head isn't known."""
    waiting = table.c.state.in_([state.value for state in UNRESOLVED - {RowState.MINED}])
    if deep is None:
        return _rows(connection, select(table).where(waiting))
    mined = table.c.state == RowState.MINED.value
    reached = table.c.block.is_(None) | (table.c.block <= deep)
    return _rows(connection, select(table).where(waiting | (mined & reached)))


def highest_nonce(
    connection: Connection,
    account: Address,
    states: frozenset[RowState] | None = None,
    since: float | None = None,
) -> int | None:
    """Of the account's rows, those in `states` that changed after `since` where that is said. Read
    from the highest down: it is most often the first."""
    query = select(table.c.nonce).where(table.c.account == account, table.c.nonce.is_not(None))
    if states is not None:
        query = query.where(table.c.state.in_([state.value for state in states]))
    if since is not None:
        query = query.where(table.c.updated_at > since)
    return connection.execute(query.order_by(table.c.nonce.desc()).limit(1)).scalar()


def lowest_nonce(
    connection: Connection, account: Address, states: frozenset[RowState]
) -> int | None:
    query = select(func.min(table.c.nonce)).where(
        table.c.account == account, table.c.state.in_([state.value for state in states])
    )
    return connection.execute(query).scalar()


def with_nonce(connection: Connection, account: Address, nonce: int) -> OutboxRow | None:
    """The newest of the account that has the nonce."""
    query = select(table).where(table.c.account == account, table.c.nonce == nonce)
    return next(reversed(_rows(connection, query)), None)


def reverted_since(connection: Connection, block: int) -> tuple[OutboxRow, ...]:
    """Those that reverted in that block or later."""
    reverted = table.c.state == RowState.REVERTED.value
    return _rows(connection, select(table).where(reverted, table.c.block >= block))


def mined_from(connection: Connection, account: Address, nonce: int) -> tuple[OutboxRow, ...]:
    """The account's with this nonce or a higher one that were mined, and aren't final yet."""
    mined = (table.c.account == account) & (table.c.state == RowState.MINED.value)
    found = _rows(connection, select(table).where(mined, table.c.nonce >= nonce))
    return tuple(sorted(found, key=lambda row: row.order))


def next_key(connection: Connection, account: Address, prefix: str) -> str:
    """Of those that the account does one after the other: the one that is on its way, else the
    first that was given up, else a new one."""
    rest = [state.value for state in RowState if state not in IN_THE_CHAIN]
    left = _of_prefix(select(table.c.key, table.c.state), account, prefix).where(
        table.c.state.in_(rest)
    )
    found = connection.execute(left.order_by(table.c.seq)).all()
    if not found:
        whole = _of_prefix(select(func.count()).select_from(table), account, prefix)
        return f"{prefix}{connection.execute(whole).scalar_one()}"
    open_ones = (each.key for each in found if RowState(each.state) not in REFUSED)
    return str(next(open_ones, found[0].key))


def _of_prefix(query: Select[Any], account: Address, prefix: str) -> Select[Any]:
    own = (table.c.account == account) & table.c.task.is_(None)
    return query.where(own, table.c.key.startswith(prefix, autoescape=True))


def movements(connection: Connection) -> Mapping[Address, Movement]:
    """Of the accounts' own writes (not tasks'), by each account that they are from or to."""
    open_states = {state.value for state in IN_FLIGHT | {RowState.NEW}}
    found: dict[Address, Movement] = defaultdict(Movement)
    report = table.c.key.like(f"account:%:{REPORT}:%")
    for side in (table.c.account, table.c.recipient):
        query = (
            select(side.label("address"), table.c.state, func.max(table.c.block).label("block"))
            .where(table.c.task.is_(None), ~report)
            .group_by(side, table.c.state)
        )
        for row in connection.execute(query):
            address, block = Address(row.address), row.block or 0
            last, is_open = found[address], row.state in open_states
            after = replace(last, is_open=last.is_open or is_open, block=max(last.block, block))
            if side is table.c.recipient:
                after = replace(
                    after,
                    paying=last.paying or is_open,
                    paid_block=max(last.paid_block, block),
                )
            found[address] = after
    reporting = select(table.c.account).where(report, table.c.state.in_(open_states)).distinct()
    for row in connection.execute(reporting):
        account = Address(row.account)
        found[account] = replace(found[account], reports=True)
    return found


def owing(connection: Connection) -> Mapping[str, tuple[Address, Wei]]:
    """By the key of each of accounts' own writes that is on its way, what it will take from whom,
    gas aside."""
    open_states = [state.value for state in IN_FLIGHT | {RowState.NEW}]
    query = select(table.c.key, table.c.account, table.c.value)
    found = connection.execute(query.where(table.c.task.is_(None), table.c.state.in_(open_states)))
    return {row.key: (Address(row.account), Wei(int(row.value))) for row in found}


def refused(connection: Connection) -> tuple[OutboxRow, ...]:
    """Accounts' own writes that the network would not have, the last time that they were tried."""
    states = [state.value for state in REFUSED]
    return _rows(connection, select(table).where(table.c.task.is_(None), table.c.state.in_(states)))


def states(connection: Connection) -> Mapping[RowState, int]:
    """How many rows stand in each state: those that are on their way are few, and counted."""
    on_their_way = table.c.state.in_([state.value for state in UNRESOLVED])
    query = select(table.c.state, func.count()).where(on_their_way).group_by(table.c.state)
    found = {RowState(state): count for state, count in connection.execute(query)}
    done = tallies.of(connection, _STATES)
    return found | {RowState(state): each.count for state, each in done.items()}


def add(connection: Connection, intent: Intent, now: Timestamp) -> None:
    row = OutboxRow(0, intent, RowState.NEW, None, None, now, "")
    connection.execute(insert(table).values(**_columns(row)))


def store(connection: Connection, row: OutboxRow) -> None:
    place = table.c.key == row.intent.key
    before = connection.execute(select(table.c.tx_hash, table.c.state).where(place)).one()
    connection.execute(update(table).where(place).values(**_columns(row)))
    _tally(connection, RowState(before.state), row.state)
    newest = None if row.signed is None else row.signed.tx_hash
    if row.intent.task is not None and before.tx_hash not in {None, newest}:
        # An explorer may show it still.
        add_name(connection, row.intent.task, before.tx_hash)


def _tally(connection: Connection, before: RowState, after: RowState) -> None:
    if before is not after:
        for state, count in ((before, -1), (after, 1)):
            if state not in UNRESOLVED:
                tallies.add(connection, _STATES, state.value, count)
