"""How late the coordinator's loop is: what is due waits so long for its turn, an RPC answer too."""

from __future__ import annotations

import asyncio

from cluster.metrics import Metrics

LOOK_SECONDS = 0.05


async def watch(metrics: Metrics) -> None:
    """Until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LOOK_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        metrics.lagged(max(loop.time() - due, 0.0))
