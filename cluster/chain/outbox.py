"""Transactions that must come to be exactly once, through crashes, lost answers and retries.

    ensure ─▶ NEW ──simulate──▶ REFUSED (nothing sent)
               │ _sign (nonce, bytes), _store
               ▼
             SIGNED ──_broadcast──▶ SENT ──receipt──▶ MINED | REVERTED

The bytes are stored before they are sent, so a crash at any point is followed by sending the same
bytes again. A row is signed anew only when its former transaction can't be mined any more: none
was made, it reverted, or its nonce belongs to another. What the endpoint says about a transaction
that it won't take ("already known", "nonce too low") differs between clients, so the text is not
read: whether the chain or its pool has the transaction decides.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import structlog
from eth_utils.crypto import keccak

from cluster.chain import outbox_rows as rows
from cluster.chain.outbox_rows import IN_FLIGHT, Intent, OutboxRow, Patience, RowState, Signed
from cluster.chain.rpc import PENDING, Call, Reverted, Rpc, RpcRefused
from cluster.core.errors import ChainError, NetworkUnavailable
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease
from cluster.core.record import Claim
from cluster.core.types import Address, Commitment, Timestamp, Wei
from cluster.journal import SqlJournal

_log = structlog.get_logger(__name__)

Clock = Callable[[], Timestamp]
_NO_VALUE = Wei(0)
Transaction = Mapping[str, int | str]


class Signer(Protocol):
    def sign_transaction(self, account: Address, transaction: Transaction, /) -> bytes:
        """The signed bytes of a transaction given by the fields of a legacy (EIP-155) one."""
        ...


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """Times in seconds.

    `displaced_after`: a transaction whose nonce is spent, and that the chain doesn't have, is given
    up only this long after it last changed: an endpoint of many machines may lag behind itself.
    `simulate_at`: "pending", because a latest block that is old judges deadlines by an old clock.
    """

    price_percent: int = 120
    gas_percent: int = 130
    gas_cap: int = 5_000_000
    price_cap: Wei = Wei(10**12)
    retry_after: float = 1.0
    recheck_after: float = 15.0
    rebroadcast_after: float = 20.0
    displaced_after: float = 60.0
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
        self._due = asyncio.Event()
        self._pumping = asyncio.Lock()

    # --- intents

    def ensure(self, intent: Intent) -> RowState:
        """Make sure that the transaction is on its way; one that was mined stays as it is.

        One that was refused or reverted is tried anew. Raises `IllegalMove` when a task's answer
        would be a second or another one, `LeaseLost`.
        """
        now = self._clock()
        with self._journal.read() as connection:
            row = rows.by_key(connection, intent.key)
        if row is not None and rows.rearm(row, intent, now, self._patience) is row:
            return row.state
        with self._journal.write(self._lease()) as connection:
            row = rows.by_key(connection, intent.key)
            if row is None:
                others = () if intent.task is None else rows.of_task(connection, intent.task)
                rows.check_sole_answer(intent, others)
                rows.add(connection, intent, now)
                state = RowState.NEW
            else:
                row = rows.rearm(row, intent, now, self._patience)
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

    async def _sign(self, row: OutboxRow) -> Signed | None:
        """Simulate, price and sign; None when the simulation reverts, and the row is refused."""
        intent, settings = row.intent, self._settings
        call = Call(intent.recipient, intent.data, intent.account, intent.value)
        try:
            _, estimate, price, count = await asyncio.gather(
                self._rpc.call(call, settings.simulate_at),
                self._rpc.estimate_gas(call, settings.simulate_at),
                self._rpc.gas_price(settings.price_percent),
                self._rpc.transaction_count(intent.account),
            )
        except Reverted as error:
            self._resolve(replace(row, state=RowState.REFUSED, reason=error.reason))
            return None
        if price > settings.price_cap:
            raise ChainError(f"gas costs {price} wei, more than the cap {settings.price_cap}")
        gas = estimate * settings.gas_percent // 100
        if gas > settings.gas_cap:
            reason = f"needs {estimate} gas, with its margin more than the cap {settings.gas_cap}"
            self._resolve(replace(row, state=RowState.REFUSED, reason=reason))
            return None
        nonce = self._nonce(intent.account, count)
        raw = self._signer.sign_transaction(
            intent.account,
            {
                "chainId": self._chain_id,
                "nonce": nonce,
                "gasPrice": price,
                "gas": gas,
                "to": intent.recipient,
                "value": intent.value,
                "data": "0x" + intent.data.hex(),
            },
        )
        return Signed(nonce, raw, "0x" + keccak(raw).hex())

    def _nonce(self, account: Address, count: int) -> int:
        recent = self._clock() - self._settings.displaced_after
        with self._journal.read() as connection:
            flying = rows.highest_nonce(connection, account, IN_FLIGHT, float("-inf"))
            spent = frozenset({RowState.MINED, RowState.REVERTED})
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
        if await self._rpc.receipt(row.signed.tx_hash) is not None:
            return
        reason = f"nonce {row.signed.nonce} was used by another transaction"
        self._resolve(replace(row, state=RowState.REFUSED, signed=None, reason=reason))

    async def _follow(self, row: OutboxRow) -> None:
        assert row.signed is not None, "only rows with bytes are sent"  # noqa: S101
        receipt = await self._rpc.receipt(row.signed.tx_hash)
        if receipt is not None:
            state = RowState.MINED if receipt.succeeded else RowState.REVERTED
            reason = "" if receipt.succeeded else f"reverted in block {receipt.block}"
            self._resolve(replace(row, state=state, reason=reason))
        elif self._clock() - (row.sent_at or 0.0) >= self._settings.rebroadcast_after:
            await self._broadcast(row)

    def _put(self, row: OutboxRow) -> None:
        with self._journal.write(self._lease()) as connection:
            rows.store(connection, row)

    def _resolve(self, row: OutboxRow) -> None:
        self._put(replace(row, updated_at=self._clock()))
        _log.info("outbox_resolved", row=row.intent.key, state=row.state.value, reason=row.reason)
        if self.resolved is not None:
            self.resolved(row)
