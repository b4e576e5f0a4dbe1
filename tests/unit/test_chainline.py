"""Blocks as they were seen, forks, and when the next one is due."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chain.chainline import ChainLine, Pulse
from cluster.chain.rpc import Block, Rpc
from cluster.chain.watcher import REORGANISED, Holders, Watcher, WatcherSettings
from cluster.core.ports import Wakeup
from cluster.core.types import Timestamp
from tests.unit.test_watcher import NODES, OURS, TASK, TASKS, log


def digest(fork: str, number: int) -> str:
    return "0x" + fork.encode().hex().rjust(8, "0") + f"{number:056x}"


class Chain:
    """A chain whose upper part can be replaced: `forks` says from which number on it is which."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.forks: list[tuple[int, str]] = [(0, "a")]
        self.asked = 0

    def hash(self, number: int) -> str:
        return digest(next(name for since, name in reversed(self.forks) if number >= since), number)

    def block(self) -> Block:
        parent = self.hash(self.head - 1)
        return Block(self.head, Timestamp(self.head), None, self.hash(self.head), parent)

    def fork(self, since: int, name: str, head: int) -> None:
        self.forks = [(s, n) for s, n in self.forks if s < since] + [(since, name)]
        self.head = head

    async def hash_of(self, number: int) -> str | None:  # noqa: RUF029 - as the real one
        self.asked += 1
        return self.hash(number) if number <= self.head else None


async def test_a_chain_that_only_grows_costs_no_question() -> None:
    chain, line = Chain(10), ChainLine()
    for _ in range(5):
        assert await line.fork(chain.block(), chain.hash_of) is None
        chain.head += 1
    assert chain.asked == 0
    chain.head += 3
    assert await line.fork(chain.block(), chain.hash_of) is None
    assert chain.asked == 1


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
@pytest.mark.parametrize("growth", [0, 1, 4])
async def test_where_a_fork_begins(depth: int, growth: int) -> None:
    chain, line = Chain(10), ChainLine()
    for head in range(10, 31):
        chain.head = head
        await line.fork(chain.block(), chain.hash_of)
    chain.fork(31 - depth, "b", 30 + growth)
    assert await line.fork(chain.block(), chain.hash_of) == 31 - depth
    assert await line.fork(chain.block(), chain.hash_of) is None


async def test_a_fork_that_is_shorter_is_one_too() -> None:
    chain, line = Chain(10), ChainLine()
    for head in range(10, 31):
        chain.head = head
        await line.fork(chain.block(), chain.hash_of)
    chain.fork(20, "b", 25)
    assert await line.fork(chain.block(), chain.hash_of) == 20


async def test_an_endpoint_that_lags_behind_itself_tells_of_no_fork() -> None:
    chain, line = Chain(10), ChainLine()
    for head in (10, 11, 12, 13, 11, 13, 10, 14):
        chain.head = head
        assert await line.fork(chain.block(), chain.hash_of) is None


async def test_deeper_than_is_remembered_all_that_is_known_is_read_again() -> None:
    chain, line = Chain(10), ChainLine(depth=5)
    for head in range(10, 31):
        chain.head = head
        await line.fork(chain.block(), chain.hash_of)
    chain.fork(1, "b", 31)
    assert await line.fork(chain.block(), chain.hash_of) == 27


async def test_without_hashes_nothing_is_concluded() -> None:
    chain, line = Chain(10), ChainLine()
    for number in (10, 11, 9):
        assert await line.fork(Block(number, Timestamp(0.0)), chain.hash_of) is None
    assert line.newest is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10)), max_size=25))
async def test_every_replaced_block_that_was_seen_is_named(moves: list[tuple[int, int]]) -> None:
    """However the chain grows and is reorganised, the answer reaches down to the lowest block that
    isn't what it was at the last look."""
    chain, line = Chain(50), ChainLine(depth=40)
    await line.fork(chain.block(), chain.hash_of)
    before = {number: chain.hash(number) for number in range(chain.head + 1)}
    for index, (growth, depth) in enumerate(moves):
        if depth:
            chain.fork(max(chain.head - depth + 1, 1), f"f{index}"[:4], chain.head + growth)
        else:
            chain.head += growth
        forked = await line.fork(chain.block(), chain.hash_of)
        changed = [n for n, known in before.items() if n <= chain.head and chain.hash(n) != known]
        if changed:
            assert forked is not None
            assert forked <= min(changed)
        before = {number: chain.hash(number) for number in range(chain.head + 1)}


# --- the watcher on it ---------------------------------------------------------------------------


class Node:
    """A chain with logs, behind the RPC's transport."""

    def __init__(self, head: int) -> None:
        self.chain = Chain(head)
        self.logs: list[dict[str, Any]] = []
        self.asked: list[tuple[int, int]] = []

    async def __call__(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        if method == "eth_getBlockByNumber":
            number = self.chain.head if params[0] == "latest" else int(params[0], 16)
            said = {
                "hash": self.chain.hash(number),
                "parentHash": self.chain.hash(max(number - 1, 0)),
            }
            return {"result": {"number": hex(number), "timestamp": hex(number), **said}}
        first, last = int(params[0]["fromBlock"], 16), int(params[0]["toBlock"], 16)
        self.asked.append((first, last))
        return {"result": [e for e in self.logs if first <= int(e["blockNumber"], 16) <= last]}


class Rig:
    def __init__(self, node: Node, cursor: str | None = None) -> None:
        self.cursor = cursor
        self.told = 0
        self.watcher = Watcher(
            Rpc(node),
            TASKS,
            NODES,
            lambda: {OURS},
            Holders(),
            lambda: self.cursor,
            self._save,
            WatcherSettings(save_every=1),
        )
        self.watcher.reorganised = self._tell

    def _save(self, value: str) -> None:
        self.cursor = value

    def _tell(self) -> None:
        self.told += 1


async def test_blocks_that_were_replaced_are_read_again() -> None:
    node = Node(100)
    rig = Rig(node)
    for head in range(100, 106):
        node.chain.head = head
        await rig.watcher.poll()
    node.chain.fork(103, "b", 106)
    node.logs = [log("TaskStarted", TASK, OURS, block=104)]
    assert await rig.watcher.poll() == (
        Wakeup(None, REORGANISED, moment=103),
        Wakeup(OURS, "TaskStarted"),
    )
    assert node.asked[-1] == (102, 106), "the newest are read again with them"
    assert rig.told == 1
    assert await rig.watcher.poll() == ()


async def test_a_reorganisation_while_nobody_looked_is_seen_afterwards() -> None:
    node = Node(100)
    rig = Rig(node)
    for head in (100, 101):
        node.chain.head = head
        await rig.watcher.poll()
    assert rig.cursor == f"102 101 {digest('a', 101)}"
    node.chain.fork(90, "b", 120)
    later = Rig(node, rig.cursor)
    found = await later.watcher.poll()
    assert REORGANISED in {each.reason for each in found}
    assert later.told == 1
    assert node.asked[-1][0] <= 101


async def test_a_downtime_is_caught_up_with_in_ranges() -> None:
    node = Node(5000)
    node.logs = [log("TaskStarted", TASK, OURS, block=n) for n in (10, 4990)]
    rig = Rig(node, f"1 0 {digest('a', 0)}")
    found: list[Wakeup] = []
    while True:
        found += await rig.watcher.poll()
        if not rig.watcher.is_behind:
            break
    assert found == [Wakeup(OURS, "TaskStarted")] * 2
    assert all(last - first < 1000 for first, last in node.asked)
    assert re.match(r"5001 5000 0x", rig.cursor or "")


# --- the pulse -----------------------------------------------------------------------------------


@given(
    gap=st.sampled_from([0.5, 1.0, 2.0, 5.0, 12.0]),
    delay=st.floats(0.0, 3.0),
    wrong=st.floats(-1000, 1000),
)
def test_a_steady_chain_is_looked_at_about_once_a_block(
    gap: float, delay: float, wrong: float
) -> None:
    pulse = Pulse(least=0.25)
    now, looks, seen = 0.0, 0, -1
    while now < 100 * gap:
        number = int(now // gap)
        pulse.saw(number, number * gap, now + wrong + delay)
        seen = number
        looks += 1
        pause = pulse.pause(now + wrong + delay)
        assert min(0.25, gap / 3) <= pause <= 3.0
        now += pause
    assert seen >= 95
    assert looks <= 100 * max(1.0, gap / 3.0 + 1.0) * 1.6 + 40


def test_a_chain_whose_blocks_have_one_time_is_not_looked_at_without_end() -> None:
    pulse = Pulse(least=1.0)
    for number in range(20):
        pulse.saw(number, 5.0, 5.0 + number)
    assert pulse.pause(1000.0) >= 0.1


def test_an_unknown_or_late_chain_is_looked_at_at_the_least_interval() -> None:
    pulse = Pulse(least=1.0)
    assert pulse.pause(5.0) == 1.0
    for number in range(5):
        pulse.saw(number, number * 2.0, number * 2.0 + 0.5)
    assert pulse.pause(8.6) == pytest.approx(1.9, abs=0.2)
    assert pulse.pause(60.0) == pytest.approx(2.0 / 3), "the next block is overdue"
