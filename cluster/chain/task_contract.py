"""The task contract (VSSTask, protocol.md sections 1 and 2) as a node uses it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from cluster.chain.abi import TASK_ABI
from cluster.chain.contract import (
    NOBODY,
    NOTHING,
    Contract,
    address_of,
    commitment_bytes,
    commitment_of,
)
from cluster.chain.rpc import LAST_TIMESTAMP, Reverted, Rpc
from cluster.core.errors import ChainError
from cluster.core.types import (
    ENDED,
    AbortReason,
    Address,
    Commitment,
    GigaBytes,
    ModelId,
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

STAGES: dict[TaskStatus, Stage] = {
    TaskStatus.QUEUED: Stage.STARTED,
    TaskStatus.STARTED: Stage.STARTED,
    TaskStatus.PARAMETERS_UPLOADED: Stage.ANSWERABLE,
    TaskStatus.ERROR_REPORTED: Stage.ANSWERED,
    TaskStatus.SCORE_READY: Stage.ANSWERED,
    TaskStatus.VALIDATED: Stage.WANTED,
    TaskStatus.GROUP_VALIDATED: Stage.WANTED,
    **dict.fromkeys(ENDED, Stage.ENDED),
}
_UNPAID = frozenset({TaskStatus.END_ABORTED, TaskStatus.END_INVALIDATED})

E = TypeVar("E", bound=enum.IntEnum)


def member(kind: type[E], value: int) -> E:
    """The enum's member; a number outside it means that we don't know this contract."""
    try:
        return kind(value)
    except ValueError as error:
        raise ChainError(f"the chain answered {kind.__name__} {value}") from error


def task_facts(info: Sequence[Any], own: Collection[Address]) -> TaskFacts:
    """`getTask`'s answer as facts; `payment` is what it pays to accounts of our `own`."""
    (task_type, _creator, commitment, _seed, _nonce, _sequence, status, selected) = info[:8]
    (timeout, score, fee, _size, models, min_vram, gpu, gpu_vram) = info[8:16]
    (_version, _reason, error, payees, payments, _created, started, _ready) = info[16:24]
    found = member(TaskStatus, status)
    ended = found in ENDED
    paid = sum(
        amount
        for payee, amount in zip(payees, payments, strict=False)
        if address_of(payee) in own and found not in _UNPAID
    )
    return TaskFacts(
        commitment=commitment_of(commitment),
        selected_node=None
        if found is TaskStatus.QUEUED or selected == NOBODY
        else address_of(selected),
        task_type=member(TaskType, task_type),
        status=found,
        stage=STAGES[found],
        requirement=Requirement(GigaBytes(min_vram), gpu, GigaBytes(gpu_vram)),
        model_ids=tuple(ModelId(model) for model in models),
        fee=Wei(fee),
        payment=Wei(paid),
        score=Score(score),
        error=member(TaskError, error),
        started_at=_when(started) if started else None,
        deadline=_when(started + timeout) if started and not ended else None,
        abortable=not ended,
    )


def _when(seconds: int) -> Timestamp:
    """A task may have any number for its timeout, also one that no clock can reach."""
    return Timestamp(min(seconds, LAST_TIMESTAMP))


class TaskContract(Contract):
    def __init__(self, rpc: Rpc, address: Address) -> None:
        super().__init__(rpc, address, TASK_ABI)

    async def current_task(self, account: Address, block: int) -> Commitment | None:
        found: bytes = await self.read("getNodeTask", account, block=block)
        return None if found == NOTHING else commitment_of(found)

    async def task(
        self, task: Commitment, own: Collection[Address], block: int
    ) -> TaskFacts | None:
        """The task as the operator of the `own` accounts sees it; None if there is no such."""
        wanted = commitment_bytes(task)
        try:
            info = await self.read("getTask", wanted, block=block)
        except Reverted as error:
            if error.reason == "Task not found":
                return None
            raise
        if info[2] == NOTHING:
            return None
        if info[2] != wanted:
            raise ChainError(f"asked for task {task}, got 0x{info[2].hex()}")
        return task_facts(info, own)

    def submit_score(self, task: Commitment, score: Score) -> bytes:
        return self.encode("submitTaskScore", commitment_bytes(task), score)

    def report_error(self, task: Commitment, error: TaskError) -> bytes:
        return self.encode("reportTaskError", commitment_bytes(task), int(error))

    def abort(self, task: Commitment, reason: AbortReason) -> bytes:
        return self.encode("abortTask", commitment_bytes(task), int(reason))
