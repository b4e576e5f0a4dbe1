"""A second opinion before a result is stored, around the dispatcher, on fakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from actors.canary import CanarySettings
from actors.inference import Health, Report
from actors.safeguards import SafeguardSettings
from cluster import quarantine_rows as rows
from cluster.core import verification
from cluster.core.errors import (
    AttemptLost,
    DeviceFault,
    DeviceFaultKind,
    LeaseLost,
    TaskInvalid,
)
from cluster.core.matching import Want
from cluster.core.ports import Computed, Order
from cluster.core.record import AttemptFailed, Fault, ParametersFetched, ResultStored
from cluster.core.types import (
    AttemptId,
    CardUuid,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    Requirement,
    Score,
    Timestamp,
    Work,
)
from cluster.core.verification import MARGIN_SECONDS
from cluster.inference.canary import Candidate
from tests.unit.actor_fakes import KIND, START, TASK, gpu_of, until
from tests.unit.actor_house import House

X, Y, Z = Score(b"x" * 8), Score(b"y" * 8), Score(b"z" * 8)
A, B, C = GpuId("node-0"), GpuId("node-1"), GpuId("node-2")
ALWAYS = SafeguardSettings(CanarySettings(0.0), fraction=1.0)
NEVER = SafeguardSettings(CanarySettings(0.0), fraction=0.0)
SECONDS = 10.0


def uuid_of(gpu_id: GpuId) -> CardUuid:
    return CardUuid(f"GPU-{gpu_id}")


def computed(score: Score) -> Computed:
    return Computed(score, (("0.png", bytes(score)),), SECONDS)


def card(gpu_id: GpuId, kind: GpuClass = KIND) -> Gpu:
    return replace(gpu_of(gpu_id, kind=kind), uuid=uuid_of(gpu_id))


class Bench(House):
    """Cards and one task; `says` lets a card answer for whatever it computes."""

    @classmethod
    def of(cls, path: Path, *cards: GpuId, settings: SafeguardSettings = ALWAYS) -> Bench:
        house = cls(path, tuple(map(card, cards)), settings=settings)
        house.open(TASK, ParametersFetched("{}"))
        return house

    async def start(
        self, deadline: float | None = None, avoid: frozenset[GpuId] = frozenset()
    ) -> None:
        due = None if deadline is None else Timestamp(deadline)
        want = Want(TASK, Requirement(GigaBytes(1), "", GigaBytes(0)), "p", "b", due, 1.0, avoid)
        self.dispatcher.want(want, Order(AttemptId(""), TASK, 0, "{}", due), Work("sd", 0.0))
        self.dispatcher.dispatch(Timestamp(self.clock()))
        await self.calm()

    def busy(self) -> dict[GpuId, AttemptId]:
        """What computes now, by card."""
        return {
            gpu: order.attempt_id
            for gpu, order in self.pool.orders
            if not self.pool.attempts[order.attempt_id].done()
        }

    async def says(self, gpu: GpuId, outcome: Score | Exception) -> None:
        await until(lambda: gpu in self.busy())
        done = outcome if isinstance(outcome, Exception) else computed(outcome)
        self.pool.finish(self.busy()[gpu], done)
        await self.calm()

    def stored(self) -> Score | None:
        last = self.story()[-1]
        return last.score if isinstance(last, ResultStored) else None

    def failed_as(self) -> Fault | None:
        last = self.story()[-1]
        return last.fault if isinstance(last, AttemptFailed) else None

    def counted(self, result: str) -> bool:
        line = f'crynux_verifications_total{{result="{result}"}} 1.0'
        return line.encode() in self.metrics.render()


# --- nothing is asked -----------------------------------------------------------------------------


async def test_it_is_off_by_default(tmp_path: Path) -> None:
    assert SafeguardSettings().fraction == 0.0
    house = Bench.of(tmp_path, A, B, settings=NEVER)
    await house.start()
    await house.says(A, X)
    assert (house.stored(), house.busy()) == (X, {})


async def test_without_a_second_card_the_result_stands(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A)
    await house.start()
    await house.says(A, X)
    assert house.stored() == X
    assert house.counted("alone")


@pytest.mark.parametrize(
    "other",
    [
        card(B, GpuClass("Card+docker", GigaBytes(16))),
        replace(card(B), state=GpuState.BUSY),
        replace(card(B), state=GpuState.QUARANTINED),
    ],
)
async def test_only_an_idle_card_of_the_class_is_asked(tmp_path: Path, other: Gpu) -> None:
    house = Bench.of(tmp_path, A)
    house.pool.cards.append(other)
    await house.start()
    await house.says(A, X)
    assert (house.stored(), house.busy()) == (X, {})


@pytest.mark.parametrize(("spare", "asks"), [(SECONDS, True), (SECONDS - 0.5, False)])
async def test_it_is_asked_only_when_there_is_time(
    tmp_path: Path, spare: float, asks: bool
) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start(deadline=START + MARGIN_SECONDS + spare)
    await house.says(A, X)
    assert (B in house.busy(), house.stored()) == (asks, None if asks else X)


async def test_a_card_that_has_yet_to_prove_itself_isnt_asked(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B, settings=replace(ALWAYS, canary=CanarySettings(60.0)))
    house.pool.cards[1] = replace(card(B), on_disk=frozenset({"acme/tiny"}))
    house.pool.reports[B] = Report(
        "1", 1, Health.READY, KIND, "", None, None, 0, 0, 0,
        frozenset(), frozenset(), frozenset(),
        uuid=uuid_of(B), incarnation="p1", software="torch=1", candidates=(Candidate("acme/tiny"),),
    )  # fmt: skip
    await house.start()
    await house.says(A, X)
    assert (house.stored(), house.busy()) == (X, {})


# --- two cards ------------------------------------------------------------------------------------


async def test_two_equal_scores_are_stored(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    assert house.stored() is None
    assert not house.safeguards.free(house.pool.gpus()[1]), "the second card is taken meanwhile"
    await house.says(B, X)
    assert house.stored() == X
    assert house.safeguards.free(house.pool.gpus()[1])
    assert house.pool.called("start") == [(A, "a1"), (B, "a1.1")]
    assert house.counted("equal")


async def test_the_second_card_computes_the_same_order(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start(deadline=START + 100)
    await house.says(A, X)
    (_, first), (_, second) = house.pool.orders
    assert second == replace(first, attempt_id=second.attempt_id)


async def test_two_that_differ_send_nothing(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    assert (house.stored(), house.failed_as()) == (None, Fault.DEVICE)
    assert house.pool.quarantined == frozenset()
    assert house.counted("differ")


async def test_a_pair_in_dispute_never_gets_its_score_through_alone(tmp_path: Path) -> None:
    """Tried again on either card, after a crash too, with the other one gone or not sampled."""
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    house.settings = NEVER
    house.begin_term()
    house.pool.cards = [card(B)]
    await house.start(avoid=frozenset({A}))
    await house.says(B, Y)
    assert house.failed_as() is Fault.DEVICE
    # A third card comes, and agrees with one of them.
    house.pool.cards = [card(C)]
    await house.start(avoid=frozenset({A, B}))
    await house.says(C, X)
    assert house.stored() == X
    assert house.pool.quarantined == {uuid_of(B)}
    assert b'crynux_quarantines_total{by="verification"} 1.0' in house.metrics.render()


async def test_once_one_of_them_is_in_quarantine_the_other_is_believed(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    house.safeguards._health.quarantine([uuid_of(A)], KIND, "its canary", "canary")
    await house.start(avoid=frozenset({A}))
    await house.says(B, Y)
    assert house.stored() == Y


async def test_what_a_card_in_quarantine_said_before_agrees_with_nobody(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    house.safeguards._health.quarantine([uuid_of(A)], KIND, "its canary", "canary")
    house.pool.cards.append(card(C))
    await house.start(avoid=frozenset({A, C}))
    await house.says(B, X)
    assert (house.stored(), set(house.busy())) == (None, {C})


@pytest.mark.parametrize("second", [X, Y])
async def test_one_that_came_into_quarantine_during_its_second_opinion_has_no_result(
    tmp_path: Path, second: Score
) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await until(lambda: B in house.busy())
    house.safeguards._health.quarantine([uuid_of(A)], KIND, "its canary", "canary")
    await house.says(B, second)
    last = house.story()[-1]
    assert (house.stored(), house.failed_as()) == (None, Fault.DEVICE)
    assert isinstance(last, AttemptFailed)
    assert f"card {uuid_of(A)} is in quarantine" in last.detail
    with house.journal.read() as connection:
        assert rows.disputed(connection, TASK) == {}, "the other one said nothing wrong"


async def test_after_a_dispute_both_have_to_show_what_they_can(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    asked: list[CardUuid] = []
    house.safeguards._verifier._suspect = asked.append
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    assert sorted(asked) == [uuid_of(A), uuid_of(B)]


# --- a third card ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("third", "faulty"), [(X, B), (Y, A)])
async def test_a_third_card_decides(tmp_path: Path, third: Score, faulty: GpuId) -> None:
    house = Bench.of(tmp_path, A, B, C)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    await house.says(C, third)
    assert house.stored() == third
    assert house.pool.quarantined == {uuid_of(faulty)}
    result = house.ledger.open[TASK].result
    assert result is not None
    files = await house.artifacts.get(TASK, result.files)
    assert files == computed(third).files, "score and files are of the same card"
    assert result.card == (uuid_of(A) if faulty == B else uuid_of(B)), "and it answers for them"
    assert house.counted("odd")


async def test_three_that_differ_send_nothing(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B, C)
    await house.start()
    for gpu, score in ((A, X), (B, Y), (C, Z)):
        await house.says(gpu, score)
    assert house.failed_as() is Fault.DEVICE
    assert house.pool.quarantined == frozenset()


async def test_two_that_differ_again_and_again_dont_speak_against_the_task(tmp_path: Path) -> None:
    """Each attempt ends for want of trust, which is no bad result that both would show."""
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, Y)
    assert house.failed_as() is Fault.DEVICE
    await house.start(avoid=frozenset({A}))
    await house.says(B, Y)
    assert house.failed_as() is Fault.DEVICE


async def test_without_time_for_a_third_nothing_is_sent(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B, C)
    await house.start(deadline=START + MARGIN_SECONDS + SECONDS + 1)
    await house.says(A, X)
    house.clock.now += 5
    await house.says(B, Y)
    assert (house.busy(), house.failed_as()) == ({}, Fault.DEVICE)


# --- a second card that fails ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        DeviceFault(DeviceFaultKind.OTHER, "x"),
        AttemptLost("gone"),
        TaskInvalid("it says that the task is at fault"),
    ],
)
async def test_a_card_without_an_opinion_says_nothing(tmp_path: Path, error: Exception) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    await house.says(B, error)
    assert house.stored() == X
    assert house.pool.quarantined == frozenset()


@pytest.mark.parametrize(
    ("error", "doubted"),
    [
        (DeviceFault(DeviceFaultKind.OTHER, "x"), [uuid_of(B)]),
        (AttemptLost("its process is gone"), [uuid_of(B)]),
        (TaskInvalid("it says that the task is at fault"), []),
    ],
)
async def test_one_that_failed_on_it_has_to_show_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, doubted: list[CardUuid]
) -> None:
    house = Bench.of(tmp_path, A, B)
    asked: list[CardUuid] = []
    monkeypatch.setattr(house.safeguards, "_suspect", asked.append)
    await house.start()
    await house.says(A, X)
    await house.says(B, error)
    assert asked == doubted


async def test_another_is_asked_in_its_place(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B, C)
    await house.start()
    await house.says(A, X)
    await house.says(B, AttemptLost("gone"))
    await house.says(C, X)
    assert house.stored() == X
    assert house.counted("equal")


async def test_one_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = Bench.of(tmp_path, A, B)
    left = [SECONDS, 0.001, -1.0]
    monkeypatch.setattr(verification, "seconds_left", lambda deadline, now: left.pop(0))
    await house.start(deadline=START + 100)
    await house.says(A, X)
    await until(lambda: house.stored() == X)
    assert house.pool.called("cancel") == [(B, "a1.1")]


# --- crashes --------------------------------------------------------------------------------------


async def test_a_crash_in_the_middle_asks_the_same_card_for_the_same_attempt(
    tmp_path: Path,
) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    assert B in house.busy()
    await house.dispatcher.stop()
    assert house.stored() is None
    house.begin_term()
    attempt = house.ledger.open[TASK].open_attempt
    assert attempt is not None
    want = Want(TASK, Requirement(GigaBytes(1), "", GigaBytes(0)), "p", "b", None, 1.0, frozenset())
    order = Order(attempt.attempt_id, TASK, 0, "{}", None)
    house.dispatcher.follow(attempt.gpu_id, order, want, Work("sd", 0.0), Timestamp(house.clock()))
    await house.calm()
    assert house.pool.called("start") == [(A, "a1"), (B, "a1.1")] * 2
    house.pool.finish(AttemptId("a1.1"), computed(X))
    await house.calm()
    assert house.stored() == X
    assert house.kinds().count("AttemptStarted") == 1


async def test_the_first_card_takes_nothing_else_until_its_result_is_stored(
    tmp_path: Path,
) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    assert house.dispatcher.idle() == (house.pool.gpus()[1],)
    await house.says(B, X)
    assert len(house.dispatcher.idle()) == 2


async def test_a_lease_lost_meanwhile_comes_up(tmp_path: Path) -> None:
    house = Bench.of(tmp_path, A, B)
    await house.start()
    await house.says(A, X)
    house.journal.acquire("another", Timestamp(START + 100), 15.0)
    await house.says(B, Y)
    assert [type(error) for error in house.failed] == [LeaseLost]
    assert house.kinds()[-1] == "AttemptStarted"
