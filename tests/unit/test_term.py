"""The coordinator's plain classes on a real event loop; no test can last longer than LIMIT."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from actors import coordinator as module
from actors import fleet as fleet_module
from actors import term as term_module
from actors.coordinator import Coordinator
from actors.fleet import FleetSettings
from actors.inference import Health, Report
from actors.pool import UNKNOWN, RayGpuPool
from actors.stores import RayStores
from actors.world import RunningNetwork, World
from cluster.chain import outbox_rows
from cluster.core import standing
from cluster.core.errors import ConfigError, LeaseLost, NetworkUnavailable
from cluster.core.fleet import FleetPolicy
from cluster.core.lifecycle import Policy
from cluster.core.ports import KICKED_OUT, Lease, Wakeup
from cluster.core.record import Closed, Outcome
from cluster.core.types import (
    Address,
    AttemptId,
    CardUuid,
    GpuId,
    GpuState,
    NodeStatus,
    Score,
    Stage,
    TaskStatus,
    Timestamp,
    Wei,
)
from cluster.inference import canary
from cluster.journal import SqlJournal
from cluster.journal_tables import lease_table
from cluster.metrics import Metrics
from cluster.status import Status, readiness
from cluster.steering import ClearAccount, ClearQuarantine, Done, Order
from tests.unit.actor_fakes import (
    ALICE,
    BOB,
    CARD,
    CARD_2,
    DONE,
    KIND,
    SCORE,
    START,
    TASK,
    FakeNetwork,
    FakePool,
    facts_of,
    gpu_of,
    until,
)
from tests.unit.actor_house import WatchedArtifacts
from tests.unit.metric_fakes import sample
from tests.unit.test_overview import IDLE

LIMIT = 60.0
STRANGER = "0x" + "77" * 20
LEASE_SECONDS = 20.0
"""Longer than a machine that others use stands still."""
FIRST = AttemptId("a1")
ALICES_WAKEUP = Wakeup(ALICE, "TaskStarted")


async def told(office: Office, order: Order) -> str:
    """What kind of answer an order gets."""
    plain = await office.coordinator.perform(order.model_dump(mode="json"), "a test")
    return Done.model_validate(plain).kind


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_SECONDS", "BUSY_LOOK_SECONDS", "POOL_SECONDS"):
        monkeypatch.setattr(term_module, name, 0.01)
    monkeypatch.setattr(module, "BETWEEN_TERMS_SECONDS", 0.01)
    monkeypatch.setattr(fleet_module, "FLEET_SECONDS", 0.01)


@dataclass
class Office:
    """One coordinator and the world around it."""

    path: Path
    accounts: dict[int, Address] = field(default_factory=lambda: {1: ALICE, 2: BOB})
    opening: Callable[[], Awaitable[None]] | None = None
    opened: int = 0
    closed: int = 0
    url: str = ""
    """The journal's; empty for a file of its own."""
    name: str = "me"
    diary: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        began = time.monotonic()
        ids = itertools.count(1)
        self.clock: Callable[[], float] = lambda: START + time.monotonic() - began
        self.journal = SqlJournal(self.url or f"sqlite:///{self.path}/journal.db")
        self.network = FakeNetwork(self.clock)
        self.pool = FakePool(gpu_of())
        self.world = World(
            version="1",
            config_digest="abc",
            chain_id=1337,
            treasury=Address("0x" + "ee" * 20),
            accounts=self.accounts,
            journal=self.journal,
            artifacts=WatchedArtifacts(self.path / "artifacts"),
            pool=cast(RayGpuPool, self.pool),
            stores=RayStores(None, "1+abc", ()),
            open_network=self._open_network,
            metrics=Metrics("1", "abc"),
            policy=Policy(retry_backoff=0.0),
            fleet=FleetSettings(FleetPolicy(Wei(400), Wei(1), Wei(1), Wei(1))),
            lease_seconds=LEASE_SECONDS,
            clock=self.clock,
            new_attempt_id=lambda: AttemptId(f"a{next(ids)}"),
        )
        self.coordinator = Coordinator(self.world, self.name)

    def lease_for(self, seconds: float) -> None:
        """For a test that waits for its renewal or its end; before anything is begun."""
        self.world = replace(self.world, lease_seconds=seconds)
        self.coordinator = Coordinator(self.world, self.name)

    @contextlib.asynccontextmanager
    async def _open_network(self, lease: Callable[[], Lease]) -> AsyncIterator[RunningNetwork]:
        if self.opening is not None:
            await self.opening()
        self.opened += 1
        self.diary.append(f"{self.name} begins")
        try:
            yield self.network
        finally:
            self.closed += 1
            self.diary.append(f"{self.name} ends")

    @property
    def status(self) -> Status:
        return Status.model_validate(self.coordinator.status(), strict=False)

    def now(self) -> Timestamp:
        return Timestamp(self.clock())

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event, _ in self.journal.story(TASK)]

    async def acting(self) -> int:
        """Wait until it acts; gives its epoch."""
        await until(lambda: self.status.acting)
        return self.status.epoch or 0

    def lease(self) -> Lease:
        """As it is stored, expired or not."""
        with self.journal.read() as connection:
            row = connection.execute(select(lease_table)).one()
        return Lease(row.holder, row.epoch, Timestamp(row.expires_at))

    def depose(self, seconds: float) -> Lease:
        """Another coordinator takes the lease, as if ours had frozen beyond its end."""
        lease = self.journal.acquire("another", Timestamp(self.clock() + 1000), seconds - 1000)
        assert lease is not None
        return lease


@contextlib.asynccontextmanager
async def serving(office: Office) -> AsyncIterator[None]:
    async with asyncio.timeout(LIMIT):
        running = asyncio.create_task(office.coordinator.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        yield entries


def named(logs: list[Any], event: str) -> int:
    return sum(entry["event"] == event for entry in logs)


# --- a term ---------------------------------------------------------------------------------------


async def test_it_takes_the_lease_acts_and_gives_it_back(office: Office) -> None:
    office.network.add(facts_of())
    office.pool.outcomes = [DONE]
    async with serving(office):
        await until(lambda: office.network.tasks[TASK].score == SCORE)
        office.network.move(TASK, stage=Stage.WANTED, status=TaskStatus.VALIDATED)
        await until(lambda: office.kinds()[-1:] == ["Closed"])
        assert office.journal.story(TASK)[-1][0] == Closed(Outcome.SUCCESS, Wei(10**18))
        assert (office.lease().holder, office.lease().epoch) == ("me", office.status.epoch)
        assert (office.status.acting, office.status.totals.paid_wei) == (True, str(10**18))
        await office.coordinator.stop()
        assert not office.status.acting
        assert office.journal.acquire("another", office.now(), 1.0) is not None
    assert (office.opened, office.closed) == (1, 1)


async def test_stopping_pauses_quits_and_cancels_nothing(office: Office) -> None:
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: bool(office.pool.orders))
        before = office.kinds()
        await office.coordinator.stop()
    calls = {str(name) for name, *_ in office.network.calls + office.pool.calls}
    assert calls <= {
        "look", "run", "next_wakeup", "refresh", "fetch_parameters", "start", "result",
        "balance", "ask_relay",
    }  # fmt: skip
    assert office.kinds() == before
    assert before[-1] == "AttemptStarted"


async def test_the_lease_is_renewed_for_as_long_as_it_acts(office: Office) -> None:
    office.lease_for(0.3)
    async with serving(office):
        epoch = await office.acting()
        for _ in range(3):
            first = office.lease().expires_at
            await until(lambda first=first: office.lease().expires_at > first)  # type: ignore[misc]
        assert (office.lease().holder, office.lease().epoch) == ("me", epoch)
        assert office.status.epoch == epoch


async def test_a_wakeup_makes_it_look_at_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(term_module, "SWEEP_SECONDS", 1000.0)
    async with serving(office):
        await until(lambda: len(office.network.called("look")) == 2)
        await asyncio.sleep(0.05)
        assert len(office.network.called("look")) == 2
        office.network.wakeups.put_nowait(ALICES_WAKEUP)
        await until(lambda: len(office.network.called("look")) == 3)
        assert office.network.called("look")[-1] == (ALICE,)
        office.network.wakeups.put_nowait(Wakeup(None, "reconnected"))
        await until(lambda: len(office.network.called("look")) == 5)


async def test_an_attempts_end_makes_it_look_at_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(term_module, "BUSY_LOOK_SECONDS", 1000.0)
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: FIRST in office.pool.attempts)
        office.pool.finish(FIRST, DONE)
        await until(lambda: office.network.tasks[TASK].score == SCORE)


async def test_bad_weather_ends_no_term(tmp_path: Path, logs: list[Any]) -> None:
    office = Office(tmp_path, {1: ALICE})
    async with serving(office):
        epoch = await office.acting()
        office.network.faults["look"] = [NetworkUnavailable("the chain is away")]
        await until(lambda: office.status.problems == ("the chain is away",))
        assert not office.status.chain.reached
        await until(lambda: office.status.problems == ())
        assert office.status.epoch == epoch
    assert named(logs, "look_failed") == 1
    assert named(logs, "term_broke") == 0


async def test_an_outage_is_known_at_once_though_only_one_account_is_looked_at(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(term_module, "SWEEP_SECONDS", 1000.0)
    async with serving(office):
        await until(lambda: office.status.chain.reached)
        office.network.unreached = "no endpoint answers"
        assert not office.status.chain.reached
        assert "the chain is not reached: no endpoint answers" in readiness(office.status)[1]
        office.network.unreached = None
        assert office.status.chain.reached


async def test_a_card_that_never_came_up_is_in_the_status_and_in_the_metrics(
    office: Office,
) -> None:
    lost = replace(gpu_of(CARD_2, GpuState.UNREACHABLE), gpu_class=UNKNOWN)
    office.pool.strangers = [lost]
    broken = replace(IDLE, health=Health.BROKEN, gpu_class=None, problem="no CUDA")
    office.pool.reports[CARD_2] = broken
    async with serving(office):
        await office.acting()
        _, card = office.status.gpus
        assert (card.gpu_id, card.name, card.problem) == (CARD_2, "unknown", "no CUDA")
        assert f"GPU {CARD_2}: no CUDA" in office.status.problems
        text = (await office.coordinator.metrics_text()).decode()
    line = 'crynux_gpus{gpu_name="unknown",state="unreachable",vram_gb="0"} 1.0'
    assert line in text.splitlines()


async def test_metrics_are_given_while_the_journal_is_away(
    office: Office, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    def away(_: Connection) -> None:
        raise OperationalError("SELECT", {}, OSError("no route"))

    async def scraped() -> list[str]:
        return (await office.coordinator.metrics_text()).decode().splitlines()

    row = 'crynux_outbox_rows{state="sent"} 0.0'
    async with serving(office):
        await office.acting()
        assert row in await scraped()
        with monkeypatch.context() as broken:
            broken.setattr(outbox_rows, "states", away)
            for _ in range(2):
                text = await scraped()
                assert "crynux_lease_held 1.0" in text
                assert not [line for line in text if line.startswith("crynux_outbox_rows")]
        assert row in await scraped()
    assert named(logs, "outbox_unread") == 1


# --- losing it ------------------------------------------------------------------------------------


async def test_a_lost_lease_ends_the_term_until_the_lease_is_free(
    office: Office, logs: list[Any]
) -> None:
    office.lease_for(0.3)
    office.network.add(facts_of())
    async with serving(office):
        epoch = await office.acting()
        await until(lambda: FIRST in office.pool.attempts)
        other = office.depose(seconds=1.0)
        before = office.kinds()
        office.pool.finish(FIRST, DONE)
        await until(lambda: not office.status.acting)
        while office.now() < other.expires_at - 0.05:  # noqa: ASYNC110 - until then, never
            assert not office.status.acting
            assert office.kinds() == before
            await asyncio.sleep(0.01)
        assert await office.acting() > other.epoch > epoch
        await until(lambda: office.network.tasks[TASK].score == SCORE)
    assert named(logs, "lease_lost") == 1
    assert named(logs, "term_broke") == 0
    assert office.kinds().count("AttemptStarted") == 1


async def test_an_idle_coordinator_notices_that_it_lost_the_lease(office: Office) -> None:
    async with serving(office):
        await office.acting()
        office.depose(seconds=1000.0)
        await until(lambda: not office.status.acting)
    assert (office.opened, office.closed) == (1, 1)


async def test_who_waits_for_the_lease_can_be_stopped(office: Office, logs: list[Any]) -> None:
    office.depose(seconds=1000.0)
    async with serving(office):
        await until(lambda: named(logs, "waiting_for_the_lease") >= 1)
        await office.coordinator.stop()
    assert office.opened == 0
    assert office.journal.acquire("third", office.now(), 1.0) is None


# --- breaking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "network.look",
        "network.run",
        "network.next_wakeup",
        "pool.refresh",
        "pool.run",
        "pool.start",
        "pool.result",
    ],
)
async def test_a_bug_ends_the_term_and_the_next_goes_on(
    office: Office, logs: list[Any], where: str
) -> None:
    side, _, method = where.partition(".")
    fake: FakeNetwork | FakePool = office.network if side == "network" else office.pool
    fake.faults[method] = [ZeroDivisionError("a bug")]
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: named(logs, "term_broke") == 1)
        await until(lambda: FIRST in office.pool.attempts)
        office.pool.finish(FIRST, DONE)
        await until(lambda: office.network.tasks[TASK].score == SCORE)
    assert office.kinds().count("AttemptStarted") == 1
    assert {attempt for _, attempt in office.pool.called("start")} == {FIRST}
    assert named(logs, "term_broke") == 1
    assert named(logs, "acting") == 2
    assert (office.opened, office.closed) == (2, 2)
    (entry,) = (entry for entry in logs if entry["event"] == "term_broke")
    assert entry["exc_info"]


async def test_the_next_term_begins_with_the_same_records(office: Office, logs: list[Any]) -> None:
    office.network.add(facts_of(), parameters=None)
    async with serving(office):
        await until(lambda: office.kinds() == ["Seen"])
        office.network.faults["look"] = [ZeroDivisionError("a bug")]
        await until(lambda: named(logs, "acting") == 2)
        await office.acting()
        assert [task.commitment for task in office.status.tasks] == [TASK]
        office.network.parameters[TASK] = "{}"
        await until(lambda: "FaultFound" in office.kinds())
    assert office.kinds().count("Seen") == 1


async def test_a_network_that_cant_be_opened_is_tried_again_and_later_each_time(
    office: Office, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    failures = [OSError("no address"), NetworkUnavailable("no chain")]

    async def opening() -> None:
        await asyncio.sleep(0)
        if failures:
            raise failures.pop()

    office.opening = opening
    pauses: list[float] = []
    pause = office.coordinator._pause

    async def paused(seconds: float) -> None:
        pauses.append(seconds)
        await pause(seconds)

    monkeypatch.setattr(office.coordinator, "_pause", paused)
    async with serving(office):
        await office.acting()
    assert named(logs, "term_broke") == 2
    assert pauses == [0.01, 0.02]
    assert sample(office.world.metrics, "crynux_terms_broken_total") == 2


async def test_why_no_term_can_begin_is_said(office: Office) -> None:
    wrong = [True]

    async def opening() -> None:
        await asyncio.sleep(0)
        if wrong:
            raise ConfigError("the endpoint serves chain 6, not 5")

    office.opening = opening
    async with serving(office):
        await until(lambda: bool(office.status.not_acting))
        assert any("serves chain 6, not 5" in each for each in readiness(office.status)[1])
        wrong.clear()
        await office.acting()
        assert office.status.not_acting == ""


# --- ending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["look", "fetch_parameters", "submit_score"])
async def test_a_call_that_hangs_doesnt_keep_it_from_stopping(office: Office, method: str) -> None:
    office.network.add(facts_of())
    office.pool.outcomes = [DONE]
    office.network.gates[method] = asyncio.Event()
    async with serving(office):
        await until(lambda: office.network.waiting > 0)
        await office.coordinator.stop()
        assert office.journal.acquire("another", office.now(), 1.0) is not None


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.05, 0.1])
async def test_cancelling_never_hangs(office: Office, after: float) -> None:
    office.network.add(facts_of())
    async with asyncio.timeout(LIMIT):
        running = asyncio.create_task(office.coordinator.run())
        await asyncio.sleep(after)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert office.opened == office.closed
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.05, 0.1])
async def test_stopping_never_hangs(office: Office, after: float) -> None:
    office.network.add(facts_of())
    async with serving(office):
        await asyncio.sleep(after)
        await office.coordinator.stop()
    assert office.opened == office.closed
    assert office.journal.acquire("another", office.now(), 1.0) is not None


async def test_stopping_while_the_network_is_being_opened(office: Office) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def opening() -> None:
        entered.set()
        await gate.wait()

    office.opening = opening
    async with serving(office):
        await entered.wait()
        stop = asyncio.create_task(office.coordinator.stop())
        await asyncio.sleep(0)
        gate.set()
        await stop
    assert (office.opened, office.closed) == (1, 1)


async def test_a_journal_that_fails_for_a_while_ends_nothing(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.lease_for(0.3)
    acquire = office.journal.acquire
    failures: list[Exception] = [OSError("the database is away")]

    def flaky(holder: str, now: Timestamp, ttl: float) -> Lease | None:
        if failures:
            raise failures.pop()
        return acquire(holder, now, ttl)

    monkeypatch.setattr(office.journal, "acquire", flaky)
    async with serving(office):
        await office.acting()
    assert failures == []


async def test_a_lease_lost_while_stopping_is_no_failure(office: Office, logs: list[Any]) -> None:
    async with serving(office):
        await office.acting()
        office.depose(seconds=1000.0)
        await office.coordinator.stop()
    assert named(logs, "lease_lost") == 1
    with pytest.raises(LeaseLost):
        office.journal.release(Lease("me", 1, Timestamp(0)))


async def test_one_that_has_ended_doesnt_pass_for_a_good_one(office: Office) -> None:
    """The supervisor would leave it in its place, and nobody would act."""
    assert office.coordinator.release() == "1+abc"
    async with serving(office):
        await office.acting()
        assert office.coordinator.release() == "1+abc"
        stop = asyncio.create_task(office.coordinator.stop())
        await asyncio.sleep(0)
        assert office.coordinator.release() != "1+abc"
        await stop
    assert office.coordinator.release() != "1+abc"


async def test_one_whose_loop_broke_doesnt_pass_for_a_good_one(office: Office) -> None:
    async with serving(office):
        await office.acting()
    assert office.coordinator.release() != "1+abc"


async def test_metrics_tell_who_acts(office: Office) -> None:
    async with serving(office):
        await office.acting()
        assert b"crynux_lease_held 1.0" in await office.coordinator.metrics_text()
        await office.coordinator.stop()
        assert b"crynux_lease_held 0.0" in await office.coordinator.metrics_text()


async def test_who_lost_the_lease_to_its_own_successor_waits(
    office: Office, logs: list[Any]
) -> None:
    """Ray may restart an actor whose frozen process comes to life again: the same actor, twice."""
    office.lease_for(0.3)
    async with serving(office):
        epoch = await office.acting()
        twin = office.journal.acquire("me", Timestamp(office.clock()), 1000.0)
        assert twin is not None
        assert twin.epoch > epoch
        await until(lambda: not office.status.acting)
        await until(lambda: named(logs, "waiting_for_the_lease") >= 3)
        assert not office.status.acting
        assert office.lease() == twin


async def several_plans(office: Office) -> None:
    """The fleet has planned anew, with what is known now."""
    before = office.network.plans
    await until(lambda: office.network.plans >= before + 12)


@pytest.mark.parametrize(
    ("end", "joins"), [(TaskStatus.END_ABORTED, True), (TaskStatus.END_INVALIDATED, False)]
)
async def test_only_an_account_that_was_not_slashed_joins_again(
    office: Office, monkeypatch: pytest.MonkeyPatch, end: TaskStatus, joins: bool
) -> None:
    monkeypatch.setattr(fleet_module, "FLEET_SECONDS", 0.02)
    monkeypatch.setattr(term_module, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(standing, "FIRST_REJOIN_SECONDS", 0.0)
    office.pool.cards.append(gpu_of(CARD_2))
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: FIRST in office.pool.attempts)
        office.network.holding = Wei(10**24)
        office.network.node_status = NodeStatus.QUIT
        office.network.move(TASK, status=end, stage=Stage.ENDED)
        for account in (ALICE, BOB) if joins else (BOB,):
            office.network.wakeups.put_nowait(Wakeup(account, KICKED_OUT))
        await until(lambda: "Closed" in office.kinds())
        await several_plans(office)
        if joins:
            await until(lambda: {(ALICE,), (BOB,)} <= set(office.network.called("join")))
            assert office.status.problems == ()
            return
        # What computed wrongly may do so again: none of its class joins until somebody has looked.
        assert office.network.called("join") == []
        assert any("was slashed" in problem for problem in office.status.problems)
        assert any("is stopped" in problem for problem in office.status.problems)
        assert await told(office, ClearAccount(account=ALICE)) == "done"
        await until(lambda: {(ALICE,), (BOB,)} <= set(office.network.called("join")))
        assert office.status.problems == ()
        assert await told(office, ClearAccount(account=STRANGER)) == "unknown"
        assert office.journal.slashed_accounts() == frozenset()


SLASHED = Wakeup(ALICE, "NodeSlashed")


@pytest.mark.parametrize("hears", [True, False])
async def test_a_slashed_account_whose_task_was_closed_as_lost_never_joins_again(
    office: Office, monkeypatch: pytest.MonkeyPatch, hears: bool
) -> None:
    """An endpoint that lags says there is no such task; what follows shows in no record of ours."""
    monkeypatch.setattr(fleet_module, "FLEET_SECONDS", 0.02)
    office.pool.cards.append(gpu_of(CARD_2))
    office.network.add(facts_of(), parameters=None)
    async with serving(office):
        await until(lambda: "Seen" in office.kinds())
        facts = office.network.tasks.pop(TASK)
        await until(lambda: "Closed" in office.kinds())
        assert office.journal.story(TASK)[-1][0] == Closed(Outcome.LOST, Wei(0))
        if hears:
            office.network.wakeups.put_nowait(SLASHED)
        else:
            # It is looked at still, but opens no record because it has ended.
            ended = replace(facts, status=TaskStatus.END_INVALIDATED, stage=Stage.ENDED)
            office.network.add(ended)
        await until(lambda: ALICE in office.journal.slashed_accounts())
        office.network.holding = Wei(10**24)
        office.network.node_status = NodeStatus.QUIT
        await several_plans(office)
        assert (ALICE,) not in office.network.called("join")
        epoch = office.status.epoch
        office.network.faults["look"] = [ZeroDivisionError("a bug")]
        await until(lambda: office.status.acting and office.status.epoch != epoch)
        assert any("was slashed" in problem for problem in office.status.problems)
        # No record of ours is of it, and it counts, once.
        assert sample(office.world.metrics, "crynux_slashes_total") == 1
        assert office.status.totals.slashed == 1


async def test_the_fleet_knows_of_a_slash_as_soon_as_it_can_see_that_the_account_has_quit(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's turn may wait, for a file or for the relay, before it is closed as invalidated."""
    monkeypatch.setattr(fleet_module, "FLEET_SECONDS", 0.02)
    monkeypatch.setattr(term_module, "SWEEP_SECONDS", 0.02)
    office.pool.cards.append(gpu_of(CARD_2))
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: FIRST in office.pool.attempts)
        # The open attempt is cancelled before the record is closed, and that hangs.
        office.pool.gates["cancel"] = asyncio.Event()
        office.network.holding = Wei(10**24)
        office.network.node_status = NodeStatus.QUIT
        office.network.move(TASK, status=TaskStatus.END_INVALIDATED, stage=Stage.ENDED)
        await until(lambda: office.pool.waiting == 1)
        await several_plans(office)
        assert "Closed" not in office.kinds()
        assert (ALICE,) not in office.network.called("join")


async def test_a_kick_that_nobody_heard_of_is_asked_for_before_anything_is_thought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    monkeypatch.setattr(standing, "STRANGE_SECONDS", 0.0)
    office = Office(tmp_path, {1: ALICE})
    kick = Wakeup(ALICE, KICKED_OUT, moment=101)
    office.network.befallen[ALICE] = [kick]
    async with serving(office):
        await until(lambda: ALICE in {each.address for each in office.journal.assignments()})
        office.network.faults["befell"] = [NetworkUnavailable("not yet")] * 3
        office.network.node_status = NodeStatus.QUIT
        await until(lambda: named(logs, "kicked_out") == 1)
        # Heard of at last by itself too: it is the same one.
        office.network.wakeups.put_nowait(kick)
        office.network.wakeups.put_nowait(kick)
        await until(lambda: office.network.wakeups.empty())
        await several_plans(office)
    assert named(logs, "kicked_out") == 1
    assert named(logs, "account_held") == 0
    assert office.network.called("join") == []


# --- cards in quarantine --------------------------------------------------------------------------


def ward(office: Office, *cards: GpuId) -> None:
    """These cards, all of them able to compute a canary."""
    office.pool.cards = [
        replace(gpu_of(each), uuid=CardUuid(f"GPU-{each}"), on_disk=frozenset({"acme/tiny"}))
        for each in cards
    ]
    office.pool.reports = {
        gpu.gpu_id: Report(
            "1", 1, Health.READY, KIND, "", None, None, 0, 0, 0,
            frozenset(), frozenset(), gpu.on_disk,
            uuid=gpu.uuid, incarnation="p1", software="torch=1",
            candidates=(canary.Candidate("acme/tiny"),),
        )
        for gpu in office.pool.cards
    }  # fmt: skip


def canaries(office: Office) -> dict[GpuId, AttemptId]:
    """The canaries that wait for their answer."""
    return {
        gpu: order.attempt_id
        for gpu, order in office.pool.orders
        if order.task == canary.TASK and not office.pool.attempts[order.attempt_id].done()
    }


async def quarantine(office: Office, card: GpuId, *others: GpuId) -> None:
    """Have the first differ from what the others, two at least, agree on."""
    await until(lambda: canaries(office).keys() >= {card, *others})
    for each in others:
        office.pool.finish(canaries(office)[each], DONE)
    await until(lambda: not canaries(office).keys() & set(others))
    office.pool.finish(canaries(office)[card], replace(DONE, score=Score(b"another!")))
    await until(lambda: bool(office.pool.quarantined))


async def test_a_card_in_quarantine_is_shown_and_counted_as_such(office: Office) -> None:
    third = GpuId("node-2")
    ward(office, CARD, CARD_2, third)
    async with serving(office):
        await office.acting()
        await quarantine(office, third, CARD, CARD_2)
        states = {gpu.gpu_id: (gpu.state, gpu.uuid) for gpu in office.status.gpus}
        assert states[third] == (GpuState.QUARANTINED, f"GPU-{third}")
        assert states[CARD] == (GpuState.READY, f"GPU-{CARD}")
        (problem,) = office.status.problems
        assert f"card GPU-{third} (Card+docker) is in quarantine" in problem
        text = (await office.coordinator.metrics_text()).decode()
        line = 'crynux_gpus{gpu_name="Card+docker",state="quarantined",vram_gb="8"} 1.0'
        assert line in text


async def test_a_card_in_quarantine_wants_no_account(office: Office) -> None:
    third = GpuId("node-2")
    ward(office, CARD, CARD_2, third)
    office.accounts |= {3: Address("0x" + "cc" * 20)}
    office.network.node_status = NodeStatus.PAUSED
    async with serving(office):
        await office.acting()
        await quarantine(office, third, CARD, CARD_2)
        before = len(office.network.called("resume"))
        await until(lambda: len(office.network.called("resume")) >= before + 6)
        # Two cards, two accounts: the third one's stays paused, and none is paused by us.
        later = office.network.called("resume")[before + 2 :]
        assert {account for (account,) in later} == {ALICE, BOB}
        assert office.network.called("pause") == []


async def test_an_operator_clears_a_card(office: Office) -> None:
    third = GpuId("node-2")
    ward(office, CARD, CARD_2, third)
    async with serving(office):
        await office.acting()
        await quarantine(office, third, CARD, CARD_2)
        assert await told(office, ClearQuarantine(card="nobody")) == "unknown"
        assert await told(office, ClearQuarantine(card=str(third))) == "done"
        assert await told(office, ClearQuarantine(card=f"GPU-{third}")) == "nothing"
        assert office.status.problems == ()
        await until(lambda: third in canaries(office))
        office.pool.finish(canaries(office)[third], DONE)
        await until(lambda: not canaries(office))
        assert office.pool.quarantined == frozenset()
        await office.coordinator.stop()
        assert await told(office, ClearQuarantine(card=str(third))) == "refused"


async def test_a_task_waits_for_the_canary_of_a_new_card(office: Office) -> None:
    ward(office, CARD)
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: CARD in canaries(office))
        await until(lambda: "ParametersFetched" in office.kinds())
        assert "AttemptStarted" not in office.kinds()
        office.pool.outcomes = [DONE]
        office.pool.finish(canaries(office)[CARD], DONE)
        await until(lambda: office.network.tasks[TASK].score == SCORE)
