"""What is read of the machine under an actor."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.machine import memory_kills


@pytest.mark.parametrize(
    ("counters", "kills"),
    [
        ("pgfault 19\noom_kill 3\noom_kill_disable 7\nswap_ra 1\n", 3),
        ("pgfault 19\noom_kill 0\n", 0),
        ("pgfault 19\nnr_oom_kill 4\n", None),  # no Linux of ours
        ("", None),
    ],
)
def test_how_many_processes_it_ended_for_want_of_memory(
    tmp_path: Path, counters: str, kills: int | None
) -> None:
    path = tmp_path / "vmstat"
    path.write_text(counters)
    assert memory_kills(path) == kills


def test_a_machine_that_has_no_such_counters_says_nothing(tmp_path: Path) -> None:
    assert memory_kills(tmp_path / "vmstat") is None
