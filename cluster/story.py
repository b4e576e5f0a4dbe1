"""A task's whole story, from any of its ids: every event, attempt, transaction, and its stages.

Read from the journal alone, so it is the same after a restart and long after the end. Parameters
and prompts are left out; a failed attempt's bundle has them, for whoever asks for it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import OutboxRow
from cluster.core.errors import ConfigError
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claimed,
    Closed,
    Event,
    FaultFound,
    Noticed,
    ParametersFetched,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
    fold,
)
from cluster.core.types import Commitment, FileRef, Stage
from cluster.journal import SqlJournal
from cluster.journal_events import NAMES
from cluster.journal_history import LEAST_DIGITS, bundles_of, find_task
from cluster.stages import stages
from cluster.status import View, WeiText


class EventView(View):
    at: float
    kind: str
    """The event's name in the journal, e.g. `attempt_started`."""
    text: str
    """It in words."""
    attempt: str | None = None
    gpu: str | None = None


class AttemptView(View):
    attempt: str
    gpu: str
    started_at: float
    ended_at: float | None = None
    fault: str | None = None
    detail: str = ""


class TransactionView(View):
    write: str
    """What it says: `score`, `error` or `abort`."""
    state: str
    account: str
    nonce: int | None = None
    tx_hash: str | None = None
    replaced: tuple[str, ...] = ()
    """Hashes of those it took the place of."""
    block: int | None = None
    at: float | None = None
    """When its state last changed."""
    sent_at: float | None = None
    """When it was last broadcast."""
    cost: WeiText = "0"
    reason: str = ""
    link: str | None = None
    """To the chain's explorer, where one is configured."""


class FileView(View):
    name: str
    sha256: str
    size: int
    kept: bool = False
    """It is still on the coordinator's disk."""


class TaskStory(View):
    commitment: str
    account: str
    type: str
    models: tuple[str, ...]
    fee: WeiText
    payment: WeiText
    progress: str
    outcome: str | None
    fault: str | None
    score: str | None
    """Hex digits."""
    tier: str | None
    """Where what it needed lay when its card began."""
    seen_at: float
    closed_at: float | None
    stages: Mapping[str, float] = Field(default_factory=dict)
    """Seconds that each stage of its life took, as far as it got."""
    events: tuple[EventView, ...] = ()
    attempts: tuple[AttemptView, ...] = ()
    transactions: tuple[TransactionView, ...] = ()
    files: tuple[FileView, ...] = ()
    bundles: tuple[str, ...] = ()
    """Attempts of which a bundle is kept."""


class UnknownTask(ConfigError):
    """Nothing, or more than one task, is known by that name."""


def find(journal: SqlJournal, name: str) -> Commitment:
    """The task that is meant by a commitment, its first digits, an attempt's id or a transaction's
    hash. Raises `UnknownTask`."""
    with journal.read() as connection:
        found = find_task(connection, name.strip())
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownTask(f"{name}: several tasks begin so; give more digits")
    raise UnknownTask(
        f"{name}: no task is known by it; a commitment, {LEAST_DIGITS} or more of its first "
        "digits, an attempt's id, or a transaction's hash are"
    )


def story_of(
    journal: SqlJournal,
    name: str,
    explorer: str | None = None,
    kept: Callable[[Commitment], frozenset[str]] = lambda _task: frozenset(),
) -> TaskStory:
    """Raises `UnknownTask`. `explorer`: a URL with `{hash}` where a transaction's hash belongs;
    `kept`: the hashes of a task's files that are still there."""
    task = find(journal, name)
    history = journal.story(task)
    record = fold(task, history)
    with journal.read() as connection:
        rows = outbox_rows.of_task(connection, task)
        bundles = bundles_of(connection, task)
    result = record.result
    return TaskStory(
        commitment=task,
        account=record.account,
        type=record.task_type.name,
        models=record.model_ids,
        fee=str(record.fee),
        payment=str(record.payment),
        progress=record.progress.value,
        outcome=None if record.outcome is None else record.outcome.value,
        fault=record.fault,
        score=None if result is None else result.score.hex(),
        tier=None if result is None or result.effort is None else result.effort.tier.value,
        seen_at=record.seen_at,
        closed_at=record.closed_at,
        stages=dict(stages(record)),
        events=tuple(_event(event, at) for event, at in history),
        attempts=_attempts(record),
        transactions=tuple(_transaction(row, explorer) for row in rows),
        files=() if result is None else _files(result.files, kept(task)),
        bundles=tuple(bundle.attempt for bundle in bundles),
    )


def file_of(journal: SqlJournal, name: str, file: str) -> tuple[Commitment, FileRef]:
    """One of the files of a task's result. Raises `UnknownTask` for a file that it hasn't too."""
    task = find(journal, name)
    result = fold(task, journal.story(task)).result
    for ref in () if result is None else result.files:
        if ref.name == file:
            return task, ref
    raise UnknownTask(f"{name}: its result has no file {file}")


def _files(files: tuple[FileRef, ...], kept: frozenset[str]) -> tuple[FileView, ...]:
    return tuple(
        FileView(name=each.name, sha256=each.sha256, size=each.size, kept=each.sha256 in kept)
        for each in files
    )


def bundle_of(journal: SqlJournal, name: str) -> dict[str, Any]:
    """All that was kept of a task's failed attempts, with its parameters, and its story. Raises
    `UnknownTask`."""
    story = story_of(journal, name)
    task = Commitment(story.commitment)
    with journal.read() as connection:
        bundles = bundles_of(connection, task)
    record = fold(task, journal.story(task))
    return {
        "story": story.model_dump(mode="json"),
        "parameters": record.parameters,
        "attempts": [{"attempt": each.attempt, "at": each.at, **each.body} for each in bundles],
    }


def _attempts(record: TaskRecord) -> tuple[AttemptView, ...]:
    return tuple(
        AttemptView(
            attempt=each.attempt_id,
            gpu=each.gpu_id,
            started_at=each.started_at,
            ended_at=each.ended_at,
            fault=None if each.fault is None else each.fault.value,
            detail=each.detail,
        )
        for each in record.attempts
    )


def _transaction(row: OutboxRow, explorer: str | None) -> TransactionView:
    signed, claim = row.signed, row.intent.claim
    link = None
    if explorer is not None and signed is not None:
        link = explorer.replace("{hash}", signed.tx_hash)
    return TransactionView(
        write="" if claim is None else claim.value,
        state=row.state.value,
        account=row.intent.account,
        nonce=None if signed is None else signed.nonce,
        tx_hash=None if signed is None else signed.tx_hash,
        replaced=() if signed is None else signed.replaced,
        block=row.block,
        at=row.updated_at,
        sent_at=row.sent_at,
        cost=str(row.cost),
        reason=row.reason,
        link=link,
    )


_NOTICED = {
    Stage.ANSWERED: "the answer stands on the network",
    Stage.WANTED: "the network has validated it and wants the files",
}


def _event(event: Event, at: float) -> EventView:
    attempt, gpu = getattr(event, "attempt_id", None), getattr(event, "gpu_id", None)
    return EventView(at=at, kind=NAMES[type(event)], text=_words(event), attempt=attempt, gpu=gpu)


def _words(event: Event) -> str:  # noqa: C901 - one line for each kind
    match event:
        case Seen(account):
            return f"the network gave it to {account}"
        case ParametersFetched(parameters):
            return f"its parameters came from the relay ({len(parameters)} characters)"
        case AttemptStarted(attempt, gpu):
            return f"attempt {attempt} began on {gpu}"
        case AttemptFailed(attempt, fault, detail):
            return f"attempt {attempt} failed ({fault.value}): {detail}"
        case ResultStored(attempt, _, files, effort, _):
            took = "" if effort is None else f" in {effort.seconds:.1f} s"
            return f"attempt {attempt} gave {len(files)} files{took}; the score is stored"
        case FaultFound(reason):
            return f"the fault is in the task: {reason}"
        case Claimed(claim):
            return f"the {claim.value} is sent"
        case Noticed(stage):
            return _NOTICED.get(stage, stage.value)
        case ResultUploaded():
            return "the relay has the files"
        case Closed(outcome, payment):
            return f"closed as {outcome.value}, paid {payment} wei"
