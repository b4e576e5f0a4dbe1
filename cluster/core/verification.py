"""A second opinion on a task's result: whose is asked for, from which card, and what it means.

    one score            there was no second card, or no time: it stands as it is
    two that are equal   it stands, and whoever gave another is at fault
    none that are equal  nothing is sent: neither of two cards may be trusted more

Scores are compared to the bit: cards of one class with the same software compute the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from cluster.core.types import CardUuid, Commitment, Gpu, GpuState, Score, Timestamp

MARGIN_SECONDS = 20.0
"""What must be left of a task's time after a second opinion, to store and submit its score."""
MOST_ASKED = 3
"""Cards asked for one result: a second, a third that decides, and one for a card that fails."""
_SALT = b"crynux-cluster: a second opinion"


@dataclass(frozen=True, slots=True)
class Ruling:
    """`score` is what two cards or more computed, `odd` are those that computed another."""

    score: Score
    odd: frozenset[CardUuid]


def sampled(task: Commitment, fraction: float) -> bool:
    """Whether this task is one of the fraction (0 to 1) computed twice; always the same answer."""
    digest = hashlib.sha256(_SALT + task.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def seconds_left(deadline: Timestamp | None, now: Timestamp) -> float | None:
    """How long another card may take; None means as long as it likes."""
    return None if deadline is None else deadline - now - MARGIN_SECONDS


def pick(first: Gpu, idle: Sequence[Gpu], asked: Set[CardUuid]) -> Gpu | None:
    """The idle card to ask next: of the first one's class, with the most in common that is warm."""
    fit = [
        gpu
        for gpu in idle
        if gpu.state is GpuState.READY
        and gpu.gpu_class == first.gpu_class
        and gpu.uuid
        and gpu.uuid not in asked
    ]
    return min(fit, key=lambda gpu: (-len(gpu.warm & first.warm), gpu.gpu_id), default=None)


def rule(scores: Mapping[CardUuid, Score]) -> Ruling | None:
    """What the cards' scores for one task come to; None while no two agree, or as many disagree."""
    votes = Counter(scores.values()).most_common(2)
    if not votes or votes[0][1] < 2 or (len(votes) == 2 and votes[0][1] == votes[1][1]):
        return None
    score = votes[0][0]
    return Ruling(score, frozenset(uuid for uuid, other in scores.items() if other != score))
