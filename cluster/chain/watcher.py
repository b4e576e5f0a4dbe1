"""Reads the contracts' logs and says which of our accounts to look at.

One stream for all accounts and events, from a cursor in the journal: number of the next block, and
hash of the newest that was seen, so that a reorganisation is noticed over a restart too; then the
blocks that changed are read again. Nothing depends on a wake-up being seen: a sweep reads every
account anyway, and where an account isn't as it should be, what befell it is read once more. So
what can't be decoded is left out, and after a very long absence what was missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eth_typing import ABIEvent

from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.chain.chainline import ChainLine
from cluster.chain.contract import address_of, commitment_of, decode_log, events_by_topic
from cluster.chain.rpc import Block, Log, Rpc, RpcRefused
from cluster.core.ports import KICKED_OUT, SLASHED, Wakeup
from cluster.core.types import Address, Commitment, ModelId

CURSOR = "logs"
REORGANISED = "reorganised"
MOST_READ_AGAIN = 10_000
"""Blocks, in which what befell an account is looked for once more."""

_ACCOUNT_FIELDS = {
    "TaskStarted": "selectedNode",
    "TaskParametersUploaded": "selectedNode",
    "TaskErrorReported": "selectedNode",
    "TaskScoreReady": "selectedNode",
    "DownloadModel": "nodeAddress",
    "NodeSlashed": "nodeAddress",
    "NodeKickedOut": "nodeAddress",
}
"""Events that name the node. The others name only the task: its holder is woken."""
_BEFELL = frozenset({KICKED_OUT, SLASHED})


class Holders:
    """Which of our accounts holds which task, as far as was seen; the oldest are forgotten."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._held: dict[Commitment, Address] = {}

    def learn(self, task: Commitment, account: Address) -> None:
        self._held.pop(task, None)
        self._held[task] = account
        while len(self._held) > self._capacity:
            del self._held[next(iter(self._held))]

    def get(self, task: Commitment) -> Address | None:
        return self._held.get(task)


@dataclass(frozen=True, slots=True)
class WatcherSettings:
    """In blocks: `span` at most in one request, `lookback` at most after an absence, `save_every`
    between two writes of the cursor when there was nothing for us; `depth` of reorganisations that
    are traced to their beginning."""

    span: int = 1_000
    lookback: int = 100_000
    save_every: int = 50
    depth: int = 64


def wakeup_of(
    name: str, fields: Mapping[str, Any], own: Collection[Address], holders: Holders, block: int = 0
) -> Wakeup | None:
    """Whom an event of that block concerns among `own`; None when it is another's."""
    task = commitment_of(fields["taskIDCommitment"]) if "taskIDCommitment" in fields else None
    account: Address | None
    if name in _ACCOUNT_FIELDS:
        account = address_of(fields[_ACCOUNT_FIELDS[name]])
        if account not in own:
            return None
        if task is not None:
            holders.learn(task, account)
    else:
        account = None if task is None else holders.get(task)
        if account is None:
            return None
    models = (ModelId(fields["modelID"]),) if name == "DownloadModel" else ()
    return Wakeup(account, name, models, block if name in _BEFELL else 0)


class Watcher:
    """`load` and `save` keep the cursor, the number of the next block to read: what is given to
    `save` while `poll` runs is to be stored once the wake-ups that `poll` gives were handled."""

    def __init__(
        self,
        rpc: Rpc,
        task_contract: Address,
        node_contract: Address,
        own: Callable[[], Collection[Address]],
        holders: Holders,
        load: Callable[[], str | None],
        save: Callable[[str], None],
        settings: WatcherSettings | None = None,
    ) -> None:
        self._rpc = rpc
        self._registry = node_contract
        self._events: Mapping[Address, Mapping[bytes, ABIEvent]] = {
            task_contract: events_by_topic(TASK_ABI),
            node_contract: events_by_topic(NODE_ABI),
        }
        self._own = own
        self._holders = holders
        self._load = load
        self._save = save
        self._settings = settings or WatcherSettings()
        self._next: int | None = None
        self._saved = 0
        self._span = self._settings.span
        self._line = ChainLine(self._settings.depth)
        self.began: int | None = None
        """The first block that was to be read; None before the first poll."""
        self.head: Block | None = None
        """The newest that was seen."""
        self.reorganised: Callable[[], None] = lambda: None
        """Called when blocks that were read aren't the chain's any more."""

    @property
    def next(self) -> int | None:
        """The number of the first block that wasn't read yet; None before the first poll."""
        return self._next

    @property
    def is_behind(self) -> bool:
        """Whether there are blocks to be read at once."""
        head, next_ = self.head, self._next
        return head is not None and next_ is not None and next_ <= head.number

    async def poll(self) -> tuple[Wakeup, ...]:
        """Wake-ups from one bounded range of blocks, each account and reason once."""
        block = await self._rpc.head()
        head = block.number
        first, missed = self._first(head)
        forked = await self._line.fork(block, self._rpc.block_hash)
        self.head = block
        if forked is not None:
            self.reorganised()
            first = min(first, forked)
            missed = (*missed, Wakeup(None, REORGANISED))
        last = min(head, first + self._span - 1)
        if first > last:
            self._next = first
            if forked is not None:
                self._store()
            return missed
        try:
            logs = await self._logs(list(self._events), first, last)
        except RpcRefused:
            if last == first:
                self._next = last + 1
            raise
        found = tuple(dict.fromkeys((*missed, *self._wakeups(logs, self._own()))))
        self._advance(last + 1, bool(found))
        return found

    async def befell(self, account: Address, first: int, last: int) -> tuple[Wakeup, ...]:
        """What the registry says that it did to the account in these blocks, or the newest
        `MOST_READ_AGAIN` of them."""
        first, found = max(first, last + 1 - MOST_READ_AGAIN), list[Wakeup]()
        while first <= last:
            upto = min(last, first + self._span - 1)
            try:
                logs = await self._logs([self._registry], first, upto)
            except RpcRefused:
                if upto == first:
                    raise
                continue
            woken = self._wakeups(logs, {account})
            found += [each for each in woken if each.reason in _BEFELL]
            first = upto + 1
        return tuple(found)

    async def _logs(self, of: Sequence[Address], first: int, last: int) -> Sequence[Log]:
        try:
            logs = await self._rpc.logs(of, first, last)
        except RpcRefused:
            # Most often: more results, or more blocks, than the endpoint gives at once.
            self._span = max(1, self._span // 2)
            raise
        self._span = min(self._settings.span, self._span * 2)
        return logs

    def _first(self, head: int) -> tuple[int, tuple[Wakeup, ...]]:
        """The next block to read, and a wake-up for all when blocks were left out."""
        if self._next is None:
            self._next = self._stored()
            if self._next is None:
                self._next = head + 1
            self.began = self._next
        if self._next > head + 1:
            # The chain is shorter than it was: another fork, or a devnet made anew.
            return head + 1, (Wakeup(None, "chain went back"),)
        oldest = head + 1 - self._settings.lookback
        if self._next < oldest:
            return oldest, (Wakeup(None, "blocks left out"),)
        return self._next, ()

    def _wakeups(self, logs: Iterable[Log], own: Collection[Address]) -> Iterable[Wakeup]:
        for log in logs:
            decoded = decode_log(log, self._events.get(log.address, {}))
            if decoded is not None:
                wakeup = wakeup_of(*decoded, own, self._holders, log.block)
                if wakeup is not None:
                    yield wakeup

    def _advance(self, block: int, save_now: bool) -> None:
        self._next = block
        if save_now or block - self._saved >= self._settings.save_every:
            self._store()

    def _store(self) -> None:
        newest = self._line.newest
        self._save(f"{self._next}" if newest is None else f"{self._next} {newest[0]} {newest[1]}")
        self._saved = self._next or 0

    def _stored(self) -> int | None:
        """The next block of the stored cursor, None where there is none; the hash that is stored
        with it is remembered."""
        match = re.fullmatch(r"(\d+)(?: (\d+) (0x[0-9a-f]{64}))?", self._load() or "")
        if match is None:
            return None
        if match[2] is not None:
            self._line.remember(int(match[2]), match[3])
        return int(match[1])
