"""From a block to the action that it wakes: with new blocks announced, and with polling alone.

A coordinator's chain side with 64 accounts on a devnet. Tasks with models which nobody has make the
contracts name some accounts in each block that starts one. What counts is the time from the moment
when such a block could be known (a subscription of the benchmark's own) until the coordinator began
what it does about it: a task that starts has its parameters fetched, at any other account that is
named it looks. Nothing else makes it look here, neither a sweep nor a task in hand, so an event
that wakes nobody shows: it is counted as lost.

    python -m benchmarks.wake_latency --json
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from web3 import HTTPProvider, Web3
from websockets.asyncio.client import connect

from actors import term
from benchmarks.chain_world import ChainRoom, chain_room, specs
from benchmarks.report import arguments, progress, publish
from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.chain.contract import decode_log, events_by_topic
from cluster.chain.rpc import Rpc
from cluster.chain.watcher import Holders, wakeup_of
from cluster.core.types import Address
from devnet.models import SD15

BLOCK_SECONDS = 1.0
LOST_SECONDS = 30.0
"""Without the action for so long the event is lost."""
NEVER = 1e6


@dataclass
class Found:
    """Seconds to the action, and to the look that comes before it; `lost` events had none."""

    actions: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def events(self) -> int:
        return len(self.actions) + self.lost


async def arrivals(url: str, seen: dict[int, float]) -> None:
    """When each block was announced, by the loop's clock; for ever."""
    async with connect(url.replace("http", "ws", 1)) as socket:
        question = {"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe", "params": ["newHeads"]}
        await socket.send(json.dumps(question))
        async for message in socket:
            said = json.loads(message)
            if said.get("method") == "eth_subscription":
                number = int(said["params"]["result"]["number"], 16)
                seen[number] = asyncio.get_running_loop().time()


async def named(room: ChainRoom, first: int) -> dict[tuple[int, Address], bool]:
    """Each block and account that its events name, and whether a task of the account started."""
    deployment = room.devnet.deployment
    rpc = Rpc.http(deployment.rpc_url)
    known = {deployment.task: events_by_topic(TASK_ABI), deployment.node: events_by_topic(NODE_ABI)}
    own = {Address(each.address) for each in room.coordinator._status().accounts}
    holders, found = Holders(), dict[tuple[int, Address], bool]()
    head = (await rpc.head()).number
    for log in await rpc.logs(list(known), first, head):
        decoded = decode_log(log, known[log.address])
        wakeup = None if decoded is None else wakeup_of(*decoded, own, holders)
        if wakeup is not None and wakeup.account is not None:
            key = log.block, wakeup.account
            found[key] = found.get(key, False) or wakeup.reason == "TaskStarted"
    await rpc.close()
    return found


async def latencies(events: int, accounts: int, heads: bool) -> Found:
    found = Found()
    async with chain_room(accounts, BLOCK_SECONDS, heads) as room:
        await room.until_joined()
        seen: dict[int, float] = {}
        url = room.devnet.deployment.rpc_url
        watching = asyncio.create_task(arrivals(url, seen))
        first = Web3(HTTPProvider(url)).eth.block_number + 2
        number = 0
        while found.events < events:
            number += 1
            wave = [
                spec.model_copy(
                    update={
                        "name": f"{number}-{spec.name}",
                        "model_ids": (f"base:bench/{number}-{spec.name}",),
                    }
                )
                for spec in specs(8, SD15[0])
            ]
            await room.send(wave)
            await asyncio.sleep(2 * BLOCK_SECONDS)
            found = _matched(await named(room, first), seen, room)
            progress(f"{'heads' if heads else 'polling'}: {found.events} of {events} events")
        watching.cancel()
    return found


def _matched(
    events: dict[tuple[int, Address], bool], seen: dict[int, float], room: ChainRoom
) -> Found:
    found, now = Found(), asyncio.get_running_loop().time()
    for (block, account), started in events.items():
        arrived = seen.get(block)
        if arrived is None:
            continue  # from before the benchmark listened
        looked = _first(room.looks, account, arrived)
        acted = _first(room.fetches, account, arrived) if started else looked
        if acted is not None and looked is not None and acted <= LOST_SECONDS:
            found.actions.append(acted)
            found.looks.append(looked)
        elif now - arrived > LOST_SECONDS:
            found.lost += 1
    return found


def _first(done: Sequence[tuple[float, str]], account: Address, arrived: float) -> float | None:
    """How long after that it was done first."""
    return next((at - arrived for at, whose in done if whose == account and at >= arrived), None)


def _ms(values: Sequence[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1000, 1)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--accounts", type=int, default=64)
    asked = parser.parse_args()
    # Only what wakes an account makes it look.
    term.SWEEP_SECONDS = term.BUSY_LOOK_SECONDS = NEVER
    found = {
        name: asyncio.run(latencies(asked.events, asked.accounts, heads=name == "heads"))
        for name in ("heads", "polling")
    }
    publish(
        "wake_latency",
        {
            **{
                f"p{percent}_ms_{name}": _ms(each.actions, percent)
                for name, each in found.items()
                for percent in (50, 99)
            },
            **{f"look_p50_ms_{name}": _ms(each.looks, 50) for name, each in found.items()},
            **{f"lost_{name}": each.lost for name, each in found.items()},
            "events": min(each.events for each in found.values()),
            "accounts": asked.accounts,
            "block_seconds": BLOCK_SECONDS,
        },
        "cpu",
        asked.json,
    )


if __name__ == "__main__":
    main()
