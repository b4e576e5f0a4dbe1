"""The operator's HTTP face, from the real Serve application and the real coordinator."""

from __future__ import annotations

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import cluster
from cluster.status import Status
from tests.integration.operator_world import (
    ACCOUNTS,
    AWAY,
    CARDS,
    PATIENCE,
    TEST_SECONDS,
    OperatorWorld,
    answer_of,
    task,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


async def fetched(operator: OperatorWorld, path: str, code: int = 200) -> httpx.Response:
    """The answer with that code: one that asks the coordinator gives it 3 s, and it may be busy."""

    async def look() -> httpx.Response | None:
        answer = await operator.get(path)
        return answer if answer.status_code == code else None

    return await operator.until(look, f"{path} answers {code}")


async def until_missing(operator: OperatorWorld, *words: str) -> None:
    async def look() -> bool:
        found = await operator.missing()
        return len(found) == len(words) and all(map(str.startswith, found, words))

    await operator.until(look, f"/readyz says {words or 'ready'}")


async def test_alive_and_ready(operator: OperatorWorld) -> None:
    answer = await operator.get("/healthz")
    assert (answer.status_code, answer.json()["version"]) == (200, cluster.__version__)
    await until_missing(operator)


async def test_status_and_metrics_after_a_task(operator: OperatorWorld) -> None:
    (report,) = await operator.send(task("seen-by-status")).ended()
    await operator.assert_paid_once(report)

    status = Status.model_validate((await fetched(operator, "/v1/status")).json())
    assert status.acting
    assert status.chain.reached
    assert status.relay.reached
    assert len(status.accounts) == ACCOUNTS
    assert len(status.gpus) == sum(cards.count for cards in CARDS)
    (view,) = [each for each in status.tasks if each.commitment == report.commitment]
    assert (view.outcome, view.status, view.stage) == ("EndSuccess", "EndSuccess", "ended")
    assert int(view.payment) == report.fee
    assert view.account == report.node
    assert int(status.totals.paid_wei) >= report.fee
    assert status.totals.slashed == 0

    answer = await fetched(operator, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["crynux_lease_held", ()] == 1
    assert samples["crynux_chain_reached", ()] == 1
    assert samples["crynux_slashes_total", ()] == 0
    ready = [v for (name, _), v in samples.items() if name == "crynux_ready"]
    assert ready == [1]
    outcomes = {
        value
        for (name, labels), value in samples.items()
        if name == "crynux_tasks_total" and "EndSuccess" in dict(labels).values()
    }
    assert any(value >= 1 for value in outcomes)


async def test_openapi_names_every_path(operator: OperatorWorld) -> None:
    document = (await fetched(operator, "/openapi.json")).json()
    assert document["info"]["version"] == cluster.__version__
    assert {"/healthz", "/readyz", "/metrics", "/v1/status"} <= document["paths"].keys()
    for path, verbs in document["paths"].items():
        if "get" in verbs and "{" not in path:
            await fetched(operator, f"{path}?count=1" if path == "/v1/events" else path)
    assert (await operator.get("/v1/nothing")).status_code == 404


async def test_coordinator_stops_and_comes_back(operator: OperatorWorld) -> None:
    coordinator = operator.coordinator()
    try:
        await answer_of(coordinator.stop.remote(), PATIENCE)
        await operator.hear("the coordinator is not acting: it doesn't hold the lease")
        ray.kill(coordinator, no_restart=True)
        await until_missing(operator, AWAY)
        for path in ("/metrics", "/v1/status"):
            answer = await fetched(operator, path, 503)
            assert answer.json()["detail"].startswith(AWAY)
        assert (await operator.get("/healthz")).status_code == 200
    finally:
        ray.kill(coordinator, no_restart=True)
        operator.start_coordinator()
    await until_missing(operator)
