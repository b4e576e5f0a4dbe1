"""The devnet's relay and application against a real chain, with node accounts driven by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account.signers.local import LocalAccount
from web3 import Web3

from cluster.core.errors import ConfigError, ParametersNotReady, RelayError, ResultRefused
from cluster.core.types import Commitment, TaskStatus, TaskType
from cluster.inference.scoring import score_images, score_llm
from cluster.relay.client import RelayClient
from cluster.relay.signing import sign
from devnet.anvil import Anvil
from devnet.application import GRACE_SECONDS, TaskChange, TaskReport
from devnet.deploy import dev_account
from devnet.tasks import TaskSpec, parse_tasks
from tests.integration.relay_world import (
    HTTP_SECONDS,
    TASK_TIMEOUT,
    UNKNOWN,
    Devnet,
    Node,
    OneKey,
    contents,
    devnet_on,
    hex_key,
    png,
    ticks,
)


@pytest.fixture(scope="module")
def rpc_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Anvil(log_path=tmp_path_factory.mktemp("anvil") / "anvil.log") as chain:
        yield chain.rpc_url


@pytest.fixture
async def devnet(rpc_url: str, tmp_path: Path) -> AsyncIterator[Devnet]:
    async with devnet_on(rpc_url, tmp_path) as devnet:
        yield devnet


@pytest.fixture
async def timely(tmp_path: Path) -> AsyncIterator[Devnet]:
    """A devnet on a chain of its own, whose time the test may move."""
    with Anvil(log_path=tmp_path / "anvil.log") as chain:
        async with devnet_on(chain.rpc_url, tmp_path) as devnet:
            yield devnet


def spec(**fields: Any) -> TaskSpec:
    defaults: dict[str, Any] = {
        "name": "cats",
        "type": TaskType.SD,
        "parameters": {"prompt": "<two> cats & a dög"},
        "model_ids": ("base:x/y",),
    }
    return TaskSpec(**(defaults | fields))


async def started(
    devnet: Devnet, *specs: TaskSpec, changes: list[TaskChange] | None = None, **options: Any
) -> asyncio.Task[list[TaskReport]]:
    seen: Callable[[TaskChange], None] = (changes if changes is not None else []).append
    run = asyncio.create_task(devnet.application(**options).run(specs, seen))
    await asyncio.sleep(0)
    return run


async def test_the_full_path_encrypted(devnet: Devnet) -> None:
    node, changes = devnet.node(11), list[TaskChange]()
    run = await started(devnet, spec(), changes=changes)
    task = await node.current()
    assert await node.parameters(task) == spec().text
    files = [("0.png", png(0)), ("1.png", png(30))]
    await node.answer(task, score_images([data for _, data in files]))
    await node.status(task, {TaskStatus.VALIDATED})
    with pytest.raises(ResultRefused):
        await node.client.upload_result(node.address, task, files[::-1])
    with pytest.raises(ResultRefused):
        await node.client.upload_result(node.address, task, [("0.png", b"no png")])
    with pytest.raises(RelayError):
        await node.client.upload_result(node.address, task, [])
    await node.client.upload_result(node.address, task, files)
    await node.client.upload_result(node.address, task, files)
    with pytest.raises(ParametersNotReady):
        await node.client.fetch_parameters(node.address, task)
    [report] = await run
    await node.client.upload_result(node.address, task, files)
    assert report.as_expected
    assert (report.actual_end, report.commitment, report.node) == (
        "EndSuccess",
        task,
        node.address,
    )
    assert contents(report) == [data for _, data in files]
    statuses = [change.status for change in changes]
    assert statuses == sorted(statuses)
    assert statuses[-1] is TaskStatus.END_SUCCESS


async def test_a_language_task_in_the_clear(devnet: Devnet) -> None:
    node = devnet.node(12)
    run = await started(
        devnet,
        spec(
            type=TaskType.LLM,
            encrypted=False,
            parameters='{"model": "m", "x": "\u2028 <&>"}',
            required_gpu="Sim A+docker",
            required_gpu_vram=8,
        ),
    )
    task = await node.current()
    assert await node.parameters(task) == '{"model": "m", "x": "\u2028 <&>"}'
    await node.answer(task, score_llm(b'{"model": "m"}'))
    await node.status(task, {TaskStatus.VALIDATED})
    await node.client.upload_result(node.address, task, [("0.json", b'{"model": "m"}')])
    [report] = await run
    assert report.as_expected
    assert [Path(name).name for name in report.files] == ["0.json"]


async def test_a_group_of_three(devnet: Devnet) -> None:
    nodes = [devnet.node(seed) for seed in (21, 22, 23)]
    ends = frozenset({"EndGroupSuccess", "EndGroupRefund"})
    run = await started(devnet, spec(group=True, expected_end=ends))

    async def work(node: Node) -> str:
        task = await node.current()
        text = await node.parameters(task)
        await node.answer(task, score_images([png(0)]))
        await node.status(task, {TaskStatus.GROUP_VALIDATED, TaskStatus.END_GROUP_REFUND})
        if node.task(task).status is TaskStatus.GROUP_VALIDATED:
            await node.client.upload_result(node.address, task, [("0.png", png(0))])
        return text

    texts = await asyncio.gather(*(work(node) for node in nodes))
    assert texts == [spec().text] * 3
    reports = await run
    assert all(report.as_expected for report in reports)
    assert sorted(report.actual_end for report in reports) == [
        "EndGroupRefund",
        "EndGroupRefund",
        "EndGroupSuccess",
    ]
    assert [report.name for report in reports] == ["cats", "cats.2", "cats.3"]


async def test_many_tasks_at_once_over_two_nodes(devnet: Devnet) -> None:
    nodes = [devnet.node(seed) for seed in (31, 32)]
    specs = [spec(name=f"t{turn}", encrypted=turn % 2 == 0) for turn in range(8)]
    run = await started(devnet, *specs)

    async def work(node: Node) -> None:
        while True:
            task = await node.current()
            await node.parameters(task)
            await node.answer(task, score_images([png(0)]))
            await node.status(task, {TaskStatus.VALIDATED})
            await node.client.upload_result(node.address, task, [("0.png", png(0))])
            await node.status(task, {TaskStatus.END_SUCCESS})

    workers = [asyncio.create_task(work(node)) for node in nodes]
    reports = await run
    for worker in workers:
        worker.cancel()
    assert [report.name for report in reports] == [each.name for each in specs]
    assert all(report.as_expected and len(report.files) == 1 for report in reports)
    assert {report.node for report in reports} == {node.address for node in nodes}


async def test_never_uploaded_is_aborted(timely: Devnet) -> None:
    node = timely.node(13)
    run = await started(timely, spec(upload=False, expected_end=frozenset({"EndAborted"})))
    task = await node.current()
    with pytest.raises(ParametersNotReady):
        await node.client.fetch_parameters(node.address, task)
    timely.overdue_by(0, node.task(task))
    [report] = await run
    assert report.as_expected
    assert report.seconds_to_score is None


class CountedClock:
    """The application reads it at every look at a task."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return time.time()

    async def looked(self, run: asyncio.Task[list[TaskReport]]) -> None:
        """The application has had two whole looks since now, or has ended."""
        enough = self.reads + 4
        async for _ in ticks():
            if run.done() or self.reads >= enough:
                break


async def test_what_is_validated_late_is_waited_for(timely: Devnet) -> None:
    node, clock, files = timely.node(17), CountedClock(), [("0.png", png(0))]
    run = await started(timely, spec(), clock=clock)
    task = await node.current()
    await node.parameters(task)
    await node.answer(task, score_images([png(0)]))
    await node.status(task, {TaskStatus.VALIDATED})
    timely.overdue_by(1, node.task(task))
    await clock.looked(run)
    assert node.task(task).status is TaskStatus.VALIDATED
    await node.client.upload_result(node.address, task, files)
    [report] = await run
    assert report.as_expected, report.problem


async def test_what_is_validated_and_never_uploaded_is_aborted(timely: Devnet) -> None:
    node = timely.node(18)
    run = await started(timely, spec(expected_end=frozenset({"EndAborted"})))
    task = await node.current()
    await node.parameters(task)
    await node.answer(task, score_images([png(0)]))
    await node.status(task, {TaskStatus.VALIDATED})
    timely.overdue_by(GRACE_SECONDS, node.task(task))
    [report] = await run
    assert report.as_expected, report.problem
    assert report.seconds_to_score is not None


async def test_a_task_may_have_a_timeout_of_its_own(timely: Devnet) -> None:
    node, changes = timely.node(19), list[TaskChange]()
    aborted = {"upload": False, "expected_end": frozenset({"EndAborted"})}
    run = await started(
        timely,
        spec(name="usual", **aborted),
        spec(name="short", timeout=300, **aborted),
        changes=changes,
    )
    async for _ in ticks():
        if {change.name for change in changes} == {"short", "usual"}:
            break
    tasks = {change.name: change.commitment for change in changes}
    assert node.task(tasks["short"]).timeout == 300
    assert node.task(tasks["usual"]).timeout == TASK_TIMEOUT
    timely.overdue_by(0, node.task(tasks["short"]))
    await node.status(tasks["short"], {TaskStatus.END_ABORTED})
    assert node.task(tasks["usual"]).status is TaskStatus.STARTED
    timely.overdue_by(0, node.task(tasks["usual"]))
    assert [(each.name, each.as_expected) for each in await run] == [
        ("usual", True),
        ("short", True),
    ]


async def call(
    devnet: Devnet, account: LocalAccount, task: Commitment, *, at: int, **signed: str
) -> str:
    """What the relay answers to GET of the task, signed by `account` over `signed`."""
    fields = {"task_id_commitment": task, **signed}
    async with httpx.AsyncClient(timeout=HTTP_SECONDS) as http:
        answer = await http.get(
            f"{devnet.relay.url}/v1/inference_tasks/{task}",
            params={"timestamp": at, "signature": sign(fields, at, hex_key(account))},
        )
    body = answer.json()
    if answer.status_code == 200:
        assert body["message"] == "success"
        return "success"
    assert (answer.status_code, body["message"]) == (400, "validation_error")
    return str(body["data"]["message"])


async def test_who_may_read_and_when(devnet: Devnet) -> None:
    now, port = int(time.time()), devnet.relay.port
    devnet.stop_relay()
    devnet.relay = devnet.serve(port=port, clock=lambda: float(now))
    node, stranger = devnet.node(14), dev_account(7)
    run = await started(devnet, spec())
    task = await node.current()
    await node.parameters(task)
    assert await call(devnet, node.account, task, at=now) == "success"
    assert await call(devnet, dev_account(2), task, at=now) == "success"
    assert await call(devnet, stranger, task, at=now) == "Signer not allowed"
    assert await call(devnet, node.account, UNKNOWN, at=now) == "Task not found"
    for at, words in (
        (now - 60, "success"),
        (now - 61, "Invalid signature"),
        (now + 60, "success"),
        (now + 61, "Invalid signature"),
    ):
        assert await call(devnet, node.account, task, at=at) == words
    assert await call(devnet, node.account, task, at=now, other="x") == "Signer not allowed"
    with pytest.raises(RelayError, match="not validated"):
        await node.client.upload_result(node.address, task, [("0.png", png(0))])
    url = f"{devnet.relay.url}/v1/inference_tasks/{task}"
    async with httpx.AsyncClient(timeout=HTTP_SECONDS) as http:
        for query in ({}, {"timestamp": "now"}, {"timestamp": "1", "signature": "0x00"}):
            assert (await http.get(url, params=query)).status_code == 400
        for who, message in ((stranger, "Signer not allowed"), (dev_account(2), "Task results")):
            fields = {"task_id_commitment": task, "index": "0"}
            signature = sign(fields, now, hex_key(who))
            answer = await http.get(
                f"{url}/results/0", params={"timestamp": now, "signature": signature}
            )
            assert answer.json()["data"]["message"].startswith(message)
        fields = {"task_id_commitment": task, "task_args": "{}"}
        data = {"timestamp": str(now), "signature": sign(fields, now, hex_key(stranger))}
        answer = await http.post(url, data={"task_args": "{}", **data})
        assert answer.status_code == 400
    run.cancel()


async def test_a_clock_that_is_wrong_is_made_up_for(devnet: Devnet) -> None:
    node = devnet.node(15)
    run = await started(devnet, spec())
    task = await node.current()
    await node.parameters(task)
    wrong = RelayClient(
        devnet.relay.url, node.http, OneKey(node.account), lambda: time.time() + 4_000
    )
    assert await wrong.fetch_parameters(node.address, task) == spec().text
    run.cancel()


async def test_reports_survive_a_restart_and_are_made_once(devnet: Devnet) -> None:
    port = devnet.relay.port
    devnet.stop_relay()
    devnet.relay = devnet.serve(port=port, report=False)
    node = devnet.node(16)
    run = await started(devnet, spec())
    task = await node.current()
    await node.parameters(task)
    assert node.task(task).status is TaskStatus.STARTED
    devnet.stop_relay()
    devnet.relay = devnet.serve(port=port)
    await node.answer(task, score_images([png(0)]))
    await node.status(task, {TaskStatus.VALIDATED})
    devnet.stop_relay()
    devnet.relay = devnet.serve(port=port, report=False)
    await node.client.upload_result(node.address, task, [("0.png", png(0))])
    devnet.stop_relay()
    assert node.task(task).status is TaskStatus.VALIDATED
    before = devnet.web3.eth.get_transaction_count(Web3.to_checksum_address(dev_account(1).address))
    devnet.relay = devnet.serve(port=port)
    [report] = await run
    assert report.as_expected
    await asyncio.sleep(1)
    relay = Web3.to_checksum_address(dev_account(1).address)
    assert devnet.web3.eth.get_transaction_count(relay) == before + 1


def test_the_task_file() -> None:
    [first, second] = parse_tasks(
        """
tasks:
  - {name: cats, type: SD, model_ids: ["base:x/y"], parameters: {prompt: cats}}
  - {name: bad, type: LLM, model_ids: [], parameters: "no {json", upload: false,
     expected_end: [EndAborted, EndInvalidated]}
""",
        "tasks.yaml",
    )
    assert (first.type, first.text, first.version) == (TaskType.SD, '{"prompt": "cats"}', (2, 5, 0))
    assert (second.type, second.text, second.upload) == (TaskType.LLM, "no {json", False)
    assert second.expected_end == {"EndAborted", "EndInvalidated"}
    for wrong in ("[", "- 1", "- {name: a}", "tasks: 3"):
        with pytest.raises(ConfigError, match=r"tasks\.yaml"):
            parse_tasks(wrong, "tasks.yaml")
    one = '- {name: a, type: SD, model_ids: [], parameters: "", %s}'
    for field in (
        "expected_end: [EndHappily]",
        "expected_end: []",
        "fee: 0",
        "colour: red",
        "timeout: 0",
        "group: true, timeout: 9",
    ):
        with pytest.raises(ConfigError):
            parse_tasks(one % field, "tasks.yaml")
