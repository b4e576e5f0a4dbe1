from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError, RayTaskError

import serve_app
from cluster.core.types import GpuState
from cluster.metrics import Metrics
from cluster.status import ChainView, GpuStatus, IdentityView, RelayView, Status, readiness
from serve_app import CoordinatorSource, SourceAway, create_api


def sound(**changes: Any) -> Status:
    gpu = GpuStatus(
        gpu_id="n/0", ray_node="n", name="Card", vram=8, simulated=True, state=GpuState.READY
    )
    status = Status(
        version="1",
        config_digest="d",
        now=1000.0,
        acting=True,
        epoch=1,
        identity=IdentityView(treasury="0xA"),
        chain=ChainView(reached=True, chain_id=31337, block=5),
        relay=RelayView(reached=True),
        gpus=(gpu,),
    )
    return status.model_copy(update=changes)


@dataclass
class Source:
    """`delay` seconds before each answer; `away` is raised instead of one."""

    now: Status = field(default_factory=sound)
    away: str | None = None
    delay: float = 0.0

    async def _wait(self) -> None:
        await asyncio.sleep(self.delay)
        if self.away is not None:
            raise SourceAway(self.away)

    async def status(self) -> Mapping[str, Any]:
        await self._wait()
        return self.now.model_dump(mode="json")

    async def metrics_text(self) -> bytes:
        await self._wait()
        return Metrics("1", "d").render()


def client(source: Source, timeout: float = 60.0) -> TestClient:
    return TestClient(create_api(source, timeout))


def test_all_is_well() -> None:
    api = client(Source())
    assert api.get("/healthz").json()["alive"] is True
    assert api.get("/readyz").status_code == 200
    assert api.get("/readyz").json() == {"ready": True, "missing": []}
    assert Status.model_validate(api.get("/v1/status").json()) == sound()
    assert "/v1/status" in api.get("/").text


def test_metrics_are_prometheus_text() -> None:
    answer = client(Source()).get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert list(text_string_to_metric_families(answer.text))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"acting": False}, "not acting"),
        ({"gpus": ()}, "no GPU is known"),
        ({"chain": ChainView(reached=False, chain_id=1, error="timed out")}, "timed out"),
    ],
)
def test_readiness_says_what_is_missing(changes: dict[str, Any], word: str) -> None:
    api = client(Source(sound(**changes)))
    answer = api.get("/readyz")
    assert answer.status_code == 503
    assert len(answer.json()["missing"]) == 1
    assert word in answer.json()["missing"][0]
    assert api.get("/healthz").status_code == 200
    assert api.get("/v1/status").status_code == 200


def test_a_card_that_is_not_ready_is_counted_by_state() -> None:
    gpus = tuple(
        sound().gpus[0].model_copy(update={"state": state})
        for state in (GpuState.STARTING, GpuState.QUARANTINED, GpuState.STARTING)
    )
    ready, missing = readiness(sound(gpus=gpus))
    assert not ready
    assert missing == ("no GPU is ready: 2 starting, 1 quarantined",)
    busy = gpus[0].model_copy(update={"state": GpuState.BUSY})
    assert readiness(sound(gpus=(busy,))) == (True, ())


@pytest.mark.parametrize(
    "source", [Source(away="it has not been started"), Source(delay=5.0)], ids=["away", "slow"]
)
def test_without_the_coordinator_only_health_is_well(source: Source) -> None:
    api = client(source, timeout=0.05)
    assert api.get("/healthz").status_code == 200
    assert api.get("/").status_code == 200
    for path in ("/metrics", "/v1/status"):
        answer = api.get(path)
        assert answer.status_code == 503
        assert answer.json()["detail"].startswith("the coordinator is away: ")
    answer = api.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["missing"][0].startswith("the coordinator is away: ")


def test_a_status_of_another_version_is_no_crash() -> None:
    class Other(Source):
        async def status(self) -> Mapping[str, Any]:
            return {"something": "else"}

    answer = client(Other()).get("/v1/status")
    assert answer.status_code == 503
    assert "not of this version" in answer.json()["detail"]


def test_openapi_describes_every_answer() -> None:
    spec = client(Source()).get("/openapi.json").json()
    assert set(spec["paths"]) == {"/healthz", "/readyz", "/metrics", "/v1/status"}
    assert set(spec["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
    assert {"Status", "Readiness", "Health", "Away"} <= set(spec["components"]["schemas"])


class Actor:
    """A handle whose first call fails as after the actor's death."""

    def __init__(self) -> None:
        self.fails = 1
        self.status = self

    async def remote(self) -> dict[str, int]:
        self.fails -= 1
        if self.fails >= 0:
            raise RayActorError
        return {"x": 1}


async def test_a_replaced_coordinator_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, asked = Actor(), []

    def get_actor(name: str, namespace: str) -> Actor:
        asked.append((name, namespace))
        return actor

    monkeypatch.setattr(ray, "get_actor", get_actor)
    source = CoordinatorSource("crynux")
    with pytest.raises(SourceAway, match="ActorDiedError|RayActorError"):
        await source.status()
    assert await source.status() == {"x": 1}
    assert await source.status() == {"x": 1}
    assert asked == [("coordinator", "crynux")] * 2


async def test_a_coordinator_that_was_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> Actor:
        raise ValueError("no such actor")

    monkeypatch.setattr(ray, "get_actor", get_actor)
    with pytest.raises(SourceAway, match="has not been started"):
        await CoordinatorSource("crynux").metrics_text()


async def test_an_error_inside_the_coordinator_is_not_taken_for_its_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class RaisedThere(RayTaskError, ValueError):
        def __init__(self) -> None:
            ValueError.__init__(self, "x")

        def __str__(self) -> str:
            return "x"

    class Broken(Actor):
        async def remote(self) -> dict[str, int]:
            # As Ray does for a ValueError of the actor's: both kinds at once.
            raise RaisedThere

    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: Broken())
    with pytest.raises(SourceAway, match="when it was asked"):
        await CoordinatorSource("crynux").status()


def test_the_application_can_be_built() -> None:
    assert serve_app.build("crynux") is not None
