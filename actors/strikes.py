"""Keeps count of what fails on each card (`cluster.core.strikes`), in the journal and here.

Written under the lease first, then believed. A new term reads it again, and judges what was still
open. A process that died is held against its card once another one answers from the same place, and
unless its machine ended it for want of memory: a machine that goes away, or is too full, takes the
processes of good cards with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

import structlog

from actors.inference import Report
from actors.ledger import Ledger
from cluster import quarantine_rows as rows
from cluster.core import strikes
from cluster.core.errors import ClusterError
from cluster.core.ports import Order
from cluster.core.record import TaskRecord, fold
from cluster.core.strikes import CardFault, Fate, FaultKind, Limit
from cluster.core.types import CardUuid, Commitment, Gpu, GpuId, Timestamp

LATELY: Final = 3600.0
"""Seconds for which it is known what several cards shared: a process is back long before."""


class Reports(Protocol):
    def gpus(self) -> tuple[Gpu, ...]: ...

    def report(self, gpu: GpuId) -> Report | None: ...

    def starved(self, gpu: GpuId) -> str:
        """Which process there its machine ended last for want of memory; empty where none was."""
        ...


class Strikes:
    """Every write raises `LeaseLost` when another coordinator acts."""

    def __init__(
        self, ledger: Ledger, pool: Reports, limit: Limit, clock: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self.limit = limit
        self._clock = clock
        self._log = structlog.get_logger("strikes")
        with ledger.journal.read() as connection:
            self._faults = {(each.card, each.cause): each for each in rows.faults(connection)}
            self._counted = rows.memory_errors(connection)
        self._lately = list(self._faults.values())
        """What was seen within the last hour, judged or not."""
        self._fates: dict[Commitment, Fate] = {}
        """Of closed tasks that wait to be judged: a fleet closes hundreds in a minute."""

    # --- what happens ----------------------------------------------------------------------------

    def failed(self, gpu: Gpu, order: Order, error: ClusterError) -> CardUuid | None:
        """An attempt at a task failed on the card. Returns another card that showed the same bad
        result at this task: then it is the task's, or its model's."""
        kind, report = strikes.kind_of(error), self._pool.report(gpu.gpu_id)
        if kind is None or (kind is FaultKind.DIED and report is None):
            # What had never reported to us was ended for the release that it ran.
            return None
        if kind is FaultKind.STALLED and not _has_stepped(report, order):
            return None  # storage may hang as well, for many cards at once
        incarnation = "" if report is None else report.incarnation
        at = Timestamp(self._clock())
        fault = CardFault(gpu.uuid, order.attempt_id, kind, at, gpu.gpu_id, incarnation, order.task)
        self._keep(fault)
        shared = kind is FaultKind.BAD_RESULT
        return strikes.also_showed(fault, self._faults.values()) if shared else None

    def strike(self, gpu: Gpu, kind: FaultKind) -> None:
        """The card failed where no task can be to blame."""
        self._keep(self._of_itself(gpu, kind))

    def memory_errors(self, counted: Sequence[tuple[Gpu, int]]) -> tuple[Gpu, ...]:
        """What cards' drivers count now, each from its own start: the cards on which there are
        more than when they were last looked at. Those of before the first look are left out."""
        news = [(gpu, errors) for gpu, errors in counted if self._counted.get(gpu.uuid) != errors]
        if not news:
            return ()
        # Fewer than before: the driver began anew, and has counted these since.
        grown = [
            (gpu, self._of_itself(gpu, FaultKind.MEMORY_ERRORS))
            for gpu, errors in news
            if errors > 0 and gpu.uuid in self._counted
        ]
        with self._ledger.journal.write(self._ledger.lease) as connection:
            for gpu, errors in news:
                rows.put_memory_errors(connection, gpu.uuid, errors)
            for _, fault in grown:
                rows.put_fault(connection, fault)
        self._counted |= {gpu.uuid: errors for gpu, errors in news}
        for gpu, fault in grown:
            self._faults[fault.card, fault.cause] = fault
            self._log.error("memory_errors", gpu=gpu.gpu_id, uncorrected=self._counted[gpu.uuid])
        return tuple(gpu for gpu, _ in grown)

    def forget(self, card: CardUuid) -> None:
        """The card was let out of quarantine, which has removed them from the journal."""
        self._faults = {key: each for key, each in self._faults.items() if each.card != card}

    # --- what follows ----------------------------------------------------------------------------

    def review(self) -> Mapping[CardUuid, str]:
        """Judge what can be judged by now: the cards that have struck out, and why."""
        now = Timestamp(self._clock())
        self._lately = [each for each in self._lately if now - each.at < LATELY]
        old = {each for each in self._faults.values() if now - each.at > self.limit.seconds}
        gone = [each for each in old if each.counts]
        count: list[CardFault] = []
        waiting = self._open()
        self._fates = {task: self._fates[task] for task in waiting.keys() & self._fates.keys()}
        for task, faults in waiting.items():
            fate = self._fate(task)
            if fate is not Fate.OPEN and all(strikes.ripe(each, now) for each in faults):
                known = {each: self._its_own(each) for each in strikes.struck(faults, fate)}
                count += [each for each, back in known.items() if back and each not in old]
                gone += [each for each in faults if each in old or known.get(each, False) is False]
        if gone or count:
            self._judge(gone, count)
        if not self.limit.strikes:
            return {}
        cards = {each.card for each in self._faults.values() if each.counts}
        found = {card: strikes.out(self._of(card), self.limit, now) for card in cards}
        return {card: strikes.reason(each, self.limit) for card, each in found.items() if each}

    # --- inside ----------------------------------------------------------------------------------

    def _of_itself(self, gpu: Gpu, kind: FaultKind) -> CardFault:
        at = Timestamp(self._clock())
        cause = f"{kind.name.lower()} at {at:.3f}"
        return CardFault(gpu.uuid, cause, kind, at, gpu.gpu_id, "", counts=True)

    def _keep(self, fault: CardFault) -> None:
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.put_fault(connection, fault)
        self._faults[fault.card, fault.cause] = fault
        self._lately.append(fault)

    def _open(self) -> Mapping[Commitment, list[CardFault]]:
        """What isn't judged yet, by the task."""
        found: dict[Commitment, list[CardFault]] = defaultdict(list)
        for each in self._faults.values():
            if each.task is not None and not each.counts:
                found[each.task].append(each)
        return found

    def _of(self, card: CardUuid) -> list[CardFault]:
        return [each for each in self._faults.values() if each.card == card]

    def _fate(self, task: Commitment) -> Fate:
        found = self._ledger.open.get(task)
        if found is not None:
            return strikes.fate_of(found)
        if task not in self._fates:
            self._fates[task] = strikes.fate_of(self._closed(task))
        return self._fates[task]

    def _closed(self, task: Commitment) -> TaskRecord | None:
        closed = (each for each in self._ledger.closed if each.commitment == task)
        found = next(closed, None)
        if found is None and (history := self._ledger.journal.story(task)):
            found = fold(task, history)
        return found

    def _its_own(self, fault: CardFault) -> bool | None:
        """Whether nothing that it shares with other cards explains the fault; None while it isn't
        known. Of a process that died, another one must be where it was."""
        if strikes.shared(fault, self._lately):
            return False
        if fault.kind is not FaultKind.DIED:
            return True
        places = [gpu.gpu_id for gpu in self._pool.gpus() if gpu.uuid == fault.card]
        if not places:
            return None
        if fault.gpu_id not in places:
            return False
        report = self._pool.report(fault.gpu_id)
        if report is None or report.incarnation in {"", fault.incarnation}:
            return None
        return self._pool.starved(fault.gpu_id) != fault.incarnation

    def _judge(self, gone: list[CardFault], count: list[CardFault]) -> None:
        struck = [replace(each, counts=True) for each in count]
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.drop_faults(connection, gone)
            for each in struck:
                rows.put_fault(connection, each)
        for each in gone:
            self._faults.pop((each.card, each.cause), None)
        for each in struck:
            self._faults[each.card, each.cause] = each
            self._log.warning("card_struck", card=each.card, kind=each.kind.value, task=each.task)


def _has_stepped(report: Report | None, order: Order) -> bool:
    """Whether the card had begun to compute the order, all that it needs being read."""
    return report is not None and report.attempt == order.attempt_id and report.step > 0
