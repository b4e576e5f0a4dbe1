"""How many accounts a class of cards should have: from cards, slots, and what waits; pure.

A target is a range. Fewer accounts than `least` and more are woken; more than `most` and some are
paused; in between nothing is done, so that what comes and goes (a card's process begun anew, a node
that is rolled, an estimate that wavers) moves no account.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Final

from cluster.core.types import Commitment, GigaBytes, GpuClass, Timestamp

NO_LIMIT: Final = 2**31
MOST_SLOTS: Final = 16
WEIGHT: Final = 0.2
"""Of a new measurement against the mean of those before."""
FEW: Final = 3
"""Tasks of a class before its slots are believed to be measured."""


@dataclass(frozen=True, slots=True)
class Target:
    least: int
    most: int


NONE: Final = Target(0, 0)


# --- cards that come and go -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cards:
    """Cards of each class: how many are `here` now, and since when those are `gone` that may come
    back; the one that went last first."""

    here: Mapping[GpuClass, int] = field(default_factory=dict)
    gone: Mapping[GpuClass, tuple[Timestamp, ...]] = field(default_factory=dict)

    @property
    def kept(self) -> Mapping[GpuClass, int]:
        """How many may be reckoned with."""
        found = {each: self.here.get(each, 0) + len(self.gone.get(each, ())) for each in self._all}
        return {each: count for each, count in found.items() if count}

    @property
    def _all(self) -> Set[GpuClass]:
        return self.here.keys() | self.gone.keys()

    def without(self, taken: Mapping[GpuClass, int]) -> Cards:
        """With so many of them taken out: they aren't waited for."""
        here = {each: max(0, count - taken.get(each, 0)) for each, count in self.here.items()}
        gone = {
            each: since[max(0, taken.get(each, 0) - self.here.get(each, 0)) :]
            for each, since in self.gone.items()
        }
        return Cards(here, gone)


def counted(
    cards: Cards, here: Mapping[GpuClass, int], now: Timestamp, patience: float, settled: bool
) -> Cards:
    """`cards` after a count. What has left is waited for `patience` seconds; where `settled` is
    False (the cluster isn't known yet), for good. Where some leave as others come back, only what
    is missing all the time is given up."""
    gone: dict[GpuClass, tuple[Timestamp, ...]] = {}
    for gpu_class in {*here, *cards.here, *cards.gone}:
        fewer = cards.here.get(gpu_class, 0) - here.get(gpu_class, 0)
        since = (now,) * max(0, fewer) + cards.gone.get(gpu_class, ())[max(0, -fewer) :]
        waited_for = tuple(at for at in since if not settled or now - at < patience)
        if waited_for:
            gone[gpu_class] = waited_for
    return Cards(dict(here), gone)


# --- slots ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cycle:
    """Means of a class's tasks, in seconds: on the card, and in the network's hands before and
    after; `tasks` were measured. Time that a task waited for a card is in neither."""

    compute: float = 0.0
    network: float = 0.0
    tasks: int = 0


def measured(cycle: Cycle, compute: float, network: float) -> Cycle:
    if cycle.tasks == 0:
        return Cycle(compute, network, 1)
    return Cycle(
        cycle.compute + WEIGHT * (compute - cycle.compute),
        cycle.network + WEIGHT * (network - cycle.network),
        cycle.tasks + 1,
    )


def slots_for(cycle: Cycle, present: int, most: int) -> int:
    """How many accounts keep one card busy: as often as it could compute while one task is in the
    network's hands, and once more; and the root of how often, because tasks come by blocks, and not
    evenly (without, cards were idle for an eighth of the time). One until a few tasks were
    measured; changed only when the measurement is clearly beyond `present`."""
    if cycle.tasks < FEW or cycle.compute <= 0:
        return min(present, most)
    often = cycle.network / cycle.compute
    wanted = 1 + often + math.sqrt(often)
    if present - 1.25 < wanted <= present + 0.25:
        return min(present, most)
    return max(1, min(math.ceil(wanted), most, MOST_SLOTS))


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a class. `slots`: as many were wanted of late; `limit`: no more accounts than these, for
    the load that they make."""

    cycle: Cycle = Cycle()
    slots: int = 1
    limit: int | None = None


def text(gpu_class: GpuClass, there: Measured) -> str:
    cycle = there.cycle
    return json.dumps(
        {
            "class": [gpu_class.name, gpu_class.vram],
            "cycle": [cycle.compute, cycle.network, cycle.tasks],
            "slots": there.slots,
            "limit": there.limit,
        }
    )


def parsed(words: str) -> tuple[GpuClass, Measured]:
    """What `text` wrote."""
    said = json.loads(words)
    (name, vram), (compute, network, tasks) = said["class"], said["cycle"]
    cycle = Cycle(compute, network, tasks)
    return GpuClass(name, GigaBytes(vram)), Measured(cycle, said["slots"], said["limit"])


# --- load -----------------------------------------------------------------------------------------

HIGH: Final = 0.8
"""Of the time until a deadline: when a task would be done later than that, there is too much."""

ROOM: Final = 0.7
"""As much there may be with one account more, as far as can be told, for it to be let in."""

WINDOW_SECONDS: Final = 120.0


def share_of(waiting: Iterable[tuple[float, float]], cards: int) -> float:
    """How near to its deadline the task comes that comes nearest (0: at once, 1: just in time).

    Each is seconds of computing, and seconds until its deadline. What is more urgent is done
    first, so a task waits for that only, and each card takes its share.
    """
    share = seconds = 0.0
    for compute, slack in sorted(waiting, key=lambda each: each[1]):
        seconds += compute
        share = max(share, seconds / cards / max(slack, 1.0))
    return share


@dataclass(frozen=True, slots=True)
class Load:
    """Of a class, what its accounts' tasks make: `share_of` those that are to be computed."""

    share: float = 0.0
    tasks: frozenset[Commitment] = frozenset()


@dataclass(frozen=True, slots=True)
class Limit:
    """How many accounts may serve, by the load; None for no limit. `behind`: tasks that were there
    when some were taken away, and then, once, those that came while they were done: these waited
    for them. Since all of them are done, at `since`, `peak` was the highest load."""

    accounts: int | None = None
    since: Timestamp = Timestamp(0)
    peak: float = 0.0
    behind: frozenset[Commitment] = frozenset()
    follow: bool = False
    """Those that came meanwhile are still to be waited for."""


def window_of(cycle: Cycle) -> float:
    """Seconds in which each account has come by its busiest: two of its tasks, at the least."""
    return max(WINDOW_SECONDS, 2 * (cycle.compute + cycle.network))


def limited(
    limit: Limit, load: Load, serving: int, cards: int, wanted: int, now: Timestamp, window: float
) -> Limit:
    """The limit after a look at the load.

    Above `HIGH` one account fewer than serve now, or where it is far too much as many fewer as are
    too many, but half at most. None more before what waited then is done, and what waited for that:
    it says nothing of how those do that are left. Never fewer than cards: who has a card to itself
    waits for nobody. One more again after `window` seconds in which there was room for it, and no
    limit at all once the last of those `wanted` would be let in.
    """
    least, behind, follow = max(cards, 1), limit.behind & load.tasks, limit.follow
    if follow and not behind:
        behind, follow = load.tasks, False
    if limit.accounts is not None and limit.accounts < least:
        return Limit(least, now)
    settled = not behind and (limit.accounts is None or serving <= limit.accounts)
    if load.share > HIGH and settled and serving > least:
        bearable = max(serving // 2, int(serving / max(load.share, 1.0)))
        fewer = max(least, min(bearable, serving - 1))
        return Limit(fewer, now, behind=load.tasks, follow=True)
    if limit.accounts is None:
        return limit
    if behind:
        return replace(limit, behind=behind, follow=follow, since=now)
    peak, more = max(limit.peak, load.share), limit.accounts + 1
    if now - limit.since < window:
        return replace(limit, behind=behind, follow=follow, peak=peak)
    if serving < limit.accounts or peak * (serving + 1) / max(serving, 1) >= ROOM:
        return Limit(limit.accounts, now, load.share)
    return Limit(more, now) if more < wanted else Limit()


def target(
    cards: Cards,
    gpu_class: GpuClass,
    slots: int,
    limit: int | None,
    stopped: Collection[GpuClass] = (),
    drained: bool = False,
    settled: bool = True,
    most_slots: int = 0,
) -> Target:
    """`stopped` classes and a `drained` operator serve nothing. More than `most_slots` accounts for
    each card are too many, as far as they are more than `slots`."""
    if drained or gpu_class in stopped:
        return NONE
    here = cards.here.get(gpu_class, 0) * slots
    each = max(slots, most_slots)
    kept = max(cards.kept.get(gpu_class, 0) * each, here) if settled else NO_LIMIT
    found = Target(here, kept)
    if limit is None:
        return found
    return replace(found, least=min(here, limit), most=min(kept, limit))
