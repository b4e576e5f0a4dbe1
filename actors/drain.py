"""What is being emptied: the whole operator, machines, or cards. Durable: a restart changes
nothing about it, and only the operator ends it.

Draining everything pauses every account, finishes what runs and hands over what waits for its
validation. A drained card or machine gets no new task; its accounts pause where no other card is
there for them. What it computes is finished there, or moved at once if that is asked for.
"""

from __future__ import annotations

import json

from actors.ledger import Ledger
from cluster.core.types import CardUuid, Gpu, GpuId, RayNodeId

_KEY = "drain"


class Drains:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        said = json.loads(ledger.journal.cursor(_KEY) or "{}")
        self.everything: bool = said.get("everything", False)
        self.cards: frozenset[str] = frozenset(said.get("cards", ()))
        self.nodes: frozenset[str] = frozenset(said.get("nodes", ()))

    def covers(self, gpu: Gpu) -> bool:
        """Whether the card gets no new task."""
        return bool({gpu.gpu_id, gpu.uuid} & self.cards) or gpu.ray_node in self.nodes

    def add(
        self,
        everything: bool = False,
        cards: frozenset[GpuId | CardUuid] = frozenset(),
        nodes: frozenset[RayNodeId] = frozenset(),
    ) -> None:
        self._store(self.everything or everything, self.cards | cards, self.nodes | nodes)

    def end(self) -> None:
        self._store(False, frozenset(), frozenset())

    @property
    def any(self) -> bool:
        return self.everything or bool(self.cards or self.nodes)

    def _store(self, everything: bool, cards: frozenset[str], nodes: frozenset[str]) -> None:
        said = {"everything": everything, "cards": sorted(cards), "nodes": sorted(nodes)}
        self._ledger.journal.set_cursor(self._ledger.lease, _KEY, json.dumps(said))
        self.everything, self.cards, self.nodes = everything, cards, nodes
