"""Which node the devnet's contracts give a task to, and how a node comes and goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from eth_account import Account
from web3 import Web3

from cluster.core.types import AbortReason, NodeStatus, TaskStatus, TaskType
from devnet.deploy import Deployment
from tests.integration.contracts_world import (
    GPU,
    STAKE,
    TIMEOUT,
    World,
    account,
    fresh_world,
    new_chain,
)

S = TaskStatus
N = NodeStatus
STRANGER = account(40)


@pytest.fixture(scope="module")
def chain() -> Iterator[tuple[Web3, Deployment]]:
    yield from new_chain()


@pytest.fixture
def world(chain: tuple[Web3, Deployment]) -> Iterator[World]:
    yield from fresh_world(chain)


# --- who gets which task --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "fits"),
    [
        ({"min_vram": 24}, True),
        ({"min_vram": 25}, False),
        ({"gpu": GPU, "vram": 24}, True),
        ({"gpu": GPU, "vram": 24, "min_vram": 99}, True),
        ({"gpu": GPU, "vram": 23}, False),
        ({"gpu": GPU[:-1], "vram": 24}, False),
        ({"version": (2, 5, 0)}, True),
        ({"version": (2, 4, 9)}, True),
        ({"version": (2, 5, 1)}, False),
        ({"version": (2, 6, 0)}, False),
        ({"version": (1, 9, 9)}, False),
        ({"version": (3, 0, 0)}, False),
    ],
)
@pytest.mark.parametrize("queued", [False, True])
def test_matching(world: World, wish: dict[str, Any], fits: bool, queued: bool) -> None:
    if not queued:
        world.join(0)
    c = world.create(**wish)
    if queued:
        assert world.state(c) is S.QUEUED
        world.join(0)
    assert world.state(c) is (S.STARTED if fits else S.QUEUED)
    assert (c in world.task.getQueue().call()) is not fits


@pytest.mark.parametrize("holder", range(3))
def test_a_node_that_holds_the_models_is_preferred(world: World, holder: int) -> None:
    wanted = ["base:m", "lora:n"]
    for i in range(3):
        world.join(i, models=wanted if i == holder else wanted[:1])
    assert world.holder(world.create(models=wanted)) == account(10 + holder)


def test_better_quality_is_picked_more_often(world: World) -> None:
    world.modulus(0)
    bad, good = world.join(0), world.join(1)
    for times in range(2):
        world.do(good, world.node.pause())
        c = world.create()
        assert world.holder(c) == bad
        world.later(TIMEOUT)
        world.do(bad, world.task.abortTask(c, 1))
        world.do(good, world.node.resume())
        assert world.qos.getRecentTaskScore(bad.address).call() == 0, times
    need = (bytes(32), 8, (2 << 128) + (5 << 64))
    picked = Counter(world.node.pick(need, [], i.to_bytes(32, "big")).call() for i in range(120))
    assert picked[good.address] > 4 * picked[bad.address] > 0


def test_a_free_node_takes_the_best_paying_fitting_task(world: World) -> None:
    world.modulus(0)
    low, high, same, alien = (
        world.create(10),
        world.create(30),
        world.create(30),
        world.create(99, gpu="other", vram=1),
    )
    node = world.join(0)
    for c in (high, same, low):
        assert world.task.getNodeTask(node.address).call() == c
        world.ready(c)
        world.score(c)
        world.single(c)
        world.delivered(c)
    assert world.status_of(node) is N.AVAILABLE
    assert world.task.getQueue().call() == [alien]


def test_a_resumed_node_is_served_too(world: World) -> None:
    node = world.join(0)
    world.do(node, world.node.pause())
    c = world.create()
    assert world.do(node, world.node.resume()).names == ["TaskStarted"]
    assert world.holder(c) == node


def test_a_full_queue_drops_the_cheapest(world: World) -> None:
    tasks = [world.create(1000 + i) for i in range(64)]
    cheap, call = world.create_call()
    assert world.do(world.app, call, 999).names == ["TaskEndAborted"]
    assert world.info(cheap)["abortReason"] == AbortReason.TASK_FEE_TOO_LOW
    _, call = world.create_call()
    seen = world.do(world.app, call, 2000)
    assert seen.names == ["TaskEndAborted", "TaskQueued"]
    assert seen.first("TaskEndAborted")["taskIDCommitment"] == tasks[0]
    assert len(world.task.getQueue().call()) == 64


def test_models_are_announced_to_the_picked_and_ten_others(world: World) -> None:
    for i in range(13):
        world.join(i, models=["base:m"] if i in {1, 2} else [])
    world.join(13, gpu="other")
    _, call = world.create_call(
        models=["base:m", "lora:n"], gpu=GPU, vram=24, task_type=TaskType.SD
    )
    seen = world.do(world.app, call, 1)
    told = [a for name, a in seen.events if name == "DownloadModel"]
    picked = seen.first("TaskStarted")["selectedNode"]
    by_model = {
        model: {a["nodeAddress"] for a in told if a["modelID"] == model}
        for model in ("base:m", "lora:n")
    }
    assert len(told) == len(by_model["base:m"]) + len(by_model["lora:n"])
    holders = {account(11).address, account(12).address}
    assert len(by_model["base:m"] - {picked}) == 10
    assert not by_model["base:m"] & holders
    assert picked in by_model["lora:n"]
    assert len(by_model["lora:n"]) == 11
    assert account(23).address not in by_model["lora:n"]


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "pending", "after"),
    [("pause", N.PENDING_PAUSE, N.PAUSED), ("quit", N.PENDING_QUIT, N.QUIT)],
)
def test_leaving_while_busy_waits_for_the_end(
    world: World, asks: str, pending: N, after: N
) -> None:
    c = world.bring_to(S.VALIDATED)
    waiting = world.create()
    node = world.holder(c)
    world.do(node, getattr(world.node, asks)())
    assert world.status_of(node) is pending
    world.delivered(c)
    assert world.status_of(node) is after
    assert world.balance(node) == 1000 + (STAKE if after is N.QUIT else 0)
    assert world.state(waiting) is S.QUEUED


@pytest.mark.parametrize("paused", [False, True])
def test_quit_gives_the_whole_stake_back(world: World, paused: bool) -> None:
    world.join(1)
    node = world.join(0, stake=STAKE + 5, models=["base:a"])
    world.join(2)
    if paused:
        world.do(node, world.node.pause())
    world.do(node, world.node.quit())
    assert world.balance(node) == STAKE + 5
    nobody: tuple[object, ...] = (0, bytes(32), ("", 0), 0, [0, 0, 0], b"", [], [])
    assert world.node.getNodeInfo(node.address).call() == nobody
    assert world.node.getAvailableNodes().call() == [account(11).address, account(12).address]
    world.join(0)
    assert not world.node.nodeContainsModelID(node.address, "base:a").call()


def test_three_bad_tasks_kick_a_node_out(world: World) -> None:
    c = world.bring_to(S.VALIDATED)
    node = world.holder(c)
    world.delivered(c)
    for points, status in ((10, N.AVAILABLE), (0, N.QUIT)):
        c = world.create()
        world.later(TIMEOUT)
        seen = world.do(world.app, world.task.abortTask(c, 1))
        assert world.status_of(node) is status
        assert world.qos.getRecentTaskScore(node.address).call() == points
    assert seen.names == ["TaskEndAborted", "NodeKickedOut"]
    assert seen.first("NodeKickedOut") == {"nodeAddress": node.address}
    assert world.balance(node) == STAKE + 1000
    world.join(0)
    assert not world.qos.shouldKickOut(node.address).call()


def test_two_good_tasks_of_three_keep_a_node(world: World) -> None:
    c = world.bring_to(S.VALIDATED)
    node = world.holder(c)
    world.delivered(c)
    c = world.create()
    world.ready(c)
    world.score(c)
    world.single(c)
    world.delivered(c)
    for points, status in ((20, N.AVAILABLE), (0, N.QUIT)):
        c = world.create()
        world.later(TIMEOUT)
        world.do(world.app, world.task.abortTask(c, 1))
        assert world.qos.getRecentTaskScore(node.address).call() == points
        assert world.status_of(node) is status


def test_the_network_is_full_at_256_nodes(world: World) -> None:
    for _ in range(256):
        who = Account.create()
        world.rpc("anvil_setBalance", who.address, hex(STAKE))
        world.send(who, world.join_call(who), STAKE)
    assert len(world.node.getAvailableNodes().call()) == 256
    call = world.join_call(STRANGER)
    world.rpc("anvil_setBalance", STRANGER.address, hex(STAKE))
    assert world.reason(STRANGER, call, STAKE) == "Network is full"
    c, create = world.create_call(models=[f"base:{i}" for i in range(16)])
    seen = world.do(world.app, create, 1)
    assert seen.gas < 8_000_000
    assert world.state(c) is S.STARTED
