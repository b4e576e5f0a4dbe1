"""Which card should read a waiting task's models into host memory while it computes.

A hint, worked out anew from the same snapshot as the placements: the most urgent waiting task whose
models are near no card that fits it goes with the fitting card that is free soonest. A card gets
one hint; a task whose models are near some card gets none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.core.matching import Card, Placement, Want, fits
from cluster.core.types import Gpu, GpuId, GpuState, Timestamp

_ALIVE = frozenset({GpuState.READY, GpuState.BUSY})


def hints(wants: Sequence[Want], cards: Sequence[Card], now: Timestamp) -> tuple[Placement, ...]:
    """For wants that found no card now: (task, card that should read ahead for it)."""
    taken: set[GpuId] = set()
    found: list[Placement] = []
    for want in sorted(wants, key=lambda want: (want.deadline or math.inf, want.task)):
        fitting = [card for card in cards if _serves(card, want)]
        if any(_is_near(card.gpu, want) or want.pipeline in card.next_warm for card in fitting):
            continue
        free = [card for card in fitting if card.gpu.gpu_id not in taken]
        card = min(free, key=lambda card: (card.free_at or now, card.gpu.gpu_id), default=None)
        if card is not None:
            taken.add(card.gpu.gpu_id)
            found.append(Placement(want.task, card.gpu.gpu_id))
    return tuple(found)


def _serves(card: Card, want: Want) -> bool:
    gpu = card.gpu
    return (
        gpu.state in _ALIVE
        and gpu.gpu_id not in want.avoid
        and fits(want.requirement, gpu.gpu_class)
    )


def _is_near(gpu: Gpu, want: Want) -> bool:
    return want.pipeline in gpu.warm or want.base in gpu.in_host_memory
