"""HTTP to hosts that tasks name: the address that is checked is the address that is connected to.

Every request passes here, so every redirect does. A name is resolved once for a request, all its
addresses are checked, and the connection is made to one of them by number; certificates are still
checked against the name. Through a proxy it is the proxy that resolves names: then what is written
in a URL is checked, and where names lead is the proxy's to guard.
"""

from __future__ import annotations

import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from threading import Lock
from typing import Final

import httpx2

import cluster
from cluster.models import hearing
from cluster.models.hearing import HeardBody, HeardTransport, Patience
from cluster.models.refusals import Refused, Rule
from cluster.models.urls import UrlRules, check, check_address

MOST_HOSTS: Final = 16
"""Whose connections are kept at one time."""
Resolve = Callable[[str, int], Sequence[str]]
TIMEOUT: Final = httpx2.Timeout(30.0, connect=10.0)
PATIENCE: Final = Patience()


def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, each once. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


class GuardedTransport(httpx2.BaseTransport):
    """`make_inner` makes the transport for one host: connections made for one name are never used
    for another that has the same address."""

    def __init__(
        self,
        rules: UrlRules,
        make_inner: Callable[[], httpx2.BaseTransport],
        resolve: Resolve | None = resolve,
        patience: Patience = PATIENCE,
    ) -> None:
        self._rules = rules
        self._patience = patience
        self._make_inner = make_inner
        self._resolve = resolve
        self._inner: OrderedDict[str, httpx2.BaseTransport] = OrderedDict()
        self._lock = Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = httpx2.URL(check(str(request.url), self._rules))
        host = url.host
        inner = self._of(f"{url.scheme}://{host}:{url.port}")
        if self._resolve is None:
            return self._plain(inner.handle_request(request))
        failure: httpx2.TransportError | None = None
        for address in self._addresses(request, url):
            hearing.check()
            bound = httpx2.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return self._plain(inner.handle_request(bound))
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
        raise failure or httpx2.ConnectError(f"{host} has no address", request=request)

    def _addresses(self, request: httpx2.Request, url: httpx2.URL) -> Sequence[str]:
        host, port = url.host, url.port or (80 if url.scheme == "http" else 443)
        try:
            ip_address(host)
            addresses: Sequence[str] = (host,)
        except ValueError:
            assert self._resolve is not None, "only asked without a proxy"  # noqa: S101
            try:
                addresses = self._resolve(host, port)
            except (OSError, UnicodeError) as error:
                raise httpx2.ConnectError(f"{host}: no address", request=request) from error
        for address in addresses:
            check_address(url.scheme, host, port, address, self._rules)
        return addresses

    def _plain(self, response: httpx2.Response) -> httpx2.Response:
        """Without cookies: nothing that one answer says goes with another request. And of one that
        leads elsewhere the head alone: the library would read, and unpack, whatever comes with it.
        """
        response.headers.pop("Set-Cookie", None)
        if response.has_redirect_location:
            response.close()
            where = {"Location": response.headers["Location"]}
            return httpx2.Response(response.status_code, headers=where, content=b"")
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = HeardBody(response.stream, self._patience.body)
        return response

    def _of(self, origin: str) -> httpx2.BaseTransport:
        with self._lock:
            if origin not in self._inner:
                self._inner[origin] = self._make_inner()
            self._inner.move_to_end(origin)
            # The oldest is dropped, not closed: a thread may be reading from it.
            while len(self._inner) > MOST_HOSTS:
                self._inner.popitem(last=False)
            return self._inner[origin]

    def close(self) -> None:
        with self._lock:
            for inner in self._inner.values():
                inner.close()
            self._inner.clear()


class _GuardedClient(httpx2.Client):
    patience: Patience = PATIENCE

    def send(self, request: httpx2.Request, **options: object) -> httpx2.Response:
        try:
            with hearing.within(self.patience.head):
                return super().send(request, **options)  # type: ignore[arg-type]
        except httpx2.TooManyRedirects as error:
            raise Refused(Rule.REDIRECTS, f"{request.url.host}: redirects without end") from error


def guarded_client(
    rules: UrlRules,
    *,
    proxy: str | None = None,
    timeout: httpx2.Timeout = TIMEOUT,
    max_redirects: int = 8,
    resolve: Resolve = resolve,
    verify: ssl.SSLContext | bool = True,
    patience: Patience = PATIENCE,
) -> httpx2.Client:
    """A client that follows redirects, each of which is checked; heeds no environment variable and
    keeps no cookies. Requests raise `Refused` beside the library's own errors, and what they are
    `watched` by."""

    def inner() -> httpx2.BaseTransport:
        limits = httpx2.Limits(max_connections=32, max_keepalive_connections=8)
        return HeardTransport(verify=verify, proxy=proxy, limits=limits, trust_env=False)

    made = _GuardedClient(
        transport=GuardedTransport(rules, inner, None if proxy else resolve, patience),
        timeout=timeout,
        follow_redirects=True,
        max_redirects=max_redirects,
        trust_env=False,
        headers={"User-Agent": f"crynux-cluster/{cluster.__version__}"},
    )
    made.patience = patience
    return made
