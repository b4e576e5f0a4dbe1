"""One bandwidth for all downloads of a machine, whichever processes make them.

A bucket of bytes in a small file, under a lock: it fills at the rate and holds a second's worth.
Who takes more than there is owes it, and waits for as long as that takes to fill.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

_FORM: Final = struct.Struct("<dd")


@dataclass(frozen=True, slots=True)
class Throttle:
    """`rate` in bytes a second, None for no limit. The clock is one for the whole machine."""

    file: Path
    rate: float | None
    clock: Callable[[], float] = monotonic

    def take(self, size: int) -> float:
        """Take so many bytes; how many seconds to wait for them."""
        if self.rate is None:
            return 0.0
        file = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            raw = os.pread(file, _FORM.size, 0)
            now = self.clock()
            level, at = _FORM.unpack(raw) if len(raw) == _FORM.size else (self.rate, now)
            if not 0 <= now - at < 86400:  # the machine was started anew
                level, at = self.rate, now
            level = min(level + (now - at) * self.rate, self.rate) - size
            os.pwrite(file, _FORM.pack(level, now), 0)
        finally:
            os.close(file)
        return float(max(-level / self.rate, 0.0))
