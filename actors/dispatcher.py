"""From a task that wants to be executed to its attempt's outcome in the journal.

`want` is said anew on every turn of a task, so wants are never stale; `dispatch` places them
(cluster.core.matching) and follows each attempt in a task of its own. An attempt that an earlier
coordinator started is followed again by its id: starting it twice is harmless. An answer that comes
after its attempt was given up is dropped.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from actors.ledger import Ledger
from actors.pace import Pace
from cluster.core.draining import movable
from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    LeaseLost,
    ModelUnavailable,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.matching import Card, Want, expected_free, place
from cluster.core.ports import Artifacts, Computed, GpuPool, Order
from cluster.core.prefetching import hints
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Fault,
    FaultFound,
    ResultStored,
    TaskRecord,
)
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    Gpu,
    GpuId,
    GpuState,
    Timestamp,
    Work,
)
from cluster.core.wording import brief
from cluster.logs import scrub
from cluster.metrics import Metrics

UNKNOWN_BUSY_SECONDS = 5.0
"""How long a card is expected to stay busy with something that isn't ours to know."""
MOST_READ = 4_000
"""Characters of what an error says that are looked through."""

_FAULTS: tuple[tuple[type[ClusterError], Fault], ...] = (
    (DeviceFault, Fault.DEVICE),
    (ModelUnavailable, Fault.MODEL),
    (TaskUnsupported, Fault.UNSUPPORTED),
    (AttemptLost, Fault.LOST),
    (Cancelled, Fault.CANCELLED),
    (DeadlinePassed, Fault.DEADLINE),
)


def event_for(attempt: AttemptId, error: ClusterError) -> Event:
    """What an attempt's error means for the task, by the error's type alone."""
    said = brief(scrub(str(error)[:MOST_READ]))
    if isinstance(error, TaskInvalid):
        return FaultFound(said)
    if isinstance(error, DeviceFault) and error.kind is DeviceFaultKind.OUT_OF_MEMORY:
        return AttemptFailed(attempt, Fault.MEMORY, said)
    for kind, fault in _FAULTS:
        if isinstance(error, kind):
            return AttemptFailed(attempt, fault, said)
    return AttemptFailed(attempt, Fault.DEVICE, f"{type(error).__name__}: {said}")


class Guard(Protocol):
    """What watches over the cards, as far as tasks are concerned."""

    def free(self, gpu: Gpu) -> bool:
        """Whether a task may start on a card that no task is on."""
        ...

    def judged(self, gpu: GpuId, order: Order, error: ClusterError) -> ClusterError:
        """The card has just been at fault. What the attempt failed with: this, or another error
        where it turns out to be the task's."""
        ...

    async def vetted(self, gpu: GpuId, order: Order, computed: Computed) -> Computed:
        """The result to be stored. Raises `DeviceFault` when this one can't be trusted."""
        ...


class Unguarded:
    """Every card is free, every result stands."""

    def free(self, gpu: Gpu) -> bool:
        return True

    def judged(self, gpu: GpuId, order: Order, error: ClusterError) -> ClusterError:
        return error

    async def vetted(  # noqa: RUF029 - others await
        self, gpu: GpuId, order: Order, computed: Computed
    ) -> Computed:
        return computed


@dataclass(frozen=True, slots=True)
class _Running:
    task: Commitment
    attempt: AttemptId
    work: Work
    pipeline: str
    due: Timestamp
    deadline: Timestamp | None
    want: Want

    def free_at(self, now: Timestamp) -> Timestamp:
        return expected_free(self.due, now)


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A task's computing that is still to be done: seconds, and when it would be too late."""

    account: Address
    seconds: float
    deadline: Timestamp | None
    task: Commitment


class Dispatcher:
    """`settled(task)` is called when an attempt's outcome has been stored."""

    def __init__(
        self,
        ledger: Ledger,
        pool: GpuPool,
        artifacts: Artifacts,
        metrics: Metrics,
        new_attempt_id: Callable[[], AttemptId],
        settled: Callable[[Commitment], None],
        failed: Callable[[BaseException], None],
        guard: Guard = Unguarded(),  # noqa: B008 - has no state
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._guard = guard
        self._artifacts = artifacts
        self._metrics = metrics
        self._pace = Pace(ledger)
        self._new_attempt_id = new_attempt_id
        self._settled = settled
        self._failed = failed
        self.broke: Callable[[GpuId, Order, ClusterError], None] = lambda _gpu, _order, _error: None
        """Called with each attempt that failed, before that is stored."""
        self._wants: dict[Commitment, tuple[Want, Order, Work]] = {}
        self._running: dict[GpuId, _Running] = {}
        self._hinted: dict[GpuId, Commitment] = {}
        self._followers: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("dispatch")

    def seconds_for(self, work: Work, pipeline: str = "") -> float:
        """How long so much work takes with a set of models, as far as was measured."""
        return self._pace.seconds_for(work, pipeline)

    def want(self, want: Want, order: Order, work: Work) -> None:
        """The task may be started with `order` (whose attempt id is filled in on placement)."""
        self._wants[want.task] = (want, order, work)

    def forget(self, task: Commitment) -> None:
        self._wants.pop(task, None)

    def waiting(self) -> tuple[Commitment, ...]:
        return tuple(self._wants)

    def outstanding(self, now: Timestamp) -> list[Outstanding]:
        """What is still to be computed, by what is known of the tasks and the cards' pace."""
        found = [
            (task, want.compute_seconds, want.deadline)
            for task, (want, _, _) in self._wants.items()
        ]
        found += [
            (running.task, max(0.0, running.due - now), running.deadline)
            for running in self._running.values()
        ]
        return [
            Outstanding(record.account, seconds, deadline, task)
            for task, seconds, deadline in found
            if (record := self._ledger.open.get(task)) is not None
        ]

    def idle(self) -> tuple[Gpu, ...]:
        """Cards that are ready and have nothing to do with any task."""
        taken = self._held() | self._running.keys()
        return tuple(
            gpu
            for gpu in self._pool.gpus()
            if gpu.state is GpuState.READY and gpu.gpu_id not in taken
        )

    def follows(self, attempt: AttemptId) -> bool:
        return any(running.attempt == attempt for running in self._running.values())

    def dispatch(self, now: Timestamp) -> None:
        """Place what is wanted on what is free; each placement is stored before it is started."""
        if not self._wants:
            return
        wants = [want for want, _, _ in self._wants.values()]
        held = self._held()
        cards = [self._card(gpu, now, held) for gpu in self._pool.gpus()]
        for placement in place(wants, cards, now):
            want, order, work = self._wants.pop(placement.task)
            attempt = self._new_attempt_id()
            self._ledger.append(want.task, AttemptStarted(attempt, placement.gpu_id))
            account = self._ledger.open[want.task].account
            self._log.info(
                "attempt_started",
                task=want.task,
                account=account,
                gpu=placement.gpu_id,
                attempt=attempt,
            )
            ready = Timestamp(now + placement.start_seconds)
            self.follow(placement.gpu_id, replace(order, attempt_id=attempt), want, work, ready)
        self._read_ahead(now)

    def _read_ahead(self, now: Timestamp) -> None:
        """What still waits, and whose models are near no card: have them read meanwhile."""
        wants = [want for want, _, _ in self._wants.values()]
        held = self._held()
        cards = [self._card(gpu, now, held) for gpu in self._pool.gpus()]
        hinted = {hint.gpu_id: hint.task for hint in hints(wants, cards, now)}
        for gpu_id, task in hinted.items():
            if self._hinted.get(gpu_id) != task:
                self._pool.prefetch(gpu_id, self._wants[task][1])
        self._hinted = hinted

    def follow(self, gpu: GpuId, order: Order, want: Want, work: Work, now: Timestamp) -> None:
        """Follow an attempt that the journal holds, be it new or an earlier coordinator's."""
        follower = asyncio.get_running_loop().create_task(self._follow(gpu, order))
        self._followers.add(follower)
        follower.add_done_callback(self._surface)
        due = Timestamp(now + want.compute_seconds)
        self._running[gpu] = _Running(
            want.task, order.attempt_id, work, want.pipeline, due, want.deadline, want
        )

    def movable(
        self, cards: Set[GpuId], now: Timestamp
    ) -> list[tuple[GpuId, Commitment, AttemptId]]:
        """What is computed on these cards, and would be done in time on another."""
        there = {gpu: each for gpu, each in self._running.items() if gpu in cards}
        held = self._held()
        found = movable(
            [each.want for each in there.values()],
            [want for want, _, _ in self._wants.values()],
            [self._card(gpu, now, held) for gpu in self._pool.gpus() if gpu.gpu_id not in cards],
            now,
        )
        return [(gpu, each.task, each.attempt) for gpu, each in there.items() if each.task in found]

    async def cancel(self, gpu: GpuId, task: Commitment, attempt: AttemptId) -> None:
        """Give the attempt up: what it may still answer is dropped."""
        await self._pool.cancel(gpu, attempt)
        self._store(task, attempt, AttemptFailed(attempt, Fault.CANCELLED, "given up"))

    async def stop(self) -> None:
        """Stop following; the GPUs go on, and the next coordinator follows again."""
        followers = tuple(self._followers)
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    async def _follow(self, gpu: GpuId, order: Order) -> None:
        try:
            there = self._ledger.open.get(order.task)
            account = "" if there is None else there.account
            event = await self._outcome(gpu, order)
            fault = event.fault if isinstance(event, AttemptFailed) else None
            self._metrics.attempt_ended(fault, self._uuid_of(gpu))
            if isinstance(event, ResultStored) and event.effort is not None:
                self._metrics.computed(event.effort.tier)
            if self._store(order.task, order.attempt_id, event):
                self._log.info(
                    "attempt_ended",
                    task=order.task,
                    account=account,
                    gpu=gpu,
                    attempt=order.attempt_id,
                    outcome=type(event).__name__,
                    detail=_detail(event),
                )
        finally:
            running = self._running.get(gpu)
            if running is not None and running.attempt == order.attempt_id:
                del self._running[gpu]
            self._settled(order.task)

    def _uuid_of(self, gpu_id: GpuId) -> str:
        return next((gpu.uuid for gpu in self._pool.gpus() if gpu.gpu_id == gpu_id), "")

    def _surface(self, follower: asyncio.Task[None]) -> None:
        """A follower's own failure (a lost lease, a bug) ends the coordinator's term."""
        self._followers.discard(follower)
        if not follower.cancelled() and (error := follower.exception()) is not None:
            self._failed(error)

    async def _outcome(self, gpu: GpuId, order: Order) -> Event:
        try:
            await self._pool.start(gpu, order)
            computed = await self._pool.result(gpu, order.attempt_id)
            self._learn(gpu, computed.seconds)
            return await self._keep(order, await self._guard.vetted(gpu, order, computed))
        except LeaseLost:
            raise
        except ClusterError as error:
            found = error
            if isinstance(error, DeviceFault) or self._died(order, error):
                found = self._guard.judged(gpu, order, error)
            if not isinstance(found, Cancelled):
                self.broke(gpu, order, found)
            return event_for(order.attempt_id, found)
        except OSError as error:
            # Our own disk: the files couldn't be kept, so there is no result.
            lost = ClusterError(f"artifacts: {brief(str(error))}")
            lost.trace = "".join(traceback.format_exception(error))
            self.broke(gpu, order, lost)
            return AttemptFailed(order.attempt_id, Fault.DEVICE, str(lost))

    def _died(self, order: Order, error: ClusterError) -> bool:
        """Whether the card's process ended by itself: a given up attempt's is ended by the pool if
        it doesn't heed. Until the pool has seen the next process, the card passes for the last."""
        wanted = is_open(self._ledger.open.get(order.task), order.attempt_id)
        return isinstance(error, AttemptLost) and wanted

    def _learn(self, gpu: GpuId, seconds: float) -> None:
        running = self._running.get(gpu)
        if running is not None:
            self._pace.learn(running.work, running.pipeline, seconds)

    async def _keep(self, order: Order, computed: Computed) -> Event:
        files = await self._artifacts.put(order.task, computed.files)
        card = computed.card or None
        return ResultStored(order.attempt_id, computed.score, files, computed.effort, card)

    def _store(self, task: Commitment, attempt: AttemptId, event: Event) -> bool:
        """Append unless the attempt isn't the task's open one any more (a late answer)."""
        record = self._ledger.open.get(task)
        if not is_open(record, attempt):
            self._log.info("late_answer_dropped", task=task, attempt=attempt)
            return False
        self._ledger.append(task, event)
        return True

    def _held(self) -> frozenset[GpuId]:
        """Cards with an earlier coordinator's attempt that isn't followed yet: a new one would
        displace what it has computed."""
        attempts = (record.open_attempt for record in self._ledger.open.values())
        return frozenset(
            attempt.gpu_id
            for attempt in attempts
            if attempt is not None and not self.follows(attempt.attempt_id)
        )

    def _card(self, gpu: Gpu, now: Timestamp, held: frozenset[GpuId]) -> Card:
        running = self._running.get(gpu.gpu_id)
        if running is not None:
            busy = replace(gpu, state=GpuState.BUSY) if gpu.state is GpuState.READY else gpu
            return Card(busy, running.free_at(now), gpu.warm | {running.pipeline})
        if gpu.state is GpuState.READY and (gpu.gpu_id in held or not self._guard.free(gpu)):
            gpu = replace(gpu, state=GpuState.BUSY)
        if gpu.state is GpuState.BUSY:
            return Card(gpu, Timestamp(now + UNKNOWN_BUSY_SECONDS), gpu.warm)
        return Card(gpu, None, gpu.warm)


def is_open(record: TaskRecord | None, attempt: AttemptId) -> bool:
    return (
        record is not None
        and record.open_attempt is not None
        and record.open_attempt.attempt_id == attempt
    )


def _detail(event: Event) -> str:
    match event:
        case FaultFound(reason):
            return reason
        case AttemptFailed(_, fault, detail):
            return f"{fault.value}: {detail}"
        case _:
            return ""
