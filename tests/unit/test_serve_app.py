from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError, RayTaskError
from structlog.testing import capture_logs

import serve_app
from cluster.api.app import MOST_BODY, create_api
from cluster.api.guard import NOBODY, Access
from cluster.api.source import NotKnown, SourceAway
from cluster.api.tokens import LEAST_TOKEN, is_loopback, read_token
from cluster.core.errors import ConfigError
from cluster.core.types import GpuState
from cluster.lookups import TooBusy
from cluster.metrics import Metrics
from cluster.status import (
    AccountStatus,
    ChainView,
    DrainStatus,
    GpuStatus,
    IdentityView,
    RelayView,
    Status,
    judged,
    readiness,
)
from cluster.steering import Done
from cluster.story import UnknownTask
from serve_app import CoordinatorSource
from tests.unit.test_client import config

OPEN = Access()
TOKEN = "0123456789abcdef"
KNOWN = "ab" * 8
STORY: dict[str, Any] = {
    "commitment": "0x" + KNOWN,
    "account": "0xA",
    "type": "sd",
    "models": [],
    "fee": "1",
    "payment": "0",
    "progress": "computing",
    "outcome": None,
    "fault": None,
    "score": None,
    "tier": None,
    "seen_at": 1.0,
    "closed_at": None,
}


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
        accounts=(AccountStatus(index=1, address="0xB", status="available"),),
    )
    return judged(status.model_copy(update=changes))


@dataclass
class Source:
    """`delay` seconds before each answer; `away` is raised instead of one."""

    now: Status = field(default_factory=sound)
    away: str | None = None
    delay: float = 0.0
    kind: Literal["done", "nothing", "unknown", "refused"] = "done"
    done: list[Mapping[str, Any]] = field(default_factory=list)
    shows: list[tuple[str, str, str]] = field(default_factory=list)

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

    async def story(self, name: str) -> Mapping[str, Any]:
        await self._wait()
        if name != KNOWN:
            raise NotKnown(f"{name}: no task is known by it")
        return STORY

    async def bundle(self, name: str) -> Mapping[str, Any]:
        story = await self.story(name)
        return {"story": story, "parameters": "a prompt", "attempts": [{"attempt": "a1"}]}

    async def file(self, name: str, file: str) -> bytes:
        await self.story(name)
        return b"\x89PNG\r\n\x1a\n" if file == "0.png" else b"<script>"

    async def shown(self, who: str, what: str, task: str) -> None:
        await self._wait()
        self.shows.append((who, what, task))

    async def earnings(self, since: float, step: str) -> Mapping[str, Any]:
        await self._wait()
        return {"step": step, "since": since, "tasks": 1, "paid": "5", "gas": "1"}

    async def audit(self, limit: int) -> list[Mapping[str, Any]]:
        await self._wait()
        return self.done[:limit]

    async def perform(self, order: Mapping[str, Any], who: str) -> Mapping[str, Any]:
        await self._wait()
        action = {"at": 1.0, "who": who, "action": order["action"], "arguments": {}, "outcome": "x"}
        self.done.append(action)
        return Done(kind=self.kind, text="as asked").model_dump(mode="json")


def client(
    source: Source,
    timeout: float = 60.0,
    access: Access = OPEN,
    clock: Callable[[], float] = lambda: 0.0,
) -> TestClient:
    """As a program on this machine asks."""
    api = create_api(source, timeout, access, clock, wall=lambda: 1e6)
    return TestClient(api, base_url="http://127.0.0.1:8000")


def test_all_is_well() -> None:
    api = client(Source())
    assert api.get("/healthz").json()["alive"] is True
    assert api.get("/readyz").status_code == 200
    assert api.get("/readyz").json() == {"ready": True, "missing": []}
    assert Status.model_validate(api.get("/v1/status").json()) == sound()
    page = api.get("/")
    assert "page/app.js" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_metrics_are_prometheus_text() -> None:
    answer = client(Source()).get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert list(text_string_to_metric_families(answer.text))


def resting(*statuses: str) -> tuple[AccountStatus, ...]:
    return tuple(
        AccountStatus(index=index, address=f"0x{index}", status=status)
        for index, status in enumerate(statuses, 1)
    )


DRAINING = DrainStatus(everything=True, left=("1 task is open",))
DRAINED = DrainStatus(everything=True, done=True)
NO_CHAIN = ChainView(reached=False, chain_id=1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"acting": False}, "not acting"),
        ({"gpus": ()}, "no GPU is known"),
        ({"chain": ChainView(reached=False, chain_id=1, error="timed out")}, "timed out"),
        ({"relay": RelayView(reached=False, error="HTTP 502")}, "the relay is not reached: HTTP"),
        ({"accounts": ()}, "no account serves: none is there"),
        ({"accounts": resting("quit", "quit")}, "no account serves: #1, #2 not joined"),
        ({"accounts": resting("paused", "unknown")}, "#2 not looked at yet, #1 paused"),
        ({"accounts": resting(*["quit"] * 500)}, "#4, #5 and 495 more not joined"),
        ({"drain": DRAINING, "accounts": resting("paused")}, "it is being drained: 1 task"),
        ({"drain": DRAINED, "accounts": resting("paused")}, "it is drained"),
        # Whoever doesn't act can't know of these.
        ({"acting": False, "accounts": resting("unknown"), "chain": NO_CHAIN}, "not acting"),
    ],
)
def test_readiness_says_what_is_missing(changes: dict[str, Any], word: str) -> None:
    api = client(Source(sound(**changes)))
    answer = api.get("/readyz")
    assert answer.status_code == 503
    assert len(answer.json()["missing"]) == 1
    assert word in answer.json()["missing"][0]
    assert api.get("/healthz").status_code == 200
    # The page, the gauge and the command line take it from there.
    status = api.get("/v1/status").json()
    assert (status["ready"], status["missing"]) == (False, answer.json()["missing"])


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
    assert api.get("/page/app.js").status_code == 200
    paths = ("/metrics", "/v1/status", "/v1/earnings", "/v1/audit", f"/v1/tasks/{KNOWN}")
    for path in paths:
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
    assert {path: set(verbs) for path, verbs in spec["paths"].items()} == {
        "/healthz": {"get"},
        "/readyz": {"get"},
        "/metrics": {"get"},
        "/v1/status": {"get"},
        "/v1/events": {"get"},
        "/v1/earnings": {"get"},
        "/v1/tasks/{name}": {"get"},
        "/v1/tasks/{name}/bundle": {"get"},
        "/v1/tasks/{name}/files/{file}": {"get"},
        "/v1/audit": {"get"},
        "/v1/actions": {"post"},
    }
    assert set(spec["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
    act = spec["paths"]["/v1/actions"]["post"]
    codes = {"200", "400", "401", "403", "404", "409", "413", "422", "429", "503"}
    assert set(act["responses"]) == codes
    assert set(act["responses"]["413"]["content"]) == {"application/json", "text/plain"}
    assert act["security"] == [{"HTTPBearer": []}]
    known = set(spec["components"]["schemas"])
    assert {"Status", "Readiness", "Health", "Problem", "TaskStory", "Done", "Drain"} <= known


# --- tasks, earnings, actions ---------------------------------------------------------------------


def test_a_story_is_found_or_not() -> None:
    api = client(Source())
    assert api.get(f"/v1/tasks/{KNOWN}").json()["commitment"] == f"0x{KNOWN}"
    answer = api.get("/v1/tasks/12345678")
    assert (answer.status_code, answer.json()) == (
        404,
        {"detail": "12345678: no task is known by it"},
    )
    assert api.get(f"/v1/tasks/{KNOWN}/bundle").json()["parameters"] == "a prompt"
    assert "a prompt" not in api.get(f"/v1/tasks/{KNOWN}").text


def test_earnings_reach_back_as_far_as_asked() -> None:
    answer = client(Source()).get("/v1/earnings", params={"days": 2, "step": "day"}).json()
    assert (answer["since"], answer["step"], answer["paid"]) == (1e6 - 172_800, "day", "5")
    for wrong in ({"days": 0}, {"days": 1e9}, {"step": "year"}):
        assert client(Source()).get("/v1/earnings", params=wrong).status_code == 422


@pytest.mark.parametrize(
    ("kind", "code"), [("done", 200), ("nothing", 200), ("unknown", 404), ("refused", 409)]
)
def test_an_action_is_answered_by_what_came_of_it(
    kind: Literal["done", "nothing", "unknown", "refused"], code: int
) -> None:
    api = client(Source(kind=kind))
    answer = api.post("/v1/actions", json={"action": "drain"})
    assert answer.status_code == code
    assert answer.json() == {"kind": kind, "text": "as asked"}
    (noted,) = api.get("/v1/audit").json()
    assert (noted["who"], noted["action"]) == ("local testclient", "drain")


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"action": "explode"},
        {"action": "drain", "what": "moon"},
        {"action": "drain", "other": 1},
        {"action": "drain", "name": "gpu-3"},
        {"action": "drain", "what": "everything", "name": "gpu-3"},
        {"action": "drain", "what": "card"},
        {"action": "drain", "what": "node", "name": ""},
        {"action": "drain", "now": True},
        {"action": "resume", "name": "gpu-3"},
        {"action": "resume", "what": "card"},
        {"action": "resume", "what": "node", "name": ""},
        {"action": "clear_account", "account": "0x1"},
        {"action": "preload_model", "model": ""},
        [],
        "drain",
    ],
)
def test_what_is_no_order_is_refused(order: object) -> None:
    source = Source()
    assert client(source).post("/v1/actions", json=order).status_code == 422
    assert source.done == []


def test_an_order_that_isnt_answered_may_be_done_all_the_same() -> None:
    api = client(Source(delay=60.0), timeout=0.01)
    answer = api.post("/v1/actions", json={"action": "drain"})
    assert answer.status_code == 503
    assert "whether it was done is not known" in answer.json()["detail"]
    assert "not known" not in api.get("/v1/earnings").json()["detail"]


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("access", [Access(), Access(TOKEN)])
async def test_a_long_body_is_not_read_whoever_sends_it(length: bool, access: Access) -> None:
    source, sent, chunk = Source(), list[dict[str, Any]](), b" " * 16_384
    chunks = iter([chunk] * 1_000)
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    if length:
        headers.append((b"content-length", str(1_000 * len(chunk)).encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/actions",
        "raw_path": b"/v1/actions",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> dict[str, Any]:  # noqa: RUF029
        return {"type": "http.request", "body": next(chunks), "more_body": True}

    async def send(message: Any) -> None:  # noqa: RUF029
        sent.append(message)

    api = create_api(source, access=access)
    await api(scope, receive, send)
    assert sent[0]["status"] == 413
    assert 1_000 - len(list(chunks)) <= MOST_BODY // len(chunk) + 1
    assert source.done == []
    metrics = TestClient(api, base_url="http://127.0.0.1").get(
        "/metrics", headers={"authorization": f"Bearer {TOKEN}"}
    )
    assert 'crynux_http_requests_total{code="413",path="/v1/actions"} 1.0' in metrics.text


def test_events_are_the_status_as_it_changes() -> None:
    answer = client(Source()).get("/v1/events", params={"count": 1})
    assert answer.headers["content-type"].startswith("text/event-stream")
    kind, data, *_ = answer.text.splitlines()
    assert kind == "event: status"
    assert Status.model_validate_json(data.removeprefix("data: ")) == sound()
    away = client(Source(away="it is gone")).get("/v1/events", params={"count": 1})
    assert "event: away" in away.text
    assert "it is gone" in away.text


# --- who may --------------------------------------------------------------------------------------

BEARER = {"authorization": f"Bearer {TOKEN}"}


def codes(api: TestClient, headers: Mapping[str, str]) -> tuple[int, int]:
    """Of a read and of an action."""
    read = api.get("/v1/status", headers=dict(headers))
    act = api.post("/v1/actions", json={"action": "resume"}, headers=dict(headers))
    return read.status_code, act.status_code


@pytest.mark.parametrize(
    ("access", "headers", "expected"),
    [
        (Access(), {}, (200, 200)),
        (Access(), {"host": "evil.example:8000"}, (403, 403)),
        (Access(), {"origin": "http://evil.example"}, (403, 403)),
        (Access(), {"origin": "null"}, (403, 403)),
        (Access(), {"origin": "http://["}, (403, 403)),
        (Access(), {"host": "["}, (403, 403)),
        (Access(), {"host": "[::1"}, (403, 403)),
        (Access(), {"host": "a]b", "origin": "http://a]b"}, (403, 403)),
        (Access(), {"origin": "http://127.0.0.1:8000"}, (200, 200)),
        (Access(), {"forwarded": "for=203.0.113.1"}, (403, 403)),
        (Access(), {"via": "1.1 proxy"}, (403, 403)),
        (Access(), {"X-Forwarded-For": "203.0.113.1"}, (403, 403)),
        (Access(), {"x-forwarded-host": "evil.example"}, (403, 403)),
        (Access(), {"x-forwarded-proto": "https"}, (403, 403)),
        (Access(), {"x-real-ip": ""}, (403, 403)),
        (Access(open_reads=True), {"via": "1.1 proxy"}, (200, 403)),
        (Access(TOKEN), BEARER | {"x-forwarded-for": "203.0.113.1"}, (200, 200)),
        (Access(local=False), {}, (403, 403)),
        (Access(local=False, open_reads=True), {}, (200, 403)),
        (Access(TOKEN), {}, (401, 401)),
        (Access(TOKEN), BEARER, (200, 200)),
        (Access(TOKEN, local=False), BEARER, (200, 200)),
        (Access(TOKEN), {"authorization": f"bearer {TOKEN}"}, (200, 200)),
        (Access(TOKEN), {"authorization": f"Basic {TOKEN}"}, (401, 401)),
        (Access(TOKEN), {"authorization": "Bearer 0123456789abcdeX"}, (401, 401)),
        (Access(TOKEN), {"authorization": "Bearer "}, (401, 401)),
        (Access(TOKEN, open_reads=True), {}, (200, 401)),
    ],
)
def test_who_may_read_and_who_may_act(
    access: Access, headers: Mapping[str, str], expected: tuple[int, int]
) -> None:
    source = Source()
    api = client(source, access=access)
    assert codes(api, headers) == expected
    assert len(source.done) == (expected[1] == 200)
    # Whoever is refused learns what is wrong, and never what the token is.
    assert api.get("/healthz", headers=dict(headers)).status_code == 200
    assert TOKEN not in repr(access)


def test_a_result_is_a_file_and_never_a_page() -> None:
    api = client(Source())
    for name, kind in (("0.png", "image/png"), ("1.html", "application/octet-stream")):
        answer = api.get(f"/v1/tasks/{KNOWN}/files/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"] == "attachment"
    assert api.get(f"/v1/tasks/{KNOWN}/files/..%2Fkey").status_code in {404, 422}
    closed = client(Source(), access=Access(TOKEN, open_reads=True))
    assert closed.get(f"/v1/tasks/{KNOWN}/files/0.png").status_code == 401


def test_a_bundle_is_never_open() -> None:
    api = client(Source(), access=Access(TOKEN, open_reads=True))
    path = f"/v1/tasks/{KNOWN}"
    assert api.get(path).status_code == 200
    assert api.get(f"{path}/bundle").status_code == 401
    assert api.get(f"{path}/bundle", headers=BEARER).status_code == 200


def test_who_is_given_what_is_somebodys_is_written_down() -> None:
    source = Source()
    api = client(source, access=Access(TOKEN))
    path = f"/v1/tasks/{KNOWN}"
    for wanted in (path, f"{path}/files/0.png", f"{path}/bundle"):
        assert api.get(wanted, headers=BEARER).status_code == 200
    who = "token testclient"
    assert source.shows == [(who, "result", KNOWN), (who, "bundle", KNOWN)]
    # Nothing was given to these.
    assert api.get("/v1/tasks/12345678/bundle", headers=BEARER).status_code == 404
    assert api.get(f"{path}/bundle").status_code == 401
    assert len(source.shows) == 2


@pytest.mark.parametrize(
    ("access", "headers", "why"),
    [
        (Access(TOKEN), {"authorization": "Bearer wrong-wrong-wrong"}, "wrong token"),
        (Access(), {"origin": "http://evil.example"}, "another site's page may not ask this"),
    ],
)
def test_whoever_is_refused_is_in_the_log_and_what_he_sent_isnt(
    access: Access, headers: dict[str, str], why: str
) -> None:
    api = client(Source(), access=access)
    with capture_logs() as logs:
        for _ in range(50):
            api.get("/v1/status", headers=headers)
    assert {(each["event"], each["why"]) for each in logs} == {("request_refused", why)}
    assert logs[0]["address"] == "testclient"
    assert "wrong-wrong" not in str(logs)
    # However many try.
    assert len(logs) <= 20
    with capture_logs() as logs:
        client(Source(), access=Access(TOKEN)).get("/v1/status")
    assert logs == []  # a page that asks for the token first


def test_who_did_what_is_only_for_who_may_act() -> None:
    api = client(Source(), access=Access(TOKEN, open_reads=True))
    assert api.get("/v1/status").status_code == 200
    assert api.get("/v1/audit").status_code == 401
    assert api.get("/v1/audit", headers=BEARER).status_code == 200
    assert client(Source(), access=Access(local=False, open_reads=True)).get(
        "/v1/audit"
    ).json() == {"detail": NOBODY}


def test_guessing_is_slowed_down_and_the_owner_isnt() -> None:
    api = client(Source(), access=Access(TOKEN))
    wrong = {"authorization": "Bearer " + "x" * LEAST_TOKEN}
    found = [api.get("/v1/status", headers=wrong) for _ in range(8)]
    assert [each.status_code for each in found] == [401] * 5 + [429] * 3
    assert int(found[-1].headers["retry-after"]) >= 1
    assert api.get("/v1/status", headers=BEARER).status_code == 200


def test_too_many_actions_wait() -> None:
    source = Source()
    api = client(source, access=Access(TOKEN))
    found = [
        api.post("/v1/actions", json={"action": "resume"}, headers=BEARER).status_code
        for _ in range(8)
    ]
    assert found == [200] * 5 + [429] * 3
    assert len(source.done) == 5


def test_a_result_of_many_pictures_is_shown_and_takes_nobodys_turn_to_act() -> None:
    api = client(Source(), access=Access(TOKEN))
    path = f"/v1/tasks/{KNOWN}"
    pictures = [api.get(f"{path}/files/0.png", headers=BEARER).status_code for _ in range(10)]
    assert pictures == [200] * 10
    assert api.get(f"{path}/bundle", headers=BEARER).status_code == 200
    assert codes(api, BEARER) == (200, 200)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("text", ["", "short", "two words are not one token", "ü" * 20])
def test_a_token_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.token_file: .* at least 16") as caught:
        read_token(file)
    assert text == "" or text not in str(caught.value)
    with pytest.raises(ConfigError, match="can't be read"):
        read_token(tmp_path / "none")
    file.write_text(f" {TOKEN}\n")
    assert read_token(file) == TOKEN
    assert read_token(None) is None


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


async def test_a_task_that_nobody_knows_is_no_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Actor):
        async def remote(self, *_: object) -> dict[str, int]:
            cause = UnknownTask("x: no task is known by it")
            raise RayTaskError("story", "trace", cause)  # type: ignore[no-untyped-call]

    actor = Asked()
    actor.story = actor  # type: ignore[attr-defined]
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: actor)
    with pytest.raises(NotKnown, match="no task is known"):
        await CoordinatorSource("crynux").story("x")


def test_one_that_is_asked_too_much_is_busy_and_not_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Asked(Actor):
        async def remote(self, *_: object) -> dict[str, int]:
            raise RayTaskError("story", "trace", TooBusy("busy"))  # type: ignore[no-untyped-call]

    actor = Asked()
    actor.story = actor  # type: ignore[attr-defined]
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: actor)
    with TestClient(create_api(CoordinatorSource("crynux"))) as client:
        answer = client.get("/v1/tasks/x", headers={"host": "127.0.0.1"})
    assert (answer.status_code, answer.json()) == (503, {"detail": "the coordinator is busy"})


async def test_what_breaks_in_the_coordinator_is_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = "\n".join(f"  File {n}, line 1" for n in range(100))

    class Broken(Actor):
        async def remote(self, *_: object) -> dict[str, int]:
            raise RayTaskError("status", frames, RuntimeError("a bug"))  # type: ignore[no-untyped-call]

    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: Broken())
    with capture_logs() as logs, pytest.raises(SourceAway, match="RayTaskError when it was asked"):
        await CoordinatorSource("crynux").status()
    (line,) = logs
    assert (line["event"], line["asked"], line["cause"]) == (
        "coordinator_away",
        "status",
        "RuntimeError",
    )
    assert "\n" not in line["error"]
    assert len(line["error"]) < 400


def test_the_replica_logs_like_every_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("cluster.logs.setup", lambda level, form: asked.append((level, form)))
    said = config(tmp_path)
    quiet = said.model_copy(update={"logs": said.logs.model_copy(update={"level": "error"})})
    serve_app.Edge(serve_app.EdgeSettings.of(quiet))
    assert asked == [("error", "auto")]


def test_the_application_can_be_built(tmp_path: Path) -> None:
    assert serve_app.build(config(tmp_path)) is not None
