"""What the demo says of how its tasks ended."""

from __future__ import annotations

import pytest

from cluster.core.types import Commitment, TaskType
from devnet.application import TaskReport
from devnet.demo import TASK_TIMEOUT, expected_ends
from devnet.demo_tasks import ABORTED, GROUP, NAMED_GPU, demo_tasks

SUCCESS, REFUND = "EndGroupSuccess", "EndGroupRefund"


def report(name: str, expected: frozenset[str], actual: str) -> TaskReport:
    return TaskReport(Commitment(f"0x{name}"), name, TaskType.SD, expected, actual, "", 1, None, ())


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
