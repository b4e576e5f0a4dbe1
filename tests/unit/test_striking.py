"""Cards that fail again and again though they pass each canary, around the dispatcher, on fakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from actors import canary as canary_module
from actors import safeguards as safeguards_module
from actors.canary import CanarySettings
from actors.safeguards import SafeguardSettings
from cluster import quarantine_rows as rows
from cluster.core.errors import AttemptLost, DeviceFault, DeviceFaultKind
from cluster.core.lifecycle import Situation, Wait, decide
from cluster.core.matching import Want
from cluster.core.ports import Computed, Order
from cluster.core.record import AttemptFailed, Closed, Fault, Outcome, ParametersFetched
from cluster.core.strikes import MOMENT, Limit
from cluster.core.types import (
    AttemptId,
    Commitment,
    GigaBytes,
    GpuId,
    RayNodeId,
    Requirement,
    Timestamp,
    Wei,
    Work,
)
from cluster.inference.nvml import Vitals
from tests.unit.actor_fakes import KIND, START, facts_of, until
from tests.unit.test_safeguards import A, B, C, Ward, X, Y, card, report_of, uuid_of

BAD = DeviceFault(DeviceFaultKind.BAD_RESULT, "an image of one colour")
DIED = AttemptLost("its process is gone")
GOOD = Computed(X, (("0.png", b"x"),), 1.0)
OFF = SafeguardSettings(CanarySettings(0.0))
BY_STRIKES = b'crynux_quarantines_total{by="strikes"}'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_module, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(safeguards_module, "LOOK_SECONDS", 0.005)


def task_of(number: int) -> Commitment:
    return Commitment(f"0x{number:064x}")


async def try_on(
    house: Ward, gpu: GpuId, task: Commitment, outcome: Computed | Exception, step: int = 1
) -> None:
    """An attempt at the task on this card, which ends so, at that step."""
    began, house.pool.outcomes = len(house.pool.orders), []
    away = frozenset(each.gpu_id for each in house.pool.cards) - {gpu}
    requirement = Requirement(GigaBytes(1), "", GigaBytes(0))
    want = Want(task, requirement, "p", "b", None, 1.0, away)
    house.dispatcher.want(want, Order(AttemptId(""), task, 0, "{}", None), Work("sd", 0.0))
    house.dispatcher.dispatch(Timestamp(house.clock()))
    await until(lambda: len(house.pool.orders) > began)
    ((where, order),) = house.pool.orders[began:]
    assert where == gpu
    report = house.pool.reports[gpu]
    house.pool.reports[gpu] = replace(report, attempt=order.attempt_id, step=step, steps=20)
    house.pool.finish(order.attempt_id, outcome)
    await house.calm()
    house.pool.reports[gpu] = report


async def fail_once(house: Ward, gpu: GpuId, number: int, error: Exception = BAD) -> None:
    """The card fails on a task that is computed at the second try, by whatever card is free."""
    task = task_of(number)
    house.open(task, ParametersFetched("{}"))
    await try_on(house, gpu, task, error)
    await try_on(house, gpu, task, GOOD)
    house.safeguards.review()
    house.clock.now += MOMENT
    house.safeguards.review()


@pytest.mark.parametrize(
    "error",
    [
        BAD,
        DeviceFault(DeviceFaultKind.CONTEXT_LOST, "gone"),
        DeviceFault(DeviceFaultKind.STALLED, "no step"),
        DeviceFault(DeviceFaultKind.OTHER, "the driver's"),
    ],
)
async def test_a_card_that_fails_now_and_then_is_quarantined(
    tmp_path: Path, error: Exception
) -> None:
    house = Ward.of(tmp_path, A, settings=OFF)
    for number in (1, 2):
        await fail_once(house, A, number, error)
        assert house.quarantined() == set()
    house.begin_term()  # it isn't forgotten by a crash
    await fail_once(house, A, 3, error)
    assert house.quarantined() == {uuid_of(A)}
    (alert,) = house.safeguards.alerts()
    assert f"card {uuid_of(A)} (Card+docker) is in quarantine: it failed 3 times within 24" in alert
    assert BY_STRIKES + b" 1.0" in house.metrics.render()
    # Cleared, it begins with nothing against it, also after a restart.
    assert house.safeguards.clear(A) == "cleared"
    house.safeguards.review()
    house.begin_term()
    await fail_once(house, A, 4, error)
    assert house.quarantined() == set()


async def test_though_it_passes_every_canary(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        for number in (1, 2, 3):
            task = task_of(number)
            house.open(task, ParametersFetched("{}"))
            await try_on(house, A, task, BAD)
            await try_on(house, B, task, GOOD)
            if number < 3:
                await house.answer(A, X)
                assert house.free() == {A, B}
            house.clock.now += MOMENT
        await until(lambda: uuid_of(A) in house.pool.quarantined)
    assert house.quarantined() == {uuid_of(A)}


@pytest.mark.parametrize("limit", [Limit(0, 86_400.0), Limit(9, 86_400.0), Limit(3, 1.5 * MOMENT)])
async def test_how_many_and_within_how_long_is_the_operators_choice(
    tmp_path: Path, limit: Limit
) -> None:
    house = Ward.of(tmp_path, A, settings=replace(OFF, limit=limit))
    for number in range(5):
        await fail_once(house, A, number)
    assert house.quarantined() == set()
    house.safeguards.reconfigure(replace(OFF, limit=Limit(1, 86_400.0)))
    house.safeguards.review()
    assert house.quarantined() == {uuid_of(A)}


@pytest.mark.parametrize(
    "error",
    [
        DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "too small"),
        DeviceFault(DeviceFaultKind.NOT_TAKEN, "away"),
    ],
)
async def test_what_isnt_the_cards_own_strikes_nobody(tmp_path: Path, error: Exception) -> None:
    house = Ward.of(tmp_path, A, settings=OFF)
    for number in range(4):
        await fail_once(house, A, number, error)
    assert house.quarantined() == set()


async def test_tasks_that_nobody_can_compute_take_no_card_away(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, settings=OFF)
    for number in range(6):
        task = task_of(number)
        house.open(task, ParametersFetched("{}"))
        for _ in range(1 + number % 2):
            await try_on(house, A, task, BAD)
        house.ledger.append(task, Closed(Outcome.ABORTED, Wei(0)))
        house.safeguards.review()
        house.clock.now += MOMENT
    assert house.quarantined() == set()
    with house.journal.read() as connection:
        assert rows.faults(connection) == ()


async def test_a_card_that_still_read_as_it_stalled_is_not_struck(tmp_path: Path) -> None:
    """Where storage hangs, it does so for many cards at once."""
    house = Ward.of(tmp_path, A, settings=OFF)
    for number in range(4):
        task = task_of(number)
        house.open(task, ParametersFetched("{}"))
        await try_on(house, A, task, DeviceFault(DeviceFaultKind.STALLED, "no step"), step=0)
        await try_on(house, A, task, GOOD)
        house.safeguards.review()
        house.clock.now += MOMENT
    assert house.quarantined() == set()


async def test_a_stall_that_leaves_no_time_for_another_try_is_held_against_the_card(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, settings=OFF)
    for number in range(3):
        task = task_of(number)
        house.open(task, ParametersFetched("{}"))
        await try_on(house, A, task, DeviceFault(DeviceFaultKind.STALLED, "no step"))
        house.safeguards.review()
        assert house.quarantined() == set(), "it may yet be computed"
        house.ledger.append(task, Closed(Outcome.ABORTED, Wei(0)))
        house.safeguards.review()
        assert house.quarantined() == set(), "other cards may yet show the same"
        house.clock.now += MOMENT
    house.safeguards.review()
    assert house.quarantined() == {uuid_of(A)}


async def test_a_process_that_dies_is_held_against_its_card_once_another_answers(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, settings=replace(OFF, limit=Limit(1, 86_400.0)))
    await fail_once(house, A, 1, DIED)
    assert house.quarantined() == set(), "its machine may have gone"
    house.begin_term()
    house.safeguards.review()
    assert house.quarantined() == set()
    house.pool.reports[A] = report_of(A, "p2")
    house.safeguards.review()
    assert house.quarantined() == {uuid_of(A)}


async def test_a_machine_that_went_away_says_nothing_of_its_cards(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, settings=replace(OFF, limit=Limit(1, 86_400.0)))
    await fail_once(house, A, 1, DIED)
    cards, house.pool.cards = house.pool.cards, []
    house.safeguards.review()
    # It comes back as another machine of Ray's.
    house.pool.cards = [replace(cards[0], gpu_id=C)]
    house.pool.reports = {C: replace(report_of(C, "p2"), uuid=uuid_of(A))}
    house.safeguards.review()
    assert house.quarantined() == set()
    with house.journal.read() as connection:
        assert rows.faults(connection) == ()


async def test_a_task_that_was_closed_long_ago_still_says_whose_the_fault_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large fleet closes more tasks in the time than the ledger remembers."""
    house = Ward.of(tmp_path, A, settings=replace(OFF, limit=Limit(2, 86_400.0)))
    for number, incarnation in ((1, "p2"), (2, "p3")):
        task = task_of(number)
        house.open(task, ParametersFetched("{}"))
        await try_on(house, A, task, DIED)
        await try_on(house, A, task, GOOD)
        house.ledger.append(task, Closed(Outcome.SUCCESS, Wei(1)))
        house.ledger.closed.clear()
        if number == 2:
            house.begin_term()
            house.ledger.closed.clear()
        house.safeguards.review()
        house.pool.reports[A] = report_of(A, incarnation)
        house.clock.now += MOMENT
        house.safeguards.review()
    assert house.quarantined() == {uuid_of(A)}


async def test_a_process_that_its_machine_ended_for_want_of_memory_says_nothing_of_the_card(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, settings=replace(OFF, limit=Limit(1, 86_400.0)))
    await fail_once(house, A, 1, DIED)
    house.pool.reports[A] = report_of(A, "p2")
    house.pool.ended_for_memory[A] = "p1"
    house.safeguards.review()
    assert house.quarantined() == set()
    await fail_once(house, A, 2, DIED)  # of which nothing is known
    house.pool.reports[A] = report_of(A, "p3")
    house.safeguards.review()
    assert house.quarantined() == {uuid_of(A)}


@pytest.mark.parametrize(
    ("error", "seconds", "struck"),
    [
        (DIED, 0.9 * MOMENT, False),
        (DIED, MOMENT, True),
        (DeviceFault(DeviceFaultKind.STALLED, "no step"), 0.9 * MOMENT, False),
        (DeviceFault(DeviceFaultKind.CONTEXT_LOST, "gone"), 0.9 * MOMENT, False),
        (BAD, 0.9 * MOMENT, True),
    ],
)
async def test_what_ends_the_processes_of_several_cards_at_once_is_no_cards_own(
    tmp_path: Path, error: Exception, seconds: float, struck: bool
) -> None:
    """They share what ended them: storage, power, a driver that was begun anew."""
    house = Ward.of(tmp_path, A, B, settings=replace(OFF, limit=Limit(1, 86_400.0)))
    for number, gpu in enumerate((A, B)):
        task = task_of(number)
        house.open(task, ParametersFetched("{}"))
        await try_on(house, gpu, task, error)
        await try_on(house, gpu, task, GOOD)
        house.pool.reports[gpu] = report_of(gpu, "p2")
        house.safeguards.review()
        house.clock.now += seconds
    for _ in range(3):
        house.safeguards.review()
        house.clock.now += MOMENT
    assert house.quarantined() == ({uuid_of(A), uuid_of(B)} if struck else set())
    with house.journal.read() as connection:
        assert len(rows.faults(connection)) == (2 if struck else 0)


# --- memory errors --------------------------------------------------------------------------------


def counts(house: Ward, gpu: GpuId, errors: int | None) -> None:
    vitals = Vitals(ecc_uncorrected=errors)
    house.pool.reports[gpu] = replace(house.pool.reports[gpu], vitals=vitals)
    house.safeguards.review()


async def test_more_uncorrected_memory_errors_put_the_card_in_doubt(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    counts(house, A, 4)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        for same in (4, None, 4):
            counts(house, A, same)
            assert house.free() == {A, B}
        counts(house, A, 5)
        assert house.free() == {B}
        await house.answer(A, X)
        assert house.free() == {A, B}
    house.begin_term()
    counts(house, A, 5)
    assert house.free() == {A, B}, "it is known to the next coordinator"
    counts(house, A, 0)
    assert house.free() == {A, B}, "the driver began anew"
    counts(house, A, 1)
    assert house.free() == {B}


def test_and_are_strikes(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, settings=OFF)
    for errors in range(10):
        counts(house, A, errors)
    assert house.quarantined() == set(), "all at the same moment"
    for errors in (11, 12):
        house.clock.now += MOMENT
        counts(house, A, errors)
    assert house.quarantined() == {uuid_of(A)}
    (alert,) = house.safeguards.alerts()
    assert "uncorrected memory errors" in alert


# --- the canary itself ----------------------------------------------------------------------------


async def test_the_only_card_of_a_class_that_contradicts_itself_is_quarantined(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        for score in (X, Y, Y, X):
            await house.answer(A, score)
            assert house.free() == {A}
            house.clock.now += 3600
        await house.answer(A, Y)
        await until(lambda: uuid_of(A) in house.pool.quarantined)
    assert BY_STRIKES + b" 1.0" in house.metrics.render()


async def test_two_that_contradict_themselves_are_the_softwares_doing(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        house.suspect(A)
        await house.answer(A, Y)
        house.pool.cards.append(card(B))
        house.pool.reports[B] = report_of(B)
        await house.answer(B, X)
        await house.answer(B, Y)
        await house.answer(A, X)
        for score in (Y, X, Y, X):
            house.clock.now += MOMENT
            for gpu in (A, B):
                house.suspect(gpu)
                await house.answer(gpu, score)
        await house.settle()
    assert (house.quarantined(), house.free()) == (set(), {A, B})


async def test_a_canary_that_fails_over_and_over_is_one_strike(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A)
    async with house.watched():
        await house.answer(A, X)
        gone = DeviceFault(DeviceFaultKind.CONTEXT_LOST, "gone")
        for _ in range(2):
            house.clock.now += 3600
            for _ in range(4):
                await house.answer(A, gone)
                house.clock.now += canary_module.LONGEST_PAUSE
            await house.answer(A, X)
            assert (house.quarantined(), house.free()) == (set(), {A})
        house.clock.now += 3600
        await house.answer(A, gone)
        await until(lambda: uuid_of(A) in house.pool.quarantined)


# --- one task, several cards ----------------------------------------------------------------------


async def test_a_bad_result_that_two_cards_show_is_the_tasks(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, C)
    task = task_of(1)
    house.open(task, ParametersFetched("{}"))
    async with house.watched():
        for gpu in (A, B, C):
            await house.answer(gpu, X)
        await try_on(house, A, task, BAD)
        assert house.free() == {B, C}
        await house.answer(A, X)
        await try_on(house, B, task, BAD)
        await house.settle()
        assert (house.free(), house.asked()) == ({A, B, C}, {}), "the second isn't in doubt"
    last = house.story(task)[-1]
    assert isinstance(last, AttemptFailed)
    assert last.fault is Fault.UNSUPPORTED
    # No third card tries, and the network hears nothing of it.
    record = house.ledger.open[task]
    situation = Situation(facts_of(task), record, Timestamp(START), house.policy)
    action = decide(situation)
    assert isinstance(action, Wait)
    house.ledger.append(task, Closed(Outcome.ABORTED, Wei(0)))
    house.safeguards.review()
    with house.journal.read() as connection:
        assert rows.faults(connection) == ()


async def test_the_next_coordinator_knows_what_the_first_card_showed(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, settings=OFF)
    task = task_of(1)
    house.open(task, ParametersFetched("{}"))
    await try_on(house, A, task, BAD)
    house.begin_term()
    await try_on(house, B, task, BAD)
    last = house.story(task)[-1]
    assert isinstance(last, AttemptFailed)
    assert last.fault is Fault.UNSUPPORTED


@pytest.mark.parametrize("second", [BAD, DeviceFault(DeviceFaultKind.OTHER, "x"), DIED])
async def test_only_the_same_bad_result_of_another_card_speaks_against_a_task(
    tmp_path: Path, second: Exception
) -> None:
    """The same card again is the same card; and what is known of one UUID is of one card."""
    house = Ward.of(tmp_path, A, B, settings=OFF)
    task = task_of(1)
    house.open(task, ParametersFetched("{}"))
    await try_on(house, A, task, BAD)
    await try_on(house, A if second is BAD else B, task, second)
    last = house.story(task)[-1]
    assert isinstance(last, AttemptFailed)
    assert last.fault in {Fault.DEVICE, Fault.LOST}


async def test_another_tasks_bad_result_is_another_matter(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, settings=OFF)
    for gpu, task in ((A, task_of(1)), (B, task_of(2))):
        house.open(task, ParametersFetched("{}"))
        await try_on(house, gpu, task, BAD)
        last = house.story(task)[-1]
        assert isinstance(last, AttemptFailed)
        assert last.fault is Fault.DEVICE


# --- a record that is wrong -----------------------------------------------------------------------


def apart(house: Ward) -> None:
    """Each card on a machine of its own."""
    house.pool.cards = [
        replace(each, ray_node=RayNodeId(f"m-{each.gpu_id}")) for each in house.pool.cards
    ]


async def wrongly_recorded(house: Ward) -> None:
    """A and B agree on a wrong answer; C, which is right, differs."""
    apart(house)
    for gpu, score in ((A, Y), (B, Y), (C, X)):
        await house.answer(gpu, score)
    assert house.quarantined() == {uuid_of(C)}


D = GpuId("node-3")


async def test_who_differed_first_is_asked_again_once_the_record_is_in_doubt(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, B, C, D)
    async with house.watched():
        await wrongly_recorded(house)
        await house.answer(D, X)
        assert house.quarantined() == set()
        assert C not in house.free()
        # It isn't forgotten by a crash that it has to answer.
    house.begin_term()
    assert house.free() == {A, B, D}
    async with house.watched():
        await house.settle()
        await house.answer(C, X)
        assert (house.quarantined(), house.free()) == (set(), {A, B, C, D})
        (alert,) = house.safeguards.alerts()
        assert "gpus forget-canary" in alert


async def test_who_differed_from_what_is_forgotten_is_asked_with_the_others(
    tmp_path: Path,
) -> None:
    house = Ward.of(tmp_path, A, B, C)
    async with house.watched():
        await wrongly_recorded(house)
        assert house.safeguards.forget_canary("another class") == ()
        assert house.quarantined() == {uuid_of(C)}
        assert house.safeguards.forget_canary(KIND.name) == (KIND.name,)
        assert (house.quarantined(), house.free()) == (set(), set())
        for gpu in (A, B, C):
            await house.answer(gpu, X)
        assert (house.quarantined(), house.free()) == (set(), {A, B, C})


async def test_who_is_in_quarantine_for_more_than_that_stays(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B, C, D)
    async with house.watched():
        await wrongly_recorded(house)
        house.safeguards._health.quarantine({uuid_of(C)}, KIND, "it cost a stake", "slash")
        # Not counted twice: it came there once.
        assert b'crynux_quarantines_total{by="slash"} 0.0' in house.metrics.render()
        await house.answer(D, X)
        house.safeguards.forget_canary(None)
    assert house.pool.quarantined >= {uuid_of(C)}
    house.begin_term()
    (alert,) = (each for each in house.safeguards.alerts() if uuid_of(C) in each)
    assert "it cost a stake" in alert


async def test_who_contradicted_himself_stays_too(tmp_path: Path) -> None:
    house = Ward.of(tmp_path, A, B)
    async with house.watched():
        await house.answer(A, X)
        await house.answer(B, X)
        house.suspect(B)
        await house.answer(B, Y)
        assert house.quarantined() == {uuid_of(B)}
        house.safeguards.forget_canary(None)
    assert house.quarantined() == {uuid_of(B)}
