"""New heads by WebSocket, where an endpoint offers them: a wake-up for the watcher and no more.

What a head says is not believed; it only says look now. Losing the connection costs nothing but
the polling that goes on anyway.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import structlog
from pydantic_core import from_json
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

_log = structlog.get_logger(__name__)

MOST = 2**20
"""Bytes of one message."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
SILENT_SECONDS = 120.0
"""Without a message for so long the connection is made anew."""


class Heads:
    """`url` is ws:// or wss://; None: nobody ever wakes."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._new = asyncio.Event()
        self.is_live = False
        """Whether heads are coming now."""

    async def wait(self, seconds: float) -> bool:
        """Until a new head, but no longer than that; whether there was one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._new.wait()
        woken = self._new.is_set()
        self._new.clear()
        return woken

    async def run(self) -> None:
        """Listen for ever, over any number of connections."""
        if self._url is None:
            return
        pause = FIRST_PAUSE
        while True:
            try:
                await self._listen(self._url)
                pause = FIRST_PAUSE
            except (OSError, TimeoutError, ValueError, WebSocketException) as error:
                # Its text may hold the address, and the address a key.
                _log.warning("heads_lost", error=type(error).__name__)
                if isinstance(error, InvalidURI | InvalidHandshake):
                    pause = LONGEST_PAUSE
            finally:
                self.is_live = False
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _listen(self, url: str) -> None:
        async with connect(url, max_size=MOST, open_timeout=10.0) as socket:
            question = {"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe"}
            await socket.send(json.dumps({**question, "params": ["newHeads"]}))
            while True:
                async with asyncio.timeout(SILENT_SECONDS):
                    said = from_json(await socket.recv())
                if isinstance(said, dict) and "error" in said:
                    raise ValueError("the endpoint offers no heads")
                self.is_live = True
                if isinstance(said, dict) and said.get("method") == "eth_subscription":
                    self._new.set()
