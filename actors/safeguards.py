"""What keeps a faulty card from earning a slash: canaries, second opinions, quarantine, in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from actors.canary import Canaries, CanarySettings, Cards
from actors.dispatcher import Dispatcher
from actors.health import CardHealth
from actors.holds import Holds
from actors.ledger import Ledger
from actors.pool import UNKNOWN
from actors.verifier import Verifier
from cluster.core.ports import Computed, Order
from cluster.core.record import Outcome, Result, TaskRecord
from cluster.core.types import AttemptId, CardUuid, Commitment, Gpu, GpuClass, GpuId, Timestamp
from cluster.metrics import Metrics

_BLAMED = "blamed:"
"""By a task that cost its account the stake, the card that was put in quarantine for it."""


@dataclass(frozen=True, slots=True)
class SafeguardSettings:
    """`fraction` of tasks, 0 to 1, are computed twice."""

    canary: CanarySettings = CanarySettings()
    fraction: float = 0.0


class GuardedCards(Cards, Protocol):
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
            changed,
        )

    def reconfigure(self, settings: SafeguardSettings) -> None:
        self._canaries.settings = settings.canary
        self._verifier.fraction = settings.fraction
        self._canaries.wake()

    def attach(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def run(self) -> None:
        await self._canaries.run()

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

    def suspect(self, gpu: GpuId) -> None:
        for card in (each.uuid for each in self._pool.gpus() if each.gpu_id == gpu):
            self._suspect(card)

    async def vetted(self, gpu: GpuId, order: Order, computed: Computed) -> Computed:
        return await self._verifier.vetted(gpu, order, computed)

    # --- inside ----------------------------------------------------------------------------------

    def _suspect(self, card: CardUuid) -> None:
        self._health.suspect(card)
        self._canaries.doubt(card)
