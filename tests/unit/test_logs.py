from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import structlog

from cluster import logs
from cluster.models.refs import ref
from cluster.models.urls import UrlRules
from cluster.models.web import Web

PHRASE = "test test test test test test test test test test test junk"
KEY = "0x" + "1f" * 32


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_json_line_per_event_with_the_bound_ids() -> None:
    stream = io.StringIO()
    logs.setup("info", "auto", stream)
    log = logs.get("coordinator").bind(task=KEY, account="0xA")
    log.info("score submitted", attempt="a1", gpu="n/0")
    log.debug("not shown")
    (line,) = lines(stream)
    assert line["event"] == "score submitted"
    assert (line["task"], line["account"], line["attempt"]) == (KEY, "0xA", "a1")
    assert (line["level"], line["logger"], line["gpu"]) == ("info", "coordinator", "n/0")
    assert line["timestamp"].endswith("Z")


def test_what_another_process_shows_on_a_terminal_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.READ_BY_A_PERSON, "1")
    by_itself, told = io.StringIO(), io.StringIO()
    logs.setup("info", "auto", by_itself)
    logs.get("coordinator").info("score_submitted", task=KEY)
    logs.setup("info", "json", told)
    logs.get("coordinator").info("score_submitted", task=KEY)
    assert not by_itself.getvalue().startswith("{")
    assert f"task={KEY}" in by_itself.getvalue()
    assert [line["event"] for line in lines(told)] == ["score_submitted"]


def test_setting_up_again_replaces_and_libraries_take_the_same_form() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.setup("info", "json", first)
    logs.setup("info", "json", second)
    logging.getLogger("some.library").warning("at %s", "https://me:hunter2@host/x")
    assert first.getvalue() == ""
    (line,) = lines(second)
    assert line["event"] == "at https://[redacted]@host/x"
    assert line["logger"] == "some.library"


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_shows_its_place_but_no_secret(form: logs.Format) -> None:
    stream = io.StringIO()
    logs.setup("info", form, stream)
    private_key = KEY
    try:
        raise ValueError(f"bad phrase: {PHRASE}")
    except ValueError:
        logs.get("x").exception("it broke")
    text = stream.getvalue()
    assert "ValueError: bad phrase: [redacted]" in text
    assert "test_logs.py" in text
    assert "junk" not in text
    assert private_key not in text


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("private_key", KEY, "[redacted]"),
        ("privkey", KEY[2:], "[redacted]"),
        ("key", KEY, "[redacted]"),
        ("seed", KEY, "[redacted]"),
        ("seed", int(KEY, 16), "[redacted]"),
        ("password", "hunter2", "[redacted]"),
        ("api_key", "abcdef123", "[redacted]"),
        ("seed", 2**31 - 1, 2**31 - 1),
        ("pipeline_key", "sd15/abc/fp16", "sd15/abc/fp16"),
        ("prompt_tokens", 17, 17),
        ("task", KEY, KEY),
        ("tx", KEY, KEY),
        ("note", f"words {PHRASE} more", "[redacted]"),
        ("note", "a plain line of words that is longer than a phrase could be " * 2, None),
        ("data", b"\x01\x02", "[2 bytes]"),
        ("prompt", "a cat", "[5 characters]"),
        ("task_args", '{"prompt":"a cat"}', "[18 characters]"),
        ("url", "postgresql://me:pw@host/db", "postgresql://[redacted]@host/db"),
        ("more", {"secret_key": KEY, "n": [1, KEY]}, {"secret_key": "[redacted]", "n": [1, KEY]}),
        ("flag", True, True),
        ("nothing", None, None),
    ],
)
def test_redaction(name: str, value: object, shown: object) -> None:
    expected = value if shown is None else shown
    assert logs.clean(value, name) == expected


def test_what_boto_would_say_of_a_request_is_not_logged() -> None:
    """Its debug lines repeat the signed headers, a session's token among them."""
    stream = io.StringIO()
    logs.setup("debug", "json", stream)
    logging.getLogger("botocore.auth").debug("x-amz-security-token:%s", "hunter2")
    logging.getLogger("cluster").debug("ours")
    assert [line["event"] for line in lines(stream)] == ["ours"]


# --- what libraries say ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_links_query_is_logged(level: logs.Level) -> None:
    """The library that asks logs each request, and the presigned one that it leads on to."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "host.example":
            where = "https://cdn.example/a.safetensors?X-Amz-Signature=SIGNED"
            return httpx2.Response(302, headers={"Location": where})
        return httpx2.Response(200, content=b"a")

    out = io.StringIO()
    logs.setup(level, "json", out)
    asking = httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True)
    asked = ref("lora", "https://host.example/a?token=SECRET")
    Web(asking, UrlRules()).list(asked)
    logging.getLogger("any").warning("a line")
    assert "a line" in out.getvalue()
    assert "SECRET" not in out.getvalue()
    assert "SIGNED" not in out.getvalue()


@pytest.mark.parametrize(
    "name",
    ["httpx2", "httpcore2.http11", "boto3", "botocore.auth", "s3transfer", "huggingface_hub"],
)
def test_libraries_that_repeat_what_they_send_say_only_what_is_wrong(name: str) -> None:
    logs.setup("debug", "json", io.StringIO())
    assert not logging.getLogger(name).isEnabledFor(logging.INFO)
