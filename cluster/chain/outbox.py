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
from typing import Literal, NoReturn, Protocol

import structlog
from eth_utils.crypto import keccak

from cluster import journal_takings as takings
from cluster.chain import outbox_rows as rows
from cluster.chain.fees import FeeSettings, Offer, first, raised
from cluster.chain.outbox_rows import IN_FLIGHT, Intent, OutboxRow, Patience, RowState, Signed
from cluster.chain.refusals import Refusals
from cluster.chain.reverts import verdict
from cluster.chain.rpc import LATEST, PENDING, Call, Receipt, Reverted, Rpc, RpcRefused
from cluster.core.errors import ChainError, NetworkUnavailable
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease, Movement
from cluster.core.record import Claim
from cluster.core.types import Address, Commitment, Timestamp, Wei
from cluster.journal import SqlJournal

_log = structlog.get_logger(__name__)

Clock = Callable[[], Timestamp]
_NO_VALUE = Wei(0)
HURRY_SECONDS = 60.0
"""With less than so much left until a write is too late, it offers more and waits for less."""
Transaction = Mapping[str, int | str]


class Signer(Protocol):
    def sign_transaction(self, account: Address, transaction: Transaction, /) -> bytes:
        """The signed bytes of a transaction given by the fields of a legacy (EIP-155) one."""
        ...


ChainEvent = Literal["replaced", "vanished", "reorganised"]


class Told(Protocol):
    """Hears of what is counted."""

    def happened(self, event: ChainEvent, /) -> None: ...

    def spent(self, account: Address, wei: Wei, /) -> None: ...


class Untold:
    """Nobody counts."""

    def happened(self, event: ChainEvent, /) -> None:
        pass

    def spent(self, account: Address, wei: Wei, /) -> None:
        pass


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """Times in seconds.

    `replace_after`: how long a transaction may wait to be mined before it offers more; with a
    deadline near, a quarter of that. `depth`: blocks on top of its own that make it final.
    `displaced_after`: a transaction whose nonce is spent, and that the chain doesn't have, is given
    up only this long after it last changed: an endpoint of many machines may lag behind itself.
    `simulate_at`: "pending", because a latest block that is old judges deadlines by an old clock.
    """

    fees: FeeSettings = FeeSettings()  # noqa: RUF009 - frozen
    gas_percent: int = 130
    gas_cap: int = 5_000_000
    retry_after: float = 1.0
    recheck_after: float = 15.0
    rebroadcast_after: float = 20.0
    displaced_after: float = 60.0
    replace_after: float = 30.0
    depth: int = 12
    poll: float = 1.0
    parallel: int = 16
    simulate_at: str = PENDING


class Outbox:
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
        self._rpc = rpc
        self._journal = journal
        self._lease = lease
        self._signer = signer
        self._clock = clock
        self._chain_id = chain_id
        self._settings = settings or OutboxSettings()
        self._patience = Patience(self._settings.retry_after, self._settings.recheck_after)
        self.resolved = resolved
        self.head: Callable[[], int | None] = lambda: None
        """The newest block's number that was seen."""
        self.seconds_left: Callable[[Intent], float | None] = lambda _intent: None
        """Until the network doesn't take the write any more, as far as is known."""
        self.told: Told = Untold()
        self._alerts: dict[Address, str] = {}
        self._lacking: dict[str, tuple[Address, Wei]] = {}
        """By a new row's key, what its account has too little for it."""
        with journal.read() as connection:
            self._refusals = Refusals(rows.refused(connection), self._patience)
        self._due = asyncio.Event()
        self._pumping = asyncio.Lock()

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
            return row.state
        with self._journal.write(self._lease()) as connection:
            row = rows.by_key(connection, intent.key)
            if row is None:
                others = () if intent.task is None else rows.of_task(connection, intent.task)
                rows.check_sole_answer(intent, others)
                rows.add(connection, intent, now)
                state = RowState.NEW
            else:
                row = rows.rearm(row, intent, now, self._patience, refused)
                rows.store(connection, row)
                state = row.state
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
        was mined; with `once`, never again."""
        prefix = f"account:{account}:{verb}:"
        number = 0
        if not once:
            with self._journal.read() as connection:
                number = rows.count_mined(connection, account, prefix)
        return self.ensure(Intent(f"{prefix}{number}", account, recipient, data, value))

    def writes(self, task: Commitment) -> Mapping[Claim, WriteState]:
        with self._journal.read() as connection:
            found = rows.of_task(connection, task)
        return {
            row.intent.claim: rows.WRITE_STATES[row.state]
            for row in found
            if row.intent.claim is not None
        }

    def movements(self) -> Mapping[Address, Movement]:
        with self._journal.read() as connection:
            found = defaultdict(Movement, rows.movements(connection))
            owed = rows.owed(connection)
        for account, refusals in self._refusals.by_account().items():
            found[account] = replace(found[account], refused=refusals)
        for account, amount in owed.items():
            found[account] = replace(found[account], owes=amount)
        for account, amount in self._lacking.values():
            lacks = max(found[account].lacks, amount)
            found[account] = replace(found[account], lacks=lacks)
        return dict(found)

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, one line for each account."""
        return tuple(self._alerts[account] for account in sorted(self._alerts))

    # --- moving them on

    async def run(self) -> NoReturn:
        """Pump for ever; raises `LeaseLost`."""
        while True:
            self._due.clear()
            try:
                await self.pump()
            except NetworkUnavailable as error:
                _log.warning("outbox_waits", reason=str(error))
            # Not wait_for: on Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll):
                    await self._due.wait()

    async def pump(self) -> None:
        """Move every row on by what can be done now. Raises the first account's `ChainError`,
        after all accounts had their turn."""
        async with self._pumping:
            with self._journal.read() as connection:
                found = rows.unresolved(connection)
            accounts: dict[Address, list[OutboxRow]] = defaultdict(list)
            for row in found:
                accounts[row.intent.account].append(row)
            limit = asyncio.Semaphore(self._settings.parallel)

            async def one(account: Sequence[OutboxRow]) -> None:
                async with limit:
                    await self._pump_account(account)

            ended = await asyncio.gather(
                *(one(account) for account in accounts.values()), return_exceptions=True
            )
        failed = [error for error in ended if error is not None]
        failed.sort(key=lambda error: isinstance(error, NetworkUnavailable))
        if failed:
            raise failed[0]

    async def _pump_account(self, account: Sequence[OutboxRow]) -> None:
        failure: ChainError | None = None
        for row in sorted(account, key=lambda each: each.order):
            try:
                await self._advance(row)
            except RpcRefused as error:
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

    async def _advance(self, row: OutboxRow) -> None:
        if row.state is RowState.NEW:
            signed = await self._sign(row)
            if signed is None:
                return
            row = self._store(row, signed)
        if row.state is RowState.SIGNED:
            await self._broadcast(row)
        elif row.state is RowState.SENT:
            await self._follow(row)
        elif row.state is RowState.MINED:
            await self._confirm(row)

    async def _sign(self, row: OutboxRow) -> Signed | None:
        """Simulate, price and sign; None when the simulation reverts, and the row is refused."""
        intent, settings = row.intent, self._settings
        call = Call(intent.recipient, intent.data, intent.account, intent.value)
        try:
            _, estimate, market, count, balance = await asyncio.gather(
                self._rpc.call(call, settings.simulate_at),
                self._rpc.estimate_gas(call, settings.simulate_at),
                self._rpc.market(),
                self._rpc.transaction_count(intent.account),
                self._rpc.balance(intent.account, LATEST),
            )
        except Reverted as error:
            self._resolve(replace(row, state=RowState.REFUSED, reason=error.reason))
            return None
        offer = first(market, settings.fees, self._urgency(intent))
        if offer.fee > settings.fees.cap:
            self._alert(intent, f"gas costs {offer.fee} wei, more than the cap {settings.fees.cap}")
        gas = estimate * settings.gas_percent // 100
        if gas > settings.gas_cap:
            reason = f"needs {estimate} gas, with its margin more than the cap {settings.gas_cap}"
            self._resolve(replace(row, state=RowState.REFUSED, reason=reason))
            return None
        need = intent.value + gas * offer.fee
        if balance < need:
            self._lacking[intent.key] = intent.account, Wei(need - balance)
            self._alert(intent, f"has {balance} wei and needs {need}: top it up")
        self._alerts.pop(intent.account, None)
        self._lacking.pop(intent.key, None)
        return self._bytes(intent, self._nonce(intent.account, count), offer, gas)

    def _alert(self, intent: Intent, problem: str) -> NoReturn:
        line = f"account {intent.account} {problem}"
        self._alerts[intent.account] = line
        raise ChainError(line)

    def _urgency(self, intent: Intent) -> int:
        """How many times as much is offered: the nearer the deadline, the more."""
        left = self.seconds_left(intent)
        if left is None or left > HURRY_SECONDS:
            return 1
        return 2 if left > HURRY_SECONDS / 2 else 4

    def _bytes(
        self,
        intent: Intent,
        nonce: int,
        offer: Offer,
        gas: int,
        replaced: tuple[str, ...] = (),
    ) -> Signed:
        raw = self._signer.sign_transaction(
            intent.account,
            {
                "chainId": self._chain_id,
                "nonce": nonce,
                **offer.fields(),
                "gas": gas,
                "to": intent.recipient,
                "value": intent.value,
                "data": "0x" + intent.data.hex(),
            },
        )
        tx_hash = "0x" + keccak(raw).hex()
        return Signed(nonce, raw, tx_hash, offer, gas, self._clock(), replaced)

    def _nonce(self, account: Address, count: int) -> int:
        recent = self._clock() - self._settings.displaced_after
        with self._journal.read() as connection:
            flying = rows.highest_nonce(connection, account, IN_FLIGHT, float("-inf"))
            spent = rows.IN_THE_CHAIN | {RowState.REVERTED}
            last = rows.highest_nonce(connection, account, spent, recent)
        if last is not None and count <= last:
            raise ChainError(f"{account}: the endpoint is behind, it doesn't count nonce {last}")
        return count if flying is None else max(count, flying + 1)

    def _store(self, row: OutboxRow, signed: Signed) -> OutboxRow:
        """Store the signed bytes, under the lease; from here on they are the row's only ones."""
        now = self._clock()
        with self._journal.write(self._lease()) as connection:
            stored = rows.by_key(connection, row.intent.key)
            if stored is None or stored.state is not RowState.NEW:
                raise ChainError(f"{row.intent.key}: changed while it was signed")
            stored = replace(stored, state=RowState.SIGNED, signed=signed, updated_at=now)
            rows.store(connection, stored)
        return stored

    async def _broadcast(self, row: OutboxRow) -> None:
        """Send the stored bytes, for the first time or again."""
        assert row.signed is not None, "only rows with bytes are sent"  # noqa: S101
        try:
            await self._rpc.send(row.signed.raw)
        except (RpcRefused, Reverted) as refusal:
            if not await self._rpc.knows(row.signed.tx_hash):
                await self._displaced(row, refusal)
                return
        now = self._clock()
        updated_at = row.updated_at if row.state is RowState.SENT else now
        self._put(replace(row, state=RowState.SENT, sent_at=now, updated_at=updated_at))

    async def _displaced(self, row: OutboxRow, refusal: ChainError) -> None:
        """Give the row up when its nonce is certainly another's; else raise `refusal`."""
        assert row.signed is not None, "only rows with bytes are sent"  # noqa: S101
        old = self._clock() - row.updated_at >= self._settings.displaced_after
        count = await self._rpc.transaction_count(row.intent.account)
        # The count is read before the receipt: what is mined in between shows in the receipt.
        if not old or count <= row.signed.nonce:
            raise refusal
        if await self._receipt(row.signed) is not None:
            return
        reason = f"nonce {row.signed.nonce} was used by another transaction"
        self._resolve(replace(row, state=RowState.REFUSED, signed=None, reason=reason))

    async def _receipt(self, signed: Signed) -> Receipt | None:
        """Of whichever of the transactions with this nonce was mined."""
        for tx_hash in signed.hashes:
            receipt = await self._rpc.receipt(tx_hash)
            if receipt is not None:
                return receipt
        return None

    async def _follow(self, row: OutboxRow) -> None:
        assert row.signed is not None, "only rows with bytes are sent"  # noqa: S101
        receipt = await self._receipt(row.signed)
        now = self._clock()
        if receipt is not None:
            state = RowState.MINED if receipt.succeeded else RowState.REVERTED
            reason = "" if receipt.succeeded else f"reverted in block {receipt.block}"
            mined = replace(row, state=state, reason=reason, block=receipt.block)
            self._resolve(replace(mined, cost=receipt.cost))
        elif now - row.signed.at >= self._replace_after(row.intent) and row.signed.offer.fee:
            await self._replace(row, row.signed)
        elif now - (row.sent_at or 0.0) >= self._settings.rebroadcast_after:
            await self._broadcast(row)

    def _replace_after(self, intent: Intent) -> float:
        after = self._settings.replace_after
        return after if self._urgency(intent) == 1 else after / 4

    async def _replace(self, row: OutboxRow, old: Signed) -> None:
        """The same write with the same nonce, at a higher fee; only while that nonce is free."""
        count = await self._rpc.transaction_count(row.intent.account)
        if count < old.nonce:
            # Those before it are what is stuck; theirs is the next turn.
            await self._broadcast(row)
            return
        market = await self._rpc.market()
        offer = raised(old.offer, market, self._settings.fees, self._urgency(row.intent))
        if offer is None:
            account, cap = row.intent.account, self._settings.fees.cap
            self._alerts[account] = (
                f"account {account} has a transaction stuck at nonce {old.nonce}: to replace it "
                f"would cost more than {cap} wei per gas"
            )
            await self._broadcast(row)
            return
        signed = self._bytes(row.intent, old.nonce, offer, old.gas, (*old.replaced, old.tx_hash))
        self.told.happened("replaced")
        _log.warning("transaction_replaced", row=row.intent.key, nonce=old.nonce, fee=offer.fee)
        row = replace(row, signed=signed, updated_at=self._clock())
        self._put(row)  # stored before it is sent, as the first one was
        await self._broadcast(row)

    async def _confirm(self, row: OutboxRow) -> None:
        """Once deep enough, look whether it is still there."""
        head, block = self.head(), row.block
        assert row.signed is not None, "only rows with bytes are mined"  # noqa: S101
        if head is None or (block is not None and head < block + self._settings.depth):
            return
        receipt = await self._receipt(row.signed)
        if receipt is None:
            self.told.happened("vanished")
            _log.warning("transaction_vanished", row=row.intent.key, block=block)
            await self._broadcast(replace(row, block=None, reason=""))
        elif not receipt.succeeded:
            reason = f"reverted in block {receipt.block}"
            self._resolve(replace(row, state=RowState.REVERTED, reason=reason))
        elif head < receipt.block + self._settings.depth:
            self._put(replace(row, block=receipt.block))
        else:
            self._put(replace(row, state=RowState.FINAL, block=receipt.block))

    def look_again(self) -> None:
        """The chain was reorganised: what was mined is looked for again, wherever it is now."""
        with self._journal.write(self._lease()) as connection:
            for row in rows.unresolved(connection):
                if row.state is RowState.MINED:
                    rows.store(connection, replace(row, state=RowState.SENT, block=None))
        self._due.set()

    def _put(self, row: OutboxRow) -> None:
        account = row.intent.account
        with self._journal.write(self._lease()) as connection:
            stored = rows.by_key(connection, row.intent.key)
            rows.store(connection, row)
            spent = Wei(row.cost - (0 if stored is None else stored.cost))
            if spent:
                takings.add(connection, self._clock(), account, gas=spent)
        if spent > 0:
            self.told.spent(account, spent)

    def _resolve(self, row: OutboxRow) -> None:
        row = replace(row, updated_at=self._clock())
        self._put(row)
        self._lacking.pop(row.intent.key, None)
        self._refusals.resolved(row)
        said = {"reason": row.reason, "means": verdict(row.reason).value} if row.reason else {}
        _log.info("outbox_resolved", row=row.intent.key, state=row.state.value, **said)
        if self.resolved is not None:
            self.resolved(row)
