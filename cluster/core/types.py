"""What is passed around: identifiers, the network's enums, facts about tasks, accounts and GPUs.

*Facts* are what the network says at one moment (protocol.md sections 1 and 2). They are read,
never remembered. What this operator has done for a task is the *record* (`cluster.core.record`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NewType

Commitment = NewType("Commitment", str)
"""A task's identity: 32 bytes as lower-case hex with 0x (protocol.md section 1)."""
Address = NewType("Address", str)
"""An account, EIP-55 checksummed."""
GpuId = NewType("GpuId", str)
"""One physical or simulated card, unique in the cluster and stable over restarts of its actor."""
CardUuid = NewType("CardUuid", str)
"""The physical card, whichever session and slot it is in; for a simulated one its configured id."""
RayNodeId = NewType("RayNodeId", str)
AttemptId = NewType("AttemptId", str)
ModelId = NewType("ModelId", str)
"""`<kind>:<name>[+<variant>]` as on chain."""
Wei = NewType("Wei", int)
GigaBytes = NewType("GigaBytes", int)
Timestamp = NewType("Timestamp", float)
"""Unix time in seconds."""
Score = NewType("Score", bytes)


class TaskStatus(enum.IntEnum):
    """The network's task states; the numbers are the same in both of its forms."""

    QUEUED = 0
    STARTED = 1
    PARAMETERS_UPLOADED = 2
    ERROR_REPORTED = 3
    SCORE_READY = 4
    VALIDATED = 5
    GROUP_VALIDATED = 6
    END_INVALIDATED = 7
    END_SUCCESS = 8
    END_ABORTED = 9
    END_GROUP_REFUND = 10
    END_GROUP_SUCCESS = 11

    @property
    def label(self) -> str:
        """The name the network's documents use, e.g. `EndGroupRefund`."""
        return "".join(part.capitalize() for part in self.name.split("_"))


ENDED = frozenset(
    {
        TaskStatus.END_INVALIDATED,
        TaskStatus.END_SUCCESS,
        TaskStatus.END_ABORTED,
        TaskStatus.END_GROUP_REFUND,
        TaskStatus.END_GROUP_SUCCESS,
    }
)


class TaskType(enum.IntEnum):
    SD = 0
    LLM = 1
    SD_FT = 2


class TaskError(enum.IntEnum):
    NONE = 0
    PARAMETERS_VALIDATION_FAILED = 1


class AbortReason(enum.IntEnum):
    NONE = 0
    TIMEOUT = 1
    MODEL_DOWNLOAD_FAILED = 2
    INCORRECT_RESULT = 3
    TASK_FEE_TOO_LOW = 4


class NodeStatus(enum.IntEnum):
    QUIT = 0
    AVAILABLE = 1
    BUSY = 2
    PENDING_PAUSE = 3
    PENDING_QUIT = 4
    PAUSED = 5


class Stage(enum.Enum):
    """What a task's status means for the node that holds it: what the network takes from it now.

    The port maps statuses to stages, because the two forms of the network differ here: on chain
    (2.x) an answer is taken only once the parameters were reported, by the relay (3.x) from the
    start.
    """

    STARTED = "started"
    """Ours, but no answer is taken yet."""
    ANSWERABLE = "answerable"
    """A score or an error is taken."""
    ANSWERED = "answered"
    """A score or an error stands; the application has the next move."""
    WANTED = "wanted"
    """Validated: the network wants the result files from us."""
    ENDED = "ended"
    """A final status."""
    LOST = "lost"
    """The network doesn't know the task, or another node holds it."""


@dataclass(frozen=True, slots=True)
class GpuClass:
    """A kind of card as the network sees it: driver name and platform joined by `+`, whole GB."""

    name: str
    vram: GigaBytes


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a task asks of a card (protocol.md section 2)."""

    min_vram: GigaBytes
    required_gpu: str
    required_gpu_vram: GigaBytes


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the network says of one task, read at one moment.

    `deadline` is that of the present stage (each stage may have its own); None means none.
    `abortable` says whether this form of the network lets a node abort past the deadline.
    `evidence_wanted` asks for the files of a task that has already ended (3.x, invalidated).
    `selected_node` is None while the task is queued. `payment` is what all of the operator's
    accounts get by it: the first of a group pays the others' shares too.
    """

    commitment: Commitment
    selected_node: Address | None
    task_type: TaskType
    status: TaskStatus
    stage: Stage
    requirement: Requirement
    model_ids: tuple[ModelId, ...]
    fee: Wei
    payment: Wei
    score: Score
    error: TaskError
    started_at: Timestamp | None
    deadline: Timestamp | None
    abortable: bool
    evidence_wanted: bool = False


@dataclass(frozen=True, slots=True)
class AccountFacts:
    """What the network says of one node account; `gpu_class` is None when it never joined.

    `models` are those that the account has said it holds; `outdated`: it has said another version
    than the configured one.
    """

    address: Address
    status: NodeStatus
    gpu_class: GpuClass | None
    stake: Wei
    balance: Wei
    qos: int
    current_task: Commitment | None
    models: frozenset[ModelId] = frozenset()
    outdated: bool = False


@dataclass(frozen=True, slots=True)
class AccountView:
    """One look at an account and its tasks, all of it read at the same moment of the network.

    `moment` is a block number on chain; a later look never has a smaller one.
    `now` is the network's clock at that moment, by which deadlines are judged: it goes on where
    nothing new comes. `moment_at` is when the moment itself began, by the network; on chain what
    the block says of itself. None where that isn't known.
    """

    moment: int
    now: Timestamp
    account: AccountFacts
    tasks: tuple[TaskFacts, ...]
    moment_at: Timestamp | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """How much computing a task asks for, in a unit that its kind of task has to itself."""

    kind: str
    amount: float


class Tier(enum.Enum):
    """Where what a task needed lay when its card began with it: its farthest part decides."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    AWAY = "away"
    """Not on this machine: it was fetched first."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What a result took, in seconds: all of it, and how much of that went by until its models
    were on the card."""

    seconds: float
    load_seconds: float = 0.0
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class FileRef:
    """A result file kept in `artifacts`, by name and content."""

    name: str
    sha256: str
    size: int


class GpuState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    UNREACHABLE = "unreachable"
    QUARANTINED = "quarantined"
    DRAINED = "drained"
    """It gets no new task; what it computes, it finishes."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card and what is near it. `warm` holds pipeline keys, the others base models' keys.

    A pipeline key (`cluster.inference.parameters`) names what must be loaded for a task. `uuid` is
    empty until the card has said it.
    """

    gpu_id: GpuId
    ray_node: RayNodeId
    gpu_class: GpuClass
    simulated: bool
    state: GpuState
    warm: frozenset[str] = frozenset()
    in_host_memory: frozenset[str] = frozenset()
    on_disk: frozenset[str] = frozenset()
    uuid: CardUuid = field(default=CardUuid(""), kw_only=True)
