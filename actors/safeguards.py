"""What keeps a faulty card from earning a slash: canaries, second opinions, strikes, quarantine, in
one.

A bad result that two cards show for one task is the task's, or its model's: the second card isn't
suspected and no third one tries. The first was before anybody could know; its canary, which it
has mostly answered by then, clears it of that, and of what else there may have been.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from actors.canary import Canaries, CanarySettings, Cards
from actors.dispatcher import Dispatcher
from actors.health import CardHealth
from actors.holds import Holds
from actors.ledger import Ledger
from actors.pool import UNKNOWN
from actors.strikes import Reports, Strikes
from actors.verifier import Verifier
from cluster.core.errors import ClusterError, TaskUnsupported
from cluster.core.ports import Computed, Order
from cluster.core.record import Outcome, Result, TaskRecord
from cluster.core.strikes import Limit
from cluster.core.types import (
    AttemptId,
    CardUuid,
    Commitment,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    Timestamp,
)
from cluster.metrics import Metrics

LOOK_SECONDS = 1.0

_BLAMED = "blamed:"
"""By a task that cost its account the stake, the card that was put in quarantine for it."""


@dataclass(frozen=True, slots=True)
class SafeguardSettings:
    """`fraction` of tasks, 0 to 1, are computed twice."""

    canary: CanarySettings = CanarySettings()
    fraction: float = 0.0
    limit: Limit = Limit()


class GuardedCards(Cards, Reports, Protocol):
    def quarantine(self, cards: frozenset[CardUuid]) -> None: ...


class Safeguards:
    """`actors.dispatcher.Guard`; `attach` the dispatcher before anything else."""

    def __init__(
        self,
        ledger: Ledger,
        pool: GuardedCards,
        settings: SafeguardSettings,
        metrics: Metrics,
        clock: Callable[[], float],
        new_attempt_id: Callable[[], AttemptId],
        changed: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._metrics = metrics
        self._log = structlog.get_logger("safeguards")
        self._strikes = Strikes(ledger, pool, settings.limit, clock)
        self._blamed = {Commitment(task) for task in ledger.journal.cursors(_BLAMED)}
        self._holds = Holds()
        self._health = CardHealth(
            ledger,
            clock,
            pool.quarantine,
            metrics.cards.quarantined,
            lambda: {gpu.uuid: gpu.ray_node for gpu in pool.gpus()},
        )
        self._canaries = Canaries(
            self._health,
            pool,
            self._holds,
            settings.canary,
            metrics,
            clock,
            new_attempt_id,
            lambda: self._dispatcher.idle(),
            lambda: bool(self._dispatcher.waiting()),
            changed,
            self._strikes.strike,
        )
        self._verifier = Verifier(
            self._health,
            pool,
            self._holds,
            settings.fraction,
            metrics,
            lambda: ledger.clock(),
            lambda: tuple(filter(self.free, self._dispatcher.idle())),
            self._suspect,
            self.judged,
            changed,
        )
        metrics.canary_every(settings.canary.interval)

    def reconfigure(self, settings: SafeguardSettings) -> None:
        self._canaries.settings = settings.canary
        self._verifier.fraction = settings.fraction
        self._strikes.limit = settings.limit
        self._metrics.canary_every(settings.canary.interval)
        self._canaries.wake()

    def attach(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._canaries.run())
            group.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self.review()
            await asyncio.sleep(LOOK_SECONDS)

    def review(self) -> None:
        """What the cards' drivers count by now, and whether a card has struck out."""
        counted = [
            (gpu, errors)
            for gpu in self._pool.gpus()
            if (report := self._pool.report(gpu.gpu_id)) is not None
            and (errors := report.vitals.ecc_uncorrected) is not None
            # A member that went away keeps its last report: the card may be there again elsewhere.
            and gpu.uuid
            and gpu.state is not GpuState.UNREACHABLE
        ]
        for gpu in self._strikes.memory_errors(counted):
            self._suspect(gpu.uuid)
        for card, reason in self._strikes.review().items():
            if not self._health.in_quarantine(card):
                known = (gpu.gpu_class for gpu in self._pool.gpus() if gpu.uuid == card)
                self._health.quarantine({card}, next(known, UNKNOWN), reason, "strikes")

    def wake(self) -> None:
        """The cards have changed."""
        self.blame()
        self._canaries.wake()

    def blame(self) -> None:
        """A card whose result cost an account its stake computes for nobody until an operator has
        cleared it, be it here now or not."""
        for record, result in self._unblamed():
            if result.card is None:
                continue
            reason = f"its result of task {record.commitment} cost {record.account} its stake"
            self._health.quarantine({result.card}, self._class_of(record, result), reason, "slash")
            # Once: an operator may clear the card before the account.
            key = f"{_BLAMED}{record.commitment}"
            self._ledger.journal.set_cursor(self._ledger.lease, key, result.card)
            self._blamed.add(record.commitment)

    def _unblamed(self) -> list[tuple[TaskRecord, Result]]:
        """What cost accounts their stakes, as long as these aren't cleared."""
        return [
            (record, record.result)
            for record in self._ledger.closed
            if record.account in self._ledger.slashed
            and record.outcome is Outcome.INVALIDATED
            and record.commitment not in self._blamed
            and record.result is not None
        ]

    def _class_of(self, record: TaskRecord, result: Result) -> GpuClass:
        """Of the card that computed it; of one that isn't here, what its account stood for."""
        known = [gpu.gpu_class for gpu in self._pool.gpus() if gpu.uuid == result.card]
        known += [e.gpu_class for e in self._ledger.assigned() if e.address == record.account]
        return known[0] if known else UNKNOWN

    def alerts(self) -> tuple[str, ...]:
        nobody = [
            f"task {record.commitment} cost account {record.account} its stake, and it wasn't "
            f"written down which card computed it: none is in quarantine for it, see to all of them"
            for record, _ in self._unblamed()
        ]
        return (*self._health.alerts(), *self._canaries.alerts(), *nobody)

    def passed(self) -> Mapping[CardUuid, Timestamp]:
        """When each card last gave its canary the answer that was expected."""
        return self._health.passed()

    def clear(self, card: str) -> str:
        """Let a card out of quarantine, by its id or UUID: `cleared`, `free` or `unknown`."""
        named = [gpu.uuid for gpu in self._pool.gpus() if card in {gpu.gpu_id, gpu.uuid}]
        uuid = named[0] if named else CardUuid(card)
        if self._health.clear(uuid):
            self._strikes.forget(uuid)
            self._canaries.wake()
            return "cleared"
        return "free" if named or self._health.is_known(uuid) else "unknown"

    def forget_canary(self, class_name: str | None) -> tuple[str, ...]:
        """Have what is expected of a class's cards, or of all, recorded anew; the names of the
        classes of which anything was."""
        found = self._health.forget(class_name)
        self._canaries.wake()
        return found

    # --- actors.dispatcher.Guard -----------------------------------------------------------------

    def free(self, gpu: Gpu) -> bool:
        return gpu.gpu_id not in self._holds and self._canaries.trusted(gpu)

    def judged(self, gpu: GpuId, order: Order, error: ClusterError) -> ClusterError:
        there = next((each for each in self._pool.gpus() if each.gpu_id == gpu), None)
        if there is None:
            return error
        other = self._strikes.failed(there, order, error) if there.uuid else None
        if other is None:
            self._suspect(there.uuid)
            return error
        self._log.warning("task_at_fault", task=order.task, cards=sorted({other, there.uuid}))
        found = TaskUnsupported(f"two cards show the same bad result, {other} before: {error}")
        found.trace = error.trace
        return found

    async def vetted(self, gpu: GpuId, order: Order, computed: Computed) -> Computed:
        return await self._verifier.vetted(gpu, order, computed)

    # --- inside ----------------------------------------------------------------------------------

    def _suspect(self, card: CardUuid) -> None:
        self._health.suspect(card)
        self._canaries.doubt(card)
