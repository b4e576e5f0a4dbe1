"""Canaries and quarantine around the dispatcher, on fakes: who is asked when, and what follows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from actors import canary as module
from actors.canary import CanarySettings
from actors.inference import Health, Report
from actors.safeguards import SafeguardSettings
from cluster import quarantine_rows as rows
from cluster.core.errors import (
    AttemptLost,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    LeaseLost,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskUnsupported,
)
from cluster.core.matching import Want
from cluster.core.ports import Computed, Order
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Closed,
    Fault,
    Outcome,
    ParametersFetched,
    ResultStored,
)
from cluster.core.types import (
    AttemptId,
    CardUuid,
    GigaBytes,
    Gpu,
    GpuId,
    GpuState,
    RayNodeId,
    Requirement,
    Score,
    Timestamp,
    Wei,
    Work,
)
from cluster.inference import canary
from tests.unit.actor_fakes import ALICE, KIND, START, TASK, gpu_of, until
from tests.unit.actor_house import House

X, Y = Score(b"x" * 8), Score(b"y" * 8)
A, B, C = GpuId("node-0"), GpuId("node-1"), GpuId("node-2")
MODEL = "acme/tiny"
HOUR = SafeguardSettings(CanarySettings(3600.0))


def uuid_of(gpu_id: GpuId) -> CardUuid:
    return CardUuid(f"GPU-{gpu_id}")


def card(gpu_id: GpuId) -> Gpu:
    return replace(gpu_of(gpu_id), uuid=uuid_of(gpu_id), on_disk=frozenset({MODEL}))


def report_of(
    gpu_id: GpuId,
    incarnation: str = "p1",
    smallest: str | None = MODEL,
    more: tuple[canary.Candidate, ...] = (),
) -> Report:
    return Report(
        release="1",
        pid=1,
        health=Health.READY,
        gpu_class=KIND,
        problem="",
        attempt=None,
        task=None,
        step=0,
        steps=0,
        finished=0,
        warm=frozenset(),
        in_host_memory=frozenset(),
        on_disk=frozenset({MODEL}),
        uuid=uuid_of(gpu_id),
        incarnation=incarnation,
        software="torch=1",
        candidates=() if smallest is None else (canary.Candidate(smallest), *more),
    )


class Ward(House):
    """A house with cards that can be asked; `ask` waits until they are, and answers for them."""

    @classmethod
    def of(cls, path: Path, *cards: GpuId, settings: SafeguardSettings = HOUR) -> Ward:
        house = cls(path, tuple(map(card, cards)), settings=settings)
        house.pool.reports = {gpu_id: report_of(gpu_id) for gpu_id in cards}
        return house

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """The loop runs; it must end well."""
        running = asyncio.create_task(self.safeguards.run())
        try:
            yield
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def asked(self) -> dict[GpuId, Order]:
        """The canaries that wait for an answer."""
        return {
            gpu: order
            for gpu, order in self.pool.orders
            if order.task == canary.TASK and not self.pool.attempts[order.attempt_id].done()
        }

    async def settle(self) -> None:
        """Let the loop look at everything once more."""
        self.safeguards.wake()
        await self.calm()

    async def answer(self, gpu: GpuId, outcome: Score | Exception) -> None:
        await until(lambda: gpu in self.asked())
        done = outcome if isinstance(outcome, Exception) else Computed(outcome, (), 1.0)
        self.pool.finish(self.asked()[gpu].attempt_id, done)
        await self.settle()

    def suspect(self, gpu: GpuId) -> None:
        """Something failed on the card."""
        self.safeguards._suspect(uuid_of(gpu))

    def states(self) -> dict[GpuId, GpuState]:
        return {gpu.gpu_id: gpu.state for gpu in self.pool.gpus()}

    def quarantined(self) -> set[CardUuid]:
        with self.journal.read() as connection:
            stored = {each.uuid for each in rows.standing(connection)}
        assert stored == self.pool.quarantined
        return stored

    def free(self) -> set[GpuId]:
        return {gpu.gpu_id for gpu in self.pool.gpus() if self.safeguards.free(gpu)}

    async def want(self, avoid: frozenset[GpuId] = frozenset(), min_vram: int = 1) -> None:
        requirement = Requirement(GigaBytes(min_vram), "", GigaBytes(0))
        want = Want(TASK, requirement, "p", "b", None, 1.0, avoid)
        self.dispatcher.want(want, Order(AttemptId(""), TASK, 0, "{}", None), Work("sd", 0.0))
        self.dispatcher.dispatch(Timestamp(self.clock()))
        await self.calm()

    def placed(self) -> list[GpuId]:
        """Where the task's attempts were started."""
        return [gpu for gpu, order in self.pool.orders if order.task == TASK]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.005)


# --- when a card is asked -------------------------------------------------------------------------


async def test_a_new_process_is_asked_before_it_gets_a_task(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    await house.want()
    assert house.placed() == []
    async with house.watched():
        await until(lambda: A in house.asked())
        order = house.asked()[A]
        assert order.parameters == canary.parameters(MODEL)
        assert (order.task_type, order.deadline) == (0, START + module.ANSWER_SECONDS)
        await house.want()
        assert house.placed() == []
        await house.answer(A, X)
        assert house.placed() == [A]
        assert len(house.pool.orders) == 2
    assert b'crynux_canaries_total{result="provisional"} 1.0' in house.metrics.render()


async def test_a_process_is_asked_once_whoever_coordinates(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
    house.begin_term()
    async with house.watched():
        await house.settle()
        assert (house.asked(), house.free()) == ({}, {A})
        house.pool.reports[A] = report_of(A, "p2")
        assert house.free() == set()
        await house.answer(A, X)
        assert house.free() == {A}


async def test_a_schedule_asks_an_idle_card_when_no_task_waits(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        house.clock.now += 3599
        await house.settle()
        assert house.asked() == {}
        house.clock.now += 1
        house.open(TASK, ParametersFetched("{}"))
        await house.want(avoid=frozenset({A, B}))  # runs on one of them all the same
        (busy,) = house.placed()
        await until(lambda: len(house.asked()) == 1)
        (asked,) = house.asked()
        assert asked != busy
        # Until it has answered, the card isn't a task's.
        assert asked not in house.free()
        await house.answer(asked, X)
        assert asked in house.free()


async def test_a_task_that_waits_comes_before_the_schedule(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        house.clock.now += 3600
        house.open(TASK, ParametersFetched("{}"))
        await house.want(min_vram=99)
        await house.settle()
        assert house.asked() == {}
        house.dispatcher.forget(TASK)
        await until(lambda: set(house.asked()) == {A})


async def test_an_overdue_canary_waits_for_no_task(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        house.open(TASK, ParametersFetched("{}"))
        await house.want(min_vram=99)  # it waits for ever
        house.clock.now += 4 * 3600 - 1
        await house.settle()
        assert house.asked() == {}
        house.clock.now += 1
        await house.settle()
        # One after the other: the rest go on with tasks.
        assert (set(house.asked()), house.free()) == ({A}, {B})
        await house.answer(A, X)
        await until(lambda: set(house.asked()) == {B})
        assert house.free() == {A}
        await house.answer(B, X)
        assert (house.asked(), house.free()) == ({}, {A, B})


async def test_a_card_that_is_never_idle_gets_its_overdue_canary_next(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        house.open(TASK, ParametersFetched("{}"))
        await house.want()
        assert house.placed() == [A]
        house.clock.now += 4 * 3600
        await house.settle()
        assert house.asked() == {}
        assert house.free() == set(), "the next on it is no task"


async def test_a_schedule_asks_few_cards_at_once(tmp_path: Path) -> None:
    cards = [GpuId(f"node-{number}") for number in range(20)]
    house = Ward.of(tmp_path, *cards)
    async with house.watched():
        for each in cards:
            await house.answer(each, X)
        house.clock.now += 3600
        await until(lambda: len(house.asked()) == 2)
        await house.settle()
        first = set(house.asked())
        assert len(first) == 2
        for each in first:
            await house.answer(each, X)
        await until(lambda: len(house.asked()) == 2)
        assert not first & set(house.asked())


@pytest.mark.parametrize("kind", list(DeviceFaultKind))
async def test_after_a_device_fault_the_card_is_asked(
    tmp_path: Path, kind: DeviceFaultKind
) -> None:
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.answer(A, X)
        house.pool.outcomes = [DeviceFault(kind, "x")]
        await house.want()
        await until(lambda: isinstance(house.story()[-1], AttemptFailed))
        assert house.free() == set()
        await until(lambda: A in house.asked())
    # It isn't forgotten by a crash.
    house.begin_term()
    assert house.free() == set()
    async with house.watched():
        await until(lambda: len([o for _, o in house.pool.orders if o.task == canary.TASK]) == 3)


async def test_a_process_that_died_is_followed_by_none_that_wasnt_asked(tmp_path: Path) -> None:
    """The pool's report is still the former process's: nothing but the loss tells of it."""
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.answer(A, X)
        house.pool.outcomes = [AttemptLost("its process is gone")]
        await house.want()
        await until(lambda: isinstance(house.story()[-1], AttemptFailed))
        assert house.free() == set()
        await until(lambda: A in house.asked())
        await house.want()
        assert house.placed() == [A]
        await house.answer(A, X)
        assert house.free() == {A}


async def test_a_process_that_we_ended_is_no_worse_for_it(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.answer(A, X)
        await house.want()
        (attempt,) = [order.attempt_id for _, order in house.pool.orders if order.task == TASK]
        await house.dispatcher.cancel(A, TASK, attempt)
        house.pool.finish(attempt, AttemptLost("it didn't heed"))
        await house.settle()
        assert (house.asked(), house.free()) == ({}, {A})


async def test_a_card_in_doubt_answers_with_nothing_from_before(tmp_path: Path) -> None:
    """Not so by schedule, which is to find what has gone bad in what tasks are computed with."""
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        house.suspect(A)
        await until(lambda: A in house.asked())
        assert house.asked()[A].afresh
        await house.answer(A, X)
        house.clock.now += 3600
        await until(lambda: A in house.asked())
        assert not house.asked()[A].afresh


async def test_what_isnt_the_devices_fault_asks_nobody(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.answer(A, X)
        for error in (TaskUnsupported("x"), ModelUnavailable(ModelUnavailableKind.NOT_HERE, "x")):
            house.pool.outcomes = [error]
            await house.want()
            await house.settle()
            assert (house.asked(), house.free()) == ({}, {A})


async def test_canaries_can_be_turned_off(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, settings=SafeguardSettings(CanarySettings(0.0)))
    async with house.watched():
        await house.settle()
    assert (house.pool.orders, house.free()) == ([], {A})


async def test_a_card_with_an_attempt_that_nobody_follows_yet_is_left_alone(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A)
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.answer(A, X)
    await house.want()
    assert house.placed() == [A]
    await house.dispatcher.stop()
    house.begin_term()
    house.pool.reports[A] = report_of(A, "p2")
    async with house.watched():
        await house.settle()
        assert house.asked() == {}


# --- which question -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smallest", "model"), [(None, None), (MODEL, "acme/elsewhere"), ("acme/moved", None)]
)
async def test_without_the_model_there_is_no_canary_and_no_fault(
    tmp_path: Path, smallest: str | None, model: str | None
) -> None:
    house = Ward.of(tmp_path, A, settings=SafeguardSettings(CanarySettings(3600.0, model)))
    house.pool.reports[A] = report_of(A, smallest=smallest)
    with capture_logs() as logs:
        async with house.watched():
            for _ in range(3):
                await house.settle()
    assert (house.asked(), house.free()) == ({}, {A})
    assert house.safeguards.alerts() == ()
    assert [entry["event"] for entry in logs].count("no_model_for_a_canary") == 1


async def test_the_cards_of_a_class_get_the_same_question(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, C)
    both = frozenset({MODEL, "acme/tinier"})
    house.pool.cards = [replace(card(each), on_disk=both) for each in (A, B, C)]
    house.pool.reports[C] = report_of(C, smallest="acme/tinier", more=(canary.Candidate(MODEL),))
    async with house.watched():
        await until(lambda: len(house.asked()) == 3)
        asked = {order.parameters for order in house.asked().values()}
    assert asked == {canary.parameters(MODEL)}


async def test_a_model_that_came_with_a_task_can_keep_no_card_from_its_work(tmp_path: Path) -> None:
    """Its author may have made it so that nobody can compute with it."""
    blank = DeviceFault(DeviceFaultKind.BAD_RESULT, "an image of one colour")
    for own, free in ((False, {A}), (True, set())):
        house = Ward.of(tmp_path / str(own), A)
        report = house.pool.reports[A]
        house.pool.reports[A] = replace(report, candidates=(canary.Candidate(MODEL, own=own),))
        async with house.watched():
            await house.answer(A, blank)
            await house.settle()
            assert house.free() == free
            assert bool(house.safeguards.alerts()) is own


async def test_a_new_question_keeps_no_card_from_its_work_that_has_answered_the_last(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        # A's machine has fetched what its owner has put in the model's place.
        report = house.pool.reports[A]
        house.pool.reports[A] = replace(report, candidates=(canary.Candidate(MODEL, "another"),))
        assert house.free() == {A, B}
        await house.settle()
        # What it answers to that is compared with nobody's, and once it was in doubt it waits.
        await house.answer(A, Y)
        await house.settle()
        assert house.quarantined() == set()
        assert house.free() == {A, B}
        house.suspect(A)
        assert house.free() == {B}


async def test_a_card_without_the_common_model_gets_its_own(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, C)
    house.pool.cards[2] = replace(card(C), on_disk=frozenset({"acme/other"}))
    house.pool.reports[C] = report_of(C, smallest="acme/other")
    async with house.watched():
        await until(lambda: len(house.asked()) == 3)
        assert house.asked()[C].parameters == canary.parameters("acme/other")
        # Its answer is compared with nobody else's.
        await house.answer(C, Y)
        await house.answer(A, X)
        await house.answer(B, X)
    assert house.quarantined() == set()


# --- what an answer leads to ----------------------------------------------------------------------


async def test_who_differs_from_the_record_gets_nothing_until_he_is_cleared(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        house.pool.reports[B] = report_of(B, "p2")
        await house.answer(B, Y)
        assert house.quarantined() == {uuid_of(B)}
        assert house.states() == {A: GpuState.READY, B: GpuState.QUARANTINED}
        (alert,) = house.safeguards.alerts()
        assert f"card {uuid_of(B)} (Card+docker) is in quarantine" in alert
        assert b'crynux_quarantines_total{by="canary"} 1.0' in house.metrics.render()
    # It outlives the coordinator, and the card's process.
    house.begin_term()
    house.pool.reports[B] = report_of(B, "p3")
    assert house.states()[B] is GpuState.QUARANTINED
    house.open(TASK, ParametersFetched("{}"))
    async with house.watched():
        await house.settle()
        assert house.asked() == {}
        await house.want(avoid=frozenset({A}))
        assert house.placed() == [A], "avoided or not: nothing else is left"
        assert house.safeguards.clear(B) == "cleared"
        assert house.states()[B] is GpuState.READY
        assert house.free() == {A}, "cleared, it has to answer first"
        await house.answer(B, X)
        assert B in house.free()
        assert house.safeguards.alerts() == ()


async def test_a_cleared_card_that_still_differs_goes_back(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, C)
    async with house.watched():
        for each, score in ((A, X), (B, X), (C, Y)):
            await house.answer(each, score)
        assert house.quarantined() == {uuid_of(C)}
        house.safeguards.clear(C)
        await house.answer(C, Y)
        assert house.quarantined() == {uuid_of(C)}


async def test_a_wrong_record_quarantines_no_class_and_can_be_taken_back(tmp_path: Path) -> None:
    """Two cards of one machine with a spoilt file were the first to agree."""
    good = [GpuId(f"good-{number}") for number in range(4)]
    house = Ward.of(tmp_path, A, B, *good)
    for place, each in enumerate(good, 2):
        house.pool.cards[place] = replace(card(each), ray_node=RayNodeId(f"m-{each}"))
    async with house.watched():
        await house.answer(A, Y)
        await house.answer(B, Y)
        for each in good:
            await house.answer(each, X)
        # The first of them was, before anybody agreed with it.
        assert house.quarantined() == set()
        await house.answer(good[0], X)
        assert house.quarantined() == set()
        assert house.free() == {A, B, *good}
        (alert,) = house.safeguards.alerts()
        assert all(uuid_of(each) in alert for each in good)
        assert f"gpus forget-canary '{KIND.name}'" in alert
    house.begin_term()
    async with house.watched():
        await house.settle()
        assert len(house.safeguards.alerts()) == 1
        assert house.safeguards.forget_canary(KIND.name) == (KIND.name,)
        assert (house.free(), house.safeguards.alerts()) == (set(), ())
        for each in good:
            await house.answer(each, X)
        # The spoilt file is mended on one, on the other it isn't.
        await house.answer(A, X)
        await house.answer(B, Y)
        assert house.quarantined() == {uuid_of(B)}
        assert house.safeguards.forget_canary(None) == (KIND.name,)
        assert house.safeguards.forget_canary("nothing") == ()


def test_clearing_is_idempotent_and_knows_cards_by_either_name(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    gone = CardUuid("GPU-gone")
    house.safeguards._health.quarantine([uuid_of(A), gone], KIND, "a reason", "canary")
    assert house.quarantined() == {uuid_of(A), gone}
    assert house.safeguards.clear(str(A)) == "cleared"
    assert house.safeguards.clear(str(A)) == "free"
    assert house.safeguards.clear(str(uuid_of(A))) == "free"
    assert house.safeguards.clear(str(B)) == "free"
    assert house.safeguards.clear("GPU-gone") == "cleared"
    assert house.safeguards.clear("GPU-gone") == "free"
    assert house.safeguards.clear("GPU-never") == "unknown"
    assert house.quarantined() == set()


async def test_two_that_differ_are_asked_again_and_then_both_work_on(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        assert house.free() == {A}
        with capture_logs() as logs:
            await house.answer(B, Y)
            assert house.free() == set(), "neither may be trusted more"
            await house.answer(A, X)
            await house.answer(B, Y)
            await house.settle()
        assert (house.quarantined(), house.free(), house.asked()) == (set(), {A, B}, {})
        assert [each["event"] for each in logs].count("canaries_differ") == 1
        (alert,) = house.safeguards.alerts()
        assert uuid_of(A) in alert
        assert uuid_of(B) in alert
    house.begin_term()
    async with house.watched():
        await house.settle()
        assert len(house.safeguards.alerts()) == 1
        # A third card comes, and decides.
        house.pool.cards.append(card(C))
        house.pool.reports[C] = report_of(C)
        await house.answer(C, Y)
        assert house.quarantined() == {uuid_of(A)}
        (alert,) = house.safeguards.alerts()
        assert "is in quarantine" in alert


async def test_a_dispute_goes_on_after_a_crash(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, Y)
    house.begin_term()
    async with house.watched():
        await until(lambda: set(house.asked()) >= {A, B})


# --- a card that fails on it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        DeviceFault(DeviceFaultKind.CONTEXT_LOST, "gone"),
        DeviceFault(DeviceFaultKind.BAD_RESULT, "black"),
        DeviceFault(DeviceFaultKind.MEMORY_CHANGED, "x/unet no longer holds what was read"),
        AttemptLost("its process died"),
        ClusterError("something else"),
    ],
)
async def test_a_card_that_fails_on_it_gets_no_task_and_is_asked_later(
    tmp_path: Path, error: Exception
) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, error)
        assert (house.free(), house.asked()) == (set(), {})
        (alert,) = house.safeguards.alerts()
        assert str(error) in alert
        house.clock.now += module.FIRST_PAUSE
        await house.answer(A, error)
        house.clock.now += module.FIRST_PAUSE
        await house.settle()
        assert house.asked() == {}, "twice as long"
        house.clock.now += module.FIRST_PAUSE
        await house.answer(A, X)
        assert (house.free(), house.safeguards.alerts()) == ({A}, ())


async def test_memory_that_fails_is_the_cards_fault_whoevers_the_canarys_model_is(
    tmp_path: Path,
) -> None:
    """A scheduled canary finds it, and the card has to answer before its next task."""
    house = Ward.of(tmp_path, A)
    brought_by_a_task(house, A)
    async with house.watched():
        await house.answer(A, X)
        house.clock.now += 3600
        await house.answer(A, DeviceFault(DeviceFaultKind.MEMORY_CHANGED, "x/unet changed"))
        assert house.free() == set()
        assert "x/unet changed" in house.safeguards.alerts()[0]
        house.clock.now += module.FIRST_PAUSE
        await until(lambda: A in house.asked())
        assert house.asked()[A].afresh
        await house.answer(A, X)
        assert (house.free(), house.safeguards.alerts()) == ({A}, ())


UNREACHABLE = ModelUnavailable(ModelUnavailableKind.UNREACHABLE, "its source is away")
TOO_SMALL = DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "too small")


def brought_by_a_task(house: Ward, gpu_id: GpuId) -> None:
    """The model that the card is asked with is none of the operator's."""
    report = house.pool.reports[gpu_id]
    found = (canary.Candidate(MODEL, own=False),)
    house.pool.reports[gpu_id] = replace(report, candidates=found)


@pytest.mark.parametrize("where", ["start", "result"])
async def test_a_card_that_cant_be_asked_is_left_as_it_is(tmp_path: Path, where: str) -> None:
    house = Ward.of(tmp_path, A, B, C)
    for each in (A, B):
        brought_by_a_task(house, each)
    house.pool.faults[where] = [UNREACHABLE, TOO_SMALL, TaskUnsupported("no")]
    async with house.watched():
        await until(lambda: house.free() == {A, B, C})
        for _ in range(3):
            await house.settle()
        assert len(house.pool.called("start")) == 3
        (alert,) = house.safeguards.alerts()
        assert f"GPU {C} works on without a canary" in alert


@pytest.mark.parametrize("error", [UNREACHABLE, TOO_SMALL])
async def test_trouble_with_the_operators_own_model_makes_no_card_a_trusted_one(
    tmp_path: Path, error: ClusterError
) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, error)
        assert (house.free(), house.asked()) == (set(), {})
        (alert,) = house.safeguards.alerts()
        assert f"{MODEL}: {error}" in alert
        house.clock.now += module.FIRST_PAUSE
        await house.answer(A, X)
        assert (house.free(), house.safeguards.alerts()) == ({A}, ())
        # No doubt has come since, so it works on, with an alert.
        house.clock.now += 3600
        await house.answer(A, error)
        assert house.free() == {A}
        assert len(house.safeguards.alerts()) == 1
        house.suspect(A)
        assert house.free() == set()
        house.clock.now += module.FIRST_PAUSE
        await house.answer(A, X)
        assert (house.free(), house.safeguards.alerts()) == ({A}, ())


async def test_what_couldnt_be_asked_once_is_asked_again_after_a_while(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    brought_by_a_task(house, A)
    async with house.watched():
        for pause in (module.FIRST_PAUSE, 2 * module.FIRST_PAUSE):
            await house.answer(A, UNREACHABLE)
            house.clock.now += pause - 1
            await house.settle()
            assert (house.free(), house.asked()) == ({A}, {})
            house.clock.now += 1
        await house.answer(A, X)
        assert len(house.pool.called("start")) == 3


@pytest.mark.parametrize("error", [UNREACHABLE, TaskUnsupported("no")])
async def test_what_couldnt_be_asked_once_is_asked_when_the_card_is_in_doubt(
    tmp_path: Path, error: ClusterError
) -> None:
    house = Ward.of(tmp_path, A)
    brought_by_a_task(house, A)
    async with house.watched():
        await house.answer(A, error)
        assert house.free() == {A}
        house.suspect(A)
        assert house.free() == set()
        await house.answer(A, X)
        assert house.free() == {A}


@pytest.mark.parametrize("configured", [None, MODEL])
async def test_a_card_in_doubt_whose_model_isnt_on_its_disk_gets_nothing(
    tmp_path: Path, configured: str | None
) -> None:
    settings = SafeguardSettings(CanarySettings(3600.0, configured))
    house = Ward.of(tmp_path, A, B, settings=settings)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        house.pool.cards[0] = replace(card(A), on_disk=frozenset())
        house.pool.reports[A] = report_of(A, smallest=None)
        await house.settle()
        assert house.free() == {A, B}, "nothing is held against it"
        house.suspect(A)
        await house.settle()
        assert house.free() == {B}
        (alert,) = house.safeguards.alerts()
        assert f"GPU {A} gets no task: something failed on it, and {MODEL}" in alert
        # It isn't forgotten by a crash.
    house.begin_term()
    assert house.free() == {B}
    house.pool.cards[0], house.pool.reports[A] = card(A), report_of(A)
    async with house.watched():
        await house.answer(A, X)
        assert (house.free(), house.safeguards.alerts()) == ({A, B}, ())


async def test_a_scheduled_canary_that_fails_keeps_tasks_away(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        house.clock.now += 3600
        await house.answer(A, AttemptLost("its process died"))
        assert house.free() == set()


async def test_one_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await until(lambda: len(house.pool.called("cancel")) == 1)
        await until(lambda: len(house.safeguards.alerts()) == 1)
        assert house.free() == set()


async def test_a_lost_lease_ends_it_and_nothing_is_stored(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    running = asyncio.create_task(house.safeguards.run())
    await until(lambda: A in house.asked())
    assert house.journal.acquire("another", Timestamp(START + 100), 15.0) is not None
    house.pool.finish(house.asked()[A].attempt_id, Computed(X, (), 1.0))
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(running, 5)
    assert caught.value.subgroup(LeaseLost) is not None
    with house.journal.read() as connection:
        assert connection.execute(select(rows.answers_table)).all() == []


# --- a result of a card in quarantine -------------------------------------------------------------


async def test_a_result_of_a_card_that_came_into_quarantine_meanwhile_is_none(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, settings=SafeguardSettings(CanarySettings(0.0)))
    house.open(TASK, ParametersFetched("{}"))
    await house.want()
    house.safeguards._health.quarantine([uuid_of(A)], KIND, "a reason", "canary")
    (attempt,) = house.pool.attempts
    house.pool.finish(attempt, Computed(X, (("0.png", b"x"),), 1.0))
    await house.calm()
    last = house.story()[-1]
    assert isinstance(last, AttemptFailed)
    assert last.fault is Fault.DEVICE
    assert not any(isinstance(event, ResultStored) for event in house.story())


# --- a result that cost a stake -------------------------------------------------------------------


async def test_the_card_whose_result_cost_a_stake_computes_for_nobody(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, settings=SafeguardSettings(CanarySettings(0.0)))
    house.open(TASK, ParametersFetched("{}"))
    await house.want()
    (attempt,) = house.pool.attempts
    house.pool.finish(attempt, Computed(X, (("0.png", b"x"),), 1.0))
    await house.calm()
    (started,) = (each for each in house.story() if isinstance(each, AttemptStarted))
    house.ledger.append(TASK, Closed(Outcome.INVALIDATED, Wei(0)))
    # The card is away just then, and comes back by another's name.
    first, second = house.pool.cards
    house.pool.cards = []
    house.safeguards.blame()
    assert house.pool.quarantined == {uuid_of(started.gpu_id)}
    house.begin_term()
    house.pool.cards = [replace(first, uuid=second.uuid), replace(second, uuid=first.uuid)]
    house.safeguards.wake()
    assert house.pool.quarantined == {uuid_of(started.gpu_id)}
    (line,) = house.safeguards.alerts()
    assert b'crynux_quarantines_total{by="slash"} 1.0' in house.metrics.render()
    assert f"its result of task {TASK} cost {ALICE} its stake" in line
    assert line.endswith(f"crynux-cluster gpus clear {uuid_of(started.gpu_id)}")
    # An operator has seen to the card, though not to the account yet.
    assert house.safeguards.clear(uuid_of(started.gpu_id)) == "cleared"
    house.safeguards.wake()
    house.begin_term()
    house.safeguards.wake()
    assert house.safeguards.alerts() == ()
    assert house.pool.quarantined == frozenset()


def test_where_no_card_was_written_down_none_is_blamed_and_that_is_said(tmp_path: Path) -> None:
    """Stored by an older version: what was called so then may be any card now."""
    house = Ward.of(tmp_path, A, B, settings=SafeguardSettings(CanarySettings(0.0)))
    stored = ResultStored(AttemptId("a1"), X, ())
    house.open(TASK, ParametersFetched("{}"), AttemptStarted(AttemptId("a1"), A), stored)
    house.ledger.append(TASK, Closed(Outcome.INVALIDATED, Wei(0)))
    house.safeguards.wake()
    house.begin_term()
    house.safeguards.wake()
    assert house.pool.quarantined == frozenset()
    (line,) = house.safeguards.alerts()
    assert line.startswith(f"task {TASK} cost account {ALICE} its stake")
    house.ledger.clear_slashed(ALICE)
    assert house.safeguards.alerts() == ()
