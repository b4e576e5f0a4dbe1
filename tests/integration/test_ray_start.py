"""A real Ray whose first start was too slow for Ray itself: the second runs, and nothing of the
first is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json
import psutil
import ray
from ray._private.node import Node
from cluster import ray_start

begin, begun = Node.start_ray_processes, []

def too_late(node):
    begin(node)
    begun.append(sorted(each.pid for each in psutil.Process().children(recursive=True)))
    if len(begun) == 1:
        raise Exception("The current node timed out during startup.")

Node.start_ray_processes = too_late
options = {"address": "local", "include_dashboard": False, "object_store_memory": 2**27,
           "_node_ip_address": "127.0.0.1", "configure_logging": False}
ray_start.start(ray.init, ray.shutdown, options)

@ray.remote
def answer():
    return 42

names = [each.name() for each in psutil.Process().children(recursive=True)]
left = [pid for pid in begun[0] if psutil.pid_exists(pid)]
found = [ray.get(answer.remote()), len(begun[0]) > 1, left, names.count("raylet")]
print("FOUND", json.dumps(found))
ray.shutdown()
"""


def test_a_start_that_ray_gave_up_is_made_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert json.loads(found[0].removeprefix("FOUND")) == [42, True, [], 1], done.stdout
