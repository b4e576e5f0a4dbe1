"""What to do next for a task: the condition table is the specification.

`decide` looks at the facts (what the network says), the record (what we did) and the clock, finds
the row of `TABLE` for (stage, progress), and takes the first rule whose condition holds. It never
remembers anything: called again after a crash, a lost answer or a repeated fact, it says what is
right now. docs/lifecycle.md is generated from this table.

        stage (the network)        progress (we)
        STARTED ─ ANSWERABLE ─ ANSWERED ─ WANTED ─ ENDED
        NEW ─ READY ⇄ RUNNING ─ COMPUTED | FAULTY ─ DELIVERED ─ CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.core.record import Claim, Fault, Outcome, Progress, TaskRecord
from cluster.core.types import (
    AbortReason,
    AttemptId,
    GpuId,
    Score,
    Stage,
    TaskError,
    TaskFacts,
    TaskStatus,
    Timestamp,
    Wei,
)


class WriteState(enum.Enum):
    """Where a claimed write stands."""

    OPEN = "open"
    """Stored, perhaps sent; its fate isn't known yet."""
    DONE = "done"
    """The network has taken it."""
    REFUSED = "refused"
    """The network would not, or did not, take it; facts say why and what follows."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's choices, in seconds unless said otherwise.

    `abort_margin`: how long after the deadline an unanswered task is aborted (clocks differ).
    `answer_grace`: how much longer an answered or validated one is waited for: its money is near.
    `max_attempts`: executions of one task before we let it time out.
    `retry_backoff`: wait before the second attempt, doubled for each further one.
    """

    abort_margin: float = 2.0
    answer_grace: float = 60.0
    max_attempts: int = 4
    retry_backoff: float = 1.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision sees. `facts` is None when the network knows no such task."""

    facts: TaskFacts | None
    record: TaskRecord
    now: Timestamp
    """The network's clock."""
    policy: Policy
    writes: Mapping[Claim, WriteState] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        facts = self.facts
        if facts is None or facts.selected_node != self.record.account:
            return Stage.LOST
        return facts.stage


@dataclass(frozen=True, slots=True)
class FetchParameters:
    pass


@dataclass(frozen=True, slots=True)
class Execute:
    """Find a GPU that fits, none of `avoid` if another does, and start an attempt.

    `outgrown` are those to avoid whose memory was too small: a larger one, if any fits.
    """

    avoid: frozenset[GpuId]
    outgrown: frozenset[GpuId] = frozenset()


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    attempt_id: AttemptId
    gpu_id: GpuId


@dataclass(frozen=True, slots=True)
class SubmitScore:
    score: Score


@dataclass(frozen=True, slots=True)
class ReportError:
    error: TaskError


@dataclass(frozen=True, slots=True)
class UploadResult:
    pass


@dataclass(frozen=True, slots=True)
class Abort:
    reason: AbortReason


@dataclass(frozen=True, slots=True)
class Close:
    outcome: Outcome
    payment: Wei


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until `until` (None: until a fact changes)."""

    why: str
    until: Timestamp | None = None


Action = (
    FetchParameters
    | Execute
    | CancelAttempt
    | SubmitScore
    | ReportError
    | UploadResult
    | Abort
    | Close
    | Wait
)


@dataclass(frozen=True, slots=True)
class Condition:
    name: str
    holds: Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    act: Callable[[Situation], Action]


@dataclass(frozen=True, slots=True)
class Rule:
    when: Condition
    then: Step


# --- conditions ---------------------------------------------------------------------------------


def _past(situation: Situation, extra: float) -> bool:
    facts = situation.facts
    return (
        facts is not None
        and facts.deadline is not None
        and situation.now >= facts.deadline + situation.policy.abort_margin + extra
    )


def _abortable(situation: Situation) -> bool:
    """The network lets us abort, and no abort of ours is on its way."""
    return (
        situation.facts is not None
        and situation.facts.abortable
        and situation.writes.get(Claim.ABORT) is not WriteState.OPEN
    )


def _write_open(claim: Claim) -> Callable[[Situation], bool]:
    """Sent, or taken already while the facts, read earlier, don't show it yet."""
    return lambda situation: situation.writes.get(claim) in {WriteState.OPEN, WriteState.DONE}


def retry_at(record: TaskRecord, policy: Policy) -> Timestamp:
    """When the next attempt may start; in the past when there was none that failed."""
    failed = [a for a in record.attempts if a.ended_at is not None]
    if not failed or failed[-1].ended_at is None:
        return Timestamp(0)
    return Timestamp(failed[-1].ended_at + policy.retry_backoff * 2.0 ** min(len(failed) - 1, 16))


def _out_of_attempts(situation: Situation) -> bool:
    attempts = situation.record.attempts
    return len(attempts) >= situation.policy.max_attempts or any(
        attempt.fault is Fault.UNSUPPORTED for attempt in attempts
    )


def _score_stands_as_computed(situation: Situation) -> bool:
    facts, result = situation.facts, situation.record.result
    return facts is not None and result is not None and facts.score == result.score


ALWAYS = Condition("always", lambda _: True)
PAST_DEADLINE = Condition("past the deadline", lambda s: _past(s, 0.0))
PAST_DEADLINE_ABORTABLE = Condition(
    "past the deadline, abort allowed", lambda s: _past(s, 0.0) and _abortable(s)
)
PAST_GRACE_ABORTABLE = Condition(
    "past deadline and grace, abort allowed",
    lambda s: _past(s, s.policy.answer_grace) and _abortable(s),
)
OUT_OF_ATTEMPTS = Condition("no attempt left", _out_of_attempts)
BACKING_OFF = Condition(
    "backing off after a failed attempt", lambda s: s.now < retry_at(s.record, s.policy)
)
SCORE_WRITE_OPEN = Condition("the score is on its way", _write_open(Claim.SCORE))
ERROR_WRITE_OPEN = Condition("the report is on its way", _write_open(Claim.ERROR))
SCORE_MATCHES = Condition("the score on the network is ours", _score_stands_as_computed)
A_SCORE_STANDS = Condition(
    "a score stands on the network", lambda s: s.facts is not None and s.facts.score != b""
)
EVIDENCE_WANTED = Condition(
    "the network wants the files as evidence",
    lambda s: (
        s.facts is not None
        and s.facts.evidence_wanted
        and _score_stands_as_computed(s)
        and not _past(s, 0.0)
    ),
)

# --- steps --------------------------------------------------------------------------------------


def _next_threshold(situation: Situation, *times: float) -> Timestamp | None:
    """The first of `times` that is still to come: when time alone may change the decision."""
    return Timestamp(min(ahead)) if (ahead := [t for t in times if t > situation.now]) else None


def _deadlines(situation: Situation) -> tuple[float, ...]:
    """When an unanswered task is late, and when an answered one is."""
    facts, policy = situation.facts, situation.policy
    if facts is None or facts.deadline is None:
        return ()
    late = facts.deadline + policy.abort_margin
    return (late, late + policy.answer_grace)


def work_until(situation: Situation) -> Timestamp | None:
    """Until when an attempt is of use: an answer is late past the deadline, but files that stand in
    for lost ones are worked on for as long as the validated task is waited for."""
    facts = situation.facts
    if facts is None or situation.stage not in {Stage.ANSWERED, Stage.WANTED}:
        return None if facts is None else facts.deadline
    times = _deadlines(situation)
    return Timestamp(times[-1]) if times else None


def _wait_for_deadline(why: str, grace: bool = False) -> Step:
    def act(situation: Situation) -> Action:
        times = _deadlines(situation)
        return Wait(why, _next_threshold(situation, *(times[1:] if grace else times[:1])))

    return Step(f"Wait: {why}", act)


def _back_off(situation: Situation) -> Action:
    again = retry_at(situation.record, situation.policy)
    return Wait("backing off", _next_threshold(situation, again, *_deadlines(situation)))


def _execute(situation: Situation) -> Action:
    def cards(*faults: Fault) -> frozenset[GpuId]:
        return frozenset(a.gpu_id for a in situation.record.attempts if a.fault in faults)

    failed = cards(Fault.DEVICE, Fault.MEMORY, Fault.LOST, Fault.MODEL)
    return Execute(failed, cards(Fault.MEMORY))


def _cancel(situation: Situation) -> Action:
    attempt = situation.record.open_attempt
    assert attempt is not None, "the row is for records with an open attempt"  # noqa: S101
    return CancelAttempt(attempt.attempt_id, attempt.gpu_id)


def _submit(situation: Situation) -> Action:
    assert situation.record.result is not None, "the row is for computed records"  # noqa: S101
    return SubmitScore(situation.record.result.score)


_OUTCOMES = {
    TaskStatus.END_SUCCESS: Outcome.SUCCESS,
    TaskStatus.END_GROUP_SUCCESS: Outcome.GROUP_SUCCESS,
    TaskStatus.END_GROUP_REFUND: Outcome.GROUP_REFUND,
    TaskStatus.END_ABORTED: Outcome.ABORTED,
    TaskStatus.END_INVALIDATED: Outcome.INVALIDATED,
}


def _close(situation: Situation) -> Action:
    facts = situation.facts
    if facts is None or situation.stage is Stage.LOST:
        return Close(Outcome.LOST, Wei(0))
    return Close(_OUTCOMES[facts.status], facts.payment)


FETCH = Step("FetchParameters", lambda _: FetchParameters())
EXECUTE = Step("Execute", _execute)
CANCEL = Step("CancelAttempt", _cancel)
SUBMIT = Step("SubmitScore", _submit)
REPORT = Step("ReportError", lambda _: ReportError(TaskError.PARAMETERS_VALIDATION_FAILED))
UPLOAD = Step("UploadResult", lambda _: UploadResult())
ABORT = Step("Abort", lambda _: Abort(AbortReason.TIMEOUT))
CLOSE = Step("Close", _close)
BACK_OFF = Step("Wait: backing off", _back_off)
COMPUTING = _wait_for_deadline("computing")
REMAKING = _wait_for_deadline("computing", grace=True)
FOR_ANSWERABLE = _wait_for_deadline("until the network takes answers")
FOR_TIMEOUT = _wait_for_deadline("for the timeout")
FOR_WRITE = _wait_for_deadline("for the write to land", grace=True)
FOR_VERDICT = _wait_for_deadline("for the validation", grace=True)
FOR_PAYMENT = _wait_for_deadline("for the payment", grace=True)
NOTHING = Step("Wait: closed", lambda _: Wait("closed"))

# --- the table ----------------------------------------------------------------------------------

Cell = tuple[Rule, ...]

_ABORT_LATE = Rule(PAST_DEADLINE_ABORTABLE, ABORT)
_ABORT_VERY_LATE = Rule(PAST_GRACE_ABORTABLE, ABORT)
_WAIT_LATE = Rule(PAST_DEADLINE, FOR_TIMEOUT)

_fetch: Cell = (_ABORT_LATE, _WAIT_LATE, Rule(ALWAYS, FETCH))
_run: Cell = (
    _ABORT_LATE,
    _WAIT_LATE,
    Rule(OUT_OF_ATTEMPTS, FOR_TIMEOUT),
    Rule(BACKING_OFF, BACK_OFF),
    Rule(ALWAYS, EXECUTE),
)
_running: Cell = (Rule(PAST_DEADLINE, CANCEL), Rule(ALWAYS, COMPUTING))
_hold: Cell = (_ABORT_LATE, Rule(ALWAYS, FOR_ANSWERABLE))
_verdict: Cell = (_ABORT_VERY_LATE, Rule(ALWAYS, FOR_VERDICT))
_payment: Cell = (_ABORT_VERY_LATE, Rule(ALWAYS, FOR_PAYMENT))
_close_now: Cell = (Rule(ALWAYS, CLOSE),)
_stop: Cell = (Rule(ALWAYS, CANCEL),)


def _answer(open_write: Condition, write: Step) -> Cell:
    """Deliver an answer while there is time; once on its way, give it the grace to land."""
    return (
        _ABORT_VERY_LATE,
        Rule(open_write, FOR_WRITE),
        _ABORT_LATE,
        _WAIT_LATE,
        Rule(ALWAYS, write),
    )


# A score stands but we hold no files (the journal was lost): make them again, they are the same.
_recover_fetch: Cell = (
    _ABORT_VERY_LATE,
    Rule(A_SCORE_STANDS, FETCH),
    Rule(ALWAYS, FOR_VERDICT),
)
_recover_run: Cell = (
    _ABORT_VERY_LATE,
    Rule(OUT_OF_ATTEMPTS, FOR_VERDICT),
    Rule(BACKING_OFF, BACK_OFF),
    Rule(A_SCORE_STANDS, EXECUTE),
    Rule(ALWAYS, FOR_VERDICT),
)
_recover_running: Cell = (
    Rule(PAST_GRACE_ABORTABLE, CANCEL),
    Rule(A_SCORE_STANDS, REMAKING),
    Rule(ALWAYS, CANCEL),
)

TABLE: Mapping[tuple[Stage, Progress], Cell] = {
    (Stage.STARTED, Progress.NEW): _fetch,
    (Stage.STARTED, Progress.READY): _run,
    (Stage.STARTED, Progress.RUNNING): _running,
    (Stage.STARTED, Progress.COMPUTED): _hold,
    (Stage.STARTED, Progress.FAULTY): _hold,
    (Stage.STARTED, Progress.DELIVERED): _hold,
    (Stage.ANSWERABLE, Progress.NEW): _fetch,
    (Stage.ANSWERABLE, Progress.READY): _run,
    (Stage.ANSWERABLE, Progress.RUNNING): _running,
    (Stage.ANSWERABLE, Progress.COMPUTED): _answer(SCORE_WRITE_OPEN, SUBMIT),
    (Stage.ANSWERABLE, Progress.FAULTY): _answer(ERROR_WRITE_OPEN, REPORT),
    (Stage.ANSWERABLE, Progress.DELIVERED): _answer(SCORE_WRITE_OPEN, SUBMIT),
    (Stage.ANSWERED, Progress.NEW): _recover_fetch,
    (Stage.ANSWERED, Progress.READY): _recover_run,
    (Stage.ANSWERED, Progress.RUNNING): _recover_running,
    (Stage.ANSWERED, Progress.COMPUTED): _verdict,
    (Stage.ANSWERED, Progress.FAULTY): _verdict,
    (Stage.ANSWERED, Progress.DELIVERED): _verdict,
    (Stage.WANTED, Progress.NEW): _recover_fetch,
    (Stage.WANTED, Progress.READY): _recover_run,
    (Stage.WANTED, Progress.RUNNING): _recover_running,
    (Stage.WANTED, Progress.COMPUTED): (
        _ABORT_VERY_LATE,
        Rule(SCORE_MATCHES, UPLOAD),
        Rule(ALWAYS, FOR_PAYMENT),
    ),
    (Stage.WANTED, Progress.FAULTY): _payment,
    (Stage.WANTED, Progress.DELIVERED): _payment,
    (Stage.ENDED, Progress.NEW): _close_now,
    (Stage.ENDED, Progress.READY): _close_now,
    (Stage.ENDED, Progress.RUNNING): _stop,
    (Stage.ENDED, Progress.COMPUTED): (Rule(EVIDENCE_WANTED, UPLOAD), Rule(ALWAYS, CLOSE)),
    (Stage.ENDED, Progress.FAULTY): _close_now,
    (Stage.ENDED, Progress.DELIVERED): _close_now,
    (Stage.LOST, Progress.NEW): _close_now,
    (Stage.LOST, Progress.READY): _close_now,
    (Stage.LOST, Progress.RUNNING): _stop,
    (Stage.LOST, Progress.COMPUTED): _close_now,
    (Stage.LOST, Progress.FAULTY): _close_now,
    (Stage.LOST, Progress.DELIVERED): _close_now,
    **{(stage, Progress.CLOSED): (Rule(ALWAYS, NOTHING),) for stage in Stage},
}


def rule_for(situation: Situation) -> Rule:
    """The first rule of the cell whose condition holds; a cell's last rule always does."""
    cell = TABLE[(situation.stage, situation.record.progress)]
    return next(rule for rule in cell if rule.when.holds(situation))


def decide(situation: Situation) -> Action:
    """The one action for this task now."""
    return rule_for(situation).then.act(situation)
