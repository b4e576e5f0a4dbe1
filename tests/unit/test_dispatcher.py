from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from actors.dispatcher import UNKNOWN_BUSY_SECONDS, event_for
from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    LeaseLost,
    ModelUnavailable,
    ModelUnavailableKind,
    ParametersUnreadable,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.matching import Want
from cluster.core.ports import Order
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claimed,
    Event,
    Fault,
    FaultFound,
    ParametersFetched,
    Progress,
    ResultStored,
)
from cluster.core.types import (
    AttemptId,
    Commitment,
    FileRef,
    GigaBytes,
    GpuId,
    GpuState,
    Requirement,
    Timestamp,
    Work,
)
from tests.unit.actor_fakes import (
    ALICE,
    CARD,
    CARD_2,
    DONE,
    FILES,
    OTHER,
    SCORE,
    START,
    TASK,
    gpu_of,
)
from tests.unit.actor_house import House

NOW = Timestamp(START)
FIRST, SECOND = AttemptId("a1"), AttemptId("a2")
THIRD = Commitment("0x" + "03" * 32)
NO_WORK, SOME_WORK = Work("sd", 0.0), Work("sd", 10.0)
READY_EVENTS: tuple[Event, ...] = (ParametersFetched("{}"),)


def want_of(task: Commitment = TASK, avoid: frozenset[GpuId] = frozenset()) -> Want:
    requirement = Requirement(GigaBytes(1), "", GigaBytes(0))
    return Want(task, requirement, "pipe", "base", None, 1.0, avoid)


def order_of(task: Commitment = TASK, attempt: str = "") -> Order:
    return Order(AttemptId(attempt), task, 0, "{}", None)


def ask(house: House, avoid: frozenset[GpuId] = frozenset(), work: Work = NO_WORK) -> None:
    house.dispatcher.want(want_of(TASK, avoid), order_of(TASK), work)
    house.dispatcher.dispatch(NOW)


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.open(TASK, *READY_EVENTS)
    return house


# --- the way of an attempt ------------------------------------------------------------------------


async def test_an_attempt_is_stored_before_the_card_hears_of_it(house: House) -> None:
    stored: list[list[str]] = []
    house.pool.before = lambda method: stored.append([method, *house.kinds()])
    ask(house)
    await house.calm()
    assert stored[0] == ["start", "Seen", "ParametersFetched", "AttemptStarted"]
    assert house.story()[-1] == AttemptStarted(FIRST, CARD)
    assert house.pool.called("start") == [(CARD, FIRST)]
    assert house.dispatcher.follows(FIRST)
    assert house.dispatcher.waiting() == ()


async def test_a_result_is_in_the_artifacts_and_then_in_the_journal(house: House) -> None:
    house.pool.outcomes = [DONE]
    ask(house)
    await house.calm()
    stored = house.story()[-1]
    assert isinstance(stored, ResultStored)
    assert (stored.attempt_id, stored.score) == (FIRST, SCORE)
    assert await house.artifacts.get(TASK, stored.files) == FILES
    assert house.settled == [TASK]
    assert not house.dispatcher.follows(FIRST)
    assert b'crynux_attempts_total{fault="none"} 1.0' in house.metrics.render()


async def test_the_files_are_kept_before_the_result_is_stored(house: House) -> None:
    seen: list[str] = []
    put = house.artifacts.put

    async def slow_put(task: Commitment, files: Sequence[tuple[str, bytes]]) -> tuple[FileRef, ...]:
        seen.extend(house.kinds())
        return await put(task, files)

    house.artifacts.put = slow_put  # type: ignore[method-assign]
    house.pool.outcomes = [DONE]
    ask(house)
    await house.calm()
    assert "ResultStored" not in seen
    assert house.kinds()[-1] == "ResultStored"


OTHER_KINDS = [kind for kind in DeviceFaultKind if kind is not DeviceFaultKind.OUT_OF_MEMORY]
ERRORS: list[tuple[ClusterError, Fault]] = [
    (TaskUnsupported("x"), Fault.UNSUPPORTED),
    (DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "x"), Fault.MEMORY),
    *((DeviceFault(kind, "out of memory"), Fault.DEVICE) for kind in OTHER_KINDS),
    *((ModelUnavailable(kind, "x"), Fault.MODEL) for kind in ModelUnavailableKind),
    (AttemptLost("x"), Fault.LOST),
    (Cancelled("x"), Fault.CANCELLED),
    (DeadlinePassed("x"), Fault.DEADLINE),
    (ParametersUnreadable("x"), Fault.DEVICE),
    (ClusterError("TaskInvalid"), Fault.DEVICE),
]


@pytest.mark.parametrize(("error", "fault"), ERRORS)
@pytest.mark.parametrize("where", ["start", "result"])
async def test_an_error_is_judged_by_its_type(
    house: House, where: str, error: ClusterError, fault: Fault
) -> None:
    house.pool.faults[where] = [error]
    ask(house)
    await house.calm()
    event = house.story()[-1]
    assert isinstance(event, AttemptFailed)
    assert (event.attempt_id, event.fault) == (FIRST, fault)
    assert house.ledger.open[TASK].progress is Progress.READY
    assert house.failed == []
    line = f'crynux_attempts_total{{fault="{fault.value}"}} 1.0'
    assert line.encode() in house.metrics.render()


async def test_of_every_attempt_that_failed_is_kept_why(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    house.dispatcher.broke = lambda _gpu, _order, error: kept.append(str(error))
    house.pool.outcomes = [Cancelled("given up")]
    ask(house)
    await house.calm()
    assert kept == [], "it was we who gave it up"
    house.pool.outcomes = [DeadlinePassed("too slow")]
    ask(house)
    await house.calm()
    assert kept == ["too slow"]

    async def full(*_: object) -> NoReturn:  # noqa: RUF029
        raise OSError("No space left on device")

    monkeypatch.setattr(house.artifacts, "put", full)
    house.pool.outcomes = [DONE]
    ask(house)
    await house.calm()
    assert kept == ["too slow", "artifacts: No space left on device"]


async def test_only_the_tasks_own_fault_is_found_in_the_task(house: House) -> None:
    house.pool.outcomes = [TaskInvalid("no such thing")]
    ask(house)
    await house.calm()
    assert house.story()[-1] == FaultFound("no such thing")


def test_no_other_error_of_ours_ever_becomes_a_fault_of_the_task() -> None:
    kinds = [ClusterError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert len(kinds) > 15
    for kind in kinds:
        error = kind.__new__(kind)
        vars(error)["kind"] = None  # what some of them have
        found = isinstance(event_for(FIRST, error), FaultFound)
        assert found == issubclass(kind, TaskInvalid)


@pytest.mark.parametrize(
    "error", [ClusterError("can't store a result: No space left"), OSError(28, "No space left")]
)
async def test_files_that_cant_be_kept_are_no_result(house: House, error: Exception) -> None:
    async def full(task: Commitment, files: Sequence[tuple[str, bytes]]) -> tuple[FileRef, ...]:
        await asyncio.sleep(0)
        raise error

    house.artifacts.put = full  # type: ignore[method-assign]
    house.pool.outcomes = [DONE]
    ask(house)
    await house.calm()
    event = house.story()[-1]
    assert isinstance(event, AttemptFailed)
    assert event.fault is Fault.DEVICE
    assert "No space left" in event.detail
    assert house.failed == []


async def test_a_bug_in_a_follower_comes_up(house: House) -> None:
    bug = ZeroDivisionError("a bug")
    house.pool.faults["result"] = [bug]
    ask(house)
    await house.calm()
    assert house.failed == [bug]
    assert house.kinds()[-1] == "AttemptStarted"


async def test_a_lost_lease_comes_up_and_nothing_is_stored(house: House) -> None:
    ask(house)
    await house.calm()
    house.journal.acquire("another", Timestamp(START + 100), 15.0)
    house.pool.finish(FIRST, DONE)
    await house.calm()
    assert [type(error) for error in house.failed] == [LeaseLost]
    assert house.kinds()[-1] == "AttemptStarted"


# --- late answers ---------------------------------------------------------------------------------


async def test_an_answer_after_the_attempt_was_given_up_is_dropped(house: House) -> None:
    ask(house)
    await house.calm()
    await house.dispatcher.cancel(CARD, TASK, FIRST)
    assert house.story()[-1] == AttemptFailed(FIRST, Fault.CANCELLED, "given up")
    assert house.pool.called("cancel") == [(CARD, FIRST)]
    house.pool.finish(FIRST, DONE)
    await house.calm()
    assert house.kinds()[-1] == "AttemptFailed"
    assert house.failed == []


async def test_a_given_up_attempt_keeps_its_card_until_it_answers(house: House) -> None:
    ask(house)
    await house.calm()
    await house.dispatcher.cancel(CARD, TASK, FIRST)
    ask(house)
    assert house.dispatcher.waiting() == (TASK,)
    house.pool.finish(FIRST, Cancelled("cancelled"))
    await house.calm()
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.called("start") == [(CARD, FIRST), (CARD, SECOND)]


async def test_an_old_attempts_answer_never_passes_for_the_new_ones(tmp_path: Path) -> None:
    house = House(tmp_path, (gpu_of(), gpu_of(CARD_2)))
    house.open(TASK, *READY_EVENTS)
    ask(house)
    await house.calm()
    await house.dispatcher.cancel(CARD, TASK, FIRST)
    ask(house, avoid=frozenset({CARD}))
    await house.calm()
    house.pool.finish(FIRST, DONE)
    await house.calm()
    assert house.story()[-1] == AttemptStarted(SECOND, CARD_2)
    assert house.failed == []
    house.pool.finish(SECOND, DONE)
    await house.calm()
    result = house.ledger.open[TASK].result
    assert result is not None
    assert result.attempt_id == SECOND


async def test_a_cancel_that_comes_late_leaves_the_result(house: House) -> None:
    ask(house)
    await house.calm()
    house.pool.finish(FIRST, DONE)
    await house.calm()
    await house.dispatcher.cancel(CARD, TASK, FIRST)
    assert house.kinds()[-1] == "ResultStored"


# --- cards ----------------------------------------------------------------------------------------


async def test_two_wants_and_one_card_make_a_queue(house: House) -> None:
    house.open(OTHER, *READY_EVENTS)
    house.dispatcher.want(want_of(TASK), order_of(TASK), NO_WORK)
    house.dispatcher.want(want_of(OTHER), order_of(OTHER), NO_WORK)
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.dispatcher.waiting() == (OTHER,)
    # The pool's look is older than the placement, the card still seems free; the work takes longer
    # than was thought.
    house.dispatcher.dispatch(NOW)
    house.dispatcher.dispatch(Timestamp(NOW + 1000))
    await house.calm()
    assert house.pool.called("start") == [(CARD, FIRST)]
    house.pool.finish(FIRST, DONE)
    await house.calm()
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.called("start") == [(CARD, FIRST), (CARD, SECOND)]
    assert house.story(OTHER)[-1] == AttemptStarted(SECOND, CARD)


@pytest.mark.parametrize("state", [each for each in GpuState if each is not GpuState.READY])
async def test_a_card_that_isnt_ready_gets_nothing(tmp_path: Path, state: GpuState) -> None:
    house = House(tmp_path, (gpu_of(CARD, state),))
    house.open(TASK, *READY_EVENTS)
    ask(house)
    await house.calm()
    assert house.kinds()[-1] == "ParametersFetched"
    assert {name for name, *_ in house.pool.calls} <= {"prefetch"}


def test_a_card_busy_with_something_unknown_is_soon_expected_back(tmp_path: Path) -> None:
    warm = gpu_of(CARD, GpuState.BUSY)
    house = House(tmp_path, (warm,))
    card = house.dispatcher._card(warm, NOW, frozenset())
    assert card.free_at == NOW + UNKNOWN_BUSY_SECONDS


async def test_a_card_that_is_stuck_is_not_waited_for_while_a_cold_one_is_free(
    tmp_path: Path,
) -> None:
    """What it computes was to take a second; from nowhere a card is ready in a minute."""
    house = House(tmp_path, (gpu_of(CARD), gpu_of(CARD_2)))
    house.open(TASK, *READY_EVENTS)
    house.open(OTHER, *READY_EVENTS)
    ask(house)
    due = NOW + 60.0 + 1.0  # it begins cold too
    for late, waits in ((1.0, True), (59.0, True), (61.0, False)):
        now = Timestamp(due + late)
        house.dispatcher.want(want_of(OTHER), order_of(OTHER), NO_WORK)
        house.dispatcher.dispatch(now)
        assert (house.dispatcher.waiting() == (OTHER,)) is waits, late
        of_task = [each.seconds for each in house.dispatcher.outstanding(now) if each.task == TASK]
        assert of_task == [0.0], "nobody is paused for it"
    await house.calm()
    assert house.story(OTHER)[-1] == AttemptStarted(SECOND, CARD_2)


async def test_what_was_forgotten_is_not_started(house: House) -> None:
    house.dispatcher.want(want_of(), order_of(), NO_WORK)
    house.dispatcher.forget(TASK)
    house.dispatcher.forget(OTHER)
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.calls == []


async def test_the_pace_is_learnt(house: House) -> None:
    before = house.dispatcher.seconds_for(SOME_WORK)
    house.pool.outcomes = [DONE]  # one second
    ask(house, work=SOME_WORK)
    await house.calm()
    learnt = house.dispatcher.seconds_for(SOME_WORK)
    assert before < learnt < 1.0
    house.begin_term()
    assert house.dispatcher.seconds_for(SOME_WORK) == learnt, "the next coordinator knows it"


async def test_work_of_no_size_teaches_nothing(house: House) -> None:
    before = house.dispatcher.seconds_for(SOME_WORK)
    house.pool.outcomes = [DONE]
    ask(house, work=NO_WORK)
    await house.calm()
    assert house.dispatcher.seconds_for(SOME_WORK) == before
    assert house.kinds()[-1] == "ResultStored"


# --- coming and going -----------------------------------------------------------------------------


async def test_the_next_coordinator_follows_the_same_attempt(house: House) -> None:
    ask(house)
    await house.calm()
    await house.dispatcher.stop()
    house.begin_term()
    record = house.ledger.open[TASK]
    assert record.open_attempt is not None
    house.dispatcher.follow(
        CARD, order_of(attempt=record.open_attempt.attempt_id), want_of(), NO_WORK, NOW
    )
    await house.calm()
    assert house.pool.called("start") == [(CARD, FIRST), (CARD, FIRST)]
    house.pool.finish(FIRST, DONE)
    await house.calm()
    assert house.kinds().count("AttemptStarted") == 1
    assert house.kinds()[-1] == "ResultStored"


async def test_stopping_leaves_the_journal_and_the_cards_alone(house: House) -> None:
    ask(house)
    await house.calm()
    before = house.story()
    await house.dispatcher.stop()
    assert house.story() == before
    assert house.pool.called("cancel") == []
    assert house.failed == []
    assert not house.dispatcher.follows(FIRST)
    house.pool.finish(FIRST, DONE)
    await house.calm()
    assert house.story() == before


async def test_a_stop_that_is_cancelled_leaves_the_journal_alone(house: House) -> None:
    house.pool.outcomes = [DONE]
    gate = asyncio.Event()

    async def slow_put(task: Commitment, files: Sequence[tuple[str, bytes]]) -> tuple[FileRef, ...]:
        await gate.wait()
        return ()

    house.artifacts.put = slow_put  # type: ignore[method-assign]
    ask(house)
    await house.calm()
    before = house.story()
    stop = asyncio.create_task(house.dispatcher.stop())
    await asyncio.sleep(0)
    stop.cancel()
    await asyncio.gather(stop, return_exceptions=True)
    gate.set()
    await house.calm()
    assert house.story() == before
    assert house.failed == []


async def test_stopping_stops_every_follower_even_two_on_one_card(house: House) -> None:
    house.open(OTHER, *READY_EVENTS)
    house.ledger.append(TASK, AttemptStarted(FIRST, CARD))
    house.ledger.append(OTHER, AttemptStarted(SECOND, CARD))
    house.dispatcher.follow(CARD, order_of(TASK, "a1"), want_of(TASK), NO_WORK, NOW)
    house.dispatcher.follow(CARD, order_of(OTHER, "a2"), want_of(OTHER), NO_WORK, NOW)
    await house.calm()
    await house.dispatcher.stop()
    house.pool.finish(FIRST, DONE)
    house.pool.finish(SECOND, DONE)
    await house.calm()
    assert house.kinds()[-1] == house.kinds(OTHER)[-1] == "AttemptStarted"


async def test_one_card_never_runs_two_however_many_want_it(tmp_path: Path) -> None:
    house = House(tmp_path, (gpu_of(), gpu_of(CARD_2)))
    tasks = (TASK, OTHER, THIRD)
    for task in tasks:
        house.open(task, *READY_EVENTS)
        house.dispatcher.want(want_of(task), order_of(task), NO_WORK)
    busy: list[int] = []
    for _ in range(8):
        house.dispatcher.dispatch(NOW)
        await house.calm()
        running = [a for a, future in house.pool.attempts.items() if not future.done()]
        cards = [gpu for gpu, order in house.pool.orders if order.attempt_id in running]
        assert len(cards) == len(set(cards))
        busy.append(len(cards))
        if running:
            house.pool.finish(running[0], DONE)
            await house.calm()
    assert max(busy) == 2
    assert all(house.kinds(task)[-1] == "ResultStored" for task in tasks)
    assert all(not isinstance(e, Claimed) for task in tasks for e in house.story(task))
    assert house.ledger.of_account(ALICE) != ()


async def test_a_card_keeps_what_an_earlier_coordinator_started_on_it(house: House) -> None:
    ask(house)
    await house.calm()
    other = Commitment("0x" + "05" * 32)
    house.open(other, *READY_EVENTS)
    house.begin_term()
    house.dispatcher.want(want_of(other), order_of(other), NO_WORK)
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.called("start") == [(CARD, FIRST)]
    assert house.dispatcher.waiting() == (other,)


async def test_a_busy_card_reads_ahead_for_the_task_that_waits(house: House) -> None:
    other = replace(want_of(OTHER), pipeline="other pipe")
    house.open(OTHER, *READY_EVENTS)
    ask(house)
    house.dispatcher.want(other, order_of(OTHER), NO_WORK)
    for _ in range(3):
        house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.called("prefetch") == [(CARD, OTHER)]


async def test_nothing_is_read_ahead_for_what_will_be_warm(house: House) -> None:
    house.open(OTHER, *READY_EVENTS)
    ask(house)
    house.dispatcher.want(want_of(OTHER), order_of(OTHER), NO_WORK)
    house.dispatcher.dispatch(NOW)
    await house.calm()
    assert house.pool.called("prefetch") == []
