"""An engine, the card that it computes on and the store that brings its models: what a GPU's actor
hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Final

from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import CardUuid, GpuClass, TaskType, Tier
from cluster.inference import canary, devices
from cluster.inference.canary import Candidate
from cluster.inference.candidates import Candidates
from cluster.inference.needs import refs_of
from cluster.inference.nvml import NoDriver, Vitals
from cluster.inference.parameters import parse
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef

PRELOAD_PAUSE: Final = 300.0
"""Seconds until what couldn't be preloaded is tried again."""

if TYPE_CHECKING:  # it takes torch with it
    from cluster.inference.engine import Engine, EngineState


@dataclass(slots=True)
class MountedEngine:
    """`preload` are base models (`name[+variant]`) that are brought to the card as soon as they are
    on disk. Any thread may ask for anything but `run` and `tend`."""

    engine: Engine
    uuid: CardUuid
    keeper: Keeper
    preload: Sequence[str] = ()
    simulated: bool = False
    clock: Callable[[], float] = monotonic
    _candidates: Candidates = field(init=False)
    _not_before: dict[str, float] = field(default_factory=dict)
    """By `clock`: what couldn't be preloaded is tried again then."""
    _hits: int = 0

    def __post_init__(self) -> None:
        self._candidates = Candidates(self.keeper)

    @property
    def gpu_class(self) -> GpuClass:
        return self.engine.gpu_class

    def state(self) -> EngineState:
        """What is on disk may have come by another process of the machine."""
        return replace(self.engine.state(), on_disk=self.keeper.store.on_disk())

    def usage(self) -> CardUse:
        return replace(self.engine.usage(), hits=self._hits)

    def software(self) -> str:
        """What results depend on here beside card and model. Raises `DeviceFault`."""
        try:
            return canary.software({} if self.simulated else devices.libraries(self.uuid))
        except NoDriver:
            return canary.software()

    def vitals(self) -> Vitals:
        """How the card does; nothing is known of one that isn't NVIDIA's. Raises `DeviceFault`."""
        if self.simulated:
            return Vitals()
        try:
            return devices.vitals(self.uuid)
        except NoDriver:
            return Vitals()

    def run(
        self, order: Order, cancelled: Callable[[], bool], on_step: Callable[[int, int], None]
    ) -> Computed:
        """Fetch what is missing, and compute. Raises what `Keeper.ensure` and `Engine.run` do."""
        wanted = Wanted(order.deadline, cancelled, lambda: on_step(0, 0))
        began, refs = monotonic(), self._refs(order)
        with self.keeper.held(refs, wanted) as brought:
            waited = monotonic() - began
            self._hits += 0 if brought else len(refs)
            computed = self.engine.run(order, cancelled, on_step)
        return replace(
            computed,
            seconds=computed.seconds + (waited if brought else 0.0),
            load_seconds=computed.load_seconds + waited,
            tier=Tier.AWAY if brought else computed.tier,
            card=self.uuid,
        )

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        """Fetch an order's models to the disk and read them into memory, beside what computes."""
        asked = Wanted(order.deadline, lambda: not wanted())
        with self.keeper.held(self._refs(order), asked):
            self.engine.prefetch(order, wanted)

    def _refs(self, order: Order) -> tuple[ModelRef, ...]:
        with self.keeper.telling(f"task {order.task}"):
            return refs_of(parse(TaskType(order.task_type), order.parameters))

    def has_to_tend(self) -> bool:
        return any(self._may_be_preloaded())

    def tend(self, look: Callable[[], None]) -> tuple[str, ...]:
        """Bring to the card the next model that is to be kept there and has come; a line if it
        couldn't be. Where `look` raises `Cancelled` it is left for another time."""
        names = self._may_be_preloaded()[:1]
        problems = self.engine.preload(names, look)
        until = self.clock() + PRELOAD_PAUSE
        self._not_before |= dict.fromkeys(set(names) - self.engine.preloaded, until)
        return problems

    def _may_be_preloaded(self) -> tuple[str, ...]:
        """What isn't kept there: it hasn't come yet, or was replaced or distrusted since."""
        kept, now = self.engine.preloaded, self.clock()
        due = [
            name
            for name in dict.fromkeys(self.preload)
            if name not in kept and now >= self._not_before.get(name, now)
        ]
        here = self.keeper.store.on_disk() if due else frozenset()
        return tuple(name for name in due if name in here)

    def candidates(self) -> tuple[Candidate, ...]:
        """Looks at the disk: not for a loop that has others to serve."""
        return self._candidates.look()
