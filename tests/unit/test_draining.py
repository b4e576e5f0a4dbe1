"""Draining cards and machines: whose accounts pause, what moves, when it is done, what lasts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.fleet import FleetSettings
from actors.treasury import TREASURY_SECONDS
from cluster.core.ports import Movement
from cluster.core.record import AttemptFailed
from cluster.core.standing import STRANGE_SECONDS
from cluster.core.types import (
    Address,
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    NodeStatus,
)
from cluster.steering import Drain
from tests.unit.actor_fakes import ALICE, BOB, KIND, OTHER, START, TASK, until
from tests.unit.drain_world import POLICY, Site, card

A = GpuId("a-0")
LARGE = GpuClass("Large+docker", GigaBytes(80))
CAROL = Address("0x" + "cc" * 20)


@pytest.fixture
def two(tmp_path: Path) -> Site:
    """Two machines with a card each, an account for each of them."""
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b"))
    for account in (ALICE, BOB):
        site.see(account, NodeStatus.AVAILABLE)
    site.turn()
    return site


# --- accounts pause at once -----------------------------------------------------------------------


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize(("what", "name"), [("card", "b-0"), ("card", "GPU-b-0"), ("node", "b")])
def test_a_drained_cards_account_pauses_at_once(
    two: Site, settled: bool, what: str, name: str
) -> None:
    if settled:
        two.settle()
    assert two.drain(what, name).well
    assert two.turn() == [("pause", BOB)]
    two.see(BOB, NodeStatus.PAUSED)
    assert two.turn() == []


def test_a_card_that_vanished_is_still_waited_for_when_another_is_drained(two: Site) -> None:
    two.settle()
    two.house.pool.cards = [card("b-0", "b")]
    assert two.turn() == []
    two.drain("card", "b-0")
    assert two.turn() == [("pause", BOB)]
    two.see(BOB, NodeStatus.PAUSED)
    assert two.turn() == []
    two.later(two.settings.patience + 1)
    assert two.turn() == [("pause", ALICE)]


def test_a_card_that_doesnt_answer_is_not_waited_for_once_it_is_drained(two: Site) -> None:
    two.settle()
    broken = replace(card("b-0", "b"), state=GpuState.UNREACHABLE)
    two.house.pool.cards = [card("a-0", "a"), broken]
    assert two.turn() == []
    two.drain("card", "b-0")
    assert two.turn() == [("pause", BOB)]


def test_a_drained_card_costs_as_many_accounts_as_it_had(tmp_path: Path) -> None:
    """Also before it is measured how many that are."""
    settings = FleetSettings(POLICY, slots=None)
    accounts = {1: ALICE, 2: BOB, 3: CAROL, 4: Address("0x" + "dd" * 20)}
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b"), settings=settings, accounts=accounts)
    for account in accounts.values():
        site.see(account, NodeStatus.AVAILABLE)
    site.turn()
    site.drain("card", "b-0")
    assert len(site.turn()) == 2


def test_the_account_resumes_when_the_drain_has_ended(two: Site) -> None:
    two.drain("card", "b-0")
    two.turn()
    two.see(BOB, NodeStatus.PAUSED)
    assert two.turn() == []
    assert two.end_drain().well
    assert two.turn() == [("resume", BOB)]


# --- ending a part of it --------------------------------------------------------------------------


def test_one_of_two_drained_machines_comes_back_and_the_other_stays_out(two: Site) -> None:
    for node in ("a", "b"):
        two.drain("node", node)
    two.turn()
    for account in (ALICE, BOB):
        two.see(account, NodeStatus.PAUSED)
    assert two.turn() == []
    assert two.end_drain("node", "b").text.startswith("node b takes tasks again")
    states = {gpu.ray_node: gpu.state for gpu in two.house.pool.gpus()}
    assert states == {"a": GpuState.DRAINED, "b": GpuState.READY}
    assert len(two.turn()) == 1
    assert two.status.nodes == ("a",)
    assert two.end_drain("node", "b").kind == "nothing"


def test_a_drained_card_comes_back_by_either_of_its_names(two: Site) -> None:
    for typed, name in (("b-0", "GPU-b-0"), ("GPU-b-0", "b-0"), ("b-0", "b-0")):
        two.drain("card", typed)
        assert two.end_drain("card", name).kind == "done"
        assert {gpu.state for gpu in two.house.pool.gpus()} == {GpuState.READY}


def test_a_machine_that_ray_calls_otherwise_since_comes_back_by_its_new_name(two: Site) -> None:
    two.drain("node", "b")
    two.house.pool.cards = [card("a-0", "a"), card("b-0", "new")]
    assert two.house.pool.gpus()[-1].state is GpuState.DRAINED
    assert two.end_drain("node", "new").kind == "done"
    assert two.house.pool.gpus()[-1].state is GpuState.READY
    assert two.status.nodes == ()


def test_what_is_drained_otherwise_too_says_so(two: Site) -> None:
    two.drain("node", "b")
    two.drain("card", "b-0")
    for kind in ("done", "refused"):
        told = two.end_drain("card", "b-0")
        assert (told.kind, "its machine is drained, node b" in told.text) == (kind, True)
    two.drain("card", "b-0")
    assert "drained by themselves are b-0" in two.end_drain("node", "b").text
    two.drain()
    assert "everything is drained" in two.end_drain("card", "b-0").text
    assert two.end_drain("card", "nobody").kind == "unknown"
    assert two.end_drain().kind == "done"
    assert two.end_drain("card", "b-0").kind == "nothing"


# --- when it is done ------------------------------------------------------------------------------


def test_it_isnt_done_while_more_accounts_serve_than_the_other_cards_can(two: Site) -> None:
    two.settle()
    two.drain("node", "b")
    assert not two.status.done, "the accounts haven't been looked at since"
    two.turn()
    assert two.status.left == (f"1 account of {KIND.name} serves more than its other cards can",)
    two.moving(BOB)
    assert not two.status.done
    two.moving()
    two.see(BOB, NodeStatus.PAUSED)
    two.turn()
    assert two.status.done
    assert two.status.nodes == ("b",)


def test_accounts_of_another_class_are_not_the_drains_business(tmp_path: Path) -> None:
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b", LARGE))
    site.see(ALICE, NodeStatus.AVAILABLE)
    site.see(BOB, NodeStatus.PAUSED, kind=LARGE)
    site.turn()
    site.drain("card", "b-0")
    site.turn()
    site.house.pool.cards.pop(0)
    site.turn()
    assert site.status.done


def left_of(site: Site) -> dict[str, tuple[str, ...]]:
    return {f"{part.what} {part.name}": part.left for part in site.status.parts}


def test_each_that_is_drained_says_what_is_left_of_it_alone(tmp_path: Path) -> None:
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b", LARGE), card("b-1", "b", LARGE))
    site.see(ALICE, NodeStatus.AVAILABLE)
    site.see(BOB, NodeStatus.PAUSED, kind=LARGE)
    site.turn()

    async def run() -> None:
        site.compute(TASK, A, deadline=START + 100)
        await site.house.calm()
        await site.order(Drain(what="node", name="a"))
        await site.order(Drain(what="card", name="b-0"))
        assert all(left_of(site).values()), "the accounts haven't been looked at since"
        await site.keeper.turn()
        await site.dispatcher.stop()

    asyncio.run(run())
    too_many = f"1 account of {KIND.name} serves more than its other cards can"
    here = ("1 tasks are computed there", too_many)
    assert left_of(site) == {"card b-0": (), "node a": here}
    assert site.status.left == here
    assert not site.status.done
    site.drain()
    site.see(ALICE, NodeStatus.PAUSED)
    site.turn()
    assert left_of(site) == {"card b-0": (), "node a": here[:1]}


def test_after_a_restart_in_the_midst_of_it_its_not_done_either(two: Site) -> None:
    two.drain("card", "b-0")
    two.begin()
    two.house.pool.cards.pop()
    two.turn()
    assert two.status.left == (f"1 account of {KIND.name} serves more than its other cards can",)
    assert not two.status.done


# --- what lasts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "name"), [("card", "b-0"), ("node", "b")])
def test_a_drain_lasts_when_ray_gives_everything_new_names(two: Site, what: str, name: str) -> None:
    two.drain(what, name)
    two.begin()
    two.house.pool.cards = [
        replace(card("a-0", "n1"), gpu_id=GpuId("n1-0")),
        replace(card("b-0", "n2"), gpu_id=GpuId("n2-0")),
    ]
    states = {gpu.gpu_id: gpu.state for gpu in two.house.pool.gpus()}
    assert states == {"n1-0": GpuState.READY, "n2-0": GpuState.DRAINED}
    shown = two.status.cards if what == "card" else two.status.nodes
    assert shown == (name,), "as it was typed"


def test_a_card_of_a_drained_machine_that_shows_later_is_drained_for_good(two: Site) -> None:
    two.drain("node", "b")
    two.house.pool.cards.append(card("b-1", "b"))
    two.turn()
    two.begin()
    two.house.pool.cards[-1] = replace(card("b-1", "n2"), gpu_id=GpuId("n2-1"))
    assert two.house.pool.gpus()[-1].state is GpuState.DRAINED


def test_a_drain_that_an_older_version_wrote_is_read(two: Site) -> None:
    journal, lease = two.house.journal, two.house.ledger.lease
    journal.set_cursor(lease, "drain", '{"everything": false, "cards": ["b-0"], "nodes": ["a"]}')
    two.begin()
    assert {gpu.state for gpu in two.house.pool.gpus()} == {GpuState.DRAINED}
    assert two.status.cards == ("b-0",)


# --- moving what is computed ----------------------------------------------------------------------


def moved(site: Site, *tasks: tuple[Commitment, GpuId], **more: Any) -> set[Commitment]:
    """Of these tasks, each on its card of machine `a`, those that `--now` takes away."""

    async def run() -> None:
        for task, gpu in tasks:
            site.compute(task, gpu, **{"deadline": START + 100, **more})
        await site.house.calm()
        await site.order(Drain(what="node", name="a", now=True))
        await site.dispatcher.stop()

    asyncio.run(run())
    given_up = {
        task
        for task, _ in tasks
        if any(isinstance(event, AttemptFailed) for event in site.house.story(task))
    }
    assert {task for task in site.house.settled if task in given_up} == given_up
    return given_up


def test_what_is_computed_moves_where_another_card_can_have_it(tmp_path: Path) -> None:
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b"))
    assert moved(site, (TASK, A)) == {TASK}


@pytest.mark.parametrize(
    "other",
    [
        None,
        card("a-1", "a"),  # of the same machine
        replace(card("b-0", "b"), state=GpuState.UNREACHABLE),
        replace(card("b-0", "b"), state=GpuState.STARTING),
        card("b-0", "b", GpuClass("Small+docker", GigaBytes(2))),
    ],
)
def test_what_is_computed_stays_where_no_other_card_can_have_it(
    tmp_path: Path, other: Gpu | None
) -> None:
    site = Site(tmp_path, card("a-0", "a"), *([] if other is None else [other]))
    assert moved(site, (TASK, A)) == set()
    assert site.house.pool.called("cancel") == []


@pytest.mark.parametrize(("seconds", "moves"), [(10.0, True), (90.0, False)])
def test_what_would_be_late_elsewhere_stays(tmp_path: Path, seconds: float, moves: bool) -> None:
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b"))
    assert moved(site, (TASK, A), seconds=seconds) == ({TASK} if moves else set())


def test_a_card_takes_only_as_many_as_it_can_do_in_time(tmp_path: Path) -> None:
    site = Site(tmp_path, card("a-0", "a"), card("a-1", "a"), card("b-0", "b"))
    assert len(moved(site, (TASK, A), (OTHER, GpuId("a-1")), seconds=30.0)) == 1


def test_a_machine_that_hangs_is_waited_for_once_and_not_for_each_card(tmp_path: Path) -> None:
    cards = [card(f"{node}-{number}", node) for node in "ab" for number in range(2)]
    site = Site(tmp_path, *cards)

    async def run() -> None:
        site.compute(TASK, A, deadline=START + 100)
        site.compute(OTHER, GpuId("a-1"), deadline=START + 100)
        await site.house.calm()
        hangs = site.house.pool.gates["cancel"] = asyncio.Event()
        order = asyncio.create_task(site.order(Drain(what="node", name="a", now=True)))
        await until(lambda: site.house.pool.waiting == 2)
        hangs.set()
        assert (await order).well
        await site.dispatcher.stop()

    asyncio.run(run())
    assert set(site.house.settled) >= {TASK, OTHER}


def test_without_now_what_is_computed_is_finished_there(two: Site) -> None:
    async def run() -> None:
        two.compute(TASK, A, deadline=START + 100)
        await two.house.calm()
        await two.order(Drain(what="node", name="a"))
        await two.dispatcher.stop()

    asyncio.run(run())
    assert two.house.kinds() == ["Seen", "ParametersFetched", "AttemptStarted"]
    assert "1 tasks are computed there" in two.status.left


# --- draining everything --------------------------------------------------------------------------


def test_it_isnt_done_before_a_whole_turn_of_the_fleet(two: Site) -> None:
    for account in (ALICE, BOB):
        two.see(account, NodeStatus.PAUSED)
    two.drain()
    assert not two.status.done
    two.turn()
    assert two.status.done
    two.begin()
    assert not two.status.done
    two.turn()
    assert two.status.done


@pytest.mark.parametrize("status", [NodeStatus.QUIT, NodeStatus.PAUSED])
def test_it_isnt_done_while_something_is_on_its_way_for_an_account(
    two: Site, status: NodeStatus
) -> None:
    for account in (ALICE, BOB):
        two.see(account, status)
    two.drain()
    two.moving(BOB)
    two.turn()
    assert two.status.left == ("1 account is not paused yet",)
    # It came to be in a block that the last look is older than.
    two.network.moving = {BOB: Movement(block=101)}
    two.turn()
    assert not two.status.done
    two.see(BOB, status, at=101)
    two.turn()
    assert two.status.done


def test_what_was_heard_of_an_account_is_looked_at_before_it_counts_as_paused(two: Site) -> None:
    for account in (ALICE, BOB):
        two.see(account, NodeStatus.PAUSED)
    two.drain()
    two.stale.add(BOB)
    two.turn()
    assert not two.status.done
    two.stale.clear()
    assert two.status.done


@pytest.mark.parametrize(("what", "name"), [("everything", ""), ("card", "b-0")])
def test_a_plan_from_before_the_drain_wakes_nobody_after_it(
    tmp_path: Path, what: str, name: str
) -> None:
    accounts = {1: ALICE, 2: BOB, 3: CAROL}
    site = Site(tmp_path, card("a-0", "a"), card("b-0", "b"), card("b-1", "b"), accounts=accounts)
    site.see(ALICE, NodeStatus.PAUSED)
    site.see(BOB, NodeStatus.QUIT, balance=420)
    site.see(CAROL, NodeStatus.QUIT, balance=0)
    site.turn()
    site.later(TREASURY_SECONDS + 1)

    async def run() -> list[tuple[object, ...]]:
        site.network.gates["balance"] = asyncio.Event()
        turn = asyncio.create_task(site.turning())
        await site.house.calm_but_for(1)
        await site.order(Drain(what=what, name=name))  # type: ignore[arg-type]
        site.network.gates["balance"].set()
        return await turn

    assert asyncio.run(run()) == []
    # The next plan knows of it.
    woken = {call[0] for call in site.turn()}
    assert woken == (set() if what == "everything" else {"resume", "join"})


def test_an_account_that_is_left_alone_and_serves_is_named(two: Site) -> None:
    two.see(BOB, NodeStatus.PAUSED)
    two.later(STRANGE_SECONDS + 1)
    two.see(BOB, NodeStatus.PAUSED)
    two.see(ALICE, NodeStatus.PAUSED)
    two.see(BOB, NodeStatus.AVAILABLE)
    two.drain()
    two.turn()
    (left,) = two.status.left
    assert f"account {BOB} is held and serves" in left
    assert "fleet clear" in left
