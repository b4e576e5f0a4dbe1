"""What people ask of the journal, apart from what the coordinator's loop asks and writes.

A few threads and as many connections of their own, and a short queue: who comes when that is full
is told so at once. Whoever asks too much so makes others wait who ask, and nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cluster.core.errors import ClusterError
from cluster.journal import SqlJournal

THREADS = 3
MOST_WAITING = 16

Answer = TypeVar("Answer")


class TooBusy(ClusterError):
    """As much is asked already as can be answered in time."""


class Lookups:
    def __init__(self, journal: SqlJournal) -> None:
        self._journal = journal.reader(THREADS)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lookups")
        self._asked: set[Future[object]] = set()

    async def ask(self, look: Callable[[SqlJournal], Answer]) -> Answer:
        """What `look` finds, in a thread. Raises what it does, and `TooBusy`."""
        # Those that nobody waits for any more count too: their threads go on.
        self._asked = {each for each in self._asked if not each.done()}
        if len(self._asked) >= THREADS + MOST_WAITING:
            raise TooBusy("busy with what others ask; try again in a moment")
        asked = self._threads.submit(look, self._journal)
        self._asked.add(asked)  # type: ignore[arg-type]
        return await asyncio.wrap_future(asked)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._journal.close()
