"""From a block to the look that it wakes: with new blocks announced, and with polling alone.

A coordinator's chain side with 64 accounts on a devnet. Tasks with models which nobody has make the
contracts name some accounts in each block that starts one. What counts is the time from the moment
when such a block could be known (a subscription of the benchmark's own) until the coordinator began
to look at an account that the block's events name.

    python -m benchmarks.wake_latency --json
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence

from web3 import HTTPProvider, Web3
from websockets.asyncio.client import connect

from benchmarks.chain_world import ChainRoom, chain_room, specs
from benchmarks.report import arguments, progress, publish
from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.chain.contract import decode_log, events_by_topic
from cluster.chain.rpc import Rpc
from cluster.chain.watcher import Holders, wakeup_of
from cluster.core.types import Address
from devnet.models import SD15

BLOCK_SECONDS = 1.0
LATEST_SECONDS = 10.0
"""A look that comes later wasn't woken by the event."""


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


async def named(room: ChainRoom, first: int) -> list[tuple[int, Address]]:
    """Each block, and each account that its events name."""
    deployment = room.devnet.deployment
    rpc = Rpc.http(deployment.rpc_url)
    known = {deployment.task: events_by_topic(TASK_ABI), deployment.node: events_by_topic(NODE_ABI)}
    own = {Address(each.address) for each in room.coordinator._status().accounts}
    holders, found = Holders(), dict[tuple[int, Address], None]()
    head = (await rpc.head()).number
    for log in await rpc.logs(list(known), first, head):
        decoded = decode_log(log, known[log.address])
        wakeup = None if decoded is None else wakeup_of(*decoded, own, holders)
        if wakeup is not None and wakeup.account is not None:
            found[log.block, wakeup.account] = None
    await rpc.close()
    return list(found)


async def latencies(events: int, accounts: int, heads: bool) -> list[float]:
    """Seconds, one for each account that a block named."""
    found: list[float] = []
    async with chain_room(accounts, BLOCK_SECONDS, heads) as room:
        await room.until_joined()
        seen: dict[int, float] = {}
        url = room.devnet.deployment.rpc_url
        watching = asyncio.create_task(arrivals(url, seen))
        first = Web3(HTTPProvider(url)).eth.block_number + 2
        number = 0
        while len(found) < events:
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
            found = _matched(await named(room, first), seen, room.looks)
            progress(f"{'heads' if heads else 'polling'}: {len(found)} of {events} events")
        watching.cancel()
    return found[:events]


def _matched(
    events: Sequence[tuple[int, Address]],
    seen: dict[int, float],
    looks: Sequence[tuple[float, str]],
) -> list[float]:
    found = []
    for block, account in events:
        arrived = seen.get(block)
        if arrived is None:
            continue
        after = (at for at, looked in looks if looked == account and at >= arrived)
        first = next(after, None)
        if first is not None and first - arrived <= LATEST_SECONDS:
            found.append(first - arrived)
    return found


def _ms(values: Sequence[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1000, 1)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--accounts", type=int, default=64)
    asked = parser.parse_args()
    with_heads = asyncio.run(latencies(asked.events, asked.accounts, heads=True))
    polling = asyncio.run(latencies(asked.events, asked.accounts, heads=False))
    publish(
        "wake_latency",
        {
            "p50_ms_heads": _ms(with_heads, 50),
            "p99_ms_heads": _ms(with_heads, 99),
            "p50_ms_polling": _ms(polling, 50),
            "p99_ms_polling": _ms(polling, 99),
            "events": asked.events,
            "accounts": asked.accounts,
            "block_seconds": BLOCK_SECONDS,
        },
        "cpu",
        asked.json,
    )


if __name__ == "__main__":
    main()
