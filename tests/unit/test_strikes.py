"""What is held against a card (`cluster.core.strikes`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskUnsupported,
)
from cluster.core.record import Attempt, Fault, Outcome, Result, TaskRecord
from cluster.core.strikes import (
    MOMENT,
    CardFault,
    Fate,
    FaultKind,
    Limit,
    also_showed,
    fate_of,
    kind_of,
    out,
    struck,
)
from cluster.core.types import (
    Address,
    AttemptId,
    CardUuid,
    Commitment,
    GpuId,
    Score,
    TaskType,
    Timestamp,
    Wei,
)

A, B = CardUuid("GPU-A"), CardUuid("GPU-B")
TASK, OTHER = Commitment("0x" + "01" * 32), Commitment("0x" + "02" * 32)
BAD = CardFault(A, "a1", FaultKind.BAD_RESULT, Timestamp(0.0), GpuId("n-0"), "p1", TASK)
DAY = Limit(3, 86_400.0)
RECORD = TaskRecord(TASK, Address("0x1"), TaskType.SD, (), Wei(0), Timestamp(0.0))


def failed(*faults: Fault) -> TaskRecord:
    attempts = tuple(
        Attempt(AttemptId(f"a{n}"), GpuId("n-0"), Timestamp(n), Timestamp(n + 1.0), fault)
        for n, fault in enumerate(faults)
    )
    return replace(RECORD, attempts=attempts, parameters="{}")


def strikes_at(*moments: float) -> list[CardFault]:
    return [
        replace(BAD, cause=f"a{moment}", at=Timestamp(moment), counts=True) for moment in moments
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeviceFault(DeviceFaultKind.BAD_RESULT, "x"), FaultKind.BAD_RESULT),
        (DeviceFault(DeviceFaultKind.CONTEXT_LOST, "x"), FaultKind.CONTEXT_LOST),
        (DeviceFault(DeviceFaultKind.STALLED, "x"), FaultKind.STALLED),
        (DeviceFault(DeviceFaultKind.MEMORY_CHANGED, "x"), FaultKind.MEMORY_CHANGED),
        (DeviceFault(DeviceFaultKind.OTHER, "x"), FaultKind.OTHER),
        (AttemptLost("x"), FaultKind.DIED),
        (DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "x"), None),
        (DeviceFault(DeviceFaultKind.NOT_TAKEN, "x"), None),
        (DeviceFault(DeviceFaultKind.DISTRUSTED, "x"), None),
        (ModelUnavailable(ModelUnavailableKind.DAMAGED, "x"), None),
        (TaskUnsupported("x"), None),
        (Cancelled("x"), None),
    ],
)
def test_which_errors_are_a_cards_own(error: ClusterError, kind: FaultKind | None) -> None:
    assert kind_of(error) is kind


def test_what_a_tasks_end_says_of_its_faults() -> None:
    assert fate_of(None) is Fate.DOUBTFUL
    assert fate_of(failed(Fault.DEVICE)) is Fate.OPEN
    result = Result(AttemptId("a9"), Score(b"x"), (), Timestamp(9.0))
    assert fate_of(replace(failed(Fault.DEVICE), result=result)) is Fate.SOUND
    assert fate_of(replace(failed(Fault.DEVICE), fault="not a task")) is Fate.DOUBTFUL
    for faults, fate in (
        ((Fault.LOST,), Fate.UNTRIED),
        ((Fault.LOST, Fault.CANCELLED, Fault.DEADLINE), Fate.UNTRIED),
        ((Fault.LOST, Fault.LOST), Fate.DOUBTFUL),
        ((Fault.LOST, Fault.MODEL), Fate.DOUBTFUL),
        ((Fault.DEVICE, Fault.UNSUPPORTED), Fate.DOUBTFUL),
        ((Fault.CANCELLED,), Fate.DOUBTFUL),
    ):
        assert fate_of(replace(failed(*faults), outcome=Outcome.ABORTED)) is fate


def test_a_task_that_had_a_result_after_all_strikes_each_card_that_failed_on_it_once() -> None:
    again = replace(BAD, cause="a2", kind=FaultKind.STALLED)
    other = replace(BAD, card=B, cause="a3", kind=FaultKind.OTHER)
    found = struck([BAD, again, other], Fate.SOUND)
    assert {each.card for each in found} == {A, B}
    assert len(found) == 2


@pytest.mark.parametrize("kind", list(FaultKind))
@pytest.mark.parametrize("fate", [Fate.SOUND, Fate.UNTRIED, Fate.DOUBTFUL])
def test_what_two_cards_show_strikes_neither(kind: FaultKind, fate: Fate) -> None:
    faults = [replace(BAD, kind=kind), replace(BAD, card=B, cause="a2", kind=kind)]
    assert struck(faults, fate) == ()


@pytest.mark.parametrize("kind", list(FaultKind))
def test_without_a_result_only_what_ended_a_process_says_something(kind: FaultKind) -> None:
    fault = replace(BAD, kind=kind)
    ended = kind in {FaultKind.CONTEXT_LOST, FaultKind.STALLED, FaultKind.DIED}
    assert bool(struck([fault], Fate.UNTRIED)) is ended
    assert struck([fault], Fate.DOUBTFUL) == ()


def test_the_same_fault_is_that_of_another_card_at_the_same_task() -> None:
    assert also_showed(BAD, [BAD, replace(BAD, cause="a2")]) is None
    assert also_showed(BAD, [replace(BAD, card=B, task=OTHER)]) is None
    assert also_showed(BAD, [replace(BAD, card=B, kind=FaultKind.OTHER)]) is None
    assert also_showed(BAD, [replace(BAD, card=B)]) == B
    nothing = replace(BAD, task=None)
    assert also_showed(nothing, [replace(nothing, card=B)]) is None


def test_so_many_strikes_within_so_long_are_enough() -> None:
    now = Timestamp(90_000.0)
    assert out(strikes_at(10_000, 50_000), DAY, now) == ()
    enough = strikes_at(10_000, 50_000, 80_000)
    assert out(enough, DAY, now) == tuple(enough)
    assert out(enough, DAY, Timestamp(96_401.0)) == (), "the first is too old"
    assert out(enough, Limit(0, 86_400.0), now) == (), "it is turned off"
    assert out([replace(each, counts=False) for each in enough], DAY, now) == ()


@given(st.lists(st.floats(0, MOMENT - 1), min_size=1))
def test_one_event_is_one_strike_however_it_shows(moments: list[float]) -> None:
    found = out(strikes_at(*moments), Limit(1, 86_400.0), Timestamp(MOMENT))
    assert len(found) == 1
