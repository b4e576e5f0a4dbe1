"""What the chain room asks of an RPC endpoint: calls a second by number of accounts and traffic.

A coordinator's chain side (`benchmarks.chain_world`) on a devnet with blocks every two seconds:
idle with 1, 16 and 64 accounts, then with a task a second; and idle with 64 while other people's
transactions fill the blocks, each with an event of the contracts that the watcher reads. Calls are
counted where they leave, by method; the loop's thread and its lateness are measured beside them.

    python -m benchmarks.rpc_load --json
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.chain_world import Burden, ChainRoom, burden, chain_room, foreign_traffic, specs
from benchmarks.report import Figure, arguments, progress, publish
from cluster.chain.rpc import Rpc
from devnet.models import SD15

BLOCK_SECONDS = 2.0
SETTLE_BLOCKS = 15
"""Until the joins are final."""


@dataclass(frozen=True)
class Case:
    rate: float
    """Calls a second."""
    methods: Counter[str]
    burden: Burden
    logs: float
    """Events of the contracts in a block."""


@contextlib.asynccontextmanager
async def strangers(room: ChainRoom, foreign: int) -> AsyncIterator[None]:
    if not foreign:
        yield
        return
    traffic = foreign_traffic(room.devnet.deployment, foreign, BLOCK_SECONDS)
    sending = asyncio.create_task(traffic)
    await asyncio.sleep(2 * BLOCK_SECONDS)
    try:
        yield
        if sending.done():
            sending.result()
    finally:
        sending.cancel()


async def measured(accounts: int, seconds: float, tasks: bool, foreign: int, settle: float) -> Case:
    async with chain_room(accounts, BLOCK_SECONDS) as room:
        await room.until_joined()
        await asyncio.sleep(settle)
        rpc = Rpc.http(room.devnet.deployment.rpc_url)
        async with strangers(room, foreign), burden() as found:
            before, first = Counter(room.calls), (await rpc.head()).number
            loop = asyncio.get_running_loop()
            began = loop.time()
            if tasks:
                await room.send(specs(min(int(seconds), accounts * 4), SD15[0]))
            await asyncio.sleep(max(began + seconds - loop.time(), 0.0))
            calls, last = room.calls - before, (await rpc.head()).number
        deployment = room.devnet.deployment
        logs = await rpc.logs([deployment.task, deployment.node], first + 1, last)
        await rpc.close()
    rate = sum(calls.values()) / found.seconds
    methods = Counter({method: count for method, count in calls.items() if count})
    return Case(rate, methods, found, len(logs) / max(last - first, 1))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="that each case is watched")
    parser.add_argument("--settle", type=float, default=SETTLE_BLOCKS * BLOCK_SECONDS)
    asked = parser.parse_args()

    def case(accounts: int, tasks: bool, foreign: int) -> Case:
        return asyncio.run(measured(accounts, asked.seconds, tasks, foreign, asked.settle))

    figures: dict[str, Figure] = {}
    idle: dict[int, Case] = {}
    for tasks in (False, True):
        for accounts in (1, 16, 64):
            found = case(accounts, tasks, 0)
            name = "calls_per_second_busy" if tasks else "calls_per_second"
            figures[f"{name}_{accounts}"] = round(found.rate, 3)
            what = "a task a second" if tasks else "idle"
            progress(f"{accounts} accounts, {what}: {found.rate:.2f}/s")
            if not tasks:
                idle[accounts] = found
            kind = f"{'busy' if tasks else 'idle'}_{accounts}"
            for method, count in sorted(found.methods.items()):
                figures[f"{kind}_{method}"] = round(count / found.burden.seconds, 3)
    figures["ratio_64_to_1"] = round(idle[64].rate / idle[1].rate, 4)
    for foreign in (0, 5, 50):
        found = case(64, False, foreign) if foreign else idle[64]
        if foreign:
            figures[f"calls_per_second_64_foreign_{foreign}"] = round(found.rate, 3)
            figures[f"ratio_foreign_{foreign}"] = round(found.rate / idle[64].rate, 4)
        figures[f"foreign_{foreign}_events_per_block"] = round(found.logs, 2)
        figures[f"foreign_{foreign}_cpu_percent"] = round(
            100 * found.burden.cpu / found.burden.seconds, 2
        )
        figures[f"foreign_{foreign}_loop_late_p99_ms"] = round(found.burden.worst_late * 1000, 1)
        progress(f"64 accounts, idle, {found.logs:.1f} events a block: {found.rate:.2f}/s")
    publish("rpc_load", figures, "cpu", asked.json)


if __name__ == "__main__":
    main()
