"""The simulation by which matching is compared with the first card that fits, in little."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks import matching as bench
from cluster.core.matching import place
from cluster.core.types import Timestamp


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CARDS": 16, "TASKS": 120, "SETS": 12}.items():
        monkeypatch.setattr(bench, name, value)


def test_both_place_every_task_and_matching_finds_more_of_them_warm() -> None:
    wants = bench.tasks(random.Random(1))  # noqa: S311 - a schedule
    ours = bench.simulate(place, wants, "matching")
    first = bench.simulate(bench.first_fit, wants, "first fit")
    assert (ours.placed, first.placed) == (120, 120)
    assert ours.warm > first.warm
    assert ours.missed <= first.missed


def test_what_ends_too_late_is_missed_whoever_placed_it() -> None:
    wants = bench.tasks(random.Random(1))  # noqa: S311 - a schedule
    late = [
        replace(want, deadline=None if n % 2 else Timestamp(0.5)) for n, want in enumerate(wants)
    ]
    assert bench.simulate(bench.first_fit, late, "first fit").missed == 60
