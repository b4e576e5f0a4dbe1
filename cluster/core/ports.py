"""The interfaces between the decisions and the world. One network port serves both of its forms.

What `Network` does not assume (design.md, "Two forms of the network, one port"): that the node can
abort (`TaskFacts.abortable`), that writes have receipts or cost gas (`WriteState` only says whether
the network has taken one), that parameters can be "not ready", that wake-ups are chain events, that
joining is one step, or that one deadline covers a task's life (`TaskFacts.deadline` is the present
stage's).

Every method may raise `NetworkUnavailable` (try again later) or `LeaseLost` (stop at once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.core.lifecycle import WriteState
from cluster.core.record import Claim, Event, TaskRecord
from cluster.core.types import (
    AbortReason,
    AccountView,
    Address,
    AttemptId,
    CardUuid,
    Commitment,
    Effort,
    FileRef,
    Gpu,
    GpuClass,
    GpuId,
    ModelId,
    Score,
    TaskError,
    Tier,
    Timestamp,
    Wei,
)

KICKED_OUT = "NodeKickedOut"
SLASHED = "NodeSlashed"
"""Reasons of wake-ups that say what the network did to an account, by its own name for it."""


@dataclass(frozen=True, slots=True)
class Wakeup:
    """Look now, at every account if `account` is None; `models` are wanted on disk. `moment`, of
    what was done to the account: by it a story that is told twice is known; 0 elsewhere."""

    account: Address | None
    reason: str
    models: tuple[ModelId, ...] = ()
    moment: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The network would not do it, the last time that it was asked: `verb` is an account's own
    write, or what a payment to it is for. It is not asked again before `again`."""

    verb: str
    reason: str
    again: Timestamp


@dataclass(frozen=True, slots=True)
class Movement:
    """Writes of ours that concern an account: `is_open` when one is on its way; a look at moment
    `block` or later shows those that have come to be. The same of what was paid to it. `refused`:
    what didn't come to be so far, also while it is tried again. `owes`: what those on their way
    take from it, gas aside; `lacks`: what it has too little for one of them, or a task's write.
    A report of a model on its way is `reports`, and nothing else: nobody has to wait for it."""

    is_open: bool = False
    block: int = 0
    paying: bool = False
    paid_block: int = 0
    refused: tuple[Refusal, ...] = ()
    owes: Wei = Wei(0)
    lacks: Wei = Wei(0)
    reports: bool = False


class Network(Protocol):
    """The Crynux network as one operator's accounts see it."""

    async def look(self, account: Address, known: Sequence[Commitment]) -> AccountView:
        """Facts on the account, its current task and the `known` ones, all read at one moment.

        A known task that the network has no record of is absent from the answer.
        """
        ...

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        """The task's parameters as JSON text, opened if they came encrypted.

        Raises `ParametersNotReady`, or `ParametersUnreadable` when they came in an envelope that
        the account's key doesn't open; never reported, as each node gets an envelope of its own.
        """
        ...

    async def submit_score(self, account: Address, task: Commitment, score: Score) -> None:
        """Make sure that the score is on its way; idempotent, stored before it is sent."""
        ...

    async def report_error(self, account: Address, task: Commitment, error: TaskError) -> None:
        """Make sure that the error report is on its way; idempotent, stored before it is sent."""
        ...

    async def abort(self, account: Address, task: Commitment, reason: AbortReason) -> None:
        """Make sure that the abort is on its way; idempotent, stored before it is sent."""
        ...

    def writes(self, task: Commitment) -> Mapping[Claim, WriteState]:
        """Where this task's writes stand, as far as is known here and now."""
        ...

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        """Hand the files over, in index order. Raises `ResultRefused`; done already is success."""
        ...

    async def ask_relay(self) -> None:
        """See whether the relay is there. Raises `RelayError`."""
        ...

    async def join(
        self, account: Address, gpu_class: GpuClass, stake: Wei, models: Sequence[ModelId]
    ) -> None:
        """Make sure that the account is joining; may take several steps and calls."""
        ...

    async def resume(self, account: Address) -> None: ...

    async def pause(self, account: Address) -> None: ...

    async def quit(self, account: Address) -> None: ...

    async def update_version(self, account: Address) -> None: ...

    async def report_model(self, account: Address, model: ModelId) -> None: ...

    async def transfer(
        self, sender: Address, recipient: Address, amount: Wei, purpose: str
    ) -> None:
        """Make sure that the money is on its way; for each purpose and recipient one at a time."""
        ...

    async def balance(self, account: Address) -> Wei: ...

    def movements(self) -> Mapping[Address, Movement]:
        """Of the accounts' own writes; an account that isn't in it has none."""
        ...

    async def next_wakeup(self) -> Wakeup:
        """Wait for the network to say that something has changed; losing one is never fatal. To
        ask for the next one says that the one before was handled: after a crash, what wasn't is
        said again."""
        ...

    async def befell(self, account: Address, since: int | None, until: int) -> tuple[Wakeup, ...]:
        """What the network did to the account (`KICKED_OUT`, `SLASHED`) after moment `since`, up to
        `until`; None: since what was handled when this began. All that is known, however often it
        was said. Raises `NetworkUnavailable` while something may still be on its way here."""
        ...


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to act. Every write to the journal checks that `epoch` is still the newest."""

    holder: str
    epoch: int
    expires_at: Timestamp


class Journal(Protocol):
    """Durable facts. Writes raise `LeaseLost` when the lease's epoch is not the newest."""

    def acquire(self, holder: str, now: Timestamp, ttl: float) -> Lease | None:
        """Take the lease if it is free, expired or ours; None when another holds it."""
        ...

    def renew(self, lease: Lease, now: Timestamp, ttl: float) -> Lease: ...

    def release(self, lease: Lease) -> None: ...

    def append(self, lease: Lease, task: Commitment, event: Event, at: Timestamp) -> TaskRecord:
        """Store an event; on return it survives a crash. The record as it is after it.

        Raises `IllegalMove`, and stores nothing, for an event that can't follow those stored.
        """
        ...

    def open_records(self) -> tuple[TaskRecord, ...]: ...

    def recent_records(self, limit: int) -> tuple[TaskRecord, ...]:
        """The newest `limit` closed records, newest first, without their parameters."""
        ...

    def story(self, task: Commitment) -> tuple[tuple[Event, Timestamp], ...]: ...


class Artifacts(Protocol):
    """Result files until they are uploaded."""

    async def put(
        self, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> tuple[FileRef, ...]: ...

    async def get(
        self, task: Commitment, files: Sequence[FileRef]
    ) -> tuple[tuple[str, bytes], ...]:
        """The files' bytes; raises `ClusterError` when one is missing or not what it was."""
        ...

    async def drop(self, task: Commitment) -> None: ...

    def kept(self, task: Commitment) -> frozenset[str]:
        """The sha256 of each of the task's files that is still there."""
        ...

    def where(self, task: Commitment) -> str | None:
        """Where a person finds the task's files; None when there are none."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """What a GPU gets to do: plain values, no key, no address of a service.

    `parameters` is JSON text already validated; `deadline` is on the GPU machine's clock, which is
    assumed right to a few seconds. `afresh`: for a card in doubt, nothing is used that it has kept
    from before, in its own memory or its machine's.
    """

    attempt_id: AttemptId
    task: Commitment
    task_type: int
    parameters: str
    deadline: Timestamp | None
    afresh: bool = False


@dataclass(frozen=True, slots=True)
class Computed:
    """`files` in index order; `score` is what protocol.md section 4 makes of them."""

    score: Score
    files: tuple[tuple[str, bytes], ...]
    seconds: float
    load_seconds: float = 0.0
    """Of `seconds`, those until its models were on the card."""
    tier: Tier = Tier.DEVICE
    card: CardUuid = CardUuid("")
    """Whose process computed it."""

    @property
    def effort(self) -> Effort:
        return Effort(self.seconds, self.load_seconds, self.tier)


@dataclass(frozen=True, slots=True)
class CardUse:
    """What a card's process has done since it began, and holds: bytes of models on the card and
    waiting in host memory; parts of models that were loaded from disk, came back from host memory,
    and left either; `hits`: models that tasks needed and that lay on the machine's disk; `spoilt`:
    parts that were found to hold something else than what was read."""

    device_bytes: int = 0
    host_bytes: int = 0
    loads: int = 0
    returns: int = 0
    left_device: int = 0
    left_host: int = 0
    hits: int = 0
    spoilt: int = 0


class GpuPool(Protocol):
    """The cluster's GPUs, each one actor and one process with one attempt at a time."""

    def gpus(self) -> tuple[Gpu, ...]: ...

    async def start(self, gpu: GpuId, order: Order) -> None:
        """Start an attempt; raises `DeviceFault` when the GPU can't take it."""
        ...

    async def result(self, gpu: GpuId, attempt: AttemptId) -> Computed:
        """Wait for the attempt, also one that an earlier coordinator started.

        Raises `TaskInvalid`, `TaskUnsupported`, `DeviceFault`, `ModelUnavailable`, `Cancelled`,
        `DeadlinePassed`, or `AttemptLost` when the GPU or its actor no longer knows it.
        """
        ...

    async def cancel(self, gpu: GpuId, attempt: AttemptId) -> None: ...

    def prefetch(self, gpu: GpuId, order: Order) -> None:
        """Let the GPU's machine read the order's models into host memory: a hint, unanswered."""
        ...
