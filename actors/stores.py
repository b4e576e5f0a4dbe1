"""The cluster's model stores: one keeper's actor on each machine that has cards, watched and asked.

What the network wants on disk is wanted on every machine with a card of the account's class; a
model that all of them have is one that the class has.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
import structlog
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environment import without_password
from actors.keeping import StoreActor, StoreReport
from cluster.core.types import Gpu, GpuClass, ModelId, RayNodeId
from cluster.models.keeper import Keeper
from cluster.models.refs import of_model_id

PING_SECONDS = 5.0
MOST_SILENT = 3
"""Looks in turn at which a store may not answer before an operator hears of it."""
MOST_WORDS = 200
FETCHED_BYTES = "fetched_bytes"
"""Stands for an event where bytes are counted."""
_NOTHING = StoreReport("", 0, frozenset(), {}, (), 0, 0, 0, None, None, {}, {})
"""Of a store that never answered."""


@dataclass(slots=True)
class _Member:
    actor: ActorHandle[Any]
    report: StoreReport | None = None
    counted: tuple[int, Counter[tuple[str, str]]] | None = None
    """What `news` has told, of which process; None for one that others began and counted before its
    first report."""

    def is_played_by(self, begun: _Begun) -> None:
        self.actor = begun.actor
        if begun.is_new and self.counted is None:
            self.counted = (0, Counter())


@dataclass(frozen=True, slots=True)
class _Begun:
    actor: ActorHandle[Any]
    is_new: bool
    """Else it ran already."""


@dataclass(frozen=True, slots=True)
class _Silence:
    looks: int
    why: str


class RayStores:
    """`make_keeper` None: nothing is ever fetched, so no machine needs a keeper.

    `configured`: the model ids that every machine is to have.
    """

    def __init__(
        self,
        make_keeper: Callable[[], Keeper] | None,
        release: str,
        configured: tuple[str, ...],
    ) -> None:
        self._make_keeper = make_keeper
        self._release = release
        self._configured = configured
        self._members: dict[RayNodeId, _Member] = {}
        self._silent: dict[RayNodeId, _Silence] = {}
        self._log = structlog.get_logger("stores")

    def reports(self) -> Mapping[RayNodeId, StoreReport]:
        """The newest report of each machine; one whose store is silent is in trouble, whatever it
        said before, and if it never said anything."""
        found = dict(self._answers())
        for node, silence in self._silent.items():
            if silence.looks >= MOST_SILENT:
                trouble = f"it doesn't answer: {silence.why}"
                found[node] = replace(found.get(node, _NOTHING), trouble=trouble)
        return found

    def _answers(self) -> Mapping[RayNodeId, StoreReport]:
        return {
            node: member.report
            for node, member in self._members.items()
            if member.report is not None
        }

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, one line each."""
        silent = [
            f"machine {node[:8]}: its model store doesn't answer: {silence.why}"
            for node, silence in sorted(self._silent.items())
            if silence.looks >= MOST_SILENT
        ]
        troubled = [
            f"machine {node[:8]}: its model store fetches nothing: {report.trouble}"
            for node, report in sorted(self._answers().items())
            if report.trouble and node not in self._silent
        ]
        return (*silent, *troubled)

    def settled(self, gpus: Iterable[Gpu]) -> bool:
        """Whether the machines of these cards have each configured model, or have tried."""
        return not self.unsettled(gpus)

    def unsettled(self, gpus: Iterable[Gpu]) -> str:
        """What is still waited for on a machine of these cards; nothing where they are settled."""
        if self._make_keeper is None:
            return ""
        reports = self._answers()
        for node in sorted({gpu.ray_node for gpu in gpus}):
            if (report := reports.get(node)) is None:
                return f"machine {node[:8]}: its model store hasn't answered yet"
            for model in self._configured:
                if model not in report.here and model not in report.failed:
                    return f"machine {node[:8]}: {model} is still to come"
        return ""

    def here(self, gpus: Iterable[Gpu]) -> frozenset[ModelId]:
        """The models that were configured or wanted and are on each of these cards' machines."""
        nodes = {gpu.ray_node for gpu in gpus}
        reports = self._answers()
        if not nodes or not nodes <= reports.keys():
            return frozenset()
        common = frozenset[str].intersection(*(reports[node].here for node in nodes))
        return frozenset(map(ModelId, common))

    def news(self) -> Mapping[tuple[str, str], int]:
        """What the stores' diaries say that wasn't told by this yet: counts by event and label.

        Of a process that outlived the coordinator before this one, what it did until its first
        report is left out: to Prometheus it would all have happened now.
        """
        told: Counter[tuple[str, str]] = Counter()
        for member in self._members.values():
            if (report := member.report) is None:
                continue
            now = Counter(report.events)
            now.update({(FETCHED_BYTES, source): n for source, n in report.fetched_bytes.items()})
            pid, before = (report.pid, now) if member.counted is None else member.counted
            told.update(now - before if pid == report.pid else now)
            member.counted = (report.pid, now)
        return told

    def want(self, gpus: Iterable[Gpu], models: Sequence[ModelId]) -> int:
        """Have the machines of these cards fetch them, behind what tasks need; how many do."""
        members = [self._members.get(node) for node in {gpu.ray_node for gpu in gpus}]
        asked = [member for member in members if member is not None]
        for member in asked:
            member.actor.want.remote(tuple(models))
        return len(asked)

    async def drop(self, model: str) -> Mapping[str, str]:
        """Have every machine remove it; what came of that on each. Raises `ModelUnavailable` or
        `TaskInvalid` for what is no model's id."""
        of_model_id(model)
        nodes = sorted(self._members)
        asked = [self._drop(self._members[node], model) for node in nodes]
        return dict(zip(nodes, await asyncio.gather(*asked), strict=True))

    async def _drop(self, member: _Member, model: str) -> str:
        try:
            async with asyncio.timeout(PING_SECONDS):
                return cast(str, await member.actor.drop.remote(model))
        except (RayError, TimeoutError) as error:
            return f"no answer ({type(error).__name__})"

    def forget(self) -> None:
        """As if it had never looked: whoever looks next, maybe another process, asks all anew."""
        self._members.clear()
        self._silent.clear()

    # --- watching --------------------------------------------------------------------------------

    async def refresh(self, nodes: Collection[RayNodeId]) -> None:
        """One look: machines that came or left, keepers to make or replace, a ping to each."""
        if self._make_keeper is None:
            return
        for gone in self._members.keys() - set(nodes):
            await self._end(gone, self._members.pop(gone))
        for gone in self._silent.keys() - set(nodes):
            del self._silent[gone]
        for new in sorted(set(nodes) - self._members.keys()):
            if (begun := await self._begun(new)) is not None:
                self._members[new] = _Member(begun.actor)
                self._members[new].is_played_by(begun)
        await asyncio.gather(*(self._ping(n, member) for n, member in self._members.items()))

    async def _ping(self, node: RayNodeId, member: _Member) -> None:
        try:
            async with asyncio.timeout(PING_SECONDS):
                report: StoreReport = await member.actor.report.remote()
        except (RayError, TimeoutError) as error:
            if isinstance(error, ActorDiedError):
                if (begun := await self._begun(node)) is None:
                    return
                member.is_played_by(begun)
            self._note_silence(node, _why(error))
            return
        self._silent.pop(node, None)
        if report.release != self._release:
            self._log.info("store_actor_replaced", node=node, old=report.release)
            await self._end(node, member)
            if (begun := await self._begun(node)) is not None:
                member.is_played_by(begun)
            return
        member.report = report

    def _note_silence(self, node: RayNodeId, why: str) -> None:
        before = self._silent.get(node, _Silence(0, ""))
        if why != before.why:
            self._log.warning("store_silent", node=node, why=why)
        self._silent[node] = _Silence(before.looks + 1, why)

    async def _begun(self, node: RayNodeId) -> _Begun | None:
        """None where it can't be now: the next look tries again."""
        try:
            return await asyncio.to_thread(self._actor, node)
        except (RayError, ValueError) as error:
            self._log.warning("store_not_begun", node=node, error=type(error).__name__)
            self._note_silence(node, f"it can't be begun: {_why(error)}")
            return None

    async def _end(self, node: RayNodeId, member: _Member) -> None:
        try:
            await asyncio.to_thread(self._kill, member)
        except RayError as error:
            self._log.warning("store_actor_not_ended", node=node, error=type(error).__name__)

    def _kill(self, member: _Member) -> None:
        ray.kill(member.actor, no_restart=True)

    def _actor(self, node: RayNodeId) -> _Begun:
        name = f"store:{node[:8]}"
        try:
            return _Begun(ray.get_actor(name), is_new=False)
        except ValueError:
            pass  # there is none
        options: dict[str, Any] = {
            "name": name,
            "lifetime": "detached",
            "get_if_exists": True,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            "max_concurrency": 16,
            **without_password(),
        }
        actor_class = cast(Any, StoreActor)
        actor = actor_class.options(**options).remote(
            self._make_keeper, self._release, self._configured
        )
        return _Begun(cast(ActorHandle[Any], actor), is_new=True)


def _why(error: BaseException) -> str:
    """In a line; of what its method raised that, not where it passed through."""
    cause = getattr(error, "cause", None) or error
    words = ascii(str(cause).splitlines()[0])[1:-1] if str(cause) else ""
    name = type(cause).__name__
    return f"{name}: {words[:MOST_WORDS]}" if words and cause is not error else name


def of_class(gpus: Iterable[Gpu], gpu_class: GpuClass | None) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in gpus if gpu.gpu_class == gpu_class)
