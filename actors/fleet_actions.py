"""Carries out the plan's actions: what is expected is stored, then the network is asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from actors.ledger import Ledger
from actors.standing import Standings
from actors.stores import RayStores, of_class
from actors.treasury import Treasury
from cluster.core.fleet_actions import (
    Assign,
    BringHome,
    FleetAction,
    Fund,
    Join,
    Pause,
    Quit,
    Resume,
    Sweep,
    TopUp,
    UpdateVersion,
    words,
)
from cluster.core.ports import Network
from cluster.core.standing import Place
from cluster.core.types import Gpu, GpuClass, ModelId, Wei
from cluster.journal import Assignment

MOST_MODELS = 16
LONG_SECONDS = 300.0
"""For which a join waits for models before an operator hears of it."""
STILL_SECONDS = 60.0


@dataclass(slots=True)
class _Waiting:
    """A class's joins: since when, when last tried, and for what."""

    since: float
    last: float
    why: str


class FleetActions:
    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        stores: RayStores,
        standings: Standings,
        treasury: Treasury,
        gpus: Callable[[], Sequence[Gpu]],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._stores = stores
        self._standings = standings
        self._treasury = treasury
        self._gpus = gpus
        self._clock = clock
        self._waiting: dict[GpuClass, _Waiting] = {}
        self._log = structlog.get_logger("fleet")

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, one line each."""
        now = self._clock()
        return tuple(
            f"{gpu_class.name}: its accounts wait to join for {(now - each.since) / 60:.0f} min, "
            f"until the configured models are there: {each.why}"
            for gpu_class, each in self._waiting.items()
            if now - each.since >= LONG_SECONDS and now - each.last < STILL_SECONDS
        )

    async def carry_out(self, action: FleetAction, stake: Wei) -> None:
        """Unless it can't be just now; `stake` is what who joins puts up. Raises
        `NetworkUnavailable`."""
        network, account = self._network, action.address
        if not self._may(action):
            return
        self._log.info("fleet", action=words(action))
        match action:
            case Assign(index, address, gpu_class):
                assignment = Assignment(index, address, gpu_class)
                self._ledger.journal.assign(self._ledger.lease, assignment)
            case Fund() | TopUp() | Sweep() | BringHome():
                await self._pay(action)
            case Join(_, gpu_class):
                self._standings.asked(account, Place.SERVING)
                await network.join(account, gpu_class, stake, self._models_on_disk(gpu_class))
            case Resume():
                self._standings.asked(account, Place.SERVING)
                await network.resume(account)
            case Pause():
                self._standings.asked(account, Place.PAUSED)
                await network.pause(account)
            case UpdateVersion():
                await network.update_version(account)
            case Quit():
                self._standings.asked(account, Place.OUT)
                await network.quit(account)

    async def _pay(self, action: Fund | TopUp | Sweep | BringHome) -> None:
        account, amount = action.address, action.amount
        if isinstance(action, Fund | TopUp):
            self._standings.owed(account, amount)
            await self._treasury.pay(account, amount, "fund" if isinstance(action, Fund) else "gas")
            return
        self._standings.gave(account, amount)
        if isinstance(action, Sweep):
            await self._network.transfer(account, action.recipient, amount, "sweep")
        else:
            await self._network.transfer(account, self._treasury.address, amount, "home")

    def _may(self, action: FleetAction) -> bool:
        there = self._standings.of(action.address)
        if there.held or there.is_doubtful:
            return False  # since the plan was made
        # A join says which models are there, and the first ones are still to come.
        return not isinstance(action, Join) or self._ready_to_join(action.gpu_class)

    def _ready_to_join(self, gpu_class: GpuClass) -> bool:
        now = self._clock()
        why = self._stores.unsettled(of_class(self._gpus(), gpu_class))
        if not why:
            self._waiting.pop(gpu_class, None)
            return True
        there = self._waiting.get(gpu_class)
        if there is None or now - there.last >= STILL_SECONDS:
            there = self._waiting[gpu_class] = _Waiting(now, now, "")
        if why != there.why:
            self._log.info("join_waits", gpu_class=gpu_class.name, why=why)
        there.last, there.why = now, why
        return False

    def _models_on_disk(self, gpu_class: GpuClass) -> tuple[ModelId, ...]:
        """The models that every card of the class has: what a join may declare. Some at most,
        those first that were configured or asked for, because each costs the join gas."""
        cards = of_class(self._gpus(), gpu_class)
        common = frozenset[str].intersection(*(gpu.on_disk for gpu in cards)) if cards else ()
        fetched = self._stores.here(cards)
        others = {ModelId(f"base:{name}") for name in common} - fetched
        return (*sorted(fetched), *sorted(others))[:MOST_MODELS]
