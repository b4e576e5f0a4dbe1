"""How a download gets on: counted, and written down for those who watch."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Final

import structlog

from cluster.models.disk import Progress
from cluster.models.sources import Listing, SourceDown
from cluster.models.waiting import Watch

TELL_SECONDS: Final = 0.5
LOG_SECONDS: Final = 15.0
SLOW_SECONDS: Final = 60.0
LEAST_RATE: Final = 4 * 2**10
"""Bytes a second. A source that gives less for a minute isn't waited for: another may be there."""

_log = structlog.get_logger("models")


class Teller:
    """Of one listing. Several threads count at a time."""

    def __init__(self, watch: Watch, listing: Listing) -> None:
        self._watch = watch
        now = watch.clock()
        self._progress = Progress(
            watch.ref, listing.source, 0, listing.size, 0.0, now, watch.wanted.background
        )
        self.fresh = 0
        self._told_at = 0.0
        self._begin_window(now)
        self._logged_at = now
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Bytes that are on the disk."""
        return self._progress.done

    def tell(self) -> None:
        self._watch.disk.tell(self._progress.ref.key, self._progress)

    def end(self) -> None:
        self._watch.disk.tell(self._progress.ref.key, None)

    def arrived(self, size: int) -> int:
        """So many bytes came over the wire; how many did in all. Raises `SourceDown` where hardly
        any come."""
        with self._lock:
            self.fresh += size
            now = self._watch.clock()
            if (elapsed := now - self._window_at) >= SLOW_SECONDS:
                rate = (self.fresh - self._window_from) / elapsed
                if rate < LEAST_RATE:
                    raise SourceDown(f"{self._watch.ref}: {round(rate)} bytes a second")
                self._begin_window(now)
            return self.fresh

    def waited(self, seconds: float) -> None:
        """Of our own choice: no source is slow for that."""
        with self._lock:
            self._watch.waited += seconds
            self._begin_window(self._watch.clock())

    def _begin_window(self, now: float) -> None:
        self._window_at, self._window_from = now, self.fresh

    def gain(self, size: int) -> None:
        """So many bytes more are on the disk, or less when some are given up."""
        with self._lock:
            self._progress = replace(self._progress, done=max(self._progress.done + size, 0))
            self._watch.most = max(self._watch.most, self._progress.done)
            now = self._watch.clock()
            if now - self._told_at < TELL_SECONDS:
                return
            self._told_at = now
            rate = self.fresh / max(now - self._progress.started_at, 0.001)
            self._progress = replace(self._progress, rate=rate)
            self.tell()
            if now - self._logged_at >= LOG_SECONDS:
                self._logged_at = now
                self._log()
        self._watch.wanted.alive()

    def _log(self) -> None:
        told = self._progress
        _log.info(
            "model_arriving",
            model=str(told.ref),
            source=told.source,
            done_bytes=told.done,
            total_bytes=told.total,
            bytes_per_second=round(told.rate),
            seconds_left=None if told.seconds_left is None else round(told.seconds_left),
        )
