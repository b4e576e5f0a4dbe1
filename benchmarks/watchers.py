"""Those who watch an operator, for `benchmarks.serve_load`: scrapers and viewers of its page.

    python -m benchmarks.watchers URL

Each scraper asks for /metrics once a second, at a moment of its own, as Prometheus does it; each
viewer follows /v1/events. Once standard input ends, prints what they met as one JSON object. They
stand for other machines, so they are a process of their own, which takes what the operator leaves
of this one: SCHED_IDLE, and where Linux shares the processors out among sessions (autogroup), where
that alone says nothing between one session and another, a session of the last rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

SCRAPERS, VIEWERS = 25, 25
SCRAPE_SECONDS = 1.0
AUTOGROUP = Path("/proc/self/autogroup")
"""sched(7): the niceness of this process's session as a whole."""


@dataclass
class Watched:
    """What those who watch have met: seconds of each answer, and failures."""

    scrapes: list[float] = field(default_factory=list)
    events: int = 0
    failed: int = 0

    def add(self, other: Watched) -> None:
        self.scrapes += other.scrapes
        self.events += other.events
        self.failed += other.failed

    async def scrape(self, http: aiohttp.ClientSession, url: str, after: float) -> None:
        await asyncio.sleep(after)
        while True:
            began = time.monotonic()
            try:
                async with http.get(f"{url}/metrics") as answer:
                    await answer.read()
                self.failed += not answer.ok
                self.scrapes.append(time.monotonic() - began)
            except (aiohttp.ClientError, TimeoutError):
                self.failed += 1
            await asyncio.sleep(max(0.0, SCRAPE_SECONDS - (time.monotonic() - began)))

    async def view(self, http: aiohttp.ClientSession, url: str) -> None:
        try:
            async with http.get(f"{url}/v1/events") as answer:
                self.failed += not answer.ok
                async for line in answer.content:
                    self.events += line.startswith((b"event: status", b"event: changed"))
                    self.failed += line.startswith(b"event: away")
        except (aiohttp.ClientError, TimeoutError):
            self.failed += 1


@contextlib.asynccontextmanager
async def watching(watched: Watched, url: str) -> AsyncIterator[None]:
    """They watch while this is open; what they met is then added to `watched`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.watchers", url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        out, _ = await process.communicate(b"")
    if process.returncode:
        raise SystemExit(f"error: those who watch ended with {process.returncode}")
    watched.add(Watched(**json.loads(out)))


async def watch(url: str) -> Watched:
    """Until standard input ends."""
    watched = Watched()
    at_once = aiohttp.TCPConnector(limit=0)
    patience = aiohttp.ClientTimeout(sock_read=60)
    async with aiohttp.ClientSession(connector=at_once, timeout=patience) as http:
        moments = [SCRAPE_SECONDS * each / SCRAPERS for each in range(SCRAPERS)]
        tasks = [asyncio.create_task(watched.scrape(http, url, each)) for each in moments]
        tasks += [asyncio.create_task(watched.view(http, url)) for _ in range(VIEWERS)]
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return watched


def main() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # a kernel without it
        AUTOGROUP.write_text("19")
    print(json.dumps(asdict(asyncio.run(watch(sys.argv[1])))))


if __name__ == "__main__":
    main()
