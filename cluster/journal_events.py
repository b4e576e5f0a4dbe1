"""The events of a task's history as JSON, by names that stay when a class is renamed."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    FaultFound,
    Noticed,
    Outcome,
    ParametersFetched,
    ResultStored,
    ResultUploaded,
    Seen,
)
from cluster.core.types import Effort, FileRef, Score, Stage, TaskType, Tier

KINDS: dict[str, type[Event]] = {
    "seen": Seen,
    "parameters_fetched": ParametersFetched,
    "attempt_started": AttemptStarted,
    "attempt_failed": AttemptFailed,
    "result_stored": ResultStored,
    "fault_found": FaultFound,
    "claimed": Claimed,
    "noticed": Noticed,
    "result_uploaded": ResultUploaded,
    "closed": Closed,
}
NAMES: dict[type[Event], str] = {kind: name for name, kind in KINDS.items()}

_READERS: Mapping[str, Any] = {
    "task_type": TaskType,
    "claim": Claim,
    "fault": Fault,
    "outcome": Outcome,
    "model_ids": tuple,
    "score": lambda text: Score(bytes.fromhex(text)),
    "files": lambda files: tuple(FileRef(**each) for each in files),
    "stage": Stage,
    "effort": lambda found: found and Effort(**found | {"tier": Tier(found["tier"])}),
}
"""How a field comes back where JSON has no such type."""


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"no JSON form for a {type(value).__name__}")


def encode_event(event: Event) -> tuple[str, str]:
    """The event's kind and JSON body."""
    return NAMES[type(event)], json.dumps(asdict(event), default=_plain, sort_keys=True)


def decode_event(kind: str, body: str) -> Event:
    fields: dict[str, Any] = json.loads(body)
    return KINDS[kind](
        **{name: _READERS.get(name, lambda x: x)(value) for name, value in fields.items()}
    )
