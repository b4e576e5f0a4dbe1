"""Accounts to classes: as many as is wanted, within the budget, and nothing unknown is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.capacity import Target
from cluster.core.fleet import FleetPolicy, Plan, plan
from cluster.core.fleet_actions import (
    Assign,
    FleetAction,
    Fund,
    Join,
    Pause,
    Quit,
    Resume,
    Sweep,
    TopUp,
    UpdateVersion,
)
from cluster.core.node_accounts import NodeAccount
from cluster.core.ports import Refusal
from cluster.core.types import (
    AccountFacts,
    Address,
    GigaBytes,
    GpuClass,
    NodeStatus,
    Timestamp,
    Wei,
)

BIG = GpuClass("NVIDIA H100+docker", GigaBytes(80))
SMALL = GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
STAKE, RESERVE, LOW, GAS = 400, 10, 5, 20
RICH = STAKE + RESERVE
OWNER = Address("0xowner")
POLICY = FleetPolicy(Wei(STAKE), Wei(RESERVE), Wei(LOW), Wei(GAS))
SWEEPING = replace(POLICY, beneficiary=OWNER, sweep_above=Wei(100))
NOW = Timestamp(1000.0)


def account(
    index: int,
    status: NodeStatus | None = NodeStatus.QUIT,
    assigned: GpuClass | None = None,
    on_chain: GpuClass | None = None,
    balance: int = RICH,
    outdated: bool = False,
    **more: Any,
) -> NodeAccount:
    """An account; with status None its facts were not read yet."""
    address = Address(f"0x{index}")
    if status is None:
        return NodeAccount(index, address, assigned, None, **more)
    stake = 0 if status is NodeStatus.QUIT else STAKE
    facts = AccountFacts(
        address, status, on_chain, Wei(stake), Wei(balance), 0, None, outdated=outdated
    )
    return NodeAccount(index, address, assigned, facts, **more)


def serving(index: int, gpu_class: GpuClass, busy: bool = False, **more: Any) -> NodeAccount:
    status = NodeStatus.BUSY if busy else NodeStatus.AVAILABLE
    return account(index, status, gpu_class, gpu_class, **{"balance": GAS, **more})


def whole(
    wanted: dict[GpuClass, int | Target],
    *accounts: NodeAccount,
    policy: FleetPolicy = POLICY,
    treasury: int | None = 10_000,
) -> Plan:
    targets = {
        each: Target(count, count) if isinstance(count, int) else count
        for each, count in wanted.items()
    }
    money = None if treasury is None else Wei(treasury)
    return plan(targets, accounts, policy, money, NOW)


def planned(*arguments: Any, **more: Any) -> tuple[FleetAction, ...]:
    return whole(*arguments, **more).actions


def assign(index: int, gpu_class: GpuClass) -> Assign:
    return Assign(index, Address(f"0x{index}"), gpu_class)


def join(index: int, gpu_class: GpuClass) -> Join:
    return Join(Address(f"0x{index}"), gpu_class)


def fund(index: int, amount: int) -> Fund:
    return Fund(Address(f"0x{index}"), Wei(amount))


# --- joining --------------------------------------------------------------------------------------


def test_nothing_to_do_without_cards_or_accounts() -> None:
    assert planned({}) == ()
    assert planned({BIG: 0}, account(1)) == ()


def test_a_class_that_nobody_is_left_for_says_so() -> None:
    assert whole({BIG: 3}) == Plan(
        (), (), (f"{BIG.name} lacks an account: raise identity.accounts",)
    )


def test_free_accounts_are_assigned_by_index_to_the_largest_class_first() -> None:
    spare = [account(index) for index in (3, 1, 2, 4)]
    assert planned({SMALL: 2, BIG: 1}, *spare) == (
        assign(1, BIG),
        assign(2, SMALL),
        assign(3, SMALL),
    )


def test_an_assigned_account_joins_when_it_can_pay_and_is_funded_when_it_cant() -> None:
    assert planned({BIG: 1}, account(1, assigned=BIG)) == (join(1, BIG),)
    poor = account(1, assigned=BIG, balance=RICH - 1)
    assert planned({BIG: 1}, poor) == (fund(1, STAKE + GAS - RICH + 1),)


def test_who_can_pay_goes_before_who_must_be_funded() -> None:
    poor = account(1, assigned=BIG, balance=0)
    assert planned({BIG: 1}, poor, account(2, assigned=BIG)) == (join(2, BIG),)


def test_a_paused_account_resumes_before_another_joins() -> None:
    paused = account(2, NodeStatus.PAUSED, BIG, BIG, balance=GAS)
    assert planned({BIG: 1}, account(1, assigned=BIG), paused) == (Resume(Address("0x2")),)


def test_a_kicked_account_waits_before_it_joins_again() -> None:
    kicked = account(1, assigned=BIG, rejoin_at=Timestamp(NOW + 1))
    assert planned({BIG: 1}, kicked) == ()
    assert planned({BIG: 1}, replace(kicked, rejoin_at=NOW)) == (join(1, BIG),)


def test_a_slashed_account_is_neither_joined_nor_funded_nor_moved() -> None:
    slashed = account(1, assigned=BIG, barred=True)
    assert planned({BIG: 1}, slashed) == ()
    assert planned({BIG: 0, SMALL: 1}, slashed) == ()


# --- what the network refuses ---------------------------------------------------------------------


def refused(verb: str, reason: str = "Network is full", after: float = 60) -> dict[str, Refusal]:
    return {verb: Refusal(verb, reason, Timestamp(NOW + after))}


def test_what_was_refused_is_asked_for_again_only_after_a_while_and_said() -> None:
    full = account(1, assigned=BIG, refused=refused("join"))
    found = whole({BIG: 1}, full)
    assert found.actions == ()
    assert found.lacks == ("join of account 1 is refused: Network is full",)
    assert planned({BIG: 1}, replace(full, refused=refused("join", after=0))) == (join(1, BIG),)
    # Where nobody wants it, nobody has to hear of it.
    assert whole({BIG: 0}, full) == Plan()
    several = [account(n, assigned=BIG, refused=refused("join")) for n in (1, 2, 4)]
    (line,) = whole({BIG: 3}, *several).lacks
    assert line == "join of accounts 1, 2, 4 is refused: Network is full"


def test_nobody_is_funded_while_one_of_the_class_that_was_is_refused() -> None:
    full = account(1, assigned=BIG, refused=refused("join"))
    poor = account(2, assigned=BIG, balance=0)
    assert planned({BIG: 1}, full, poor) == ()
    assert planned({BIG: 2}, full, poor) == ()
    # Nor while it is tried again.
    again = account(1, assigned=BIG, moving=True, refused=refused("join", after=-1))
    assert planned({BIG: 2}, again, poor) == ()
    # But for what it has lost of its own by trying.
    poorer = replace(again, moving=False, facts=account(1, balance=RICH - 1).facts)
    assert planned({BIG: 2}, poorer, poor) == (fund(1, STAKE + GAS - RICH + 1),)
    assert planned({BIG: 2}, replace(poorer, refused=refused("join")), poor) == ()
    # What was refused to one that serves by now, or isn't to join, is an old story.
    for old in (
        serving(1, BIG, refused=refused("join")),
        replace(full, barred=True),
        replace(full, held=True),
        replace(full, rejoin_at=Timestamp(NOW + 9)),
    ):
        assert planned({BIG: 2}, old, poor) == (fund(2, STAKE + GAS),)
    # One that has its stake may try; another class has nothing to do with it.
    assert planned({BIG: 2}, full, account(2, assigned=BIG)) == (join(2, BIG),)
    other = account(2, assigned=SMALL, balance=0)
    assert planned({BIG: 1, SMALL: 1}, full, other) == (fund(2, STAKE + GAS),)


def test_another_is_paused_or_resumed_where_one_is_refused() -> None:
    stuck = serving(2, BIG, refused=refused("pause", "no"))
    found = whole({BIG: 1}, serving(1, BIG), stuck)
    assert found.actions == (Pause(Address("0x1")),)
    assert found.lacks == ("pause of account 2 is refused: no",)
    stuck = account(1, NodeStatus.PAUSED, BIG, BIG, balance=GAS, refused=refused("resume"))
    paused = account(2, NodeStatus.PAUSED, BIG, BIG, balance=GAS)
    assert planned({BIG: 1}, stuck, paused) == (Resume(Address("0x2")),)
    quitting = account(1, NodeStatus.PAUSED, SMALL, SMALL, refused=refused("quit"))
    assert planned({SMALL: 0, BIG: 1}, quitting) == ()
    low = serving(1, BIG, balance=0, refused=refused("gas"))
    assert whole({BIG: 1}, low).lacks == ("gas of account 1 is refused: Network is full",)
    earned = serving(1, BIG, balance=GAS + 101, refused=refused("sweep"))
    assert planned({BIG: 1}, earned, policy=SWEEPING) == ()
    poor = account(1, assigned=BIG, balance=0, refused=refused("fund"))
    assert planned({BIG: 1}, poor) == ()


# --- money ----------------------------------------------------------------------------------------


def test_the_treasury_pays_for_as_many_as_it_can_and_says_what_it_lacks() -> None:
    poor = [account(index, assigned=BIG, balance=0) for index in (1, 2)]
    found = whole({BIG: 2}, *poor, treasury=STAKE + GAS + RESERVE)
    assert found.actions == (fund(1, STAKE + GAS),)
    (line,) = found.lacks
    assert line.startswith(f"the treasury has {RESERVE} wei and needs {STAKE + GAS + RESERVE}")


def test_while_the_treasury_isnt_known_nobody_is_funded() -> None:
    assert whole({BIG: 1}, account(1, assigned=BIG, balance=0), treasury=None) == Plan()


def test_the_stakes_never_exceed_the_budget() -> None:
    policy = replace(POLICY, stake_budget=Wei(2 * STAKE))
    out = [account(index, assigned=BIG) for index in (2, 3, 4)]
    found = whole({BIG: 4}, serving(1, BIG), *out, policy=policy)
    assert found.actions == (join(2, BIG),)
    spent = f"{2 * STAKE} of {2 * STAKE} wei"
    assert found.limits == (f"the stake budget is spent, nobody joins: {spent}",)
    # An account that is joining, or that nobody has looked at, has its stake there already.
    for other in (account(2, assigned=BIG, moving=True), account(2, None, BIG)):
        assert planned({BIG: 4}, serving(1, BIG), other, out[1], policy=policy) == ()


def test_gas_is_topped_up_of_who_is_joined() -> None:
    low = serving(1, BIG, balance=LOW - 1)
    assert planned({BIG: 1}, low) == (TopUp(Address("0x1"), Wei(GAS - LOW + 1)),)
    assert planned({BIG: 1}, serving(1, BIG, balance=LOW)) == ()
    assert planned({BIG: 0}, account(1, assigned=BIG, balance=0)) == ()


def test_an_account_that_is_emptied_again_and_again_gets_no_more_gas() -> None:
    """A thief of its key takes less at a time than is called a robbery."""
    for beyond, sends in ((-2 * GAS, True), (0, True), (1, False)):
        for balance, lacks in ((0, 0), (LOW, 1)):
            # What it has yet isn't gone.
            gone = Wei(2 * GAS + balance + beyond)
            emptied = serving(1, BIG, gas_gone=gone, balance=balance, lacks=Wei(lacks))
            found = whole({BIG: 1}, emptied)
            assert any(isinstance(each, TopUp) for each in found.actions) is sends
            told = any("does somebody else use its key?" in line for line in found.lacks)
            assert told is not sends
    # One that has gas is nobody's business.
    assert whole({BIG: 1}, serving(1, BIG, gas_gone=Wei(9 * GAS))).lacks == ()


def test_the_stake_that_one_who_is_out_has_yet_is_no_gas() -> None:
    """It waits for its join's gas, and what it was sent for gas before is gone."""
    more: dict[str, Any] = {"lacks": Wei(1), "gas_gone": Wei(2 * GAS + 1)}
    joining = account(1, assigned=BIG, balance=STAKE, moving=True, **more)
    (line,) = whole({BIG: 1}, joining).lacks
    assert "does somebody else use its key?" in line


def test_a_robbed_account_that_was_to_join_is_replaced() -> None:
    """Its join waits for money that won't come: it counts as nobody, but its stake counts, which
    may yet be taken."""
    robbed = account(1, assigned=BIG, balance=0, moving=True, held=True, lacks=Wei(STAKE))
    other = account(2, assigned=BIG, balance=STAKE + GAS)
    assert planned({BIG: 1}, robbed, other) == (Join(other.address, BIG),)
    one = replace(POLICY, stake_budget=Wei(STAKE))
    found = whole({BIG: 1}, robbed, other, policy=one)
    assert found.actions == ()
    assert found.limits == (f"the stake budget is spent, nobody joins: {STAKE} of {STAKE} wei",)


def test_stakes_above_a_budget_that_was_lowered_are_told() -> None:
    lowered = replace(POLICY, stake_budget=Wei(STAKE))
    both = (serving(1, BIG), serving(2, BIG))
    found = whole({BIG: 2}, *both, policy=lowered)
    assert found.actions == ()
    (line,) = found.limits
    assert line == f"the stake budget is spent, nobody joins: {2 * STAKE} of {STAKE} wei"
    assert whole({BIG: 2}, *both, policy=replace(lowered, stake_budget=Wei(2 * STAKE))).limits == ()


def test_one_that_leaves_for_good_and_may_not_is_told() -> None:
    for found, verb in (
        (serving(1, BIG), "pause"),
        (account(1, NodeStatus.PAUSED, BIG, BIG, GAS), "quit"),
    ):
        refused = {verb: Refusal(verb, "not now", Timestamp(NOW + 1))}
        leaver = replace(found, retired=True, refused=refused)
        whole_plan = whole({BIG: 0}, leaver)
        assert whole_plan.actions == ()
        assert whole_plan.lacks == (f"{verb} of account 1 is refused: not now",)


def test_earnings_beyond_the_threshold_go_to_the_beneficiary() -> None:
    earned = serving(1, BIG, balance=GAS + 101)
    assert planned({BIG: 1}, earned, policy=SWEEPING) == (Sweep(Address("0x1"), OWNER, Wei(101)),)
    assert planned({BIG: 1}, earned) == ()
    assert planned({BIG: 1}, serving(1, BIG, balance=GAS + 100), policy=SWEEPING) == ()
    # Nobody pays itself.
    itself = replace(SWEEPING, beneficiary=earned.address)
    assert planned({BIG: 1}, earned, policy=itself) == ()
    # One that is out keeps its next stake.
    out = account(1, assigned=BIG, balance=STAKE + GAS + 101)
    assert planned({BIG: 0}, out, policy=SWEEPING) == (Sweep(Address("0x1"), OWNER, Wei(101)),)
    assert planned({BIG: 0}, account(1, balance=STAKE + GAS), policy=SWEEPING) == ()


def test_who_joined_with_another_version_says_the_new_one_while_it_is_joined() -> None:
    for old in (
        serving(1, BIG, outdated=True),
        serving(1, BIG, busy=True, outdated=True),
        account(1, NodeStatus.PAUSED, BIG, BIG, balance=GAS, outdated=True),
    ):
        assert planned({}, old) == (UpdateVersion(Address("0x1")),)
        assert planned({}, replace(old, moving=True)) == ()
        assert planned({}, replace(old, refused=refused("version"))) == ()
        assert planned({}, replace(old, doubtful=True)) == ()
    for status in (NodeStatus.QUIT, NodeStatus.PENDING_QUIT):
        assert planned({}, account(1, status, BIG, BIG, outdated=True)) == ()
    # What it stands for goes before, and so does the gas for it.
    assert planned({BIG: 0}, serving(1, BIG, outdated=True)) == (Pause(Address("0x1")),)
    poor = serving(1, BIG, balance=0, outdated=True)
    assert isinstance(planned({BIG: 1}, poor)[0], TopUp)


# --- pausing and moving ---------------------------------------------------------------------------


def test_surplus_accounts_pause_the_free_ones_first() -> None:
    members = [serving(1, BIG), serving(2, BIG, busy=True), serving(3, BIG), serving(4, BIG)]
    assert planned({BIG: 2}, *members) == (Pause(Address("0x3")), Pause(Address("0x4")))
    assert planned({BIG: 0}, *members) == tuple(Pause(Address(f"0x{n}")) for n in (1, 2, 3, 4))


def test_between_least_and_most_nothing_is_done() -> None:
    members = [serving(1, BIG), serving(2, BIG), account(3, NodeStatus.PAUSED, BIG, BIG)]
    assert planned({BIG: Target(1, 2)}, *members) == ()


def test_what_is_pending_is_waited_for() -> None:
    pausing = account(1, NodeStatus.PENDING_PAUSE, BIG, BIG, balance=GAS)
    quitting = account(2, NodeStatus.PENDING_QUIT, BIG, BIG, balance=GAS)
    assert planned({BIG: 2}, pausing, quitting) == ()
    assert planned({BIG: 0}, pausing, quitting) == ()


def test_nobody_is_funded_or_joined_for_one_that_can_resume_in_a_moment() -> None:
    pausing = account(1, NodeStatus.PENDING_PAUSE, BIG, BIG, balance=GAS)
    resuming = account(1, NodeStatus.PAUSED, BIG, BIG, balance=GAS, moving=True)
    for out in (account(2, assigned=BIG), account(2, assigned=BIG, balance=0)):
        for coming in (pausing, resuming):
            assert planned({BIG: 1}, coming, out) == ()
            assert planned({BIG: 2}, coming, out) != ()
            # One that nothing may be done for can't.
            assert planned({BIG: 1}, replace(coming, held=True), out) != ()
            # Nor is one that serves paused for it.
            assert planned({BIG: 1}, coming, serving(3, BIG)) == ()


def test_a_class_that_lacks_an_account_gets_one_of_a_class_that_has_too_many() -> None:
    paused = account(1, NodeStatus.PAUSED, SMALL, SMALL, balance=GAS)
    assert planned({SMALL: 0, BIG: 1}, paused) == (Quit(Address("0x1")),)
    out = account(1, assigned=SMALL)
    assert planned({SMALL: 0, BIG: 1}, out) == (assign(1, BIG),)
    assert planned({SMALL: 1, BIG: 1}, replace(paused)) == (Resume(Address("0x1")),)
    # Where one that is spare will do, nobody moves.
    assert planned({SMALL: 0, BIG: 1}, paused, account(2)) == (assign(2, BIG),)
    # A card that may come back keeps its account.
    assert planned({SMALL: Target(0, 1), BIG: 1}, paused) == ()


def test_no_more_leave_their_class_than_another_lacks_while_one_is_on_its_way() -> None:
    paused = [account(n, NodeStatus.PAUSED, SMALL, SMALL, GAS) for n in (1, 2, 3)]
    wanted = {BIG: 1, SMALL: 0}
    assert planned(wanted, *paused) == (Quit(Address("0x1")),)
    leaving = replace(paused[0], moving=True)
    assert planned(wanted, leaving, *paused[1:]) == ()
    pending = account(1, NodeStatus.PENDING_QUIT, SMALL, SMALL, GAS)
    assert planned(wanted, pending, *paused[1:]) == ()
    assert planned({BIG: 2, SMALL: 0}, leaving, *paused[1:]) == (Quit(Address("0x2")),)
    out = account(1, NodeStatus.QUIT, SMALL)
    assert planned(wanted, out, *paused[1:]) == (assign(1, BIG),)


@pytest.mark.parametrize("treasury", [100, 10_000])
@pytest.mark.parametrize("budget", [None, Wei(2 * STAKE)])
def test_stakes_that_lie_idle_go_to_a_class_that_can_get_no_others(
    budget: Wei | None, treasury: int
) -> None:
    idle = [account(n, NodeStatus.PAUSED, SMALL, SMALL, GAS) for n in (1, 2)]
    empty = [account(n, balance=0) for n in (3, 4)]
    chain = Chain({each.address: each for each in (*idle, *empty)}, treasury)
    policy = replace(POLICY, stake_budget=budget)
    for wanted, rests in ((BIG, SMALL), (SMALL, BIG), (BIG, SMALL)):
        settle(chain, {wanted: Target(2, 2), rests: Target(0, 0)}, policy)
        assert (chain.serve(wanted), chain.serve(rests)) == (2, 0)


def test_no_more_give_up_their_stakes_than_are_wanted() -> None:
    idle = [account(n, NodeStatus.PAUSED, SMALL, SMALL, GAS) for n in (1, 2)]
    lacking = account(3, assigned=BIG)
    policy = replace(POLICY, stake_budget=Wei(2 * STAKE))
    wanted = {BIG: 1, SMALL: 0}
    assert planned(wanted, *idle, lacking, policy=policy) == (Quit(Address("0x1")),)
    leaving = replace(idle[0], moving=True)
    assert planned(wanted, leaving, idle[1], lacking, policy=policy) == ()
    poor = replace(lacking, facts=account(3, balance=0).facts)
    assert planned(wanted, *idle, poor, treasury=None) == ()  # it may have enough
    kept = {BIG: 1, SMALL: Target(0, 2)}
    assert planned(kept, *idle, lacking, policy=policy) == ()


def test_a_class_gives_up_no_more_than_it_has_too_many() -> None:
    """One for a class that nobody is left for; the money of another would be the second."""
    asleep = [
        account(n, NodeStatus.PAUSED, SMALL, SMALL, GAS, refused=refused("resume")) for n in (1, 2)
    ]
    poor = [account(n, assigned=BIG, balance=0) for n in (3, 4)]
    wanted: dict[GpuClass, int | Target] = {BIG: 3, SMALL: 1}
    assert planned(wanted, *asleep, *poor, treasury=0) == (Quit(Address("0x1")),)
    leaving = replace(asleep[0], moving=True)
    assert planned(wanted, leaving, asleep[1], *poor, treasury=0) == ()
    assert planned(wanted | {SMALL: 0}, leaving, asleep[1], *poor, treasury=0) == (
        Quit(Address("0x2")),
    )


def test_gas_comes_also_to_what_is_on_its_way_and_may_wait_for_it() -> None:
    """A pause that the account can't pay for would else be on its way for ever."""
    low = serving(1, BIG, balance=0, moving=True)
    assert planned({BIG: 1}, low) == (TopUp(Address("0x1"), Wei(GAS)),)
    assert planned({BIG: 1}, replace(low, paying=True)) == ()


def test_what_a_write_needs_beyond_the_usual_is_paid_wherever_the_account_stands() -> None:
    for short in (
        serving(1, BIG, balance=LOW, moving=True, lacks=Wei(2)),
        account(1, assigned=BIG, balance=RICH, moving=True, lacks=Wei(2)),
        account(1, NodeStatus.PAUSED, BIG, BIG, balance=GAS, moving=True, lacks=Wei(2)),
        serving(1, BIG, balance=LOW, lacks=Wei(2)),  # a task's write
    ):
        assert planned({BIG: 1}, short)[-1] == TopUp(Address("0x1"), Wei(GAS + 2))
        assert not any(isinstance(a, TopUp) for a in planned({}, replace(short, paying=True)))
        assert planned({}, replace(short, held=True)) == ()
    # More than any gas is its stake, and somebody took that.
    assert planned({}, account(1, assigned=BIG, moving=True, lacks=Wei(STAKE))) == ()
    assert planned({}, account(1, assigned=BIG, barred=True, lacks=Wei(2))) == ()


@pytest.mark.parametrize("more", [{"moving": True, "paying": True}, {"held": True}])
def test_what_is_on_its_way_or_held_is_left_alone(more: dict[str, Any]) -> None:
    for left in (
        account(1, assigned=BIG, **more),
        serving(1, BIG, balance=0, **more),
        account(1, NodeStatus.PAUSED, BIG, BIG, **more),
    ):
        for wanted in (0, 1):
            assert planned({BIG: wanted}, left) == ()


@pytest.mark.parametrize("status", [NodeStatus.QUIT, NodeStatus.PAUSED, NodeStatus.PENDING_QUIT])
def test_an_account_in_doubt_may_serve_so_nobody_takes_its_place(status: NodeStatus) -> None:
    on_chain = None if status is NodeStatus.QUIT else BIG
    doubted = account(1, status, BIG, on_chain, doubtful=True)
    out = account(2, assigned=BIG)
    assert planned({BIG: 1}, doubted, out) == ()
    assert planned({BIG: 2}, doubted, out) == (join(2, BIG),)
    # Nor is another paused for what may not even serve.
    assert planned({BIG: 1}, doubted, serving(2, BIG)) == ()
    # Its stake may be there still.
    policy = replace(POLICY, stake_budget=Wei(STAKE))
    assert planned({BIG: 2}, doubted, out, policy=policy) == ()
    # Held, it is the operator's, and another takes its place.
    assert planned({BIG: 1}, replace(doubted, held=True), out) == (join(2, BIG),)


def test_what_the_chain_says_goes_before_what_was_written_down() -> None:
    moved = serving(1, BIG, balance=GAS)
    assert planned({BIG: 1}, replace(moved, assigned=SMALL)) == (assign(1, BIG),)


# --- whatever there is ----------------------------------------------------------------------------

CLASSES = st.sampled_from([BIG, SMALL])
ACCOUNTS = st.lists(
    st.builds(
        lambda *drawn: drawn,
        st.sampled_from([None, *NodeStatus]),
        st.none() | CLASSES,
        st.sampled_from([0, LOW, GAS, RICH, 1000]),
        st.sampled_from([(False, False), (True, False), (True, True)]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=7,
).map(
    lambda rows: [
        account(
            index,
            status,
            gpu_class,
            None if status in {None, NodeStatus.QUIT} else (gpu_class or BIG),
            balance,
            moving=moving[0],
            paying=moving[1],
            barred=barred,
            held=held,
            doubtful=doubtful,
        )
        for index, (status, gpu_class, balance, moving, barred, held, doubtful) in enumerate(
            rows, 1
        )
    ]
)
TARGETS = st.dictionaries(
    CLASSES, st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda t: Target(t[0], sum(t)))
)
POLICIES = st.sampled_from([POLICY, SWEEPING, replace(SWEEPING, stake_budget=Wei(3 * STAKE))])
MONEY = st.none() | st.integers(0, 3000).map(Wei)


def spent(actions: Iterable[FleetAction]) -> int:
    return sum(each.amount for each in actions if isinstance(each, Fund | TopUp))


@given(TARGETS, ACCOUNTS, POLICIES, MONEY)
def test_one_action_each_within_the_means_and_never_for_what_isnt_known(
    targets: dict[GpuClass, Target],
    accounts: list[NodeAccount],
    policy: FleetPolicy,
    treasury: Wei | None,
) -> None:
    found = plan(targets, accounts, policy, treasury, NOW).actions
    by_address = Counter(each.address for each in found)
    assert all(count == 1 for count in by_address.values())
    assert spent(found) <= (treasury or 0)
    known = {each.address: each for each in accounts}
    for action in found:
        there = known[action.address]
        assert there.facts is not None
        assert not there.doubtful
        if not isinstance(action, Assign):
            assert not there.held
            assert not there.paying or not isinstance(action, TopUp)
            assert not there.moving or isinstance(action, TopUp)
        if isinstance(action, Join | Fund | Resume):
            assert not there.barred
    if policy.stake_budget is not None:
        joining = sum(isinstance(each, Join | Fund) for each in found)
        staked = sum(
            STAKE
            for each in accounts
            if each.facts is None
            or each.facts.status is not NodeStatus.QUIT
            or (each.moving and not each.barred)
        )
        assert joining == 0 or staked + joining * STAKE <= policy.stake_budget


@dataclass
class Chain:
    """A network that does at once what is asked, except that busy accounts pause and quit later."""

    accounts: dict[Address, NodeAccount]
    treasury: int
    history: list[FleetAction] = field(default_factory=list)

    def apply(self, action: FleetAction) -> None:
        self.history.append(action)
        there = self.accounts[action.address]
        facts = there.facts
        assert facts is not None
        match action:
            case Assign(_, _, gpu_class):
                self.accounts[action.address] = replace(there, assigned=gpu_class)
                return
            case Fund(_, amount) | TopUp(_, amount):
                self.treasury -= amount
                facts = replace(facts, balance=Wei(facts.balance + amount))
            case Join(_, gpu_class):
                assert facts.balance >= STAKE
                facts = replace(
                    facts,
                    status=NodeStatus.AVAILABLE,
                    gpu_class=gpu_class,
                    stake=Wei(STAKE),
                    balance=Wei(facts.balance - STAKE),
                )
            case Pause():
                facts = replace(facts, status=NodeStatus.PAUSED)
            case Resume():
                facts = replace(facts, status=NodeStatus.AVAILABLE)
            case Quit():
                back = Wei(facts.balance + facts.stake)
                facts = replace(facts, status=NodeStatus.QUIT, stake=Wei(0), balance=back)
            case Sweep(_, _, amount):
                facts = replace(facts, balance=Wei(facts.balance - amount))
        self.accounts[action.address] = replace(there, facts=facts)

    def stakes(self) -> int:
        return sum(each.facts.stake for each in self.accounts.values() if each.facts)

    def serve(self, gpu_class: GpuClass) -> int:
        return sum(
            each.facts is not None
            and each.facts.status in {NodeStatus.AVAILABLE, NodeStatus.BUSY}
            and each.facts.gpu_class == gpu_class
            for each in self.accounts.values()
        )


def settle(chain: Chain, targets: dict[GpuClass, Target], policy: FleetPolicy) -> None:
    """Plan and apply until nothing is left to do."""
    for _ in range(40):
        accounts: Sequence[NodeAccount] = tuple(chain.accounts.values())
        found = plan(targets, accounts, policy, Wei(chain.treasury), NOW)
        if not found.actions:
            return
        for action in found.actions:
            chain.apply(action)
            if policy.stake_budget is not None:
                assert chain.stakes() <= policy.stake_budget
    raise AssertionError(chain.history[-6:])


@settings(max_examples=200)
@given(
    st.lists(st.dictionaries(CLASSES, st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(0, 6),
    st.sampled_from([None, 2 * STAKE, 4 * STAKE]),
)
def test_whatever_the_pool_becomes_it_settles_on_as_many_accounts_as_it_can(
    pools: list[dict[GpuClass, int]], count: int, budget: int | None
) -> None:
    chain = Chain(
        {Address(f"0x{n}"): account(n, balance=0) for n in range(1, count + 1)}, 100 * STAKE
    )
    policy = replace(POLICY, stake_budget=None if budget is None else Wei(budget))
    for pool in pools:
        wanted = {each: pool.get(each, 0) for each in (BIG, SMALL)}
        settle(chain, {each: Target(n, n) for each, n in wanted.items()}, policy)
        for gpu_class, most in wanted.items():
            assert chain.serve(gpu_class) <= most
        if budget is None:
            assert sum(map(chain.serve, wanted)) == min(count, sum(wanted.values()))
