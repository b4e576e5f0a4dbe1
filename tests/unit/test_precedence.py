"""Niceness can't be taken back, so it is a process of its own that gives way."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, threading
from actors.precedence import give_way

begun, over = threading.Barrier(3), threading.Event()
found = []

def wait():
    begun.wait()
    over.wait()
    found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

def begin():
    threads = [threading.Thread(target=wait) for _ in range(2)]
    for each in threads:
        each.start()
    begun.wait()
    return threads

threads = begin()
give_way(7)
threads += begin()
give_way(3)  # which takes nothing back
over.set()
for each in threads:
    each.join()
print(*found, os.getpriority(os.PRIO_PROCESS, 0))
"""


def test_every_thread_gives_way_those_to_come_too() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.split() == ["7"] * 5
