"""One GPU, one process, one attempt at a time.

The event loop answers pings while a single thread of its own computes. An attempt's outcome is kept
until the next one starts, so a coordinator that crashed and came back still finds it. A second
attempt is refused while one computes: the coordinator must have cancelled it first.

The engine is made in that thread too (importing torch takes seconds), so the actor answers at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import threading
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

import ray
import structlog

from actors.machine import memory_kills
from actors.precedence import CARDS, give_way
from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
)
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import AttemptId, CardUuid, Commitment, GpuClass
from cluster.core.wording import brief, named
from cluster.inference import canary
from cluster.inference.nvml import Vitals

Outcome = Computed | ClusterError
"""What an attempt came to. Errors travel as values, so that their types survive the actor call."""


VITALS_SECONDS = 10.0
MOST_TRACE = 20_000
"""Characters of a traceback that are kept: its end says most."""


class EngineState(Protocol):
    @property
    def warm(self) -> frozenset[str]: ...
    @property
    def in_host_memory(self) -> frozenset[str]: ...
    @property
    def on_disk(self) -> frozenset[str]: ...


class Engine(Protocol):
    """What the actor needs of `cluster.inference.mounted.MountedEngine`."""

    @property
    def gpu_class(self) -> GpuClass: ...

    @property
    def uuid(self) -> CardUuid: ...

    def candidates(self) -> tuple[canary.Candidate, ...]:
        """Base models on its machine that a canary can be computed with, the best one first."""
        ...

    def software(self) -> str:
        """What its results depend on beside card and model. Raises `DeviceFault`."""
        ...

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed: ...

    def state(self) -> EngineState: ...

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None: ...

    def has_to_tend(self) -> bool:
        """Whether there is something to do while no attempt runs."""
        ...

    def usage(self) -> CardUse: ...

    def vitals(self) -> Vitals:
        """Raises `DeviceFault` when the card is gone."""
        ...

    def tend(self, look: Callable[[], None]) -> tuple[str, ...]:
        """Do some of it, in the computing thread; lines for the operator on what couldn't be done.

        `look` is called between pieces, and raises `Cancelled` when an attempt waits.
        """
        ...


class Health(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Report:
    """What the actor answers to a ping; `gpu_class` is None, `uuid` empty until the engine is up.

    `incarnation` is another one for each process; `software` is what results depend on there, empty
    until the engine is up, and `candidates` are base models on that machine's disk
    (`cluster.inference.canary`).
    """

    release: str
    pid: int
    health: Health
    gpu_class: GpuClass | None
    problem: str
    attempt: AttemptId | None
    task: Commitment | None
    step: int
    steps: int
    finished: int
    warm: frozenset[str]
    in_host_memory: frozenset[str]
    on_disk: frozenset[str]
    quiet_seconds: float = 0.0
    """How long ago the attempt that runs last made progress: its start, or a step; one that still
    waits for what is done between attempts, how long ago that did."""
    uuid: CardUuid = CardUuid("")
    incarnation: str = ""
    software: str = ""
    candidates: tuple[canary.Candidate, ...] = ()
    busy_seconds: float = 0.0
    """Spent on attempts by this process, the one that runs included."""
    usage: CardUse = CardUse()  # noqa: RUF009 - frozen
    vitals: Vitals = Vitals()  # noqa: RUF009 - frozen
    memory_kills: int | None = None
    """How many processes the kernel of its machine has ended for want of memory, since it began."""


@dataclass(slots=True)
class _Attempt:
    order: Order
    done: asyncio.Future[Outcome]
    progress_at: float
    """By the loop's clock: when it was asked for, began, or made its last step."""
    began_at: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    step: tuple[int, int] = (0, 0)


class InferenceWorker:
    """The plain class behind the actor, on one event loop; `make_engine` runs in its thread."""

    def __init__(self, make_engine: Callable[[], Engine], release: str) -> None:
        self._release = release
        self._incarnation = uuid.uuid4().hex[:12]
        self._software = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: Order | None = None
        self._engine: Engine | None = None
        self._problem = ""
        self._attempt: _Attempt | None = None
        self._coming = WeakValueDictionary[AttemptId, asyncio.Event]()
        """Those that wait for the engine; set where they needn't begin any more."""
        self._unread: DeviceFault | None = None
        self._finished = 0
        self._busy_seconds = 0.0
        self._vitals, self._vitals_at = Vitals(), float("-inf")
        self._looking: asyncio.Future[None] | None = None
        self._candidates: tuple[canary.Candidate, ...] = ()
        self._listing: asyncio.Future[None] | None = None
        self._tending: asyncio.Future[None] | None = None
        self._tended_at = float("-inf")
        """When what is done between attempts last went on: the next one may wait for it."""
        self._log = structlog.get_logger("gpu")
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._booting = loop.create_task(self._boot(make_engine))

    async def _boot(self, make_engine: Callable[[], Engine]) -> None:
        loop = asyncio.get_running_loop()
        try:
            engine = await loop.run_in_executor(self._thread, make_engine)
            # Before it is up: until it is known what to ask a card, it is taken for a good one. It
            # may take minutes, and no account is to be there for the card before.
            self._candidates = await loop.run_in_executor(self._thread, engine.candidates)
            self._software = await loop.run_in_executor(self._thread, engine.software)
            self._engine = engine
        except ClusterError as error:
            self._problem = brief(str(error)) or type(error).__name__
        except Exception as error:  # noqa: BLE001 - a driver's, a library's: the card is broken
            self._problem = named(error)

    async def start(self, order: Order) -> ClusterError | None:
        """Start an attempt; the same attempt again is a repetition and changes nothing."""
        # First, and nothing awaited after it: of two starts during boot, the second sees the first.
        given_up = self._coming.setdefault(order.attempt_id, asyncio.Event())
        await asyncio.shield(self._booting)
        if given_up.is_set():
            return Cancelled("cancelled before it began")
        current = self._attempt
        if current is not None and current.order.attempt_id == order.attempt_id:
            return None
        if current is not None and not current.done.done():
            return DeviceFault(DeviceFaultKind.NOT_TAKEN, f"busy with {current.order.attempt_id}")
        if self._engine is None:
            problem = f"the engine didn't start: {self._problem}"
            return DeviceFault(DeviceFaultKind.NOT_TAKEN, problem)
        loop = asyncio.get_running_loop()
        now = self._clock()
        attempt = _Attempt(order, loop.create_future(), now, now)
        self._attempt = attempt
        running = loop.run_in_executor(self._thread, self._compute, self._engine, attempt)
        running.add_done_callback(lambda future: self._settle(attempt, future))
        return None

    def _compute(self, engine: Engine, attempt: _Attempt) -> Outcome:
        def on_step(step: int, steps: int) -> None:
            attempt.step = (step, steps)
            attempt.progress_at = self._clock()

        attempt.progress_at = self._clock()
        try:
            return engine.run(attempt.order, attempt.cancelled.is_set, on_step)
        except ClusterError as error:
            return _bare(error)
        except BaseException as error:  # noqa: BLE001 - the top of the computing thread
            fault = DeviceFault(DeviceFaultKind.OTHER, named(error))
            fault.trace = "".join(traceback.format_exception(error))[-MOST_TRACE:]
            return fault

    def _settle(self, attempt: _Attempt, future: asyncio.Future[Outcome]) -> None:
        self._finished += attempt.order.task != canary.TASK
        self._busy_seconds += self._clock() - attempt.began_at
        attempt.done.set_result(future.result())

    async def result(self, attempt_id: AttemptId) -> Outcome:
        """Wait for an attempt's outcome; `AttemptLost` for one this process never had."""
        attempt = self._attempt
        if attempt is None or attempt.order.attempt_id != attempt_id:
            return AttemptLost(f"attempt {attempt_id} isn't known to this GPU actor")
        return await asyncio.shield(attempt.done)

    async def cancel(self, attempt_id: AttemptId) -> None:
        if (coming := self._coming.get(attempt_id)) is not None:
            coming.set()
        attempt = self._attempt
        if attempt is not None and attempt.order.attempt_id == attempt_id:
            attempt.cancelled.set()

    async def prefetch(self, order: Order) -> None:
        """Have an order's weights read into host memory beside what computes; the newest wins."""
        await asyncio.shield(self._booting)
        if self._engine is not None:
            self._ahead = order
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._reader, self._read_ahead, self._engine, order)

    def _read_ahead(self, engine: Engine, order: Order) -> None:
        if self._ahead is not order:
            return  # while it waited for the one before, a newer one came
        # A hint: whoever runs the order meets the same error and gives it its meaning.
        with contextlib.suppress(ClusterError, OSError):
            engine.prefetch(order, lambda: self._ahead is order)

    def _tend(self, engine: Engine) -> None:
        """Have the engine do what it does between attempts; it gives way to the next one."""
        if self._tending is not None and not self._tending.done():
            return
        if engine.has_to_tend():
            loop = asyncio.get_running_loop()
            self._tending = loop.run_in_executor(self._thread, self._do_tend, engine)

    def _do_tend(self, engine: Engine) -> None:
        def look() -> None:
            self._tended_at = self._clock()
            if self._attempt is not None and not self._attempt.done.done():
                raise Cancelled("an attempt waits")

        problems: tuple[str, ...] = ()
        try:
            look()
            problems = engine.tend(look)
        except Cancelled:
            pass
        except ClusterError as error:
            problems = (str(error),)
        for problem in problems:
            self._log.warning("not_preloaded", problem=problem)

    def _look_at_card(self, engine: Engine) -> None:
        """Now and then, in a thread: the driver may take its time."""
        due = self._clock() - self._vitals_at >= VITALS_SECONDS
        if due and (self._looking is None or self._looking.done()):
            self._vitals_at = self._clock()
            loop = asyncio.get_running_loop()
            self._looking = loop.run_in_executor(None, self._read_vitals, engine)

    def _look_for_candidates(self, engine: Engine) -> None:
        """In a thread, for the next report: it looks at the disk, and may read a model through."""
        if self._listing is None or self._listing.done():
            loop = asyncio.get_running_loop()
            self._listing = loop.run_in_executor(None, self._list_candidates, engine)

    def _list_candidates(self, engine: Engine) -> None:
        try:
            self._candidates = engine.candidates()
        except Exception as error:  # noqa: BLE001 - nobody waits for it; those of before remain
            self._log.warning("models_not_listed", problem=named(error))

    def _read_vitals(self, engine: Engine) -> None:
        before, fault = self._unread, None
        try:
            self._vitals = engine.vitals()
        except DeviceFault as error:
            # What computes there finds it too, and its fault is what counts.
            self._vitals, fault = Vitals(), error.with_traceback(None)
        self._unread = fault
        if fault is not None and str(fault) != str(before):
            self._log.warning("card_not_read", problem=str(fault))
        elif fault is None and before is not None:
            self._log.info("card_read_again")

    def _gone(self) -> str:
        """What the driver says of a card that it has lost; empty while it has it."""
        fault = self._unread
        lost = fault is not None and fault.kind is DeviceFaultKind.CONTEXT_LOST
        return str(fault) if lost else ""

    def _quiet(self, attempt: _Attempt) -> float:
        return self._clock() - max(attempt.progress_at, self._tended_at)

    async def report(self) -> Report:
        attempt, engine = self._attempt, self._engine
        running = attempt is not None and not attempt.done.done()
        gone = self._gone()
        if engine is not None and not running and not gone:
            self._tend(engine)
        if engine is not None:
            self._look_at_card(engine)
            self._look_for_candidates(engine)
        state = None if engine is None else engine.state()
        if engine is None:
            health = Health.BROKEN if self._problem else Health.STARTING
        else:
            health = Health.BUSY if running else Health.BROKEN if gone else Health.READY
        step, steps = attempt.step if attempt is not None and running else (0, 0)
        return Report(
            release=self._release,
            pid=os.getpid(),
            health=health,
            gpu_class=None if engine is None else engine.gpu_class,
            problem=self._problem or gone,
            attempt=attempt.order.attempt_id if attempt is not None and running else None,
            task=attempt.order.task if attempt is not None and running else None,
            step=step,
            steps=steps,
            finished=self._finished,
            warm=frozenset() if state is None else state.warm,
            in_host_memory=frozenset() if state is None else state.in_host_memory,
            on_disk=frozenset() if state is None else state.on_disk,
            quiet_seconds=self._quiet(attempt) if attempt and running else 0.0,
            uuid=CardUuid("") if engine is None else engine.uuid,
            incarnation=self._incarnation,
            software=self._software,
            candidates=self._candidates,
            busy_seconds=self._busy_seconds
            + (self._clock() - attempt.began_at if attempt and running else 0.0),
            usage=CardUse() if engine is None else engine.usage(),
            vitals=self._vitals,
            memory_kills=memory_kills(),
        )


def _bare(error: ClusterError) -> ClusterError:
    """The error without its frames: an outcome is kept, and they hold the failed run's tensors.
    What they were is kept as text."""
    error.trace = "".join(traceback.format_exception(error))[-MOST_TRACE:]
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


@ray.remote(num_cpus=0, max_restarts=-1)
class InferenceActor(InferenceWorker):
    """Detached, named after its GPU; `make_engine` is a function of the installed package."""

    # Ray awaits an async __init__ on the actor's event loop.
    async def __init__(  # type: ignore[misc]
        self, make_engine: Callable[[], Engine], release: str
    ) -> None:
        give_way(CARDS)
        InferenceWorker.__init__(self, make_engine, release)
