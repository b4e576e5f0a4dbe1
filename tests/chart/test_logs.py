"""What an actor logs is what the container puts out: tried with a Ray of its own, begun as KubeRay
begins it with what the chart renders."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chart.cases import values_of
from tests.chart.charts import case, head, render

RAY = str(Path(sys.executable).parent / "ray")
ACTOR = """
import sys
import ray

ray.init(address=sys.argv[1], namespace="logs", log_to_driver=False, configure_logging=False)


@ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})
class Actor:
    def __init__(self, settings):
        settings.setup()

    def work(self, prompt):
        import structlog

        structlog.get_logger("gpu").info("task_done", task="0x1", prompt=prompt)


from cluster import logs

actor = Actor.options(name="actor", lifetime="detached").remote(logs.Settings("info", "json"))
ray.get(actor.work.remote("a cat"))
"""


@dataclass(frozen=True)
class Head:
    """A head pod's first container, as far as it logs."""

    address: str
    env: dict[str, str]
    output: Path


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Head]:
    pod = head(render(case(values_of("single-server"))))
    given = {each["name"]: each["value"] for each in pod.container("ray-head")["env"]}
    env = os.environ | given | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    gcs, agent, dashboard = _ports(3)
    with tempfile.TemporaryDirectory(prefix="logs-") as folder:
        env |= {"HOME": folder, "HF_HOME": folder, "PYTHONPATH": os.getcwd()}
        params = dict(pod.params) | {
            "port": gcs,
            "temp-dir": folder,
            "node-ip-address": "127.0.0.1",
        }
        params |= {"dashboard-agent-listen-port": agent, "dashboard-port": dashboard}
        params |= {"object-store-memory": "78643200", "block": "true", "include-dashboard": "false"}
        output = tmp_path / "output"
        with output.open("wb") as opened:
            ray = subprocess.Popen(
                [RAY, "start", "--head", *_options(params)],
                env=env,
                stdout=opened,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Head(f"127.0.0.1:{gcs}", env, output)
        finally:
            ray.send_signal(signal.SIGTERM)
            ray.wait(120)


def _options(params: dict[str, str]) -> Iterator[str]:
    for name, value in params.items():
        yield f"--{name}" if value == "true" else f"--{name}={value}"


def _ports(count: int) -> list[str]:
    """Free ones, below those that Ray takes for its workers."""
    opened = []
    for port in range(7000 + os.getpid() % 2000, 10_000):
        try:
            opened.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        if len(opened) == count:
            break
    found = [str(each.getsockname()[1]) for each in opened]
    for each in opened:
        each.close()
    return found


def test_what_an_actor_logs_is_the_containers_output_as_it_was_configured(started: Head) -> None:
    waits = [RAY, "health-check", "--address", started.address]
    subprocess.run(
        ["sh", "-c", f"until {' '.join(waits)}; do sleep 1; done"],
        env=started.env,
        check=True,
        timeout=120,
        capture_output=True,
    )
    actor = [sys.executable, "-c", ACTOR, started.address]
    done = subprocess.run(
        actor, env=started.env, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = started.output.read_text(encoding="utf-8").splitlines()
    (said,) = (json.loads(line) for line in lines if line.startswith("{"))
    assert (said["event"], said["logger"], said["task"]) == ("task_done", "gpu", "0x1")
    assert said["prompt"] == "[5 characters]"
    steps = [line for line in lines if "(raylet)" in line or "(gcs_server)" in line]
    assert [line for line in steps if " I " in line and "Set ray log level" not in line] == []
