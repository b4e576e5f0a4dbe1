"""The status as a stream of server-sent events: whole at first, then what has changed of it.

    event: status     everything; the first one
    event: changed    some of its fields, each whole; the others are as they were
    event: away       why the coordinator can't be asked, as text; the stream goes on

In a cluster of hundreds of cards something always changes: a field whose text is long is sent
again only after a while.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from cluster.api.contents import Packer, Seen, joined
from cluster.api.shared import Shared
from cluster.api.source import SourceAway

EVENT_SECONDS: Final = 2.0
LONG: Final = 16_384
"""Characters; a field that is longer is sent at most once in `LONG_SECONDS`."""
LONG_SECONDS: Final = 10.0


class Changes:
    """What one viewer was sent, and so what is new to him."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[float, str]] = {}

    def since(self, fields: Mapping[str, str], now: float) -> Mapping[str, str]:
        """Which fields are to be sent; they count as sent."""
        due = {name: text for name, text in fields.items() if self._due(name, text, now)}
        self._sent |= {name: (now, text) for name, text in due.items()}
        return due

    def _due(self, name: str, text: str, now: float) -> bool:
        if name not in self._sent:
            return True
        at, before = self._sent[name]
        return text != before and (len(text) <= LONG or now - at >= LONG_SECONDS)


async def events(
    status_now: Shared[Seen], clock: Callable[[], float], count: int | None, seconds: float
) -> AsyncIterator[bytes]:
    """Ends after `count` events, where that is set, and after `seconds`."""
    changes, sent, first, end = Changes(), 0, True, clock() + seconds
    while True:
        try:
            fields = changes.since((await status_now.get()).fields, clock())
        except SourceAway as error:
            yield _event("away", json.dumps(error.words))
        else:
            yield _event("status" if first else "changed", joined(fields))
            first = False
        sent += 1
        if sent == count or clock() >= end:
            return
        await asyncio.sleep(EVENT_SECONDS)


async def packed(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    packer = Packer()
    async for each in stream:
        yield packer.add(each)
    yield packer.end()


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()
