"""What the chain room asks of an RPC endpoint: calls a second by number of accounts and traffic.

A coordinator's chain side (`benchmarks.chain_world`) on a devnet with blocks every two seconds:
idle with 1, 16 and 64 accounts, then with a task a second; and idle with 64 while other people's
transactions fill the blocks. Calls are counted where they leave, by method.

    python -m benchmarks.rpc_load --json
"""

from __future__ import annotations

import asyncio
from collections import Counter

from benchmarks.chain_world import chain_room, foreign_traffic, specs
from benchmarks.report import Figure, arguments, progress, publish
from devnet.models import SD15

BLOCK_SECONDS = 2.0


async def measured(
    accounts: int, seconds: float, tasks: bool, foreign: int
) -> tuple[float, Counter[str]]:
    """Calls a second, and by method."""
    async with chain_room(accounts, BLOCK_SECONDS) as room:
        await room.until_joined()
        await asyncio.sleep(15 * BLOCK_SECONDS)  # until the joins are final
        strangers: asyncio.Task[None] | None = None
        if foreign:
            url = room.devnet.deployment.rpc_url
            strangers = asyncio.create_task(foreign_traffic(url, foreign, BLOCK_SECONDS))
        before, began = Counter(room.calls), asyncio.get_running_loop().time()
        if tasks:
            await room.send(specs(min(int(seconds), accounts * 4), SD15[0]))
        took = asyncio.get_running_loop().time() - began
        await asyncio.sleep(max(seconds - took, 0.0))
        took = asyncio.get_running_loop().time() - began
        found = room.calls - before
        if strangers is not None:
            strangers.cancel()
    return sum(found.values()) / took, Counter({m: n for m, n in found.items() if n})


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="that each case is watched")
    asked = parser.parse_args()
    figures: dict[str, Figure] = {}
    for tasks in (False, True):
        for accounts in (1, 16, 64):
            rate, methods = asyncio.run(measured(accounts, asked.seconds, tasks, 0))
            name = "calls_per_second_busy" if tasks else "calls_per_second"
            figures[f"{name}_{accounts}"] = round(rate, 3)
            progress(f"{accounts} accounts, {'a task a second' if tasks else 'idle'}: {rate:.2f}/s")
            if accounts == 64 and not tasks:
                for method, count in sorted(methods.items()):
                    figures[f"idle_64_{method}"] = round(count / asked.seconds, 3)
    for foreign in (5, 50):
        rate, _ = asyncio.run(measured(64, asked.seconds, False, foreign))
        figures[f"calls_per_second_64_foreign_{foreign}"] = round(rate, 3)
        progress(f"64 accounts, idle, {foreign} foreign transactions a block: {rate:.2f}/s")
    idle = {n: float(figures[f"calls_per_second_{n}"] or 0) for n in (1, 64)}
    figures["ratio_64_to_1"] = round(idle[64] / idle[1], 4)
    for foreign in (5, 50):
        loaded = float(figures[f"calls_per_second_64_foreign_{foreign}"] or 0)
        figures[f"ratio_foreign_{foreign}"] = round(loaded / idle[64], 4)
    publish("rpc_load", figures, "cpu", asked.json)


if __name__ == "__main__":
    main()
