"""What the devnet's contracts refuse, and with which reason (protocol.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from web3 import Web3

from cluster.core.types import TaskStatus, TaskType
from devnet.deploy import Deployment, public_key, sampling_proof
from tests.integration.contracts_world import STAKE, World, account, fresh_world, new_chain

S = TaskStatus
A = b"\1" * 32
STRANGER = account(40)


@pytest.fixture(scope="module")
def chain() -> Iterator[tuple[Web3, Deployment]]:
    yield from new_chain()


@pytest.fixture
def world(chain: tuple[Web3, Deployment]) -> Iterator[World]:
    yield from fresh_world(chain)


Refusal = tuple[Callable[[World], Any], str]


def on(status: S, function: str, *arguments: Any) -> Callable[[World], Any]:
    return lambda w: getattr(w.task, function)(w.bring_to(status), *arguments)


def single(w: World, status: S = S.SCORE_READY) -> Any:
    c = w.bring_to(status)
    return w.task.validateSingleTask(c, *w.proof(c))


NODE_REFUSALS: dict[str, Refusal] = {
    "not found: score": (lambda w: w.task.submitTaskScore(A, A), "Task not found"),
    "not found: zero": (lambda w: w.task.submitTaskScore(bytes(32), A), "Task not found"),
    "not found: error": (lambda w: w.task.reportTaskError(A, 1), "Task not found"),
    "not found: abort": (lambda w: w.task.abortTask(A, 1), "Task not found"),
    "early score": (on(S.STARTED, "submitTaskScore", A), "Illegal previous task state"),
    "early error": (on(S.STARTED, "reportTaskError", 1), "Illegal previous task state"),
    "second score": (on(S.SCORE_READY, "submitTaskScore", A), "Illegal previous task state"),
    "score, then error": (on(S.SCORE_READY, "reportTaskError", 1), "Illegal previous task state"),
    "error, then score": (
        on(S.ERROR_REPORTED, "submitTaskScore", A),
        "Illegal previous task state",
    ),
    "ended": (on(S.END_SUCCESS, "submitTaskScore", A), "Wrong task"),
    "ended: abort": (on(S.END_SUCCESS, "abortTask", 1), "Illegal previous task state"),
    "queued": (on(S.QUEUED, "submitTaskScore", A), "Invalid caller"),
    "empty score": (on(S.PARAMETERS_UPLOADED, "submitTaskScore", b""), "Invalid task score"),
    "error none": (on(S.PARAMETERS_UPLOADED, "reportTaskError", 0), "Invalid task error"),
    "no such error": (on(S.PARAMETERS_UPLOADED, "reportTaskError", 2), "Invalid task error"),
    "not the relay": (on(S.STARTED, "reportTaskParametersUploaded"), "Invalid caller"),
    "not the relay either": (on(S.VALIDATED, "reportTaskResultUploaded"), "Invalid caller"),
    "not the creator": (lambda w: single(w), "Invalid caller"),
}


@pytest.mark.parametrize("name", NODE_REFUSALS)
def test_refused_to_a_node(world: World, name: str) -> None:
    make, reason = NODE_REFUSALS[name]
    assert world.reason(account(10), make(world)) == reason


@pytest.mark.parametrize("size", [0, 1, 7, 9, 63])
def test_an_image_score_is_whole_blocks(world: World, size: int) -> None:
    node = world.join(0)
    c = world.create(task_type=TaskType.SD)
    world.ready(c)
    assert world.reason(node, world.task.submitTaskScore(c, bytes(size))) == "Invalid task score"


def test_another_nodes_task_is_refused(world: World) -> None:
    c = world.bring_to(S.PARAMETERS_UPLOADED)
    other = world.join(1)
    for call in (world.task.submitTaskScore(c, A), world.task.reportTaskError(c, 1)):
        assert world.reason(other, call) == "Invalid caller"


JOIN_REFUSALS: dict[str, tuple[Callable[[World], Any], int, str]] = {
    "stake": (lambda w: w.join_call(STRANGER), STAKE - 1, "Staked amount is not enough"),
    "key": (
        lambda w: w.join_call(STRANGER, key=public_key(account(10))),
        STAKE,
        "Public key mismatch",
    ),
    "prefixed key": (
        lambda w: w.join_call(STRANGER, key=b"\4" + public_key(STRANGER)),
        STAKE,
        "Public key mismatch",
    ),
    "quit": (lambda w: w.node.quit(), 0, "Illegal node status"),
    "pause": (lambda w: w.node.pause(), 0, "Illegal node status"),
    "resume": (lambda w: w.node.resume(), 0, "Illegal node status"),
    "model": (lambda w: w.node.reportModelDownloaded("base:a"), 0, "Node has quitted"),
    "version": (lambda w: w.node.updateVersion([1, 2, 3]), 0, "Node has quitted"),
    "models held": (
        lambda w: w.node.nodeContainsModelID(STRANGER.address, "a"),
        0,
        "Node has quitted",
    ),
}


@pytest.mark.parametrize("name", JOIN_REFUSALS)
def test_refused_to_who_has_not_joined(world: World, name: str) -> None:
    make, value, reason = JOIN_REFUSALS[name]
    world.rpc("anvil_setBalance", STRANGER.address, hex(STAKE))
    assert world.reason(STRANGER, make(world), value) == reason


def test_refused_by_a_nodes_status(world: World) -> None:
    node = world.join(0)
    world.rpc("anvil_setBalance", node.address, hex(STAKE))
    assert world.reason(node, world.join_call(node), STAKE) == "Node already joined"
    illegal = "Illegal node status"
    assert world.reason(node, world.node.resume()) == illegal
    world.do(node, world.node.pause())
    assert world.reason(node, world.node.pause()) == illegal
    world.do(node, world.node.resume())
    world.create()
    world.do(node, world.node.pause())
    for call in (world.node.pause(), world.node.quit(), world.node.resume()):
        assert world.reason(node, call) == illegal


def test_refused_to_create(world: World) -> None:
    c, call = world.create_call()
    assert world.reason(world.app, call, 0) == "Task fee is zero"
    world.do(world.app, call, 1)
    assert world.reason(world.app, call, 1) == "Nonce already used"
    again = world.task.createTask(0, c, b"\xee" * 32, [], 0, "", 0, [2, 5, 0], 1)
    assert world.reason(world.app, again, 1) == "Task already exists"
    unknown = world.task.createTask(3, A, b"\xed" * 32, [], 0, "", 0, [2, 5, 0], 1)
    assert world.reason(world.app, unknown, 1) == "Invalid task type"


def test_refused_to_validate(world: World) -> None:
    c = world.bring_to(S.SCORE_READY)
    proof, key = world.proof(c)
    validate = world.task.validateSingleTask
    other = sampling_proof(account(10), world.info(c)["samplingSeed"])
    assert world.reason(world.app, validate(c, proof, other.public_key)) == "Public key mismatch"
    for bad in (other.proof, proof[:64], proof[:64] + b"\2", b""):
        assert world.reason(world.app, validate(c, bad, key)) == "Invalid VRF proof"
    world.single(c)
    assert world.reason(world.app, validate(c, proof, key)) == "Illegal previous task state"
    assert world.reason(world.app, validate(A, proof, key)) == "Task not found"


def test_refused_to_validate_a_group(world: World) -> None:
    world.modulus(1)
    guid = b"\x55" * 32
    for i in range(4):
        world.join(i)
    tasks = [world.create(guid=guid) for _ in range(3)]
    mixed = world.create(guid=guid, task_type=TaskType.SD)
    for c in (*tasks, mixed):
        world.ready(c)
    world.score(mixed)
    validate = world.task.validateTaskGroup
    one, two, three = tasks
    proof = world.proof(one)
    early = validate(one, two, three, guid, *proof)
    assert world.reason(world.app, early) == "Illegal previous task state"
    for c in tasks:
        world.score(c)
    assert world.reason(STRANGER, early) == "Invalid caller"
    refusals = [
        (validate(one, two, three, A, *proof), "Invalid task GUID"),
        (validate(one, two, A, guid, *proof), "Task not found"),
        (validate(one, two, two, guid, *proof), "Invalid task sequence"),
        (validate(two, one, three, guid, *world.proof(two)), "Invalid task sequence"),
        (validate(one, two, mixed, guid, *proof), "Different task types"),
        (validate(one, two, three, guid, *world.proof(two)), "Invalid VRF proof"),
        (world.task.validateSingleTask(one, *proof), "Task is selected for a group"),
    ]
    for call, reason in refusals:
        assert world.reason(world.app, call) == reason
    assert world.reason(world.app, early) is None


@pytest.mark.parametrize("sampled", [False, True])
def test_the_last_digit_decides(world: World, sampled: bool) -> None:
    """At the network's modulus: a new seed until its number ends as wanted."""
    world.join(0)
    guid = bytes(32)
    for _ in range(200):
        before = world.rpc("evm_snapshot")
        c = world.create()
        assert world.task.getSamplingModulus(c).call() == 10
        number = sampling_proof(world.app, world.info(c)["samplingSeed"]).number
        if (number % 10 == 0) is sampled:
            break
        world.rpc("evm_revert", before)
        world.rpc("evm_mine")
    world.ready(c)
    world.score(c)
    one = world.task.validateSingleTask(c, *world.proof(c))
    assert world.reason(world.app, one) == ("Task is selected for a group" if sampled else None)
    others = []
    for i in (1, 2):
        world.join(i)
        others.append(world.create(guid=guid))
        world.ready(others[-1])
        world.score(others[-1])
    group = world.task.validateTaskGroup(c, *others, guid, *world.proof(c))
    assert world.reason(world.app, group) == (
        None if sampled else "Task is not selected for a group"
    )


def test_only_the_owner_sets_things(world: World) -> None:
    zero = STRANGER.address
    calls = [
        world.task.setTimeout(1),
        world.task.setRelay(zero),
        world.task.setSamplingModulus(1),
        world.task.nodeAvailable(zero),
        world.node.setTasks(zero),
        world.node.startTask(zero, []),
        world.node.finishTask(zero, 10),
        world.node.slash(zero),
        world.qos.setRegistry(zero),
        world.qos.record(zero, 1),
        world.qos.forget(zero),
    ]
    for call in calls:
        assert world.reason(STRANGER, call) == "Invalid caller"
