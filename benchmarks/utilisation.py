"""How busy the cards are with more accounts than cards: slots of 1, 2, 4 and `auto`, in one run.

A devnet with a block every 2 seconds; an application that always has tasks waiting and validates an
answer 5 seconds after it came; 4 stand-in cards that compute each task for 4 seconds. Measured for
a minute, once the accounts serve (for `auto`, once the slots have come to rest).

    python -m benchmarks.utilisation --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass

from benchmarks.chain_world import Cards, ChainRoom, chain_room, specs
from devnet.models import SD15

CARDS, SECONDS, BLOCK, VALIDATION = 4, 4.0, 2.0, 5.0
MOST_SLOTS = 8
WINDOW = 60.0
WAITING = 32
"""Tasks in the network's queue: some always wait, and no more than it has room for."""
TIMEOUT = 3600
"""Seconds: no task that waits in the network's queue is given up."""
WARM_UP = {"1": 20.0, "2": 20.0, "4": 30.0, "auto": 90.0}


@dataclass(frozen=True, slots=True)
class Measured:
    """`busy`: share of the window that the cards computed; `paid`: tasks an hour."""

    busy: float
    paid: float
    slots: int


def share(cards: Cards, begin: float, end: float) -> float:
    seconds = sum(max(0.0, min(to, end) - max(since, begin)) for since, to in cards.busy)
    return seconds / (CARDS * (end - begin))


def paid(room: ChainRoom) -> int:
    return room.coordinator._status().totals.tasks.get("EndSuccess", 0)


async def serving(room: ChainRoom, count: int) -> None:
    while True:
        status = room.coordinator._status()
        if sum(each.status in {"available", "busy"} for each in status.accounts) >= count:
            return
        await asyncio.sleep(0.2)


async def measure(slots: str) -> Measured:
    print(f"slots_per_gpu {slots} …", file=sys.stderr, flush=True)
    accounts = CARDS * (MOST_SLOTS if slots == "auto" else int(slots))
    fleet = {"slots_per_gpu": slots if slots == "auto" else int(slots), "max_slots": MOST_SLOTS}
    room_of = chain_room(accounts, BLOCK, cards=CARDS, seconds=SECONDS, fleet=fleet)
    async with room_of as room:
        loop = asyncio.get_running_loop()
        await serving(room, CARDS if slots == "auto" else accounts)
        application = room.devnet.application()
        application.validate_after = VALIDATION
        application.most_waiting = WAITING
        seconds = WARM_UP[slots] + WINDOW
        # As many as could be computed, so that some always wait.
        count = int(CARDS * seconds / SECONDS) + accounts
        sending = asyncio.create_task(application.run(specs(count, SD15[0], TIMEOUT)))
        await asyncio.sleep(WARM_UP[slots])
        begin, before = loop.time(), paid(room)
        await asyncio.sleep(WINDOW)
        end, after = loop.time(), paid(room)
        # What is being computed at the end counts up to then.
        await asyncio.sleep(SECONDS + 1)
        (shown,) = room.coordinator._status().fleet.classes
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
    rate = (after - before) * 3600 / (end - begin)
    return Measured(share(room.cards, begin, end), rate, shown.slots)


async def run() -> dict[str, object]:
    found = {slots: await measure(slots) for slots in WARM_UP}
    return {
        "gpu_busy": {slots: round(each.busy, 3) for slots, each in found.items()},
        "tasks_per_hour": {slots: round(each.paid) for slots, each in found.items()},
        "slots_auto": found["auto"].slots,
        "ratio_tasks_auto_to_1": round(found["auto"].paid / max(found["1"].paid, 1.0), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.parse_args()
    print(json.dumps(asyncio.run(run()), indent=2))


if __name__ == "__main__":
    main()
