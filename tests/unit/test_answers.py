"""What an answer means, and which are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.chain.answers import SEND, Meaning, TooLong, meaning, patience, read
from cluster.core.errors import ChainError

CALL, LOGS = "eth_call", "eth_getLogs"


def error(code: Any, message: str, data: Any = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message} | ({} if data is None else {"data": data})}


@pytest.mark.parametrize(
    ("method", "answer", "expected"),
    [
        (CALL, {"result": "0x"}, Meaning.ANSWER),
        (CALL, {"result": None}, Meaning.ANSWER),
        (CALL, error(3, "execution reverted: Wrong task", "0x08c379a0"), Meaning.ANSWER),
        (CALL, error(-32000, "execution reverted"), Meaning.ANSWER),
        (CALL, error(-32015, "VM execution error", "0x08c379a0"), Meaning.ANSWER),
        (CALL, error(-32000, "header not found"), Meaning.BEHIND),
        (CALL, error(-32000, "insufficient funds"), Meaning.REFUSED),
        (CALL, error(-32603, "Internal error"), Meaning.REFUSED),
        (CALL, error(-32601, "the method does not exist"), Meaning.REFUSED),
        (CALL, {"error": "no"}, Meaning.REFUSED),
        (CALL, error(-32005, "daily request count exceeded"), Meaning.BUSY),
        (CALL, error(-32005, "limit exceeded"), Meaning.BUSY),
        (CALL, error(429, "slow down"), Meaning.BUSY),
        (CALL, error(-32097, "no"), Meaning.BUSY),
        (CALL, error(-32600, "monthly capacity exceeded"), Meaning.BUSY),
        (SEND, error(-32000, "txpool is at capacity"), Meaning.REFUSED),
        (SEND, error(-32000, "rate limited"), Meaning.BUSY),
        (LOGS, error(-32005, "query returned more than 10000 results"), Meaning.REFUSED),
        (LOGS, error(-32005, "limit exceeded"), Meaning.REFUSED),
        (LOGS, error(-32614, "eth_getLogs is limited to a 10,000 range"), Meaning.REFUSED),
        (LOGS, error(-32005, "Too Many Requests"), Meaning.BUSY),
    ],
)
def test_what_answers_mean(method: str, answer: dict[str, Any], expected: Meaning) -> None:
    assert meaning(method, answer) is expected


def body(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, {"id": 7, "result": "0x5"}),
        (200, {"id": None, **error(-32700, "parse error")}),
        (400, {"id": 7, **error(-32602, "block range is too wide")}),
        (500, {"id": 7, **error(3, "execution reverted", "0x08c379a0")}),
    ],
)
def test_what_is_an_answer(status: int, content: Any) -> None:
    assert read(CALL, 7, status, body(content)) == content


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"<html>", "no JSON-RPC answer"),
        (200, [], "no JSON-RPC answer"),
        (200, {"id": 8, "result": "0x5"}, "no JSON-RPC answer"),
        (200, {"message": "invalid key"}, "no JSON-RPC answer"),
        (400, {"message": "invalid key"}, "no JSON-RPC answer"),
        (401, {"message": "invalid api key"}, "HTTP 401"),
        (402, {"id": None, **error(-32600, "monthly capacity exceeded")}, "HTTP 402"),
        (403, b"<html>", "HTTP 403"),
        (503, {"id": 7, **error(-32603, "Service unavailable")}, "HTTP 503"),
        (502, b"", "HTTP 502"),
    ],
)
def test_what_is_none(status: int, content: Any, words: str) -> None:
    with pytest.raises(ChainError, match=words) as caught:
        read(CALL, 7, status, body(content))
    assert "invalid" not in str(caught.value), "its words may hold a key"


def test_too_much_at_once_is_told_apart() -> None:
    with pytest.raises(TooLong):
        read(LOGS, 7, 413, b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"rate": {"backoff_seconds": 30}}, 30.0),
        ({"rate": {"backoff_seconds": 1e9}}, 300.0),
        ({"rate": {"backoff_seconds": -1}}, None),
        ({"rate": {"backoff_seconds": float("nan")}}, None),
        ({"rate": 5}, None),
        ("0x", None),
        (None, None),
    ],
)
def test_how_long_to_wait(data: Any, expected: float | None) -> None:
    assert patience(error(-32005, "x", data)) == expected
