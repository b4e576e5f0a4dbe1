"""A record is the fold of its events, and what can't be isn't written down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import IllegalMove
from cluster.core.record import (
    ALLOWED,
    Attempt,
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    FaultFound,
    Outcome,
    ParametersFetched,
    Progress,
    Result,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
    apply,
    begin,
    fold,
)
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    FileRef,
    GpuId,
    ModelId,
    Score,
    TaskType,
    Timestamp,
    Wei,
)

TASK = Commitment("0x01")
SEEN = Seen(Address("0xMe"), TaskType.LLM, (ModelId("base:m"),), Wei(9))
A, B = AttemptId("a"), AttemptId("b")
G, H = GpuId("g"), GpuId("h")
FILES = (FileRef("0.json", "00" * 32, 12),)


def after(*events: Event) -> TaskRecord:
    """The record after Seen at 1 and these events at 2, 3, ..."""
    return fold(TASK, [(event, Timestamp(n)) for n, event in enumerate((SEEN, *events), 1)])


FETCHED = ParametersFetched("{}")
STARTED = AttemptStarted(A, G)
STORED = ResultStored(A, Score(b"s"), FILES)


def test_a_task_from_first_sight_to_payment() -> None:
    record = after(
        FETCHED,
        STARTED,
        AttemptFailed(A, Fault.DEVICE, "out of memory"),
        AttemptStarted(B, H),
        ResultStored(B, Score(b"s"), FILES),
        Claimed(Claim.SCORE),
        ResultUploaded(),
        Closed(Outcome.SUCCESS, Wei(5)),
    )
    assert record == TaskRecord(
        commitment=TASK,
        account=Address("0xMe"),
        task_type=TaskType.LLM,
        model_ids=(ModelId("base:m"),),
        fee=Wei(9),
        seen_at=Timestamp(1),
        parameters="{}",
        fetched_at=Timestamp(2),
        attempts=(
            Attempt(A, G, Timestamp(3), Timestamp(4), Fault.DEVICE, "out of memory"),
            Attempt(B, H, Timestamp(5), Timestamp(6)),
        ),
        result=Result(B, Score(b"s"), FILES, Timestamp(6)),
        claims=((Claim.SCORE, Timestamp(7)),),
        uploaded_at=Timestamp(8),
        outcome=Outcome.SUCCESS,
        payment=Wei(5),
        closed_at=Timestamp(9),
    )


@pytest.mark.parametrize(
    ("events", "progress"),
    [
        ((), Progress.NEW),
        ((Claimed(Claim.ABORT),), Progress.NEW),
        ((FETCHED,), Progress.READY),
        ((FETCHED, STARTED), Progress.RUNNING),
        ((FETCHED, STARTED, AttemptFailed(A, Fault.LOST, "")), Progress.READY),
        ((FETCHED, STARTED, STORED), Progress.COMPUTED),
        ((FETCHED, FaultFound("bad")), Progress.FAULTY),
        ((FETCHED, STARTED, FaultFound("bad")), Progress.FAULTY),
        ((FETCHED, STARTED, STORED, ResultUploaded()), Progress.DELIVERED),
        ((Closed(Outcome.LOST, Wei(0)),), Progress.CLOSED),
        ((FETCHED, STARTED, STORED, Closed(Outcome.ABORTED, Wei(0))), Progress.CLOSED),
    ],
)
def test_progress(events: tuple[Event, ...], progress: Progress) -> None:
    assert after(*events).progress is progress


def test_a_fault_found_ends_the_attempt() -> None:
    record = after(FETCHED, STARTED, FaultFound("bad"))
    assert (record.open_attempt, record.fault) == (None, "bad")
    assert record.attempts == (Attempt(A, G, Timestamp(3), Timestamp(4)),)


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ((), SEEN),
        ((), STARTED),
        ((), FaultFound("bad")),
        ((), ResultUploaded()),
        ((FETCHED,), FETCHED),
        ((FETCHED,), STORED),
        ((FETCHED,), AttemptFailed(A, Fault.LOST, "")),
        ((FETCHED, STARTED), AttemptStarted(B, H)),
        ((FETCHED, STARTED), ResultStored(B, Score(b"s"), ())),
        ((FETCHED, STARTED), AttemptFailed(B, Fault.LOST, "")),
        ((FETCHED, STARTED), Closed(Outcome.ABORTED, Wei(0))),
        ((FETCHED, STARTED, AttemptFailed(A, Fault.LOST, "")), STARTED),
        ((FETCHED, STARTED, AttemptFailed(A, Fault.LOST, "")), STORED),
        ((FETCHED, STARTED, STORED), ResultStored(A, Score(b"t"), ())),
        ((FETCHED, STARTED, STORED), FaultFound("bad")),
        ((FETCHED, STARTED, STORED), AttemptStarted(B, H)),
        ((FETCHED, STARTED, FaultFound("bad")), STORED),
        ((FETCHED, STARTED, STORED, ResultUploaded()), ResultUploaded()),
        ((Closed(Outcome.LOST, Wei(0)),), Closed(Outcome.LOST, Wei(0))),
        ((Closed(Outcome.LOST, Wei(0)),), Claimed(Claim.ABORT)),
        # claims
        ((FETCHED,), Claimed(Claim.SCORE)),
        ((FETCHED, STARTED), Claimed(Claim.ERROR)),
        ((FETCHED, STARTED, STORED), Claimed(Claim.ERROR)),
        ((FETCHED, FaultFound("bad")), Claimed(Claim.SCORE)),
        ((FETCHED, STARTED, STORED, Claimed(Claim.SCORE)), Claimed(Claim.SCORE)),
        ((FETCHED, STARTED, STORED, Claimed(Claim.SCORE)), Claimed(Claim.ERROR)),
        ((FETCHED, FaultFound("bad"), Claimed(Claim.ERROR)), Claimed(Claim.SCORE)),
        ((Claimed(Claim.ABORT),), Claimed(Claim.ABORT)),
    ],
)
def test_what_cannot_be_is_refused(before: tuple[Event, ...], event: Event) -> None:
    record = after(*before)
    with pytest.raises(IllegalMove):
        apply(record, event, Timestamp(99))


def test_an_abort_may_be_claimed_beside_an_answer() -> None:
    record = after(FETCHED, STARTED, STORED, Claimed(Claim.SCORE), Claimed(Claim.ABORT))
    assert record.claimed(Claim.SCORE) and record.claimed(Claim.ABORT)


@pytest.mark.parametrize("events", [(), (FETCHED,), (FETCHED, SEEN), (SEEN, SEEN)])
def test_a_history_begins_with_its_only_seen(events: tuple[Event, ...]) -> None:
    with pytest.raises(IllegalMove):
        fold(TASK, [(event, Timestamp(1)) for event in events])


events = st.one_of(
    st.just(FETCHED),
    st.builds(AttemptStarted, st.sampled_from([A, B, AttemptId("c")]), st.sampled_from([G, H])),
    st.builds(AttemptFailed, st.sampled_from([A, B]), st.sampled_from(Fault), st.just("")),
    st.builds(
        ResultStored,
        st.sampled_from([A, B]),
        st.sampled_from([Score(b"s"), Score(b"t")]),
        st.just(FILES),
    ),
    st.just(FaultFound("bad")),
    st.builds(Claimed, st.sampled_from(Claim)),
    st.just(ResultUploaded()),
    st.builds(Closed, st.sampled_from(Outcome), st.just(Wei(1))),
)


@given(st.lists(events, max_size=40))
def test_a_record_only_grows(history: list[Event]) -> None:
    """Refused events leave no trace; what was set stays; the rest of design.md rule 2 follows."""
    record = begin(TASK, SEEN, Timestamp(0))
    kept: list[tuple[Event, Timestamp]] = [(SEEN, Timestamp(0))]
    for at, event in enumerate(history, 1):
        before = record
        try:
            record = apply(record, event, Timestamp(at))
        except IllegalMove:
            continue
        assert before.progress in ALLOWED[type(event)]
        kept.append((event, Timestamp(at)))
        for name in ("parameters", "result", "fault", "uploaded_at", "outcome", "closed_at"):
            was = getattr(before, name)
            assert was is None or getattr(record, name) == was
        assert record.claims[: len(before.claims)] == before.claims
        assert len(record.attempts) >= len(before.attempts)
        assert sum(attempt.ended_at is None for attempt in record.attempts) <= 1
        assert record.result is None or record.fault is None
        assert not (record.claimed(Claim.SCORE) and record.claimed(Claim.ERROR))
    assert fold(TASK, kept) == record
