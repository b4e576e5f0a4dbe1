"""`make demo`'s command, in a process of its own: what it leaves behind, and that nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1500)
MODELS = Path(".devnet/models")
PATIENCE = 900.0
"""More than the demo gives itself, however slow the machine."""
GONE_SECONDS = 120.0
Process = tuple[int, str]
"""A pid and when it started, because pids are used again."""


class Watched:
    """The demo in a session of its own, and every process that was ever seen to come from it."""

    def __init__(self, folder: Path) -> None:
        (folder / ".devnet").mkdir()
        (folder / ".devnet" / "models").symlink_to(MODELS.resolve())
        self.log = folder / "demo.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "devnet", "demo", "--output", "out"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.family: dict[Process, str] = {}
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            self.family |= descendants(self.process.pid)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not so after {seconds:.0f} s: {what}\n{self}"
            time.sleep(0.2)

    def ended(self) -> int:
        """The exit code, once every process that was seen is gone too."""
        self.until(lambda: self.process.poll() is not None, "the demo has ended")
        self._stop_watching()
        self.until(lambda: not self.left(), "all that it started is gone", GONE_SECONDS)
        return self.process.returncode

    def left(self) -> dict[Process, str]:
        alive = {process for process, _, _ in processes()}
        return {process: name for process, name in self.family.items() if process in alive}

    def _stop_watching(self) -> None:
        self._ended.set()
        self._watching.join()

    def stop(self) -> None:
        self._stop_watching()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid, _ in self.left():
            os.kill(pid, signal.SIGKILL)

    def __str__(self) -> str:
        log = self.log.read_text(errors="replace").splitlines()[-60:]
        operator = self.log.parent / "out" / "operator.log"
        if operator.exists():
            log += ["operator.log", *operator.read_text(errors="replace").splitlines()[-60:]]
        return "\n".join([*(f"left: {pid} {name}" for (pid, _), name in self.left().items()), *log])


def processes() -> Iterator[tuple[Process, int, str]]:
    """Every living process, its parent's pid and its name; zombies are dead."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        fields = rest.split()
        if fields[0] != "Z":
            yield (int(entry.name), fields[19]), int(fields[1]), name


def descendants(root: int) -> dict[Process, str]:
    found: dict[Process, str] = {}
    everything = tuple(processes())
    pids = {root}
    while True:
        more = {
            process: name
            for process, parent, name in everything
            if parent in pids and process not in found
        }
        if not more:
            return found
        found |= more
        pids |= {pid for pid, _ in more}


@contextmanager
def demo(folder: Path) -> Iterator[Watched]:
    watched = Watched(folder)
    try:
        yield watched
    finally:
        watched.stop()


@pytest.fixture(autouse=True)
def linux() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("finds processes in /proc")


def test_demo(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        code = running.ended()
        assert code == 0, str(running)
    summary: dict[str, Any] = json.loads((tmp_path / "out" / "summary.json").read_text())
    tasks = summary["tasks"]
    assert len(tasks) >= 20
    assert {task["type"] for task in tasks} == {"SD", "LLM"}
    assert len({task["commitment"] for task in tasks}) == len(tasks)
    assert summary["slashed"] == 0
    assert summary["wall_seconds"] > 0
    for task in tasks:
        assert task["actual_end"] == task["expected_end"]
    paid = [t for t in tasks if t["actual_end"] in {"EndSuccess", "EndGroupSuccess"}]
    # What the group's first task cost is shared among its three.
    assert summary["paid"] == sum(task["fee"] for task in paid)
    for task in paid:
        assert task["gpu"]
        assert task["seconds_to_score"] >= 0
        assert task["files"]
        for file in task["files"]:
            assert (tmp_path / file).stat().st_size > 0
    assert {t["actual_end"] for t in tasks} == {
        "EndSuccess",
        "EndAborted",
        "EndGroupSuccess",
        "EndGroupRefund",
    }


def test_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        running.until(
            lambda: " Started" in running.log.read_text() or running.process.poll() is not None,
            "a task has started",
        )
        assert running.process.poll() is None, str(running)
        assert any("raylet" in name for name in running.family.values()), running.family
        # As a terminal does it: to the whole group in the foreground.
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.ended() != 0
    assert not (tmp_path / "out" / "summary.json").exists()
