"""What is looked at while a host is waited for.

A host may say something in time for every read, and never what it was asked for: a byte of a head,
an interim answer, a word about a chunk. So it is the whole head of an answer, and then some bytes
of its body, that have to come in time (`within`); and between any two reads, none of which lasts
long, who waits looks whether it is still wanted (`watched`).
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import httpcore2
import httpx2

STEP: Final = 0.5
"""Seconds that one read lasts at most."""
LOOK_SECONDS: Final = 0.1
"""Between two looks, however fast bytes come."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for the whole `head` of an answer, with those that lead to it, and for any bytes of
    its body."""

    head: float = 60.0
    body: float = 60.0


_look: ContextVar[Callable[[], None]] = ContextVar("look", default=lambda: None)
_until: ContextVar[float] = ContextVar("until", default=math.inf)


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """What is read from the network in here, by this thread or in a copy of its context, calls
    `look` now and then; it may raise to stop."""
    at = -math.inf

    def now_and_then() -> None:
        nonlocal at
        if (now := monotonic()) - at >= LOOK_SECONDS:
            at = now
            look()

    token = _look.set(now_and_then)
    try:
        yield
    finally:
        _look.reset(token)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is waited for in here comes in so many seconds, or is given up."""
    token = _until.set(min(_until.get(), monotonic() + seconds))
    try:
        yield
    finally:
        _until.reset(token)


def check() -> None:
    """Raises what the look raises, and `httpx2.ReadTimeout` when it has taken too long."""
    _look.get()()
    if monotonic() >= _until.get():
        raise httpx2.ReadTimeout("what was asked for didn't come in time")


class HeardBody(httpx2.SyncByteStream):
    """A body whose next bytes come within so many seconds."""

    def __init__(self, body: httpx2.SyncByteStream, seconds: float) -> None:
        self._body = body
        self._seconds = seconds

    def __iter__(self) -> Iterator[bytes]:
        pieces = iter(self._body)
        while True:
            with within(self._seconds):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def close(self) -> None:
        self._body.close()


class HeardTransport(httpx2.HTTPTransport):
    """Checks between any two reads, of whatever is said, by a proxy too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # What it is made of takes another network, and it has no way to name one.
        self._pool._network_backend = _Network(self._pool._network_backend)


class _Network(httpcore2.NetworkBackend):
    def __init__(self, inner: httpcore2.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        made = self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(made)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        until = math.inf if timeout is None else monotonic() + timeout
        while True:
            check()
            try:
                return self._inner.read(max_bytes, max(min(STEP, until - monotonic()), 0.001))
            except httpcore2.ReadTimeout:
                # Nothing of what came is lost by it, with TLS neither.
                if monotonic() >= until:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
