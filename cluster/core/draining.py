"""What a card that is taken out on purpose means: pure.

It counts no more at once, unlike one that only left, and as many accounts pause as it had. What is
computed on it is moved only to a card that will have it done in time: anywhere else it would have
ended well where it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from cluster.core.matching import Card, Costs, Want, fits
from cluster.core.types import Commitment, GpuState, Timestamp

_USABLE = frozenset({GpuState.READY, GpuState.BUSY})
_COSTS = Costs()


def still_serving(
    before: int | None, serving: int, drained: int, kept: int, slots: int | None
) -> int:
    """How many accounts of a class may go on serving when `drained` of its cards were taken out
    and `kept` are left; `before` is what this said the last time.

    It is needed where it isn't known which cards will come, or (`slots` None) how many accounts a
    card is to have: then each takes its share of those that serve.
    """
    each = math.ceil(serving / max(1, kept + drained)) if slots is None else slots
    least = kept * (1 if slots is None else slots)
    rest = (serving if before is None else min(before, serving)) - drained * each
    return max(rest, least)


def movable(
    moving: Collection[Want],
    waiting: Collection[Want],
    cards: Sequence[Card],
    now: Timestamp,
    costs: Costs = _COSTS,
) -> frozenset[Commitment]:
    """Those of `moving` that would be done in time if they were begun anew on these cards, behind
    what waits for a card already."""
    free_at = {card.gpu.gpu_id: max(card.free_at or now, now) for card in cards}
    usable = [card for card in cards if card.gpu.state in _USABLE]
    asked = {want.task for want in moving}
    found: set[Commitment] = set()
    for want in sorted((*waiting, *moving), key=lambda each: (each.task in asked, _urgency(each))):
        ends = {
            free_at[card.gpu.gpu_id] + _start(want, card, costs) + want.compute_seconds: card
            for card in usable
            if fits(want.requirement, card.gpu.gpu_class) and card.gpu.gpu_id not in want.avoid
        }
        if not ends:
            continue
        end = min(ends)
        if want.task in asked:
            if want.deadline is not None and end > want.deadline:
                continue
            found.add(want.task)
        free_at[ends[end].gpu.gpu_id] = Timestamp(end)
    return frozenset(found)


def _urgency(want: Want) -> tuple[float, Commitment]:
    return (math.inf if want.deadline is None else want.deadline, want.task)


def _start(want: Want, card: Card, costs: Costs) -> float:
    gpu = card.gpu
    if want.pipeline in card.next_warm:
        return costs.warm
    if want.base in gpu.in_host_memory:
        return costs.from_host
    return costs.from_disk if want.base in gpu.on_disk else costs.from_network
