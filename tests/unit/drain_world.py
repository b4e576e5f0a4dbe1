"""A fleet, a dispatcher and the steering around one journal, for tests of draining."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from actors.dispatcher import Dispatcher
from actors.drain import Drains
from actors.fleet import FleetKeeper, FleetSettings
from actors.steering import Live, Steering, Stores
from actors.stores import RayStores
from cluster.core.fleet import FleetPolicy
from cluster.core.matching import Want
from cluster.core.ports import Movement, Order
from cluster.core.record import AttemptStarted, ParametersFetched
from cluster.core.types import (
    AccountFacts,
    AccountView,
    Address,
    AttemptId,
    CardUuid,
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    NodeStatus,
    RayNodeId,
    Requirement,
    Timestamp,
    Wei,
    Work,
)
from cluster.status import DrainStatus
from cluster.steering import Done, Drain, EndDrain
from cluster.steering import Order as Steered
from tests.unit.actor_fakes import ALICE, BOB, GOOD, KIND, gpu_of
from tests.unit.actor_house import House

TREASURY = Address("0x" + "ee" * 20)
POLICY = FleetPolicy(Wei(400), Wei(10), Wei(5), Wei(20))


def card(name: str, node: str = "node", kind: GpuClass = KIND) -> Gpu:
    """A card with a UUID of its own, which a new start of Ray doesn't change."""
    made = replace(gpu_of(GpuId(name), kind=kind), ray_node=RayNodeId(node))
    return replace(made, uuid=CardUuid(f"GPU-{name}"))


class Site:
    """One operator: who serves, which cards are there, and what is asked of both."""

    def __init__(
        self,
        folder: Path,
        *cards: Gpu,
        settings: FleetSettings | None = None,
        accounts: Mapping[int, Address] | None = None,
    ) -> None:
        self.house = House(folder, cards)
        self.settings = settings or FleetSettings(POLICY)
        self.accounts = accounts or {1: ALICE, 2: BOB}
        self.network.treasury_has = Wei(10_000)
        self.views: dict[Address, AccountView] = {}
        self.stale: set[Address] = set()
        self.begin()

    def begin(self) -> None:
        """A new term, from what is stored."""
        self.house.begin_term()
        house = self.house
        self.drains = Drains(house.ledger)
        house.pool.drain(self.drains.covers)
        self.keeper = FleetKeeper(
            house.ledger,
            house.network,
            RayStores(None, "1", ()),
            self.drains,
            self.accounts,
            TREASURY,
            self.settings,
            house.pool.gpus,
            self._view_of,
            lambda: house.dispatcher.outstanding(Timestamp(house.clock())),
            house.clock,
        )
        self.steering = Steering(
            house.ledger,
            house.pool.gpus,
            self.drains,
            house.dispatcher,
            house.safeguards,
            self.keeper,
            cast(Stores, None),
            cast(Live, None),
            self.accounts,
            house.settled.append,
            house.clock,
        )

    def _view_of(self, account: Address) -> AccountView | None:
        return None if account in self.stale else self.views.get(account)

    @property
    def network(self) -> Any:
        return self.house.network

    @property
    def dispatcher(self) -> Dispatcher:
        return self.house.dispatcher

    def settle(self) -> None:
        """Let the term be old enough to know the cluster."""
        self.turn()
        self.later(self.settings.patience + 1)
        self.turn()

    def later(self, seconds: float) -> None:
        self.house.clock.now += seconds

    def see(
        self,
        account: Address,
        status: NodeStatus,
        balance: int | None = None,
        at: int = 100,
        kind: GpuClass = KIND,
    ) -> None:
        out = status is NodeStatus.QUIT
        stake = Wei(0 if out else 400)
        if balance is None:
            # A stake that is given back is the account's again.
            balance = 420 if out else 20
        facts = AccountFacts(account, status, None if out else kind, stake, Wei(balance), 0, None)
        self.views[account] = AccountView(at, Timestamp(self.house.clock()), facts, ())
        self.keeper.standings.looked(self.views[account])

    def moving(self, *accounts: Address) -> None:
        self.network.moving = {each: Movement(is_open=True) for each in accounts}

    def turn(self) -> list[tuple[object, ...]]:
        """What one turn of the fleet asks of the network."""
        return asyncio.run(self.turning())

    async def turning(self) -> list[tuple[object, ...]]:
        before = len(self.network.calls)
        await self.keeper.turn()
        calls: list[tuple[object, ...]] = self.network.calls[before:]
        return [call for call in calls if call[0] not in {"balance", "movements"}]

    async def order(self, order: Steered) -> Done:
        return await self.steering.perform(order, "test")

    def drain(self, what: Any = "everything", name: str = "", now: bool = False) -> Done:
        return asyncio.run(self.order(Drain(what=what, name=name, now=now)))

    def end_drain(self, what: Any = "everything", name: str = "") -> Done:
        return asyncio.run(self.order(EndDrain(what=what, name=name)))

    @property
    def status(self) -> DrainStatus:
        return self.steering.drain_status()

    def compute(
        self,
        task: Commitment,
        gpu: GpuId,
        deadline: float,
        seconds: float = 10.0,
        min_vram: int = 4,
        account: Address = ALICE,
    ) -> AttemptId:
        """Have the card compute the task; within an event loop."""
        house = self.house
        attempt = house.new_attempt_id()
        house.open(task, ParametersFetched(GOOD), AttemptStarted(attempt, gpu), account=account)
        requirement = Requirement(GigaBytes(min_vram), "", GigaBytes(0))
        want = Want(task, requirement, "p", "b", Timestamp(deadline), seconds, frozenset())
        order = Order(attempt, task, 0, "{}", Timestamp(deadline))
        now = Timestamp(house.clock())
        house.dispatcher.follow(gpu, order, want, Work("sd", 1.0), now)
        return attempt
