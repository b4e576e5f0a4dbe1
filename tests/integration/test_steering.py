"""What an operator sees and has done over HTTP, with everything behind it real."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx
import pytest
import yaml

from cluster.core.record import AttemptStarted
from cluster.earnings import Earnings
from cluster.status import Status
from cluster.steering import ActionView, Done
from cluster.story import TaskStory
from tests.integration.operator_crashes import CONFIG
from tests.integration.operator_world import HUB_LORA, TEST_SECONDS, OperatorWorld, task

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


async def told(operator: OperatorWorld, order: dict[str, object]) -> tuple[int, Done]:
    """What came of it, once the coordinator has had the time to answer."""

    async def ask() -> httpx.Response | None:
        answer = await operator.post("/v1/actions", order)
        return None if answer.status_code in {429, 503} else answer

    answer = await operator.until(ask, f"{order} is answered")
    return answer.status_code, Done.model_validate(answer.json())


async def found(operator: OperatorWorld, path: str) -> Any:
    async def look() -> httpx.Response | None:
        answer = await operator.get(path)
        return answer if answer.status_code == 200 else None

    return (await operator.until(look, f"{path} is answered")).json()


async def test_a_card_is_drained_and_serves_again(operator: OperatorWorld) -> None:
    status = await operator.until_status(lambda status: status, "a status")
    card = status.gpus[0].gpu_id
    code, done = await told(operator, {"action": "drain", "what": "card", "name": card})
    assert (code, done.kind) == (200, "done")

    def drained(status: Status) -> bool | None:
        return card in status.drain.cards or None

    await operator.until_status(drained, "the card is drained")
    code, done = await told(operator, {"action": "drain", "what": "card", "name": "nobody"})
    assert (code, done.kind) == (404, "unknown")
    assert (await told(operator, {"action": "resume"}))[1].kind == "done"
    assert (await told(operator, {"action": "resume"}))[1].kind == "nothing"

    audit = [ActionView.model_validate(each) for each in await found(operator, "/v1/audit")]
    assert [(each.action, each.arguments.get("name")) for each in audit[:4]] == [
        ("resume", ""),
        ("resume", ""),
        ("drain", "nobody"),
        ("drain", card),
    ]
    assert {each.who for each in audit[:4]} == {"local 127.0.0.1"}


async def test_a_failed_attempt_is_told_whole(operator: OperatorWorld) -> None:
    """From any of the task's ids; its prompt only where the bundle is asked for."""
    operator.gate.close()
    sent = operator.send(task("told-whole"))
    gpu = await operator.computing(lambda: sent.commitments.get("told-whole"))
    os.kill((await operator.gpu_report(gpu.gpu_id)).pid, signal.SIGKILL)
    operator.gate.open()
    (report,) = await sent.ended()
    events = await operator.assert_paid_once(report)
    first = next(event.attempt_id for event in events if isinstance(event, AttemptStarted))
    ((mined, _),) = operator.score_transactions(report.commitment)

    stories = [
        TaskStory.model_validate(await found(operator, f"/v1/tasks/{name}"))
        for name in (report.commitment, report.commitment[2:14], first, mined)
    ]
    assert all(story == stories[0] for story in stories)
    story = stories[0]
    assert (story.outcome, int(story.payment)) == ("EndSuccess", report.fee)
    assert [each.fault is None for each in story.attempts] == [False, True]
    assert story.transactions[0].tx_hash == mined
    assert int(story.transactions[0].cost) > 0
    assert story.bundles == (first,)
    assert {"load", "compute", "score_mined", "uploaded", "paid"} <= story.stages.keys()
    assert "red fox" not in story.model_dump_json()
    bundle = await found(operator, f"/v1/tasks/{first}/bundle")
    assert "red fox" in bundle["parameters"]
    (attempt,) = bundle["attempts"]
    assert attempt["gpu"] == gpu.gpu_id
    assert attempt["card"]["pid"] > 0
    assert attempt["record"]["commitment"] == report.commitment
    assert "red fox" not in operator.log()

    earned = Earnings.model_validate(await found(operator, "/v1/earnings?days=1&step=hour"))
    assert int(earned.paid) >= report.fee
    assert int(earned.gas) > 0
    assert sum(int(step.paid) for step in earned.steps) == int(earned.paid)
    assert sum(int(each.gas) for each in earned.classes) == int(earned.gas)
    assert (await operator.get("/v1/tasks/0123456789abcdef")).status_code in {404, 503}


async def test_what_can_change_changes_and_nothing_else(operator: OperatorWorld) -> None:
    file = operator.devnet.directory / CONFIG
    before = file.read_text()
    said = yaml.safe_load(before)
    try:
        assert (await told(operator, {"action": "reload_config"}))[1].kind == "nothing"
        said["policy"]["retry_backoff"] = 0.3
        said.setdefault("logs", {})["level"] = "debug"
        file.write_text(yaml.safe_dump(said))
        code, done = await told(operator, {"action": "reload_config"})
        assert (code, done.kind) == (200, "done")
        assert done.text == "taken over: policy.retry_backoff, logs.level"
        said["network"]["relay_url"] = "http://127.0.0.1:1"
        said["policy"]["retry_backoff"] = 7
        file.write_text(yaml.safe_dump(said))
        code, done = await told(operator, {"action": "reload_config"})
        assert (code, done.kind) == (409, "refused")
        assert "network.relay_url can't change while it runs" in done.text
        file.write_text("nonsense: [")
        assert (await told(operator, {"action": "reload_config"}))[0] == 409
    finally:
        file.write_text(before)
        assert (await told(operator, {"action": "reload_config"}))[1].kind == "done"
    (report,) = await operator.send(task("after-reload")).ended()
    await operator.assert_paid_once(report)


async def test_a_model_is_brought_and_dropped(operator: OperatorWorld) -> None:
    model = f"lora:{HUB_LORA}"
    fetches = [len(operator.hub.requests(f"api/models/{HUB_LORA}"))]

    async def dropped() -> bool:
        return (await told(operator, {"action": "drop_model", "model": model}))[0] == 200

    for _ in range(2):
        assert (await told(operator, {"action": "preload_model", "model": model}))[1].kind == "done"
        await operator.until(dropped, "it was fetched, and is dropped once nothing uses it")
        assert (await told(operator, {"action": "drop_model", "model": model}))[0] == 409
        fetches.append(len(operator.hub.requests(f"api/models/{HUB_LORA}")))
    assert fetches[-1] > fetches[-2]
    code, done = await told(operator, {"action": "preload_model", "model": "nonsense"})
    assert (code, done.kind) == (404, "unknown")
    (pinned,) = operator.config.models.pin
    code, done = await told(operator, {"action": "drop_model", "model": pinned})
    assert (code, done.kind) == (409, "refused")
