"""Accounts that go home: told to, or beyond what the configuration tends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.fleet import FleetSettings
from cluster.cli import main
from cluster.core.fleet_actions import BringHome, Join, Pause, Quit, TopUp
from cluster.core.types import Address, NodeStatus, Wei
from cluster.journal import Assignment
from cluster.steering import ClearAccount, Done, RetireAccount
from tests.unit.actor_fakes import ALICE, BOB, KIND
from tests.unit.drain_world import POLICY, TREASURY, Site, card
from tests.unit.test_config import MINIMAL
from tests.unit.test_fleet import (
    BIG,
    GAS,
    RESERVE,
    SMALL,
    STAKE,
    account,
    assign,
    planned,
    serving,
    whole,
)

ONE = Address("0x1")

# --- what is to be done ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "balance", "action"),
    [
        (NodeStatus.AVAILABLE, GAS, Pause(ONE)),
        (NodeStatus.BUSY, GAS, Pause(ONE)),
        (NodeStatus.PAUSED, GAS, Quit(ONE)),
        (NodeStatus.PENDING_PAUSE, GAS, None),
        (NodeStatus.PENDING_QUIT, GAS, None),
        (NodeStatus.QUIT, GAS + STAKE, BringHome(ONE, Wei(GAS + STAKE - RESERVE))),
        (NodeStatus.QUIT, RESERVE + 1, None),
        (NodeStatus.QUIT, 0, None),
        # What it still has to send costs gas.
        (NodeStatus.AVAILABLE, 1, TopUp(ONE, Wei(GAS - 1))),
        (NodeStatus.PENDING_QUIT, 1, TopUp(ONE, Wei(GAS - 1))),
    ],
)
def test_a_retired_account_pauses_quits_and_its_money_goes_home(
    status: NodeStatus, balance: int, action: object
) -> None:
    on_chain = None if status is NodeStatus.QUIT else BIG
    retired = account(1, status, BIG, on_chain, balance, retired=True)
    assert planned({BIG: 1}, retired) == (() if action is None else (action,))


@pytest.mark.parametrize("more", [{"moving": True}, {"held": True}])
def test_a_retired_account_that_moves_or_is_held_is_left_alone(more: dict[str, Any]) -> None:
    assert planned({}, serving(1, BIG, retired=True, **more)) == ()
    out = account(1, balance=GAS + STAKE, assigned=BIG, retired=True, **more)
    assert planned({}, out) == ()


def test_another_account_takes_a_retired_ones_place() -> None:
    assert set(planned({BIG: 1}, serving(1, BIG, retired=True), account(2))) == {
        Pause(ONE),
        assign(2, BIG),
    }
    paused = account(2, NodeStatus.PAUSED, BIG, BIG, GAS)
    resumed = planned({BIG: 1}, serving(1, BIG, retired=True), paused)
    assert [type(each).__name__ for each in resumed] == ["Pause", "Resume"]


def test_a_retired_account_is_never_assigned_funded_joined_resumed_or_moved() -> None:
    for status in NodeStatus:
        on_chain = None if status is NodeStatus.QUIT else SMALL
        for assigned in (None, SMALL, BIG):
            retired = account(1, status, assigned, on_chain, balance=1_000, retired=True)
            actions = planned({BIG: 2, SMALL: 2}, retired)
            assert all(isinstance(each, Pause | Quit | BringHome) for each in actions), (
                status,
                actions,
            )


def test_a_retired_accounts_stake_counts_until_it_is_free() -> None:
    policy = replace(POLICY, stake_budget=Wei(STAKE))
    other = account(2, assigned=BIG)
    found = whole({BIG: 1}, serving(1, BIG, retired=True), other, policy=policy)
    assert found.actions == (Pause(ONE),)
    found = whole({BIG: 1}, account(1, balance=RESERVE, retired=True), other, policy=policy)
    assert [type(each) for each in found.actions] == [Join]


def test_nobody_else_is_paused_for_a_retired_account() -> None:
    assert planned({BIG: 1}, serving(1, BIG), serving(2, BIG, retired=True)) == (
        Pause(Address("0x2")),
    )


# --- told to --------------------------------------------------------------------------------------


def order(site: Site, given: RetireAccount | ClearAccount) -> Done:
    return asyncio.run(site.order(given))


@pytest.mark.parametrize("automatic", [True, False])
def test_an_account_is_retired_for_good_until_it_is_cleared(
    tmp_path: Path, automatic: bool
) -> None:
    settings = FleetSettings(POLICY, automatic=automatic)
    site = Site(tmp_path, card("a-0"), settings=settings)
    site.see(ALICE, NodeStatus.AVAILABLE)
    site.see(BOB, NodeStatus.PAUSED)
    site.turn()
    assert "quits" in order(site, RetireAccount(account=ALICE.lower())).text
    assert order(site, RetireAccount(account=ALICE)).kind == "nothing"
    assert set(site.turn()) == {("pause", ALICE), ("resume", BOB)}
    site.see(ALICE, NodeStatus.PAUSED)
    site.see(BOB, NodeStatus.AVAILABLE)
    assert site.turn() == [("quit", ALICE)]
    site.see(ALICE, NodeStatus.QUIT, balance=430)
    site.begin()
    assert site.turn() == [("transfer", ALICE, TREASURY, 420, "home")]
    site.see(ALICE, NodeStatus.QUIT, balance=9)
    site.see(BOB, NodeStatus.QUIT, balance=0)
    assert not any(ALICE in call for call in site.turn())
    assert list(site.keeper.view.retired) == [ALICE]
    assert "cleared" in order(site, ClearAccount(account=ALICE)).text
    assert list(site.keeper.view.retired) == [ALICE], "as of the last plan"
    site.turn()
    assert list(site.keeper.view.retired) == []
    if automatic:
        site.see(ALICE, NodeStatus.QUIT, balance=420)
        assert ("join", ALICE) in site.turn()
    site.begin()
    site.turn()
    assert list(site.keeper.view.retired) == []


def test_nobody_elses_account_is_retired(tmp_path: Path) -> None:
    site = Site(tmp_path, card("a-0"))
    assert order(site, RetireAccount(account="0x" + "99" * 20)).kind == "unknown"


# --- beyond what is tended ------------------------------------------------------------------------


def beyond(tmp_path: Path, automatic: bool = True) -> Site:
    """Two accounts in use, one of which the configuration has no more."""
    site = Site(tmp_path, card("a-0"), card("a-1"))
    for index, address in ((1, ALICE), (2, BOB)):
        site.house.journal.assign(site.house.ledger.lease, Assignment(index, address, KIND))
        site.see(address, NodeStatus.AVAILABLE)
    site.settings = FleetSettings(POLICY, automatic=automatic, most_accounts=1)
    site.begin()
    return site


def test_an_account_beyond_the_configurations_quits_and_its_stake_goes_home(
    tmp_path: Path,
) -> None:
    site = beyond(tmp_path)
    assert site.turn() == [("pause", BOB)]
    site.see(BOB, NodeStatus.PAUSED)
    assert site.turn() == [("quit", BOB)]
    assert list(site.keeper.view.retired) == [BOB]
    site.see(BOB, NodeStatus.QUIT, balance=420)
    assert site.turn() == [("transfer", BOB, TREASURY, 410, "home")]
    refused = order(site, ClearAccount(account=BOB))
    assert refused.kind == "refused"
    assert "identity.accounts" in refused.text
    site.settings = FleetSettings(POLICY, most_accounts=2)
    site.begin()
    assert site.turn() == [("join", BOB)]


def test_by_hand_an_account_beyond_the_configurations_quits_at_a_word(tmp_path: Path) -> None:
    site = beyond(tmp_path, automatic=False)
    assert site.turn() == [("pause", BOB)]
    site.see(BOB, NodeStatus.PAUSED)
    assert site.turn() == []
    assert site.keeper.view.plan == (f"quit {BOB}",)
    assert order(site, RetireAccount(account=BOB)).well
    assert site.turn() == [("quit", BOB)]


def test_a_drain_waits_for_accounts_beyond_the_configurations_too(tmp_path: Path) -> None:
    site = beyond(tmp_path, automatic=False)
    site.see(ALICE, NodeStatus.PAUSED)
    site.drain()
    assert site.turn() == [("pause", BOB)]
    assert site.status.left == ("1 account is not paused yet",)


# --- as it is typed -------------------------------------------------------------------------------


def test_it_is_asked_for_by_the_accounts_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def perform(_config: object, order: object) -> str:
        asked.append(order)
        return "it leaves"

    monkeypatch.setattr("actors.client.perform", perform)
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)

    def run(account: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["fleet", "quit", account, "--config", str(file)])
        return int(ended.value.code or 0)

    assert run(ALICE) == 0
    assert asked == [RetireAccount(account=ALICE)]
    assert capsys.readouterr().out == "it leaves\n"
    assert run("3") == 2
    assert len(asked) == 1


def test_clearing_one_beyond_the_configurations_says_what_was_done(tmp_path: Path) -> None:
    site = beyond(tmp_path)
    refused = order(site, ClearAccount(account=BOB))
    assert (refused.kind, "raise it" in refused.text) == ("refused", True)
    site.keeper.slashed(BOB, KIND)
    done = order(site, ClearAccount(account=BOB))
    assert done.kind == "done"
    assert "is cleared; but" in done.text
    assert site.house.ledger.slashed == set()
