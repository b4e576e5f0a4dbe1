"""A coordinator whose configuration can't be used: it lives on, and says why to all who ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import ray
from fastapi.testclient import TestClient
from ray.exceptions import RayTaskError

from actors import client
from actors.coordinator import Coordinator
from actors.names import REFUSED
from cluster.api.app import create_api
from cluster.core.errors import ClusterError, ConfigError
from serve_app import CoordinatorSource

WHY = "keystore.json: its password is missing"


def refusing() -> Coordinator:
    return Coordinator(ConfigError(WHY), "me")


async def asked(call: Callable[[Coordinator], Any]) -> None:
    answer = call(refusing())
    if asyncio.iscoroutine(answer):
        await answer


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.status(),
        lambda it: it.metrics_text(),
        lambda it: it.perform({"action": "resume"}, "me"),
        lambda it: it.shown("me", "bundle", "x"),
        lambda it: it.leave(None),
        lambda it: it.story("x"),
        lambda it: it.file("x", "0.png"),
        lambda it: it.bundle("x"),
        lambda it: it.earnings(0.0, "hour"),
        lambda it: it.audit(5),
    ],
)
async def test_whatever_it_is_asked_it_says_why(call: Callable[[Coordinator], Any]) -> None:
    with pytest.raises(ConfigError, match=WHY):
        await asked(call)


async def test_the_supervisor_hears_it_and_can_stop_it_at_once() -> None:
    it = refusing()
    assert it.release() == f"{REFUSED}{WHY}"
    await asyncio.wait_for(it.stop(), 5.0)


class Refusing:
    """The handle of its actor: whatever is asked fails as Ray says it."""

    def __getattr__(self, name: str) -> Refusing:
        return self

    async def remote(self, *_: object) -> object:
        cause = ConfigError(WHY)
        raise RayTaskError("status", "Traceback\n  lines", cause)  # type: ignore[no-untyped-call]


def test_the_api_and_the_page_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: Refusing())
    api = TestClient(create_api(CoordinatorSource("crynux")), base_url="http://127.0.0.1:8000")
    said = f"the coordinator is away: it refuses its configuration: {WHY}"
    assert api.get("/readyz").json() == {"ready": False, "missing": [said]}
    for path in ("/v1/status", "/metrics", "/v1/audit"):
        answer = api.get(path)
        assert (answer.status_code, answer.json()["detail"]) == (503, said)
    assert said in api.get("/v1/events", params={"count": 1}).text


def test_the_command_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_answer: object, timeout: float) -> object:
        raise RayTaskError("perform", "Traceback", ConfigError(WHY))  # type: ignore[no-untyped-call]

    class Handle:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *_: object) -> None: ...

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "get_actor", lambda *_: Handle())
    monkeypatch.setattr(ray, "get", get)
    with client.asking_at("auto", "crynux") as call, pytest.raises(ClusterError) as caught:
        call("perform")
    assert str(caught.value) == WHY
    assert type(caught.value) is ConfigError
