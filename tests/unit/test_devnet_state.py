"""What a devnet leaves for others to find, and what they make of it when it is stale or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import ConfigError
from cluster.core.types import Address, Commitment, TaskStatus, TaskType
from devnet import network
from devnet.application import TaskChange, TaskReport
from devnet.deploy import Deployment
from devnet.network import State, read_state, refuse_if_running
from devnet.tasks import TaskSpec

PLACES = [Address("0x" + digit * 40) for digit in "123"]
DEPLOYMENT = Deployment("http://127.0.0.1:1", 31337, *PLACES)
OUTPUT = "0x" + "ab" * 20


def here() -> State:
    pid = os.getpid()
    began = network.started(pid)
    assert began is not None
    return State(pid, began, "http://127.0.0.1:2", DEPLOYMENT)


def keep(folder: Path, **changes: Any) -> Path:
    """The state file of a devnet in this process."""
    file = folder / network.STATE
    state = asdict(here())
    file.write_text(json.dumps(state | changes))
    return file


def test_what_runs_is_found(tmp_path: Path) -> None:
    file = keep(tmp_path)
    assert read_state(tmp_path) == here()
    with pytest.raises(ConfigError, match=rf"already runs in .* \(process {os.getpid()}\)"):
        refuse_if_running(tmp_path)
    assert file.exists()


def test_nothing_runs_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no devnet runs in"):
        read_state(tmp_path)
    refuse_if_running(tmp_path)


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid", [dead, lambda: -1, lambda: 0], ids=["dead", "negative", "zero"])
def test_one_that_is_gone_is_forgotten(tmp_path: Path, pid: Callable[[], int]) -> None:
    file = keep(tmp_path, pid=pid())
    with pytest.raises(ConfigError, match="is gone"):
        read_state(tmp_path)
    assert not file.exists()


def test_a_pid_that_is_now_anothers_is_left_alone(tmp_path: Path) -> None:
    """`down` would end it."""
    foreign = subprocess.Popen(["sleep", "600"])
    try:
        file = keep(tmp_path, pid=foreign.pid)
        with pytest.raises(ConfigError, match="is gone"):
            network.down(tmp_path)
        assert not file.exists()
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        json.dumps({"pid": 1, "relay_url": "x"}),
        json.dumps({"pid": 1, "relay_url": "x", "deployment": {"rpc_url": "y"}}),
        *(
            json.dumps(asdict(State(1, 1, "x", DEPLOYMENT)) | {"pid": pid})
            for pid in ("self", "1", None, 1.5, True, [1])
        ),
    ],
)
def test_a_broken_file_is_named_and_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / network.STATE
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"{network.STATE}: unreadable .* delete it"):
        read_state(tmp_path)
    assert file.read_text() == text
    refuse_if_running(tmp_path)


class FakeApplication:
    """Every task ends by abort."""

    async def run(
        self, specs: Sequence[TaskSpec], on_change: Callable[[TaskChange], None]
    ) -> list[TaskReport]:
        reports = []
        for spec in specs:
            commitment = Commitment(f"0x{spec.name}")
            on_change(TaskChange(spec.name, commitment, TaskStatus.STARTED, OUTPUT, 1.0))
            reports.append(
                TaskReport(
                    commitment,
                    spec.name,
                    TaskType.SD,
                    spec.expected_end,
                    "EndAborted",
                    OUTPUT,
                    1,
                    None,
                    ("out/0.png",),
                )
            )
        return reports


@pytest.mark.parametrize(
    ("expected", "code", "said"),
    [("EndAborted", 0, "(as expected)"), ("EndSuccess", 1, "(NOT ['EndSuccess'])")],
)
def test_send_tells_how_each_task_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected: str,
    code: int,
    said: str,
) -> None:
    keep(tmp_path)
    task = {"type": "SD", "model_ids": [], "parameters": ""}
    file = tmp_path / "tasks.json"
    file.write_text(
        json.dumps(
            [
                {"name": "one", "expected_end": ["EndAborted"], **task},
                {"name": "other", "expected_end": [expected], **task},
            ]
        )
    )
    monkeypatch.setattr(network, "application", lambda *_: FakeApplication())
    assert network.send(file, tmp_path) == code
    shown = capsys.readouterr().out
    assert f"other                Started on {OUTPUT}" in shown
    assert f"other                EndAborted {said}" in shown
    assert "out/0.png" in shown
