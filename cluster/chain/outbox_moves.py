"""How one transaction is moved on: simulated, signed, sent, followed, replaced, confirmed.

What is stuck is looked at more closely, by what the chain counts of the account's transactions:

    count < nonce   those before it are stuck, or one of them is missing: it is closed with its own
                    bytes, else with a transfer of nothing to oneself
    count = nonce   it is its turn: a dearer version, once blocks were made without it
    count > nonce   one with its nonce is in the chain: one of its versions, or another's
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn, TypeVar

import structlog
from eth_utils.crypto import keccak

from cluster.chain import outbox_rows as rows
from cluster.chain.alerts import Alerts
from cluster.chain.endpoints import URGENT
from cluster.chain.fees import Market, Offer, first, raised, too_low
from cluster.chain.nonces import FEW, Nonces
from cluster.chain.outbox_ports import Clock, OutboxSettings, Signer, Told, Untold
from cluster.chain.outbox_rows import FILL, Intent, OutboxRow, RowState, Signed
from cluster.chain.rpc import LATEST, Call, Receipt, Reverted, Rpc, RpcRefused
from cluster.core.errors import ChainError
from cluster.core.types import Address, Timestamp, Wei
from cluster.journal import SqlJournal

_log = structlog.get_logger(__name__)

Asked = TypeVar("Asked")
HURRY_SECONDS = 60.0
"""With less than so much left until a write is too late, it offers more and waits for less."""


class Waits(ChainError):
    """A write that can't be afforded now: nothing was signed for it, so it is in nobody's way."""


class Moves:
    """Storing what comes of it is left to who makes one of this (`cluster.chain.outbox`)."""

    def __init__(
        self,
        rpc: Rpc,
        journal: SqlJournal,
        signer: Signer,
        clock: Clock,
        chain_id: int,
        settings: OutboxSettings,
    ) -> None:
        self._rpc = rpc
        self._journal = journal
        self._signer = signer
        self._clock = clock
        self._chain_id = chain_id
        self._settings = settings
        self._nonces = Nonces(rpc, journal, clock, settings.displaced_after)
        self._alerts = Alerts()
        self.head: Callable[[], int | None] = lambda: None
        """The newest block's number that was seen."""
        self.seconds_left: Callable[[Intent], float | None] = lambda _intent: None
        """Until the network doesn't take the write any more, as far as is known."""
        self.told: Told = Untold()
        self._lacking: dict[str, tuple[Address, Wei]] = {}
        """By a new row's key, what its account has too little for it."""
        self._since: dict[tuple[str, str], Timestamp] = {}
        """By a row's key and what is the matter with it, when that was first seen."""
        self._looked: dict[str, Timestamp] = {}
        """By the key of a row that is stuck, when it was last looked at more closely."""

    # --- storing ---------------------------------------------------------------------------------

    def _store(self, row: OutboxRow, signed: Signed) -> OutboxRow:
        raise NotImplementedError

    def _put(self, row: OutboxRow) -> None:
        raise NotImplementedError

    def _add(self, row: OutboxRow) -> None:
        raise NotImplementedError

    def _resolve(self, row: OutboxRow) -> None:
        raise NotImplementedError

    def _forget(self, key: str) -> None:
        """What was only noted of a row."""
        self._lacking.pop(key, None)
        self._looked.pop(key, None)
        self._alerts.clear(key)
        for kind in ("spent", "refused", "poor"):
            self._since.pop((key, kind), None)

    # --- moving ----------------------------------------------------------------------------------

    async def _advance(self, row: OutboxRow) -> None:
        URGENT.set(row.intent.is_answer and row.state in {RowState.NEW, RowState.SIGNED})
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
        """Simulate, price and sign; None when the row is refused: the simulation reverts, or what
        it is to pay isn't there, and stays away."""
        intent, settings = row.intent, self._settings
        call = Call(intent.recipient, intent.data, intent.account, intent.value)
        simulated, estimated, market, count, balance = await asyncio.gather(
            self._rpc.call(call, settings.simulate_at),
            self._rpc.estimate_gas(call, settings.simulate_at),
            self._rpc.market(),
            self._rpc.transaction_count(intent.account),
            self._rpc.balance(intent.account, LATEST),
            return_exceptions=True,
        )
        for error in (simulated, estimated):
            if isinstance(error, Reverted):
                self._resolve(replace(row, state=RowState.REFUSED, reason=error.reason))
                return None
        if _sure(balance) < intent.value:
            # Endpoints only refuse to simulate it then. The money that was there when it was wanted
            # doesn't come back by itself; who wanted it looks again.
            if intent.task is None and self._lasts(row, "poor") >= settings.refused_after:
                why = f"{_sure(balance)} wei are there, and it pays {intent.value}"
                self._resolve(replace(row, state=RowState.REFUSED, reason=why))
                return None
            self._lack(intent, intent.value, _sure(balance))
        _sure(simulated)
        gas = _sure(estimated) * settings.gas_percent // 100
        if gas > settings.gas_cap:
            needs = f"needs {estimated} gas, with its margin more than the cap {settings.gas_cap}"
            self._resolve(replace(row, state=RowState.REFUSED, reason=needs))
            return None
        offer = first(_sure(market), settings.fees, self._urgency(intent))
        if offer.fee > settings.fees.cap:
            self._stop(intent, f"gas costs {offer.fee} wei, more than the cap {settings.fees.cap}")
        need = intent.value + gas * offer.fee
        if _sure(balance) < need:
            self._lack(intent, need, _sure(balance))
        await self._look_for(intent.account, _sure(count))
        nonce = await self._nonces.next(intent.account, _sure(count))
        self._forget(intent.key)
        return self._bytes(intent, nonce, offer, gas, _sure(market))

    def _lack(self, intent: Intent, need: int, balance: int) -> NoReturn:
        self._lacking[intent.key] = intent.account, Wei(need - balance)
        self._stop(intent, f"has {balance} wei and needs {need}: top it up")

    def _stop(self, intent: Intent, problem: str) -> NoReturn:
        line = f"account {intent.account} {problem}"
        self._alerts.note(intent.key, "new", line)
        raise Waits(line)

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
        market: Market,
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
        return Signed(nonce, raw, tx_hash, offer, gas, self._clock(), replaced, market.block)

    async def _broadcast(self, row: OutboxRow) -> None:
        """Send the stored bytes, for the first time or again."""
        signed = _signed(row)
        try:
            await self._rpc.send(signed.raw)
        except (RpcRefused, Reverted) as refusal:
            if not await self._rpc.knows(signed.tx_hash):
                await self._not_taken(row, refusal)
                return
        self._over(row, "refused")
        now = self._clock()
        updated_at = row.updated_at if row.state is RowState.SENT else now
        self._put(replace(row, state=RowState.SENT, sent_at=now, updated_at=updated_at))

    async def _not_taken(self, row: OutboxRow, refusal: ChainError) -> None:
        """No endpoint takes it, and none has it. Raises `refusal` unless that is seen to."""
        key, signed = row.intent.key, _signed(row)
        if self._lasts(row, "refused") >= self._settings.refused_after:
            what = f"account {row.intent.account}: nonce {signed.nonce} is not taken: {refusal}"
            self._alerts.note(key, "refused", what)
        if row.state is RowState.SENT or not self._is_stuck(row):
            if await self._rpc.transaction_count(row.intent.account) > signed.nonce:
                await self._displaced(row)
                return
            raise refusal
        dearer = await self._unstick(row)
        if dearer is row:
            raise refusal
        if dearer is not None:
            await self._broadcast(dearer)

    async def _follow(self, row: OutboxRow) -> None:
        receipt = await self._receipt(row)
        if receipt is not None:
            self._settle(row, receipt)
            return
        to_send: OutboxRow | None = row
        if self._is_stuck(row):
            to_send = await self._unstick(row)
        if to_send is not None and self._age(to_send.sent_at) >= self._settings.rebroadcast_after:
            await self._broadcast(to_send)

    async def _receipt(self, row: OutboxRow) -> Receipt | None:
        """Of whichever of the transactions with this nonce was mined. Of many none is asked for as
        long as their nonce isn't spent."""
        signed = _signed(row)
        if signed.replaced:
            count = await self._rpc.transaction_count(row.intent.account)
            if count <= signed.nonce:
                return None
        for tx_hash in signed.hashes:
            receipt = await self._rpc.receipt(tx_hash)
            if receipt is not None:
                return receipt
        return None

    def _settle(self, row: OutboxRow, receipt: Receipt) -> None:
        state = RowState.MINED if receipt.succeeded else RowState.REVERTED
        reason = "" if receipt.succeeded else f"reverted in block {receipt.block}"
        signed = replace(_signed(row), mined=receipt.block)
        mined = replace(row, state=state, signed=signed, reason=reason, block=receipt.block)
        self._resolve(replace(mined, cost=receipt.cost))

    async def _confirm(self, row: OutboxRow) -> None:
        """Once deep enough, look whether it is still there."""
        head, block, depth = self.head(), row.block, self._settings.depth
        if head is None or (block is not None and head < block + depth):
            return
        if not self._may_look(row, self._settings.recheck_after):
            return
        receipt = await self._receipt(row)
        if receipt is None:
            await self._unseen(row)
        elif not receipt.succeeded:
            self._settle(row, receipt)
        elif head < receipt.block + depth:
            self._put(replace(row, block=receipt.block))
        else:
            self._end(replace(row, block=receipt.block))

    async def _unseen(self, row: OutboxRow) -> None:
        """It has no receipt any more: its block was replaced, unless the endpoint just has none."""
        taken_back = await self._is_taken_back(row)
        if taken_back:
            await self._send_again(row)
        elif taken_back is not None:
            self._end(row)

    async def _look_for(self, account: Address, count: int) -> None:
        """Where the chain counts fewer transactions of the account than were mined, those that are
        not final were taken back with their blocks, unless the endpoint is just behind."""
        with self._journal.read() as connection:
            uncounted = rows.mined_from(connection, account, count)
        for row in uncounted:
            if self._may_look(row, self._settings.look_after) and await self._is_taken_back(row):
                await self._send_again(row)

    async def _is_taken_back(self, row: OutboxRow) -> bool | None:
        """Whether its block was replaced by one without it; None where the endpoint doesn't have
        the block either."""
        self._looked[row.intent.key] = self._clock()
        there = () if row.block is None else await self._rpc.transactions_in(row.block)
        return None if there is None else not set(there) & set(_signed(row).hashes)

    async def _send_again(self, row: OutboxRow) -> None:
        self.told.happened("vanished")
        _log.warning("transaction_vanished", row=row.intent.key, block=row.block)
        await self._broadcast(replace(row, block=None, reason=""))

    def _end(self, row: OutboxRow) -> None:
        self._put(replace(row, state=RowState.FINAL))
        self._forget(row.intent.key)

    # --- stuck -----------------------------------------------------------------------------------

    def _is_stuck(self, row: OutboxRow) -> bool:
        """Whether it is time to look why it isn't mined."""
        signed, after = _signed(row), self._settings.replace_after
        if self._urgency(row.intent) > 1:
            after /= 4
        stuck = bool(signed.offer.fee) and self._age(signed.at) >= after
        return stuck and self._may_look(row, self._settings.look_after)

    def _may_look(self, row: OutboxRow, every: float) -> bool:
        return self._age(self._looked.get(row.intent.key)) >= every

    async def _unstick(self, row: OutboxRow) -> OutboxRow | None:
        """The row to send: another version of it, or itself; None when there is nothing to send."""
        count = await self._rpc.transaction_count(row.intent.account)
        nonce = _signed(row).nonce
        if count > nonce:
            await self._displaced(row)
            return None
        self._looked[row.intent.key] = self._clock()
        self._over(row, "spent")
        if count < nonce:
            return await self._close_gap(row, count)
        return await self._dearer(row)

    async def _dearer(self, row: OutboxRow) -> OutboxRow:
        """The same write with the same nonce at a higher fee, stored; the row itself while nothing
        speaks for that: without new blocks it isn't the fee that keeps it."""
        signed, intent = _signed(row), row.intent
        market = await self._rpc.market()
        waited = market.block >= signed.block + self._settings.replace_blocks
        if not waited and not too_low(signed.offer, market):
            return row
        offer = raised(signed.offer, market, self._settings.fees, self._urgency(intent))
        stuck = f"account {intent.account} has a transaction stuck at nonce {signed.nonce}"
        if offer is None:
            most = f"{signed.offer.fee} wei per gas are offered, and more is never offered"
            self._alerts.note(intent.key, "stuck", f"{stuck}: {most}")
            return row
        # All before it are in the chain: what they took is gone from the balance.
        need = intent.value + signed.gas * offer.fee
        if (has := await self._rpc.balance(intent.account, LATEST)) < need:
            lacks = f"to replace it takes {need} wei and it has {has}: top it up"
            self._alerts.note(intent.key, "stuck", f"{stuck}: {lacks}")
            return row
        self._alerts.clear(intent.key, "stuck")
        replaced = (*signed.replaced, signed.tx_hash)
        made = self._bytes(intent, signed.nonce, offer, signed.gas, market, replaced)
        self.told.happened("replaced")
        _log.warning("transaction_replaced", row=intent.key, nonce=signed.nonce, fee=offer.fee)
        row = replace(row, signed=replace(made, mined=signed.mined), sent_at=None)
        self._put(row)  # stored before it is sent, as the first one was
        return row

    async def _displaced(self, row: OutboxRow) -> None:
        """A transaction with the row's nonce is in the chain, and not known to be the row's. It is
        given up when another's is found, and without that when it has lasted; but not what pays
        something, or was in the chain before."""
        intent, signed = row.intent, _signed(row)
        for tx_hash in signed.hashes:
            # Counted before: what was mined in between shows here.
            receipt = await self._rpc.receipt_anywhere(tx_hash)
            if receipt is not None:
                self._settle(row, receipt)
                return
        lasts, patience = self._lasts(row, "spent"), self._settings.displaced_after
        dear = bool(intent.value) or signed.mined is not None
        if lasts < (patience if dear else patience / 4) or not self._may_look(row, patience / 12):
            return
        self._looked[intent.key] = self._clock()
        taker = await self._taker(row)
        if taker is None and lasts < patience:
            return
        if taker is None and dear:
            line = f"account {intent.account}: nonce {signed.nonce} is spent, by what isn't found"
            self._alerts.note(intent.key, "spent", f"{line}: {intent.key} waits for it")
        elif taker in signed.hashes:
            line = f"account {intent.account}: no endpoint has the receipt of {taker}"
            self._alerts.note(intent.key, "spent", line)
        else:
            reason = f"nonce {signed.nonce} was used by another transaction"
            self._resolve(replace(row, state=RowState.REFUSED, signed=None, reason=reason))

    async def _taker(self, row: OutboxRow) -> str | None:
        with suppress(ChainError):
            head = (await self._rpc.head()).number
            return await self._nonces.taker(row.intent.account, _signed(row), head)
        return None

    async def _close_gap(self, row: OutboxRow, count: int) -> OutboxRow | None:
        """The row, which waits for those before it; None when it is given up."""
        account = row.intent.account
        missing = self._nonces.missing(account, count)
        if len(missing) > FEW:
            return self._unreachable(row, count)
        for nonce in missing:
            with self._journal.read() as connection:
                known = rows.with_nonce(connection, account, nonce)
            self.told.happened("gap_closed")
            _log.warning("gap_closed", account=account, nonce=nonce, known=known is not None)
            if known is None:
                await self._fill(account, nonce)
            else:
                again = replace(known, state=RowState.SENT, sent_at=None, block=None, reason="")
                self._put(again)
        return row

    async def _fill(self, account: Address, nonce: int) -> None:
        """A transfer of nothing to oneself."""
        intent = Intent(f"account:{account}:{FILL}:{nonce}", account, account, b"")
        call = Call(account, b"", account)
        market, estimate = await asyncio.gather(
            self._rpc.market(), self._rpc.estimate_gas(call, LATEST)
        )
        gas = estimate * self._settings.gas_percent // 100
        signed = self._bytes(intent, nonce, first(market, self._settings.fees), gas, market)
        self._add(OutboxRow(0, intent, RowState.SIGNED, signed, None, self._clock(), ""))

    def _unreachable(self, row: OutboxRow, count: int) -> OutboxRow | None:
        """Its nonce is far above all that will ever be there before it: a wrong count gave it."""
        intent, nonce = row.intent, _signed(row).nonce
        reason = f"nonce {nonce} is out of reach, the chain counts {count}"
        if intent.value:
            line = f"account {intent.account}: {intent.key} waits: {reason}"
            self._alerts.note(intent.key, "stuck", line)
            return row
        self._resolve(replace(row, state=RowState.REFUSED, signed=None, reason=reason))
        return None

    # --- time ------------------------------------------------------------------------------------

    def _age(self, since: Timestamp | None) -> float:
        """Seconds; for ever where it never was, or where the clock was set back since."""
        passed = float("inf") if since is None else self._clock() - since
        return passed if passed >= 0 else float("inf")

    def _lasts(self, row: OutboxRow, kind: str) -> float:
        """For how many seconds something is the matter with it."""
        key, now = (row.intent.key, kind), self._clock()
        since = self._since.get(key, now)
        self._since[key] = min(since, now)
        return now - self._since[key]

    def _over(self, row: OutboxRow, kind: str) -> None:
        self._since.pop((row.intent.key, kind), None)
        self._alerts.clear(row.intent.key, kind)


def _sure(asked: Asked | BaseException) -> Asked:
    if isinstance(asked, BaseException):
        raise asked
    return asked


def _signed(row: OutboxRow) -> Signed:
    assert row.signed is not None, "only rows with bytes are moved on from there"  # noqa: S101
    return row.signed
