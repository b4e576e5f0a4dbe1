"""Accounts to classes: as many as there are cards, and nothing that is unknown is touched."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.core.fleet import Assign, FleetAction, Join, NodeAccount, Resume, plan
from cluster.core.types import AccountFacts, Address, GigaBytes, GpuClass, NodeStatus, Wei

BIG = GpuClass("NVIDIA H100+docker", GigaBytes(80))
SMALL = GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
STAKE, GAS = Wei(400), Wei(10)
RICH = 410


def account(
    index: int,
    status: NodeStatus | None = NodeStatus.QUIT,
    assigned: GpuClass | None = None,
    on_chain: GpuClass | None = None,
    balance: int = RICH,
) -> NodeAccount:
    """An account; with status None its facts were not read yet."""
    address = Address(f"0x{index}")
    if status is None:
        return NodeAccount(index, address, assigned, None)
    facts = AccountFacts(address, status, on_chain, Wei(0), Wei(balance), 0, None)
    return NodeAccount(index, address, assigned, facts)


def planned(pool: dict[GpuClass, int], *accounts: NodeAccount) -> tuple[FleetAction, ...]:
    return plan(pool, accounts, STAKE, GAS)


def assign(index: int, gpu_class: GpuClass) -> Assign:
    return Assign(index, Address(f"0x{index}"), gpu_class)


def join(index: int, gpu_class: GpuClass) -> Join:
    return Join(Address(f"0x{index}"), gpu_class)


def test_nothing_to_do_without_cards_or_accounts() -> None:
    assert planned({}) == ()
    assert planned({BIG: 3}) == ()
    assert planned({BIG: 0}, account(1)) == ()


def test_free_accounts_are_assigned_by_index_to_the_largest_class_first() -> None:
    spare = [account(index) for index in (3, 1, 2, 4)]
    assert planned({SMALL: 2, BIG: 1}, *spare) == (
        assign(1, BIG),
        assign(2, SMALL),
        assign(3, SMALL),
    )


def test_an_assigned_account_joins_when_it_can_pay() -> None:
    assert planned({BIG: 2}, account(1, assigned=BIG)) == (join(1, BIG),)
    assert planned({BIG: 2}, account(1, assigned=BIG, balance=RICH - 1)) == ()


def test_a_poor_account_leaves_the_room_to_the_next() -> None:
    poor = account(1, assigned=BIG, balance=0)
    assert planned({BIG: 1}, poor, account(2, assigned=BIG)) == (join(2, BIG),)


def test_a_paused_account_resumes_before_another_joins() -> None:
    paused = account(2, NodeStatus.PAUSED, BIG, BIG, balance=0)
    assert planned({BIG: 1}, account(1, assigned=BIG), paused) == (Resume(Address("0x2")),)


def test_a_class_without_cards_resumes_and_joins_nobody() -> None:
    paused = account(2, NodeStatus.PAUSED, SMALL, SMALL)
    assert planned({BIG: 1}, account(1, assigned=SMALL), paused) == ()


def test_no_more_accounts_join_than_there_are_cards() -> None:
    serving = account(1, NodeStatus.BUSY, BIG, BIG)
    assert planned({BIG: 1}, serving, account(2, assigned=BIG)) == ()
    assert planned({BIG: 1}, serving, account(2)) == ()


def test_the_assignment_follows_the_chain() -> None:
    moved = account(1, NodeStatus.AVAILABLE, assigned=SMALL, on_chain=BIG)
    found = account(2, NodeStatus.PAUSED, on_chain=SMALL)
    assert planned({}, moved, found) == (assign(1, BIG), assign(2, SMALL))
    assert planned({BIG: 1, SMALL: 1}, moved, found, account(3)) == (
        assign(1, BIG),
        assign(2, SMALL),
    )


def test_what_an_account_was_before_it_quit_does_not_matter() -> None:
    assert planned({BIG: 1}, account(1, assigned=BIG, on_chain=SMALL)) == (join(1, BIG),)
    assert planned({BIG: 1}, account(1, on_chain=SMALL)) == (assign(1, BIG),)


def test_an_unknown_account_is_left_alone_and_counts_for_its_class() -> None:
    assert planned({BIG: 2}, account(1, None)) == ()
    unknown = account(1, None, assigned=BIG)
    assert planned({BIG: 1}, unknown, account(2), account(3, assigned=BIG)) == ()


classes = st.sampled_from([BIG, SMALL, GpuClass("NVIDIA A10+docker", GigaBytes(24))])
account_lists = st.lists(
    st.builds(
        account,
        index=st.integers(1, 30),
        status=st.none() | st.sampled_from(NodeStatus),
        assigned=st.none() | classes,
        on_chain=st.none() | classes,
        balance=st.sampled_from([0, RICH - 1, RICH, 1000]),
    ),
    max_size=12,
    unique_by=lambda a: a.index,
)
pools = st.dictionaries(classes, st.integers(0, 5))


@given(pools, account_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_accounts_does_not_matter(pool, accounts, chance) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(accounts)
    chance.shuffle(shuffled)
    assert planned(pool, *accounts) == planned(pool, *shuffled)


@given(pools, account_lists)
def test_the_plan_keeps_its_rules(pool: dict[GpuClass, int], accounts: list[NodeAccount]) -> None:
    by_address = {a.address: a for a in accounts}
    actions = planned(pool, *accounts)
    assert len({action.address for action in actions}) == len(actions)
    woken: Counter[GpuClass] = Counter()
    for action in actions:
        of = by_address[action.address]
        assert of.facts is not None
        match action:
            case Assign(_, _, gpu_class):
                assert gpu_class != of.assigned
            case Join(_, gpu_class):
                assert of.facts.status is NodeStatus.QUIT and of.assigned == gpu_class
                assert of.facts.balance >= STAKE + GAS
                woken[gpu_class] += 1
            case Resume():
                assert of.facts.status is NodeStatus.PAUSED and of.assigned is not None
                woken[of.assigned] += 1
    for a in accounts:
        if a.facts is not None and a.facts.status not in {NodeStatus.QUIT, NodeStatus.PAUSED}:
            serving = a.facts.gpu_class or a.assigned
            if serving is not None:
                woken[serving] += 1
    for gpu_class in {a.gpu_class for a in actions if isinstance(a, Join)}:
        assert woken[gpu_class] <= pool[gpu_class]


@given(pools, account_lists)
def test_repeated_plans_come_to_rest(
    pool: dict[GpuClass, int], accounts: list[NodeAccount]
) -> None:
    """Done as planned, turn after turn, the fleet ends full or out of accounts, and stays so."""
    now = {a.address: a for a in accounts}
    for _ in range(6):
        actions = planned(pool, *now.values())
        for action in actions:
            now[action.address] = _done(now[action.address], action)
    assert planned(pool, *now.values()) == ()


def _done(of: NodeAccount, action: FleetAction) -> NodeAccount:
    assert of.facts is not None
    match action:
        case Assign(_, _, gpu_class):
            return NodeAccount(of.index, of.address, gpu_class, of.facts)
        case Join(_, gpu_class):
            return account(of.index, NodeStatus.AVAILABLE, of.assigned, gpu_class)
        case Resume():
            return account(of.index, NodeStatus.AVAILABLE, of.assigned, of.facts.gpu_class)
