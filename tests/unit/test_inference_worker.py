from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from actors import inference
from actors.inference import Engine, Health, InferenceWorker, Outcome
from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    ConfigError,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
)
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import AttemptId, CardUuid, Commitment, GpuClass
from cluster.inference import canary
from cluster.inference.nvml import Vitals
from tests.unit.actor_fakes import DONE, KIND, PATIENCE, TASK, until

A, B, C = AttemptId("a"), AttemptId("b"), AttemptId("c")


@dataclass
class State:
    warm: frozenset[str] = frozenset({"tiny"})
    in_host_memory: frozenset[str] = frozenset({"small"})
    on_disk: frozenset[str] = frozenset({"large"})


@dataclass
class FakeEngine:
    """Computes until `go` is set; `outcome` is what then comes of it."""

    go: threading.Event = field(default_factory=threading.Event)
    outcome: Computed | BaseException = DONE
    ran: list[AttemptId] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    cancelled: Callable[[], bool] = lambda: False
    on_step: Callable[[int, int], None] = lambda step, steps: None
    gpu_class: GpuClass = KIND
    ahead: list[tuple[Commitment, Callable[[], bool]]] = field(default_factory=list)
    ahead_fails: Exception | None = None
    uuid: CardUuid = CardUuid("GPU-1")
    chores: list[tuple[str, ...]] = field(default_factory=list)
    """What each `tend` is still to answer."""
    tended: int = 0
    tends: Callable[[Callable[[], None]], None] = lambda look: None
    """What it does meanwhile."""
    vitals_fail: DeviceFault | None = None

    def has_to_tend(self) -> bool:
        return bool(self.chores)

    def tend(self, look: Callable[[], None]) -> tuple[str, ...]:
        self.threads.add(threading.get_ident())
        self.tended += 1
        self.tends(look)
        return self.chores.pop(0)

    def candidates(self) -> tuple[canary.Candidate, ...]:
        return (canary.Candidate("acme/tiny"),)

    def software(self) -> str:
        return "torch=1 driver=2"

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        self.threads.add(threading.get_ident())
        self.cancelled, self.on_step = cancelled, on_step
        on_step(3, 20)
        # The last: who sees it may rely on all of the above.
        self.ran.append(order.attempt_id)
        assert self.go.wait(PATIENCE)
        if cancelled():
            raise Cancelled("cancelled")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def state(self) -> State:
        return State()

    def usage(self) -> CardUse:
        return CardUse(device_bytes=7, loads=2)

    def vitals(self) -> Vitals:
        if self.vitals_fail is not None:
            raise self.vitals_fail
        return Vitals(total_memory=10, free_memory=3, temperature=60)

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        self.ahead.append((order.task, wanted))
        if self.ahead_fails is not None:
            raise self.ahead_fails


def order(attempt: AttemptId) -> Order:
    return Order(attempt, TASK, 0, "{}", None)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.go.set()


def worker_of(engine: Engine) -> InferenceWorker:
    return InferenceWorker(lambda: engine, "1+abc")


async def outcome_of(engine: FakeEngine, attempt: AttemptId = A) -> Outcome:
    worker = worker_of(engine)
    engine.go.set()
    assert await worker.start(order(attempt)) is None
    async with asyncio.timeout(PATIENCE):
        return await worker.result(attempt)


async def test_computes_in_a_thread_of_its_own(engine: FakeEngine) -> None:
    assert await outcome_of(engine) == DONE
    assert threading.get_ident() not in engine.threads


async def test_answers_pings_while_it_computes(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.start(order(A))
    await until(lambda: bool(engine.ran))
    report = await worker.report()
    assert (report.health, report.attempt, report.task) == (Health.BUSY, A, TASK)
    assert (report.step, report.steps, report.finished) == (3, 20, 0)
    assert (report.release, report.gpu_class) == ("1+abc", KIND)
    assert report.warm == {"tiny"}
    assert report.in_host_memory == {"small"}
    assert report.on_disk == {"large"}

    engine.go.set()
    await worker.result(A)
    report = await worker.report()
    assert (report.health, report.attempt, report.task) == (Health.READY, None, None)
    assert (report.step, report.steps, report.finished) == (0, 0, 1)
    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301


async def test_says_what_canaries_are_judged_by(engine: FakeEngine) -> None:
    engine.go.set()
    first, second = worker_of(engine), worker_of(engine)
    await first.start(Order(A, canary.TASK, 0, "{}", None))
    assert await first.result(A) == DONE
    report = await first.report()
    assert (report.uuid, report.candidates) == ("GPU-1", (canary.Candidate("acme/tiny"),))
    assert report.software == "torch=1 driver=2"
    assert report.finished == 0, "a canary is no task"
    assert report.incarnation == (await first.report()).incarnation
    assert report.incarnation != (await second.report()).incarnation


async def test_says_that_it_is_starting_until_the_engine_is_up(engine: FakeEngine) -> None:
    worker, go = booting(engine)
    try:
        report = await worker.report()
        assert (report.health, report.gpu_class) == (Health.STARTING, None)
    finally:
        go.set()
    assert await worker.start(order(A)) is None
    assert (await worker.report()).health is not Health.STARTING


async def test_refuses_a_second_attempt_while_busy(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.start(order(A))
    refused = await worker.start(order(B))
    assert isinstance(refused, DeviceFault)
    assert refused.kind is DeviceFaultKind.NOT_TAKEN
    assert A in str(refused)
    assert isinstance(await worker.result(B), AttemptLost)
    engine.go.set()
    assert await worker.result(A) == DONE
    assert engine.ran == [A]


async def test_the_same_attempt_again_is_computed_once(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    assert await worker.start(order(A)) is None
    assert await worker.start(order(A)) is None
    engine.go.set()
    assert await worker.result(A) == DONE
    assert await worker.start(order(A)) is None
    assert await worker.result(A) == DONE
    assert engine.ran == [A]


def booting(engine: Engine) -> tuple[InferenceWorker, threading.Event]:
    """A worker whose engine isn't up until the event is set."""
    go = threading.Event()

    def make() -> Engine:
        assert go.wait(PATIENCE)
        return engine

    return InferenceWorker(make, "1+abc"), go


async def test_starts_that_wait_for_the_engine_are_one_attempt(engine: FakeEngine) -> None:
    worker, go = booting(engine)
    starts = [asyncio.create_task(worker.start(order(each))) for each in (A, A, B)]
    await asyncio.sleep(0)
    go.set()
    first, again, other = await asyncio.gather(*starts)
    assert (first, again) == (None, None)
    assert isinstance(other, DeviceFault)
    engine.go.set()
    assert await worker.result(A) == DONE
    await asyncio.sleep(0.01)
    assert engine.ran == [A]


async def test_a_start_given_up_during_boot_leaves_the_boot_alone(engine: FakeEngine) -> None:
    worker, go = booting(engine)
    start = asyncio.create_task(worker.start(order(A)))
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    go.set()
    assert await worker.start(order(B)) is None


async def test_a_start_cancelled_during_boot_never_begins(engine: FakeEngine) -> None:
    worker, go = booting(engine)
    starts = [asyncio.create_task(worker.start(order(each))) for each in (A, A, B)]
    await asyncio.sleep(0)
    await worker.cancel(A)
    go.set()
    first, again, other = await asyncio.gather(*starts)
    assert (type(first), type(again), other) == (Cancelled, Cancelled, None)
    engine.go.set()
    assert await worker.result(B) == DONE
    assert engine.ran == [B]


async def test_an_attempt_it_never_had_is_lost(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    assert isinstance(await worker.result(A), AttemptLost)


async def test_an_outcome_is_kept_until_the_next_start(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    engine.go.set()
    await worker.start(order(A))
    assert await worker.result(A) == DONE
    assert await worker.result(A) == DONE
    assert isinstance(await worker.result(B), AttemptLost)
    assert await worker.start(order(B)) is None
    assert isinstance(await worker.result(A), AttemptLost)
    assert await worker.result(B) == DONE
    assert (await worker.report()).finished == 2


async def test_one_who_stops_waiting_takes_nothing_with_him(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.start(order(A))
    waiting = asyncio.create_task(worker.result(A))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    engine.go.set()
    assert await worker.result(A) == DONE


@pytest.mark.parametrize(
    "error",
    [
        TaskInvalid("no"),
        DeviceFault(DeviceFaultKind.CONTEXT_LOST, "gone"),
        ModelUnavailable(ModelUnavailableKind.NOT_HERE, "no such model"),
    ],
)
async def test_errors_by_fault_are_values_that_keep_their_type(
    engine: FakeEngine, error: ClusterError
) -> None:
    engine.outcome = error
    outcome = await outcome_of(engine)
    assert isinstance(outcome, ClusterError)
    sent = pickle.loads(pickle.dumps(outcome))  # noqa: S301
    assert (type(sent), str(sent)) == (type(error), str(error))
    assert getattr(sent, "kind", None) is getattr(error, "kind", None)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("CUDA"), StopIteration(), SystemExit(1)]
)
async def test_what_nobody_expected_is_the_cards_fault(
    engine: FakeEngine, error: BaseException
) -> None:
    engine.outcome = error
    outcome = await outcome_of(engine)
    assert isinstance(outcome, DeviceFault)
    assert outcome.kind is DeviceFaultKind.OTHER
    assert type(error).__name__ in str(outcome)


class Tensors(set[int]):
    pass


@dataclass
class OutOfMemoryEngine(FakeEngine):
    heavy: weakref.ref[Tensors] | None = None

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        tensors = Tensors()
        self.heavy = weakref.ref(tensors)
        try:
            raise MemoryError
        except MemoryError as error:
            raise DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "oom") from error


async def test_a_kept_failure_holds_no_memory_of_the_failed_run() -> None:
    engine = OutOfMemoryEngine()
    outcome = await outcome_of(engine)
    assert isinstance(outcome, DeviceFault)
    gc.collect()
    assert engine.heavy is not None
    assert engine.heavy() is None


async def test_cancel_reaches_only_its_attempt(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.cancel(A)  # nothing runs
    await worker.start(order(A))
    await until(lambda: bool(engine.ran))
    await worker.cancel(B)
    assert not engine.cancelled()
    await worker.cancel(A)
    assert engine.cancelled()
    engine.go.set()
    assert isinstance(await worker.result(A), Cancelled)

    await worker.start(order(C))
    assert await worker.result(C) == DONE


@pytest.mark.parametrize(
    "error", [ConfigError("no such folder"), RuntimeError("no driver"), ClusterError()]
)
async def test_an_engine_that_cant_start_breaks_the_card_and_nothing_else(
    error: Exception,
) -> None:
    def make() -> Engine:
        raise error

    worker = InferenceWorker(make, "1+abc")
    refused = await worker.start(order(A))
    assert isinstance(refused, DeviceFault)
    assert str(error) in str(refused)
    report = await worker.report()
    assert report.health is Health.BROKEN
    assert str(error) in report.problem
    assert isinstance(await worker.result(A), AttemptLost)


# --- reading ahead ----------------------------------------------------------------------------


async def test_reads_ahead_beside_what_computes(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.start(order(A))
    await worker.prefetch(order(B))
    assert [task for task, _ in engine.ahead] == [TASK]
    assert (await worker.report()).health is Health.BUSY


async def test_only_the_newest_order_is_still_wanted(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.prefetch(order(A))
    (_, first_wanted) = engine.ahead[0]
    assert first_wanted()
    await worker.prefetch(order(B))
    assert not first_wanted()
    assert engine.ahead[1][1]()


@dataclass
class SlowReader(FakeEngine):
    """Reads until it isn't wanted any more, or may end."""

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        super().prefetch(order, wanted)
        while wanted() and not self.go.wait(0.001):
            pass


async def test_what_is_wanted_no_more_when_its_turn_comes_is_not_read() -> None:
    engine = SlowReader()
    worker = worker_of(engine)
    begun = [asyncio.create_task(worker.prefetch(replace(order(A), task=Commitment("0xa"))))]
    await until(lambda: bool(engine.ahead))
    for task in ("0xb", "0xc"):
        told = worker.prefetch(replace(order(A), task=Commitment(task)))
        begun.append(asyncio.create_task(told))
    await until(lambda: len(engine.ahead) > 1)
    engine.go.set()
    await asyncio.gather(*begun)
    assert [task for task, _ in engine.ahead] == ["0xa", "0xc"]


@pytest.mark.parametrize(
    "error", [ModelUnavailable(ModelUnavailableKind.NOT_HERE, "no"), OSError("disk")]
)
async def test_a_hint_that_fails_harms_nobody(engine: FakeEngine, error: Exception) -> None:
    engine.ahead_fails = error
    worker = worker_of(engine)
    await worker.prefetch(order(B))
    engine.go.set()
    await worker.start(order(A))
    assert await worker.result(A) == DONE


# --- no progress ------------------------------------------------------------------------------


async def test_how_long_an_attempt_has_made_no_progress(engine: FakeEngine) -> None:
    clock = asyncio.get_running_loop().time
    worker = worker_of(engine)
    assert (await worker.report()).quiet_seconds == 0.0
    before = clock()
    await worker.start(order(A))
    await until(lambda: bool(engine.ran))
    assert (await worker.report()).quiet_seconds <= clock() - before

    stepped = clock()
    engine.on_step(4, 20)
    quiet = clock()
    await asyncio.sleep(0.05)
    waited = clock() - quiet
    assert waited <= (await worker.report()).quiet_seconds <= clock() - stepped

    stepped = clock()
    engine.on_step(5, 20)
    assert (await worker.report()).quiet_seconds <= clock() - stepped
    engine.go.set()
    await worker.result(A)
    assert (await worker.report()).quiet_seconds == 0.0


# --- between attempts -----------------------------------------------------------------------------


async def test_chores_are_done_in_the_computing_thread_while_nothing_runs(
    engine: FakeEngine,
) -> None:
    engine.chores = [("acme/large: no memory",), ()]
    worker = worker_of(engine)
    await worker.start(order(A))
    await until(lambda: bool(engine.ran))
    await worker.report()
    assert engine.tended == 0, "an attempt runs"
    engine.go.set()
    await worker.result(A)
    while engine.chores:  # A report while the last chore ends begins no further one.
        await worker.report()
        await asyncio.sleep(0.001)
    await until(lambda: engine.tended == 2)
    await worker.report()
    assert engine.tended == 2
    assert len(engine.threads) == 1


async def test_a_chore_gives_way_to_an_attempt_and_goes_on_later(engine: FakeEngine) -> None:
    engine.chores = [()]

    def chore(look: Callable[[], None]) -> None:
        for _ in range(int(PATIENCE * 1000)):
            look()
            if engine.ran:
                return
            time.sleep(0.001)

    engine.tends = chore
    worker = worker_of(engine)
    await worker._booting
    await worker.report()
    await until(lambda: engine.tended == 1)
    engine.go.set()
    with capture_logs() as logs:
        await worker.start(order(A))
        assert await worker.result(A) == DONE
    assert (engine.chores, logs) == ([()], []), "nothing went wrong"
    while engine.chores:
        await worker.report()
        await asyncio.sleep(0.001)
    assert engine.tended == 2


async def test_an_attempt_that_waits_for_a_chore_is_quiet_while_that_is(engine: FakeEngine) -> None:
    engine.chores = [()]
    looks, ends = threading.Semaphore(0), threading.Event()

    def chore(look: Callable[[], None]) -> None:
        while looks.acquire(timeout=PATIENCE) and not ends.is_set():
            with contextlib.suppress(Cancelled):  # in the midst of a piece
                look()

    engine.tends = chore
    worker = worker_of(engine)
    await worker._booting
    await worker.report()
    await until(lambda: engine.tended == 1)
    await worker.start(order(A))
    try:
        for _ in range(3):
            await asyncio.sleep(0.05)
            assert (await worker.report()).quiet_seconds >= 0.05, "it hangs"
            before, went_on = asyncio.get_running_loop().time(), worker._tended_at
            looks.release()
            await until(lambda since=went_on: worker._tended_at > since)  # type: ignore[misc]
            passed = asyncio.get_running_loop().time() - before
            assert (await worker.report()).quiet_seconds <= passed + 0.01
        await asyncio.sleep(0.05)
    finally:
        ends.set()
        looks.release()
    began = asyncio.get_running_loop().time()
    await until(lambda: bool(engine.ran))
    report = await worker.report()
    assert report.quiet_seconds <= asyncio.get_running_loop().time() - began, "it computes"
    assert report.busy_seconds >= 0.2


async def test_an_attempt_that_waited_isnt_quiet_for_what_it_waited(engine: FakeEngine) -> None:
    engine.chores = [()]
    ends, began = threading.Event(), threading.Event()

    def run(
        order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        began.set()
        assert engine.go.wait(PATIENCE)
        return DONE

    engine.run = run  # type: ignore[method-assign]

    def chore(look: Callable[[], None]) -> None:
        ends.wait(PATIENCE)

    engine.tends = chore
    worker = worker_of(engine)
    await worker._booting
    await worker.report()
    await until(lambda: engine.tended == 1)
    await worker.start(order(A))
    await asyncio.sleep(0.1)
    before = asyncio.get_running_loop().time()
    ends.set()
    await until(began.is_set)
    report = await worker.report()
    assert report.quiet_seconds <= asyncio.get_running_loop().time() - before
    assert report.busy_seconds >= 0.1


async def test_a_chore_that_fails_is_one_line_and_no_more(engine: FakeEngine) -> None:
    def fail(look: Callable[[], None]) -> tuple[str, ...]:
        engine.chores.clear()
        raise DeviceFault(DeviceFaultKind.OTHER, "broken")

    engine.chores = [()]
    engine.tend = fail  # type: ignore[method-assign]
    worker = worker_of(engine)
    await asyncio.sleep(0.05)
    await worker.report()
    engine.go.set()
    await worker.start(order(A))
    assert await worker.result(A) == DONE


def test_a_report_tells_of_the_card_and_of_what_it_did() -> None:
    async def go() -> None:
        engine = FakeEngine()
        worker = worker_of(engine)
        await worker.start(order(A))
        await until(lambda: engine.ran == [A])
        assert (await worker.report()).busy_seconds > 0
        engine.go.set()
        await worker.result(A)
        busy = (await worker.report()).busy_seconds
        report = await worker.report()
        assert report.busy_seconds == busy > 0
        assert report.usage == CardUse(device_bytes=7, loads=2)
        while report.vitals.temperature is None:
            report = await worker.report()
        assert report.vitals == Vitals(total_memory=10, free_memory=3, temperature=60)

    asyncio.run(go())


def test_a_card_that_cannot_be_read_is_no_reason_to_stop() -> None:
    async def go() -> None:
        engine = FakeEngine(vitals_fail=DeviceFault(DeviceFaultKind.OTHER, "NVML fails"))
        engine.go.set()
        worker = worker_of(engine)
        await worker.start(order(A))
        assert await worker.result(A) == DONE
        report = await worker.report()
        assert (report.vitals, report.health) == (Vitals(), Health.READY)

    asyncio.run(go())


# --- a card that can't be read ----------------------------------------------------------------


@pytest.fixture
def always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "VITALS_SECONDS", 0.0)


async def looked(worker: InferenceWorker) -> None:
    """Once more, to its end."""
    await until(lambda: worker._looking is None or worker._looking.done())
    await worker.report()
    await until(lambda: worker._looking is not None and worker._looking.done())


@pytest.mark.usefixtures("always_looking")
async def test_what_keeps_a_card_from_being_read_is_said_once(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker._booting
    with capture_logs() as logs:
        for problem in ("NVML fails", "NVML fails", "another", "another", None, None):
            fault = None if problem is None else DeviceFault(DeviceFaultKind.OTHER, problem)
            engine.vitals_fail = fault
            await looked(worker)
    said = [(each["event"], each.get("problem")) for each in logs]
    assert said == [
        ("card_not_read", "NVML fails"),
        ("card_not_read", "another"),
        ("card_read_again", None),
    ]


@pytest.mark.usefixtures("always_looking")
async def test_a_card_that_the_driver_has_lost_isnt_offered(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker._booting
    engine.vitals_fail = DeviceFault(DeviceFaultKind.CONTEXT_LOST, "the card is gone")
    await looked(worker)
    engine.chores = [()]
    report = await worker.report()
    assert (report.health, report.problem) == (Health.BROKEN, "the card is gone")
    assert engine.chores == [()], "nor brought anything"
    engine.vitals_fail = None
    await looked(worker)
    report = await worker.report()
    assert (report.health, report.problem) == (Health.READY, "")


@pytest.mark.usefixtures("always_looking")
async def test_what_computes_on_a_lost_card_finds_it_out_itself(engine: FakeEngine) -> None:
    worker = worker_of(engine)
    await worker.start(order(A))
    engine.vitals_fail = DeviceFault(DeviceFaultKind.CONTEXT_LOST, "the card is gone")
    await looked(worker)
    assert (await worker.report()).health is Health.BUSY
