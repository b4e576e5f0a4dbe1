"""Which card takes which task: 1,000 cards of 8 classes, 10,000 queued tasks over 200 model sets.

Simulated time, the shipped matching (`cluster.core.matching.place`), against the first card that is
free and fits, on the same tasks in the same run. Model sets are asked for by Zipf's law; each card
keeps its last four sets warm and has all of them on disk; a task is missed when it would end after
its deadline.

    python -m benchmarks.matching --json
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.report import Figure, arguments, progress, publish
from cluster.core.matching import Card, Costs, Placement, Want, fits, place
from cluster.core.types import (
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    RayNodeId,
    Requirement,
    Timestamp,
)

CLASSES = tuple(
    GpuClass(f"Card {vram}+docker", GigaBytes(vram)) for vram in (8, 12, 16, 24, 32, 40, 48, 80)
)
CARDS, TASKS, SETS, WARM = 1_000, 10_000, 200, 4
STEP = 1.0
"""Seconds of simulated time between two rounds of placements."""
SEED = 20251125

Matcher = Callable[[Sequence[Want], Sequence[Card], Timestamp], tuple[Placement, ...]]


@dataclass
class Machine:
    gpu_class: GpuClass
    gpu_id: GpuId
    free_at: float = 0.0
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def card(self, now: float, on_disk: frozenset[str]) -> Card:
        warm = frozenset(self.warm)
        busy = self.free_at > now
        state = GpuState.BUSY if busy else GpuState.READY
        node = RayNodeId("bench")
        gpu = Gpu(self.gpu_id, node, self.gpu_class, False, state, warm, frozenset(), on_disk)
        return Card(gpu, Timestamp(self.free_at) if busy else None, warm)

    def take(self, want: Want, now: float, costs: Costs) -> tuple[float, bool]:
        """When it ends, and whether its models were warm."""
        was_warm = want.pipeline in self.warm
        start = costs.warm if was_warm else costs.from_disk
        self.free_at = now + start + want.compute_seconds
        self.warm[want.pipeline] = None
        self.warm.move_to_end(want.pipeline)
        if len(self.warm) > WARM:
            self.warm.popitem(last=False)
        return self.free_at, was_warm


@dataclass(frozen=True, slots=True)
class Result:
    placed: int
    warm: int
    missed: int
    seconds: float


def tasks(chance: random.Random) -> list[Want]:
    weights = [1 / (rank + 1) for rank in range(SETS)]
    sets = chance.choices(range(SETS), weights, k=TASKS)
    return [
        Want(
            Commitment(f"0x{number:064x}"),
            Requirement(GigaBytes(chance.choice((8, 8, 8, 16, 24))), "", GigaBytes(0)),
            f"set {each}",
            f"set {each}",
            Timestamp(chance.uniform(60.0, 240.0)),
            chance.uniform(4.0, 16.0),
            frozenset(),
        )
        for number, each in enumerate(sets)
    ]


def first_fit(
    wants: Sequence[Want], cards: Sequence[Card], now: Timestamp
) -> tuple[Placement, ...]:
    free = [card.gpu for card in cards if card.gpu.state is GpuState.READY]
    placed: list[Placement] = []
    for want in wants:
        if not free:
            break
        for number, gpu in enumerate(free):
            if fits(want.requirement, gpu.gpu_class):
                placed.append(Placement(want.task, gpu.gpu_id))
                del free[number]
                break
    return tuple(placed)


def simulate(match: Matcher, wants: Sequence[Want], name: str) -> Result:
    on_disk = frozenset(f"set {number}" for number in range(SETS))
    machines = [
        Machine(CLASSES[number % len(CLASSES)], GpuId(f"card-{number:04}"))
        for number in range(CARDS)
    ]
    by_id = {each.gpu_id: each for each in machines}
    waiting = {want.task: want for want in wants}
    now, warm, missed, seconds, costs = 0.0, 0, 0, 0.0, Costs()
    while waiting:
        cards = [each.card(now, on_disk) for each in machines]
        began = time.perf_counter()
        found = match(tuple(waiting.values()), cards, Timestamp(now))
        seconds += time.perf_counter() - began
        for placement in found:
            want = waiting.pop(placement.task)
            end, was_warm = by_id[placement.gpu_id].take(want, now, costs)
            warm += was_warm
            missed += want.deadline is not None and end > want.deadline
        now += STEP
    progress(f"{name}: all placed after {now:.0f} s of their time")
    return Result(len(wants), warm, missed, seconds)


def main() -> None:
    asked = arguments(__doc__.splitlines()[0]).parse_args()
    wants = tasks(random.Random(SEED))  # noqa: S311 - a schedule
    ours = simulate(place, wants, "matching")
    first = simulate(first_fit, wants, "first fit")
    figures: dict[str, Figure] = {
        "placements_per_second": round(ours.placed / ours.seconds, 1),
        "warm_share": round(ours.warm / ours.placed, 3),
        "warm_share_first_fit": round(first.warm / first.placed, 3),
        "missed": ours.missed,
        "missed_first_fit": first.missed,
    }
    publish("matching", figures, "cpu", asked.json)


if __name__ == "__main__":
    main()
