"""Which endpoint is asked, and what becomes of one that fails, lags, lies or asks us to wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chain import health
from cluster.chain.answers import SEND, Throttled, TooLong
from cluster.chain.endpoints import URGENT, Endpoints
from cluster.chain.health import Bucket, Endpoint
from cluster.chain.rpc import HttpTransport
from cluster.core.errors import ChainError

HEAD = ("eth_getBlockByNumber", ("latest", False))


@dataclass
class Node:
    """An endpoint. `trouble` is raised in place of each answer while it is set."""

    name: str
    head: int = 100
    chain: int = 5
    fork: str = "a"
    trouble: ChainError | None = None
    error: Mapping[str, Any] | None = None
    asked: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None
    seconds: float = 0.0
    block_seconds: float = 2.0
    ahead: float = 0.0
    """Of the time that its blocks should have."""
    priority: int = 0
    rate: float | None = None

    def transport(self, time: Time) -> HttpTransport:
        async def send(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
            self.asked.append(method)
            time.now += self.seconds
            if self.gate is not None:
                await self.gate.wait()
            if self.trouble is not None:
                raise self.trouble
            if self.error is not None:
                return {"error": self.error}
            return {"result": self._result(method, params)}

        async def close() -> None:  # noqa: RUF029 - as the real one
            self.asked.append("close")

        return HttpTransport(self.name, send, close, self.priority, self.rate)

    def _result(self, method: str, params: Sequence[Any]) -> object:
        if method == "eth_chainId":
            return hex(self.chain)
        if method == "eth_getBlockByNumber":
            number = self.head if params[0] == "latest" else int(params[0], 16)
            time = hex(int(number * self.block_seconds + self.ahead))
            return {"number": hex(number), "hash": f"{self.fork}{number}", "timestamp": time}
        return self.name


@dataclass
class Time:
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:  # noqa: RUF029 - as the real one
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class Rig:
    nodes: list[Node]
    rate: float | None = None
    wall: float = 1e6
    time: Time = field(default_factory=Time)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.endpoints = Endpoints(
            [node.transport(self.time) for node in self.nodes],
            5,
            self.rate,
            self.time.clock,
            self.time.sleep,
            lambda method, result: self.calls.update([(method, result)]),
            lambda: self.wall,
        )

    async def ask(self, method: str = "eth_call") -> object:
        answer = await self.endpoints.send(method, ())
        return answer.get("result", answer.get("error"))

    def problems(self) -> list[str]:
        return [view.problem for view in self.endpoints.views()]


@pytest.fixture
def rig() -> Rig:
    return Rig([Node("a"), Node("b"), Node("c")])


async def test_the_first_in_order_is_asked(rig: Rig) -> None:
    assert [await rig.ask() for _ in range(3)] == ["a"] * 3
    assert rig.nodes[1].asked == rig.nodes[2].asked == []
    assert rig.calls == {("eth_call", "ok"): 3}


async def test_a_failure_goes_on_to_the_next_at_once(rig: Rig) -> None:
    rig.nodes[0].trouble = ChainError("no answer")
    assert await rig.ask() == "b"
    assert rig.time.slept == []
    assert rig.calls == {("eth_call", "failed"): 1, ("eth_call", "ok"): 1}


async def test_an_answer_that_refuses_is_an_answer(rig: Rig) -> None:
    rig.nodes[0].error = {"code": 3, "message": "execution reverted"}
    assert await rig.ask() == rig.nodes[0].error
    assert rig.nodes[1].asked == []
    assert rig.problems() == [""] * 3


@pytest.mark.parametrize(
    "error",
    [
        {"code": -32603, "message": "Internal error"},
        {"code": -32601, "message": "no such method"},
        "no",
    ],
)
async def test_what_one_refuses_another_is_asked(rig: Rig, error: Any) -> None:
    rig.nodes[0].error = error
    for _ in range(20):
        assert await rig.ask() == "b"
    assert len(rig.nodes[0].asked) == health.REFUSALS_TO_OPEN, "and then it is left alone"
    assert "refuses calls" in rig.problems()[0]
    rig.nodes[0].error = None
    rig.time.now += 3.0
    await rig.endpoints.check()
    assert await rig.ask() == "a"


async def test_what_all_refuse_is_the_questions_fault(rig: Rig) -> None:
    for node, code in zip(rig.nodes, (-1, -2, -3), strict=True):
        node.error = {"code": code, "message": "no"}
    for _ in range(20):
        assert await rig.ask() == rig.nodes[0].error
    assert rig.problems() == [""] * 3


async def test_a_refusal_now_and_then_is_none_to_speak_of(rig: Rig) -> None:
    for _ in range(20):
        rig.nodes[0].error = {"code": -32601, "message": "no"}
        assert await rig.ask() == "b"
        rig.nodes[0].error = None
        assert await rig.ask() == "a"


async def test_out_of_quota_inside_an_answer_is_as_429(rig: Rig) -> None:
    rig.nodes[0].error = {
        "code": -32005,
        "message": "daily request count exceeded",
        "data": {"rate": {"backoff_seconds": 30}},
    }
    assert await rig.ask() == "b"
    assert await rig.ask() == "b"
    assert len(rig.nodes[0].asked) == 1
    assert rig.problems()[0] == "asked to wait 30 s"
    assert rig.calls["eth_call", "throttled"] == 1


async def test_an_answer_that_is_too_long_is_nobodys_failure(rig: Rig) -> None:
    await rig.endpoints.check()
    rig.nodes[1].asked.clear()
    rig.nodes[0].trouble = TooLong("eth_getLogs: too long")
    for _ in range(5):
        with pytest.raises(TooLong):
            await rig.endpoints.send("eth_getLogs", ({"toBlock": "0x1"},))
    assert rig.nodes[1].asked == []
    assert rig.problems() == [""] * 3


async def test_one_that_has_not_got_the_block_yet_is_passed_over(rig: Rig) -> None:
    rig.nodes[0].error = {"code": -32000, "message": "header not found"}
    assert await rig.ask() == "b"
    rig.nodes[1].error = rig.nodes[2].error = rig.nodes[0].error
    assert await rig.ask() == rig.nodes[0].error


async def test_the_circuit_opens_and_is_tried_by_one_call_after_a_growing_pause(rig: Rig) -> None:
    first = rig.nodes[0]
    first.trouble = ChainError("eth_call: no answer")
    for _ in range(5):
        assert await rig.ask() == "b"
    assert len(first.asked) == health.FAILURES_TO_OPEN
    rig.time.now += 2.5
    # Half-open: behind those that work, so a call that works never waits for it.
    assert await rig.ask() == "b"
    assert len(first.asked) == health.FAILURES_TO_OPEN
    for node in rig.nodes[1:]:
        node.trouble = first.trouble
    with pytest.raises(ChainError):
        await rig.ask()
    assert len(first.asked) == health.FAILURES_TO_OPEN + 1
    assert rig.problems()[0] == "failed 4 times: no answer"
    rig.time.now += 3.0
    with pytest.raises(ChainError):
        await rig.ask()
    assert len(first.asked) == health.FAILURES_TO_OPEN + 1, "now it is left alone for longer"


async def test_a_check_brings_back_one_that_answers_again(rig: Rig) -> None:
    first = rig.nodes[0]
    first.trouble = ChainError("no answer")
    for _ in range(3):
        await rig.ask()
    await rig.endpoints.check()
    assert "eth_chainId" not in first.asked, "its pause isn't over"
    first.trouble = None
    rig.time.now += 2.5
    await rig.endpoints.check()
    assert rig.problems() == [""] * 3
    assert await rig.ask() == "a"


async def test_half_open_means_one_call_at_a_time() -> None:
    rig = Rig([Node("a")])
    (node,) = rig.nodes
    node.trouble = ChainError("no answer")
    for _ in range(3):
        with pytest.raises(ChainError):
            await rig.ask()
    rig.time.now += 2.5
    node.trouble, node.gate = None, asyncio.Event()
    probe = asyncio.create_task(rig.endpoints.send("eth_call", ()))
    await asyncio.sleep(0)
    with pytest.raises(ChainError, match="no endpoint answers: a failed 3 times"):
        await rig.ask()
    node.gate.set()
    assert (await probe)["result"] == "a"
    assert await rig.ask() == "a"


async def test_a_probe_that_is_given_up_leaves_room_for_the_next() -> None:
    rig = Rig([Node("a")])
    (node,) = rig.nodes
    node.trouble = ChainError("no answer")
    for _ in range(3):
        with pytest.raises(ChainError):
            await rig.ask()
    rig.time.now += 2.5
    node.trouble, node.gate = None, asyncio.Event()
    probe = asyncio.create_task(rig.endpoints.send("eth_call", ()))
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    node.gate.set()
    assert await rig.ask() == "a"


@pytest.mark.parametrize(("said", "pause"), [(30.0, 30.0), (None, 5.0)])
async def test_who_asks_us_to_wait_is_left_alone_for_so_long(
    rig: Rig, said: float | None, pause: float
) -> None:
    first = rig.nodes[0]
    first.trouble = Throttled("429", said)
    assert await rig.ask() == "b"
    first.trouble = None
    rig.time.now += pause - 0.1
    assert await rig.ask() == "b"
    assert "asked to wait" in rig.problems()[0]
    rig.time.now += 0.2
    assert await rig.ask() == "a"
    assert rig.calls["eth_call", "throttled"] == 1


async def test_a_write_goes_to_all_and_one_that_takes_it_is_enough(rig: Rig) -> None:
    rig.nodes[0].trouble = ChainError("no answer")
    rig.nodes[1].error = {"code": -32000, "message": "already known"}
    assert await rig.ask(SEND) == "c"
    assert [node.asked for node in rig.nodes] == [[SEND]] * 3
    rig.nodes[2].trouble = rig.nodes[0].trouble
    assert await rig.ask(SEND) == rig.nodes[1].error
    rig.nodes[1].trouble = rig.nodes[0].trouble
    with pytest.raises(ChainError, match="no answer"):
        await rig.ask(SEND)


async def test_a_write_waits_for_no_slower_one_once_it_is_taken(rig: Rig) -> None:
    gate = rig.nodes[1].gate = asyncio.Event()
    async with asyncio.timeout(60):
        assert await rig.ask(SEND) == "a"
        gate.set()
        while rig.calls[SEND, "ok"] < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert [node.asked for node in rig.nodes] == [[SEND]] * 3


async def test_closing_leaves_no_write_behind(rig: Rig) -> None:
    rig.nodes[1].gate = asyncio.Event()
    assert await rig.ask(SEND) == "a"
    await rig.endpoints.close()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_far_slower_one_stands_back() -> None:
    rig = Rig([Node("a", seconds=8.0), Node("b", seconds=0.1)])
    await rig.endpoints.check()
    assert await rig.ask() == "b"
    rig = Rig([Node("a", seconds=0.9), Node("b", seconds=0.01)])
    await rig.endpoints.check()
    assert await rig.ask() == "a", "within a second nobody is slow"


async def test_no_more_calls_than_the_rate_to_each() -> None:
    rig = Rig([Node("a")], rate=2.0)
    for _ in range(6):
        await rig.ask()
    assert sum(rig.time.slept) == pytest.approx(2.0)


async def test_the_lowest_priority_comes_first_whatever_the_order() -> None:
    rig = Rig([Node("a", priority=10), Node("b", priority=10), Node("c")])
    assert await rig.ask() == "c"
    rig.nodes[2].trouble = ChainError("gone")
    assert await rig.ask() == "a"


async def test_one_that_can_be_asked_at_once_comes_before_one_that_has_to_be_waited_for() -> None:
    rig = Rig([Node("a", rate=5.0), Node("b", rate=5.0)])
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    rig.endpoints._sleep = sleep
    await asyncio.gather(*(rig.ask() for _ in range(100)))
    assert max(slept) <= (100 - 10) / 10 + 0.5
    assert abs(len(rig.nodes[0].asked) - len(rig.nodes[1].asked)) <= 2


async def test_each_has_a_rate_of_its_own() -> None:
    rig = Rig([Node("a", rate=2.0)], rate=100.0)
    for _ in range(6):
        await rig.ask()
    assert sum(rig.time.slept) == pytest.approx(2.0)


async def test_a_tasks_answer_waits_for_nobodys_rate() -> None:
    rig = Rig([Node("a")], rate=1.0)
    await rig.ask()
    urgent = URGENT.set(True)
    for _ in range(5):
        await rig.ask()
    URGENT.reset(urgent)
    assert rig.time.slept == []
    await rig.ask()
    assert sum(rig.time.slept) >= 5.0, "others wait for it"


async def test_when_none_answers_the_line_says_what_each_lacks(rig: Rig) -> None:
    rig.nodes[0].chain = 6
    rig.nodes[1].trouble = Throttled("429", 20.0)
    await rig.endpoints.check()
    rig.nodes[2].trouble = ChainError("no answer")
    for _ in range(3):
        with pytest.raises(ChainError):
            await rig.ask()
    with pytest.raises(ChainError) as caught:
        await rig.ask()
    for words in ("a serves chain 6", "b asked to wait 20 s", "c failed 3 times"):
        assert words in str(caught.value)


async def test_closing_closes_all(rig: Rig) -> None:
    await rig.endpoints.close()
    assert [node.asked for node in rig.nodes] == [["close"]] * 3


# --- pure ----------------------------------------------------------------------------------------


STATES = st.builds(
    Endpoint,
    st.just("x"),
    failures=st.integers(0, 5),
    open_until=st.floats(0, 200),
    patience_until=st.floats(0, 200),
    probing=st.booleans(),
    latency=st.none() | st.floats(0, 30),
    head=st.none() | st.integers(0, 50),
    head_at=st.floats(0, 100),
    behind=st.integers(0, 10),
    seconds_behind=st.floats(0, 100),
    judged_at=st.floats(0, 100),
    chain_id=st.none() | st.just(6),
    forked=st.booleans(),
)


@given(st.lists(STATES, max_size=6))
def test_nobody_with_a_problem_is_asked_and_nobody_else_is_left_out(states: list[Endpoint]) -> None:
    """But for those that lag a little, and come last."""
    chosen = health.order(states, 100.0)
    fit = [i for i, each in enumerate(states) if not health.problem(each, 100.0)]
    late = [
        i
        for i, each in enumerate(states)
        if health.problem(each, 100.0) == f"{each.behind} blocks behind"
        and each.seconds_behind <= health.FAR_SECONDS
    ]
    assert sorted(chosen) == sorted(fit + late)
    assert set(chosen[: len(fit)]) == set(fit)


@given(STATES, st.floats(0, 1000))
def test_every_state_comes_back(state: Endpoint, now: float) -> None:
    """After any failure an endpoint is asked again in bounded time, if nothing new fails."""
    broken = health.failed(replace(state, chain_id=None, forked=False), now)
    later = max(now + health.LONGEST_PAUSE, broken.patience_until) + 1.0
    assert health.problem(replace(broken, behind=0), later) == ""


@given(st.floats(0.1, 50), st.lists(st.floats(0, 2), min_size=1, max_size=60))
def test_a_bucket_never_gives_more_than_its_rate(rate: float, gaps: list[float]) -> None:
    bucket, now = Bucket(rate), 0.0
    for calls, gap in enumerate(gaps, 1):
        now += gap
        bucket, pause = bucket.take(now)
        now += pause
        assert calls <= max(rate, 1.0) + rate * now + 1e-6


def test_endpoints_of_one_host_are_told_apart() -> None:
    rig = Rig([Node("a"), Node("b"), Node("a"), Node("a")])
    assert [view.name for view in rig.endpoints.views()] == ["a", "b", "a#2", "a#3"]
