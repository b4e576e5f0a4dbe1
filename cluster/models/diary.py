"""What happened in a store, a line of JSON each: the operator's record, and what metrics count.

All processes of a machine append to one file; a line is written at once, so they never mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from cluster.models.refs import ModelRef

MOST: Final = 4 * 2**20
"""Bytes, after which the file begins anew; one old one is kept."""
MOST_REASON: Final = 300
MOST_NAME: Final = 300


@dataclass(frozen=True, slots=True)
class Place:
    """In a file, which another may take the name of."""

    inode: int
    offset: int


@dataclass(frozen=True, slots=True)
class Diary:
    """Never in the way: what can't be written down is not a reason to stop."""

    file: Path
    clock: Callable[[], float] = time.time

    def write(self, event: str, model: ModelRef | str, **fields: str | float) -> None:
        """`event`: fetched, evicted, broke, damaged, refused, failed. Of a `model` that isn't even
        an id the text, as far as it is short."""
        said = {k: v[:MOST_REASON] if isinstance(v, str) else v for k, v in fields.items() if v}
        line = json.dumps(
            {"at": round(self.clock(), 3), "event": event, "model": str(model)[:MOST_NAME]} | said
        )
        with contextlib.suppress(OSError):
            if self.file.stat().st_size > MOST:
                self._begin_anew()
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.file, flags, 0o644)
            try:
                os.write(descriptor, line.encode() + b"\n")
            finally:
                os.close(descriptor)

    def _begin_anew(self) -> None:
        """One of those who see that it is time does it."""
        descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.file)):
                self.file.replace(self._old)
        finally:
            os.close(descriptor)

    @property
    def _old(self) -> Path:
        return self.file.with_suffix(".old")

    def end(self) -> Place:
        """Where what is written next will be."""
        try:
            stat = self.file.stat()
            return Place(stat.st_ino, stat.st_size)
        except OSError:
            return Place(0, 0)

    def read_on(self, place: Place) -> Iterator[tuple[dict[str, object], Place]]:
        """Each event from `place` on, with the place after it, also where the diary was begun anew
        since (once)."""
        with contextlib.suppress(OSError), self.file.open("rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            if inode != place.inode:
                yield from self._rest_of_old(place)
                place = Place(inode, 0)
            for entry, after in _events(stream, place.offset):
                yield entry, Place(inode, after)

    def _rest_of_old(self, place: Place) -> Iterator[tuple[dict[str, object], Place]]:
        with contextlib.suppress(OSError), self._old.open("rb") as stream:
            if os.fstat(stream.fileno()).st_ino == place.inode:
                for entry, after in _events(stream, place.offset):
                    yield entry, Place(place.inode, after)

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, object], int]]:
        """Each event from `offset` on, with the offset after it."""
        with contextlib.suppress(OSError), self.file.open("rb") as stream:
            yield from _events(stream, offset)


def _events(stream: BinaryIO, offset: int) -> Iterator[tuple[dict[str, object], int]]:
    stream.seek(offset)
    for line in stream:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        with contextlib.suppress(ValueError):
            yield json.loads(line), offset
