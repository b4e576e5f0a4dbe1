"""How many are let in, how long they stay, and that they are counted by bounded labels."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from cluster.api.app import create_api
from cluster.api.guard import Access
from cluster.api.traffic import (
    MOST_INSIDE,
    MOST_ONGOING,
    MOST_STREAMS,
    MOST_STREAMS_EACH,
    Door,
    Stream,
    Traffic,
)
from tests.unit.test_serve_app import BEARER, KNOWN, TOKEN, Source, client


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """Name, path and code to value."""
    return {
        (found.name, found.labels.get("path", ""), found.labels.get("code", "")): found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
    }


def counted(api: TestClient, path: str, code: int) -> float | None:
    text = api.get("/metrics", headers=BEARER).text
    return samples(text).get(("crynux_http_requests_total", path, str(code)))


def test_answers_are_counted_by_path_and_code() -> None:
    api = client(Source(), access=Access(TOKEN))
    api.get(f"/v1/tasks/{KNOWN}", headers=BEARER)
    api.get("/v1/tasks/12345678", headers=BEARER)
    api.get("/v1/status")
    for n in range(50):
        api.get(f"/nothing/{n}", headers=BEARER)
    codes = [
        api.post("/v1/actions", json={"action": "resume"}, headers=BEARER).status_code
        for _ in range(8)
    ]
    assert codes.count(429) == 3
    found = samples(api.get("/metrics", headers=BEARER).text)
    name = "crynux_http_requests_total"
    assert found[name, "/v1/tasks/{name}", "200"] == 1
    assert found[name, "/v1/tasks/{name}", "404"] == 1
    assert found[name, "/v1/status", "401"] == 1
    assert found[name, "/v1/actions", "429"] == 3
    assert found[name, "other", "404"] == 50
    # What wasn't answered yet is there, at 0; what is described is all there is.
    assert found[name, "/v1/earnings", "503"] == 0
    assert len(found) < 200
    assert not any(KNOWN in path for _, path, _ in found)


def test_the_metrics_are_one_text_of_distinct_families() -> None:
    families = [
        family
        for family in text_string_to_metric_families(client(Source()).get("/metrics").text)
        if family.samples
    ]
    assert len({family.name for family in families}) == len(families)
    ours = {family.name: family for family in families if "_http_" in family.name}
    assert ours.keys() == {"crynux_http_requests", "crynux_http_streams"}
    assert all(family.documentation.endswith(".") for family in ours.values())


def test_a_crash_is_counted_too() -> None:
    class Broken(Source):
        async def audit(self, limit: int) -> list[Mapping[str, Any]]:
            raise RuntimeError("a bug")

    api = TestClient(
        create_api(Broken(), clock=lambda: 0.0),
        base_url="http://127.0.0.1:8000",
        raise_server_exceptions=False,
    )
    assert api.get("/v1/audit").status_code == 500
    assert counted(api, "/v1/audit", 500) == 1


# --- limits ---------------------------------------------------------------------------------------


def test_there_are_only_so_many_streams() -> None:
    traffic = Traffic()
    for _ in range(MOST_STREAMS_EACH):
        traffic.enter("10.0.0.1")
    with pytest.raises(HTTPException, match="too many follow already") as caught:
        traffic.enter("10.0.0.1")
    assert caught.value.status_code == 503
    assert caught.value.headers is not None
    assert "retry-after" in caught.value.headers
    others = MOST_STREAMS - MOST_STREAMS_EACH
    for n in range(others):
        traffic.enter(f"10.0.1.{n}")
    with pytest.raises(HTTPException):
        traffic.enter("10.0.0.2")
    name = ("crynux_http_streams", "", "")
    assert samples(traffic.render().decode())[name] == MOST_STREAMS
    traffic.leave("10.0.0.1")
    traffic.enter("10.0.0.2")
    for n in range(others):
        traffic.leave(f"10.0.1.{n}")
    assert samples(traffic.render().decode())[name] == MOST_STREAMS_EACH


def test_who_follows_is_counted_until_he_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.api.traffic.MOST_STREAMS", 1)
    api = client(Source())
    for _ in range(3):
        assert api.get("/v1/events", params={"count": 1}).status_code == 200
    monkeypatch.setattr("cluster.api.traffic.MOST_STREAMS", 0)
    answer = api.get("/v1/events", params={"count": 1})
    assert (answer.status_code, answer.json()["detail"]) == (503, "too many follow already")
    assert api.get("/v1/status").status_code == 200


async def test_a_stream_is_over_also_when_nobody_took_it() -> None:
    over: list[str] = []

    async def nothing() -> Any:  # noqa: RUF029
        yield b""

    async def gone(*_: object) -> Any:  # noqa: RUF029
        raise OSError("the client is gone")

    stream = Stream(nothing(), lambda: over.append("over"), {})
    scope: Scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        await stream(scope, gone, gone)
    assert over == ["over"]


async def test_who_leaves_is_no_error_where_serve_says_so_by_one() -> None:
    api = create_api(Source(), timeout=60.0, clock=lambda: 0.0)
    told: list[Message] = []
    began = asyncio.Event()

    async def send(message: Message) -> None:  # noqa: RUF029
        told.append(message)
        began.set()

    async def receive() -> Message:
        await began.wait()
        raise RuntimeError("the task was cancelled")

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/v1/events",
        "raw_path": b"/v1/events",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await api(scope, receive, send)
    assert told[0]["status"] == 200
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://127.0.0.1"
    ) as http:
        text = (await http.get("/metrics")).text
    assert samples(text)["crynux_http_streams", "", ""] == 0


def test_no_stream_goes_on_for_ever() -> None:
    hours = iter(range(0, 10**9, 3600))
    answer = client(Source(), clock=lambda: float(next(hours))).get("/v1/events")
    assert answer.text.count("event: ") == 1


async def test_however_many_ask_it_is_heard_that_it_lives() -> None:
    waiting = asyncio.Event()

    class Slow(Source):
        async def earnings(self, since: float, step: str) -> Mapping[str, Any]:
            await waiting.wait()
            return await super().earnings(since, step)

    api = create_api(Slow(), timeout=60.0, clock=lambda: 0.0)
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        crowd = [asyncio.create_task(http.get("/v1/earnings")) for _ in range(MOST_INSIDE + 9)]
        few = (await each for each in asyncio.as_completed(crowd))
        refused = [await anext(few) for _ in range(9)]
        assert {each.status_code for each in refused} == {503}
        assert refused[0].json() == {"detail": "too many ask at once"}
        assert "retry-after" in refused[0].headers
        for path in ("/healthz", "/readyz"):
            assert (await http.get(path)).status_code == 200
        waiting.set()
        answers = await asyncio.gather(*crowd)
        assert sum(each.status_code == 200 for each in answers) == MOST_INSIDE
        assert (await http.get("/v1/status")).status_code == 200
    assert MOST_STREAMS < MOST_INSIDE < MOST_ONGOING


async def test_what_isnt_http_passes() -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        seen.append(scope["type"])

    async def never(*_: object) -> Any:  # noqa: RUF029
        raise AssertionError

    await Door(inner, Traffic())({"type": "lifespan"}, never, never)
    assert seen == ["lifespan"]
