"""When a card has failed too often, whatever its canary says.

A canary is small: a card may pass it each time and fail every tenth task. So what fails on a card
is counted. But tasks fail by themselves too, and whoever sends them must not be able to take cards
away. A fault strikes its card only where nothing says that it was the task's:

    a later attempt gave a result        the task was sound: each card that failed on it is struck
    another card showed the same fault   it is the task's, or its model's: neither card is struck
    no attempt gave a result             a fault that ended the card's process strikes it, if no
                                         other attempt failed; any other says nothing
    processes of several cards ended     they share what ended them (storage, power, a driver that
    in one way within a moment           was begun anew): no card is struck

One task strikes a card once, and so does what happens within a moment, which one event may bring
about in several ways. Nothing here reads a clock or does anything.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.core.errors import AttemptLost, ClusterError, DeviceFault, DeviceFaultKind
from cluster.core.record import Fault, TaskRecord
from cluster.core.types import CardUuid, Commitment, GpuId, Timestamp

MOMENT: Final = 60.0
"""Seconds within which faults of a card are one strike."""


class FaultKind(enum.Enum):
    """How a card fails by itself; the names are stored, the values shown."""

    BAD_RESULT = "bad result"
    CONTEXT_LOST = "context lost"
    STALLED = "stalled"
    MEMORY_CHANGED = "weights changed in memory"
    OTHER = "unexplained error"
    DIED = "process died"
    MEMORY_ERRORS = "uncorrected memory errors"
    CANARY = "canary"
    """It can't do what its class can, or contradicted itself with no card to be compared with."""


_OF_DEVICES: Final = {
    DeviceFaultKind.BAD_RESULT: FaultKind.BAD_RESULT,
    DeviceFaultKind.CONTEXT_LOST: FaultKind.CONTEXT_LOST,
    DeviceFaultKind.STALLED: FaultKind.STALLED,
    DeviceFaultKind.MEMORY_CHANGED: FaultKind.MEMORY_CHANGED,
    DeviceFaultKind.OTHER: FaultKind.OTHER,
}
_ENDS_PROCESS: Final = frozenset({FaultKind.CONTEXT_LOST, FaultKind.STALLED, FaultKind.DIED})
_AGAINST_TASK: Final = frozenset(
    {Fault.DEVICE, Fault.MEMORY, Fault.MODEL, Fault.UNSUPPORTED, Fault.LOST}
)


@dataclass(frozen=True, slots=True)
class Limit:
    """So many strikes within so many seconds and the card has struck out; 0 for never."""

    strikes: int = 3
    seconds: float = 86_400.0


@dataclass(frozen=True, slots=True)
class CardFault:
    """`cause` is one of the card's own: an attempt's id where it was at a task. `gpu_id` and
    `incarnation`: where the card was, and which process of it. `counts`: it is a strike, whatever
    may yet be found out."""

    card: CardUuid
    cause: str
    kind: FaultKind
    at: Timestamp
    gpu_id: GpuId
    incarnation: str
    task: Commitment | None = None
    counts: bool = False


class Fate(enum.Enum):
    """What a task's end says of the faults on it."""

    OPEN = "open"
    SOUND = "sound"
    """It had a result."""
    UNTRIED = "untried"
    """It had none, and one attempt failed."""
    DOUBTFUL = "doubtful"
    """It had none, and more speaks against it."""


def kind_of(error: ClusterError) -> FaultKind | None:
    """None for what may be anything's fault but the card's."""
    if isinstance(error, DeviceFault):
        return _OF_DEVICES.get(error.kind)
    return FaultKind.DIED if isinstance(error, AttemptLost) else None


def fate_of(record: TaskRecord | None) -> Fate:
    """None is a record that isn't kept any more."""
    if record is None or record.fault is not None:
        return Fate.DOUBTFUL
    if record.result is not None:
        return Fate.SOUND
    if record.outcome is None:
        return Fate.OPEN
    failed = [attempt for attempt in record.attempts if attempt.fault in _AGAINST_TASK]
    return Fate.UNTRIED if len(failed) == 1 else Fate.DOUBTFUL


def also_showed(fault: CardFault, others: Iterable[CardFault]) -> CardUuid | None:
    """Another card with the same fault at the same task."""
    same = (
        each.card
        for each in others
        if each.task == fault.task and each.kind is fault.kind and each.card != fault.card
    )
    return None if fault.task is None else next(same, None)


def shared(fault: CardFault, lately: Iterable[CardFault]) -> bool:
    """Whether another card's process ended in the same way within a moment."""
    return fault.kind in _ENDS_PROCESS and any(
        each.kind is fault.kind and each.card != fault.card and abs(each.at - fault.at) < MOMENT
        for each in lately
    )


def ripe(fault: CardFault, now: Timestamp) -> bool:
    """Whether what else happened in its moment is known by now."""
    return fault.kind not in _ENDS_PROCESS or now - fault.at >= MOMENT


def struck(faults: Sequence[CardFault], fate: Fate) -> tuple[CardFault, ...]:
    """Which of a task's faults are strikes now that its fate is known: at most one for a card."""
    own = [each for each in faults if also_showed(each, faults) is None]
    if fate is Fate.UNTRIED:
        own = [each for each in own if each.kind in _ENDS_PROCESS]
    elif fate is not Fate.SOUND:
        own = []
    return tuple({each.card: each for each in own}.values())


def out(faults: Iterable[CardFault], limit: Limit, now: Timestamp) -> tuple[CardFault, ...]:
    """The strikes by which one card has struck out; none where it hasn't."""
    found: list[CardFault] = []
    for each in sorted(faults, key=lambda fault: fault.at):
        if not each.counts or now - each.at > limit.seconds:
            continue
        if not found or each.at - found[-1].at >= MOMENT:
            found.append(each)
    return tuple(found) if 0 < limit.strikes <= len(found) else ()


def reason(strikes: Sequence[CardFault], limit: Limit) -> str:
    """Why the card is in quarantine, in words."""
    kinds = ", ".join(dict.fromkeys(each.kind.value for each in strikes))
    hours = round(limit.seconds / 3600, 1)
    return (
        f"it failed {len(strikes)} times within {hours:g} hours ({kinds}), "
        "though it could answer its canary in between"
    )
