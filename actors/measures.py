"""What a class's tasks were measured to take, and what follows from it; kept over restarts, so that
one that has just begun pauses nobody for what it doesn't know yet."""

from __future__ import annotations

from dataclasses import replace

import structlog

from actors.ledger import Ledger
from cluster.core import capacity
from cluster.core.capacity import FEW, Limit, Load, Measured
from cluster.core.record import Outcome, TaskRecord
from cluster.core.types import GpuClass, Timestamp

_MEASURED = "measured:"
WRITE_EVERY = 10
"""Tasks between two writes of the means, once there are a few."""


class Measures:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        stored = ledger.journal.cursors(_MEASURED).values()
        self._found: dict[GpuClass, Measured] = dict(map(capacity.parsed, stored))
        self._limits: dict[GpuClass, Limit] = {}
        self._log = structlog.get_logger("fleet")

    def of(self, gpu_class: GpuClass) -> Measured:
        return self._found.get(gpu_class, Measured())

    def learn(self, gpu_class: GpuClass, record: TaskRecord) -> None:
        """From a task that was paid."""
        times, before = _times(record), self.of(gpu_class)
        if times is None:
            return
        after = replace(before, cycle=capacity.measured(before.cycle, *times))
        tasks = after.cycle.tasks
        self._keep(gpu_class, after, write=tasks <= FEW or tasks % WRITE_EVERY == 0)

    def slots(self, gpu_class: GpuClass, fixed: int | None, most: int) -> int:
        """Accounts for each card: `fixed`, or as many as was measured."""
        before = self.of(gpu_class)
        slots = fixed or capacity.slots_for(before.cycle, before.slots, most)
        if slots != before.slots:
            self._log.info("slots_changed", gpu_class=gpu_class.name, slots=slots)
            self._keep(gpu_class, replace(before, slots=slots))
        return slots

    def most_slots(self, gpu_class: GpuClass, fixed: int | None, most: int) -> int:
        """More accounts than these for each card are paused."""
        there = self.of(gpu_class)
        return fixed or (there.slots if there.cycle.tasks >= FEW else max(there.slots, most))

    def limit(
        self, gpu_class: GpuClass, load: Load, serving: int, cards: int, wanted: int, now: float
    ) -> int | None:
        """How many accounts may serve, by the load."""
        there, at = self.of(gpu_class), Timestamp(now)
        before = self._limits.get(gpu_class, Limit(there.limit, at))
        window = capacity.window_of(there.cycle)
        after = capacity.limited(before, load, serving, cards, wanted, at, window)
        self._limits[gpu_class] = after
        if after.accounts != there.limit:
            share = round(load.share, 2)
            self._log.info(
                "limited_by_load", gpu_class=gpu_class.name, accounts=after.accounts, share=share
            )
            self._keep(gpu_class, replace(there, limit=after.accounts))
        return after.accounts

    def _keep(self, gpu_class: GpuClass, after: Measured, write: bool = True) -> None:
        self._found[gpu_class] = after
        if write:
            journal, lease = self._ledger.journal, self._ledger.lease
            key = f"{_MEASURED}{gpu_class.vram}:{gpu_class.name}"
            journal.set_cursor(lease, key, capacity.text(gpu_class, after))


def _times(record: TaskRecord) -> tuple[float, float] | None:
    """Seconds on the card, and in the network's hands before and after; None for a task that tells
    nothing: one that wasn't paid, or needed more than one attempt."""
    paid = record.outcome in {Outcome.SUCCESS, Outcome.GROUP_SUCCESS, Outcome.GROUP_REFUND}
    if not paid or len(record.attempts) != 1 or record.closed_at is None:
        return None
    (attempt,) = record.attempts
    if attempt.ended_at is None or record.fetched_at is None:
        return None
    before = record.fetched_at - record.seen_at
    return attempt.ended_at - attempt.started_at, before + record.closed_at - attempt.ended_at
