"""What tasks computed that cost an account its stake: kept until somebody has seen to it.

The files are the only thing by which an operator finds out whether the card, its driver or this
software was wrong. They go when the account is cleared; before that only when they are many, or
old.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from actors.ledger import Ledger
from cluster import journal_history
from cluster.core.errors import ClusterError
from cluster.core.ports import Artifacts
from cluster.journal_history import Invalidated

MOST_KEPT = 32
KEPT_SECONDS = 90 * 86_400.0
TIDY_SECONDS = 60.0


class Evidence:
    def __init__(self, ledger: Ledger, artifacts: Artifacts, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._artifacts = artifacts
        self._clock = clock
        self._log = structlog.get_logger("evidence")

    async def run(self) -> None:
        while True:
            await self.tidy()
            await asyncio.sleep(TIDY_SECONDS)

    async def tidy(self) -> None:
        """Drop what need not be kept any more."""
        tasks = self._tasks()
        kept = set(self._kept(tasks))
        for each in tasks:
            if each in kept or self._artifacts.where(each.task) is None:
                continue
            try:
                await self._artifacts.drop(each.task)
            except ClusterError as error:
                self._log.warning("evidence_not_dropped", task=each.task, error=str(error))

    def alerts(self) -> tuple[str, ...]:
        """Where it is, a line for each task. Asked with every look at the status, and nearly always
        there is none: then the journal isn't read."""
        if not self._ledger.slashed:
            return ()
        return tuple(
            f"task {each.task} cost account {each.account} its stake; what it computed is in "
            f"{where}"
            for each in self._kept(self._tasks())
            if (where := self._artifacts.where(each.task)) is not None
        )

    def _tasks(self) -> tuple[Invalidated, ...]:
        with self._ledger.journal.read() as connection:
            return journal_history.invalidated(connection)

    def _kept(self, tasks: tuple[Invalidated, ...]) -> tuple[Invalidated, ...]:
        since, slashed = self._clock() - KEPT_SECONDS, self._ledger.slashed
        unseen = [each for each in tasks if each.account in slashed and each.at >= since]
        return tuple(unseen[:MOST_KEPT])
