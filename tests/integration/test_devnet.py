"""The devnet's verbs as a person types them, and the ports that they avoid."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from devnet.network import DEFAULT_PORT, STATE, wanted_or_free

MODELS = Path(".devnet/models").resolve()
PATIENCE = 240.0
HOST = "127.0.0.1"
TASKS = """
- {name: nobody-s, type: SD, model_ids: [], parameters: "", upload: false, timeout: 1,
   expected_end: [EndAborted]}
"""


@contextlib.contextmanager
def held(port: int) -> Iterator[None]:
    """Somebody listens there: we, or whoever was there before."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server((HOST, port)))
        with socket.create_connection((HOST, port)):
            pass
        yield


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "devnet", *words]


def verb(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def test_a_port_that_is_held_is_avoided() -> None:
    with held(DEFAULT_PORT):
        assert wanted_or_free(DEFAULT_PORT) != DEFAULT_PORT
        found = wanted_or_free(None)
        assert found not in (0, DEFAULT_PORT)


def test_a_port_that_is_free_is_taken() -> None:
    # Below the ports that the system gives out, so that nobody takes it in between.
    for port in range(20_000, 20_100):
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            break
    assert wanted_or_free(port) == port


def test_up_send_and_down(tmp_path: Path) -> None:
    folder, log, tasks = tmp_path / "net", tmp_path / "up.log", tmp_path / "tasks.yaml"
    tasks.write_text(TASKS)
    where = ("--dir", str(folder))
    options = ("--block-time", "0.5", "--models", str(MODELS))
    with held(DEFAULT_PORT), log.open("wb") as file:
        up = subprocess.Popen(
            command("up", *where, *options),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while "devnet down" not in log.read_text():
                assert up.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            assert json.loads((folder / STATE).read_text())["pid"] == up.pid
            port = yaml.safe_load((folder / "operator.yaml").read_text())["serve"]["port"]
            assert port != DEFAULT_PORT
            assert f"http://{HOST}:{port}\n" in log.read_text()

            sent = verb("send", *where, str(tasks))
            assert sent.returncode == 0, sent.stdout + sent.stderr
            assert "nobody-s             EndAborted (as expected)" in sent.stdout

            stopped = verb("down", *where)
            assert stopped.returncode == 0, stopped.stdout + stopped.stderr
            assert up.wait(PATIENCE) == 0, log.read_text()
        finally:
            if up.poll() is None:
                up.kill()
                up.wait()
    assert not (folder / STATE).exists()
    again = verb("down", *where)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"crynux-cluster: no devnet runs in {folder}")
