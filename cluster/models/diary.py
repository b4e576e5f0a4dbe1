"""What happened in a store, a line of JSON each: the operator's record, and what metrics count.

All processes of a machine append to one file; a line is written at once, so they never mix.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.models.refs import ModelRef

MOST: Final = 4 * 2**20
"""Bytes, after which the file begins anew; one old one is kept."""
MOST_REASON: Final = 300
MOST_NAME: Final = 300


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
                self.file.replace(self.file.with_suffix(".old"))
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.file, flags, 0o644)
            try:
                os.write(descriptor, line.encode() + b"\n")
            finally:
                os.close(descriptor)

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, object], int]]:
        """Each event from `offset` on, with the offset after it."""
        with contextlib.suppress(OSError), self.file.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line), offset
