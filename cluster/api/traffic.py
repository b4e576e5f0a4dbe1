"""Who is inside: how many at one time, and what they were answered.

Ray Serve lets `MOST_ONGOING` requests into this process and keeps the others waiting, those too
that ask whether it lives. So fewer are let in here, and the rest is told at once to come again; of
the streams, which stay, fewer still.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Final

import prometheus_client
import structlog
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.exceptions import HTTPException as TooMuch
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = structlog.get_logger(__name__)

MOST_ONGOING: Final = 512
MOST_INSIDE: Final = 256
MOST_STREAMS: Final = 100
MOST_STREAMS_EACH: Final = 50
"""From one address, which may be a proxy's."""
LONGEST_STREAM_SECONDS: Final = 900.0
"""Who still looks comes again."""
AGAIN_SECONDS: Final = 5
ALWAYS: Final = frozenset({"/healthz", "/readyz"})
OTHER: Final = "other"
"""The label of whatever is no path of ours."""


class Traffic:
    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.inside = 0
        self._streams: Counts[str] = Counts()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "crynux_http_requests",
            "Answers of the API, by the path as its description names it, and by code.",
            ("path", "code"),
            registry=self._registry,
        )
        self._open = Gauge(
            "crynux_http_streams", "Streams of events that are open.", registry=self._registry
        )
        self._requests.labels(OTHER, "404")

    def expect(self, routes: Iterable[BaseRoute]) -> None:
        """Have a series for each answer that is described."""
        for route in routes:
            if isinstance(route, APIRoute):
                for code in {"200", *map(str, route.responses)}:
                    self._requests.labels(route.path, code)

    def answered(self, route: object, code: int) -> None:
        path = route.path if isinstance(route, APIRoute) else OTHER
        self._requests.labels(path, str(code)).inc()

    def enter(self, address: str) -> None:
        """A stream for it. Raises `HTTPException` when there are too many."""
        each = self._streams[address]
        if self._streams.total() >= MOST_STREAMS or each >= MOST_STREAMS_EACH:
            raise HTTPException(503, "too many follow already", headers=_again())
        self._streams[address] += 1
        self._open.set(self._streams.total())

    def leave(self, address: str) -> None:
        self._streams[address] -= 1
        self._streams += Counts()  # forgets who has none
        self._open.set(self._streams.total())

    def render(self) -> bytes:
        return prometheus_client.generate_latest(self._registry)


class Stream(StreamingResponse):
    """Tells when it is over, also when it never began."""

    def __init__(
        self, content: AsyncIterator[bytes], over: Callable[[], None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


class Door:
    """ASGI: lets in as many as may be inside, and counts what they are answered."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        traffic, began = self._traffic, False

        async def answer(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                traffic.answered(scope.get("route"), message["status"])
            await send(message)

        hear = _hearing(receive)
        if traffic.inside >= MOST_INSIDE and scope["path"] not in ALWAYS:
            full = JSONResponse({"detail": "too many ask at once"}, 503, headers=_again())
            await full(scope, hear, answer)
            return
        traffic.inside += 1
        try:
            await self._app(scope, hear, answer)
        except Exception:
            if not began:
                traffic.answered(scope.get("route"), 500)
            raise
        finally:
            traffic.inside -= 1


def _hearing(receive: Receive) -> Receive:
    """Under Serve, who leaves may be an error, and each closed page would be a traceback."""
    gone = False

    async def hear() -> Message:
        nonlocal gone
        if not gone:
            try:
                return await receive()
            except TooMuch:  # of a body: whoever sends it is there
                raise
            except Exception as error:  # noqa: BLE001 - Ray Serve's, of several kinds
                # It is said once; who asked again would wait for ever.
                gone = True
                _log.debug("client_gone", error=type(error).__name__)
        return {"type": "http.disconnect"}

    return hear


def _again() -> dict[str, str]:
    return {"retry-after": str(AGAIN_SECONDS)}
