"""What is being emptied: the whole operator, machines, or cards. Durable: a restart changes
nothing about it, and only the operator ends it.

Draining everything pauses every account, finishes what runs and hands over what waits for its
validation. A drained card or machine gets no new task; its accounts pause where no other card is
there for them. What it computes is finished there, or moved at once if that is asked for.

Names are kept as they were typed, to be shown. What they mean is kept too: the cards' UUIDs,
because Ray gives machines and cards new names whenever it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.ledger import Ledger
from cluster.core.types import GigaBytes, Gpu, GpuClass

_KEY = "drain"


@dataclass(frozen=True, slots=True)
class Drained:
    """A card: by its UUID, or by its name where it has told none."""

    card: str
    gpu_class: GpuClass | None
    """None where an older version wrote it down."""


@dataclass(frozen=True, slots=True)
class Part:
    """Cards that were drained by one name, or a machine."""

    what: Literal["card", "node"]
    name: str
    cards: frozenset[str]
    """Each as it is known in `Drained`."""
    classes: frozenset[GpuClass]

    def covers(self, gpu: Gpu) -> bool:
        is_there = self.what == "node" and gpu.ray_node == self.name
        return is_there or gpu.gpu_id in self.cards or gpu.uuid in self.cards


Named = Mapping[str, frozenset[Drained]]
"""What the operator typed, and the cards that it means."""


class Drains:
    """`revision` changes whenever what is drained does."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        said = json.loads(ledger.journal.cursor(_KEY) or "{}")
        self.everything: bool = said.get("everything", False)
        self.cards: Named = _read(said.get("cards", {}))
        self.nodes: Named = _read(said.get("nodes", {}))
        self.revision = 0
        self._known = self._names()

    def covers(self, gpu: Gpu) -> bool:
        """Whether the card gets no new task."""
        return gpu.ray_node in self.nodes or bool({gpu.gpu_id, gpu.uuid} & self._known)

    def _names(self) -> frozenset[str]:
        return frozenset(each.card for each in self._all())

    def _all(self) -> Iterable[Drained]:
        for named in (self.cards, self.nodes):
            for drained in named.values():
                yield from drained

    def add(
        self,
        everything: bool = False,
        cards: Mapping[str, Iterable[Gpu]] | None = None,
        nodes: Mapping[str, Iterable[Gpu]] | None = None,
    ) -> None:
        """Drain it too; each name with the cards that it means now."""
        self._store(
            self.everything or everything, _with(self.cards, cards), _with(self.nodes, nodes)
        )

    def learn(self, gpus: Iterable[Gpu]) -> None:
        """A drained machine may have cards that hadn't told their UUIDs yet."""
        found: dict[str, list[Gpu]] = {}
        for gpu in gpus:
            if gpu.ray_node in self.nodes and _drained(gpu) not in self.nodes[gpu.ray_node]:
                found.setdefault(gpu.ray_node, []).append(gpu)
        if found:
            self._store(self.everything, self.cards, _with(self.nodes, found))

    def end(self) -> None:
        self._store(False, {}, {})

    def end_card(self, name: str, meant: Iterable[Gpu]) -> bool:
        """End the drain of one card, by what it was called then or is called now; False where
        there is none of its own."""
        left = _without(self.cards, name, meant)
        if left == self.cards:
            return False
        self._store(self.everything, left, self.nodes)
        return True

    def end_node(self, name: str, meant: Iterable[Gpu]) -> bool:
        """As `end_card`, of a machine; cards of it that were drained one by one stay so."""
        left = _without(self.nodes, name, meant)
        if left == self.nodes:
            return False
        self._store(self.everything, self.cards, left)
        return True

    @property
    def any(self) -> bool:
        return self.everything or bool(self.cards or self.nodes)

    @property
    def parts(self) -> Sequence[Part]:
        """What is drained one by one."""
        cards = [_part("card", *each) for each in sorted(self.cards.items())]
        return [*cards, *(_part("node", *each) for each in sorted(self.nodes.items()))]

    def _store(self, everything: bool, cards: Named, nodes: Named) -> None:
        said = {"everything": everything, "cards": _plain(cards), "nodes": _plain(nodes)}
        self._ledger.journal.set_cursor(self._ledger.lease, _KEY, json.dumps(said))
        self.everything, self.cards, self.nodes = everything, cards, nodes
        self._known = self._names()
        self.revision += 1


def _drained(gpu: Gpu) -> Drained:
    return Drained(gpu.uuid or gpu.gpu_id, gpu.gpu_class)


def _part(what: Literal["card", "node"], name: str, drained: frozenset[Drained]) -> Part:
    classes = frozenset(each.gpu_class for each in drained if each.gpu_class is not None)
    return Part(what, name, frozenset(each.card for each in drained), classes)


def _with(before: Named, new: Mapping[str, Iterable[Gpu]] | None) -> Named:
    added = {name: frozenset(map(_drained, gpus)) for name, gpus in (new or {}).items()}
    return {
        name: before.get(name, frozenset()) | added.get(name, frozenset())
        for name in {*before, *added}
    }


def _without(before: Named, name: str, meant: Iterable[Gpu]) -> Named:
    """Ray may have given the machine another name since, so its cards tell too."""
    back = {each for gpu in meant for each in (gpu.gpu_id, gpu.uuid) if each}
    left = {
        key: frozenset(each for each in drained if each.card not in back)
        for key, drained in before.items()
        if key != name
    }
    return {key: drained for key, drained in left.items() if drained or not before[key]}


def _plain(named: Named) -> dict[str, list[list[object]]]:
    return {
        name: sorted(
            [each.card, *(("", 0) if (c := each.gpu_class) is None else (c.name, c.vram))]
            for each in drained
        )
        for name, drained in sorted(named.items())
    }


def _read(said: Mapping[str, list[tuple[str, str, int]]] | list[str]) -> Named:
    """What `_plain` made; an older version wrote names only."""
    if isinstance(said, list):
        return {name: frozenset({Drained(name, None)}) for name in said}
    return {
        name: frozenset(
            Drained(card, GpuClass(gpu, GigaBytes(vram)) if gpu else None)
            for card, gpu, vram in drained
        )
        for name, drained in said.items()
    }
