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
    """The stages whose both ends the record has, in their order; of attempts, the last one's."""
    first = record.attempts[0].started_at if record.attempts else None
    stored = None if record.result is None else record.result.stored_at
    loading, loaded = _effort(record)
    claimed = record.claimed_at(Claim.SCORE)
    stands = record.noticed_at(task.Stage.ANSWERED)
    wanted = record.noticed_at(task.Stage.WANTED)
    ends: tuple[tuple[Stage, Timestamp | None, Timestamp | None], ...] = (
        ("seen", record.started_at, record.seen_at),
        ("parameters", record.seen_at, record.fetched_at),
        ("queue", record.fetched_at, first),
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


def _effort(record: TaskRecord) -> tuple[Timestamp | None, Timestamp | None]:
    """When the card of the result began, and when it had the models."""
    result = record.result
    if result is None or result.effort is None:
        return None, None
    began = Timestamp(result.stored_at - result.effort.seconds)
    return began, Timestamp(began + result.effort.load_seconds)
