"""Who looked at what is somebody's, a prompt or a result: to be told once for each task in a while,
though a result may be six files."""

from __future__ import annotations

from typing import Final

from cluster.core.types import Timestamp

AGAIN_SECONDS: Final = 600.0
MOST_REMEMBERED: Final = 1_000


class Readers:
    def __init__(self) -> None:
        self._told: dict[tuple[str, str, str], Timestamp] = {}

    def is_news(self, who: str, what: str, task: str, now: Timestamp) -> bool:
        """Whether it is to be told; then it counts as told."""
        key = who, what, task
        at = self._told.get(key)
        if at is not None and now - at < AGAIN_SECONDS:
            return False
        self._told.pop(key, None)
        self._told[key] = now
        while len(self._told) > MOST_REMEMBERED:
            del self._told[next(iter(self._told))]
        return True
