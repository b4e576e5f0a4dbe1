"""Which nonce comes next, which one is missing, and who took one: by the journal and the chain.

An endpoint may count too few transactions of an account, because it is behind, or any number,
because it is broken. Too few shows in the journal, which knows what was mined lately. Far too many
is believed only when every endpoint says so, and says it twice.

    nonces   … 4   5   6   7   8        counted by the chain: 6, so 6 comes next there
                       ▲   ▲   ▲
                  missing  └───┴ on their way: they wait for it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.chain import outbox_rows as rows
from cluster.chain.outbox_rows import IN_FLIGHT, IN_THE_CHAIN, RowState, Signed
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError
from cluster.core.types import Address, Timestamp
from cluster.journal import SqlJournal

FEW = 16
"""Transactions that may come from elsewhere (a wallet with the same key) and surprise nobody."""
_SPENT = IN_THE_CHAIN | {RowState.REVERTED}


@dataclass(frozen=True, slots=True)
class _Gap:
    count: int
    since: Timestamp


class Nonces:
    """`patience` in seconds: what an endpoint may be behind, and how long a gap may last."""

    def __init__(
        self, rpc: Rpc, journal: SqlJournal, clock: Callable[[], Timestamp], patience: float
    ) -> None:
        self._rpc = rpc
        self._journal = journal
        self._clock = clock
        self._patience = patience
        self._doubted: dict[Address, int] = {}
        self._gaps: dict[Address, _Gap] = {}

    async def next(self, account: Address, count: int) -> int:
        """The nonce of a new transaction, where the chain counts so many of the account; raises
        `ChainError` while that can't be."""
        with self._journal.read() as connection:
            ever = rows.highest_nonce(connection, account)
            flying = rows.highest_nonce(connection, account, IN_FLIGHT)
            recent = self._clock() - self._patience
            spent = (
                rows.highest_nonce(connection, account, _SPENT, recent),
                # Not final: as long as it may be sent again, its nonce is nobody else's.
                rows.highest_nonce(connection, account, frozenset({RowState.MINED})),
            )
        last = max((nonce for nonce in spent if nonce is not None), default=None)
        count = await self._believed(account, count, 0 if ever is None else ever + 1)
        if last is not None and count <= last:
            raise ChainError(f"{account}: the endpoint is behind, it doesn't count nonce {last}")
        return count if flying is None else max(count, flying + 1)

    async def _believed(self, account: Address, count: int, expected: int) -> int:
        if count <= expected + FEW:
            self._doubted.pop(account, None)
            return count
        least = min(await self._rpc.transaction_counts(account))
        before = self._doubted.get(account)
        self._doubted[account] = least
        if least > expected + FEW and (before is None or least < before):
            raise ChainError(
                f"{account}: {least} transactions are counted, where {expected} are known of: "
                "asked again"
            )
        return least

    def missing(self, account: Address, count: int) -> range:
        """Nonces that those on their way wait for and nothing on its way has, once that has
        lasted."""
        with self._journal.read() as connection:
            lowest = rows.lowest_nonce(connection, account, IN_FLIGHT)
        if lowest is None or lowest <= count:
            self._gaps.pop(account, None)
            return range(0)
        gap, now = self._gaps.get(account), self._clock()
        if gap is None or gap.count != count or gap.since > now:
            gap = self._gaps[account] = _Gap(count, now)
        return range(count, lowest) if now - gap.since >= self._patience else range(0)

    async def taker(self, account: Address, signed: Signed, head: int) -> str | None:
        """The hash of the account's transaction in the chain that has this one's nonce; None where
        it isn't found, because it is too long ago or there is none."""
        nonce = signed.nonce
        low, high = max(signed.block - 1, 0), head
        if await self._rpc.transaction_count(account, low) > nonce:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if await self._rpc.transaction_count(account, middle) > nonce:
                high = middle
            else:
                low = middle
        return await self._rpc.transaction_by(account, nonce, high)
