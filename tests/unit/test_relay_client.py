from __future__ import annotations

import asyncio
import email.parser
import email.policy
import gzip
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from eth_account import Account
from eth_keys.datatypes import PrivateKey

from cluster.core.errors import (
    ParametersNotReady,
    ParametersUnreadable,
    RelayBroken,
    RelayError,
    RelayRefused,
    ResultRefused,
)
from cluster.core.types import Address, Commitment
from cluster.inference import reading
from cluster.relay.client import MAX_BODY_BYTES, MAX_PARAMETERS, RelayClient
from cluster.relay.envelope import open_envelope, seal
from cluster.relay.signing import recover, sign_digest

KEY = bytes.fromhex("420fcabfd5dbb55215490693062e6e530840c64de837d071f0d9da21aaac861e")
ACCOUNT = Address(Account.from_key(KEY).address)
TASK = Commitment("0x" + "ab" * 32)
FIELDS = {"task_id_commitment": TASK}
FILES = [("0.png", b"\x89PNG one"), ("1.png", b"two")]


class OneKey:
    def sign(self, account: Address, digest: bytes) -> bytes:
        assert account == ACCOUNT
        return sign_digest(digest, KEY)

    def open(self, account: Address, task: Commitment, envelope: str) -> str:
        assert account == ACCOUNT
        return open_envelope(envelope, task, KEY)


Handler = Callable[[httpx.Request], httpx.Response]


def refused(message: str, field: str = "task_id") -> httpx.Response:
    data = {"field_name": field, "message": message}
    return httpx.Response(400, json={"message": "validation_error", "data": data})


def success(data: Any = None) -> httpx.Response:
    return httpx.Response(200, json={"message": "success", "data": data})


class FakeRelay:
    """Answers `now` with its clock and all else by `handler`; keeps the requests it saw."""

    def __init__(self, handler: Handler, now: float = 1_000.0) -> None:
        self.handler = handler
        self.now = now
        self.requests: list[httpx.Request] = []
        self.told: list[tuple[str, str]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append(request)
        if request.url.path == "/v1/now":
            return success({"now": self.now})
        return self.handler(request)

    def client(self, clock: float = 1_000.0, timeout: float = 5.0) -> RelayClient:
        http = httpx.AsyncClient(transport=httpx.MockTransport(self))
        return RelayClient(
            "http://relay.test/",
            http,
            OneKey(),
            lambda: clock,
            timeout=timeout,
            called=lambda call, result: self.told.append((call, result)),
        )

    def paths(self) -> list[str]:
        return [f"{each.method} {each.url.path}" for each in self.requests]


def form_of(request: httpx.Request) -> list[tuple[str, str | None, bytes]]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    message = parser.parsebytes(head + request.content)
    parts: list[Any] = list(message.iter_parts())
    return [
        (
            str(part.get_param("name", header="content-disposition")),
            part.get_filename(),
            part.get_payload(decode=True),
        )
        for part in parts
    ]


async def test_now_and_the_parameters() -> None:
    relay = FakeRelay(lambda _: success({"task_args": '{"prompt":"a"}', "status": 2, "x": []}))
    client = relay.client()
    assert await client.now() == 1_000.0
    assert await client.fetch_parameters(ACCOUNT, TASK) == '{"prompt":"a"}'
    request = relay.requests[-1]
    assert request.url.path == f"/v1/inference_tasks/{TASK}"
    query = parse_qs(request.url.query.decode())
    assert recover(FIELDS, int(query["timestamp"][0]), query["signature"][0]) == ACCOUNT


def sealed_to_us(text: str) -> str:
    public = PrivateKey(KEY).public_key.to_bytes()
    return seal(text, TASK, public, lambda count: b"\x07" * count)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("over", [0, 1])
async def test_parameters_longer_than_any_task_of_ours_are_never_kept(
    sealed: bool, over: int
) -> None:
    text = "x" * (MAX_PARAMETERS + over)
    answer = sealed_to_us(text) if sealed else text
    client = FakeRelay(lambda _: success({"task_args": answer})).client()
    if not over:
        assert await client.fetch_parameters(ACCOUNT, TASK) == text
        return
    with pytest.raises(ParametersUnreadable, match="characters"):
        await client.fetch_parameters(ACCOUNT, TASK)


async def test_what_is_too_long_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(_: str) -> bool:
        raise AssertionError

    monkeypatch.setattr("cluster.relay.client.is_envelope", parsed)
    client = FakeRelay(lambda _: success({"task_args": "x" * 3 * MAX_PARAMETERS})).client()
    with pytest.raises(ParametersUnreadable):
        await client.fetch_parameters(ACCOUNT, TASK)


def test_what_is_kept_is_what_could_be_run() -> None:
    assert MAX_PARAMETERS == reading.MAX_TEXT


async def test_an_envelope_is_opened() -> None:
    sealed = sealed_to_us('{"prompt":"ü"}')
    relay = FakeRelay(lambda _: success({"task_args": sealed}))
    assert await relay.client().fetch_parameters(ACCOUNT, TASK) == '{"prompt":"ü"}'
    other = json.dumps(json.loads(sealed) | {"v": 2})
    relay.handler = lambda _: success({"task_args": other})
    with pytest.raises(ParametersUnreadable):
        await relay.client().fetch_parameters(ACCOUNT, TASK)


@pytest.mark.parametrize("message", ["Task not ready", "Task not found"])
async def test_not_ready_is_normal(message: str) -> None:
    relay = FakeRelay(lambda _: refused(message))
    with pytest.raises(ParametersNotReady):
        await relay.client().fetch_parameters(ACCOUNT, TASK)


@pytest.mark.parametrize("text", ["", " ", "\n"])
async def test_no_text_is_not_there_yet(text: str) -> None:
    relay = FakeRelay(lambda _: success({"task_args": text}))
    with pytest.raises(ParametersNotReady):
        await relay.client().fetch_parameters(ACCOUNT, TASK)


@pytest.mark.parametrize("skew", [-3_000.0, 0.0, 45_000.5])
async def test_signatures_carry_the_relays_time(skew: float) -> None:
    relay = FakeRelay(lambda _: success({"task_args": "{}"}), now=100_000.0 + skew)
    await relay.client(clock=100_000.0).fetch_parameters(ACCOUNT, TASK)
    await relay.client(clock=100_000.0).fetch_parameters(ACCOUNT, TASK)
    at = int(parse_qs(relay.requests[-1].url.query.decode())["timestamp"][0])
    assert abs(at - relay.now) <= 1


@pytest.mark.parametrize("now", [1e9, -1e9, float("nan"), float("inf")])
async def test_a_clock_that_cant_be_is_not_followed(now: float) -> None:
    async def answer(_: httpx.Request) -> httpx.Response:  # noqa: RUF029
        return httpx.Response(200, content=json.dumps({"message": "success", "data": {"now": now}}))

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = RelayClient("http://relay.test", http, OneKey(), lambda: 0.0)
    with pytest.raises(RelayError):
        await client.now()


async def test_each_look_at_its_clock_is_counted() -> None:
    relay = FakeRelay(lambda _: success({"task_args": "{}"}))
    await relay.client().fetch_parameters(ACCOUNT, TASK)
    relay.now = 1e9
    with pytest.raises(RelayError):
        await relay.client().now()
    assert relay.told == [("now", "ok"), ("now", "unreachable")]


async def test_the_skew_is_measured_again_after_an_invalid_signature() -> None:
    relay = FakeRelay(lambda _: success({"task_args": "{}"}))
    client = relay.client()
    await client.fetch_parameters(ACCOUNT, TASK)

    def strict(request: httpx.Request) -> httpx.Response:
        at = int(parse_qs(request.url.query.decode())["timestamp"][0])
        good = abs(at - relay.now) <= 60
        return success({"task_args": "{}"}) if good else refused("Invalid signature", "signature")

    relay.handler, relay.now = strict, 5_000.0
    relay.requests.clear()
    assert await client.fetch_parameters(ACCOUNT, TASK) == "{}"
    task = f"GET /v1/inference_tasks/{TASK}"
    assert relay.paths() == [task, "GET /v1/now", task]
    relay.handler = lambda _: refused("Invalid signature", "signature")
    relay.requests.clear()
    with pytest.raises(RelayError, match="Invalid signature"):
        await client.fetch_parameters(ACCOUNT, TASK)
    assert relay.paths() == [task, "GET /v1/now", task]


NESTED = b'{"data":' + b"[" * 100_000


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, content=b""),
        httpx.Response(200, content=b"[]"),
        httpx.Response(200, content=NESTED),
        httpx.Response(200, json={"data": {"task_args": 5}}),
        httpx.Response(200, json={"data": None}),
        httpx.Response(204),
        httpx.Response(302, headers={"Location": "http://127.0.0.1/admin"}),
        httpx.Response(400, content=b"<html>"),
        httpx.Response(400, json={"message": "validation_error"}),
        httpx.Response(404, json={"message": "x"}),
        httpx.Response(500, json={"message": "secret text"}),
        refused("Signer not allowed"),
        refused("words of its own\n" * 99),
        httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"{}")),
    ],
)
async def test_anything_odd_is_the_relays_fault(response: httpx.Response) -> None:
    relay = FakeRelay(lambda _: response)
    with pytest.raises(RelayError) as caught:
        await relay.client().fetch_parameters(ACCOUNT, TASK)
    assert "signature=" not in str(caught.value)
    assert "of its own" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(relay.requests) == 2


class Endless(httpx.AsyncByteStream):
    def __init__(self) -> None:
        self.sent = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent += 1 << 20
            yield b"x" * (1 << 20)

    async def aclose(self) -> None:  # noqa: RUF029
        self.closed = True


async def test_a_body_is_bounded_while_it_is_read() -> None:
    body = Endless()
    relay = FakeRelay(lambda _: httpx.Response(200, stream=body))
    with pytest.raises(RelayError, match="32 MiB"):
        await relay.client().fetch_parameters(ACCOUNT, TASK)
    assert body.sent <= MAX_BODY_BYTES + (2 << 20)
    assert body.closed


class Trickle(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b" "


async def test_a_trickle_ends_at_the_timeout() -> None:
    relay = FakeRelay(lambda _: httpx.Response(200, stream=Trickle()))
    with pytest.raises(RelayError, match="in time"):
        await relay.client(timeout=0.1).fetch_parameters(ACCOUNT, TASK)


async def test_a_relay_that_is_gone() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"no route {request.url}")

    with pytest.raises(RelayError) as caught:
        await FakeRelay(gone).client().fetch_parameters(ACCOUNT, TASK)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize("task", ["0xab", "../../admin", TASK.upper(), TASK + "\n"])
async def test_only_a_commitment_gets_into_a_path(task: str) -> None:
    relay = FakeRelay(lambda _: success())
    with pytest.raises(ValueError, match="commitment"):
        await relay.client().fetch_parameters(ACCOUNT, Commitment(task))
    assert relay.requests == []


async def test_files_go_up_in_index_order() -> None:
    relay = FakeRelay(lambda _: success())
    await relay.client().upload_result(ACCOUNT, TASK, [*FILES, ("checkpoint.zip", b"zip")])
    request = relay.requests[-1]
    assert request.url.path == f"/v1/inference_tasks/{TASK}/results"
    assert request.url.query == b""
    parts = form_of(request)
    assert [part for part in parts if part[1] is not None] == [
        ("files", "0.png", b"\x89PNG one"),
        ("files", "1.png", b"two"),
        ("checkpoint", "checkpoint.zip", b"zip"),
    ]
    fields = {name: data.decode() for name, filename, data in parts if filename is None}
    assert recover(FIELDS, int(fields["timestamp"]), fields["signature"]) == ACCOUNT


async def test_wrong_files_are_refused() -> None:
    relay = FakeRelay(lambda _: refused("Wrong result files uploaded", "files"))
    with pytest.raises(ResultRefused):
        await relay.client().upload_result(ACCOUNT, TASK, FILES)


async def test_a_refusal_is_told_from_a_relay_that_is_broken_or_away() -> None:
    for response, kind in (
        (refused("Signer not allowed"), RelayRefused),
        (httpx.Response(500), RelayBroken),
        (httpx.Response(502), RelayError),
    ):
        relay = FakeRelay(lambda _, response=response: response)  # type: ignore[misc]
        with pytest.raises(RelayError) as caught:
            await relay.client().fetch_parameters(ACCOUNT, TASK)
        assert type(caught.value) is kind


def after_upload(get: httpx.Response) -> Handler:
    return lambda request: get if request.method == "GET" else refused("Task not validated")


@pytest.mark.parametrize(
    "get",
    [
        refused("Task not ready"),
        success({"task_args": "{}", "status": 8}),
        success({"task_args": "{}", "status": 11}),
    ],
)
async def test_a_repeat_after_success_is_success(get: httpx.Response) -> None:
    await FakeRelay(after_upload(get)).client().upload_result(ACCOUNT, TASK, FILES)


@pytest.mark.parametrize(
    "get",
    [
        success({"task_args": "{}", "status": 4}),
        success({"task_args": "{}"}),
        refused("Task not found"),
        httpx.Response(500),
    ],
)
async def test_a_relay_behind_the_chain_is_tried_again(get: httpx.Response) -> None:
    with pytest.raises(RelayError):
        await FakeRelay(after_upload(get)).client().upload_result(ACCOUNT, TASK, FILES)


@pytest.mark.parametrize(
    "response", [httpx.Response(200, content=b"ok"), httpx.Response(200, json={"message": "hm"})]
)
async def test_an_upload_needs_a_clear_yes(response: httpx.Response) -> None:
    with pytest.raises(RelayError):
        await FakeRelay(lambda _: response).client().upload_result(ACCOUNT, TASK, FILES)
