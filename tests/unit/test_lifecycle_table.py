"""The condition table, row by row, against what is written out here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.lifecycle import (
    ALWAYS,
    TABLE,
    Abort,
    Action,
    CancelAttempt,
    Close,
    Execute,
    FetchParameters,
    Policy,
    ReportError,
    Situation,
    SubmitScore,
    UploadResult,
    Wait,
    WriteState,
    decide,
    retry_at,
    rule_for,
)
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Closed,
    Event,
    Fault,
    FaultFound,
    Outcome,
    ParametersFetched,
    Progress,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
    apply,
    begin,
)
from cluster.core.types import (
    AbortReason,
    Address,
    AttemptId,
    Commitment,
    GigaBytes,
    GpuId,
    Requirement,
    Score,
    Stage,
    TaskError,
    TaskFacts,
    TaskStatus,
    TaskType,
    Timestamp,
    Wei,
)

ME = Address("0xMe")
TASK = Commitment("0x01")
SCORE = Score(b"12345678")
POLICY = Policy(abort_margin=2.0, answer_grace=60.0, max_attempts=4, retry_backoff=1.0)
DEADLINE = Timestamp(1180.0)
NOW = Timestamp(1100.0)
LATE = Timestamp(1182.0)
VERY_LATE = Timestamp(1242.0)

STATUS_OF = {
    Stage.STARTED: TaskStatus.STARTED,
    Stage.ANSWERABLE: TaskStatus.PARAMETERS_UPLOADED,
    Stage.ANSWERED: TaskStatus.SCORE_READY,
    Stage.WANTED: TaskStatus.VALIDATED,
    Stage.ENDED: TaskStatus.END_SUCCESS,
    Stage.LOST: TaskStatus.STARTED,
}

HISTORIES: dict[Progress, tuple[Event, ...]] = {}
_ready = (ParametersFetched("{}"),)
_running = (*_ready, AttemptStarted(AttemptId("a1"), GpuId("g1")))
_computed = (*_running, ResultStored(AttemptId("a1"), SCORE, ()))
HISTORIES[Progress.NEW] = ()
HISTORIES[Progress.READY] = _ready
HISTORIES[Progress.RUNNING] = _running
HISTORIES[Progress.COMPUTED] = _computed
HISTORIES[Progress.FAULTY] = (*_ready, FaultFound("no prompt"))
HISTORIES[Progress.DELIVERED] = (*_computed, ResultUploaded())
HISTORIES[Progress.CLOSED] = (*_computed, Closed(Outcome.SUCCESS, Wei(7)))


def record_in(progress: Progress, *more: Event, at: float = 1050.0) -> TaskRecord:
    record = begin(TASK, Seen(ME, TaskType.SD, (), Wei(7)), Timestamp(1000.0))
    for event in (*HISTORIES[progress], *more):
        record = apply(record, event, Timestamp(at))
    return record


def failed(*faults: Fault) -> list[Event]:
    return [
        event
        for n, fault in enumerate(faults)
        for event in (
            AttemptStarted(AttemptId(f"f{n}"), GpuId(f"h{n}")),
            AttemptFailed(AttemptId(f"f{n}"), fault, ""),
        )
    ]


def facts_in(stage: Stage) -> TaskFacts:
    return TaskFacts(
        commitment=TASK,
        selected_node=ME if stage is not Stage.LOST else Address("0xOther"),
        task_type=TaskType.SD,
        status=STATUS_OF[stage],
        stage=stage,
        requirement=Requirement(GigaBytes(8), "", GigaBytes(0)),
        model_ids=(),
        fee=Wei(7),
        payment=Wei(5),
        score=Score(b""),
        error=TaskError.NONE,
        started_at=Timestamp(1000.0),
        deadline=DEADLINE,
        abortable=True,
    )


def calm(stage: Stage, progress: Progress) -> Situation:
    """Before the deadline, nothing on its way, no score on the network."""
    return Situation(facts_in(stage), record_in(progress), NOW, POLICY)


Tweak = Callable[[Situation], Situation]


def _facts(**changes: object) -> Tweak:
    def tweak(situation: Situation) -> Situation:
        assert situation.facts is not None
        return replace(situation, facts=replace(situation.facts, **changes))  # type: ignore[arg-type]

    return tweak


def _at(now: float) -> Tweak:
    return lambda situation: replace(situation, now=Timestamp(now))


def _after(*faults: Fault) -> Tweak:
    return lambda s: replace(s, record=record_in(s.record.progress, *failed(*faults)))


def _writes(claim: Claim, state: WriteState) -> Tweak:
    return lambda s: replace(s, writes={**s.writes, claim: state})


TWEAKS: dict[str, Tweak] = {
    "calm": lambda situation: situation,
    "late": _at(LATE),
    "very-late": _at(VERY_LATE),
    "stuck": _facts(abortable=False),
    "aborting": _writes(Claim.ABORT, WriteState.OPEN),
    "exhausted": _after(*[Fault.DEVICE] * 4),
    "unsupported": _after(Fault.UNSUPPORTED),
    # The failed attempt ended at 1050, so the second may start at 1051.
    "backing-off": lambda s: replace(_after(Fault.DEVICE)(s), now=Timestamp(1050.5)),
    "score-open": _writes(Claim.SCORE, WriteState.OPEN),
    "error-open": _writes(Claim.ERROR, WriteState.OPEN),
    "scored": _facts(score=SCORE),
    "other-score": _facts(score=Score(b"87654321")),
    "evidence": _facts(score=SCORE, evidence_wanted=True),
}
ACTIONS: dict[str, Action] = {
    "fetch": FetchParameters(),
    "execute": Execute(frozenset()),
    "cancel": CancelAttempt(AttemptId("a1"), GpuId("g1")),
    "submit": SubmitScore(SCORE),
    "report": ReportError(TaskError.PARAMETERS_VALIDATION_FAILED),
    "upload": UploadResult(),
    "abort": Abort(AbortReason.TIMEOUT),
    "close": Close(Outcome.SUCCESS, Wei(5)),
    "close-lost": Close(Outcome.LOST, Wei(0)),
    "wait-closed": Wait("closed"),
    "wait-retry": Wait("backing off", Timestamp(1051.0)),
    "wait-computing": Wait("computing", LATE),
    "wait-remaking": Wait("computing", VERY_LATE),
    "wait-answerable": Wait("until the network takes answers", LATE),
    "wait-timeout": Wait("for the timeout", LATE),
    "wait-timeout-over": Wait("for the timeout"),
    "wait-write": Wait("for the write to land", VERY_LATE),
    "wait-verdict": Wait("for the validation", VERY_LATE),
    "wait-payment": Wait("for the payment", VERY_LATE),
}

# stage, progress, the tweaks that lead to the row, the condition's name, the action
EXPECTED = """
STARTED    NEW       late              | past the deadline, abort allowed       | abort
STARTED    NEW       late stuck        | past the deadline                      | wait-timeout-over
STARTED    NEW       calm              | always                                 | fetch
STARTED    READY     late              | past the deadline, abort allowed       | abort
STARTED    READY     late aborting     | past the deadline                      | wait-timeout-over
STARTED    READY     exhausted         | no attempt left                        | wait-timeout
STARTED    READY     backing-off       | backing off after a failed attempt     | wait-retry
STARTED    READY     calm              | always                                 | execute
STARTED    RUNNING   late              | past the deadline                      | cancel
STARTED    RUNNING   calm              | always                                 | wait-computing
STARTED    COMPUTED  late              | past the deadline, abort allowed       | abort
STARTED    COMPUTED  calm              | always                                 | wait-answerable
STARTED    FAULTY    late              | past the deadline, abort allowed       | abort
STARTED    FAULTY    calm              | always                                 | wait-answerable
STARTED    DELIVERED late              | past the deadline, abort allowed       | abort
STARTED    DELIVERED calm              | always                                 | wait-answerable
STARTED    CLOSED    very-late         | always                                 | wait-closed

ANSWERABLE NEW       late              | past the deadline, abort allowed       | abort
ANSWERABLE NEW       very-late stuck   | past the deadline                      | wait-timeout-over
ANSWERABLE NEW       calm              | always                                 | fetch
ANSWERABLE READY     late              | past the deadline, abort allowed       | abort
ANSWERABLE READY     late stuck        | past the deadline                      | wait-timeout-over
ANSWERABLE READY     unsupported       | no attempt left                        | wait-timeout
ANSWERABLE READY     backing-off       | backing off after a failed attempt     | wait-retry
ANSWERABLE READY     calm              | always                                 | execute
ANSWERABLE RUNNING   late              | past the deadline                      | cancel
ANSWERABLE RUNNING   calm              | always                                 | wait-computing
ANSWERABLE COMPUTED  very-late score-open | past deadline and grace, abort allowed | abort
ANSWERABLE COMPUTED  late score-open   | the score is on its way                | wait-write
ANSWERABLE COMPUTED  late              | past the deadline, abort allowed       | abort
ANSWERABLE COMPUTED  very-late stuck   | past the deadline                      | wait-timeout-over
ANSWERABLE COMPUTED  calm              | always                                 | submit
ANSWERABLE FAULTY    very-late error-open | past deadline and grace, abort allowed | abort
ANSWERABLE FAULTY    late error-open   | the report is on its way               | wait-write
ANSWERABLE FAULTY    late              | past the deadline, abort allowed       | abort
ANSWERABLE FAULTY    late aborting     | past the deadline                      | wait-timeout-over
ANSWERABLE FAULTY    calm              | always                                 | report
ANSWERABLE DELIVERED very-late         | past deadline and grace, abort allowed | abort
ANSWERABLE DELIVERED score-open        | the score is on its way                | wait-write
ANSWERABLE DELIVERED late              | past the deadline, abort allowed       | abort
ANSWERABLE DELIVERED late stuck        | past the deadline                      | wait-timeout-over
ANSWERABLE DELIVERED calm              | always                                 | submit
ANSWERABLE CLOSED    calm              | always                                 | wait-closed

ANSWERED   NEW       very-late scored  | past deadline and grace, abort allowed | abort
ANSWERED   NEW       late scored       | a score stands on the network          | fetch
ANSWERED   NEW       calm              | always                                 | wait-verdict
ANSWERED   READY     very-late scored  | past deadline and grace, abort allowed | abort
ANSWERED   READY     exhausted scored  | no attempt left                        | wait-verdict
ANSWERED   READY     backing-off scored | backing off after a failed attempt    | wait-retry
ANSWERED   READY     late scored       | a score stands on the network          | execute
ANSWERED   READY     late              | always                                 | wait-verdict
ANSWERED   RUNNING   very-late scored  | past deadline and grace, abort allowed | cancel
ANSWERED   RUNNING   late scored       | a score stands on the network          | wait-remaking
ANSWERED   RUNNING   calm              | always                                 | cancel
ANSWERED   COMPUTED  very-late         | past deadline and grace, abort allowed | abort
ANSWERED   COMPUTED  late              | always                                 | wait-verdict
ANSWERED   FAULTY    very-late         | past deadline and grace, abort allowed | abort
ANSWERED   FAULTY    calm              | always                                 | wait-verdict
ANSWERED   DELIVERED very-late         | past deadline and grace, abort allowed | abort
ANSWERED   DELIVERED calm              | always                                 | wait-verdict
ANSWERED   CLOSED    very-late         | always                                 | wait-closed

WANTED     NEW       very-late scored  | past deadline and grace, abort allowed | abort
WANTED     NEW       scored            | a score stands on the network          | fetch
WANTED     NEW       calm              | always                                 | wait-verdict
WANTED     READY     very-late scored  | past deadline and grace, abort allowed | abort
WANTED     READY     unsupported scored | no attempt left                       | wait-verdict
WANTED     READY     backing-off scored | backing off after a failed attempt    | wait-retry
WANTED     READY     scored            | a score stands on the network          | execute
WANTED     READY     calm              | always                                 | wait-verdict
WANTED     RUNNING   very-late scored  | past deadline and grace, abort allowed | cancel
WANTED     RUNNING   scored            | a score stands on the network          | wait-remaking
WANTED     RUNNING   calm              | always                                 | cancel
WANTED     COMPUTED  very-late scored  | past deadline and grace, abort allowed | abort
WANTED     COMPUTED  late scored       | the score on the network is ours       | upload
WANTED     COMPUTED  other-score       | always                                 | wait-payment
WANTED     FAULTY    very-late         | past deadline and grace, abort allowed | abort
WANTED     FAULTY    scored            | always                                 | wait-payment
WANTED     DELIVERED very-late scored  | past deadline and grace, abort allowed | abort
WANTED     DELIVERED scored            | always                                 | wait-payment
WANTED     CLOSED    scored            | always                                 | wait-closed

ENDED      NEW       very-late         | always                                 | close
ENDED      READY     scored            | always                                 | close
ENDED      RUNNING   calm              | always                                 | cancel
ENDED      COMPUTED  evidence          | the network wants the files as evidence | upload
ENDED      COMPUTED  late evidence     | always                                 | close
ENDED      FAULTY    evidence          | always                                 | close
ENDED      DELIVERED evidence          | always                                 | close
ENDED      CLOSED    evidence          | always                                 | wait-closed

LOST       NEW       very-late         | always                                 | close-lost
LOST       READY     calm              | always                                 | close-lost
LOST       RUNNING   calm              | always                                 | cancel
LOST       COMPUTED  scored            | always                                 | close-lost
LOST       FAULTY    calm              | always                                 | close-lost
LOST       DELIVERED scored            | always                                 | close-lost
LOST       CLOSED    calm              | always                                 | wait-closed
"""


def _rows() -> list[tuple[Stage, Progress, int, tuple[str, ...], str, str]]:
    rows = []
    place: Counter[tuple[Stage, Progress]] = Counter()
    for line in filter(str.strip, EXPECTED.splitlines()):
        left, condition, action = (part.strip() for part in line.split("|"))
        stage_name, progress_name, *tweaks = left.split()
        cell = Stage[stage_name], Progress[progress_name]
        rows.append((*cell, place[cell], tuple(tweaks), condition, action))
        place[cell] += 1
    return rows


ROWS = _rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].name}-{row[1].name}-{row[2]}")
def test_row(row: tuple[Stage, Progress, int, tuple[str, ...], str, str]) -> None:
    stage, progress, index, tweaks, condition, action = row
    situation = calm(stage, progress)
    for tweak in tweaks:
        situation = TWEAKS[tweak](situation)
    rule = rule_for(situation)
    assert rule is TABLE[stage, progress][index]
    assert rule.when.name == condition
    expected = ACTIONS[action]
    if action == "execute" and situation.record.attempts:
        expected = Execute(frozenset(a.gpu_id for a in situation.record.attempts))
    assert decide(situation) == expected


def test_every_rule_has_its_row_and_every_cell_an_end() -> None:
    assert set(TABLE) == {(stage, progress) for stage in Stage for progress in Progress}
    assert Counter((row[0], row[1]) for row in ROWS) == {c: len(TABLE[c]) for c in TABLE}
    for cell in TABLE.values():
        assert cell[-1].when is ALWAYS
        assert len({rule.when for rule in cell}) == len(cell), "a rule that can't be reached"


@pytest.mark.parametrize("status", [s for s in TaskStatus if s.name.startswith("END_")])
def test_the_outcome_is_the_final_status(status: TaskStatus) -> None:
    situation = _facts(status=status)(calm(Stage.ENDED, Progress.COMPUTED))
    action = decide(situation)
    assert isinstance(action, Close)
    assert (action.outcome.value, action.payment) == (status.label, 5)


def test_a_task_unknown_to_the_network_is_lost() -> None:
    situation = replace(calm(Stage.ANSWERED, Progress.COMPUTED), facts=None)
    assert situation.stage is Stage.LOST
    assert decide(situation) == Close(Outcome.LOST, Wei(0))


@pytest.mark.parametrize(("now", "aborts"), [(LATE - 0.001, False), (LATE, True)])
def test_the_margin_is_kept_to_the_moment(now: float, aborts: bool) -> None:
    action = decide(_at(now)(calm(Stage.STARTED, Progress.COMPUTED)))
    assert isinstance(action, Abort) is aborts


@pytest.mark.parametrize("state", [WriteState.DONE, WriteState.REFUSED])
def test_an_abort_that_came_to_nothing_is_made_again(state: WriteState) -> None:
    situation = _writes(Claim.ABORT, state)(_at(LATE)(calm(Stage.STARTED, Progress.NEW)))
    assert decide(situation) == Abort(AbortReason.TIMEOUT)


@pytest.mark.parametrize("now", [NOW, LATE])
@pytest.mark.parametrize(
    ("claim", "progress"), [(Claim.SCORE, Progress.COMPUTED), (Claim.ERROR, Progress.FAULTY)]
)
def test_an_answer_taken_is_waited_for_where_the_facts_lag(
    now: float, claim: Claim, progress: Progress
) -> None:
    """Found by the histories: an abort here would take back an answer that just landed."""
    situation = _at(now)(calm(Stage.ANSWERABLE, progress))
    assert decide(_writes(claim, WriteState.DONE)(situation)) == ACTIONS["wait-write"]
    refused = decide(_writes(claim, WriteState.REFUSED)(situation))
    assert isinstance(refused, Abort if now == LATE else SubmitScore | ReportError)


def test_without_a_deadline_nothing_is_ever_late() -> None:
    situation = _at(1e12)(_facts(deadline=None)(calm(Stage.ANSWERED, Progress.COMPUTED)))
    assert decide(situation) == Wait("for the validation")


def test_a_card_that_failed_is_avoided_and_one_that_was_cancelled_is_not() -> None:
    faults = (Fault.DEVICE, Fault.CANCELLED, Fault.MODEL)
    situation = _after(*faults)(calm(Stage.ANSWERABLE, Progress.READY))
    assert decide(situation) == Execute(frozenset({GpuId("h0"), GpuId("h2")}))
    lost = _after(Fault.LOST, Fault.DEADLINE)(calm(Stage.ANSWERABLE, Progress.READY))
    assert decide(lost) == Execute(frozenset({GpuId("h0")}))


def test_a_card_whose_memory_was_too_small_is_outgrown() -> None:
    situation = _after(Fault.MEMORY, Fault.DEVICE)(calm(Stage.ANSWERABLE, Progress.READY))
    both, small = frozenset({GpuId("h0"), GpuId("h1")}), frozenset({GpuId("h0")})
    assert decide(situation) == Execute(both, small)


@pytest.mark.parametrize(("failures", "wait"), [(1, 1.0), (2, 2.0), (3, 4.0)])
def test_the_backoff_doubles(failures: int, wait: float) -> None:
    record = record_in(Progress.READY, *failed(*[Fault.DEVICE] * failures))
    assert retry_at(record, POLICY) == 1050.0 + wait


def test_a_backoff_never_outlasts_the_deadline() -> None:
    record = record_in(Progress.READY, *failed(Fault.DEVICE), at=LATE - 0.5)
    situation = replace(calm(Stage.ANSWERABLE, Progress.READY), record=record)
    assert decide(_at(LATE - 0.4)(situation)) == Wait("backing off", LATE)


situations = st.builds(
    Situation,
    facts=st.builds(
        lambda stage, **changes: replace(facts_in(stage), **changes),
        stage=st.sampled_from(Stage),
        deadline=st.sampled_from([None, DEADLINE]),
        abortable=st.booleans(),
        score=st.sampled_from([Score(b""), SCORE, Score(b"87654321")]),
        evidence_wanted=st.booleans(),
    ),
    record=st.builds(
        lambda progress, faults: record_in(
            progress, *(failed(*faults) if progress is Progress.READY else []), at=1179.5
        ),
        progress=st.sampled_from(Progress),
        faults=st.lists(st.sampled_from(Fault), max_size=5),
    ),
    now=st.sampled_from([1179.6, 1180.0, 1181.0, 1182.0, 1185.0, 1242.0, 1300.0]).map(Timestamp),
    policy=st.just(POLICY),
    writes=st.dictionaries(st.sampled_from(Claim), st.sampled_from(WriteState)),
)


@given(situations)
def test_a_wait_says_when_to_look_again(situation: Situation) -> None:
    """`until` is ahead, and before it (or ever, without one) time alone changes nothing."""
    action = decide(situation)
    if not isinstance(action, Wait):
        return
    assert action.until is None or action.until > situation.now
    edges = [1180.5, 1181.5, 1182.0, 1183.0, 1187.0, 1195.0, 1242.0, 1e6]
    for edge in edges:
        if situation.now < edge < (action.until or 1e9):
            assert isinstance(decide(_at(edge)(situation)), Wait)


@given(situations)
def test_an_answer_needs_its_ground_and_its_stage(situation: Situation) -> None:
    action, record = decide(situation), situation.record
    if isinstance(action, SubmitScore):
        assert situation.stage is Stage.ANSWERABLE
        assert record.result is not None and action.score == record.result.score
    if isinstance(action, ReportError):
        assert situation.stage is Stage.ANSWERABLE
        assert record.fault is not None and record.result is None
    if isinstance(action, Abort):
        assert situation.facts is not None and situation.facts.abortable
        assert situation.facts.deadline is not None
        assert situation.now >= situation.facts.deadline + POLICY.abort_margin
        assert record.progress is not Progress.RUNNING
