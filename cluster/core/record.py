"""What this operator has done for a task: a history of events and the record they fold into.

The journal keeps the events, append-only, each written before the effect it announces; a record is
nothing but their fold, so it only grows and a crash loses nothing. An event that the lifecycle
doesn't allow after those before it raises `IllegalMove`: a second score, an error report after a
score, or a second attempt while one is open can't even be written down.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.core.errors import IllegalMove
from cluster.core.types import (
    Address,
    AttemptId,
    CardUuid,
    Commitment,
    Effort,
    FileRef,
    GpuId,
    ModelId,
    Score,
    Stage,
    TaskType,
    Timestamp,
    Wei,
)


class Fault(enum.Enum):
    """Why an attempt gave no result. None of these is ever reported to the network."""

    DEVICE = "device"
    """The card or our code on it failed: try another card."""
    MEMORY = "memory"
    """The card's memory was too small for the task: try a larger card."""
    MODEL = "model"
    """A model couldn't be had on that machine: try again, elsewhere if possible."""
    UNSUPPORTED = "unsupported"
    """We don't run such tasks: no further attempt."""
    LOST = "lost"
    """The GPU actor died or forgot the attempt."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class Claim(enum.Enum):
    """A write to the network. Of the first two, the task's answer, only one is ever made."""

    SCORE = "score"
    ERROR = "error"
    ABORT = "abort"


class Outcome(enum.Enum):
    """How a task ended for us."""

    SUCCESS = "EndSuccess"
    GROUP_SUCCESS = "EndGroupSuccess"
    GROUP_REFUND = "EndGroupRefund"
    ABORTED = "EndAborted"
    INVALIDATED = "EndInvalidated"
    LOST = "Lost"


@dataclass(frozen=True, slots=True)
class Seen:
    """`started_at`: when the network gave us the task, as it says."""

    account: Address
    task_type: TaskType
    model_ids: tuple[ModelId, ...]
    fee: Wei
    started_at: Timestamp | None = None


@dataclass(frozen=True, slots=True)
class ParametersFetched:
    """`parameters` is the JSON text, opened if it came in an envelope; not yet validated."""

    parameters: str


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    attempt_id: AttemptId
    gpu_id: GpuId


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    attempt_id: AttemptId
    fault: Fault
    detail: str


@dataclass(frozen=True, slots=True)
class ResultStored:
    """The files are in `artifacts` already; the score never changes from here on. `card` computed
    it: what a GPU is called here is another card's name tomorrow."""

    attempt_id: AttemptId
    score: Score
    files: tuple[FileRef, ...]
    effort: Effort | None = None
    card: CardUuid | None = None


@dataclass(frozen=True, slots=True)
class FaultFound:
    """The fault is certainly in the task (`TaskInvalid`): the one ground for an error report."""

    reason: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Written before the network hears of it."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Noticed:
    """The network was first seen to be that far. For the task's story alone: no decision reads it,
    because facts are read and never remembered."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class ResultUploaded:
    pass


@dataclass(frozen=True, slots=True)
class Closed:
    outcome: Outcome
    payment: Wei


Event = (
    Seen
    | ParametersFetched
    | AttemptStarted
    | AttemptFailed
    | ResultStored
    | FaultFound
    | Claimed
    | Noticed
    | ResultUploaded
    | Closed
)


class Progress(enum.Enum):
    """How far we are with a task, derived from its record."""

    NEW = "new"
    """No parameters yet."""
    READY = "ready"
    """Parameters in hand, nothing computing, no result."""
    RUNNING = "running"
    """An attempt is open on a GPU."""
    COMPUTED = "computed"
    """Score and files are stored."""
    FAULTY = "faulty"
    """The fault is certainly in the task."""
    DELIVERED = "delivered"
    """The relay has taken the files."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Attempt:
    attempt_id: AttemptId
    gpu_id: GpuId
    started_at: Timestamp
    ended_at: Timestamp | None = None
    fault: Fault | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    attempt_id: AttemptId
    score: Score
    files: tuple[FileRef, ...]
    stored_at: Timestamp
    effort: Effort | None = None
    card: CardUuid | None = None
    """None, as the effort, in what an older version stored."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    commitment: Commitment
    account: Address
    task_type: TaskType
    model_ids: tuple[ModelId, ...]
    fee: Wei
    seen_at: Timestamp
    started_at: Timestamp | None = None
    parameters: str | None = None
    fetched_at: Timestamp | None = None
    """When the parameters came."""
    attempts: tuple[Attempt, ...] = ()
    result: Result | None = None
    fault: str | None = None
    claims: tuple[tuple[Claim, Timestamp], ...] = ()
    noticed: tuple[tuple[Stage, Timestamp], ...] = ()
    uploaded_at: Timestamp | None = None
    outcome: Outcome | None = None
    payment: Wei = Wei(0)
    closed_at: Timestamp | None = None

    @property
    def progress(self) -> Progress:
        if self.outcome is not None:
            return Progress.CLOSED
        if self.uploaded_at is not None:
            return Progress.DELIVERED
        if self.result is not None:
            return Progress.COMPUTED
        if self.fault is not None:
            return Progress.FAULTY
        if self.open_attempt is not None:
            return Progress.RUNNING
        return Progress.NEW if self.parameters is None else Progress.READY

    @property
    def open_attempt(self) -> Attempt | None:
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.ended_at is None else None

    def claimed(self, claim: Claim) -> bool:
        return any(made is claim for made, _ in self.claims)

    def claimed_at(self, claim: Claim) -> Timestamp | None:
        return next((at for made, at in self.claims if made is claim), None)

    def noticed_at(self, stage: Stage) -> Timestamp | None:
        return next((at for seen, at in self.noticed if seen is stage), None)


def begin(commitment: Commitment, seen: Seen, at: Timestamp) -> TaskRecord:
    """The record of a task first seen at `at`."""
    return TaskRecord(
        commitment, seen.account, seen.task_type, seen.model_ids, seen.fee, at, seen.started_at
    )


def fold(commitment: Commitment, history: Iterable[tuple[Event, Timestamp]]) -> TaskRecord:
    """The record after `history`; raises `IllegalMove` when the history can't be."""
    events = iter(history)
    first, at = next(events, (None, Timestamp(0)))
    if not isinstance(first, Seen):
        raise IllegalMove(f"{commitment}: a history begins with Seen, not {type(first).__name__}")
    record = begin(commitment, first, at)
    for event, when in events:
        record = apply(record, event, when)
    return record


ALLOWED: dict[type[Event], frozenset[Progress]] = {
    Seen: frozenset({Progress.CLOSED}),
    ParametersFetched: frozenset({Progress.NEW}),
    AttemptStarted: frozenset({Progress.READY}),
    AttemptFailed: frozenset({Progress.RUNNING}),
    ResultStored: frozenset({Progress.RUNNING}),
    FaultFound: frozenset({Progress.READY, Progress.RUNNING}),
    Claimed: frozenset(Progress) - {Progress.CLOSED},
    Noticed: frozenset(Progress) - {Progress.CLOSED},
    ResultUploaded: frozenset({Progress.COMPUTED}),
    Closed: frozenset(Progress) - {Progress.CLOSED, Progress.RUNNING},
}
"""Where each event may stand: the record's own state machine.

`Seen` on a closed record opens it again: the network takes back what it said (a reorganisation, an
endpoint that lagged). All that was done stays done, so no answer is ever given twice.
"""


def apply(record: TaskRecord, event: Event, at: Timestamp) -> TaskRecord:
    """`record` after `event`; raises `IllegalMove` where `ALLOWED` or the claim rule forbids it."""
    if record.progress not in ALLOWED[type(event)]:
        # Not the event itself: its parameters are someone's prompt.
        what = type(event).__name__
        raise IllegalMove(f"{record.commitment}: {what} while {record.progress.value}")
    match event:
        case Seen(account):
            if account != record.account and record.claims:
                raise IllegalMove(f"{record.commitment}: answered as {record.account} already")
            return replace(record, account=account, outcome=None, payment=Wei(0), closed_at=None)
        case ParametersFetched(parameters):
            return replace(record, parameters=parameters, fetched_at=at)
        case AttemptStarted(attempt_id, gpu_id):
            return _begin_attempt(record, attempt_id, gpu_id, at)
        case AttemptFailed(attempt_id, fault, detail):
            return _end_attempt(record, attempt_id, at, fault, detail)
        case ResultStored(attempt_id, score, files, effort, card):
            ended = _end_attempt(record, attempt_id, at, None, "")
            return replace(ended, result=Result(attempt_id, score, files, at, effort, card))
        case FaultFound(reason):
            attempt = record.open_attempt
            ended = record
            if attempt is not None:
                ended = _end_attempt(record, attempt.attempt_id, at, None, "")
            return replace(ended, fault=reason)
        case _:
            return _apply_ending(record, event, at)


def _apply_ending(
    record: TaskRecord, event: Claimed | Noticed | ResultUploaded | Closed, at: Timestamp
) -> TaskRecord:
    match event:
        case Claimed(claim):
            _check_claim(record, claim)
            return replace(record, claims=(*record.claims, (claim, at)))
        case Noticed(stage):
            if record.noticed_at(stage) is not None:
                return record
            return replace(record, noticed=(*record.noticed, (stage, at)))
        case ResultUploaded():
            return replace(record, uploaded_at=at)
        case Closed(outcome, payment):
            return replace(record, outcome=outcome, payment=payment, closed_at=at)


def _begin_attempt(
    record: TaskRecord, attempt_id: AttemptId, gpu_id: GpuId, at: Timestamp
) -> TaskRecord:
    if any(attempt.attempt_id == attempt_id for attempt in record.attempts):
        raise IllegalMove(f"{record.commitment}: attempt {attempt_id} began twice")
    return replace(record, attempts=(*record.attempts, Attempt(attempt_id, gpu_id, at)))


def _end_attempt(
    record: TaskRecord, attempt_id: AttemptId, at: Timestamp, fault: Fault | None, detail: str
) -> TaskRecord:
    attempt = record.open_attempt
    if attempt is None or attempt.attempt_id != attempt_id:
        raise IllegalMove(f"{record.commitment}: attempt {attempt_id} is not the open one")
    ended = replace(attempt, ended_at=at, fault=fault, detail=detail)
    return replace(record, attempts=(*record.attempts[:-1], ended))


def _check_claim(record: TaskRecord, claim: Claim) -> None:
    legal = {
        Claim.SCORE: record.result is not None and not record.claimed(Claim.ERROR),
        Claim.ERROR: record.fault is not None and not record.claimed(Claim.SCORE),
        Claim.ABORT: True,
    }[claim]
    if record.claimed(claim) or not legal:
        raise IllegalMove(f"{record.commitment}: claim {claim.value} on {record.claims!r}")
