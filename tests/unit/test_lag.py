"""How late a loop is, by a clock that is set."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from actors import lag


class Clock:
    """Counts how often the asking thread has read it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = threading.Semaphore(0)
        self._loop = threading.get_ident()

    def __call__(self) -> float:
        now = self.now
        if threading.get_ident() != self._loop:
            self.asked.release()
        return now


async def test_what_is_asked_while_the_loop_stands_still_has_waited_too() -> None:
    clock, found = Clock(), list[float]()
    enough = asyncio.Event()

    def lagged(seconds: float) -> None:
        found.append(seconds)
        if seconds == 0.0:
            enough.set()

    watching = asyncio.create_task(lag.watch(lagged, clock, 0.001))
    await enough.wait()
    # The loop stands still here, for three questions at least, of which each waits for less.
    for _ in range(3):
        clock.now += 1.0
        while clock.asked.acquire(blocking=False):
            pass
        assert clock.asked.acquire(timeout=10)
    found.clear()
    clock.now += 1.0
    enough.clear()
    await enough.wait()
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    late = list(dict.fromkeys(each for each in found if each))
    assert late == [3.0, 2.0, 1.0] or late == [4.0, 3.0, 2.0, 1.0]


async def test_nobody_asks_once_it_is_over() -> None:
    begun = asyncio.Event()
    watching = asyncio.create_task(lag.watch(lambda _seconds: begun.set(), Clock(), 0.001))
    await begun.wait()
    (thread,) = (each for each in threading.enumerate() if each.name == "loop-lag")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
