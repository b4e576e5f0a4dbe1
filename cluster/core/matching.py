"""Which GPU a task runs on (design.md, "Matching").

The most urgent task chooses first: least slack, which is what is left until the deadline after the
cheapest start and the computing. It takes the free card that starts it soonest, then the smallest,
so that large cards stay free. When a busy card will be warm for it sooner than a free one could be
made so, it takes nothing now and that busy card is spoken for. What can't be done in time waits
until all that can has chosen, and then gets what nobody wants: an estimate may be wrong, and
silence costs as much as lateness. A task that ran out of memory goes to a larger card, and waits
for one while any that fits is alive.

Cards are shelved by (class, where, key), each shelf in order of id, and taken cards are dropped as
they come to the front. So a task looks at a few shelves per class of card, never at every card.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from cluster.core.types import (
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    Requirement,
    Timestamp,
)


@dataclass(frozen=True, slots=True)
class Want:
    """A task that the lifecycle says Execute for.

    `pipeline` and `base` are the keys of what must be loaded: all of it, and its base model.
    `compute_seconds` is an estimate without the start. `outgrown` are those of `avoid` whose memory
    was too small.
    """

    task: Commitment
    requirement: Requirement
    pipeline: str
    base: str
    deadline: Timestamp | None
    compute_seconds: float
    avoid: frozenset[GpuId]
    outgrown: frozenset[GpuId] = frozenset()


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, when it is expected to be free (None: now), and what will be warm on it then."""

    gpu: Gpu
    free_at: Timestamp | None
    next_warm: frozenset[str]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds until computing can begin, by where the model is."""

    warm: float = 0.0
    from_host: float = 2.0
    from_disk: float = 10.0
    from_network: float = 60.0


@dataclass(frozen=True, slots=True)
class Placement:
    task: Commitment
    gpu_id: GpuId
    start_seconds: float = field(default=0.0, compare=False)
    """Until it computes there, as `Costs` has it."""


def expected_free(due: Timestamp, now: Timestamp) -> Timestamp:
    """When a card is free that was to be at `due`: what is late will be late by as much again. So
    nobody waits for one that is stuck while another is free, however cold."""
    return Timestamp(now + abs(due - now))


def fits(requirement: Requirement, gpu_class: GpuClass) -> bool:
    """Whether the network would give such a task to such a card (protocol.md section 2)."""
    if requirement.required_gpu:
        return gpu_class == GpuClass(requirement.required_gpu, requirement.required_gpu_vram)
    return gpu_class.vram >= requirement.min_vram


class _Where(enum.Enum):
    WARM = "warm"
    HOST = "host memory"
    DISK = "disk"
    ANYWHERE = "anywhere"
    SOON = "warm soon"


@dataclass(frozen=True, slots=True)
class _Start:
    """A way to start a want: on this card, after so many seconds."""

    cost: float
    card: Card
    waits: bool

    @property
    def rank(self) -> tuple[float, int, GpuId]:
        return (self.cost, self.card.gpu.gpu_class.vram, self.card.gpu.gpu_id)


@dataclass(slots=True)
class _Shelves:
    """The cards by where a model is near them. A shelf is in reverse order: the best is last."""

    now: Timestamp
    costs: Costs
    cards: dict[tuple[GpuClass, _Where, str], list[Card]]
    alive: Counter[GpuClass]
    class_of: dict[GpuId, GpuClass]
    vram_of: dict[GpuId, GigaBytes]
    """Of every card that is known, alive or not."""
    free: int
    """Cards that nobody has taken yet; without one, nothing more can be placed."""
    taken: set[GpuId] = field(default_factory=set)
    fitting: dict[Requirement, tuple[GpuClass, ...]] = field(default_factory=dict)

    def classes(self, want: Want) -> tuple[GpuClass, ...]:
        """The classes to choose from: those larger than any card outgrown, or all that fit."""
        requirement = want.requirement
        if requirement not in self.fitting:
            self.fitting[requirement] = tuple(c for c in self.alive if fits(requirement, c))
        fitting = self.fitting[requirement]
        if not want.outgrown:
            return fitting
        too_small = max(self.vram_of.get(gpu_id, 0) for gpu_id in want.outgrown)
        return tuple(c for c in fitting if c.vram > too_small) or fitting

    def avoided(self, want: Want) -> frozenset[GpuId]:
        """The cards that this want must leave alone: none, when nothing else could ever serve."""
        if not want.avoid:
            return want.avoid
        classes = self.classes(want)
        shunned = sum(self.class_of.get(gpu_id) in classes for gpu_id in want.avoid)
        others = sum(self.alive[gpu_class] for gpu_class in classes) - shunned
        return want.avoid if others > 0 else frozenset()

    def first(self, shelf: tuple[GpuClass, _Where, str], avoid: Set[GpuId]) -> Card | None:
        cards = self.cards.get(shelf, [])
        while cards and cards[-1].gpu.gpu_id in self.taken:
            cards.pop()
        for card in reversed(cards):
            if card.gpu.gpu_id not in self.taken and card.gpu.gpu_id not in avoid:
                return card
        return None

    def best_free(self, want: Want) -> _Start | None:
        tiers = (
            (_Where.WARM, want.pipeline, self.costs.warm),
            (_Where.HOST, want.base, self.costs.from_host),
            (_Where.DISK, want.base, self.costs.from_disk),
            (_Where.ANYWHERE, "", self.costs.from_network),
        )
        avoid = self.avoided(want)
        starts = [
            _Start(cost, card, waits=False)
            for gpu_class in self.classes(want)
            for where, key, cost in tiers
            if (card := self.first((gpu_class, where, key), avoid)) is not None
        ]
        return min(starts, key=lambda start: start.rank, default=None)

    def best_wait(self, want: Want) -> _Start | None:
        """The soonest start on a busy card that will be warm."""
        avoid = self.avoided(want)
        starts = [
            _Start(max(card.free_at - self.now, 0.0) + self.costs.warm, card, waits=True)
            for gpu_class in self.classes(want)
            if (card := self.first((gpu_class, _Where.SOON, want.pipeline), avoid)) is not None
            and card.free_at is not None
        ]
        return min(starts, key=lambda start: start.rank, default=None)

    def best(self, want: Want) -> _Start | None:
        return self.better(want, self.best_free(want), self.best_wait(want))

    def better(self, want: Want, free: _Start | None, wait: _Start | None) -> _Start | None:
        """Waiting only when it is in time, and sooner than what is free."""
        if wait is not None and not self.in_time(want, wait):
            wait = None
        if free is None or wait is None:
            return free or wait
        return wait if wait.cost < free.cost else free

    def ranked(self, wants: Sequence[Want]) -> list[tuple[Want, _Start]]:
        """Those that could start at all, the most urgent first, before any of them has taken a
        card. Wants that ask for the same are looked up once."""
        found: dict[tuple[Requirement, str, str], tuple[_Start | None, _Start | None]] = {}
        ways: list[tuple[Want, _Start]] = []
        for want in wants:
            asks = (want.requirement, want.pipeline, want.base)
            starts = None if want.avoid else found.get(asks)
            if starts is None:
                starts = (self.best_free(want), self.best_wait(want))
                if not want.avoid:
                    found[asks] = starts
            if (start := self.better(want, *starts)) is not None:
                ways.append((want, start))
        ways.sort(key=lambda way: (self.slack(*way), way[0].task))
        return ways

    def take(self, start: _Start) -> None:
        self.taken.add(start.card.gpu.gpu_id)
        self.free -= not start.waits

    def in_time(self, want: Want, start: _Start) -> bool:
        return self.slack(want, start) >= 0.0

    def slack(self, want: Want, start: _Start) -> float:
        if want.deadline is None:
            return math.inf
        return want.deadline - self.now - start.cost - want.compute_seconds


def _is_free(card: Card, now: Timestamp) -> bool:
    ready = card.gpu.state is GpuState.READY
    return ready and (card.free_at is None or card.free_at <= now)


def _places(card: Card, now: Timestamp) -> Iterable[tuple[_Where, str]]:
    if _is_free(card, now):
        yield _Where.ANYWHERE, ""
        yield from ((_Where.WARM, key) for key in card.gpu.warm)
        yield from ((_Where.HOST, key) for key in card.gpu.in_host_memory)
        yield from ((_Where.DISK, key) for key in card.gpu.on_disk)
    elif card.free_at is not None:
        yield from ((_Where.SOON, key) for key in card.next_warm)


def _shelve(cards: Sequence[Card], now: Timestamp, costs: Costs) -> _Shelves:
    alive = [card for card in cards if card.gpu.state in {GpuState.READY, GpuState.BUSY}]
    shelves: dict[tuple[GpuClass, _Where, str], list[Card]] = defaultdict(list)
    for card in sorted(alive, key=lambda card: card.gpu.gpu_id, reverse=True):
        for where, key in _places(card, now):
            shelves[card.gpu.gpu_class, where, key].append(card)
    for (_, where, _), shelf in shelves.items():
        if where is _Where.SOON:
            shelf.sort(key=lambda card: (card.free_at or 0.0, card.gpu.gpu_id), reverse=True)
    return _Shelves(
        now,
        costs,
        dict(shelves),
        Counter(card.gpu.gpu_class for card in alive),
        {card.gpu.gpu_id: card.gpu.gpu_class for card in alive},
        {card.gpu.gpu_id: card.gpu.gpu_class.vram for card in cards},
        sum(_is_free(card, now) for card in alive),
    )


def place(
    wants: Sequence[Want], cards: Sequence[Card], now: Timestamp, costs: Costs = Costs()
) -> tuple[Placement, ...]:
    """Who starts where now; a want that is not in the answer waits. Same answer in any order."""
    shelves = _shelve(cards, now, costs)
    placements: list[Placement] = []
    late: list[Want] = []
    for want, _ in shelves.ranked(wants):
        if not shelves.free:
            break
        start = shelves.best(want)
        if start is None:
            continue
        if not shelves.in_time(want, start):
            late.append(want)
            continue
        shelves.take(start)
        if not start.waits:
            placements.append(Placement(want.task, start.card.gpu.gpu_id, start.cost))
    for want in late:
        start = shelves.best_free(want)
        if start is not None:
            shelves.take(start)
            placements.append(Placement(want.task, start.card.gpu.gpu_id, start.cost))
    return tuple(placements)
