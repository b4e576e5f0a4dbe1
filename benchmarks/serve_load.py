"""What watching costs while tasks run: a minute of 25 scrapers and 25 page viewers against none.

A whole operator on a devnet, as `crynux-cluster up` starts it, with tasks that never end. Who
watches is a process of its own (`benchmarks.watchers`). The two states take turns every ten
seconds, so that a slow moment of the machine falls on both, and what one leaves is waited for
before the next begins. The coordinator's own loop says how late it is
(crynux_loop_lag_seconds): it is asked itself, because the API keeps an answer for a moment. How
long it takes to make one anew is measured between the turns (`metrics_ms`); of 256 cards see
`benchmarks.metrics_render`.

    python -m benchmarks.serve_load --json
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import arguments, progress, publish
from benchmarks.watchers import Watchers
from cluster import config, ray_token
from cluster.core.types import GigaBytes, TaskType
from cluster.status import Status
from devnet.application import Application
from devnet.demo import Operator, operator
from devnet.demo_tasks import FEE, parameters
from devnet.models import SD15
from devnet.network import MODELS, Devnet, SimulatedCards
from devnet.tasks import TaskSpec

RUN = Path(".devnet/serve-load")
TURN_SECONDS, TURNS = 10.0, 6
SETTLE_SECONDS = 5.0
"""Between the two states: an answer that was kept for those who watched is gone by then."""
Ask = Callable[[], bytes]
"""The coordinator's metrics, from itself."""
READY_SECONDS = 300.0
WAITING, TASKS = 4, 2000
CARDS = (SimulatedCards("NVIDIA GeForce RTX 4090", GigaBytes(24), 2),)


@dataclass(frozen=True, slots=True)
class Lag:
    """Of the coordinator's loop since it began: how often it was looked at, how late it was."""

    looks: float
    seconds: float

    @classmethod
    async def now(cls, ask: Ask) -> Lag:
        text = (await asyncio.to_thread(ask)).decode()
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            if family.name == "crynux_loop_lag_seconds"
            for sample in family.samples
        }
        name = "crynux_loop_lag_seconds"
        return cls(found[f"{name}_count"], found[f"{name}_sum"])

    def since(self, before: Lag) -> float:
        """Seconds, as a mean."""
        return (self.seconds - before.seconds) / max(self.looks - before.looks, 1.0)


def spec(number: int) -> TaskSpec:
    args = parameters(SD15[0], "a red fox in the snow", number)
    return TaskSpec(
        name=f"watched-{number}",
        type=TaskType.SD,
        parameters=args,
        model_ids=(f"base:{SD15[0]}",),
        min_vram=8,
        fee=FEE,
    )


async def keep_busy(application: Application) -> None:
    """Tasks always wait, for longer than is measured."""
    application.most_waiting = WAITING
    await application.run([spec(number) for number in range(TASKS)])
    raise RuntimeError(f"all {TASKS} tasks have ended")


async def ready(running: Operator, http: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        status: Status | None = await running.status(http)
        if (
            status is not None
            and status.accounts
            and all(each.status in {"available", "busy"} for each in status.accounts)
        ):
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"error: the operator is not ready: see {running.log}")


async def measure(devnet: Devnet, running: Operator) -> dict[str, float]:
    renders: list[float] = []
    without: list[float] = []
    with_: list[float] = []
    async with httpx.AsyncClient(timeout=30) as http:
        await ready(running, http)
    from actors import client  # Ray reads its environment as it is imported

    async with Watchers.of(running.url) as watchers:
        with client.asking(config.load(devnet.config_file)) as call:

            def ask() -> bytes:
                began = time.monotonic()
                text: bytes = call("metrics_text")
                renders.append(time.monotonic() - began)
                return text

            busy = asyncio.create_task(keep_busy(devnet.application()))
            await asyncio.sleep(TURN_SECONDS)
            for turn in range(TURNS):
                for lags, load in ((without, False), (with_, True)):
                    progress(f"turn {turn + 1} of {TURNS}, {'watched' if load else 'alone'}")
                    await asyncio.sleep(SETTLE_SECONDS)
                    before = await Lag.now(ask)
                    async with watchers.watching() if load else contextlib.nullcontext():
                        await asyncio.sleep(TURN_SECONDS)
                    lags.append((await Lag.now(ask)).since(before))
                    if busy.done():  # nothing runs any more
                        busy.result()
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)
    watched = watchers.met
    ordered = sorted(watched.scrapes)
    seconds = TURN_SECONDS * TURNS
    return {
        "ratio_loop_lag": round(statistics.fmean(with_) / statistics.fmean(without), 3),
        "lag_alone_ms": round(1000 * statistics.fmean(without), 3),
        "lag_watched_ms": round(1000 * statistics.fmean(with_), 3),
        "requests_per_second": round(len(watched.scrapes) / seconds, 1),
        "events_per_second": round(watched.events / seconds, 1),
        "scrape_p50_ms": round(1000 * ordered[len(ordered) // 2], 1),
        "scrape_p99_ms": round(1000 * ordered[math.ceil(len(ordered) * 0.99) - 1], 1),
        "metrics_ms": round(1000 * statistics.median(renders), 1),
        "failed": watched.failed,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    ray_token.show()
    RUN.mkdir(parents=True, exist_ok=True)
    progress("starting a devnet and an operator")
    log = RUN / "operator.log"
    with Devnet(RUN, models=MODELS, cards=CARDS) as devnet, operator(devnet, log) as running:
        found = asyncio.run(measure(devnet, running))
    if found["failed"]:
        raise SystemExit(f"error: {found['failed']:.0f} answers failed: {json.dumps(found)}")
    publish("serve_load", found, "cpu", options.json)


if __name__ == "__main__":
    main()
