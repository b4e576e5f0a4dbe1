"""What the network says of its own accord is handled before it is forgotten, whoever crashes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.chain import network as module
from cluster.chain.heads import Heads
from cluster.chain.network import (
    AGAIN_SECONDS,
    UNREACHED_SECONDS,
    ChainNetwork,
    Contracts,
    NetworkSettings,
    _Looked,
)
from cluster.chain.node_contract import NodeContract, NodeInfo
from cluster.chain.outbox import Outbox
from cluster.chain.qos_contract import QosContract
from cluster.chain.rpc import Rpc
from cluster.chain.task_contract import TaskContract
from cluster.chain.wakeups import DROPPED, Wakeups
from cluster.chain.watcher import CURSOR, REORGANISED
from cluster.core.errors import ChainError, NetworkUnavailable
from cluster.core.ports import KICKED_OUT, Wakeup
from cluster.core.types import (
    AccountFacts,
    AccountView,
    Address,
    Commitment,
    NodeStatus,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal
from tests.unit.actor_fakes import KIND
from tests.unit.test_watcher import FOREIGN, NODES, OURS, TASKS, FakeLogs, log

QOS = Address("0x" + "55" * 20)
KICK = Wakeup(OURS, KICKED_OUT, moment=51)


class NoRelay:
    async def now(self) -> float:
        raise AssertionError

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        raise AssertionError

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        raise AssertionError


class NoSigner:
    def sign_transaction(self, account: Address, transaction: Mapping[str, int | str], /) -> bytes:
        raise AssertionError(json.dumps(transaction))


class Rig:
    def __init__(self, folder: Path) -> None:
        self.chain = FakeLogs(50)
        self.now = 0.0
        self.journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        self.begin()

    def begin(self) -> None:
        """A new term, or process."""
        lease = self.journal.acquire("me", Timestamp(0), 1e9)
        assert lease is not None
        rpc = Rpc(self.chain)
        self.network = ChainNetwork(
            rpc,
            Contracts.at(rpc, TASKS, NODES, QOS),
            Outbox(rpc, self.journal, lambda: lease, NoSigner(), lambda: Timestamp(0), 1),
            self.journal,
            lambda: lease,
            NoRelay(),
            (2, 5, 0),
            lambda _: b"",
            lambda: Timestamp(0),
            NetworkSettings(poll=0.001),
            accounts={OURS},
            monotonic=lambda: self.now,
        )
        self.heard: list[Wakeup] = []

    async def listen(self, count: int, handle: bool = True) -> None:
        """Until so many wake-ups were taken, and the last one handled, unless it crashes first."""
        async with asyncio.timeout(60):
            watching = asyncio.create_task(self.network.watch())
            while len(self.heard) < count:
                self.heard.append(await self.network.next_wakeup())
            if handle:
                following = asyncio.create_task(self.network.next_wakeup())
                asked = len(self.chain.asked)
                while self.chain.asked[asked:] == []:  # noqa: ASYNC110
                    self.chain.head += 1
                    await asyncio.sleep(0.001)
                following.cancel()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    made = Rig(tmp_path)
    # What an earlier process left: all up to block 50 is handled.
    lease = made.journal.acquire("me", Timestamp(0), 1e9)
    assert lease is not None
    made.journal.set_cursor(lease, CURSOR, "51")
    made.begin()
    made.chain.head = 60
    made.chain.logs = [
        log("NodeKickedOut", FOREIGN, block=51, address=NODES),
        log("NodeKickedOut", OURS, block=51, address=NODES),
    ]
    return made


async def test_an_account_that_was_never_looked_at_is_heard_of(rig: Rig) -> None:
    await rig.listen(1)
    assert rig.heard == [KICK]


async def test_what_was_taken_and_not_handled_is_said_again_after_a_crash(rig: Rig) -> None:
    await rig.listen(1, handle=False)
    rig.begin()
    await rig.listen(1)
    assert rig.heard == [KICK]
    number = int((rig.journal.cursor(CURSOR) or "").split()[0])
    assert number > 60
    rig.begin()
    rig.chain.head += 1
    rig.chain.logs.append(log("NodeKickedOut", OURS, block=rig.chain.head, address=NODES))
    newest = rig.chain.head
    await rig.listen(1)
    assert [each.moment for each in rig.heard] == [newest]


async def test_what_befell_an_account_is_known_once_all_until_then_was_handled(rig: Rig) -> None:
    with pytest.raises(NetworkUnavailable, match="not all events"):
        await rig.network.befell(OURS, 50, 60)
    await rig.listen(1)
    assert await rig.network.befell(OURS, 50, 60) == (KICK,)
    assert await rig.network.befell(OURS, 51, 60) == ()
    # A term that has just begun doesn't know when it was last as it should be.
    assert await rig.network.befell(OURS, None, 60) == (KICK,)
    assert await rig.network.befell(FOREIGN, 51, 60) == ()


async def test_an_outage_shows_once_it_has_lasted_and_ends_at_once(rig: Rig) -> None:
    chain = rig.chain.__class__.__call__
    away, failures = True, 0

    def events(logs: Sequence[Mapping[str, object]]) -> list[object]:
        return [each["event"] for each in logs if str(each["event"]).startswith("watcher_")]

    async def failed(times: int) -> None:
        until = failures + times
        while failures < until:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def transport(method: str, params: Sequence[object]) -> Mapping[str, object]:
        nonlocal failures
        if away:
            failures += 1
            raise ChainError("no endpoint answers")
        return await chain(rig.chain, method, params)

    rig.network._watcher._rpc = Rpc(transport)
    with capture_logs() as logs:
        async with asyncio.timeout(60):
            watching = asyncio.create_task(rig.network.watch())
            while rig.network._failing is None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert rig.network.trouble() is None, "one that passes is none"
            rig.now += UNREACHED_SECONDS + 1
            assert rig.network.trouble() == "no endpoint answers"
            await failed(20)
            assert events(logs) == ["watcher_waits"], "not a line for each time it is asked"
            rig.now += AGAIN_SECONDS
            await failed(20)
            assert events(logs) == ["watcher_waits", "watcher_waits"]
            away = False
            while rig.network.trouble() is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            while events(logs)[-1] != "watcher_goes_on":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def test_of_a_reorganisation_hear_only_those_who_were_looked_at_in_what_is_gone(rig: Rig) -> None:
    after, before, never = OURS, FOREIGN, NODES
    rig.network._accounts |= {after, before, never}
    for account, moment in ((after, 101), (before, 100)):
        facts = AccountFacts(account, NodeStatus.AVAILABLE, KIND, Wei(1), Wei(1), 1, None)
        view = AccountView(moment, Timestamp(0.0), facts, ())
        rig.network._looked[account] = _Looked("0x", frozenset(), view)
    meant = rig.network._meant(Wakeup(None, REORGANISED, moment=101))
    assert {each.account for each in meant} == {after, never}
    for other in (Wakeup(None, "chain went back"), KICK):
        assert tuple(rig.network._meant(other)) == (other,)


async def test_a_chain_that_stands_still_is_an_alert_and_then_an_outage(rig: Rig) -> None:
    async with asyncio.timeout(60):
        watching = asyncio.create_task(rig.network.watch())
        while rig.network._grew is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert rig.network.alerts() == ()
        rig.now += 61
        assert rig.network.alerts() == ("no new block for 61 s",)
        assert rig.network.trouble() is None
        rig.now += 240
        assert rig.network.trouble() == "no new block for 301 s"
        rig.chain.head += 1
        while rig.network.trouble() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert rig.network.alerts() == ()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_blocks_own_time_stays_where_no_block_comes_and_the_networks_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gives(answer: object, *_: object) -> object:
        await asyncio.sleep(0)
        return answer

    info = NodeInfo(NodeStatus.AVAILABLE, KIND, (2, 5, 0), frozenset())
    for of, name, answer in (
        (NodeContract, "info", info),
        (NodeContract, "stake", Wei(1)),
        (Rpc, "balance", Wei(1)),
        (QosContract, "score", 1),
        (TaskContract, "current_task", None),
    ):
        monkeypatch.setattr(of, name, partial(gives, answer))
    rig.network._clock = lambda: Timestamp(rig.now)
    seen: list[tuple[float | None, float]] = []
    for rig.now in (10.0, 400.0):
        view = await rig.network.look(OURS, ())
        seen.append((view.moment_at, view.now))
    assert seen == [(1.0, 10.0), (1.0, 400.0)]


def test_a_slow_chain_and_one_that_rests_stand_still_for_longer(rig: Rig) -> None:
    for number in range(5):
        rig.network._pulse.saw(number, 100.0 * number, 100.0 * number)
    rig.network._grew = 5, 0.0
    rig.now = 900.0
    assert rig.network.trouble() is None
    rig.now = 1001.0
    words = "no new block for 1001 s, usually there is one in 100.0 s"
    assert rig.network.trouble() == words
    rig.network._settings = NetworkSettings(stalled_after=None)
    assert rig.network.trouble() is None
    assert rig.network.alerts() == ()


def quiet_chain(rig: Rig, heads: Heads) -> None:
    """A block each two seconds, so far; and a connection that promises heads."""
    rig.network._heads = heads
    heads._listening = 1
    for number in range(5):
        rig.network._pulse.saw(number, 2.0 * number, 2.0 * number + 0.3)


@pytest.mark.parametrize("heard", [None, -100.0, -7.0])
def test_a_connection_that_announces_nothing_slows_nobody(rig: Rig, heard: float | None) -> None:
    heads = Heads(clock=lambda: rig.now)
    quiet_chain(rig, heads)
    heads._heard_at = heard
    assert rig.network._pause() <= 3.0


def test_as_long_as_heads_come_nothing_else_is_asked(rig: Rig) -> None:
    heads = Heads(clock=lambda: rig.now)
    quiet_chain(rig, heads)
    heads._heard_at = 0.0
    assert rig.network._pause() == pytest.approx(6.0), "three blocks' time"
    rig.now = 6.5
    assert rig.network._pause() <= 3.0


async def test_a_head_that_is_announced_too_early_is_looked_for_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who announces it and the one who is asked are different machines."""
    monkeypatch.setattr(module, "SOON_SECONDS", 0.001)
    heads = Heads(clock=lambda: rig.now)
    rig.network._settings = NetworkSettings(poll=1000.0)
    rig.network._pause = lambda: 1000.0  # type: ignore[method-assign]
    rig.network._heads = heads
    polls = 0
    poll = rig.network._watcher.poll

    async def counted() -> tuple[Wakeup, ...]:
        nonlocal polls
        polls += 1
        if polls == 4:
            rig.chain.head += 1
        return await poll()

    rig.network._watcher.poll = counted  # type: ignore[method-assign]
    async with asyncio.timeout(60):
        watching = asyncio.create_task(rig.network.watch())
        while polls < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        heads._new.set()
        while rig.network._number() != rig.chain.head or polls < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert polls == 4


# --- from who finds them to who handles them ------------------------------------------------------

STEPS = st.lists(st.sampled_from(["give", "take", "reached with a cursor", "reached"]), max_size=40)


@given(STEPS)
def test_only_what_was_handled_is_stored(steps: list[str]) -> None:
    async def play() -> None:
        stored: list[str] = []
        wakeups = Wakeups(5, stored.append)
        waiting: list[int] = []
        """Blocks of what was given and isn't handled."""
        holding: int | None = None
        block, newest = 1, 0
        for step in steps:
            if step == "give" and len(waiting) < 5:
                wakeups.give(Wakeup(OURS, "x", moment=block))
                waiting.append(block)
            elif step == "take" and waiting:
                taken = await wakeups.take()
                assert taken.moment == waiting.pop(0)
                holding = taken.moment
            elif step.startswith("reached"):
                block += 1
                cursor = str(block) if "cursor" in step else None
                newest = block if cursor else newest
                wakeups.reached(block, cursor)
            unhandled = [*([] if holding is None else [holding]), *waiting]
            lowest = min(unhandled, default=block)
            assert (wakeups.handled or 0) <= lowest
            assert all(int(each) <= lowest for each in stored)
            assert stored == sorted(stored, key=int)
        for _ in waiting:
            await wakeups.take()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await wakeups.take()
        if newest:
            assert stored[-1] == str(newest)
        if block > 1:
            assert wakeups.handled == block

    asyncio.run(play())


async def test_who_doesnt_take_them_is_told_to_look_at_all_and_no_memory_is_lost() -> None:
    stored: list[str] = []
    wakeups = Wakeups(2, stored.append)
    for block in range(1, 100):
        wakeups.give(Wakeup(OURS, "x"))
        wakeups.reached(block, str(block))
    assert stored == []
    assert len(wakeups._marks) == 2
    assert await wakeups.take() == Wakeup(None, DROPPED)
    for _ in range(2):
        assert await wakeups.take() == Wakeup(OURS, "x")
    assert stored == ["1"]
