"""Asks idle cards the canary's question and has the answers judged (`cluster.inference.canary`).

A card is asked when its process is new, after a fault on it, when its answer is in dispute, and by
schedule. But for the last it gets no task before it has answered (`trusted`); a scheduled question
waits until no task does, though not for ever, and only some cards are asked at once. A card that
has no model to be asked with, or whose model a task has brought and nobody can compute with, is
left as it is, and asked again after a pause or when something fails on it. One that fails on the
question, or on a model of the operator's own, is asked again later; until it answers it is trusted
as little as before, and not at all if it failed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from actors.health import CardHealth
from actors.holds import Holds
from actors.inference import Report
from cluster.core.errors import (
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.ports import GpuPool, Order
from cluster.core.strikes import FaultKind, kind_of
from cluster.core.types import (
    AttemptId,
    CardUuid,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    Score,
    TaskType,
    Timestamp,
)
from cluster.inference import canary
from cluster.inference.canary import Candidate, Due, Question, Verdict
from cluster.metrics import CanaryResult, Metrics

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 300.0
"""How long a card may take, a cold start of the model included."""
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 600.0
"""Before a card that failed is asked again; doubled each time."""
SHARE_AT_ONCE = 0.1
"""Of all cards, how many a schedule may keep from tasks at the same time; one in any case."""


_RESULTS: dict[Verdict, CanaryResult] = {
    Verdict.PASSED: "passed",
    Verdict.PROVISIONAL: "provisional",
    Verdict.RECORDED: "recorded",
    Verdict.DISPUTED: "disputed",
    Verdict.QUARANTINED: "quarantined",
}


class Cards(GpuPool, Protocol):
    """The pool, as far as canaries need it."""

    def report(self, gpu: GpuId) -> Report | None: ...


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """`interval`: seconds between scheduled canaries, 0 for none at all. `model`: a base key, None
    for the smallest on disk, the operator's own before what came with tasks."""

    interval: float = 3600.0
    model: str | None = None


_Mark = tuple[CardUuid, str, str, str]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A card that can be asked."""

    gpu: Gpu
    question: Question
    incarnation: str
    own_model: bool

    @property
    def mark(self) -> _Mark:
        return self.gpu.uuid, self.incarnation, self.question.model, self.question.contents


@dataclass(slots=True)
class _Trouble:
    """`gpus_fault`: it is the card that failed, not what it was asked with."""

    gpu_id: GpuId
    problem: str
    gpus_fault: bool
    pause: float
    until: float


@dataclass(slots=True)
class _Unable:
    """A question that a card can't be asked for a while, by no fault of its own."""

    gpu_id: GpuId
    model: str
    own_model: bool
    problem: str
    pause: float
    until: float


class Canaries:
    """`idle` are the cards that no task's attempt is on, `waiting` the tasks that want one;
    `changed` is called when a card is free again, `strike` for one that its canary shows to be
    unreliable though nothing can convict it."""

    def __init__(
        self,
        health: CardHealth,
        pool: Cards,
        holds: Holds,
        settings: CanarySettings,
        metrics: Metrics,
        clock: Callable[[], float],
        new_attempt_id: Callable[[], AttemptId],
        idle: Callable[[], Sequence[Gpu]],
        waiting: Callable[[], bool],
        changed: Callable[[], None],
        strike: Callable[[Gpu, FaultKind], None],
    ) -> None:
        self._health = health
        self._pool = pool
        self._holds = holds
        self.settings = settings
        self._metrics = metrics
        self._clock = clock
        self._new_attempt_id = new_attempt_id
        self._idle = idle
        self._waiting = waiting
        self._changed = changed
        self._strike = strike
        self._models: dict[tuple[GpuClass, str], Candidate | None] = {}
        self._unable: dict[_Mark, _Unable] = {}
        self._missing: set[tuple[CardUuid, str | None]] = set()
        self._troubles: dict[CardUuid, _Trouble] = {}
        self._scheduled = 0
        self._next: frozenset[CardUuid] = frozenset()
        self._awake = asyncio.Event()
        self._log = structlog.get_logger("canary")

    async def run(self) -> None:
        """Look for cards to ask, for ever; a bug or a lost lease ends it."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._awake.clear()
                for subject, why in self._begin():
                    group.create_task(self._ask(subject, why))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._awake.wait()

    def wake(self) -> None:
        """Look now: cards came, or something failed on one."""
        self._awake.set()

    def trusted(self, gpu: Gpu) -> bool:
        """Whether the card may get a task before it is asked anything."""
        subject = self._subject(gpu)
        if subject is None:
            return self._lacks(gpu) is None
        why = self._due(subject)
        if why is Due.OVERDUE:
            return gpu.uuid not in self._next
        return why is None or not why.urgent

    def doubt(self, card: CardUuid) -> None:
        """Something failed on the card: it is asked what it couldn't be before, too."""
        self._unable = {mark: each for mark, each in self._unable.items() if mark[0] != card}
        self.wake()

    def alerts(self) -> tuple[str, ...]:
        return (
            *(_said(trouble) for trouble in self._troubles.values()),
            *(
                f"GPU {each.gpu_id} works on without a canary: {each.model} can't be computed with "
                f"there ({each.problem}); canary.model names another"
                for each in self._unable.values()
                if each.own_model
            ),
            *(
                f"GPU {gpu.gpu_id} gets no task: something failed on it, and {model}, with which "
                f"it has to compute the canary, isn't on its machine's disk"
                for gpu in self._pool.gpus()
                if (model := self._lacks(gpu)) is not None
            ),
        )

    # --- whom to ask -----------------------------------------------------------------------------

    def _begin(self) -> list[tuple[_Subject, Due]]:
        """Take the cards that are to be asked now."""
        self._models.clear()
        self._next = self._overdue()
        chosen: list[tuple[_Subject, Due]] = []
        for gpu in self._idle():
            subject = self._subject(gpu)
            if subject is None or gpu.gpu_id in self._holds:
                continue
            if self._is_paused(gpu.uuid):
                continue
            why = self._due(subject)
            if why is None or (why.scheduled and not self._may_schedule(gpu)):
                continue
            self._holds.take(gpu.gpu_id)
            self._scheduled += why.scheduled
            chosen.append((subject, why))
        return chosen

    def _may_schedule(self, gpu: Gpu) -> bool:
        may = gpu.uuid in self._next or not self._waiting()
        return may and self._scheduled < self._most_at_once()

    def _most_at_once(self) -> int:
        return max(1, int(len(self._pool.gpus()) * SHARE_AT_ONCE))

    def _overdue(self) -> frozenset[CardUuid]:
        """Cards that get no other task before the canary that was put off for too long: as many as
        a schedule may take, so that the others go on."""
        room = max(0, self._most_at_once() - self._scheduled)
        late = [
            gpu.uuid
            for gpu in self._pool.gpus()
            if gpu.state in {GpuState.READY, GpuState.BUSY}
            and gpu.gpu_id not in self._holds
            and not self._is_paused(gpu.uuid)
            and (subject := self._subject(gpu)) is not None
            and self._due(subject) is Due.OVERDUE
        ]
        return frozenset(late[:room])

    def _is_paused(self, card: CardUuid) -> bool:
        trouble = self._troubles.get(card)
        return trouble is not None and self._clock() < trouble.until

    def _due(self, subject: _Subject) -> Due | None:
        question, card = subject.question, subject.gpu.uuid
        why = canary.due(
            self._health.answer(question, card),
            subject.incarnation,
            card in self._health.again(question),
            Timestamp(self._clock()),
            self.settings.interval,
            self._health.last_answered(card, subject.incarnation),
        )
        unable = self._unable.get(subject.mark)
        if unable is None:
            return why
        return Due.SCHEDULE if why is not None and self._clock() >= unable.until else None

    def _subject(self, gpu: Gpu) -> _Subject | None:
        """None for a card that can't be asked, or is to be left alone."""
        report = self._asked_by(gpu)
        if report is None:
            return None
        found = self._model_for(gpu, report)
        if found is None or found.model not in gpu.on_disk:
            model = None if found is None else found.model
            if (gpu.uuid, model) not in self._missing:
                self._missing.add((gpu.uuid, model))
                self._log.warning("no_model_for_a_canary", gpu=gpu.gpu_id, model=model)
            return None
        question = Question(gpu.gpu_class, report.software, found.model, found.contents)
        return _Subject(gpu, question, report.incarnation, found.own)

    def _asked_by(self, gpu: Gpu) -> Report | None:
        """The report by which the card is asked; None where it is to be left alone."""
        report = self._pool.report(gpu.gpu_id)
        if self.settings.interval <= 0 or report is None or not (gpu.uuid and report.incarnation):
            return None
        return report

    def _lacks(self, gpu: Gpu) -> str | None:
        """The operator's own model that a card in doubt would have to be asked with, but that isn't
        on its disk."""
        report = self._asked_by(gpu)
        if report is None or not self._health.in_doubt(gpu.uuid):
            return None
        found = self._model_for(gpu, report) or self._common(gpu.gpu_class, report.software)
        lacking = found is not None and found.own and found.model not in gpu.on_disk
        return found.model if found is not None and lacking else None

    def _model_for(self, gpu: Gpu, report: Report) -> Candidate | None:
        """The configured one; else what most cards of the class have as their first choice, if this
        one has it too: only answers to the same question can be compared."""
        configured = self.settings.model
        if configured is not None:
            there = (each for each in report.candidates if each.model == configured)
            return next(there, Candidate(configured))
        common = self._common(gpu.gpu_class, report.software)
        if common in report.candidates:
            return common
        return report.candidates[0] if report.candidates else None

    def _common(self, *kind: *tuple[GpuClass, str]) -> Candidate | None:
        if kind not in self._models:
            self._models[kind] = self._most_have(*kind)
        return self._models[kind]

    def _most_have(self, gpu_class: GpuClass, software: str) -> Candidate | None:
        votes: Counter[Candidate] = Counter()
        for gpu in self._pool.gpus():
            report = self._pool.report(gpu.gpu_id)
            if gpu.gpu_class != gpu_class or report is None or report.software != software:
                continue
            votes.update(report.candidates[:1])

        def rank(each: Candidate) -> tuple[bool, int, str, str]:
            return not each.own, -votes[each], each.model, each.contents

        return min(votes, key=rank, default=None)

    # --- asking ----------------------------------------------------------------------------------

    async def _ask(self, subject: _Subject, why: Due) -> None:
        gpu_id = subject.gpu.gpu_id
        self._log.info("canary_asked", gpu=gpu_id, why=why.value, model=subject.question.model)
        try:
            score = await self._score(subject, afresh=why.urgent)
        except TaskUnsupported as error:
            if self._health.is_expected(subject.question):
                # Others of its class, or it, could: it may have talked itself out of it.
                self._failed(subject, str(error), FaultKind.CANARY)
            else:
                self._cannot(subject, error)
        except (ModelUnavailable, TaskInvalid) as error:
            self._unusable(subject, error)
        except DeviceFault as error:
            strange = error.kind is DeviceFaultKind.BAD_RESULT and not subject.own_model
            if strange or error.kind is DeviceFaultKind.OUT_OF_MEMORY:
                self._unusable(subject, error)
            else:
                self._failed(subject, str(error), kind_of(error))
        except ClusterError as error:
            self._failed(subject, str(error) or type(error).__name__)
        except TimeoutError:
            self._failed(subject, f"no answer within {ANSWER_SECONDS:.0f} s")
        else:
            self._answered(subject, score)
        finally:
            self._holds.give_back(gpu_id)
            self._scheduled -= why.scheduled
            self._changed()

    async def _score(self, subject: _Subject, afresh: bool) -> Score:
        """With `afresh` it is the card that answers, and not what went bad in its memory once."""
        gpu_id = subject.gpu.gpu_id
        order = Order(
            self._new_attempt_id(),
            canary.TASK,
            int(TaskType.SD),
            canary.parameters(subject.question.model),
            Timestamp(self._clock() + ANSWER_SECONDS),
            afresh,
        )
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._pool.start(gpu_id, order)
                return (await self._pool.result(gpu_id, order.attempt_id)).score
        except TimeoutError:
            await self._pool.cancel(gpu_id, order.attempt_id)
            raise

    def _answered(self, subject: _Subject, score: Score) -> None:
        self._troubles.pop(subject.gpu.uuid, None)
        self._unable.pop(subject.mark, None)
        judgement = self._health.answered(
            subject.question, subject.gpu.uuid, score, subject.incarnation
        )
        self._metrics.canary(_RESULTS[judgement.verdict])
        if judgement.wavers:
            self._strike(subject.gpu, FaultKind.CANARY)
        calm = judgement.verdict not in {Verdict.DISPUTED, Verdict.QUARANTINED}
        log = self._log.info if calm else self._log.error
        log("canary_answered", gpu=subject.gpu.gpu_id, verdict=judgement.verdict.value)

    def _unusable(self, subject: _Subject, error: ClusterError) -> None:
        """What a task's author has made so that no card has a result keeps none from its work.
        What the operator has put there should do: who has to answer with it waits until he can."""
        if not subject.own_model:
            self._cannot(subject, error)
            return
        problem = f"{subject.question.model}: {error}"
        self._trouble(subject, problem, gpus_fault=False)
        self._metrics.canary("impossible")
        self._log.error("canary_impossible", gpu=subject.gpu.gpu_id, problem=problem)

    def _cannot(self, subject: _Subject, error: ClusterError) -> None:
        """Not the card's fault: it goes on without, for a while."""
        mark, model = subject.mark, subject.question.model
        longest = max(LONGEST_PAUSE, self.settings.interval)
        before = self._unable.get(mark)
        pause = FIRST_PAUSE if before is None else min(before.pause * 2, longest)
        gone = [each for each in self._unable if each[0] == mark[0] and each[1] != mark[1]]
        for each in gone:
            del self._unable[each]
        self._unable[mark] = _Unable(
            subject.gpu.gpu_id, model, subject.own_model, str(error), pause, self._clock() + pause
        )
        self._troubles.pop(subject.gpu.uuid, None)
        self._metrics.canary("impossible")
        self._log.warning("canary_impossible", gpu=subject.gpu.gpu_id, problem=str(error))

    def _failed(self, subject: _Subject, problem: str, kind: FaultKind | None = None) -> None:
        if kind is not None and not self._health.in_doubt(subject.gpu.uuid):
            # One that is in doubt already, and fails again and again, is still the same failure.
            self._strike(subject.gpu, kind)
        self._trouble(subject, problem, gpus_fault=True)
        # From now on it has to answer before any task, whatever the reason that it was asked for.
        self._health.suspect(subject.gpu.uuid)
        self._metrics.canary("failed")
        self._log.error("canary_failed", gpu=subject.gpu.gpu_id, problem=problem)

    def _trouble(self, subject: _Subject, problem: str, *, gpus_fault: bool) -> None:
        card = subject.gpu.uuid
        before = self._troubles.get(card)
        pause = FIRST_PAUSE if before is None else min(before.pause * 2, LONGEST_PAUSE)
        until = self._clock() + pause
        self._troubles[card] = _Trouble(subject.gpu.gpu_id, problem, gpus_fault, pause, until)


def _said(trouble: _Trouble) -> str:
    if trouble.gpus_fault:
        return f"GPU {trouble.gpu_id} fails on the canary and gets no task: {trouble.problem}"
    return (
        f"GPU {trouble.gpu_id} can't compute the canary with a model of yours, and gets no task "
        f"after a start or a fault until it can: {trouble.problem}"
    )
