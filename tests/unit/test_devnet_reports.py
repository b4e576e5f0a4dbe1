from __future__ import annotations

import pytest

from cluster.core.types import Commitment, TaskType
from devnet.application import TaskReport

ENDS = frozenset({"EndAborted"})


@pytest.mark.parametrize(
    ("end", "reported", "expected_report", "problem", "verdict"),
    [
        ("EndAborted", True, True, "", "as expected"),
        ("EndSuccess", True, True, "", "NOT ['EndAborted']"),
        ("EndAborted", True, False, "", "an error was reported, which was NOT expected"),
        ("EndAborted", False, True, "", "an error was not reported, which was NOT expected"),
        ("EndAborted", False, False, "another hash", "NOT as expected"),
    ],
)
def test_a_report_says_what_was_not_as_expected(
    end: str, reported: bool, expected_report: bool, problem: str, verdict: str
) -> None:
    report = TaskReport(
        Commitment("0x1"), "a", TaskType.SD, ENDS, end, "", 1, None, (), problem, reported,
        expected_report,
    )  # fmt: skip
    assert report.verdict == verdict
    assert report.as_expected is (verdict == "as expected")
