"""Which of our processes goes first where several want the same processor.

The coordinator has deadlines and needs little; a card's process would take every processor that it
finds; who looks on can wait for the coordinator. Ray would have all of them yield alike, to
everything else on the machine (its `worker_niceness` is 15), so it is told not to (`RAY_SETTINGS`),
and those that yield say so themselves. In a Ray that others began without that, all is as Ray has
it.

Niceness alone only says who gets how much: who wakes still takes the processor from who has it. As
a batch process (SCHED_BATCH) it waits until that one has done its turn.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

RAY_SETTINGS: Final = {"worker_niceness": 0}
"""The chart has it as an environment variable, `RAY_worker_niceness`."""
CARDS: Final = 10
ONLOOKERS: Final = 5
"""Before the cards: they ask for little, and cards that compute on the processor would have them
wait for a quarter of a second."""
STORES: Final = 15
SERVE: Final = ("ray::ProxyActor", "ray::ServeController")
"""Serve's own, through which those who look on come in."""
_OURS_TO_SET: Final = frozenset({RAY_SETTINGS["worker_niceness"], ONLOOKERS})
"""Where Ray has none yield, and where we were there before: a thread may have been missed."""


def give_way(niceness: int) -> None:
    """This process yields to those of a lower niceness, never to fewer than it does already."""
    _hold_back(os.getpid(), niceness)


def serve_gives_way() -> None:
    """Serve's own processes beside this one, which can't be told to, yield to all where Ray has
    none yield. To be done again now and then: Serve replaces them."""
    for process in _siblings(SERVE):
        with contextlib.suppress(OSError):  # it has just ended
            if os.getpriority(os.PRIO_PROCESS, process) in _OURS_TO_SET:
                _hold_back(process, ONLOOKERS)


def _hold_back(process: int, niceness: int) -> None:
    """As far as the machine lets us. On Linux each thread has a niceness of its own, and hands it
    to those that it begins."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        number = int(thread.name)
        with contextlib.suppress(OSError):  # it has just ended, or a sandbox forbids it
            if os.getpriority(os.PRIO_PROCESS, number) < niceness:
                os.setpriority(os.PRIO_PROCESS, number, niceness)
            if os.sched_getscheduler(number) == os.SCHED_OTHER:
                os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0))


def _siblings(titles: Iterable[str]) -> Iterable[int]:
    """The processes of such a title that have the same parent as this one: with Ray, its node."""
    wanted = tuple(title.encode() for title in titles)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything, come its state and its parent.
            after = (folder / "stat").read_text(errors="replace").rpartition(")")[2]
            ours = int(after.split()[1]) == os.getppid()
            # Of a process that is stuck it may not be read: of our own alone it is asked.
            if ours and (folder / "cmdline").read_bytes().startswith(wanted):
                yield int(folder.name)
