"""Which of our processes goes first where several want the same processor.

The coordinator has deadlines and needs little; a card's process would take every processor that it
finds; who looks on can wait. Ray would have all of them yield alike, to everything else on the
machine (its `worker_niceness` is 15), so it is told not to (`RAY_SETTINGS`), and those that yield
say so themselves. In a Ray that others began without that, all is as Ray has it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

RAY_SETTINGS: Final = {"worker_niceness": 0}
"""The chart has it as an environment variable, `RAY_worker_niceness`."""
CARDS: Final = 10
STORES: Final = 15
ONLOOKERS: Final = 19


def give_way(niceness: int) -> None:
    """This process yields to those of a lower niceness, never to fewer than it does already.

    On Linux each thread has a niceness of its own, and hands it to those that it begins.
    """
    for thread in Path("/proc/self/task").iterdir():
        number = int(thread.name)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.getpriority(os.PRIO_PROCESS, number) < niceness:
                os.setpriority(os.PRIO_PROCESS, number, niceness)
