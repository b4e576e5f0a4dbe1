"""Niceness can't be taken back, so it is a process of its own that gives way."""

from __future__ import annotations

import subprocess
import sys

from actors.precedence import ONLOOKERS

SCRIPT = """
import os, threading
from actors.precedence import give_way

begun, over = threading.Barrier(3), threading.Event()
found = []

def wait():
    begun.wait()
    over.wait()
    number = threading.get_native_id()
    batch = os.sched_getscheduler(number) == os.SCHED_BATCH
    found.append(f"{os.getpriority(os.PRIO_PROCESS, number)}{'b' if batch else ''}")

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
    assert ran.stdout.split() == ["7b"] * 4 + ["7"]


PARENT = """
import os, subprocess, sys

def begin(title):
    return subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 60"])

def yields(process):
    niceness = os.getpriority(os.PRIO_PROCESS, process.pid)
    return niceness, os.sched_getscheduler(process.pid) == os.SCHED_BATCH

proxy, controller, other, late = map(
    begin, ["ray::ProxyActor", "ray::ServeController", "ray::CoordinatorActor", "ray::ProxyActor"]
)
try:
    for each in (proxy, controller, other, late):
        while not open(f"/proc/{each.pid}/cmdline").read().startswith("ray::"):
            pass
    os.setpriority(os.PRIO_PROCESS, late.pid, 15)  # as Ray has it by itself
    command = "from actors.precedence import serve_gives_way; serve_gives_way()"
    subprocess.run([sys.executable, "-c", command], check=True)
    print([yields(each) for each in (proxy, controller, other, late)])
finally:
    for each in (proxy, controller, other, late):
        each.kill()
        each.wait()
"""


def test_serves_own_processes_give_way_where_ray_has_none_yield() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True, timeout=60
    )
    given_way, left = f"({ONLOOKERS}, True)", "(0, False)"
    assert ran.stdout.strip() == f"[{given_way}, {given_way}, {left}, (15, False)]"


def test_those_of_another_parent_are_left_alone() -> None:
    script = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    found = """
import os, subprocess
from actors.precedence import _siblings
print(list(_siblings(["ray::"])))
"""
    other = subprocess.Popen(["bash", "-c", "exec -a ray::ProxyActor sleep 60"])
    try:
        ran = subprocess.run(
            [sys.executable, "-c", script, found],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        other.kill()
        other.wait()
    assert ran.stdout.strip() == "[]"
