"""JSON-RPC over HTTP: what comes back is an answer, or an error that says whose trouble it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import httpx
import pytest

from cluster.chain import rpc
from cluster.chain.answers import Throttled, TooLong
from cluster.chain.rpc import HttpTransport, http_transport
from cluster.core.errors import ChainError

URL = "http://node.example/secret-key"
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], HttpTransport]:
    real = httpx.AsyncClient

    def build(answer: Answer) -> HttpTransport:
        client = functools.partial(real, transport=httpx.MockTransport(answer))
        monkeypatch.setattr(httpx, "AsyncClient", client)
        return http_transport(URL, 5.0)

    return build


async def test_an_answer_is_given_as_it_is(serve: Callable[[Answer], HttpTransport]) -> None:
    transport = serve(lambda _: httpx.Response(200, json={"id": 1, "result": "0x5"}))
    assert transport.name == "node.example"
    assert await transport.send("eth_chainId", ()) == {"id": 1, "result": "0x5"}


@pytest.mark.parametrize(
    ("said", "expected"), [("7", 7.0), ("100000", None), ("99999", 300.0), ("soon", None)]
)
async def test_who_asks_us_to_wait(
    serve: Callable[[Answer], HttpTransport], said: str, expected: float | None
) -> None:
    transport = serve(lambda _: httpx.Response(429, headers={"Retry-After": said}))
    with pytest.raises(Throttled) as caught:
        await transport.send("eth_chainId", ())
    assert caught.value.retry_after == expected


async def test_more_than_is_read_is_no_silence(
    serve: Callable[[Answer], HttpTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_ANSWER", 1000)
    transport = serve(lambda _: httpx.Response(200, content=b"[" + b"1," * 1000))
    with pytest.raises(TooLong):
        await transport.send("eth_getLogs", ())


async def test_no_error_names_the_address(serve: Callable[[Answer], HttpTransport]) -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"can't reach {request.url}")

    transport = serve(away)
    with pytest.raises(ChainError, match="ConnectError") as caught:
        await transport.send("eth_chainId", ())
    assert "secret" not in str(caught.value)
