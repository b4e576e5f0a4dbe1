"""Those who watch an operator, for `benchmarks.serve_load`: scrapers and viewers of its page.

    python -m benchmarks.watchers URL

Each scraper asks for /metrics once a second, at a moment of its own, as Prometheus does it; each
viewer follows /v1/events. They watch from a line on standard input until the next one, and then
print what they met as one JSON object. They stand for other machines, so they are a process of
their own, which is there before anything is measured, and takes what the operator leaves of this
one: in a session of its own, because Linux may share the processors out among sessions (autogroup),
where a process's own rank says nothing.
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
from typing import cast

import aiohttp

SCRAPERS, VIEWERS = 25, 25
SCRAPE_SECONDS = 1.0
MOST_SAID = 1 << 20
NICENESS = 5
"""That of those who look on in the operator: how long an answer takes is measured here."""
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

    async def scrape(
        self, http: aiohttp.ClientSession, url: str, after: float, over: asyncio.Event
    ) -> None:
        """Whatever was asked is waited for: the slowest answers count too."""
        await asyncio.sleep(after)
        while not over.is_set():
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


class Watchers:
    """That process, as its parent has it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        # Pipes, as it was begun.
        self._to = cast(asyncio.StreamWriter, process.stdin)
        self._from = cast(asyncio.StreamReader, process.stdout)
        self.met = Watched()

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, url: str) -> AsyncIterator[Watchers]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.watchers", url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MOST_SAID,
            start_new_session=True,
        )
        try:
            yield cls(process)
        finally:
            await process.communicate(b"")  # which closes what it reads

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """They watch while this is open; what they met is then added to `met`."""
        self._to.write(b"\n")
        try:
            yield
        finally:
            self._to.write(b"\n")
            said = await self._from.readline()
        if not said:
            raise SystemExit(f"error: those who watch ended with {await self._process.wait()}")
        self.met.add(Watched(**json.loads(said)))


async def watch(url: str) -> Watched:
    """Until the next line of standard input, or its end."""
    watched = Watched()
    at_once = aiohttp.TCPConnector(limit=0)
    patience = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(connector=at_once, timeout=patience) as http:
        moments = [SCRAPE_SECONDS * each / SCRAPERS for each in range(SCRAPERS)]
        over = asyncio.Event()
        scrapers = [asyncio.create_task(watched.scrape(http, url, each, over)) for each in moments]
        viewers = [asyncio.create_task(watched.view(http, url)) for _ in range(VIEWERS)]
        await asyncio.to_thread(sys.stdin.readline)
        over.set()
        for viewer in viewers:
            viewer.cancel()
        ended = await asyncio.gather(*viewers, return_exceptions=True)
        await asyncio.gather(*scrapers)
    # One of them that ended before it was told to.
    watched.failed += sum(not isinstance(each, asyncio.CancelledError) for each in ended)
    return watched


def main() -> None:
    with contextlib.suppress(OSError):  # a kernel without it
        AUTOGROUP.write_text(str(NICENESS))
    os.nice(NICENESS)
    while sys.stdin.readline():
        print(json.dumps(asdict(asyncio.run(watch(sys.argv[1])))), flush=True)


if __name__ == "__main__":
    main()
