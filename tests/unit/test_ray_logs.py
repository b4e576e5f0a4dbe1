from __future__ import annotations

import pytest

from cluster import ray_logs
from cluster.logs import READ_BY_A_PERSON, Format


def settled(log_format: Format, on_terminal: bool, **before: str) -> dict[str, str]:
    ray_logs.settle(log_format, on_terminal, before)
    return before


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_lines_for_machines_have_nothing_before_them(log_format: Format) -> None:
    found = settled(log_format, on_terminal=False)
    assert found == ray_logs.ALL_LINES | ray_logs.BARE | ray_logs.NO_COLOURS


def test_on_a_terminal_it_is_text_that_says_whose_it_is() -> None:
    assert settled("auto", on_terminal=True) == ray_logs.ALL_LINES | {READ_BY_A_PERSON: "1"}
    assert settled("console", on_terminal=True) == ray_logs.ALL_LINES
    assert settled("console", on_terminal=False) == ray_logs.ALL_LINES | ray_logs.NO_COLOURS
    assert READ_BY_A_PERSON not in settled("json", on_terminal=True)


def test_what_the_operator_said_stays() -> None:
    assert settled("json", on_terminal=False, RAY_DEDUP_LOGS="1")["RAY_DEDUP_LOGS"] == "1"
