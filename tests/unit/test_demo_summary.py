"""What the demo says of how its tasks ended."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.core.types import Commitment, GpuState, TaskType
from cluster.status import (
    ChainView,
    GpuStatus,
    IdentityView,
    RelayView,
    Status,
    TaskView,
    Totals,
)
from devnet import demo
from devnet.application import TaskReport
from devnet.demo import TASK_TIMEOUT, expected_ends, summarise
from devnet.demo_tasks import ABORTED, GROUP, NAMED_GPU, demo_tasks

SUCCESS, REFUND = "EndGroupSuccess", "EndGroupRefund"
PAID = frozenset({"EndSuccess"})


def report(name: str, expected: frozenset[str], actual: str, **more: Any) -> TaskReport:
    plain = TaskReport(
        Commitment(f"0x{name}"), name, TaskType.SD, expected, actual, "", 1, None, ()
    )
    return replace(plain, **more)


def status_of(*tasks: TaskView, slashed: int = 0) -> Status:
    card = GpuStatus(
        gpu_id="n-0", ray_node="n", name="Card", vram=8, simulated=True, state=GpuState.READY
    )
    return Status(
        version="1",
        config_digest="abc",
        now=1.0,
        acting=True,
        epoch=1,
        identity=IdentityView(treasury=""),
        chain=ChainView(reached=True, chain_id=1),
        relay=RelayView(reached=True),
        gpus=(card,),
        tasks=tasks,
        totals=Totals(paid_wei="42", slashed=slashed),
    )


def view_of(name: str, **more: Any) -> TaskView:
    fields = {"account": "", "type": "SD", "stage": "", "progress": "", "action": "", **more}
    return TaskView(commitment=f"0x{name}", seen_at=0.0, **fields)


GOOD = (
    report("plain", PAID, "EndSuccess", fee=42, seconds_to_score=3, files=("out/0.png",)),
    report("never", ABORTED, "EndAborted"),
    report("faulty", ABORTED, "EndAborted", reported=True, expected_report=True),
    report("group", GROUP, REFUND),
    report("group.2", GROUP, SUCCESS),
    report("group.3", GROUP, REFUND),
)


def with_one(name: str, **changes: Any) -> list[TaskReport]:
    assert name in {each.name for each in GOOD}
    return [replace(each, **changes) if each.name == name else each for each in GOOD]


WRONG = {
    "another end": with_one("plain", actual_end="EndAborted"),
    "a success where there should be none": with_one("never", actual_end="EndSuccess"),
    "slashed": with_one("plain", actual_end="EndInvalidated"),
    "a problem on the application's side": with_one("plain", problem="other files"),
    "an error report that is missing": with_one("faulty", reported=False),
    "an error report that nobody expected": with_one("never", reported=True),
    "two of a group paid": with_one("group", actual_end=SUCCESS),
    "none of a group paid": with_one("group.2", actual_end=REFUND),
    "one of a group aborted": with_one("group.3", actual_end="EndAborted"),
}


def test_all_is_well() -> None:
    tasks = (
        view_of("plain", gpu_id="n-0", payment="42"),
        view_of("faulty", gpu_id=None, fault="no prompt"),
    )
    summary = summarise(GOOD, status_of(*tasks), 12.34)
    assert summary["ok"] is True
    assert (summary["paid"], summary["slashed"], summary["wall_seconds"]) == (42, 0, 12.3)
    assert [task["name"] for task in summary["tasks"]] == [each.name for each in GOOD]
    assert all(task["expected_end"] == task["actual_end"] for task in summary["tasks"])
    plain, never, faulty = summary["tasks"][:3]
    assert plain["commitment"] == "0xplain"
    assert (plain["type"], plain["gpu"], plain["seconds_to_score"]) == ("SD", "n-0 Card", 3)
    assert (plain["fee"], plain["payment"], plain["files"]) == (42, 42, ["out/0.png"])
    assert (never["gpu"], never["payment"], never["fault"]) == (None, 0, None)
    assert (faulty["error_reported"], faulty["fault"]) == (True, "no prompt")


@pytest.mark.parametrize("reports", WRONG.values(), ids=WRONG.keys())
def test_one_wrong_task_is_enough(reports: list[TaskReport]) -> None:
    assert summarise(reports, status_of(), 1.0)["ok"] is False


def test_a_slash_is_never_well() -> None:
    summary = summarise(GOOD, status_of(slashed=1), 1.0)
    assert (summary["ok"], summary["slashed"]) == (False, 1)


@pytest.fixture
def term() -> Iterator[None]:
    """The demo listens to SIGTERM; put it back as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("reports", "slashed", "code"),
    [
        (list(GOOD), 0, 0),
        (with_one("plain", problem="other files"), 0, 1),
        (with_one("faulty", reported=False), 0, 1),
        (list(GOOD), 1, 1),
    ],
    ids=["well", "a problem", "no report", "slashed"],
)
def test_the_exit_code_says_whether_all_is_well(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    term: None,
    reports: list[TaskReport],
    slashed: int,
    code: int,
) -> None:
    async def watch(*_: object) -> tuple[list[TaskReport], Status]:  # noqa: RUF029 - as the demo's
        return reports, status_of(slashed=slashed)

    monkeypatch.setattr(demo, "Devnet", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(demo, "operator", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(demo, "_watch", watch)
    assert demo.main(tmp_path / "out") == code
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ok"] is (code == 0)


@pytest.mark.parametrize(
    ("ends", "good"),
    [
        ((SUCCESS, REFUND, REFUND), 3),
        ((REFUND, REFUND, SUCCESS), 3),
        ((SUCCESS, SUCCESS, REFUND), 2),
        ((REFUND, REFUND, REFUND), 2),
        (("EndAborted", SUCCESS, REFUND), 2),
        (("EndInvalidated", "EndAborted", "EndAborted"), 0),
    ],
)
def test_a_group_has_one_success_and_two_refunds(ends: tuple[str, ...], good: int) -> None:
    reports = [report(f"group.{i}", GROUP, end) for i, end in enumerate(ends)]
    expected = expected_ends([report("alone", ABORTED, "EndSuccess"), *reports])
    assert expected.pop(Commitment("0xalone")) == "EndAborted"
    assert sorted(expected.values()) == sorted((SUCCESS, REFUND, REFUND))
    assert sum(expected[r.commitment] == r.actual_end for r in reports) == good


def test_the_demo_sends_what_it_should() -> None:
    tasks = demo_tasks()
    names = [task.name for task in tasks]
    assert len(names) == len(set(names))
    plain = [task for task in tasks if task.name.startswith("sd15-")]
    assert len(plain) == 8
    assert len({task.model_ids for task in plain}) == 2
    assert sum(task.name.startswith("sdxl-") for task in tasks) == 2
    assert sum(task.required_gpu == NAMED_GPU for task in tasks) == 1
    assert sum(task.group for task in tasks) == 1
    (never,) = (task for task in tasks if not task.upload)
    # It is waited for, so it's quick; what a slow machine computes has time.
    assert [task.name for task in tasks if task.timeout is not None] == [never.name]
    assert never.timeout is not None
    assert never.timeout < TASK_TIMEOUT < 180
    assert sum(task.encrypted for task in tasks) > len(tasks) / 2
    assert any(not task.encrypted for task in tasks)
