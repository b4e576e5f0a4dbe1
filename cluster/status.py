"""What the operator shows of itself at one moment: plain values, ready for JSON.

The coordinator makes a `Status`; `/v1/status`, the command line and the live views read it. Amounts
in wei are decimal strings, because they don't fit what JSON readers make of a number. Nothing here
is secret: no parameters, no prompts, no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.core.types import GpuState

WeiText = Annotated[str, Field(pattern=r"^\d+$")]
"""An amount in wei, in decimal digits."""

SERVING = frozenset({GpuState.READY, GpuState.BUSY})
"""A card in one of these states earns, or could."""
ACCOUNTS_SERVE = frozenset({"available", "busy"})
"""An account with one of these statuses has a task, or gets one."""
MOST_NAMED = 5
"""Accounts, where it is said which ones don't serve."""


_NOT_SERVING = {
    "quit": "not joined",
    "unknown": "not looked at yet",
    "pending_pause": "pausing",
    "pending_quit": "quitting",
}


class View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IdentityView(View):
    treasury: str
    """The address of account 0; empty while no key is unlocked."""


class EndpointStatus(View):
    name: str
    """The host, never the path, which may hold a key."""
    problem: str = ""
    """Why it isn't asked now."""
    seconds: float | None = None
    """How long it takes to answer, as a mean."""
    head: int | None = None


class ChainView(View):
    reached: bool
    chain_id: int
    block: int | None = None
    block_timestamp: float | None = None
    error: str | None = None
    endpoints: tuple[EndpointStatus, ...] = ()


class RelayView(View):
    reached: bool
    error: str | None = None


class GpuClassView(View):
    name: str
    vram: int
    """Whole GB."""


class AccountStatus(View):
    index: int
    address: str
    status: str
    """`NodeStatus` in lower case, e.g. `available`."""
    gpu_class: GpuClassView | None = None
    stake: WeiText = "0"
    balance: WeiText = "0"
    qos: int = 0
    current_task: str | None = None


class MemoryView(View):
    """A card's memory in bytes: what models take, what else is taken, and what is free."""

    models: int
    other: int
    free: int


class GpuStatus(View):
    gpu_id: str
    uuid: str = ""
    """The physical card's; empty until it has said so."""
    ray_node: str
    name: str
    vram: int
    simulated: bool
    state: GpuState
    warm: tuple[str, ...] = ()
    task: str | None = None
    attempt: str | None = None
    step: int | None = None
    steps: int | None = None
    tasks_done: int = 0
    memory: MemoryView | None = None
    """None where it isn't known."""
    host_bytes: int = 0
    """Of models that wait in host memory."""
    temperature: int | None = None
    """Degrees Celsius."""
    ecc_uncorrected: int | None = None
    throttling: tuple[str, ...] = ()
    busy_seconds: float = 0.0
    """Since its process began; so are the moves."""
    moves: Mapping[str, int] = Field(default_factory=dict)
    """Parts of models: loaded from disk, returned from host memory, sent away from either, spoilt
    in memory."""
    store_hits: int = 0
    """Models that tasks needed and that lay on its machine's disk; since its process began too."""
    canary_at: float | None = None
    """When it last gave the answer to its canary that was expected."""
    problem: str = ""
    """What is wrong with it, in a line."""


class DownloadView(View):
    model: str
    source: str
    done_bytes: int
    total_bytes: int
    """0 where the source doesn't say."""
    bytes_per_second: float
    seconds_left: float | None = None
    background: bool


class StoreStatus(View):
    """One machine's model store."""

    ray_node: str
    models: int
    """That were fetched and are there."""
    used_bytes: int
    quota_bytes: int | None = None
    room_bytes: int | None = None
    """That may yet be fetched without another model leaving for it."""
    queued: int = 0
    downloads: tuple[DownloadView, ...] = ()
    failed: Mapping[str, str] = Field(default_factory=dict)
    """Models that were configured or asked for and couldn't be had, with the reason."""
    trouble: str = ""
    """Why nothing at all is fetched there."""
    leftover_bytes: int = 0
    """That broken downloads left there for the next try."""


class TaskView(View):
    commitment: str
    account: str
    type: str
    """`TaskType`'s name: SD, LLM or SD_FT."""
    status: str | None = None
    """The network's label, e.g. `ScoreReady`; None when it knows no such task."""
    stage: str
    progress: str
    action: str
    """What the lifecycle said last, in one line."""
    gpu_id: str | None = None
    """The card of the open attempt, or of the one that gave the result."""
    attempts: int = 0
    seen_at: float
    score_at: float | None = None
    """When the score was claimed."""
    deadline: float | None = None
    outcome: str | None = None
    payment: WeiText = "0"
    fee: WeiText = "0"
    fault: str | None = None
    closed_at: float | None = None


class ClassStatus(View):
    """What is wanted of a class of card: from `least` to `most` serving accounts."""

    name: str
    vram: int
    slots: int
    """Accounts for each card."""
    least: int
    most: int | None = None
    """None while the cluster isn't known well enough to give any up."""
    stopped: bool = False
    """An account of it was slashed: it serves nothing until the operator clears that."""


class FleetStatus(View):
    automatic: bool = True
    stake: WeiText = "0"
    """That an account needs to serve."""
    treasury: WeiText | None = None
    """The treasury's balance, once it was read."""
    plan: tuple[str, ...] = ()
    """What is to be done next, a line each."""
    moving: int = 0
    """Accounts for which something is on its way."""
    unread: int = 0
    """Accounts of which it isn't known how they are."""
    lacks: tuple[str, ...] = ()
    """What stands in the way and is the operator's to mend."""
    limits: tuple[str, ...] = ()
    """What stands in the way by the operator's own settings."""
    held: tuple[str, ...] = ()
    """Accounts that nothing is done for until the operator has looked at them."""
    retired: tuple[str, ...] = ()
    """Accounts that leave for good, or have left."""
    classes: tuple[ClassStatus, ...] = ()


class DrainPart(View):
    """A card or a machine that is drained by itself."""

    what: Literal["card", "node"]
    name: str
    """As it was typed."""
    left: tuple[str, ...] = ()
    """What is still to be done until it is empty, in words."""


class DrainStatus(View):
    everything: bool = False
    cards: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    done: bool = False
    """Nothing that is drained has anything left to do."""
    left: tuple[str, ...] = ()
    """What it still has to do, in words."""
    parts: tuple[DrainPart, ...] = ()
    """Each of `cards` and `nodes`: one may be done before the other is."""


class Totals(View):
    paid_wei: WeiText = "0"
    tasks: Mapping[str, int] = Field(default_factory=dict)
    """Closed tasks by outcome."""
    slashed: int = 0


class Status(View):
    version: str
    config_digest: str
    now: float
    acting: bool
    """This coordinator holds the lease."""
    epoch: int | None
    not_acting: str = ""
    """Why not, where that isn't the lease."""
    ready: bool = False
    """Tasks can be taken now, as `readiness` finds."""
    missing: tuple[str, ...] = ()
    """What stands in the way of that, in words."""
    identity: IdentityView
    chain: ChainView
    relay: RelayView
    accounts: tuple[AccountStatus, ...] = ()
    gpus: tuple[GpuStatus, ...] = ()
    stores: tuple[StoreStatus, ...] = ()
    tasks: tuple[TaskView, ...] = ()
    totals: Totals = Totals()
    problems: tuple[str, ...] = ()
    fleet: FleetStatus = FleetStatus()
    drain: DrainStatus = DrainStatus()


def judged(status: Status) -> Status:
    """With what comes of it: said once, so that all who tell it say the same."""
    ready, missing = readiness(status)
    return status.model_copy(update={"ready": ready, "missing": missing})


def readiness(status: Status) -> tuple[bool, tuple[str, ...]]:
    """Whether tasks can be taken now and, if not, what is missing, in words.

    Whoever doesn't act knows nothing of chain, relay and accounts. A drain is wanted, and still
    nothing can be taken; that the accounts rest for it needn't be said.
    """
    drain, missing = status.drain, _no_network(status)
    if not any(gpu.state in SERVING for gpu in status.gpus):
        missing.append(_no_gpu(status.gpus))
    if drain.everything:
        missing.append("it is drained" if drain.done else f"it is being drained: {_left(drain)}")
    return not missing, tuple(missing)


def _no_network(status: Status) -> list[str]:
    if not status.acting:
        why = status.not_acting or "it doesn't hold the lease"
        return [f"the coordinator is not acting: {why}"]
    missing: list[str] = []
    if not status.chain.reached:
        missing.append(f"the chain is not reached: {status.chain.error or 'no answer yet'}")
    elif not status.drain.everything and not any(map(_serves, status.accounts)):
        missing.append(_no_account(status.accounts))
    if not status.relay.reached:
        missing.append(f"the relay is not reached: {status.relay.error or 'no answer yet'}")
    return missing


def _serves(account: AccountStatus) -> bool:
    return account.status in ACCOUNTS_SERVE


def _no_account(accounts: tuple[AccountStatus, ...]) -> str:
    """By number, for anyone may hear it."""
    if not accounts:
        return "no account serves: none is there"
    found: dict[str, list[int]] = {}
    for each in accounts:
        found.setdefault(_NOT_SERVING.get(each.status, each.status), []).append(each.index)
    words = (f"{_named(which)} {status}" for status, which in sorted(found.items()))
    return f"no account serves: {', '.join(words)}"


def _named(which: list[int]) -> str:
    first = ", ".join(f"#{index}" for index in which[:MOST_NAMED])
    more = len(which) - MOST_NAMED
    return f"{first} and {more} more" if more > 0 else first


def _left(drain: DrainStatus) -> str:
    return "; ".join(drain.left)


def _no_gpu(gpus: tuple[GpuStatus, ...]) -> str:
    if not gpus:
        return "no GPU is known in the cluster"
    counts = {state: sum(gpu.state is state for gpu in gpus) for state in GpuState}
    states = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    return f"no GPU is ready: {states}"
