"""Carries out the plan's actions: what is expected is stored, then the network is asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from actors.ledger import Ledger
from actors.standing import Standings
from actors.stores import RayStores, of_class
from actors.treasury import Treasury
from cluster.core.fleet import (
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


class FleetActions:
    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        stores: RayStores,
        standings: Standings,
        treasury: Treasury,
        gpus: Callable[[], Sequence[Gpu]],
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._stores = stores
        self._standings = standings
        self._treasury = treasury
        self._gpus = gpus
        self._log = structlog.get_logger("fleet")

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
        return self._stores.settled(of_class(self._gpus(), gpu_class))

    def _models_on_disk(self, gpu_class: GpuClass) -> tuple[ModelId, ...]:
        """The models that every card of the class has: what a join may declare. Some at most,
        those first that were configured or asked for, because each costs the join gas."""
        cards = of_class(self._gpus(), gpu_class)
        common = frozenset[str].intersection(*(gpu.on_disk for gpu in cards)) if cards else ()
        fetched = self._stores.here(cards)
        others = {ModelId(f"base:{name}") for name in common} - fetched
        return (*sorted(fetched), *sorted(others))[:MOST_MODELS]
