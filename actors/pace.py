"""How long tasks take on the cards, for each set of models, as measured of late.

Kept over restarts, so that one that has just begun neither pauses accounts nor gives tasks up for
what it doesn't know.
"""

from __future__ import annotations

import json
from typing import Final

from actors.ledger import Ledger
from cluster.core.types import Work

FIRST: Final = {"sd": 1e-7, "llm": 0.02}
"""Compute seconds for a pixel-step and for a token, until some were measured."""
WEIGHT: Final = 0.3
MOST: Final = 256
"""Sets of models that are remembered; beyond them, the one that was measured longest ago goes."""
FEW: Final = 5
WRITE_EVERY: Final = 10
"""Measurements between two writes, after the first few."""
_OF_ALL: Final = ""
_STORED: Final = "pace"


class Pace:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._measured = 0
        stored = json.loads(ledger.journal.cursor(_STORED) or "[]")
        self._seconds: dict[tuple[str, str], float] = {
            (kind, pipeline): float(seconds) for kind, pipeline, seconds in stored
        }
        """For a unit of work, by its kind and the models; what was measured last comes last."""

    def seconds_for(self, work: Work, pipeline: str = _OF_ALL) -> float:
        """As long as so much work takes with a set of models; before they were measured, as the
        kind's others took."""
        return work.amount * self._of(work.kind, pipeline)

    def learn(self, work: Work, pipeline: str, seconds: float) -> None:
        """So long it took."""
        if work.amount <= 0:
            return
        for name in (pipeline, _OF_ALL):
            before = self._of(work.kind, name)
            self._seconds.pop((work.kind, name), None)
            self._seconds[work.kind, name] = before + WEIGHT * (seconds / work.amount - before)
        while len(self._seconds) > MOST:
            del self._seconds[next(iter(self._seconds))]
        self._measured += 1
        if self._measured <= FEW or self._measured % WRITE_EVERY == 0:
            rows = [[*key, each] for key, each in self._seconds.items()]
            self._ledger.journal.set_cursor(self._ledger.lease, _STORED, json.dumps(rows))

    def _of(self, kind: str, pipeline: str) -> float:
        of_all = self._seconds.get((kind, _OF_ALL), FIRST[kind])
        return self._seconds.get((kind, pipeline), of_all)
