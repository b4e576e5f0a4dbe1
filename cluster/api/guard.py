"""Who may read and who may act: a bearer token, compared in constant time, and rates.

    a token is set           acting needs it; reading too, unless reads are open
    none, on loopback        both are allowed to this machine, addressed as such
    none, on other addresses nobody may act; reading only if reads are open

Without a token, a page in a browser on this machine must not act for whoever wrote it: a request
that names another host (a rebound DNS name), or that comes from another origin, is refused. So is
one that a proxy on this machine hands on, for whom nobody knows.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from cluster import logs
from cluster.api.tokens import is_loopback
from cluster.chain.health import Bucket

ACTIONS_PER_SECOND: Final = 5.0
FAILURES_PER_SECOND: Final = 0.2
"""Of wrong tokens, from one address: then it waits, whoever has the right one does not."""
REFUSALS_LOGGED: Final = 0.2
"""In a second; more at once are only counted."""
MOST_ADDRESSES: Final = 1_000
HANDED_ON: Final = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)
"""Headers of which a proxy adds one."""
log = logs.get(__name__)

NOBODY: Final = "no token is set (serve.token_file), so nobody may do this from here"


@dataclass(frozen=True, slots=True)
class Access:
    """`local`: the API listens on a loopback address only."""

    token: str | None = field(default=None, repr=False)
    open_reads: bool = False
    local: bool = True


@dataclass
class Guard:
    """`read`, `look` and `act` are FastAPI dependencies; they raise `HTTPException`, and give the
    name under which what is done is written down."""

    access: Access
    clock: Callable[[], float]
    _acting: dict[str, Bucket] = field(default_factory=dict)
    _failing: dict[str, Bucket] = field(default_factory=dict)
    _logged: Bucket = Bucket(REFUSALS_LOGGED, burst=20.0)

    def read(self, request: Request) -> str:
        access = self.access
        if access.open_reads:
            return "anyone"
        if access.token is None and not access.local:
            raise HTTPException(403, "reads are closed (serve.open_reads) and no token is set")
        return self._known(request)

    def look(self, request: Request) -> str:
        """At what is somebody's: whoever may act may, as often as wanted (ten pictures at once)."""
        if self.access.token is None and not self.access.local:
            raise HTTPException(403, NOBODY)
        return self._known(request)

    def act(self, request: Request) -> str:
        who = self.look(request)
        self._take(self._acting, address_of(request), ACTIONS_PER_SECOND, "too many actions")
        return who

    def _known(self, request: Request) -> str:
        token = self.access.token
        if token is None:
            self._local(request)
            return f"local {address_of(request)}"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), token.encode()
        ):
            return f"token {address_of(request)}"
        self._take(self._failing, address_of(request), FAILURES_PER_SECOND, "too many wrong tokens")
        if given:
            self._tell(request, "wrong token")
        raise HTTPException(401, "a bearer token is needed", headers={"www-authenticate": "Bearer"})

    def _local(self, request: Request) -> None:
        try:
            _check_local(request)
        except HTTPException as error:
            self._tell(request, error.detail)
            raise

    def _tell(self, request: Request, why: str) -> None:
        """Only here: whoever hasn't come in, comes into no audit log."""
        bucket, pause = self._logged.take(self.clock())
        if pause <= 0:
            self._logged = bucket
            path = request.url.path[:100]
            log.warning("request_refused", address=address_of(request), path=path, why=why)

    def _take(self, buckets: dict[str, Bucket], key: str, rate: float, problem: str) -> None:
        now = self.clock()
        bucket, pause = buckets.get(key, Bucket(rate, burst=5.0)).take(now)
        if pause > 0:
            raise HTTPException(429, problem, headers={"retry-after": str(int(pause) + 1)})
        buckets.pop(key, None)
        buckets[key] = bucket
        while len(buckets) > MOST_ADDRESSES:
            del buckets[next(iter(buckets))]


def address_of(request: Request) -> str:
    return request.client.host if request.client is not None else "unknown"


def _check_local(request: Request) -> None:
    """Raises `HTTPException` unless a program on this machine asks, for itself."""
    for header in HANDED_ON:
        if header in request.headers:
            raise HTTPException(403, f"a proxy asks ({header}): behind one, a token is needed")
    said, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        host = urlsplit(f"//{said}").hostname or ""
        where = None if origin is None else urlsplit(origin).netloc
    except ValueError:  # as of a bracket that isn't closed
        raise HTTPException(403, "Host or Origin is no address") from None
    if not is_loopback(host):
        raise HTTPException(403, f"addressed as {host[:100]}: without a token, only as 127.0.0.1")
    if where not in {None, said}:
        raise HTTPException(403, "another site's page may not ask this")
