from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from eth_abi.abi import encode
from eth_utils.abi import event_abi_to_log_topic, get_abi_input_types, get_all_event_abis
from hypothesis import given
from hypothesis import strategies as st

from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.chain.clock import ChainClock
from cluster.chain.rpc import Block, Rpc
from cluster.chain.watcher import Holders, Watcher, WatcherSettings
from cluster.core.errors import ChainError, ConfigError
from cluster.core.ports import Wakeup
from cluster.core.types import Address, Commitment, ModelId, Timestamp

TASKS, NODES = Address("0x" + "11" * 20), Address("0x" + "22" * 20)
OURS, FOREIGN = Address("0x" + "33" * 20), Address("0x" + "44" * 20)
TASK, OTHER = b"\x01" * 32, b"\x02" * 32
EVENTS = {
    each["name"]: each for each in (*get_all_event_abis(TASK_ABI), *get_all_event_abis(NODE_ABI))
}


def log(name: str, *values: Any, block: int, address: str = TASKS) -> dict[str, Any]:
    event = EVENTS[name]
    return {
        "address": address,
        "topics": ["0x" + event_abi_to_log_topic(event).hex()],
        "data": "0x" + encode(get_abi_input_types(event), values).hex(),
        "blockNumber": hex(block),
    }


class FakeLogs:
    def __init__(self, head: int) -> None:
        self.head = head
        self.logs: list[Any] = []
        self.asked: list[tuple[int, int]] = []
        self.most = 10_000

    async def __call__(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        if method == "eth_getBlockByNumber":
            return {"result": {"number": hex(self.head), "timestamp": "0x1"}}
        if method == "eth_getCode":
            return {"result": "0x60" if params[0] == TASKS else "0x"}
        if method == "eth_chainId":
            return {"result": "0x5"}
        assert method == "eth_getLogs"
        first, last = int(params[0]["fromBlock"], 16), int(params[0]["toBlock"], 16)
        self.asked.append((first, last))
        if last - first + 1 > self.most:
            return {"error": {"code": -32005, "message": "too many blocks"}}
        if not all(isinstance(each, dict) for each in self.logs):
            return {"result": self.logs}
        return {
            "result": [each for each in self.logs if first <= int(each["blockNumber"], 16) <= last]
        }


class Rig:
    def __init__(self, head: int = 100, cursor: str | None = None, **settings: int) -> None:
        self.chain = FakeLogs(head)
        self.cursor = cursor
        self.holders = Holders()
        self.watcher = Watcher(
            Rpc(self.chain),
            TASKS,
            NODES,
            lambda: {OURS},
            self.holders,
            lambda: self.cursor,
            self._save,
            WatcherSettings(**settings),
        )

    def _save(self, value: str) -> None:
        self.cursor = value


async def test_it_starts_at_the_head_and_goes_on_from_there() -> None:
    rig = Rig()
    rig.chain.logs = [log("TaskStarted", TASK, OURS, block=100)]
    assert await rig.watcher.poll() == ()
    assert rig.chain.asked == []
    rig.chain.head = 103
    rig.chain.logs.append(log("TaskStarted", TASK, OURS, block=102))
    assert await rig.watcher.poll() == (Wakeup(OURS, "TaskStarted"),)
    assert rig.chain.asked == [(101, 103)]
    assert rig.cursor == "104"
    assert await rig.watcher.poll() == ()


async def test_only_our_accounts_are_woken_and_each_once() -> None:
    rig = Rig(head=9, cursor="1")
    rig.chain.logs = [
        log("TaskStarted", OTHER, FOREIGN, block=1),
        log("TaskValidated", OTHER, block=2),
        log("TaskValidated", TASK, block=2),
        log("TaskStarted", TASK, OURS, block=3),
        log("TaskParametersUploaded", TASK, OURS, block=3),
        log("TaskParametersUploaded", TASK, OURS, block=3),
        log("TaskValidated", TASK, block=4),
        log("TaskEndAborted", TASK, FOREIGN, 1, 1, block=5),
        log("TaskQueued", OTHER, block=5),
        log("NodeKickedOut", OURS, block=6, address=NODES),
        log("NodeSlashed", FOREIGN, block=6, address=NODES),
        log("DownloadModel", OURS, "base:org/model", 0, block=7),
        log("DownloadModel", FOREIGN, "base:org/model", 0, block=7),
    ]
    assert await rig.watcher.poll() == (
        Wakeup(OURS, "TaskStarted"),
        Wakeup(OURS, "TaskParametersUploaded"),
        Wakeup(OURS, "TaskValidated"),
        Wakeup(OURS, "TaskEndAborted"),
        Wakeup(OURS, "NodeKickedOut", moment=6),
        Wakeup(OURS, "DownloadModel", (ModelId("base:org/model"),)),
    )


async def test_a_known_holder_is_woken_for_events_without_an_address() -> None:
    rig = Rig(head=9, cursor="1")
    rig.holders.learn(Commitment("0x" + TASK.hex()), OURS)
    rig.chain.logs = [log("TaskEndSuccess", TASK, block=4)]
    assert await rig.watcher.poll() == (Wakeup(OURS, "TaskEndSuccess"),)


async def test_malformed_and_foreign_logs_hide_nothing() -> None:
    good = log("TaskStarted", TASK, OURS, block=5)
    rig = Rig(head=9, cursor="1")
    rig.chain.logs = [
        {**good, "data": "0x1234"},
        {**good, "data": None},
        {**good, "topics": []},
        {**good, "topics": ["0x" + "99" * 32]},
        {**good, "topics": 7},
        {**good, "address": FOREIGN},
        {**good, "address": NODES},
        {**good, "address": None},
        {**good, "removed": True},
        {**log("DownloadModel", OURS, "x", 0, block=5), "data": "0x" + "ff" * 96},
        good,
    ]
    assert await rig.watcher.poll() == (Wakeup(OURS, "TaskStarted"),)
    rig.chain.logs = [None, 5, "x"]
    rig.chain.head += 1
    assert await rig.watcher.poll() == ()


async def test_ranges_are_bounded_and_shrink_when_the_endpoint_wants_less() -> None:
    rig = Rig(head=1000, cursor="1", span=400, first_span=400)
    rig.chain.most = 150
    rig.chain.logs = [log("TaskStarted", TASK, OURS, block=900)]
    found: list[Wakeup] = []
    for _ in range(60):
        try:
            found += await rig.watcher.poll()
        except ChainError:
            continue
    assert found == [Wakeup(OURS, "TaskStarted")]
    assert max(last - first + 1 for first, last in rig.chain.asked) == 400
    assert rig.chain.asked[-1][1] == 1000


async def test_what_befell_an_account_is_read_again_in_bounded_ranges() -> None:
    rig = Rig(head=3000, span=400)
    rig.chain.most = 150
    rig.chain.logs = [
        log("NodeKickedOut", OURS, block=100, address=NODES),
        log("NodeKickedOut", FOREIGN, block=900, address=NODES),
        log("TaskStarted", TASK, OURS, block=901),
        log("NodeSlashed", OURS, block=902, address=NODES),
        log("NodeKickedOut", OURS, block=1501, address=NODES),
    ]
    found = await rig.watcher.befell(OURS, 101, 1500)
    assert found == (Wakeup(OURS, "NodeSlashed", moment=902),)
    assert rig.chain.asked[-1][1] == 1500
    rig.chain.asked.clear()
    rig.chain.most = 0
    with pytest.raises(ChainError):
        await rig.watcher.befell(OURS, 101, 1500)
    rig.chain.most = 400
    rig.chain.asked.clear()
    # However long nobody looked, no more than so far back.
    await rig.watcher.befell(OURS, 0, 100_000)
    assert rig.chain.asked[0][0] == 90_001
    assert rig.chain.asked[-1][1] == 100_000


async def test_a_long_absence_is_skipped_and_everyone_is_woken() -> None:
    rig = Rig(head=10_000, cursor="1", lookback=10)
    assert await rig.watcher.poll() == (Wakeup(None, "blocks left out"),)
    assert rig.chain.asked == [(9991, 10_000)]


async def test_a_chain_that_went_back_is_followed() -> None:
    rig = Rig(head=5, cursor="100")
    assert await rig.watcher.poll() == (Wakeup(None, "chain went back"),)
    rig.chain.head = 6
    rig.chain.logs = [log("TaskStarted", TASK, OURS, block=6)]
    assert await rig.watcher.poll() == (Wakeup(OURS, "TaskStarted"),)


async def test_a_stored_cursor_that_is_no_number_starts_at_the_head() -> None:
    rig = Rig(cursor="what")
    assert await rig.watcher.poll() == ()


def test_holders_forget_the_oldest() -> None:
    holders = Holders(2)
    for index in range(3):
        holders.learn(Commitment(str(index)), OURS)
    assert [holders.get(Commitment(str(index))) for index in range(3)] == [None, OURS, OURS]


async def test_the_wrong_chain_or_contract_is_the_operators_input() -> None:
    rpc = Rpc(FakeLogs(1))
    await rpc.check(5, {"task": TASKS})
    with pytest.raises(ConfigError, match="chain 5, not 6"):
        await rpc.check(6, {"task": TASKS})
    with pytest.raises(ConfigError, match="node contract"):
        await rpc.check(5, {"task": TASKS, "node": NODES})


# --- the network's clock ------------------------------------------------------------------------


def test_an_idle_chains_clock_goes_on_with_the_wall_clock() -> None:
    clock = ChainClock()
    block = Block(1, Timestamp(1000))
    assert clock.observe(block, Timestamp(1300.5)) == 1300.5
    assert clock.observe(block, Timestamp(1400)) == 1400.0


@given(st.floats(-3600, 3600), st.lists(st.floats(0.5, 30), min_size=2, max_size=40))
def test_a_wall_clock_that_is_wrong_is_found_out(wrong: float, gaps: list[float]) -> None:
    """On a chain with a block every five seconds, `now` is right once a block was seen made."""
    clock, true = ChainClock(), 10_000.0
    seen: set[int] = set()
    for gap in gaps:
        true += gap
        number = int(true // 5)
        now = clock.observe(Block(number, Timestamp(number * 5)), Timestamp(true + wrong))
        seen.add(number)
        assert now >= number * 5
        if len(seen) > 1:
            assert abs(now - true) <= 36
