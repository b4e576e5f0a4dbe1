"""Tasks carried through whatever endpoints and chains do, by schedules that hypothesis draws.

Two endpoints that break, each in its own way and time, on a real chain that is reorganised up to
twelve blocks deep and whose base fee jumps; an operator that looks only when it is woken, and
begins anew now and then. At the end: every task that the chain still had for us is answered, by one
score, what was to be paid is paid once, and no account has a gap in its nonces.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from cluster.chain.rpc import Rpc
from cluster.core.errors import NetworkUnavailable
from cluster.core.types import TaskStatus
from devnet.anvil import Anvil
from devnet.rpc_proxy import KINDS, RpcProxy
from tests.chaos.chain_world import BLOCK_SECONDS, DEEPEST, World, running

TASKS = 3
GWEI = 10**9


@dataclass(frozen=True)
class Event:
    """`at` and `seconds` in tenths, for `shrink`ing; `where`: 0, 1, or 2 for both endpoints."""

    at: int
    kind: str
    where: int
    seconds: int
    share: int
    """Of ten calls."""


TIMES = st.integers(0, 60)
EVENTS = st.lists(
    st.one_of(
        st.builds(
            Event,
            TIMES,
            st.sampled_from(KINDS),
            st.integers(0, 2),
            st.integers(1, 25),
            st.sampled_from([3, 6, 10]),
        ),
        st.builds(Event, TIMES, st.just("reorg"), st.just(0), st.integers(1, DEEPEST), st.just(10)),
        st.builds(Event, TIMES, st.just("fee"), st.just(0), st.integers(2, 60), st.just(10)),
        st.builds(Event, TIMES, st.just("restart"), st.just(0), st.just(1), st.just(10)),
    ),
    max_size=10,
)
EVERY_REORG = [Event(4 + 6 * n, "reorg", 0, depth, 10) for n, depth in enumerate((1, 2, 3, 6, 12))]
OUTAGE = [Event(5, "drop", 2, 60, 10), Event(20, "reorg", 0, 6, 10)]
LOST = [Event(0, "lose", 2, 80, 6), Event(30, "429", 0, 20, 10), Event(15, "restart", 0, 1, 10)]
LATE = [Event(0, "late logs", 2, 80, 10), Event(25, "reorg", 0, 2, 10)]
BROKEN_FIRST = [
    Event(0, "quota", 0, 30, 10),
    Event(32, "401", 0, 20, 10),
    Event(55, "refuse", 0, 20, 10),
]
FORGETFUL = [Event(5, "no receipts", 2, 50, 8), Event(20, "reorg", 0, 3, 10)]
DEAR = [Event(3 + 8 * n, "fee", 0, 5 * 3**n, 10) for n in range(4)] + [
    Event(12, "restart", 0, 1, 10)
]


async def play(
    events: Sequence[Event], world: World, anvil: Anvil, proxies: Sequence[RpcProxy]
) -> None:
    """Let it all happen, each at its time."""
    began = time.monotonic()
    direct = Rpc.http(anvil.rpc_url)
    try:
        for event in sorted(events, key=lambda each: each.at):
            await asyncio.sleep(max(began + event.at / 10 - time.monotonic(), 0.0))
            await happen(event, world, direct, proxies)
    finally:
        await direct.close()


async def happen(event: Event, world: World, direct: Rpc, proxies: Sequence[RpcProxy]) -> None:
    if event.kind == "restart":
        await world.end()
        world.begin()
    elif event.kind == "reorg":
        with contextlib.suppress(NetworkUnavailable):
            await direct.request("anvil_reorg", event.seconds, [])
    elif event.kind == "fee":
        await direct.request("anvil_setNextBlockBaseFeePerGas", hex(event.seconds * GWEI))
    else:
        for index, proxy in enumerate(proxies):
            if event.where in {index, 2}:
                proxy.fail(event.kind, event.seconds / 10, event.share / 10)


async def run(events: Sequence[Event], folder: Path) -> None:
    with (
        Anvil(block_time=BLOCK_SECONDS) as anvil,
        RpcProxy(anvil.rpc_url, 1) as one,
        RpcProxy(anvil.rpc_url, 2) as other,
    ):
        world = World(folder, anvil, (one, other))
        async with running(world):
            happening = asyncio.create_task(play(events, world, anvil, (one, other)))
            tasks = [await world.carry(number) for number in range(1, TASKS + 1)]
            await happening
            one.heal()
            other.heal()
            # What happened at last may have taken something back.
            tasks = [await world.carry(number) for number in range(1, TASKS + 1)]
            await world.settled()
            await world.assert_right(tasks)


@pytest.mark.timeout(1800)
@settings(
    max_examples=4,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(EVENTS)
@example(EVERY_REORG)
@example(OUTAGE)
@example(LOST)
@example(LATE)
@example(BROKEN_FIRST)
@example(FORGETFUL)
@example(DEAR)
def test_no_task_is_lost_and_none_is_answered_twice(events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(events, Path(folder)))


POINTS = (
    TaskStatus.STARTED,
    TaskStatus.PARAMETERS_UPLOADED,
    TaskStatus.SCORE_READY,
    TaskStatus.VALIDATED,
    TaskStatus.END_SUCCESS,
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12])
def test_a_reorganisation_at_every_point_of_a_task(depth: int, tmp_path: Path) -> None:
    asyncio.run(reorganised(depth, tmp_path))


async def reorganised(depth: int, folder: Path) -> None:
    with (
        Anvil(block_time=BLOCK_SECONDS) as anvil,
        RpcProxy(anvil.rpc_url, 1) as one,
        RpcProxy(anvil.rpc_url, 2) as other,
    ):
        world = World(folder, anvil, (one, other))
        async with running(world):
            for number, point in enumerate(POINTS, 1):
                await world.carry(number, (point, depth))
            # The last one may have taken an earlier task back.
            tasks = [await world.carry(number) for number in range(1, len(POINTS) + 1)]
            await world.settled()
            await world.assert_right(tasks)
