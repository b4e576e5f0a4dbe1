"""One world around the fakes: a journal, artifacts and metrics, reconciler and dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.dispatcher import Dispatcher
from actors.ledger import Ledger
from actors.reconciler import LONGEST_PAUSE, Reconciler
from actors.safeguards import Safeguards, SafeguardSettings
from cluster.artifacts import FolderArtifacts
from cluster.core.lifecycle import Policy
from cluster.core.record import Event, Noticed, Seen
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    FileRef,
    Gpu,
    TaskType,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal
from cluster.metrics import Metrics
from tests.unit.actor_fakes import ALICE, TASK, Clock, FakeNetwork, FakePool, gpu_of, until


class WatchedArtifacts(FolderArtifacts):
    """The real ones; `busy` counts what their threads are at."""

    busy = 0

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def put(
        self, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> tuple[FileRef, ...]:
        with self._at_work():
            return await super().put(task, files)

    async def get(
        self, task: Commitment, files: Sequence[FileRef]
    ) -> tuple[tuple[str, bytes], ...]:
        with self._at_work():
            return await super().get(task, files)

    async def drop(self, task: Commitment) -> None:
        with self._at_work():
            await super().drop(task)


@dataclass
class House:
    """A journal, artifacts, metrics and the two classes under test, around the fakes."""

    path: Path
    gpus: tuple[Gpu, ...] = (gpu_of(),)
    policy: Policy = Policy(retry_backoff=0.0)
    settings: SafeguardSettings = SafeguardSettings()
    clock: Clock = field(default_factory=Clock)
    settled: list[Commitment] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = SqlJournal(f"sqlite:///{self.path}/journal.db")
        self.artifacts = WatchedArtifacts(self.path / "artifacts")
        self.metrics = Metrics("1", "abc")
        self.network = FakeNetwork(self.clock)
        self.pool = FakePool(*self.gpus)
        self.ids = itertools.count(1)
        self.begin_term()

    def begin_term(self) -> None:
        """A coordinator starts: all that it knows is what the journal holds."""
        lease = self.journal.acquire("me", Timestamp(self.clock()), 15.0)
        assert lease is not None
        self.ledger = Ledger.load(self.journal, lease, self.clock)
        self.safeguards = Safeguards(
            self.ledger,
            self.pool,
            self.settings,
            self.metrics,
            self.clock,
            self.new_attempt_id,
            lambda: self.dispatcher.dispatch(Timestamp(self.clock())),
        )
        self.dispatcher = Dispatcher(
            self.ledger,
            self.pool,
            self.artifacts,
            self.metrics,
            self.new_attempt_id,
            self.settled.append,
            self.failed.append,
            self.safeguards,
        )
        self.safeguards.attach(self.dispatcher)
        self.reconciler = Reconciler(
            self.ledger,
            self.network,
            self.artifacts,
            self.dispatcher,
            self.policy,
            self.metrics,
            self.clock,
        )

    def new_attempt_id(self) -> AttemptId:
        return AttemptId(f"a{next(self.ids)}")

    def open(self, task: Commitment, *events: Event, account: Address = ALICE) -> None:
        """Put a task with this history into the journal."""
        self.ledger.append(task, Seen(account, TaskType.SD, (), Wei(5)))
        for event in events:
            self.ledger.append(task, event)

    async def turn(self, account: Address = ALICE) -> float | None:
        """A look and a turn, and placing what is wanted: the coordinator's loop in small."""
        known = [record.commitment for record in self.ledger.of_account(account)]
        due = await self.reconciler.turn(await self.network.look(account, known))
        self.dispatcher.dispatch(Timestamp(self.clock()))
        return due

    async def calm(self) -> None:
        """Let followers, and the threads that keep files, do all that they can do now."""
        for _ in range(3):
            for _ in range(10):
                await asyncio.sleep(0)
            await until(lambda: self.artifacts.busy == 0)

    async def calm_but_for(self, calls: int) -> None:
        """Wait until so many of the network's calls wait at their gates."""
        await until(lambda: self.network.waiting == calls)

    async def turns(self, count: int, account: Address = ALICE) -> None:
        """So many turns, each after its pause is over and the followers had their say.

        Longer waits are for the network's deadlines, and are not waited for.
        """
        for _ in range(count):
            due = await self.turn(account)
            await self.calm()
            self.clock.now += due if due is not None and due <= LONGEST_PAUSE else 0.0

    def story(self, task: Commitment = TASK) -> list[Event]:
        return [event for event, _ in self.journal.story(task)]

    def kinds(self, task: Commitment = TASK) -> list[str]:
        """What was done for the task; what was only noticed is left out."""
        names = [type(event).__name__ for event in self.story(task)]
        return [name for name in names if name != Noticed.__name__]
