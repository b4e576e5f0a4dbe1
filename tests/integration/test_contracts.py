"""The devnet's contracts against the rules of protocol.md sections 1 and 2, on a real chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from web3 import Web3

from cluster.core.types import AbortReason, NodeStatus, TaskStatus, TaskType
from devnet import compile as contracts
from devnet.deploy import Deployment, public_key
from tests.integration.contracts_world import (
    GPU,
    STAKE,
    TIMEOUT,
    VERSION,
    World,
    account,
    fresh_world,
    new_chain,
)

S = TaskStatus
N = NodeStatus
A, B, C = b"\1" * 32, b"\2" * 32, b"\3" * 32
STRANGER = account(40)


@pytest.fixture(scope="module")
def chain() -> Iterator[tuple[Web3, Deployment]]:
    yield from new_chain()


@pytest.fixture
def world(chain: tuple[Web3, Deployment]) -> Iterator[World]:
    yield from fresh_world(chain)


def test_artifacts_are_what_the_sources_give() -> None:
    assert contracts.outdated() == ()


# --- one task -------------------------------------------------------------------------------------


def test_a_single_task_is_run_and_paid(world: World) -> None:
    world.modulus(0)
    node = world.join(0)
    assert world.node.getAvailableNodes().call() == [node.address]
    c, call = world.create_call(task_type=TaskType.SD, gpu=GPU, vram=24)
    seen = world.do(world.app, call, 777)
    assert seen.first("TaskStarted") == {
        "taskIDCommitment": c,
        "selectedNode": node.address,
    }
    assert world.status_of(node) is N.BUSY
    assert world.node.getAvailableNodes().call() == []
    assert world.task.getNodeTask(node.address).call() == c
    world.ready(c)
    scored = world.score(c, b"12345678")
    assert scored.first("TaskScoreReady")["taskScore"] == b"12345678"
    assert world.single(c).names == ["TaskValidated"]
    assert world.state(c) is S.VALIDATED
    assert world.delivered(c).names == ["TaskEndSuccess"]
    assert world.balance(node) == 777
    assert world.task.getNodeTask(node.address).call() == bytes(32)
    assert world.status_of(node) is N.AVAILABLE
    assert world.qos.getRecentTaskScore(node.address).call() == 10


def test_get_task_tells_everything(world: World) -> None:
    models = ["base:org/model+fp16", "lora:https://example.org/x.safetensors"]
    node = world.join(0)
    c = world.create(5, models=models, min_vram=8, gpu=GPU, vram=24, task_type=TaskType.SD_FT)
    world.ready(c)
    world.score(c, bytes(range(80)))
    info = world.info(c)
    seed, nonce = info.pop("samplingSeed"), info.pop("nonce")
    times = [info.pop(f"{name}Timestamp") for name in ("create", "start", "scoreReady")]
    assert times == sorted(times)
    assert times[0] > 0
    assert seed != bytes(32)
    assert nonce != bytes(32)
    assert info == {
        "taskType": 2,
        "creator": world.app.address,
        "taskIDCommitment": c,
        "sequence": 1,
        "status": S.SCORE_READY,
        "selectedNode": node.address,
        "timeout": TIMEOUT,
        "score": bytes(range(80)),
        "taskFee": 5,
        "taskSize": 1,
        "modelIDs": models,
        "minimumVRAM": 8,
        "requiredGPU": GPU,
        "requiredGPUVRAM": 24,
        "taskVersion": list(VERSION),
        "abortReason": 0,
        "error": 0,
        "paymentAddresses": [],
        "payments": [],
    }
    assert world.info(bytes(32))["taskIDCommitment"] == bytes(32)


def test_get_node_info_tells_everything(world: World) -> None:
    node = world.join(0, models=["base:a"])
    world.do(node, world.node.reportModelDownloaded("base:b"))
    world.do(node, world.node.updateVersion([2, 6, 1]))
    world.create(models=["base:b", "lora:c"])
    status, _, gpu, score, version, key, last, local = world.node.getNodeInfo(node.address).call()
    assert (status, gpu, score, version) == (N.BUSY, (GPU, 24), 10, [2, 6, 1])
    assert (key, last, local) == (public_key(node), ["base:b", "lora:c"], ["base:a", "base:b"])
    assert world.node.nodeContainsModelID(node.address, "base:b").call()
    assert not world.node.nodeContainsModelID(node.address, "lora:c").call()


def test_an_honest_error_report_costs_nothing(world: World) -> None:
    c = world.bring_to(S.ERROR_REPORTED)
    node, before = world.holder(c), world.balance(world.app)
    assert world.info(c)["error"] == 1
    assert world.single(c).first("TaskEndAborted") == {
        "taskIDCommitment": c,
        "abortIssuer": world.app.address,
        "lastStatus": S.ERROR_REPORTED,
        "abortReason": AbortReason.INCORRECT_RESULT,
    }
    assert world.balance(world.app) == before + 1000
    assert world.status_of(node) is N.AVAILABLE
    assert world.node.getStakedAmount(node.address).call() == STAKE
    assert world.qos.getRecentTaskScore(node.address).call() == 10


# --- groups ---------------------------------------------------------------------------------------

GV, REF, BAD, AB = S.GROUP_VALIDATED, S.END_GROUP_REFUND, S.END_INVALIDATED, S.END_ABORTED
GROUPS: list[tuple[tuple[bytes | str, ...], tuple[TaskStatus, ...]]] = [
    ((A, A, A), (GV, REF, REF)),
    ((A, A, B), (GV, REF, BAD)),
    ((A, B, A), (GV, BAD, REF)),
    ((B, A, A), (BAD, GV, REF)),
    ((A, A, "error"), (GV, REF, BAD)),
    (("error", A, A), (BAD, GV, REF)),
    ((A, "error", "error"), (BAD, AB, AB)),
    (("error", A, "error"), (AB, BAD, AB)),
    (("error", "error", A), (AB, AB, BAD)),
    (("error", "error", "error"), (AB, AB, AB)),
    ((A, B, C), (AB, AB, AB)),
    ((A, B, "error"), (AB, AB, AB)),
    ((A, A, "abort"), (GV, REF, AB)),
    (("abort", A, A), (AB, GV, REF)),
    ((A, B, "abort"), (AB, AB, AB)),
    ((A, "error", "abort"), (AB, AB, AB)),
    (("error", "error", "abort"), (AB, AB, AB)),
    ((A, "abort", "abort"), (AB, AB, AB)),
    (("abort", "abort", "abort"), (AB, AB, AB)),
]


def short(answers: Sequence[bytes | str]) -> str:
    return "".join({A: "A", B: "B", C: "C", "error": "e", "abort": "-"}[a] for a in answers)


@pytest.mark.parametrize(
    ("answers", "verdicts"), GROUPS, ids=[short(answers) for answers, _ in GROUPS]
)
def test_group(world: World, answers: Sequence[bytes | str], verdicts: Sequence[S]) -> None:
    money, owner_before = world.balance(world.app), world.balance(world.owner)
    tasks = world.group_of(answers)
    nodes = [world.holder(c) for c in tasks]
    assert [world.state(c) for c in tasks] == list(verdicts)
    for c, node, answer, verdict in zip(tasks, nodes, answers, verdicts, strict=True):
        slashed = verdict is BAD
        assert world.node.getStakedAmount(node.address).call() == (0 if slashed else STAKE)
        expected = {BAD: N.QUIT, GV: N.BUSY}.get(verdict, N.AVAILABLE)
        assert world.status_of(node) is expected
        if verdict is AB:
            reason = AbortReason.TIMEOUT if answer == "abort" else AbortReason.INCORRECT_RESULT
            assert world.info(c)["abortReason"] == reason
    assert world.balance(world.owner) - owner_before == STAKE * verdicts.count(BAD)
    paying = 25_000 if GV in verdicts else 0
    assert world.balance(world.task_contract.address) == paying
    assert money - world.balance(world.app) == paying
    if paying:
        first = tasks[list(verdicts).index(GV)]
        assert world.delivered(first).names == ["TaskEndGroupSuccess"]
        agreeing = [n for n, v in zip(nodes, verdicts, strict=True) if v in {GV, REF}]
        assert sum(world.balance(node) for node in agreeing) == 25_000
        assert world.info(first)["paymentAddresses"] == [node.address for node in agreeing]
        assert all(world.status_of(node) is N.AVAILABLE for node in agreeing)


@pytest.mark.parametrize(
    ("order", "shares"),
    [
        ((0, 1, 2), (10_000, 9_000, 6_000)),
        ((2, 0, 1), (9_000, 6_000, 10_000)),
        ((1, 2, 0), (6_000, 10_000, 9_000)),
    ],
)
def test_the_fee_is_split_by_order_of_submission(
    world: World, order: Sequence[int], shares: Sequence[int]
) -> None:
    tasks = world.group_of([A, A, A], order=order)
    nodes = [world.holder(c) for c in tasks]
    assert [world.balance(node) for node in nodes] == [0, 0, 0]
    world.delivered(tasks[0])
    assert [world.balance(node) for node in nodes] == list(shares)
    assert world.info(tasks[0])["payments"] == list(shares)
    recent = [world.qos.getRecentTaskScore(node.address).call() for node in nodes]
    assert recent == [share // 1000 for share in shares]


def test_a_group_splits_what_division_leaves_over(world: World) -> None:
    tasks = world.group_of([A, A, B], fee=100)
    world.delivered(tasks[0])
    assert world.info(tasks[0])["payments"] == [52, 48]


def test_a_slash_is_announced(world: World) -> None:
    guid = bytes(31) + b"\7"
    world.modulus(1)
    for i in range(3):
        world.join(i)
    tasks = [world.create(guid=guid) for _ in range(3)]
    for c, answer in zip(tasks, (A, A, B), strict=True):
        world.ready(c)
        world.score(c, answer)
    loser = world.holder(tasks[2])
    seen = world.group(tasks, guid)
    assert seen.names == [
        "TaskValidated",
        "TaskEndGroupRefund",
        "TaskEndInvalidated",
        "NodeSlashed",
    ]
    assert seen.first("NodeSlashed") == {"nodeAddress": loser.address}
    # It may come back, with a new stake.
    world.join(int(next(i for i in range(3) if account(10 + i) == loser)))
    assert world.status_of(loser) is N.AVAILABLE


def flipped(score: bytes, bits: int, block: int = 0) -> bytes:
    """`score` with `bits` bits of one 8-byte block inverted."""
    mask = ((1 << bits) - 1) << (8 * (len(score) - 8 * (block + 1)))
    return (int.from_bytes(score, "big") ^ mask).to_bytes(len(score), "big")


@pytest.mark.parametrize("task_type", [TaskType.SD, TaskType.SD_FT])
@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        pytest.param(A, True, id="equal"),
        pytest.param(flipped(A, 23), True, id="23"),
        pytest.param(flipped(A, 24), False, id="24"),
        pytest.param(flipped(A, 64), False, id="64"),
        pytest.param(flipped(A, 23, block=3), True, id="23 in the last"),
        pytest.param(flipped(A, 24, block=3), False, id="24 in the last"),
        pytest.param(flipped(flipped(A, 23), 23, block=1), True, id="23 in two"),
        pytest.param(A[:24], False, id="shorter"),
        pytest.param(A + A, False, id="longer"),
    ],
)
def test_images_agree_below_24_bits_a_block(
    world: World, task_type: TaskType, other: bytes, agrees: bool
) -> None:
    tasks = world.group_of([A, other, "abort"], task_type)
    assert world.state(tasks[0]) is (GV if agrees else AB)


def test_text_agrees_only_when_equal(world: World) -> None:
    tasks = world.group_of([A, flipped(A, 1), "abort"], TaskType.LLM)
    assert world.state(tasks[0]) is AB


# --- the timeout ----------------------------------------------------------------------------------

OPEN = [s for s in TaskStatus if s <= S.GROUP_VALIDATED]


@pytest.mark.parametrize("status", OPEN)
def test_any_open_task_can_be_aborted_after_the_timeout(world: World, status: S) -> None:
    c = world.bring_to(status)
    abort = world.task.abortTask(c, AbortReason.TIMEOUT)
    info, before = world.info(c), world.balance(world.app)
    assert world.reason(world.app, abort) == "Timeout not reached"
    assert world.reason(STRANGER, abort) == "Invalid caller"
    world.later(TIMEOUT)
    assert world.reason(STRANGER, abort) == "Invalid caller"
    issuer = world.app if status is S.QUEUED else world.holder(c)
    assert world.do(issuer, abort).first("TaskEndAborted") == {
        "taskIDCommitment": c,
        "abortIssuer": issuer.address,
        "lastStatus": status,
        "abortReason": AbortReason.TIMEOUT,
    }
    assert world.balance(world.app) == before + info["taskFee"]
    assert world.info(c)["paymentAddresses"] == []
    assert world.task.getQueue().call() == []
    if status is not S.QUEUED:
        assert world.status_of(issuer) is N.AVAILABLE
    assert world.reason(world.app, abort) == "Illegal previous task state"


def test_the_timeout_is_reached_to_the_second(world: World) -> None:
    c = world.bring_to(S.STARTED)
    start, abort = world.info(c)["startTimestamp"], world.task.abortTask(c, 1)
    world.rpc("evm_setNextBlockTimestamp", start + TIMEOUT - 1)
    assert not world.send(world.app, abort).ok
    world.rpc("evm_setNextBlockTimestamp", start + TIMEOUT)
    assert world.send(world.app, abort).ok


def test_a_timeout_holds_for_tasks_created_after_it(world: World) -> None:
    early = world.create()
    world.do(world.owner, world.task.setTimeout(7))
    late = world.create()
    assert [world.info(c)["timeout"] for c in (early, late)] == [TIMEOUT, 7]


def test_a_dead_relay_keeps_the_points_of_a_validated_task(world: World) -> None:
    c = world.bring_to(S.VALIDATED)
    node = world.holder(c)
    world.later(TIMEOUT)
    world.do(node, world.task.abortTask(c, 1))
    assert world.qos.getRecentTaskScore(node.address).call() == 10
