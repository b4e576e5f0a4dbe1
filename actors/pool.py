"""The cluster's GPUs: finds the cards of every Ray node, keeps one actor on each, watches them.

A Ray node offers real cards as Ray's `GPU` resource and simulated ones as a custom resource named
`crynux-sim|<GPU name>|<GB>`. Each card is a slot of its node, each slot a detached actor with its
own name, pinned to the node; Ray restarts the actor when its process dies, this pool replaces it
when it runs another release. A node that leaves takes its cards with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
import structlog
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environment import without_password
from actors.inference import Engine, Health, InferenceActor, Report
from cluster.core.errors import AttemptLost, ClusterError, DeviceFault, DeviceFaultKind
from cluster.core.ports import Computed, Order
from cluster.core.types import (
    AttemptId,
    CardUuid,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    RayNodeId,
)

SIMULATED_PREFIX = "crynux-sim|"
PING_SECONDS = 5.0
MEND_SECONDS = 60.0
HUNG_SECONDS = 60.0
"""How long an attempt that was cancelled may go on, and a process be silent."""
_STATES = {
    Health.STARTING: GpuState.STARTING,
    Health.READY: GpuState.READY,
    Health.BUSY: GpuState.BUSY,
    Health.BROKEN: GpuState.UNREACHABLE,
}

_WORKING = frozenset({GpuState.STARTING, GpuState.READY, GpuState.BUSY})

UNKNOWN = GpuClass("unknown", GigaBytes(0))
"""The class of a card that has never said what it is: one that doesn't come up."""

EngineFactory = Callable[[GpuClass | None], Callable[[], Engine]]
"""Given a simulated card's class, or None for a real card, how its actor makes its engine."""


def simulated_resource(gpu_class: GpuClass) -> str:
    """The custom Ray resource by which a node offers simulated cards of this class."""
    return f"{SIMULATED_PREFIX}{gpu_class.name}|{gpu_class.vram}"


def parse_simulated(resource: str) -> GpuClass | None:
    """The class that a custom resource stands for, None for any other resource."""
    if not resource.startswith(SIMULATED_PREFIX):
        return None
    name, _, vram = resource.removeprefix(SIMULATED_PREFIX).rpartition("|")
    return GpuClass(name, GigaBytes(int(vram))) if name and vram.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a card sits. `simulated` is the card's class if it is one, `uuid` its id then; a real
    one tells its own."""

    gpu_id: GpuId
    node: RayNodeId
    resource: str
    simulated: GpuClass | None
    uuid: CardUuid = CardUuid("")


def slots_of(nodes: Iterable[Mapping[str, Any]], allow_simulated: bool) -> tuple[Slot, ...]:
    """Every card of every living node, from what `ray.nodes()` says.

    Simulated cards are left out unless `allow_simulated`: on a real chain they would take tasks
    that they can't finish in time.
    """
    slots: list[Slot] = []
    for node in nodes:
        if not node["Alive"]:
            continue
        node_id = RayNodeId(node["NodeID"])
        number = 0
        for resource, count in sorted(node["Resources"].items()):
            simulated = parse_simulated(resource)
            if resource != "GPU" and (simulated is None or not allow_simulated):
                continue
            host = node.get("NodeManagerHostname", "")
            for place in range(int(count)):
                gpu_id = GpuId(f"{node_id[:8]}-{number}")
                uuid = "" if simulated is None else f"{resource}|{host}|{place}"
                slots.append(Slot(gpu_id, node_id, resource, simulated, CardUuid(uuid)))
                number += 1
    return tuple(slots)


@dataclass(slots=True)
class _Member:
    slot: Slot
    actor: ActorHandle[Any]
    report: Report | None = None
    answering: bool = False
    gpu_class: GpuClass | None = None
    uuid: CardUuid = CardUuid("")
    broken_since: float | None = None
    silent_since: float | None = None
    cancelled: tuple[AttemptId, float] | None = None
    stalled: AttemptId | None = None
    starved: str = ""
    """The last process that was ended for want of its machine's memory, by its incarnation."""


class RayGpuPool:
    """`cluster.core.ports.GpuPool` on Ray. `release` names version and configuration together.

    An attempt that makes no step for `stall_seconds` is ended with its process.
    """

    def __init__(
        self,
        make_engine: EngineFactory,
        release: str,
        allow_simulated: bool,
        stall_seconds: float,
    ) -> None:
        self._make_engine = make_engine
        self._release = release
        self._allow_simulated = allow_simulated
        self._stall_seconds = stall_seconds
        self._changed: Callable[[], None] = lambda: None
        self._members: dict[GpuId, _Member] = {}
        self._quarantined: frozenset[CardUuid] = frozenset()
        self._drained: Callable[[Gpu], bool] = lambda _: False
        self._leaving: frozenset[RayNodeId] = frozenset()
        self._log = structlog.get_logger("pool")

    # --- ports.GpuPool ---------------------------------------------------------------------------

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(
            gpu
            for gpu_id in sorted(self._members)
            if (gpu := self._seen(self._members[gpu_id])) is not None
        )

    def unknown(self) -> tuple[Gpu, ...]:
        """Cards that are there and have never said what they are, for people's eyes: no task and
        no account is for one."""
        members = [self._members[gpu_id] for gpu_id in sorted(self._members)]
        return tuple(_card(each, UNKNOWN, frozenset()) for each in members if _kind(each) is None)

    def _seen(self, member: _Member) -> Gpu | None:
        gpu = _gpu(member, self._quarantined)
        if gpu is None or gpu.state not in _WORKING:
            return gpu
        leaves = gpu.ray_node in self._leaving or self._drained(gpu)
        return replace(gpu, state=GpuState.DRAINED) if leaves else gpu

    def drain(self, drained: Callable[[Gpu], bool]) -> None:
        """From now on exactly the cards for which this holds get no new task."""
        self._drained = drained

    def leave(self, node: RayNodeId | None) -> int:
        """This machine goes away, or with None every one: its cards get no new task as long as
        both it and this process live. Returns how many of them still compute."""
        cards = [each for each in self._members.values() if node in (None, each.slot.node)]
        self._leaving |= {each.slot.node for each in cards}
        return sum(each.report is not None and each.report.attempt is not None for each in cards)

    def quarantine(self, cards: frozenset[CardUuid]) -> None:
        """From now on exactly these cards are in quarantine."""
        self._quarantined = cards

    def report(self, gpu: GpuId) -> Report | None:
        member = self._members.get(gpu)
        return None if member is None else member.report

    def starved(self, gpu: GpuId) -> str:
        """Which process there its machine ended last for want of memory; empty where none was."""
        member = self._members.get(gpu)
        return "" if member is None else member.starved

    async def start(self, gpu: GpuId, order: Order) -> None:
        member = self._members.get(gpu)
        if member is None:
            raise DeviceFault(DeviceFaultKind.NOT_TAKEN, f"GPU {gpu} has left the cluster")
        try:
            refused = await _within(PING_SECONDS * 4, member.actor.start.remote(order))
        except (RayError, TimeoutError) as error:
            if not isinstance(error, ActorDiedError):
                # It may have the order, or get it yet: nobody would wait for what came of it.
                await self.cancel(gpu, order.attempt_id)
            raise DeviceFault(
                DeviceFaultKind.NOT_TAKEN, f"GPU {gpu} doesn't answer: {type(error).__name__}"
            ) from error
        if refused is not None:
            raise refused

    async def result(self, gpu: GpuId, attempt: AttemptId) -> Computed:
        member = self._members.get(gpu)
        if member is None:
            raise AttemptLost(f"GPU {gpu} has left the cluster")
        try:
            outcome = await member.actor.result.remote(attempt)
        except RayError as error:  # its process, or the node that held the answer
            if isinstance(error, OutOfMemoryError):
                self._starved(member)
            outcome = AttemptLost(f"GPU {gpu} lost it: {type(error).__name__}")
        if isinstance(outcome, AttemptLost) and member.stalled == attempt:
            raise DeviceFault(DeviceFaultKind.STALLED, f"GPU {gpu} made no step for too long")
        if isinstance(outcome, ClusterError):
            if _breaks_the_process(outcome):
                await self._end(member, restart=True)
            raise outcome
        # A simulated card is called by its slot.
        return replace(outcome, card=member.slot.uuid) if member.slot.uuid else outcome

    async def cancel(self, gpu: GpuId, attempt: AttemptId) -> None:
        member = self._members.get(gpu)
        if member is None:
            return
        member.cancelled = (attempt, asyncio.get_running_loop().time())
        try:
            await _within(PING_SECONDS, member.actor.cancel.remote(attempt))
        except (RayError, TimeoutError) as error:
            self._log.warning("gpu_cancel_unanswered", gpu=gpu, error=type(error).__name__)

    def prefetch(self, gpu: GpuId, order: Order) -> None:
        member = self._members.get(gpu)
        if member is not None and member.answering:
            member.actor.prefetch.remote(order)

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a refresh finds the GPUs different from before."""
        self._changed = changed

    # --- watching --------------------------------------------------------------------------------

    async def run(self, interval: float) -> None:
        """Look at the cluster every `interval` seconds, for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(interval)

    async def refresh(self) -> None:
        """One look: nodes that came or left, actors to make or replace, a ping to each."""
        before = self.gpus()
        try:
            nodes = await asyncio.to_thread(ray.nodes)
        except RayError as error:
            self._log.warning("cluster_unreadable", error=str(error))
            return
        slots = {slot.gpu_id: slot for slot in slots_of(nodes, self._allow_simulated)}
        for gone in self._members.keys() - slots.keys():
            self._log.warning("gpu_left", gpu=gone)
            await self._end(self._members.pop(gone), restart=False)
        for new in sorted(slots.keys() - self._members.keys()):
            self._log.info("gpu_found", gpu=new, resource=slots[new].resource)
            self._members[new] = _Member(slots[new], await self._begin(slots[new]))
        await asyncio.gather(*(self._ping(member) for member in self._members.values()))
        if self.gpus() != before:
            self._changed()

    async def _ping(self, member: _Member) -> None:
        try:
            report: Report = await _within(PING_SECONDS, member.actor.report.remote())
        except (RayError, TimeoutError) as error:
            member.answering = False
            if isinstance(error, ActorDiedError):
                # Ray restarts it unless it was killed for good; the one that lives is taken then.
                member.silent_since = None
                member.actor = await self._begin(member.slot)
            else:
                await self._end_silence(member, error)
            return
        member.silent_since = None
        if report.release != self._release:
            self._log.info("gpu_actor_replaced", gpu=member.slot.gpu_id, old=report.release)
            member.answering = False
            await self._end(member, restart=False)
            member.actor = await self._begin(member.slot)
            return
        await self._mend(member, report)
        await self._end_stall(member, report)
        if _was_starved(member.report, report):
            self._starved(member)
        member.report = _still_broken(report, member.report)
        member.answering = True
        member.gpu_class = report.gpu_class or member.gpu_class
        member.uuid = report.uuid or member.uuid

    def _starved(self, member: _Member) -> None:
        if member.report is not None and member.starved != member.report.incarnation:
            member.starved = member.report.incarnation
            self._log.error(
                "gpu_process_starved",
                gpu=member.slot.gpu_id,
                problem="its machine's memory ran out, and its process was ended for it: see "
                "gpu.host_memory_gb, or what else runs there",
            )

    async def _end_silence(self, member: _Member, error: Exception) -> None:
        """Begin a process anew that hasn't answered for long: its attempt would never end."""
        now = asyncio.get_running_loop().time()
        if member.silent_since is None:
            member.silent_since = now
        elif now - member.silent_since > HUNG_SECONDS:
            silence = type(error).__name__
            self._log.error("gpu_silent", gpu=member.slot.gpu_id, error=silence)
            member.silent_since = None
            await self._end(member, restart=True)

    async def _mend(self, member: _Member, report: Report) -> None:
        """Begin a broken or hung process anew, a broken one not again and again at once."""
        now = asyncio.get_running_loop().time()
        if report.health is not Health.BROKEN:
            member.broken_since = None
        elif member.broken_since is None:
            self._log.error("gpu_broken", gpu=member.slot.gpu_id, problem=report.problem)
            member.broken_since = now
        elif now - member.broken_since > MEND_SECONDS:
            self._log.warning("gpu_actor_restarted", gpu=member.slot.gpu_id)
            member.broken_since = None
            await self._end(member, restart=True)
        if member.cancelled is not None and member.cancelled[0] != report.attempt:
            member.cancelled = None
        elif member.cancelled is not None and now - member.cancelled[1] > HUNG_SECONDS:
            # It doesn't come to the end of a step: only the end of its process frees the card.
            self._log.error("gpu_hung", gpu=member.slot.gpu_id, attempt=report.attempt)
            member.cancelled = None
            await self._end(member, restart=True)

    async def _end_stall(self, member: _Member, report: Report) -> None:
        """End the process of an attempt that makes no step, once: the cancel is the next resort."""
        stalled = report.attempt is not None and report.quiet_seconds > self._stall_seconds
        if stalled and member.stalled != report.attempt:
            self._log.error("gpu_stalled", gpu=member.slot.gpu_id, attempt=report.attempt)
            member.stalled = report.attempt
            await self._end(member, restart=True)

    async def _begin(self, slot: Slot) -> ActorHandle[Any]:
        # Ray's control calls wait for the head's answer: not on the loop that tends the tasks.
        return await asyncio.to_thread(self._actor, slot)

    async def _end(self, member: _Member, restart: bool) -> None:
        try:
            await asyncio.to_thread(self._kill, member, restart)
        except RayError as error:
            gpu = member.slot.gpu_id
            self._log.warning("gpu_actor_not_ended", gpu=gpu, error=type(error).__name__)

    def _actor(self, slot: Slot) -> ActorHandle[Any]:
        simulated = slot.simulated is not None
        options: dict[str, Any] = {
            "name": f"gpu:{slot.gpu_id}",
            "lifetime": "detached",
            "get_if_exists": True,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node, soft=False),
            "num_gpus": 0 if simulated else 1,
            "resources": {slot.resource: 1} if simulated else {},
            "max_concurrency": 16,
            **without_password(),
        }
        actor_class = cast(Any, InferenceActor)
        return cast(
            ActorHandle[Any],
            actor_class.options(**options).remote(self._make_engine(slot.simulated), self._release),
        )

    def _kill(self, member: _Member, restart: bool) -> None:
        ray.kill(member.actor, no_restart=not restart)


def _kind(member: _Member) -> GpuClass | None:
    return member.slot.simulated or member.gpu_class


def _gpu(member: _Member, quarantined: frozenset[CardUuid]) -> Gpu | None:
    """The card as matching sees it; None until a real card has said what it is."""
    kind = _kind(member)
    return None if kind is None else _card(member, kind, quarantined)


def _card(member: _Member, kind: GpuClass, quarantined: frozenset[CardUuid]) -> Gpu:
    report = member.report
    if report is None:
        state = GpuState.STARTING
    else:
        state = _STATES[report.health] if member.answering else GpuState.UNREACHABLE
    uuid = member.slot.uuid or member.uuid
    if uuid in quarantined:
        state = GpuState.QUARANTINED
    return Gpu(
        gpu_id=member.slot.gpu_id,
        ray_node=member.slot.node,
        gpu_class=kind,
        simulated=member.slot.simulated is not None,
        state=state,
        warm=report.warm if report else frozenset(),
        in_host_memory=report.in_host_memory if report else frozenset(),
        on_disk=report.on_disk if report else frozenset(),
        uuid=uuid,
    )


def _still_broken(report: Report, before: Report | None) -> Report:
    """A process that begins anew because it was broken: what was wrong is, until it is up."""
    if report.health is Health.STARTING and before is not None and not report.problem:
        return replace(report, problem=before.problem)
    return report


def _was_starved(before: Report | None, now: Report) -> bool:
    """Whether its machine has ended processes for want of memory since another one was here."""
    if before is None or before.incarnation == now.incarnation:
        return False
    if before.memory_kills is None or now.memory_kills is None:
        return False
    return now.memory_kills > before.memory_kills


def _breaks_the_process(error: ClusterError) -> bool:
    return isinstance(error, DeviceFault) and error.kind in (
        DeviceFaultKind.CONTEXT_LOST,
        DeviceFaultKind.STALLED,
    )


async def _within(seconds: float, call: Awaitable[Any]) -> Any:  # noqa: ANN401
    """Await a Ray call for at most `seconds`; raises `TimeoutError`."""
    async with asyncio.timeout(seconds):
        return await call
