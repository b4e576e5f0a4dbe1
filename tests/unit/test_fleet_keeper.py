"""The fleet's shell: what it gathers, what it stores before it asks, and what it makes known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from actors.dispatcher import Outstanding
from actors.drain import Drains
from actors.fleet import APPLY_SECONDS, FleetKeeper, FleetSettings
from actors.fleet_actions import LONG_SECONDS
from actors.ledger import Ledger
from actors.stores import RayStores
from actors.treasury import TREASURY_SECONDS
from cluster.core.capacity import FEW, WINDOW_SECONDS
from cluster.core.errors import NetworkUnavailable
from cluster.core.fleet import FleetPolicy
from cluster.core.ports import Movement, Refusal
from cluster.core.record import (
    AttemptStarted,
    Closed,
    Outcome,
    ParametersFetched,
    ResultStored,
    Seen,
)
from cluster.core.standing import STRANGE_SECONDS
from cluster.core.types import (
    AccountFacts,
    AccountView,
    Address,
    AttemptId,
    Commitment,
    GpuState,
    NodeStatus,
    TaskType,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal
from tests.unit.actor_fakes import (
    ALICE,
    BOB,
    CARD,
    CARD_2,
    KIND,
    OTHER,
    SCORE,
    TASK,
    Clock,
    FakeNetwork,
    gpu_of,
)

TREASURY, OWNER = Address("0x" + "ee" * 20), Address("0x" + "dd" * 20)
POLICY = FleetPolicy(Wei(400), Wei(10), Wei(5), Wei(20))
MONEY = 10_000


class World:
    def __init__(self, folder: Path, settings: FleetSettings | None = None) -> None:
        self.clock = Clock()
        self.settings = settings or FleetSettings(POLICY)
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        self.network = FakeNetwork(self.clock)
        self.network.treasury_has = Wei(MONEY)
        self.cards = [gpu_of(CARD)]
        self.views: dict[Address, AccountView] = {}
        self.tasks: list[Outstanding] = []
        self.begin()

    def begin(self, stores: RayStores | None = None) -> None:
        """A new term, from what is stored."""
        lease = self.journal.acquire("me", Timestamp(self.clock()), 1e9)
        assert lease is not None
        self.ledger = Ledger.load(self.journal, lease, self.clock)
        self.drains = Drains(self.ledger)
        self.keeper = FleetKeeper(
            self.ledger,
            self.network,
            stores or RayStores(None, "1", ()),
            self.drains,
            {1: ALICE, 2: BOB},
            TREASURY,
            self.settings,
            lambda: self.cards,
            self.views.get,
            lambda: self.tasks,
            self.clock,
        )
        self.ledger.told = self.keeper.closed

    def see(self, account: Address, status: NodeStatus, balance: int = 0, at: int = 100) -> None:
        gpu_class = None if status is NodeStatus.QUIT else KIND
        stake = Wei(0 if status is NodeStatus.QUIT else 400)
        facts = AccountFacts(account, status, gpu_class, stake, Wei(balance), 0, None)
        self.views[account] = AccountView(at, Timestamp(self.clock()), facts, ())
        self.keeper.standings.looked(self.views[account])

    def rounds(self, account: Address, status: NodeStatus, balance: int, seconds: float) -> None:
        """Looks, and turns of the fleet between them that ask for nothing."""
        for _ in range(int(seconds // 10) + 1):
            self.see(account, status, balance)
            assert self.turn() == []
            self.later(10)

    def turn(self) -> list[tuple[object, ...]]:
        """What one turn of the fleet asks of the network."""
        before = len(self.network.calls)
        asyncio.run(self.keeper.turn())
        calls = self.network.calls[before:]
        return [call for call in calls if call[0] not in {"balance", "movements"}]

    def later(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        yield entries


def test_an_account_is_assigned_funded_and_joined_one_step_at_a_time(world: World) -> None:
    world.see(ALICE, NodeStatus.QUIT)
    world.see(BOB, NodeStatus.QUIT)
    assert world.turn() == []
    assert [each.address for each in world.journal.assignments()] == [ALICE]
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]
    # On its way, then in a block that the last look is older than: nothing is done twice.
    world.network.moving = {ALICE: Movement(is_open=True, paying=True)}
    assert world.turn() == []
    world.network.moving = {ALICE: Movement(block=101, paid_block=101)}
    assert world.turn() == []
    world.see(ALICE, NodeStatus.QUIT, balance=420, at=101)
    assert world.turn() == [("join", ALICE)]
    assert world.keeper.view.lacks == ()


def test_a_join_that_waits_long_for_models_is_told_and_why(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, waits = RayStores(None, "1", ()), ["machine n0: lora:acme/a is still to come"]
    monkeypatch.setattr(stores, "unsettled", lambda _: waits[0])
    world.begin(stores)
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    world.turn()
    assert world.turn() == []
    assert world.keeper.alerts() == ()
    for _ in range(int(LONG_SECONDS / 30)):
        world.later(30)
        assert world.turn() == []
    (line,) = world.keeper.alerts()
    assert "wait to join for 5 min" in line
    assert waits[0] in line
    # After it wasn't wanted for a while, its waiting begins anew.
    world.later(3600)
    assert world.turn() == []
    assert world.keeper.alerts() == ()
    waits[0] = ""
    assert world.turn() == [("join", ALICE)]
    assert world.keeper.alerts() == ()


def test_what_is_expected_is_stored_before_the_network_hears_of_it(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.drains.add(everything=True)
    stored: list[str] = []
    world.network.before = lambda method: stored.append(
        world.journal.cursors("standing:")[ALICE] if method == "pause" else ""
    )
    assert world.turn() == [("pause", ALICE)]
    assert any("paused" in each for each in stored)


def test_the_treasury_is_asked_seldom_and_before_something_is_paid(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    for _ in range(5):
        world.turn()
    assert world.network.called("balance") == [(TREASURY,)]
    assert world.keeper.view.treasury == str(MONEY)
    world.later(TREASURY_SECONDS + 1)
    world.see(ALICE, NodeStatus.AVAILABLE, balance=1)
    assert world.turn() == [("transfer", TREASURY, ALICE, 19, "gas")]
    assert world.network.called("balance") == [(TREASURY,)] * 2


def test_a_treasury_that_cannot_be_asked_stops_nothing_that_costs_nothing(world: World) -> None:
    world.network.faults["balance"] = [NetworkUnavailable("away")] * 9
    world.see(ALICE, NodeStatus.PAUSED, balance=20)
    world.turn()
    assert world.turn() == [("resume", ALICE)]
    assert world.keeper.view.treasury is None


def test_what_the_treasury_is_paying_is_not_there_any_more_and_stops_nothing(world: World) -> None:
    world.network.treasury_has = Wei(1000)
    world.cards.append(gpu_of(CARD_2))
    world.see(ALICE, NodeStatus.QUIT)
    world.see(BOB, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]
    world.see(BOB, NodeStatus.AVAILABLE, balance=1)
    # It doesn't come to be for long, and has its money bound.
    world.network.moving = {
        TREASURY: Movement(is_open=True, owes=Wei(990)),
        ALICE: Movement(is_open=True, paying=True),
    }
    assert world.turn() == []
    assert any("the treasury has 10 wei" in each for each in world.keeper.alerts())
    world.network.moving[TREASURY] = Movement(is_open=True, owes=Wei(420))
    assert world.turn() == [("transfer", TREASURY, BOB, 19, "gas")]
    assert world.keeper.alerts() == ()
    # As soon as it is paid what is left is looked up again, however lately that was done.
    world.network.moving = {TREASURY: Movement(block=101)}
    world.network.treasury_has = Wei(10)
    assert world.turn() == []
    assert any("the treasury has 10 wei" in each for each in world.keeper.alerts())


def test_what_is_gone_while_something_is_on_its_way_shows_all_the_same(world: World) -> None:
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    world.turn()
    assert world.turn() == [("join", ALICE)]
    world.network.moving = {ALICE: Movement(is_open=True, lacks=Wei(400))}
    world.see(ALICE, NodeStatus.QUIT, balance=0)
    assert world.turn() == []
    assert "420 wei are gone" in world.keeper.alerts()[0]


def test_what_is_paid_and_not_yet_in_the_look_isnt_missed(world: World) -> None:
    world.see(ALICE, NodeStatus.QUIT, balance=50)
    world.turn()
    assert world.turn() == [("transfer", TREASURY, ALICE, 370, "fund")]
    world.network.moving = {ALICE: Movement(block=105, paid_block=105)}
    world.see(ALICE, NodeStatus.QUIT, balance=50, at=104)
    assert world.keeper.alerts() == ()
    world.network.moving = {ALICE: Movement(is_open=True, block=105, paid_block=105)}
    world.see(ALICE, NodeStatus.QUIT, balance=420, at=106)
    assert world.keeper.alerts() == ()


def test_a_treasury_that_has_too_little_is_an_alert(world: World) -> None:
    world.network.treasury_has = Wei(5)
    world.see(ALICE, NodeStatus.QUIT)
    world.turn()
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert "the treasury has 5 wei and needs 430 to fund account 1" in alert
    # It is looked at again after a while.
    world.network.treasury_has = Wei(MONEY)
    world.later(TREASURY_SECONDS + 1)
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]


def test_earnings_go_to_the_beneficiary(tmp_path: Path) -> None:
    policy = replace(POLICY, beneficiary=OWNER, sweep_above=Wei(50))
    world = World(tmp_path, FleetSettings(policy))
    world.see(ALICE, NodeStatus.BUSY, balance=100)
    world.turn()
    assert world.turn() == [("transfer", ALICE, OWNER, 80, "sweep")]


def test_a_new_version_reaches_accounts_that_joined_with_another(world: World) -> None:
    world.see(ALICE, NodeStatus.BUSY, balance=20)
    world.turn()
    view = world.views[ALICE]
    world.views[ALICE] = replace(view, account=replace(view.account, outdated=True))
    assert world.turn() == [("update_version", ALICE)]


def test_a_plan_that_waits_for_the_operator_does_nothing_until_it_is_applied(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, FleetSettings(POLICY, automatic=False))
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    assert world.turn() == []
    assert world.keeper.view.plan == (f"account 1 is for {KIND.name}",)
    assert world.journal.assignments() == ()
    world.keeper.apply()
    assert world.turn() == []
    assert world.turn() == [("join", ALICE)]
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.cards.append(gpu_of(CARD_2))
    world.see(BOB, NodeStatus.QUIT)
    assert world.turn() == []
    assert world.keeper.view.plan == (f"account 2 is for {KIND.name}",)


def test_applying_ends_when_all_that_is_left_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, automatic=False))
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    world.see(BOB, NodeStatus.QUIT)
    world.keeper.apply()
    world.turn()
    assert world.turn() == [("join", ALICE)]
    again = Timestamp(world.clock() + 30)
    full = Refusal("join", "Network is full", again)
    world.network.moving = {ALICE: Movement(refused=(full,))}
    assert world.turn() == []
    assert world.keeper.alerts() == ("join of account 1 is refused: Network is full",)
    world.later(31)
    assert world.turn() == [], "it is applied no more"
    assert world.keeper.view.plan == (f"join {ALICE} for {KIND.name}",)


def test_an_action_that_fails_stops_no_other(world: World) -> None:
    world.cards.append(gpu_of(CARD_2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.PAUSED, balance=20)
    world.turn()
    world.network.faults["resume"] = [NetworkUnavailable("gone")]
    assert world.turn() == [("resume", ALICE), ("resume", BOB)]
    assert world.turn() == [("resume", ALICE), ("resume", BOB)]


def test_what_can_wait_waits_for_what_is_on_its_way_and_for_a_drain(world: World) -> None:
    world.see(BOB, NodeStatus.AVAILABLE, balance=20)
    assert world.keeper.quiet() == frozenset()
    world.network.moving = {ALICE: Movement(is_open=True)}
    assert world.keeper.quiet() == {ALICE}
    world.network.moving = {ALICE: Movement(reports=True)}
    assert world.keeper.quiet() == {ALICE}
    world.see(BOB, NodeStatus.PAUSED, balance=20)
    assert world.keeper.quiet() == {ALICE, BOB}
    world.network.moving = {}
    world.see(BOB, NodeStatus.AVAILABLE, balance=20)
    world.drains.add(everything=True)
    assert world.keeper.quiet() == {ALICE, BOB}


# --- what happens to accounts ---------------------------------------------------------------------


def test_a_kicked_account_joins_again_after_a_wait_and_says_so(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.keeper.standings.kicked(ALICE)
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert "was kicked out once; it joins again in 60 s" in alert
    world.begin()  # durable
    world.later(61)
    assert world.turn() == [("join", ALICE)]
    assert world.keeper.alerts() == ()


def test_a_slash_stops_the_class_until_it_is_cleared(world: World) -> None:
    world.cards.append(gpu_of(CARD_2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.keeper.slashed(ALICE, KIND)
    world.ledger.mark_slashed(ALICE)
    world.see(ALICE, NodeStatus.QUIT, balance=1000)
    world.turn()
    assert world.turn() == [("pause", BOB)]
    world.see(BOB, NodeStatus.PAUSED, balance=20)
    world.begin()
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert f"{KIND.name} is stopped" in alert
    assert world.keeper.clear(Address("0x1")) == "unknown"
    assert world.keeper.clear(BOB) == "free"
    assert world.keeper.clear(ALICE) == "cleared"
    assert set(world.turn()) == {("join", ALICE), ("resume", BOB)}
    world.begin()
    assert world.keeper.alerts() == ()


def test_an_account_that_somebody_else_moved_is_left_alone_and_said(
    world: World, logs: list[Any]
) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.see(ALICE, NodeStatus.PAUSED, balance=20)
    world.later(STRANGE_SECONDS + 1)
    world.see(ALICE, NodeStatus.PAUSED, balance=20)
    world.begin()
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert ALICE in alert
    assert "did somebody else use its key?" in alert
    assert [entry["account"] for entry in logs if entry["event"] == "account_held"] == [ALICE]
    assert world.keeper.clear(ALICE) == "cleared"
    assert world.turn() == [("resume", ALICE)]


def test_a_thief_who_quits_an_account_gets_nothing_more(world: World, logs: list[Any]) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    # Quit, and the stake is not where it went back to: no event will explain that.
    world.see(ALICE, NodeStatus.QUIT, balance=0)
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert "420 wei are gone" in alert
    assert [entry["account"] for entry in logs if entry["event"] == "account_held"] == [ALICE]
    world.rounds(ALICE, NodeStatus.QUIT, 0, 2 * STRANGE_SECONDS)
    world.begin()
    world.rounds(ALICE, NodeStatus.QUIT, 0, 2 * STRANGE_SECONDS)


@pytest.mark.parametrize("found", [NodeStatus.QUIT, NodeStatus.PAUSED])
def test_what_somebody_else_did_is_never_undone_by_itself(world: World, found: NodeStatus) -> None:
    world.cards.append(gpu_of(CARD_2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    balance = 420 if found is NodeStatus.QUIT else 20
    for _ in range(3):
        world.rounds(ALICE, found, balance, STRANGE_SECONDS / 6)
        world.begin()
        world.see(BOB, NodeStatus.AVAILABLE, balance=20)
    world.rounds(ALICE, found, balance, STRANGE_SECONDS)
    (alert,) = world.keeper.alerts()
    assert "did somebody else use its key?" in alert


def test_what_the_account_was_funded_with_and_lost_is_not_paid_again(world: World) -> None:
    world.see(ALICE, NodeStatus.QUIT)
    world.turn()
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]
    world.network.moving = {ALICE: Movement(block=101, paid_block=101)}
    # It came, and somebody took it before it was ever seen.
    world.see(ALICE, NodeStatus.QUIT, balance=0, at=102)
    assert world.turn() == []
    (alert,) = world.keeper.alerts()
    assert "420 wei are gone" in alert


def test_what_was_asked_for_and_refused_is_nobodys_theft(world: World) -> None:
    world.see(ALICE, NodeStatus.QUIT)
    world.turn()
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]
    # Nothing of it came to be, so it is paid again.
    world.see(ALICE, NodeStatus.QUIT)
    assert world.turn() == [("transfer", TREASURY, ALICE, 420, "fund")]
    world.network.moving = {ALICE: Movement(block=101, paid_block=101)}
    world.see(ALICE, NodeStatus.QUIT, balance=420, at=101)
    assert world.turn() == [("join", ALICE)]
    world.see(ALICE, NodeStatus.QUIT, balance=419, at=102)
    assert world.turn() == [("join", ALICE)]
    assert world.keeper.alerts() == ()


def test_a_sweep_is_nobodys_theft(tmp_path: Path) -> None:
    policy = replace(POLICY, beneficiary=OWNER, sweep_above=Wei(50))
    world = World(tmp_path, FleetSettings(policy))
    world.see(ALICE, NodeStatus.BUSY, balance=1000)
    world.turn()
    assert world.turn() == [("transfer", ALICE, OWNER, 980, "sweep")]
    world.see(ALICE, NodeStatus.BUSY, balance=18)
    assert world.keeper.alerts() == ()


def test_a_kick_that_is_seen_before_it_is_heard_of_waits_all_the_same(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.rounds(ALICE, NodeStatus.QUIT, 420, 10)
    assert world.keeper.standings.kicked(ALICE, 100)
    assert not world.keeper.standings.kicked(ALICE, 100), "the same one, heard of twice"
    world.rounds(ALICE, NodeStatus.QUIT, 420, 40)
    (alert,) = world.keeper.alerts()
    assert "was kicked out once" in alert
    world.later(20)
    world.see(ALICE, NodeStatus.QUIT, balance=420)
    assert world.turn() == [("join", ALICE)]


def test_a_look_that_is_older_than_what_was_heard_says_nothing(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.keeper.standings.kicked(ALICE, 105)
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20, at=104)
    world.see(ALICE, NodeStatus.QUIT, balance=420, at=105)
    world.later(STRANGE_SECONDS + 1)
    world.see(ALICE, NodeStatus.QUIT, balance=420, at=106)
    assert world.turn() == [("join", ALICE)]


def test_as_long_as_not_all_is_known_an_account_is_doubted_and_not_held(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    facts = AccountFacts(ALICE, NodeStatus.QUIT, None, Wei(0), Wei(0), 0, None)
    view = AccountView(110, Timestamp(world.clock()), facts, ())
    world.views[ALICE] = view
    assert world.keeper.standings.puzzled(view)
    for _ in range(2):
        world.keeper.standings.looked(view, sure=False)
        world.later(STRANGE_SECONDS / 2)
        assert world.keeper.alerts() == ()
        assert world.turn() == []
    world.later(STRANGE_SECONDS / 2)
    (alert,) = world.keeper.alerts()
    assert "not all that the network did to it could be read" in alert
    assert world.keeper.slashed(ALICE, KIND, 108)
    assert not world.keeper.standings.puzzled(view)
    world.keeper.standings.looked(view)
    (alert,) = world.keeper.alerts()
    assert "is stopped" in alert
    assert alert.endswith(f"crynux-cluster fleet clear {ALICE}")


@pytest.mark.parametrize("fails", ["mark_slashed", "set_cursor"])
def test_a_slash_is_told_once_and_a_crash_while_it_is_written_down_does_not_lose_it(
    world: World, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    with monkeypatch.context() as patch:
        patch.setattr(world.journal, fails, _broken)
        with pytest.raises(OSError, match="the disk is gone"):
            world.keeper.slashed(ALICE, KIND, 108)
    world.begin()
    # The event is told again, for it was not dealt with.
    assert world.keeper.slashed(ALICE, KIND, 108)
    assert world.ledger.slashed == {ALICE}
    assert not world.keeper.slashed(ALICE, KIND, 108)
    # The operator has seen to it: what is told once more is an old story.
    assert world.keeper.clear(ALICE) == "cleared"
    assert not world.keeper.slashed(ALICE, KIND, 108)
    assert world.ledger.slashed == set()


def _broken(*_: object) -> None:
    raise OSError("the disk is gone")


def test_what_is_found_while_a_plan_is_made_stops_its_action(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=1)
    world.turn()
    world.later(TREASURY_SECONDS + 1)

    def meanwhile(method: str) -> None:
        if method == "balance":
            world.see(ALICE, NodeStatus.PAUSED, balance=1)

    world.network.before = meanwhile
    assert world.turn() == []


# --- cards, slots and load ------------------------------------------------------------------------


def test_accounts_of_cards_that_left_are_paused_only_after_a_while(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.later(world.settings.patience + 1)
    world.turn()
    world.cards = [replace(gpu_of(CARD), state=GpuState.UNREACHABLE)]
    assert world.turn() == []
    world.later(world.settings.patience - 1)
    assert world.turn() == []
    world.later(2)
    assert world.turn() == [("pause", ALICE)]
    world.see(ALICE, NodeStatus.PAUSED, balance=20)
    world.cards = [gpu_of(CARD)]
    assert world.turn() == [("resume", ALICE)]


def test_a_term_that_doesnt_know_the_cluster_yet_pauses_nobody(world: World) -> None:
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.cards = []
    world.begin()
    for _ in range(3):
        assert world.turn() == []
        world.later(world.settings.patience / 3 - 1)
    world.later(10)
    assert world.turn() == [("pause", ALICE)]


def test_more_slots_want_more_accounts(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.PAUSED, balance=20)
    world.turn()
    assert set(world.turn()) == {("resume", ALICE), ("resume", BOB)}
    (shown,) = world.keeper.view.classes
    assert (shown.slots, shown.least) == (2, 2)


@pytest.mark.parametrize(("name", "least"), [(KIND.name, 2), ("Other+docker", 1)])
def test_cards_of_a_name_may_have_slots_of_their_own(tmp_path: Path, name: str, least: int) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=1, slots_by_name={name: 2}))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.PAUSED, balance=20)
    world.turn()
    assert len(world.turn()) == least
    (shown,) = world.keeper.view.classes
    assert (shown.slots, shown.least) == (least, least)


def paid(world: World, number: int, account: Address, compute: float, network: float) -> None:
    """A task of the account that was paid, as its record tells."""
    task = Commitment(f"0x{number:064x}")
    began, ledger = world.clock.now, world.ledger
    ledger.append(task, Seen(account, TaskType.SD, (), Wei(5)))
    ledger.append(task, ParametersFetched("{}"))
    ledger.append(task, AttemptStarted(AttemptId("a1"), CARD))
    world.later(compute)
    ledger.append(task, ResultStored(AttemptId("a1"), SCORE, ()))
    world.later(network)
    ledger.append(task, Closed(Outcome.SUCCESS, Wei(5)))
    assert world.clock.now - began == compute + network


def test_slots_that_were_measured_last_over_restarts(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=None))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    for number in range(FEW):
        paid(world, number, ALICE, compute=10.0, network=3.0)
    for _ in range(3):
        assert world.turn() == []
        assert [each.slots for each in world.keeper.view.classes] == [2]
        world.begin()
        # Long enough to be sure which cards there are.
        world.turn()
        world.later(world.settings.patience + 1)


def test_as_long_as_slots_werent_measured_nobody_is_paused_for_want_of_them(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=None))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.later(world.settings.patience + 1)
    assert world.turn() == []
    # Where no card is left they are.
    world.cards = []
    world.turn()
    world.later(world.settings.patience + 1)
    assert world.turn() == [("pause", ALICE), ("pause", BOB)]


def test_what_was_measured_is_one_slot_and_pauses_the_others(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=None))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    for number in range(FEW):
        paid(world, number, ALICE, compute=100.0, network=2.0)
    assert world.turn() == [("pause", BOB)]


def test_a_queue_that_would_miss_its_deadlines_pauses_an_account(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.later(world.settings.patience)
    deadline = Timestamp(world.clock() + 100)
    world.tasks = [
        Outstanding(ALICE, 45.0, deadline, TASK),
        Outstanding(BOB, 45.0, deadline, OTHER),
    ]
    assert world.turn() == [("pause", BOB)]
    world.see(BOB, NodeStatus.PAUSED, balance=20)
    # It lasts over a restart, and longer than what waited.
    world.begin()
    world.tasks = []
    assert world.turn() == []
    world.later(world.settings.patience)
    assert world.turn() == []
    world.later(WINDOW_SECONDS - 1)
    world.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    assert world.turn() == []
    world.later(2)
    assert world.turn() == [("resume", BOB)]


def test_what_is_urgent_and_nearly_done_makes_no_task_behind_it_late(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.later(world.settings.patience)
    now = world.clock()
    world.tasks = [
        Outstanding(ALICE, 5.0, Timestamp(now + 60), TASK),
        Outstanding(BOB, 60.0, Timestamp(now + 175), OTHER),
    ]
    assert world.turn() == []


def test_what_waits_for_a_card_that_is_begun_anew_pauses_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, FleetSettings(POLICY, slots=2))
    world.cards.append(gpu_of(CARD_2))
    for account in (ALICE, BOB):
        world.see(account, NodeStatus.AVAILABLE, balance=20)
    world.turn()
    world.later(world.settings.patience)
    world.turn()
    deadline = Timestamp(world.clock() + 100)
    world.tasks = [Outstanding(a, 60.0, deadline, t) for a, t in ((ALICE, TASK), (BOB, OTHER))]
    world.cards = [gpu_of(CARD)]
    assert world.turn() == []
    world.cards = []
    world.begin()
    assert world.turn() == []


def test_drained_is_drained_until_it_is_ended(world: World) -> None:
    world.see(ALICE, NodeStatus.BUSY, balance=20)
    world.turn()
    world.drains.add(everything=True)
    assert world.turn() == [("pause", ALICE)]
    world.see(ALICE, NodeStatus.PENDING_PAUSE, balance=20)
    assert world.turn() == []
    world.see(ALICE, NodeStatus.PAUSED, balance=20)
    world.begin()
    assert world.drains.everything
    assert world.turn() == []
    world.drains.end()
    assert world.turn() == [("resume", ALICE)]


# --- where the operator says when -----------------------------------------------------------------


@pytest.fixture
def manual(tmp_path: Path) -> World:
    """With `fleet.auto: false`."""
    policy = replace(POLICY, beneficiary=OWNER, sweep_above=Wei(50))
    return World(tmp_path, FleetSettings(policy, automatic=False))


def test_by_hand_nothing_is_spent_and_nobody_joins_or_leaves(manual: World) -> None:
    manual.cards.append(gpu_of(CARD_2))
    manual.see(ALICE, NodeStatus.QUIT, balance=420)
    manual.see(BOB, NodeStatus.AVAILABLE, balance=500)
    for _ in range(3):
        assert manual.turn() == []
        manual.later(10)
    # What the chain says of an account is only written down.
    assert [each.address for each in manual.journal.assignments()] == [BOB]
    assert set(manual.keeper.view.plan) == {
        f"account 1 is for {KIND.name}",
        f"sweep 480 wei of {BOB} to {OWNER}",
    }


def test_by_hand_a_drain_and_its_end_are_carried_out_all_the_same(manual: World) -> None:
    manual.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    manual.turn()
    manual.drains.add(everything=True)
    assert manual.turn() == [("pause", ALICE)]
    manual.see(ALICE, NodeStatus.PAUSED, balance=20)
    assert manual.turn() == []
    manual.drains.end()
    assert manual.turn() == [("resume", ALICE)]


def test_by_hand_a_slashed_class_pauses_all_the_same(manual: World) -> None:
    manual.cards.append(gpu_of(CARD_2))
    for account in (ALICE, BOB):
        manual.see(account, NodeStatus.AVAILABLE, balance=20)
    manual.turn()
    manual.keeper.slashed(ALICE, KIND)
    assert ("pause", BOB) in manual.turn()


def test_by_hand_an_account_that_runs_dry_gets_gas_all_the_same(manual: World) -> None:
    manual.see(ALICE, NodeStatus.AVAILABLE, balance=1)
    manual.turn()
    assert manual.turn() == [("transfer", TREASURY, ALICE, 19, "gas")]


def test_applying_goes_on_after_the_coordinator_began_anew(manual: World) -> None:
    manual.see(ALICE, NodeStatus.QUIT, balance=420)
    manual.see(BOB, NodeStatus.QUIT)
    manual.keeper.apply()
    manual.begin()
    # As long as an account wasn't looked at, it can't be said that nothing is left.
    views = dict(manual.views)
    manual.views.clear()
    assert manual.turn() == []
    assert manual.keeper.view.unread == 2
    manual.views.update(views)
    manual.turn()
    assert manual.turn() == [("join", ALICE)]
    manual.see(ALICE, NodeStatus.AVAILABLE, balance=20)
    manual.turn()
    manual.begin()
    manual.see(ALICE, NodeStatus.QUIT, balance=420)
    manual.turn()
    assert manual.turn() == [], "it is applied no more"


def test_applying_ends_after_a_while_although_something_is_left(manual: World) -> None:
    manual.see(ALICE, NodeStatus.QUIT, balance=420)
    manual.keeper.apply()
    manual.turn()
    assert manual.turn() == [("join", ALICE)]
    # The network refuses it, again and again.
    manual.later(APPLY_SECONDS - 1)
    assert manual.turn() == [("join", ALICE)]
    manual.later(2)
    assert manual.turn() == []
