"""Wake-ups on their way from the watcher to whoever handles them, and how far handling has come.

Where to read on after a crash is stored only when all that was found before is handled: what wasn't
is found again then.

    give, give, reached(90) ──▶ take ─▶ take ─▶ take: both are handled, 90 is stored
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.ports import Wakeup

DROPPED = "too many wake-ups"


@dataclass(frozen=True, slots=True)
class _Mark:
    """Once `given` wake-ups are handled, so is all before `block`."""

    given: int
    block: int
    cursor: str | None
    """To be stored then, if there is one."""


class Wakeups:
    """One gives, one takes; at most `most` wait. `store` keeps the cursor."""

    def __init__(self, most: int, store: Callable[[str], None]) -> None:
        self._queue: asyncio.Queue[Wakeup] = asyncio.Queue(most)
        self._store = store
        self._given = self._taken = self._done = 0
        self._dropped = False
        self._marks: deque[_Mark] = deque()
        self.handled: int | None = None
        """All that is known of the blocks before this one is handled."""

    def give(self, wakeup: Wakeup) -> None:
        """When too many wait, one for everybody stands for those that have no room."""
        if self._queue.full():
            self._dropped = True
            return
        self._queue.put_nowait(wakeup)
        self._given += 1

    def reached(self, block: int, cursor: str | None) -> None:
        """What was given so far is all that there is of the blocks before this one."""
        if self._marks and self._marks[-1].given == self._given:
            before = self._marks.pop().cursor
            cursor = cursor or before
        self._marks.append(_Mark(self._given, block, cursor))
        self._pass()

    async def take(self) -> Wakeup:
        """The next; whoever takes it has handled those before."""
        self._done = self._taken
        self._pass()
        if self._dropped:
            self._dropped = False
            return Wakeup(None, DROPPED)
        wakeup = await self._queue.get()
        self._taken += 1
        return wakeup

    def _pass(self) -> None:
        cursor: str | None = None
        while self._marks and self._marks[0].given <= self._done:
            mark = self._marks.popleft()
            self.handled, cursor = mark.block, mark.cursor or cursor
        if cursor is not None:
            self._store(cursor)
