"""Has a result computed a second time before it is stored (`cluster.core.verification`).

The first card keeps its outcome, and no other task, until the result is stored: a coordinator that
crashes in between follows the first attempt again and asks again. The attempts of the others carry
the first one's id and a number, so that asking the same card twice is one execution.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import structlog

from actors.health import CardHealth
from actors.holds import Holds
from cluster.core import verification
from cluster.core.errors import AttemptLost, ClusterError, DeviceFault, DeviceFaultKind
from cluster.core.ports import Computed, GpuPool, Order
from cluster.core.types import AttemptId, CardUuid, Gpu, GpuId, Score, Timestamp
from cluster.core.verification import Ruling, rule
from cluster.metrics import Metrics


class Verifier:
    """`idle` are the cards that may be asked, but for those held; `clock` is the network's;
    `suspect` is told the cards that must show what they can, `failed` what a card failed with;
    `changed` that a card is free again.
    """

    def __init__(
        self,
        health: CardHealth,
        pool: GpuPool,
        holds: Holds,
        fraction: float,
        metrics: Metrics,
        clock: Callable[[], float],
        idle: Callable[[], Sequence[Gpu]],
        suspect: Callable[[CardUuid], None],
        failed: Callable[[GpuId, Order, ClusterError], object],
        changed: Callable[[], None],
    ) -> None:
        self._health = health
        self._pool = pool
        self._holds = holds
        self.fraction = fraction
        self._metrics = metrics
        self._clock = clock
        self._idle = idle
        self._suspect = suspect
        self._failed = failed
        self._changed = changed
        self._log = structlog.get_logger("verify")

    async def vetted(self, gpu_id: GpuId, order: Order, computed: Computed) -> Computed:
        """The result to be stored.

        Raises `DeviceFault` when there is none that can be trusted: the card came into quarantine
        while it computed, or cards differ and no third one decides.
        """
        first = next((gpu for gpu in self._pool.gpus() if gpu.gpu_id == gpu_id), None)
        if first is None or not first.uuid:
            return computed
        if self._health.in_quarantine(first.uuid):
            raise _fault(f"card {first.uuid} is in quarantine")
        earlier = self._health.disputed(order.task)
        if not earlier and not verification.sampled(order.task, self.fraction):
            return computed
        scores = earlier | {first.uuid: computed.score}
        found = {first.uuid: computed}
        asked = set(scores)
        for number in range(1, verification.MOST_ASKED + 1):
            if rule(scores) is not None or len(scores) > 2:
                break
            gpu = self._next(first, order, computed.seconds, asked)
            if gpu is None:
                break
            asked.add(gpu.uuid)
            other = await self._ask(gpu, order, number)
            if other is not None:
                scores[gpu.uuid], found[gpu.uuid] = other.score, other
        return self._settle(first, order, self._still_trusted(first, scores), found)

    def _still_trusted(
        self, first: Gpu, scores: Mapping[CardUuid, Score]
    ) -> Mapping[CardUuid, Score]:
        """Without the scores of cards that came into quarantine meanwhile."""
        if self._health.in_quarantine(first.uuid):
            raise _fault(f"card {first.uuid} is in quarantine")
        return {card: s for card, s in scores.items() if not self._health.in_quarantine(card)}

    def _next(self, first: Gpu, order: Order, seconds: float, asked: set[CardUuid]) -> Gpu | None:
        left = verification.seconds_left(order.deadline, Timestamp(self._clock()))
        if left is not None and left < seconds:
            return None
        free = [gpu for gpu in self._idle() if gpu.gpu_id not in self._holds]
        return verification.pick(first, free, asked)

    async def _ask(self, gpu: Gpu, order: Order, number: int) -> Computed | None:
        """Another card's result; None when it gives none in time, which says nothing."""
        second = replace(order, attempt_id=AttemptId(f"{order.attempt_id}.{number}"))
        left = verification.seconds_left(order.deadline, Timestamp(self._clock()))
        self._holds.take(gpu.gpu_id)
        self._log.info("second_opinion_asked", task=order.task, gpu=gpu.gpu_id)
        try:
            async with asyncio.timeout(left):
                await self._pool.start(gpu.gpu_id, second)
                return await self._pool.result(gpu.gpu_id, second.attempt_id)
        except TimeoutError:
            await self._pool.cancel(gpu.gpu_id, second.attempt_id)
            self._log.warning("second_opinion_late", task=order.task, gpu=gpu.gpu_id)
        except ClusterError as error:
            self._log.warning(
                "second_opinion_failed", task=order.task, gpu=gpu.gpu_id, problem=str(error)
            )
            if isinstance(error, DeviceFault | AttemptLost):
                self._failed(gpu.gpu_id, second, error)
        finally:
            self._holds.give_back(gpu.gpu_id)
            self._changed()
        return None

    def _settle(
        self,
        first: Gpu,
        order: Order,
        scores: Mapping[CardUuid, Score],
        found: Mapping[CardUuid, Computed],
    ) -> Computed:
        ruling = rule(scores)
        if ruling is not None:
            return self._agreed(first, order, ruling, found)
        if len(scores) == 1:
            self._metrics.verified("alone")
            self._log.info("no_second_opinion", task=order.task, gpu=first.gpu_id)
            return found[first.uuid]
        self._metrics.verified("differ")
        self._log.error("cards_differ", task=order.task, cards=sorted(scores))
        self._health.dispute(order.task, scores)
        for card in scores:
            self._suspect(card)
        raise _fault(f"{len(scores)} cards differ on it: {', '.join(sorted(scores))}")

    def _agreed(
        self, first: Gpu, order: Order, ruling: Ruling, found: Mapping[CardUuid, Computed]
    ) -> Computed:
        self._metrics.verified("odd" if ruling.odd else "equal")
        if ruling.odd:
            reason = f"its score of task {order.task} is not what other cards of its class computed"
            self._health.quarantine(ruling.odd, first.gpu_class, reason, "verification")
        for computed in found.values():
            if computed.score == ruling.score:
                return computed
        # Others agreed on it in earlier attempts, whose files are gone.
        raise _fault(f"card {first.uuid} differs from the others")


def _fault(message: str) -> DeviceFault:
    return DeviceFault(DeviceFaultKind.DISTRUSTED, message)
