"""How many accounts a class of cards should have: from cards, slots, and what waits; pure.

A target is a range. Fewer accounts than `least` and more are woken; more than `most` and some are
paused; in between nothing is done, so that what comes and goes (a card's process begun anew, a node
that is rolled, an estimate that wavers) moves no account.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from cluster.core.types import GigaBytes, GpuClass, Timestamp

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
    """Cards of each class: `here` now, and `kept` for those that left a short while ago."""

    here: Mapping[GpuClass, int] = field(default_factory=dict)
    kept: Mapping[GpuClass, int] = field(default_factory=dict)
    fewer_since: Mapping[GpuClass, Timestamp] = field(default_factory=dict)


def counted(
    cards: Cards, here: Mapping[GpuClass, int], now: Timestamp, patience: float, settled: bool
) -> Cards:
    """`cards` after a count. What has left is `kept` for `patience` seconds; where `settled` is
    False (the cluster isn't known yet), for good."""
    kept: dict[GpuClass, int] = {}
    since: dict[GpuClass, Timestamp] = {}
    for gpu_class in {*here, *cards.kept}:
        count, before = here.get(gpu_class, 0), cards.kept.get(gpu_class, 0)
        if count >= before:
            kept[gpu_class] = count
            continue
        since[gpu_class] = cards.fewer_since.get(gpu_class, now)
        over = settled and now - since[gpu_class] >= patience
        kept[gpu_class] = count if over else before
        if over:
            del since[gpu_class]
    return Cards(dict(here), {each: n for each, n in kept.items() if n}, since)


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
    network's hands, and once more. One until a few tasks were measured; changed only when the
    measurement is clearly beyond `present`."""
    if cycle.tasks < FEW or cycle.compute <= 0:
        return min(present, most)
    exact = 1 + cycle.network / cycle.compute
    if present - 1.25 < exact <= present + 0.25:
        return min(present, most)
    return max(1, min(math.ceil(exact), most, MOST_SLOTS))


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a class. `slots`: as many were wanted of late."""

    cycle: Cycle = Cycle()
    slots: int = 1


def text(gpu_class: GpuClass, there: Measured) -> str:
    cycle = there.cycle
    return json.dumps(
        {
            "class": [gpu_class.name, gpu_class.vram],
            "cycle": [cycle.compute, cycle.network, cycle.tasks],
            "slots": there.slots,
        }
    )


def parsed(words: str) -> tuple[GpuClass, Measured]:
    """What `text` wrote."""
    said = json.loads(words)
    (name, vram), (compute, network, tasks) = said["class"], said["cycle"]
    cycle = Cycle(compute, network, tasks)
    return GpuClass(name, GigaBytes(vram)), Measured(cycle, said["slots"])


# --- load -----------------------------------------------------------------------------------------

HIGH, LOW = 0.8, 0.4


@dataclass(frozen=True, slots=True)
class Load:
    """Of a class, its accounts' tasks: how far the last of them is on the way to its deadline, by
    the time that it is expected to be computed (0: at once, 1: just in time); `tasks` are open."""

    share: float
    tasks: int


def limit_for(limit: int | None, load: Load, serving: int) -> int | None:
    """How many accounts may serve, by the load; None for no limit.

    Above `HIGH` one fewer than serve now, but never none; below `LOW` one more at a time, until the
    limit is no longer felt.
    """
    if load.share > HIGH and load.tasks:
        return max(1, serving - 1)
    if limit is None or load.share >= LOW:
        return limit
    return None if limit > serving else limit + 1


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
