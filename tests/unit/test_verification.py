from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.types import (
    CardUuid,
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    RayNodeId,
    Score,
    Timestamp,
)
from cluster.core.verification import MARGIN_SECONDS, Ruling, pick, rule, sampled, seconds_left

A, B, C, D = (CardUuid(f"GPU-{name}") for name in "ABCD")
X, Y, Z = Score(b"x" * 8), Score(b"y" * 8), Score(b"z" * 8)
KIND = GpuClass("Card+docker", GigaBytes(8))
TASKS = [Commitment(f"0x{number:064x}") for number in range(2000)]
NOW = Timestamp(1_000.0)


def card(name: str, warm: frozenset[str] = frozenset()) -> Gpu:
    gpu_id, node = GpuId(f"id-{name}"), RayNodeId("node")
    return Gpu(gpu_id, node, KIND, False, GpuState.READY, warm, uuid=CardUuid(f"GPU-{name}"))


# --- which tasks ----------------------------------------------------------------------------------


def test_none_and_all() -> None:
    assert not any(sampled(task, 0.0) for task in TASKS)
    assert all(sampled(task, 1.0) for task in TASKS)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_a_fraction_of_the_tasks_and_always_the_same(fraction: float) -> None:
    chosen = [task for task in TASKS if sampled(task, fraction)]
    assert abs(len(chosen) / len(TASKS) - fraction) < 0.05
    assert [task for task in TASKS if sampled(task, fraction)] == chosen


def test_a_larger_fraction_holds_the_smaller() -> None:
    small = {task for task in TASKS if sampled(task, 0.2)}
    assert small < {task for task in TASKS if sampled(task, 0.4)}


def test_the_choice_outlives_this_version() -> None:
    """A coordinator that comes back must choose as the one before did."""
    assert [number for number in range(40) if sampled(TASKS[number], 0.1)] == CHOSEN


CHOSEN = [0, 9]

# --- whom, and is there time ----------------------------------------------------------------------


def test_the_time_left_ends_before_the_deadline() -> None:
    assert seconds_left(None, NOW) is None
    assert seconds_left(Timestamp(NOW + MARGIN_SECONDS + 5), NOW) == 5
    left = seconds_left(Timestamp(NOW + 1), NOW)
    assert left is not None
    assert left < 0


def test_another_ready_card_of_the_class_is_asked() -> None:
    first, second = card("A"), card("B")
    assert pick(first, [first, second], {A}) == second
    assert pick(first, [first], {A}) is None
    assert pick(first, [second], {A, B}) is None
    for unfit in (
        replace(second, state=GpuState.BUSY),
        replace(second, state=GpuState.QUARANTINED),
        replace(second, gpu_class=GpuClass("Card+docker", GigaBytes(16))),
        replace(second, uuid=CardUuid("")),
    ):
        assert pick(first, [unfit], {A}) is None


def test_a_warm_card_is_asked_first() -> None:
    first = card("A", frozenset({"p", "q"}))
    others = [card("B"), card("C", frozenset({"q"})), card("D", frozenset({"r", "s"}))]
    assert pick(first, others, {A}) == others[1]


# --- what it means --------------------------------------------------------------------------------


def test_rulings() -> None:
    assert rule({}) is None
    assert rule({A: X}) is None
    assert rule({A: X, B: Y}) is None
    assert rule({A: X, B: Y, C: Z}) is None
    assert rule({A: X, B: X, C: Y, D: Y}) is None
    assert rule({A: X, B: X}) == Ruling(X, frozenset())
    assert rule({A: X, B: Y, C: X}) == Ruling(X, frozenset({B}))
    assert rule({A: X, B: Y, C: Y}) == Ruling(Y, frozenset({A}))


@given(st.dictionaries(st.sampled_from([A, B, C, D]), st.sampled_from([X, Y, Z])))
def test_no_score_is_sent_that_only_one_of_several_cards_gave(
    scores: dict[CardUuid, Score],
) -> None:
    found = rule(scores)
    if found is not None:
        agree = {uuid for uuid, score in scores.items() if score == found.score}
        assert len(agree) >= 2
        assert found.odd == scores.keys() - agree
        assert len(agree) > len(found.odd) or len(set(scores.values())) > 2
