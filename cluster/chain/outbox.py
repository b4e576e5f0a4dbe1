"""Transactions that must come to be exactly once, through crashes, lost answers and retries.

    ensure ─▶ NEW ──simulate──▶ REFUSED (nothing sent)
               │ _sign (nonce, bytes), _store
               ▼
             SIGNED ──_broadcast──▶ SENT ──receipt──▶ MINED ──depth──▶ FINAL, or REVERTED
                                     ▲  └─ stuck: the same nonce at a higher fee
                                     └───── its block was replaced by one without it

The bytes are stored before they are sent, so a crash at any point is followed by sending the same
bytes again. A row gets another nonce only when its former transaction can't be mined any more:
none was made, it reverted, or its nonce belongs to another. What the endpoint says about a
transaction that it won't take ("already known", "nonce too low") differs between clients, so the
text is not read: whether the chain or its pool has the transaction decides.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NoReturn

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from cluster import journal_takings as takings
from cluster.chain import outbox_rows as rows
from cluster.chain.outbox_moves import Moves, Waits
from cluster.chain.outbox_ports import Clock, OutboxSettings, Signer
from cluster.chain.outbox_rows import Intent, OutboxRow, Patience, RowState, Signed
from cluster.chain.refusals import Refusals
from cluster.chain.reverts import verdict
from cluster.chain.rpc import Rpc, RpcRefused
from cluster.core.errors import ChainError, LeaseLost, NetworkUnavailable
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease, Movement, Refusal
from cluster.core.record import Claim
from cluster.core.types import Address, Commitment, Wei
from cluster.journal import SqlJournal

_log = structlog.get_logger(__name__)

_NO_VALUE = Wei(0)
_MOST_WRITTEN = 4096
"""Tasks whose writes are remembered; more than are open at a time."""


@dataclass(frozen=True, slots=True)
class _Own:
    """What is stored of accounts' own writes."""

    movements: Mapping[Address, Movement]
    owing: Mapping[str, tuple[Address, Wei]]


@dataclass(frozen=True, slots=True)
class _Moved:
    """Accounts' movements, and what they were made from."""

    own: _Own
    lacking: Mapping[str, tuple[Address, Wei]]
    refused: Mapping[Address, tuple[Refusal, ...]]
    found: Mapping[Address, Movement]


class Outbox(Moves):
    """`resolved` is called with each row that was mined, reverted or refused."""

    def __init__(
        self,
        rpc: Rpc,
        journal: SqlJournal,
        lease: Callable[[], Lease],
        signer: Signer,
        clock: Clock,
        chain_id: int,
        settings: OutboxSettings | None = None,
        resolved: Callable[[OutboxRow], None] | None = None,
    ) -> None:
        super().__init__(rpc, journal, signer, clock, chain_id, settings or OutboxSettings())
        self._lease = lease
        self._patience = Patience(self._settings.retry_after, self._settings.recheck_after)
        self.resolved = resolved
        with journal.read() as connection:
            self._refusals = Refusals(rows.refused(connection), self._patience)
        self._due = asyncio.Event()
        self._limit = asyncio.Semaphore(self._settings.parallel)
        self._busy: set[Address] = set()
        """Accounts that are being moved on now."""
        self._fresh: set[Address] = set()
        """Accounts that have got something to do since that began."""
        self._own: _Own | None = None
        """Until one of them changes."""
        self._moved: _Moved | None = None
        self._written: dict[Commitment, Mapping[Claim, WriteState]] = {}
        """What tasks' writes came to, until one of the task's changes."""

    # --- intents

    def ensure(self, intent: Intent) -> RowState:
        """Make sure that the transaction is on its way; one that was mined stays as it is.

        One that was refused or reverted is tried anew. Raises `IllegalMove` when a task's answer
        would be a second or another one, `LeaseLost`.
        """
        now, refused = self._clock(), self._refusals.times(intent.key)
        with self._journal.read() as connection:
            row = rows.by_key(connection, intent.key)
        if row is not None and rows.rearm(row, intent, now, self._patience, refused) is row:
            if intent.task is not None:
                # It may be there by a commit whose answer was lost; an own one's ends the term.
                self._changed(intent)
            return row.state
        with self._journal.write(self._lease()) as connection:
            row = rows.by_key(connection, intent.key)
            if row is None:
                others = () if intent.task is None else rows.of_task(connection, intent.task)
                rows.check_sole_answer(intent, others)
                rows.add(connection, intent, now)
                self._changed(intent)
                state = RowState.NEW
            else:
                row = rows.rearm(row, intent, now, self._patience, refused)
                self._keep(connection, row)
                state = row.state
        self._fresh.add(intent.account)
        self._due.set()
        return state

    def ensure_verb(
        self,
        account: Address,
        verb: str,
        recipient: Address,
        data: bytes,
        value: Wei = _NO_VALUE,
        once: bool = False,
    ) -> RowState:
        """As `ensure`, for what an account may do again and again, each time after the last one
        was mined; one that was given up comes before a new one; with `once`, never again."""
        prefix = f"account:{account}:{verb}:"
        key = f"{prefix}0"
        if not once:
            with self._journal.read() as connection:
                key = rows.next_key(connection, account, prefix)
        return self.ensure(Intent(key, account, recipient, data, value))

    def writes(self, task: Commitment) -> Mapping[Claim, WriteState]:
        """Asked for each open task at each of its turns, so it is remembered."""
        found = self._written.get(task)
        if found is None:
            with self._journal.read() as connection:
                stored = rows.of_task(connection, task)
            found = {
                row.intent.claim: rows.WRITE_STATES[row.state]
                for row in stored
                if row.intent.claim is not None
            }
            if len(self._written) >= _MOST_WRITTEN:
                self._written.clear()
            found = self._written[task] = MappingProxyType(found)
        return found

    def movements(self) -> Mapping[Address, Movement]:
        """Asked at each look at an account, so it is remembered."""
        if self._own is None:
            with self._journal.read() as connection:
                self._own = _Own(rows.movements(connection), rows.owing(connection))
        own, refused, moved = self._own, self._refusals.by_account(), self._moved
        same = moved is not None and moved.own is own and moved.refused is refused
        if moved is None or not same or moved.lacking != self._lacking:
            moved = _Moved(own, dict(self._lacking), refused, self._movements(own, refused))
            self._moved = moved
        return moved.found

    def _movements(
        self, own: _Own, refused: Mapping[Address, tuple[Refusal, ...]]
    ) -> Mapping[Address, Movement]:
        found = defaultdict(Movement, own.movements)
        for account, refusals in refused.items():
            found[account] = replace(found[account], refused=refusals)
        for key, (account, amount) in own.owing.items():
            if key not in self._lacking:  # what waits for money takes none
                owes = Wei(found[account].owes + amount)
                found[account] = replace(found[account], owes=owes)
        for account, amount in self._lacking.values():
            lacks = max(found[account].lacks, amount)
            found[account] = replace(found[account], lacks=lacks)
        return MappingProxyType(dict(found))

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, in words."""
        return self._alerts.lines()

    # --- moving them on

    async def run(self) -> NoReturn:
        """Move accounts on for ever, each at its own pace. Raises, in an `ExceptionGroup`,
        `LeaseLost`, and what the journal raises."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._due.clear()
                for account, found in self._waiting().items():
                    if account not in self._busy:
                        self._busy.add(account)
                        group.create_task(self._move(account, found))
                # Not wait_for: on Python 3.11 it can swallow a cancellation.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.poll):
                        await self._due.wait()

    async def pump(self) -> None:
        """Move every row on by what can be done now. Raises the first account's `ChainError`,
        after all accounts had their turn."""
        waiting = {a: found for a, found in self._waiting().items() if a not in self._busy}
        self._busy |= waiting.keys()
        ended = await asyncio.gather(
            *(self._turn(account, found) for account, found in waiting.items()),
            return_exceptions=True,
        )
        failed = [error for error in ended if error is not None]
        failed.sort(key=lambda error: isinstance(error, NetworkUnavailable))
        if failed:
            raise failed[0]

    def _waiting(self) -> dict[Address, list[OutboxRow]]:
        """The rows that something can be done for, by account; first those with an answer."""
        head = self.head()
        deep = None if head is None else head - self._settings.depth
        with self._journal.read() as connection:
            found = rows.due(connection, deep)
        accounts: dict[Address, list[OutboxRow]] = defaultdict(list)
        for row in sorted(found, key=lambda each: not each.intent.is_answer):
            accounts[row.intent.account].append(row)
        return accounts

    async def _move(self, account: Address, found: Sequence[OutboxRow]) -> None:
        """One account's turn; its trouble, even a bug, is no other account's."""
        try:
            await self._turn(account, found)
        except (LeaseLost, DBAPIError):
            raise
        except NetworkUnavailable as error:
            _log.warning("outbox_waits", account=account, reason=str(error))
        except Exception as error:  # noqa: BLE001 - the top of an account's own supervised loop
            _log.exception("outbox_broke", account=account)
            what = f"account {account}: its writes can't be moved on: {type(error).__name__}"
            self._alerts.note(account, "bug", what)
            # It won't be another one in a second.
            self._busy.add(account)
            await asyncio.sleep(self._settings.recheck_after)
            self._busy.discard(account)
        else:
            self._alerts.clear(account, "bug")

    async def _turn(self, account: Address, found: Sequence[OutboxRow]) -> None:
        """For an account that is marked as busy, until it ends."""
        try:
            async with self._limit:
                self._fresh.discard(account)
                await self._pump_account(found)
        finally:
            self._busy.discard(account)
            if account in self._fresh:
                self._due.set()

    async def _pump_account(self, account: Sequence[OutboxRow]) -> None:
        failure: ChainError | None = None
        for row in sorted(account, key=lambda each: each.order):
            try:
                await self._advance(row)
            except (RpcRefused, Waits) as error:
                failure = failure or error
                # A row without a nonce stands in nobody's way; one with a nonce does.
                if row.signed is not None:
                    break
                with self._journal.read() as connection:
                    stored = rows.by_key(connection, row.intent.key)
                if stored is not None and stored.state is not RowState.NEW:
                    break
        if failure is not None:
            raise failure

    def _store(self, row: OutboxRow, signed: Signed) -> OutboxRow:
        """Store the signed bytes, under the lease; from here on they are the row's only ones."""
        now = self._clock()
        with self._journal.write(self._lease()) as connection:
            stored = rows.by_key(connection, row.intent.key)
            if stored is None or stored.state is not RowState.NEW:
                raise ChainError(f"{row.intent.key}: changed while it was signed")
            stored = replace(stored, state=RowState.SIGNED, signed=signed, updated_at=now)
            self._keep(connection, stored)
        return stored

    def look_again(self) -> None:
        """The chain was reorganised: what was mined is looked for again, wherever it is now; so is
        what reverted there, for it may succeed elsewhere."""
        head = self.head()
        with self._journal.write(self._lease()) as connection:
            mined = (r for r in rows.unresolved(connection) if r.state is RowState.MINED)
            lowest = None if head is None else head - self._settings.depth
            reverted = () if lowest is None else rows.reverted_since(connection, lowest)
            for row in (*mined, *reverted):
                again = replace(row, state=RowState.SENT, block=None, reason="")
                self._keep(connection, again)
        self._due.set()

    def _keep(self, connection: Connection, row: OutboxRow) -> None:
        rows.store(connection, row)
        self._changed(row.intent)

    def _changed(self, intent: Intent) -> None:
        """What is remembered of it is no more true."""
        if intent.task is None:
            self._own = None
        else:
            self._written.pop(intent.task, None)

    def _add(self, row: OutboxRow) -> None:
        with self._journal.write(self._lease()) as connection:
            if rows.by_key(connection, row.intent.key) is None:
                rows.add(connection, row.intent, row.updated_at)
            self._keep(connection, row)
        self._due.set()

    def _put(self, row: OutboxRow) -> None:
        account = row.intent.account
        with self._journal.write(self._lease()) as connection:
            stored = rows.by_key(connection, row.intent.key)
            self._keep(connection, row)
            spent = Wei(row.cost - (0 if stored is None else stored.cost))
            if spent:
                takings.add(connection, self._clock(), account, gas=spent)
        if spent > 0:
            self.told.spent(account, spent)

    def _resolve(self, row: OutboxRow) -> None:
        row = replace(row, updated_at=self._clock())
        self._put(row)
        self._forget(row.intent.key)
        self._refusals.resolved(row)
        said = {"reason": row.reason, "means": verdict(row.reason).value} if row.reason else {}
        _log.info("outbox_resolved", row=row.intent.key, state=row.state.value, **said)
        if self.resolved is not None:
            self.resolved(row)
