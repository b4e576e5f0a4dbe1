"""What the machine under an actor says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_KILLS: Final = "oom_kill "


def memory_kills(counters: Path = Path("/proc/vmstat")) -> int | None:
    """`oom_kill` among the counters of the machine's kernel; None where it doesn't say."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return None
    return next((int(each.removeprefix(_KILLS)) for each in lines if each.startswith(_KILLS)), None)
