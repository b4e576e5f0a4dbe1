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

from cluster.core.wording import times

FAILURES_TO_OPEN: Final = 3
REFUSALS_TO_OPEN: Final = 5
"""In a row, of what another endpoint has answered."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 120.0
MOST_LAG: Final = 3
LAG_SECONDS: Final = 6.0
"""So many blocks and seconds behind the best head, an endpoint is asked only for want of others."""
FAR_SECONDS: Final = 60.0
"""And further behind than this not at all."""
STALE_SECONDS: Final = 60.0
"""How long a head that was seen says anything."""
LATENCY_WEIGHT: Final = 0.2
SLOW: Final = 4.0
"""An endpoint so many times slower than one behind it in the order stands back."""
LONG_WAIT: Final = 0.2
"""Of endpoints that have to be waited for, by their rates, so many seconds make a difference."""
MOST_AHEAD: Final = 30.0
"""Seconds of the wall clock that a block's time may be ahead, unless all are. Less than
`FAR_SECONDS`, so that no head alone makes the others look far behind."""
SLOW_SECONDS: Final = 1.0
"""And never one that answers within this."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is shown to people: the URL's host, never its path, which may hold a key. Times are of
    one clock, in seconds; `latency` is a mean of answers that came."""

    name: str
    priority: int = 0
    """Of those that do equally well the lowest is asked first."""
    failures: int = 0
    refusals: int = 0
    why: str = ""
    """What the last failure was, in words that hold no key."""
    open_until: float = 0.0
    patience_until: float = 0.0
    probing: bool = False
    latency: float | None = None
    head: int | None = None
    head_at: float = 0.0
    behind: int = 0
    seconds_behind: float = 0.0
    """Of the best head, when all were last asked together; 0 where that is little."""
    judged_at: float = 0.0
    chain_id: int | None = None
    """Where it isn't the one that is wanted; such an endpoint is asked for nothing else."""
    lacks: str = ""
    """A contract that isn't on it: it may not have come so far in the chain yet."""
    forked: bool = False
    """Its blocks aren't those that the others tell of."""
    from_future: bool = False
    """Its head is of a time to come, and others' aren't."""

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
        if self.from_future:
            return "tells of blocks of the future"
        return "tells of another fork" if self.forked else ""


def answered(endpoint: Endpoint, seconds: float) -> Endpoint:
    """An answer came, whatever it says of the question."""
    known = endpoint.latency
    mean = seconds if known is None else known + LATENCY_WEIGHT * (seconds - known)
    return replace(endpoint, failures=0, open_until=0.0, probing=False, latency=mean)


def failed(endpoint: Endpoint, now: float, why: str = "") -> Endpoint:
    """No answer, or none that can be one."""
    failures = endpoint.failures + 1
    beyond = failures - FAILURES_TO_OPEN
    pause = min(FIRST_PAUSE * 2.0 ** max(beyond, 0), LONGEST_PAUSE)
    until = now + pause if beyond >= 0 else 0.0
    return replace(endpoint, failures=failures, open_until=until, probing=False, why=why)


def refused(endpoint: Endpoint, now: float, why: str) -> Endpoint:
    """It wouldn't do what another one did: after some of these in a row, as failed."""
    refusals = endpoint.refusals + 1
    if refusals < REFUSALS_TO_OPEN:
        return replace(endpoint, refusals=refusals)
    failures = max(endpoint.failures, FAILURES_TO_OPEN - 1)
    return failed(replace(endpoint, refusals=refusals, failures=failures), now, why)


def put_off(endpoint: Endpoint, now: float, seconds: float) -> Endpoint:
    """It asked us to wait (429, Retry-After): not a failure, and not to be asked until then."""
    until = max(endpoint.patience_until, now + seconds)
    return replace(endpoint, patience_until=until, probing=False)


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block that an endpoint tells of; `timestamp` is the block's own."""

    number: int
    timestamp: float


def saw_head(endpoint: Endpoint, head: Head, now: float) -> Endpoint:
    return replace(endpoint, head=head.number, head_at=now)


def vouched(heads: Sequence[Head]) -> Head | None:
    """The highest of heads that were seen together: the highest, or with three and more endpoints
    the second highest, so that one endpoint alone can't make all others look behind."""
    ordered = sorted(heads, key=lambda head: (head.number, head.timestamp), reverse=True)
    return ordered[min(len(ordered) - 1, 1) if len(ordered) >= 3 else 0] if ordered else None


def compared(endpoint: Endpoint, head: Head, best: Head, now: float) -> Endpoint:
    """How far its head is behind the best of those that were seen at the same time. Both in blocks
    and seconds: where blocks are made quickly, a few say nothing."""
    blocks, seconds = best.number - head.number, best.timestamp - head.timestamp
    if blocks <= MOST_LAG or seconds <= LAG_SECONDS:
        blocks, seconds = 0, 0.0
    return replace(endpoint, behind=blocks, seconds_behind=seconds, judged_at=now)


def lags(endpoint: Endpoint, now: float) -> bool:
    return endpoint.behind > 0 and now - endpoint.judged_at <= STALE_SECONDS


def problem(endpoint: Endpoint, now: float) -> str:
    """In words, why it isn't asked now, or only when no other can be; empty when it is."""
    if endpoint.wrong:
        return endpoint.wrong
    if endpoint.is_open and (endpoint.open_until > now or endpoint.probing):
        why = f": {endpoint.why}" if endpoint.why else ""
        return f"failed {times(max(endpoint.failures, endpoint.refusals))}{why}"
    if endpoint.patience_until > now:
        return f"asked to wait {endpoint.patience_until - now:.0f} s"
    return f"{endpoint.behind} blocks behind" if lags(endpoint, now) else ""


def order(
    endpoints: Sequence[Endpoint], now: float, waits: Mapping[int, float] | None = None
) -> tuple[int, ...]:
    """Whom to ask, by index, the first first; those with a problem are left out. `waits`: for how
    many seconds each would have to be waited for, by its rate.

    One whose circuit is half-open comes last, but it comes: else it would never be known to be
    back while another answers. One that lags a little comes behind that: what it tells is old, but
    better than nothing.
    """
    fit = [index for index, each in enumerate(endpoints) if _may_be_asked(each, now)]
    swift = min((_latency(endpoints[index]) for index in fit), default=0.0)
    bar = max(swift * SLOW, SLOW_SECONDS)

    def rank(index: int) -> tuple[bool, bool, bool, int, int, int]:
        each, waited = endpoints[index], int((waits or {}).get(index, 0.0) / LONG_WAIT)
        return lags(each, now), each.is_open, _latency(each) > bar, waited, each.priority, index

    return tuple(sorted(fit, key=rank))


def _may_be_asked(endpoint: Endpoint, now: float) -> bool:
    if lags(endpoint, now) and endpoint.seconds_behind > FAR_SECONDS:
        return False
    return not problem(replace(endpoint, behind=0), now)


def for_writes(endpoints: Sequence[Endpoint], now: float) -> tuple[int, ...]:
    """Every endpoint that may pass a transaction on: one that lags can still do that, and what is
    good on one fork of the chain is on the other."""
    return tuple(
        index
        for index, each in enumerate(endpoints)
        if each.chain_id is None
        and not each.lacks
        and each.patience_until <= now
        and not (each.is_open and (each.open_until > now or each.probing))
    )


def outvoted(hashes: Mapping[int, str]) -> frozenset[int]:
    """Of endpoints that name different blocks for one number, those that aren't believed: all
    whose block is not the one most name, of equals the one that the first in order names."""
    if len(set(hashes.values())) < 2:
        return frozenset()
    votes = _votes(hashes)
    believed = max(votes.values(), key=lambda voters: (len(voters), -voters[0]))
    return frozenset(hashes) - frozenset(believed)


def undecided(hashes: Mapping[int, str]) -> bool:
    """Whether those who are believed are only so because they come first."""
    counts = sorted(map(len, _votes(hashes).values()), reverse=True)
    return len(counts) > 1 and counts[0] == counts[1]


def _votes(hashes: Mapping[int, str]) -> dict[str, list[int]]:
    votes: dict[str, list[int]] = {}
    for index in sorted(hashes):
        votes.setdefault(hashes[index], []).append(index)
    return votes


def _latency(endpoint: Endpoint) -> float:
    return endpoint.latency or 0.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A rate of calls: holds a second's worth, and never less than `burst`."""

    rate: float | None
    level: float = 0.0
    at: float | None = None
    burst: float = 1.0

    def wait(self, now: float) -> float:
        """How long one more call would have to wait."""
        return self.take(now)[1]

    def take(self, now: float) -> tuple[Bucket, float]:
        """The bucket after one more call, and how long the call has to wait."""
        if self.rate is None:
            return self, 0.0
        most = max(self.rate, self.burst)
        level = most if self.at is None else min(self.level + (now - self.at) * self.rate, most)
        level -= 1.0
        return replace(self, level=level, at=now), max(-level / self.rate, 0.0)
