"""A journal that doesn't answer who asks it for the lease."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cluster.core.ports import Lease
from cluster.core.types import Timestamp
from tests.unit.actor_fakes import until
from tests.unit.test_term import Office, named, serving


class Swallowing:
    """An office whose journal keeps the first question for the lease, while `go` isn't set."""

    def __init__(self, office: Office, seconds: float | None = None) -> None:
        self.go = threading.Event()
        self.asked: list[Timestamp] = []
        self.answered = 0
        journal = office.journal
        acquire = journal.acquire

        def swallow(holder: str, now: Timestamp, ttl: float) -> Lease | None:
            self.asked.append(now)
            if len(self.asked) == 1:
                answered = self.go.wait(30.0 if seconds is None else seconds)
                assert answered or seconds is not None
            lease = acquire(holder, now, ttl)
            self.answered += 1
            return lease

        journal.acquire = swallow  # type: ignore[method-assign]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        yield entries


async def test_the_loop_goes_on_while_the_journal_swallows_the_question(office: Office) -> None:
    journal = Swallowing(office)
    try:
        async with serving(office):
            await until(lambda: len(journal.asked) == 1)
            assert not office.status.acting
            journal.go.set()
            await office.acting()
    finally:
        journal.go.set()


async def test_a_lease_that_came_after_its_end_is_not_used(office: Office, logs: list[Any]) -> None:
    office.lease_for(0.3)
    Swallowing(office, seconds=0.4)
    async with serving(office):
        assert await office.acting() == 2
        assert office.opened == 1
    assert named(logs, "lease_came_too_late") == 1
    assert named(logs, "acting") == 1


async def test_a_lease_that_came_late_is_renewed_before_it_ends(office: Office) -> None:
    office.lease_for(2.0)
    journal = Swallowing(office, seconds=1.4)
    async with serving(office):
        assert await office.acting() == 1
        ends = journal.asked[0] + 2.0
        await until(lambda: office.lease().expires_at > ends)
        assert office.clock() < ends


async def test_who_waits_for_a_journal_that_swallows_can_be_stopped(office: Office) -> None:
    journal = Swallowing(office)
    try:
        async with serving(office):
            await until(lambda: len(journal.asked) == 1)
            async with asyncio.timeout(5.0):
                await office.coordinator.stop()
            journal.go.set()
            await until(lambda: journal.answered == 1)
            # What nobody waits for any more is given back.
            await until(lambda: office.lease().holder == "")
    finally:
        journal.go.set()
    assert office.opened == 0
    assert office.lease().epoch == 1


async def test_a_run_that_is_cancelled_meanwhile_keeps_no_lease(office: Office) -> None:
    journal = Swallowing(office)
    try:
        async with serving(office):
            await until(lambda: len(journal.asked) == 1)
        journal.go.set()
        await until(lambda: office.lease().epoch == 1 and office.lease().holder == "")
    finally:
        journal.go.set()
