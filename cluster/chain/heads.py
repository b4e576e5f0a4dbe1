"""New heads by WebSocket, where endpoints offer them: a wake-up for the watcher and no more.

What a head says is not believed; it only says look now. Losing a connection costs nothing but the
polling that goes on as soon as no head has come for a while, whatever the connection says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog
from pydantic_core import from_json
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

_log = structlog.get_logger(__name__)

MOST = 2**20
"""Bytes of one message."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
SILENT_SECONDS = 120.0
"""Without a message for so long a connection is made anew."""


class Heads:
    """`urls` are ws:// or wss://; without any nobody ever wakes."""

    def __init__(
        self, urls: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._urls = tuple(urls)
        self._clock = clock
        self._new = asyncio.Event()
        self._listening = 0
        self._heard_at: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether heads are promised now."""
        return self._listening > 0

    def heard_within(self, seconds: float) -> bool:
        """Whether one came so lately."""
        return self._heard_at is not None and self._clock() - self._heard_at <= seconds

    async def wait(self, seconds: float) -> bool:
        """Until a new head, but no longer than that; whether there was one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._new.wait()
        woken = self._new.is_set()
        self._new.clear()
        return woken

    async def run(self) -> None:
        """Listen for ever, to each over any number of connections."""
        async with asyncio.TaskGroup() as group:
            for url in self._urls:
                group.create_task(self._run(url))

    async def _run(self, url: str) -> None:
        pause = FIRST_PAUSE
        while True:
            before = self._heard_at
            try:
                await self._listen(url)
            except (OSError, TimeoutError, ValueError, WebSocketException) as error:
                # Its text may hold the address, and the address a key.
                _log.warning("heads_lost", error=type(error).__name__)
                if self._heard_at != before:
                    pause = FIRST_PAUSE
                if isinstance(error, InvalidURI | InvalidHandshake):
                    pause = LONGEST_PAUSE
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _listen(self, url: str) -> None:
        async with connect(url, max_size=MOST, open_timeout=10.0) as socket:
            question = {"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe"}
            await socket.send(json.dumps({**question, "params": ["newHeads"]}))
            await self._hear(socket)
            self._listening += 1
            try:
                while True:
                    await self._hear(socket)
            finally:
                self._listening -= 1

    async def _hear(self, socket: ClientConnection) -> None:
        async with asyncio.timeout(SILENT_SECONDS):
            said = from_json(await socket.recv())
        if isinstance(said, dict) and "error" in said:
            raise ValueError("the endpoint offers no heads")
        if isinstance(said, dict) and said.get("method") == "eth_subscription":
            self._heard_at = self._clock()
            self._new.set()
