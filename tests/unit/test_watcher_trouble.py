"""What the watcher makes of endpoints that refuse, fail, lag or answer late: no event is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chain import watcher
from cluster.chain.contract import decode_log
from cluster.chain.rpc import AT_ONCE, Log, Rpc
from cluster.chain.watcher import LEFT_OUT, REORGANISED, Holders, Watcher, WatcherSettings
from cluster.core.errors import ChainError
from cluster.core.ports import Wakeup
from tests.unit.test_chainline import Node, digest
from tests.unit.test_watcher import FOREIGN, NODES, OURS, TASK, TASKS, log

REFUSAL = {"error": {"code": -32005, "message": "request rate limited"}}
STARTED = Wakeup(OURS, "TaskStarted")


class Troubled(Node):
    """As `Node`, which counts the calls; those whose numbers are in `fail` get no answer."""

    def __init__(self, head: int) -> None:
        super().__init__(head)
        self.count = 0
        self.fail: set[int] = set()
        self.refuse_logs = False
        self.log_head: int | None = None
        """What its logs reach up to, where that isn't the head."""

    async def __call__(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        self.count += 1
        if self.count in self.fail:
            raise ChainError("no answer")
        if method == "eth_getLogs" and self.refuse_logs:
            self.asked.append((int(params[0]["fromBlock"], 16), int(params[0]["toBlock"], 16)))
            return REFUSAL
        answer = await super().__call__(method, params)
        if method == "eth_getLogs":
            known = self.chain.head if self.log_head is None else self.log_head
            there = [each for each in answer["result"] if int(each["blockNumber"], 16) <= known]
            return {"result": [self._placed(each) for each in there]}
        return answer

    def _placed(self, each: dict[str, Any]) -> dict[str, Any]:
        return each | {"blockHash": self.chain.hash(int(each["blockNumber"], 16))}


def started(block: int, index: int = 0) -> dict[str, Any]:
    return log("TaskStarted", TASK, OURS, block=block) | {"logIndex": hex(index)}


class Rig:
    def __init__(self, head: int = 100, cursor: str | None = None, **settings: Any) -> None:
        self.node = Troubled(head)
        self.now = 1000.0
        self.told = 0
        self.cursor = cursor
        self.watcher = Watcher(
            Rpc(self.node),
            TASKS,
            NODES,
            lambda: {OURS},
            Holders(),
            lambda: self.cursor,
            self._save,
            WatcherSettings(**settings),
            lambda: self.now,
        )
        self.watcher.reorganised = self._tell

    def _save(self, value: str) -> None:
        self.cursor = value

    def _tell(self) -> None:
        self.told += 1

    async def poll(self, times: int = 1, seconds: float = 1.0) -> list[Wakeup]:
        """What so many polls gave, failures aside."""
        found: list[Wakeup] = []
        for _ in range(times):
            with contextlib.suppress(ChainError):
                found += await self.watcher.poll()
            self.now += seconds
        return found

    async def grown(self, *heads: int) -> None:
        for head in heads:
            self.node.chain.head = head
            await self.poll()


# --- refused --------------------------------------------------------------------------------------


async def test_a_block_that_is_refused_is_asked_for_again() -> None:
    rig = Rig()
    await rig.poll()
    rig.node.chain.head = 101
    rig.node.logs = [started(101)]
    rig.node.refuse_logs = True
    with pytest.raises(ChainError):
        await rig.watcher.poll()
    assert await rig.poll(4) == []
    rig.node.refuse_logs = False
    assert await rig.poll() == [STARTED]


async def test_a_block_that_is_refused_for_long_is_left_out_and_everyone_looks() -> None:
    rig = Rig()
    await rig.poll()
    rig.node.chain.head = 101
    rig.node.logs = [started(102)]
    rig.node.refuse_logs = True
    assert await rig.poll(9, 2.0) == []
    assert await rig.poll(30, 2.0) == [Wakeup(None, LEFT_OUT)]
    assert rig.watcher.next == 102
    assert rig.cursor is not None and rig.cursor.startswith("102")
    rig.node.refuse_logs = False
    rig.node.chain.head = 102
    assert await rig.poll() == [STARTED]


async def test_many_refusals_at_once_leave_nothing_out() -> None:
    rig = Rig()
    await rig.poll()
    rig.node.chain.head = 101
    rig.node.logs = [started(101)]
    rig.node.refuse_logs = True
    assert await rig.poll(100, 0.01) == []
    rig.node.refuse_logs = False
    assert await rig.poll() == [STARTED]


# --- forks and failures ---------------------------------------------------------------------------


async def calls_of_a_poll(depth: int) -> int:
    rig = Rig()
    await rig.grown(100, 101, 102, 103, 104)
    rig.node.chain.fork(105 - depth, "b", 106)
    before = rig.node.count
    await rig.poll()
    return rig.node.count - before


@pytest.mark.parametrize("depth", [1, 2, 4])
async def test_whichever_call_fails_after_a_reorganisation_it_is_read_again(depth: int) -> None:
    calls = await calls_of_a_poll(depth)
    assert calls >= 3
    for failing in range(1, calls + 1):
        rig = Rig()
        await rig.grown(100, 101, 102, 103, 104)
        rig.node.chain.fork(105 - depth, "b", 106)
        rig.node.logs = [started(105 - depth)]
        rig.node.fail = {rig.node.count + failing}
        found = await rig.poll(4)
        assert found.count(STARTED) == 1, f"call {failing} of {calls}"
        assert found.count(Wakeup(None, REORGANISED, moment=105 - depth)) == 1
        assert rig.told == 1


async def test_a_block_that_comes_back_is_told_of_again() -> None:
    rig = Rig()
    await rig.grown(100, 101)
    rig.node.logs = [started(102)]
    rig.node.chain.head = 102
    assert await rig.poll() == [STARTED]
    for name in ("b", "a"):
        rig.node.chain.fork(102, name, rig.node.chain.head + 1)
        found = await rig.poll()
    assert STARTED in found


async def test_a_reorganisation_is_told_of_although_the_logs_are_refused() -> None:
    rig = Rig()
    await rig.grown(100, 101, 102)
    rig.node.chain.fork(102, "b", 103)
    rig.node.refuse_logs = True
    assert await rig.poll(3) == [Wakeup(None, REORGANISED, moment=102)]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 6), st.sets(st.integers(1, 12), max_size=4)),
        min_size=1,
        max_size=12,
    )
)
async def test_no_event_is_lost_whatever_fails_when(
    moves: list[tuple[int, int, set[int]]],
) -> None:
    """Each fork brings an event of its own; every one that is still there at the end was heard."""
    rig = Rig()
    await rig.poll()
    heard = 0
    wanted: dict[str, int] = {}
    for index, (growth, depth, failing) in enumerate(moves):
        chain = rig.node.chain
        if depth:
            first = max(chain.head - depth + 1, 101)
            chain.fork(first, f"f{index}"[:4], max(chain.head + growth, first))
            rig.node.logs = [e for e in rig.node.logs if int(e["blockNumber"], 16) < first]
        else:
            chain.head += growth + 1
        block = chain.head
        if all(int(each["blockNumber"], 16) != block for each in rig.node.logs):
            rig.node.logs.append(started(block, index))
            wanted[chain.hash(block)] = index
        rig.node.fail = {rig.node.count + each for each in failing}
        heard += (await rig.poll(14)).count(STARTED)
    assert heard == len(wanted)


# --- late -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [1, 2, 3])
async def test_logs_of_an_endpoint_that_is_behind_are_found_when_it_has_them(behind: int) -> None:
    rig = Rig()
    await rig.grown(100, 101)
    rig.node.logs = [started(104)]
    for head in range(104, 104 + behind):
        rig.node.chain.head, rig.node.log_head = head, head - behind
        assert await rig.poll() == []
    rig.node.chain.head, rig.node.log_head = 104 + behind, 104
    assert await rig.poll() == [STARTED]
    rig.node.log_head = None
    for head in range(105 + behind, 112):
        rig.node.chain.head = head
        assert await rig.poll() == [], "each event wakes once"


async def test_the_newest_block_is_read_once_more_where_none_follows() -> None:
    rig = Rig()
    await rig.grown(100, 101)
    rig.node.logs = [started(102)]
    rig.node.chain.head, rig.node.log_head = 102, 101
    assert await rig.poll() == []
    rig.node.log_head = None
    assert await rig.poll(6) == [STARTED]
    asked = len(rig.node.asked)
    await rig.poll(20)
    assert len(rig.node.asked) == asked, "and then it is left at that"


async def test_an_older_head_of_the_same_chain_alarms_nobody() -> None:
    rig = Rig()
    await rig.grown(100, 101, 102, 103, 104)
    rig.node.chain.head = 101
    assert await rig.poll() == []
    assert rig.watcher.next == 105
    rig.node.chain.head = 105
    rig.node.logs = [started(105)]
    assert await rig.poll() == [STARTED]


# --- too much -------------------------------------------------------------------------------------


async def test_a_range_that_fails_is_asked_for_in_smaller_ones() -> None:
    rig = Rig(1000, f"801 800 {digest('a', 800)}", first_span=1000)
    rig.node.logs = [started(990)]
    answer = rig.node.__class__.__call__

    async def bounded(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        if method == "eth_getLogs":
            first, last = (int(params[0][key], 16) for key in ("fromBlock", "toBlock"))
            if last - first >= 20:
                raise ChainError("the endpoint doesn't answer: ReadTimeout")
        return await answer(rig.node, method, params)

    rig.watcher._rpc = Rpc(bounded)
    assert await rig.poll(40) == [STARTED]
    assert rig.watcher.next == 1001


async def test_catching_up_begins_with_small_ranges_that_grow() -> None:
    rig = Rig(5000, f"1001 1000 {digest('a', 1000)}")
    await rig.poll(8)
    sizes = [last - first + 1 for first, last in rig.node.asked if last < 5000]
    assert sizes[0] <= 50
    assert sizes == sorted(sizes)
    assert max(sizes) == 1000


# --- other people's -------------------------------------------------------------------------------


async def test_other_peoples_logs_are_not_decoded_and_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[Log] = []

    def counted(each: Log, events: Any) -> Any:
        decoded.append(each)
        return decode_log(each, events)

    monkeypatch.setattr(watcher, "decode_log", counted)
    rig = Rig()
    await rig.poll()
    others = [log("TaskStarted", TASK, FOREIGN, block=101) for _ in range(5000)]
    rig.node.logs = [*others, started(101), log("TaskEndSuccess", TASK, block=101)]
    rig.node.chain.head = 101
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(other())
    assert await rig.poll() == [STARTED, Wakeup(OURS, "TaskEndSuccess")]
    running.cancel()
    assert len(decoded) == 2
    assert turns >= 2 * 5000 // AT_ONCE
