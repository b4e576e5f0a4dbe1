"""What the coordinator knows, made into a `Status` for people and gauges. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.inference import Report
from actors.keeping import StoreReport
from actors.reconciler import Turn
from cluster.chain.endpoints import EndpointView
from cluster.core.ports import CardUse
from cluster.core.record import Claim, Outcome, TaskRecord
from cluster.core.types import (
    AccountView,
    Address,
    CardUuid,
    Commitment,
    Gpu,
    GpuClass,
    GpuId,
    RayNodeId,
    Stage,
    TaskStatus,
    Timestamp,
)
from cluster.inference.nvml import Vitals
from cluster.status import (
    AccountStatus,
    ChainView,
    DownloadView,
    DrainStatus,
    EndpointStatus,
    FleetStatus,
    GpuClassView,
    GpuStatus,
    IdentityView,
    MemoryView,
    RelayView,
    Status,
    StoreStatus,
    TaskView,
    Totals,
    judged,
)

_FINAL_STATUS = {
    Outcome.SUCCESS: TaskStatus.END_SUCCESS,
    Outcome.GROUP_SUCCESS: TaskStatus.END_GROUP_SUCCESS,
    Outcome.GROUP_REFUND: TaskStatus.END_GROUP_REFUND,
    Outcome.ABORTED: TaskStatus.END_ABORTED,
    Outcome.INVALIDATED: TaskStatus.END_INVALIDATED,
}


@dataclass(frozen=True, slots=True)
class Sight:
    """Everything that a status is made of, taken at one moment; a coordinator that doesn't act
    has no epoch, views or records."""

    version: str
    config_digest: str
    now: Timestamp
    treasury: Address
    chain_id: int
    accounts: Mapping[int, Address]
    gpus: tuple[tuple[Gpu, Report | None], ...]
    stores: Mapping[RayNodeId, StoreReport] = field(default_factory=dict)
    canaries: Mapping[CardUuid, Timestamp] = field(default_factory=dict)
    """When each card last answered its canary rightly."""
    epoch: int | None = None
    not_acting: str = ""
    """Why not, where it isn't the lease."""
    views: Mapping[Address, AccountView] = field(default_factory=dict)
    assigned: Mapping[int, GpuClass] = field(default_factory=dict)
    open: tuple[TaskRecord, ...] = ()
    closed: tuple[TaskRecord, ...] = ()
    totals: Totals = field(default_factory=Totals)
    turns: Mapping[Commitment, Turn] = field(default_factory=dict)
    slashed: frozenset[Address] = frozenset()
    chain_error: str | None = None
    relay_error: str | None = None
    endpoints: tuple[EndpointView, ...] = ()
    alerts: tuple[str, ...] = ()
    """What the safeguards and the fleet found, in words."""
    fleet: FleetStatus = field(default_factory=FleetStatus)
    drain: DrainStatus = field(default_factory=DrainStatus)


def describe(sight: Sight) -> Status:
    newest = max(sight.views.values(), key=lambda view: view.moment, default=None)
    errors = [error for error in (sight.chain_error, sight.relay_error) if error is not None]
    slashed = [
        f"account {account} was slashed; it is not joined again by itself: find out why, then "
        f"crynux-cluster fleet clear {account}"
        for account in sorted(sight.slashed)
    ]
    broken = [
        f"GPU {gpu.gpu_id}: {report.problem}"
        for gpu, report in sight.gpus
        if report is not None and report.problem
    ]
    status = Status(
        version=sight.version,
        config_digest=sight.config_digest,
        now=sight.now,
        acting=sight.epoch is not None,
        epoch=sight.epoch,
        not_acting=sight.not_acting,
        identity=IdentityView(treasury=sight.treasury),
        chain=ChainView(
            reached=newest is not None and sight.chain_error is None,
            chain_id=sight.chain_id,
            block=None if newest is None else newest.moment,
            block_timestamp=None if newest is None else newest.moment_at,
            error=sight.chain_error,
            endpoints=tuple(
                EndpointStatus(
                    name=each.name, problem=each.problem, seconds=each.latency, head=each.head
                )
                for each in sight.endpoints
            ),
        ),
        relay=RelayView(reached=sight.relay_error is None, error=sight.relay_error),
        accounts=tuple(
            _account(index, address, sight.views.get(address), sight.assigned.get(index))
            for index, address in sorted(sight.accounts.items())
        ),
        gpus=tuple(_gpu(gpu, report, sight.canaries.get(gpu.uuid)) for gpu, report in sight.gpus),
        stores=tuple(_store(node, report) for node, report in sorted(sight.stores.items())),
        tasks=tuple(
            task_view(record, sight.turns.get(record.commitment))
            for record in (*sight.open, *sight.closed)
        ),
        totals=sight.totals,
        problems=(*errors, *slashed, *broken, *sight.alerts),
        fleet=sight.fleet,
        drain=sight.drain,
    )
    return judged(status)


def totals_of(outcomes: Mapping[Outcome, int], paid: int, marked: int = 0) -> Totals:
    """`marked` accounts are known to have lost their stake, be it in no record of ours."""
    slashed = max(outcomes.get(Outcome.INVALIDATED, 0), marked)
    counts = Counter({outcome.value: count for outcome, count in outcomes.items()})
    return Totals(paid_wei=str(paid), tasks=dict(counts), slashed=slashed)


def task_view(record: TaskRecord, turn: Turn | None) -> TaskView:
    status, stage, deadline = None, "unknown", None
    if record.outcome is not None:
        final = _FINAL_STATUS.get(record.outcome)
        status, stage = None if final is None else final.label, Stage.ENDED.value
    elif turn is not None:
        stage = turn.stage.value
        if turn.facts is not None:
            status, deadline = turn.facts.status.label, turn.facts.deadline
    return TaskView(
        commitment=record.commitment,
        account=record.account,
        type=record.task_type.name,
        status=status,
        stage=stage,
        progress=record.progress.value,
        action="" if turn is None else turn.action,
        gpu_id=_gpu_of(record),
        attempts=len(record.attempts),
        seen_at=record.seen_at,
        score_at=record.claimed_at(Claim.SCORE),
        deadline=deadline,
        outcome=None if record.outcome is None else record.outcome.value,
        payment=str(record.payment),
        fee=str(record.fee),
        fault=record.fault,
        closed_at=record.closed_at,
    )


def _gpu_of(record: TaskRecord) -> GpuId | None:
    """The card of the open attempt, or of the one that gave the result."""
    if record.open_attempt is not None:
        return record.open_attempt.gpu_id
    if record.result is None:
        return None
    made_by = record.result.attempt_id
    return next(a.gpu_id for a in record.attempts if a.attempt_id == made_by)


def _account(
    index: int, address: Address, view: AccountView | None, assigned: GpuClass | None
) -> AccountStatus:
    if view is None:
        return AccountStatus(
            index=index, address=address, status="unknown", gpu_class=_class(assigned)
        )
    facts = view.account
    return AccountStatus(
        index=index,
        address=address,
        status=facts.status.name.lower(),
        gpu_class=_class(facts.gpu_class or assigned),
        stake=str(facts.stake),
        balance=str(facts.balance),
        qos=facts.qos,
        current_task=facts.current_task,
    )


def _class(gpu_class: GpuClass | None) -> GpuClassView | None:
    return None if gpu_class is None else GpuClassView(name=gpu_class.name, vram=gpu_class.vram)


def _gpu(gpu: Gpu, report: Report | None, canary_at: Timestamp | None) -> GpuStatus:
    if report is None:
        return GpuStatus(**_bare_gpu(gpu))
    busy = report.attempt is not None
    vitals, usage = report.vitals, report.usage
    return GpuStatus(
        **_bare_gpu(gpu),
        task=report.task,
        attempt=report.attempt,
        step=report.step if busy else None,
        steps=report.steps if busy else None,
        tasks_done=report.finished,
        memory=_memory(gpu, usage, vitals),
        host_bytes=usage.host_bytes,
        temperature=vitals.temperature,
        ecc_uncorrected=vitals.ecc_uncorrected,
        throttling=vitals.throttling or (),
        busy_seconds=report.busy_seconds,
        moves={
            "loaded": usage.loads,
            "returned": usage.returns,
            "left_device": usage.left_device,
            "left_host": usage.left_host,
            "spoilt": usage.spoilt,
        },
        store_hits=usage.hits,
        canary_at=canary_at,
        problem=report.problem,
    )


def _bare_gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "gpu_id": gpu.gpu_id,
        "uuid": gpu.uuid,
        "ray_node": gpu.ray_node,
        "name": gpu.gpu_class.name,
        "vram": gpu.gpu_class.vram,
        "simulated": gpu.simulated,
        "state": gpu.state,
        "warm": tuple(sorted(gpu.warm)),
    }


def _memory(gpu: Gpu, usage: CardUse, vitals: Vitals) -> MemoryView | None:
    """As the driver says; of a simulated card, as it would be."""
    total, free = vitals.total_memory, vitals.free_memory
    if total is not None and free is not None:
        models = min(usage.device_bytes, total - free)
        return MemoryView(models=models, other=total - free - models, free=free)
    if not gpu.simulated:
        return None
    left = max(0, gpu.gpu_class.vram * 2**30 - usage.device_bytes)
    return MemoryView(models=usage.device_bytes, other=0, free=left)


def _store(node: RayNodeId, report: StoreReport) -> StoreStatus:
    return StoreStatus(
        ray_node=node,
        models=report.models,
        used_bytes=report.used_bytes,
        quota_bytes=report.quota_bytes,
        room_bytes=report.room_bytes,
        queued=report.queued,
        downloads=tuple(
            DownloadView(
                model=str(each.ref),
                source=each.source,
                done_bytes=each.done,
                total_bytes=each.total,
                bytes_per_second=each.rate,
                seconds_left=each.seconds_left,
                background=each.background,
            )
            for each in report.downloads
        ),
        failed=report.failed,
        trouble=report.trouble,
        leftover_bytes=report.leftover_bytes,
    )
