"""Reads the contracts' logs and says which of our accounts to look at.

One stream for all accounts and events, from a cursor in the journal: number of the next block, and
hash of the newest that was seen, so that a reorganisation is noticed over a restart too; then the
blocks that changed are read again. A sweep reads every account anyway, but with many accounts it
comes late: so no block is passed over because an endpoint failed or refused it, and the newest ones
are read again with each new block, because an endpoint of many machines has logs later than heads.

         again      next            head
    ─────┬───────────┬───────────────┬──────▶ blocks
         └── read once more ─┴─ read ─┘         what was told of already isn't told again

What can't be decoded is left out. Blocks are, after a very long absence or when one is refused for
long; then all accounts are looked at.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from eth_typing import ABIEvent

from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.chain.chainline import ChainLine
from cluster.chain.contract import address_of, commitment_of, decode_log, events_by_topic
from cluster.chain.rpc import AT_ONCE, Block, Log, Rpc, RpcRefused
from cluster.core.errors import ChainError
from cluster.core.ports import KICKED_OUT, SLASHED, Wakeup
from cluster.core.types import Address, Commitment, ModelId

CURSOR = "logs"
REORGANISED = "reorganised"
LEFT_OUT = "blocks left out"
WENT_BACK = "chain went back"
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
_HEAD_BYTES = 12 * 32
_BEFELL = frozenset({KICKED_OUT, SLASHED})
_log = structlog.get_logger(__name__)


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

    def knows(self, task: bytes) -> bool:
        return "0x" + task.hex() in self._held


@dataclass(frozen=True, slots=True)
class WatcherSettings:
    """In blocks: `span` at most in one request, `first_span` in the first; `lookback` at most after
    an absence; `again`: so many of the newest are read once more with each new one, and once more
    when there was none for `quiet` seconds; `save_every` between two writes of the cursor when
    there was nothing for us; `depth` of reorganisations that are traced to their beginning.

    A block whose logs were refused `refusals` times, and for `refused` seconds, is left out.
    """

    span: int = 1_000
    first_span: int = 50
    lookback: int = 100_000
    again: int = 4
    save_every: int = 50
    depth: int = 64
    quiet: float = 3.0
    refusals: int = 10
    refused: float = 30.0


@dataclass(frozen=True, slots=True)
class _Stuck:
    """A block whose logs nobody gives."""

    block: int
    since: float
    times: int = 0


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


def _head(data: bytes) -> Iterable[bytes]:
    """The words in which an event's addresses and commitments stand."""
    return (data[at : at + 32] for at in range(0, min(len(data), _HEAD_BYTES), 32))


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` in seconds, of any beginning."""
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
        self._clock = clock
        self._next: int | None = None
        self._saved = 0
        self._span = self._settings.first_span
        self._found: dict[Wakeup, None] = {}
        """What is to be told of, and wasn't yet."""
        self._told: dict[Log, None] = {}
        """Of the newest blocks: logs that woke somebody."""
        self._stuck: _Stuck | None = None
        self._read_at: float | None = None
        """When the newest block was read; None once it was read again."""
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
        """Wake-ups from one bounded range of blocks, each account and reason once. What was found
        before a failure is given all the same; the failure shows when it is tried again."""
        try:
            await self._poll()
        except ChainError:
            if not self._found:
                raise
        found = tuple(self._found)
        self._found.clear()
        return found

    async def _poll(self) -> None:
        head = await self._rpc.head()
        next_ = self._begin(head)
        forked = await self._line.fork(head, self._rpc.block_hash)
        self.head = head
        if forked is not None:
            # Kept here, because what is asked for next may fail.
            self._next = next_ = min(next_, forked)
            self._found[Wakeup(None, REORGANISED, moment=forked)] = None
            self._told = {log: None for log in self._told if log.block < forked}
            self.reorganised()
        first, last = self._range(next_, head.number)
        if first <= last:
            await self._read(first, last)
        elif forked is not None:
            self._store()

    def _range(self, next_: int, head: int) -> tuple[int, int]:
        """The blocks to read now, an empty range for none."""
        nothing = (1, 0)
        if next_ > head and not self._is_quiet(next_, head):
            return nothing
        last = min(head, next_ + self._span - 1)
        again = max(self.began or 0, last + 1 - self._span, head - self._settings.again)
        return min(next_, again), last

    def _is_quiet(self, next_: int, head: int) -> bool:
        """Whether there was no new block for so long that the newest are to be read again."""
        read_at = self._read_at
        if read_at is None or next_ > head + 1:
            return False
        return self._clock() - read_at >= self._settings.quiet

    async def _read(self, first: int, last: int) -> None:
        try:
            logs = await self._logs(list(self._events), first, last)
        except ChainError as error:
            if first < last or not self._give_up(first, error):
                raise
            logs = ()
        self._stuck = None
        before = len(self._found)
        for log, wakeup in await self._woken(logs, self._own()):
            if log not in self._told:
                self._found[wakeup] = self._told[log] = None
        self._advance(last + 1, len(self._found) > before)

    def _give_up(self, block: int, error: ChainError) -> bool:
        """Whether the block was refused often and long enough to be left out."""
        now = self._clock()
        if self._stuck is None or self._stuck.block != block:
            self._stuck = _Stuck(block, now)
        self._stuck = stuck = replace(self._stuck, times=self._stuck.times + 1)
        enough, long = self._settings.refusals, self._settings.refused
        if stuck.times < enough or now - stuck.since < long:
            return False
        if self._next is None or block >= self._next:
            _log.warning("block_left_out", block=block, reason=str(error))
            self._found[Wakeup(None, LEFT_OUT)] = None
        return True

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
            woken = await self._woken(logs, {account})
            found += [each for _, each in woken if each.reason in _BEFELL]
            first = upto + 1
        return tuple(found)

    async def _logs(self, of: Sequence[Address], first: int, last: int) -> Sequence[Log]:
        try:
            logs = await self._rpc.logs(of, first, last)
        except ChainError:
            # Refused, cut off or too slow: often because there is more in it than is given at once.
            self._span = max(1, (last + 1 - first) // 2)
            raise
        self._span = min(self._settings.span, self._span * 2)
        return logs

    def _begin(self, head: Block) -> int:
        """The next block to read. When blocks are left out, all are woken."""
        if self._next is None:
            self._next = self._stored()
            if self._next is None:
                self._next = head.number + 1
            self.began = self._next
        oldest = head.number + 1 - self._settings.lookback
        comparable = head.hash and self._line.newest is not None
        if self._next > head.number + 1 and not comparable:
            # Shorter than it was, and no saying whether it is the same one: what comes is read.
            self._next = head.number + 1
            self._found[Wakeup(None, WENT_BACK)] = None
        elif self._next < oldest:
            _log.warning("blocks_left_out", first=self._next, last=oldest - 1)
            self._next = oldest
            self._found[Wakeup(None, LEFT_OUT)] = None
        return self._next

    async def _woken(
        self, logs: Sequence[Log], own: Collection[Address]
    ) -> list[tuple[Log, Wakeup]]:
        """Those that concern one of our accounts, found by what stands in their data: to decode all
        would keep everybody else waiting, however many are other people's."""
        names = {bytes(12) + bytes.fromhex(address[2:]) for address in own}
        found: list[tuple[Log, Wakeup]] = []
        for index, log in enumerate(logs):
            if index % AT_ONCE == 0:
                await asyncio.sleep(0)
            if any(word in names or self._holders.knows(word) for word in _head(log.data)):
                wakeup = self._wakeup(log, own)
                if wakeup is not None:
                    found.append((log, wakeup))
        return found

    def _wakeup(self, log: Log, own: Collection[Address]) -> Wakeup | None:
        decoded = decode_log(log, self._events.get(log.address, {}))
        return None if decoded is None else wakeup_of(*decoded, own, self._holders, log.block)

    def _advance(self, block: int, save_now: bool) -> None:
        head = 0 if self.head is None else self.head.number
        if block > head:
            again = block == self._next
            self._read_at = None if again else self._clock()
        self._next = block
        oldest = block - self._settings.again - 1
        self._told = {log: None for log in self._told if log.block >= oldest}
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
