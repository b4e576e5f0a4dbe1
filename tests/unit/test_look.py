"""The commands that look: what they ask of the API, and what they show."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cluster.api_client import ApiClient
from cluster.cli.look import named, seconds_of, watch
from cluster.core.errors import ConfigError
from tests.unit.test_cli import STATUS, run, transport
from tests.unit.test_serve_app import STORY

TASK = "0x" + "ab" * 32
EARNINGS = {
    "step": "hour",
    "since": 0.0,
    "tasks": 1,
    "paid": str(10**18),
    "gas": "5",
    "steps": [{"since": 0.0, "tasks": 1, "paid": str(10**18), "gas": "5"}],
}
ACTION = {"at": 0.0, "who": "me", "action": "drain", "arguments": {}, "outcome": "is drained"}
EVENT = {"at": 2.0, "kind": "seen", "text": "the network gave it to us", "attempt": "a1"}
BUNDLE = {"story": STORY, "parameters": "a prompt", "attempts": []}


class Api:
    """What was asked, and what is answered to each path."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {
            "/v1/status": STATUS.model_dump(mode="json"),
            "/v1/earnings": EARNINGS,
            "/v1/audit": [ACTION],
            f"/v1/tasks/{TASK}": STORY | {"events": [EVENT]},
            f"/v1/tasks/{TASK}/bundle": BUNDLE,
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.raw_path.decode())
        found = self.answers.get(request.url.path)
        if found is None:
            return httpx.Response(404, json={"detail": "no task is known by it"})
        return httpx.Response(200, json=found)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    found = Api()
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _self, r: found(r))
    monkeypatch.setenv("COLUMNS", "160")
    return found


@pytest.mark.parametrize(
    ("words", "asks", "shows"),
    [
        (("status",), "/v1/status", "Card [red]+docker"),
        (("tasks",), "/v1/status", "0xabababab…"),
        (("accounts",), "/v1/status", "Accounts"),
        (("gpus", "--cluster"), "/v1/status", "Card 8 GB (simulated)"),
        (("tasks", TASK), f"/v1/tasks/{TASK}", "the network gave it to us"),
        (("logs", "--task", TASK), f"/v1/tasks/{TASK}", "attempt=a1"),
        (("earnings",), "/v1/earnings?days=1.0&step=hour", "paid 1 CNX"),
        (("earnings", "--since", "4w"), "/v1/earnings?days=28.0&step=day", "1970-01-01"),
        (("earnings", "--since", "12h", "--by", "day"), "/v1/earnings?days=0.5&step=day", "1"),
        (("audit", "--limit", "7"), "/v1/audit?limit=7", "is drained"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_asked_is_shown_as_text_and_as_json(
    api: Api, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], asks: str, shows: str
) -> None:
    assert run(*words) == 0
    assert shows in capsys.readouterr().out
    assert run(*words, "--json") == 0
    for text in filter(None, [capsys.readouterr().out]):
        # A log is a line for each event; everything else is one document.
        for each in text.splitlines() if words[0] == "logs" else [text]:
            json.loads(each)
    assert api.asked == [asks, asks]


@pytest.mark.parametrize("answer", [{"x": 1}, [{"at": "never"}], [1], "x"])
def test_an_audit_log_that_is_none_is_one_line(
    api: Api, capsys: pytest.CaptureFixture[str], answer: object
) -> None:
    api.answers["/v1/audit"] = answer
    assert run("audit") == 1
    said = capsys.readouterr()
    assert "is this the operator's API" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_bundle_is_asked_for_by_name(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tasks", TASK, "--bundle") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == "a prompt"
    assert run("tasks", "--bundle") == 2
    assert "which task" in capsys.readouterr().err
    assert run("tasks", "0x" + "99" * 32) == 2
    assert "no task is known by it" in capsys.readouterr().err


def test_top_goes_on_when_a_look_fails(capsys: pytest.CaptureFixture[str]) -> None:
    api, looks = Api(), iter([False, True, False])

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"detail": "it is away"}) if next(looks) else api(request)

    slept: list[float] = []
    watch(ApiClient("http://h", transport=transport(handle)), True, 3, slept.append)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
    assert [set(line) == {"error"} for line in lines] == [False, True, False]
    assert "it is away" in lines[1]["error"]
    assert len(slept) == 2


def test_top_in_json_is_nothing_but_json_where_colours_are_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    watch(ApiClient("http://h", transport=transport(Api())), True, 2, lambda _: None)
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [look["version"] for look in looks] == [STATUS.version] * 2


def test_top_ends_where_it_was_asked_wrongly() -> None:
    def handle(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"detail": "a bearer token is needed"})

    client = ApiClient("http://h", transport=transport(handle))
    with pytest.raises(ConfigError, match="--token-file"):
        watch(client, False, None, lambda _: pytest.fail("it went on"))


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43_200), ("7d", 604_800), ("1.5d", 129_600)])
def test_how_far_back(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1d", "nand", "infd", "1y", "401d"])
def test_how_far_back_must_make_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="expected such as 12h"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["", "../status", "a/b", "a?b", "ü", "a" * 81, "a b"])
def test_what_names_no_task_is_never_asked(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a task's commitment"):
        named(text)
