"""How late the coordinator's loop is: what is due waits so long for its turn, an RPC answer too.

It is asked from a thread. A timer of the loop's own is no measure: its clock goes in milliseconds
(libuv's does, and epoll's), and it is late by up to one the more, the more else the loop has to do.
What is asked while the loop stands still waits as well, and is counted with all its waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.05


async def watch(
    lagged: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    every: float = LOOK_SECONDS,
) -> None:
    """Tell of each turn how many seconds it was waited for, until this is cancelled. `clock` is
    called from a thread too."""
    loop = asyncio.get_running_loop()
    over = threading.Event()

    def turn(asked: float) -> None:
        lagged(max(clock() - asked, 0.0))

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while not over.wait(every):
                loop.call_soon_threadsafe(turn, clock())

    threading.Thread(target=ask, name="loop-lag", daemon=True).start()
    try:
        await loop.create_future()
    finally:
        over.set()
