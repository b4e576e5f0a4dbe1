"""Which RPC endpoint to ask: pure bookkeeping of what each has done lately.

An endpoint is asked in the order of the configuration, unless it is worse off than the next: its
circuit is open, it has asked us to wait, its head is behind the others', it serves another chain or
another fork, or it is far slower. One whose circuit was opened is tried again with a single call
(half-open) after a pause that doubles with each failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

FAILURES_TO_OPEN: Final = 3
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 120.0
MOST_LAG: Final = 3
"""Blocks behind the best head, after which an endpoint isn't believed."""
STALE_SECONDS: Final = 60.0
"""How long a head that was seen says anything."""
LATENCY_WEIGHT: Final = 0.2
SLOW: Final = 4.0
"""An endpoint so many times slower than one behind it in the order stands back."""
SLOW_SECONDS: Final = 1.0
"""And never one that answers within this."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is shown to people: the URL's host, never its path, which may hold a key. Times are of
    one clock, in seconds; `latency` is a mean of answers that came."""

    name: str
    failures: int = 0
    open_until: float = 0.0
    patience_until: float = 0.0
    probing: bool = False
    latency: float | None = None
    head: int | None = None
    head_at: float = 0.0
    chain_id: int | None = None
    """Where it isn't the one that is wanted; such an endpoint is asked for nothing else."""
    lacks: str = ""
    """A contract that isn't on it: it may not have come so far in the chain yet."""
    forked: bool = False
    """Its blocks aren't those that the others tell of."""

    @property
    def is_open(self) -> bool:
        return self.failures >= FAILURES_TO_OPEN

    @property
    def wrong(self) -> str:
        """Why it is never believed; empty for one that is."""
        if self.chain_id is not None:
            return f"serves chain {self.chain_id}"
        if self.lacks:
            return f"has no contract at {self.lacks}"
        return "tells of another fork" if self.forked else ""


def answered(endpoint: Endpoint, seconds: float) -> Endpoint:
    """An answer came, whatever it says of the question."""
    known = endpoint.latency
    mean = seconds if known is None else known + LATENCY_WEIGHT * (seconds - known)
    return replace(endpoint, failures=0, open_until=0.0, probing=False, latency=mean)


def failed(endpoint: Endpoint, now: float) -> Endpoint:
    """No answer, or none that can be one."""
    failures = endpoint.failures + 1
    beyond = failures - FAILURES_TO_OPEN
    pause = min(FIRST_PAUSE * 2.0 ** max(beyond, 0), LONGEST_PAUSE)
    until = now + pause if beyond >= 0 else 0.0
    return replace(endpoint, failures=failures, open_until=until, probing=False)


def put_off(endpoint: Endpoint, now: float, seconds: float) -> Endpoint:
    """It asked us to wait (429, Retry-After): not a failure, and not to be asked until then."""
    until = max(endpoint.patience_until, now + seconds)
    return replace(endpoint, patience_until=until, probing=False)


def saw_head(endpoint: Endpoint, number: int, now: float) -> Endpoint:
    return replace(endpoint, head=number, head_at=now)


def best_head(endpoints: Sequence[Endpoint], now: float) -> int | None:
    """The highest head that is vouched for: the highest, or with three and more endpoints the
    second highest, so that one endpoint alone can't make all others look behind."""
    heads = sorted(
        (
            each.head
            for each in endpoints
            if each.head is not None and now - each.head_at <= STALE_SECONDS and not each.wrong
        ),
        reverse=True,
    )
    if not heads:
        return None
    return heads[1] if len(heads) >= 3 else heads[0]


def lag(endpoint: Endpoint, endpoints: Sequence[Endpoint], now: float) -> int:
    """Blocks behind the others, as far as is known."""
    best = best_head(endpoints, now)
    if best is None or endpoint.head is None or now - endpoint.head_at > STALE_SECONDS:
        return 0
    return max(best - endpoint.head, 0)


def problem(endpoint: Endpoint, endpoints: Sequence[Endpoint], now: float) -> str:
    """In words, why it isn't asked now; empty when it is."""
    if endpoint.wrong:
        return endpoint.wrong
    if endpoint.is_open and (endpoint.open_until > now or endpoint.probing):
        return f"failed {endpoint.failures} times"
    if endpoint.patience_until > now:
        return f"asked to wait {endpoint.patience_until - now:.0f} s"
    if (behind := lag(endpoint, endpoints, now)) > MOST_LAG:
        return f"{behind} blocks behind"
    return ""


def order(endpoints: Sequence[Endpoint], now: float) -> tuple[int, ...]:
    """Whom to ask, by index, the first first; those with a problem are left out.

    One whose circuit is half-open comes last, but it comes: else it would never be known to be
    back while another answers.
    """
    fit = [index for index, each in enumerate(endpoints) if not problem(each, endpoints, now)]
    swift = min((_latency(endpoints[index]) for index in fit), default=0.0)
    bar = max(swift * SLOW, SLOW_SECONDS)

    def rank(index: int) -> tuple[bool, bool, int]:
        each = endpoints[index]
        return each.is_open, _latency(each) > bar, index

    return tuple(sorted(fit, key=rank))


def for_writes(endpoints: Sequence[Endpoint], now: float) -> tuple[int, ...]:
    """Every endpoint that may pass a transaction on: one that lags can still do that."""
    return tuple(
        index
        for index, each in enumerate(endpoints)
        if not each.wrong
        and each.patience_until <= now
        and not (each.is_open and (each.open_until > now or each.probing))
    )


def outvoted(hashes: Mapping[int, str]) -> frozenset[int]:
    """Of endpoints that name different blocks for one number, those that aren't believed: all
    whose block is not the one most name, of equals the one that the first in order names."""
    if len(set(hashes.values())) < 2:
        return frozenset()
    votes: dict[str, list[int]] = {}
    for index in sorted(hashes):
        votes.setdefault(hashes[index], []).append(index)
    believed = max(votes.values(), key=lambda voters: (len(voters), -voters[0]))
    return frozenset(hashes) - frozenset(believed)


def _latency(endpoint: Endpoint) -> float:
    return endpoint.latency or 0.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A rate of calls: holds a second's worth, and never less than `burst`."""

    rate: float | None
    level: float = 0.0
    at: float | None = None
    burst: float = 1.0

    def take(self, now: float) -> tuple[Bucket, float]:
        """The bucket after one more call, and how long the call has to wait."""
        if self.rate is None:
            return self, 0.0
        most = max(self.rate, self.burst)
        level = most if self.at is None else min(self.level + (now - self.at) * self.rate, most)
        level -= 1.0
        return replace(self, level=level, at=now), max(-level / self.rate, 0.0)
