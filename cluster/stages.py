"""The stages of a task's life, with when each began and ended, from its record alone."""

from __future__ import annotations

from typing import Literal

from cluster.core import types as task
from cluster.core.record import Claim, TaskRecord
from cluster.core.types import Timestamp

Stage = Literal[
    "seen",
    "parameters",
    "queue",
    "load",
    "compute",
    "score_sent",
    "score_mined",
    "validated",
    "uploaded",
    "paid",
]
"""What a task waits for, in the order of its life: until we saw it, had its parameters, a card took
it, its models were there, it was computed, its score was sent, stood on the network, was validated,
the files were handed over, and it was paid."""


def spans(record: TaskRecord) -> tuple[tuple[Stage, Timestamp, Timestamp], ...]:
    """The stages whose both ends the record has, in their order, each from where the one before it
    ended. A task waits for a card until the attempt that gave the result, or the last one: what was
    tried before is time without a card that can do it."""
    taken = _taken(record)
    stored = None if record.result is None else record.result.stored_at
    loading, loaded = _effort(record)
    claimed = record.claimed_at(Claim.SCORE)
    stands = record.noticed_at(task.Stage.ANSWERED)
    wanted = record.noticed_at(task.Stage.WANTED)
    ends: tuple[tuple[Stage, Timestamp | None, Timestamp | None], ...] = (
        ("seen", record.started_at, record.seen_at),
        ("parameters", record.seen_at, record.fetched_at),
        ("queue", record.fetched_at, taken),
        ("load", loading, loaded),
        ("compute", loaded, stored),
        ("score_sent", stored, claimed),
        ("score_mined", claimed, stands),
        ("validated", stands, wanted),
        ("uploaded", wanted, record.uploaded_at),
        ("paid", record.uploaded_at, record.closed_at),
    )
    return tuple(
        (stage, since, until)
        for stage, since, until in ends
        if since is not None and until is not None
    )


def stages(record: TaskRecord) -> tuple[tuple[Stage, float], ...]:
    """How long each of `spans` took, in seconds."""
    return tuple((stage, until - since) for stage, since, until in spans(record))


def _taken(record: TaskRecord) -> Timestamp | None:
    """When the attempt began that counts."""
    if record.result is None:
        return record.attempts[-1].started_at if record.attempts else None
    made_by = record.result.attempt_id
    return next((a.started_at for a in record.attempts if a.attempt_id == made_by), None)


def _effort(record: TaskRecord) -> tuple[Timestamp | None, Timestamp | None]:
    """When the card of the result began, and when it had the models."""
    result = record.result
    if result is None or result.effort is None:
        return None, None
    began = Timestamp(result.stored_at - result.effort.seconds)
    return began, Timestamp(began + result.effort.load_seconds)
