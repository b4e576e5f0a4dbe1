"""The lease is asked for in a thread: a database that swallows the question keeps the loop, and who
asks the coordinator how it is, waiting no longer than one that answers.

    asked ──────────────── answer ──────────────── until = asked + seconds
      └ the lease holds from here, by the clock of whoever asked; an answer after `until` is void
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from cluster.core.ports import Lease
from cluster.core.types import Timestamp


class Leases(Protocol):
    """As `ports.Journal` has them."""

    def acquire(self, holder: str, now: Timestamp, ttl: float) -> Lease | None: ...
    def release(self, lease: Lease) -> None: ...


@dataclass(frozen=True, slots=True)
class Taken:
    lease: Lease
    until: float
    """By this machine's clock."""


async def take(
    journal: Leases,
    holder: str,
    clock: Callable[[], float],
    seconds: float,
    stopping: asyncio.Event,
) -> Taken | None:
    """None where another has it, where it came too late, and as soon as `stopping` is set. What
    comes when nobody waits for it any more is given back. Raises what the journal does."""
    log = structlog.get_logger("coordinator")
    asked = Timestamp(clock())
    nobody_waits = threading.Event()

    def ask() -> Lease | None:
        lease = journal.acquire(holder, asked, seconds)
        if lease is not None and nobody_waits.is_set():
            journal.release(lease)
            return None
        return lease

    asking = asyncio.ensure_future(asyncio.to_thread(ask))
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((asking, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not asking.done():
            nobody_waits.set()
            asking.cancel()
    if asking.cancelled() or not asking.done():
        return None
    lease = asking.result()
    if lease is None:
        log.info("waiting_for_the_lease")
        return None
    if clock() >= asked + seconds:
        log.warning("lease_came_too_late", epoch=lease.epoch, seconds=round(clock() - asked, 1))
        return None
    return Taken(lease, asked + seconds)
