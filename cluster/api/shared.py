"""One answer for all who ask within a moment: the coordinator is asked once, however many look."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Shared(Generic[Answer]):
    """`ask` is called at most once in `seconds`, and never twice at a time; a failure is not kept.

    Who gives up waiting doesn't take the answer from the others.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Answer]],
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._ask = ask
        self._seconds = seconds
        self._clock = clock
        self._asking: asyncio.Task[Answer] | None = None
        self._kept: tuple[float, Answer] | None = None

    async def get(self) -> Answer:
        if self._kept is not None and self._clock() - self._kept[0] < self._seconds:
            return self._kept[1]
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._fetch())
            # Retrieved even when all who asked have given up.
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._asking)

    async def _fetch(self) -> Answer:
        answer = await self._ask()
        self._kept = (self._clock(), answer)
        return answer
