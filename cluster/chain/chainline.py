"""The chain as it was seen: blocks' hashes to a set depth, so that a reorganisation is noticed.

Pure, but for the one question it has to ask: which block has a number now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.chain.rpc import Block

LEAST_PAUSE = 0.1
"""Seconds between two looks, also where blocks come faster or all have one time."""
HashOf = Callable[[int], Awaitable[str | None]]


@dataclass(slots=True)
class ChainLine:
    """`depth` in blocks: what was seen further below the newest is forgotten."""

    depth: int = 64
    _seen: deque[tuple[int, str]] = field(default_factory=deque)
    """Number and hash of heads, numbers growing."""

    @property
    def newest(self) -> tuple[int, str] | None:
        return self._seen[-1] if self._seen else None

    def remember(self, number: int, block_hash: str) -> None:
        """What an earlier process saw last."""
        self._seen.clear()
        self._seen.append((number, block_hash))

    async def fork(self, head: Block, hash_of: HashOf) -> int | None:
        """The first block that isn't the one it was, once the chain has `head`; None when all is
        as it was. An older head of the same chain is no fork: an endpoint may lag behind itself.
        A question that fails leaves all as it was: the fork is found again."""
        if not head.hash:
            return None
        if not self._seen or await self._is_on(head, hash_of):
            self._note(head)
            return None
        left = self._seen.copy()
        while left:
            number, known = left[-1]
            if number <= head.number and await self._now(head, number, hash_of) == known:
                break
            left.pop()
        base = left[-1][0] if left else max(head.number - self.depth, 0)
        self._seen = left
        self._note(head)
        return base + 1

    async def _is_on(self, head: Block, hash_of: HashOf) -> bool:
        """Whether `head` and what was seen last are of one chain."""
        number, known = self._seen[-1]
        if head.number == number + 1 and head.parent:
            return head.parent == known
        if head.number >= number:
            return await self._now(head, number, hash_of) == known
        older = [(n, h) for n, h in self._seen if n <= head.number]
        if not older:
            return False
        number, known = older[-1]
        return await self._now(head, number, hash_of) == known

    async def _now(self, head: Block, number: int, hash_of: HashOf) -> str | None:
        return head.hash if number == head.number else await hash_of(number)

    def _note(self, head: Block) -> None:
        if not self._seen or head.number > self._seen[-1][0]:
            self._seen.append((head.number, head.hash))
        while self._seen[0][0] < self._seen[-1][0] - self.depth:
            self._seen.popleft()


@dataclass(slots=True)
class Pulse:
    """When the next block is to be expected: blocks' own times, and how late we see them at best.

    Times in unix seconds of one wall clock.
    """

    least: float
    """Seconds between two looks, as long as nothing is known, and for slow chains."""
    most: float = 3.0
    """And at the most: some chains make blocks when there is something to put in them."""
    _number: int = -1
    _timestamp: float = 0.0
    _gap: float | None = None
    _delay: float | None = None

    def saw(self, number: int, timestamp: float, now: float) -> None:
        if number > self._number >= 0:
            gap = (timestamp - self._timestamp) / (number - self._number)
            self._gap = gap if self._gap is None else self._gap + 0.2 * (gap - self._gap)
            delay = now - timestamp
            # The least that was seen lately: it drifts up slowly, so that a clock that is set is
            # followed.
            self._delay = delay if self._delay is None else min(delay, self._delay + 0.05)
        if number != self._number:
            self._number, self._timestamp = number, timestamp

    @property
    def gap(self) -> float | None:
        """Seconds between two blocks, as far as is known."""
        return self._gap

    def pause(self, now: float) -> float:
        """How long to wait with the next look."""
        if self._gap is None or self._delay is None:
            return self.least
        expected = self._timestamp + self._gap + self._delay
        # Overdue, it may come at any moment.
        least = max(min(self.least, self._gap / 3), LEAST_PAUSE)
        return min(max(expected - now, least), self.most)
