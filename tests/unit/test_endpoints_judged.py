"""Which endpoints are believed: by their heads, their chain, and the fork that they tell of."""

from __future__ import annotations

import pytest

from cluster.chain import health
from cluster.chain.answers import SEND
from cluster.chain.endpoints import CHECK_SECONDS
from cluster.core.errors import ChainError
from tests.unit.test_endpoints import HEAD, Node, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig([Node("a"), Node("b"), Node("c")])


async def test_one_that_lags_is_not_believed(rig: Rig) -> None:
    for node, head in zip(rig.nodes, (90, 100, 100), strict=True):
        node.head = head
    await rig.endpoints.check()
    assert rig.problems() == ["10 blocks behind", "", ""]
    assert await rig.ask() == "b"
    rig.nodes[0].head = 100
    rig.time.now += CHECK_SECONDS
    await rig.endpoints.check()
    assert await rig.ask() == "a"


@pytest.mark.parametrize("block_seconds", [0.25, 0.5, 1.0, 2.0, 12.0])
@pytest.mark.parametrize("count", [2, 3])
async def test_heads_that_move_make_none_that_is_healthy_lag(
    block_seconds: float, count: int
) -> None:
    """The first one's head is seen all the time, the others' only now and then."""
    rig = Rig([Node(name, block_seconds=block_seconds) for name in "abc"[:count]])
    began = rig.time.now
    while rig.time.now < began + 200:
        for node in rig.nodes:
            node.head = 100 + int((rig.time.now - began) / block_seconds)
        if (rig.time.now - began) % CHECK_SECONDS == 0:
            await rig.endpoints.check()
        await rig.endpoints.send(*HEAD)
        assert rig.problems() == [""] * count
        rig.time.now += 0.5


@pytest.mark.parametrize("after", range(16))
async def test_a_first_one_that_dies_costs_no_read(after: int) -> None:
    rig = Rig([Node("a"), Node("b")])
    began = rig.time.now
    while (passed := rig.time.now - began) < 60:
        for node in rig.nodes:
            node.head = 100 + int(passed / 2)
        rig.nodes[0].trouble = ChainError("gone") if passed >= 15 + after else None
        if passed % CHECK_SECONDS == 0:
            await rig.endpoints.check()
        await rig.endpoints.send(*HEAD)
        rig.time.now += 0.5


async def test_what_died_ahead_of_all_is_remembered_for_a_while_only() -> None:
    rig = Rig([Node("a", head=200), Node("b", head=100)])
    await rig.endpoints.check()
    assert rig.problems() == ["", "100 blocks behind"]
    rig.nodes[0].trouble = ChainError("gone")
    rig.time.now += CHECK_SECONDS
    await rig.endpoints.check()
    with pytest.raises(ChainError):
        await rig.ask()
    for _ in range(5):
        rig.time.now += CHECK_SECONDS
        await rig.endpoints.check()
    assert await rig.ask() == "b"


async def test_one_that_lags_a_little_is_asked_when_there_is_no_other(rig: Rig) -> None:
    for node, head in zip(rig.nodes, (110, 110, 100), strict=True):
        node.head = head
    await rig.endpoints.check()
    assert rig.problems() == ["", "", "10 blocks behind"]
    assert await rig.ask() == "a"
    rig.nodes[0].trouble = rig.nodes[1].trouble = ChainError("gone")
    assert await rig.ask() == "c"


async def test_one_alone_that_is_ahead_makes_no_liars_of_the_others(rig: Rig) -> None:
    rig.nodes[2].head = 10_000
    await rig.endpoints.check()
    assert rig.problems() == ["", "", ""]


async def test_a_head_says_nothing_after_a_while(rig: Rig) -> None:
    rig.nodes[0].head = 50
    await rig.endpoints.check()
    assert rig.problems()[0] == "50 blocks behind"
    rig.time.now += health.STALE_SECONDS + 1
    assert rig.problems() == [""] * 3


async def test_logs_are_asked_only_of_one_that_has_the_blocks(rig: Rig) -> None:
    def wanted(last: int) -> tuple[str, tuple[dict[str, str]]]:
        return "eth_getLogs", ({"fromBlock": "0x1", "toBlock": hex(last)},)

    first, second, third = rig.nodes
    await rig.endpoints.check()
    first.trouble = ChainError("gone")
    second.head, third.head = 102, 103
    assert (await rig.endpoints.send(*wanted(103)))["result"] == "c"
    assert "eth_getLogs" not in second.asked
    second.head = 103
    assert (await rig.endpoints.send(*wanted(103)))["result"] == "b"
    asked = len(second.asked)
    assert (await rig.endpoints.send(*wanted(103)))["result"] == "b"
    assert len(second.asked) == asked + 1, "its head is known"
    with pytest.raises(ChainError, match="has no such block"):
        await rig.endpoints.send(*wanted(104))


async def test_another_chain_is_never_asked(rig: Rig) -> None:
    rig.nodes[0].chain = 6
    await rig.endpoints.check()
    assert rig.problems() == ["serves chain 6", "", ""]
    assert await rig.ask() == "b"
    await rig.ask(SEND)
    assert SEND not in rig.nodes[0].asked
    rig.nodes[0].chain = 5
    await rig.endpoints.check()
    assert rig.problems() == [""] * 3


async def test_another_chain_stays_one_when_it_no_longer_says(rig: Rig) -> None:
    first = rig.nodes[0]
    first.chain = 6
    await rig.endpoints.check()
    first.error = {"code": -32603, "message": "no"}
    rig.time.now += CHECK_SECONDS
    await rig.endpoints.check()
    first.error = None
    assert await rig.ask() == "b"
    assert rig.problems()[0] == "serves chain 6"


async def test_one_on_a_fork_of_its_own_is_not_believed_until_it_is_back(rig: Rig) -> None:
    rig.nodes[0].fork = "b"
    await rig.endpoints.check()
    assert rig.problems() == ["tells of another fork", "", ""]
    assert await rig.ask() == "b"
    rig.nodes[0].fork = "a"
    await rig.endpoints.check()
    assert rig.problems() == [""] * 3


async def test_two_that_disagree_are_told_of_and_both_get_the_writes() -> None:
    rig = Rig([Node("a", fork="x"), Node("b", fork="y")])
    await rig.endpoints.check()
    assert rig.problems() == ["", "tells of another fork"]
    (alert,) = rig.endpoints.alerts()
    assert "add another endpoint" in alert and "(a, b)" in alert
    await rig.ask(SEND)
    assert rig.nodes[1].asked[-1] == SEND
    rig.nodes[1].fork = "x"
    await rig.endpoints.check()
    assert rig.endpoints.alerts() == ()


async def test_a_majority_decides_without_a_word(rig: Rig) -> None:
    rig.nodes[2].fork = "b"
    await rig.endpoints.check()
    assert rig.problems() == ["", "", "tells of another fork"]
    assert rig.endpoints.alerts() == ()


async def test_blocks_of_the_future_are_not_believed_unless_all_have_them() -> None:
    rig = Rig([Node("a"), Node("b", head=10**9, ahead=1e9)])
    await rig.endpoints.check()
    assert rig.problems() == ["", "tells of blocks of the future"]
    assert await rig.ask() == "a"
    rig.wall = -1e6
    await rig.endpoints.check()
    assert "tells of blocks of the future" not in rig.problems(), "our clock is wrong then"


@pytest.mark.parametrize("ahead", [0.0, 29.0, 31.0, 100.0, 599.0])
async def test_of_two_one_that_tells_nonsense_leaves_the_other_one_asked(ahead: float) -> None:
    rig = Rig([Node("a"), Node("b", head=10**9, ahead=ahead)])
    await rig.endpoints.check()
    assert 0 in health.order(rig.endpoints._states, rig.endpoints._clock())


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        ({}, set()),
        ({0: "a"}, set()),
        ({0: "a", 1: "a"}, set()),
        ({0: "a", 1: "b"}, {1}),
        ({0: "a", 1: "b", 2: "b"}, {0}),
        ({0: "a", 1: "b", 2: "c"}, {1, 2}),
    ],
)
def test_who_is_outvoted(hashes: dict[int, str], expected: set[int]) -> None:
    assert health.outvoted(hashes) == expected
