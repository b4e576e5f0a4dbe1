"""Keeps the node accounts as the pool needs them: facts and counts in, the plan's actions out.

What to do is decided by the pure core (cluster.core.fleet, capacity); this gathers what it needs,
and has what is decided carried out. Every action may be repeated, so a crash at any point costs
only the time to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from actors.dispatcher import Outstanding
from actors.drain import Drains
from actors.draining import Draining
from actors.fleet_actions import FleetActions
from actors.ledger import Ledger
from actors.measures import Measures
from actors.standing import Standings
from actors.stores import RayStores
from actors.treasury import Treasury
from cluster import journal_gas
from cluster.core import capacity, standing
from cluster.core.capacity import Cards, Load, Target
from cluster.core.errors import NetworkUnavailable
from cluster.core.fleet import FleetPolicy, Plan, plan
from cluster.core.fleet_actions import (
    Assign,
    BringHome,
    FleetAction,
    Fund,
    Join,
    Quit,
    Sweep,
    TopUp,
    words,
)
from cluster.core.node_accounts import NodeAccount, belongs
from cluster.core.ports import Movement, Network
from cluster.core.record import TaskRecord
from cluster.core.standing import Place
from cluster.core.types import (
    AccountView,
    Address,
    Gpu,
    GpuClass,
    GpuState,
    Timestamp,
    Wei,
)
from cluster.core.wording import times
from cluster.journal import Assignment
from cluster.status import ClassStatus, FleetStatus

FLEET_SECONDS = 2.0
APPLY_SECONDS = 3600.0
"""How long a plan that was to be applied is acted on."""
_RETIRED = "retired:"
_APPLYING = "applying"
"""Until when a plan is applied, in the journal: whoever asked for it isn't asked again."""
_ALL_MONEY = Wei(2**255)
_BY_HAND = Assign | Fund | Join | Quit | Sweep | BringHome
_USABLE = frozenset({GpuState.READY, GpuState.BUSY})


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """`slots`: accounts for each card, None to measure how many; `most_slots` bounds that;
    `slots_by_name`: the same for cards of a class's name.
    `patience`: seconds before accounts of cards that left are paused. `automatic`: False spends
    nothing, and changes nobody's place in the fleet, until it is told to. Accounts of an index
    above `most_accounts` leave for good; None for no bound."""

    policy: FleetPolicy
    slots: int | None = 1
    most_slots: int = 8
    patience: float = 120.0
    automatic: bool = True
    most_accounts: int | None = None
    slots_by_name: Mapping[str, int | None] = field(default_factory=dict)

    def slots_of(self, gpu_class: GpuClass) -> int | None:
        return self.slots_by_name.get(gpu_class.name, self.slots)


class FleetKeeper:
    """`view_of` gives what an account was last seen as, None where that is out of date."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        stores: RayStores,
        drains: Drains,
        accounts: Mapping[int, Address],
        treasury: Address,
        settings: FleetSettings,
        gpus: Callable[[], Sequence[Gpu]],
        view_of: Callable[[Address], AccountView | None],
        outstanding: Callable[[], Iterable[Outstanding]],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._drains = drains
        self.draining = Draining(drains)
        self.standings = Standings(ledger, network, accounts, settings.policy.most_gas, clock)
        self._treasury = Treasury(treasury, network, clock)
        self._actions = FleetActions(
            ledger, network, stores, self.standings, self._treasury, gpus, clock
        )
        self._accounts = accounts
        self._settings = settings
        self._gpus = gpus
        self._view_of = view_of
        self._outstanding = outstanding
        self._clock = clock
        self._began = clock()
        self._cards = Cards()
        self._measures = Measures(ledger)
        self._apply_until = float(ledger.journal.cursor(_APPLYING) or 0.0)
        self.view = FleetStatus(automatic=settings.automatic)
        self._retired = {Address(a) for a, said in ledger.journal.cursors(_RETIRED).items() if said}
        self._log = structlog.get_logger("fleet")

    # --- what happens ----------------------------------------------------------------------------

    def quiet(self) -> frozenset[Address]:
        """Accounts for which nothing is to be sent that can wait."""
        if self._drains.everything:
            return frozenset(self._accounts.values())
        movements = self._network.movements()
        moving = {a for a, each in movements.items() if each.is_open or each.reports}
        return self.standings.odd() | moving

    def slashed(self, account: Address, gpu_class: GpuClass | None, moment: int = 0) -> bool:
        """The account lost its stake, as one of this class, if the network says so. False when
        that is an old story."""
        if standing.is_told(self.standings.of(account), moment):
            return False
        # First of all: a crash right after it, and the event is told again; the other way round
        # the account would be joined again.
        self._ledger.mark_slashed(account)
        index = next((i for i, each in self._accounts.items() if each == account), None)
        if gpu_class is not None and index is not None and account not in self._classes():
            # What is stopped is found by it, for as long as the operator hasn't cleared it.
            assignment = Assignment(index, account, gpu_class)
            self._ledger.journal.assign(self._ledger.lease, assignment)
        self.standings.slashed(account, moment)
        return True

    def closed(self, record: TaskRecord) -> None:
        """Learn from a task that was paid how long it was on a card and in the network's hands."""
        gpu_class = self._classes().get(record.account)
        if gpu_class is not None:
            self._measures.learn(gpu_class, record)

    # --- what an operator does -------------------------------------------------------------------

    def left_to_drain(self, classes: Iterable[GpuClass] | None) -> list[str]:
        """What the accounts still have to do until drained cards of these classes are done with, or
        (None) until all is."""
        return self.draining.left(self._node_accounts(), classes)

    def clear(self, account: Address) -> str:
        """`cleared`, `free` (nothing stops it), or `unknown`."""
        if account not in self._accounts.values():
            return "unknown"
        slashed, retired = account in self._ledger.slashed, account in self._retired
        there = self.standings.of(account)
        if not (slashed or retired or there.held or there.kicks or there.is_doubtful):
            return "free"
        if retired:
            self._ledger.journal.set_cursor(self._ledger.lease, f"{_RETIRED}{account}", "")
            self._retired.discard(account)
        if slashed:
            self._ledger.clear_slashed(account)
        self.standings.cleared(account)
        self._log.info("account_cleared", account=account, slashed=slashed)
        return "cleared"

    def retire(self, account: Address) -> bool:
        """Have it leave for good, and its money go back to the treasury; whether that is new."""
        if account in self._retired:
            return False
        at = str(self._now())
        self._ledger.journal.set_cursor(self._ledger.lease, f"{_RETIRED}{account}", at)
        self._retired.add(account)
        return True

    def is_beyond(self, account: Address) -> bool:
        """Whether the configuration has so many accounts no more."""
        most = self._settings.most_accounts
        return most is not None and any(
            index > most and address == account for index, address in self._accounts.items()
        )

    def _is_retired(self, account: Address) -> bool:
        return account in self._retired or self.is_beyond(account)

    def reconfigure(self, settings: FleetSettings) -> None:
        self._settings = settings
        self.standings.most_gas = settings.policy.most_gas

    def apply(self) -> None:
        """Act on the plan until nothing is left of it, whatever `automatic` says; not for ever,
        for what is left may never come to be."""
        self._apply(self._clock() + APPLY_SECONDS)

    def _apply(self, until: float) -> None:
        self._ledger.journal.set_cursor(self._ledger.lease, _APPLYING, str(until))
        self._apply_until = until

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, one line each."""
        lines = [
            f"account {account}: {why} Nothing is done for it; see to it, then crynux-cluster "
            f"fleet clear {account}"
            for account, why in self.standings.held().items()
        ]
        lines += [
            f"{gpu_class.name} is stopped, {account} of it was slashed: find out why, then "
            f"crynux-cluster fleet clear {account}"
            for account, gpu_class in self._stopping()
        ]
        lines += [
            f"account {account}: it isn't as it should be, and not all that the network did to it "
            "could be read; nothing is done for it until an endpoint of the chain says more, or "
            f"crynux-cluster fleet clear {account}"
            for account in self.standings.unclear()
        ]
        now = self._now()
        lines += [
            f"account {account} was kicked out {times(len(each.kicks))}; it joins again in "
            f"{each.rejoin_at - now:.0f} s"
            for account, each in self.standings.kicked_out().items()
        ]
        return (*lines, *self._actions.alerts(), *self.view.lacks)

    # --- the loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            try:
                await self.turn()
            except NetworkUnavailable as error:
                self._log.warning("fleet_waits", error=str(error))
            await asyncio.sleep(FLEET_SECONDS)

    async def turn(self) -> None:
        """Plan anew, and act unless the operator wants to say when."""
        begun = self.draining.begin_turn()
        found = await self.plan()
        for action in found.actions:
            if self.draining.outdates(action, begun) or self._waits_for_a_word(action):
                continue
            try:
                await self._actions.carry_out(action, self._settings.policy.stake)
            except NetworkUnavailable as error:
                self._log.warning("fleet_action_failed", action=words(action), error=str(error))
        if self._apply_until and not found.actions and not self.view.moving + self.view.unread:
            self._apply(0.0)
        self.draining.ended_turn(begun)

    def _waits_for_a_word(self, action: FleetAction) -> bool:
        """Whether the operator wants to say when: what spends, or changes who is in the fleet. That
        accounts rest and wake with their cards and drains, and have gas, is never up to that."""
        applying = self._now() < self._apply_until
        if self._settings.automatic or applying or not isinstance(action, _BY_HAND):
            return False
        if action.address in self._retired:
            return False
        if not isinstance(action, Assign):
            return True
        view = self._view_of(action.address)
        # As which class an account is joined is only written down.
        return view is None or view.account.gpu_class != action.gpu_class

    async def plan(self) -> Plan:
        """What there is to do now; kept to be shown."""
        accounts = self._node_accounts()
        targets = self._targets(accounts)
        policy, now = self._settings.policy, self._now()
        found = plan(targets, accounts, policy, _ALL_MONEY, now)
        if topped := {each.address for each in found.actions if isinstance(each, TopUp)}:
            accounts = self._with_gas_gone(accounts, topped)
        paying = any(isinstance(each, Fund | TopUp) for each in found.actions)
        await self._treasury.show(anyway=paying)
        if paying:
            found = plan(targets, accounts, policy, await self._treasury.balance(), now)
        had = self._treasury.had
        self.view = FleetStatus(
            automatic=self._settings.automatic,
            stake=str(policy.stake),
            treasury=None if had is None else str(had),
            plan=tuple(map(words, found.actions)),
            moving=sum(each.moving for each in accounts),
            unread=sum(each.facts is None for each in accounts),
            lacks=found.lacks,
            limits=found.limits,
            held=tuple(self.standings.held()),
            retired=tuple(each.address for each in accounts if each.retired),
            classes=tuple(self._class_status(each, targets[each]) for each in sorted_(targets)),
        )
        return found

    def _class_status(self, gpu_class: GpuClass, wanted: Target) -> ClassStatus:
        return ClassStatus(
            name=gpu_class.name,
            vram=gpu_class.vram,
            slots=self._slots_of(gpu_class),
            least=wanted.least,
            most=None if wanted.most == capacity.NO_LIMIT else wanted.most,
            stopped=gpu_class in self._stopped(),
        )

    # --- facts for the plan ----------------------------------------------------------------------

    def _now(self) -> Timestamp:
        return Timestamp(self._clock())

    def _stopped(self) -> frozenset[GpuClass]:
        """Classes that serve nothing until the operator has cleared their slashed accounts: what
        computed wrongly may do so again."""
        return frozenset(gpu_class for _, gpu_class in self._stopping())

    def _stopping(self) -> list[tuple[Address, GpuClass]]:
        """By which account which class is stopped."""
        if not self._ledger.slashed:
            return []
        classes = self._classes()
        slashed = self._ledger.slashed & set(self._accounts.values())
        return [(account, classes[account]) for account in sorted(slashed) if account in classes]

    def _node_accounts(self) -> list[NodeAccount]:
        assigned = {each.index: each.gpu_class for each in self._ledger.assigned()}
        movements = self._network.movements()
        return [
            self._node_account(index, address, assigned.get(index), movements.get(address))
            for index, address in self._accounts.items()
        ]

    def _with_gas_gone(
        self, accounts: Iterable[NodeAccount], topped: Collection[Address]
    ) -> list[NodeAccount]:
        """Those that are to be sent gas, with what became of what they were sent before."""
        treasury, now = self._treasury.address, self._now()
        with self._ledger.journal.read() as connection:
            return [
                replace(each, gas_gone=journal_gas.gone(connection, treasury, each.address, now))
                if each.address in topped
                else each
                for each in accounts
            ]

    def _node_account(
        self, index: int, address: Address, assigned: GpuClass | None, movement: Movement | None
    ) -> NodeAccount:
        view = self._view_of(address)
        there = movement or Movement()
        now_standing = self.standings.of(address)
        return NodeAccount(
            index,
            address,
            assigned,
            None if view is None else view.account,
            moving=there.is_open or (view is not None and view.moment < there.block),
            paying=there.paying or (view is not None and view.moment < there.paid_block),
            barred=address in self._ledger.slashed,
            held=bool(now_standing.held),
            rejoin_at=now_standing.rejoin_at,
            retired=self._is_retired(address),
            doubtful=now_standing.is_doubtful,
            refused={each.verb: each for each in there.refused},
            lacks=there.lacks,
        )

    def _classes(self) -> dict[Address, GpuClass]:
        return {each.address: each.gpu_class for each in self._ledger.assigned()}

    def _targets(self, accounts: Sequence[NodeAccount]) -> dict[GpuClass, Target]:
        here: dict[GpuClass, int] = {}
        gpus = self._gpus()
        for gpu in gpus:
            if gpu.state in _USABLE:
                here[gpu.gpu_class] = here.get(gpu.gpu_class, 0) + 1
        # A term that has just begun doesn't know yet which cards will come.
        settled = self._clock() - self._began >= self._settings.patience
        self._cards = capacity.counted(
            self.draining.before_count(self._cards, gpus),
            here,
            self._now(),
            self._settings.patience,
            settled,
        )
        stopped, drained = self._stopped(), self._drains.everything
        classes = {*here, *(c for each in accounts if (c := belongs(each)) is not None)}
        loads = self._loads(classes)
        targets: dict[GpuClass, Target] = {}
        for gpu_class in classes:
            slots = self._slots_of(gpu_class)
            serving = sum(_serves(each, gpu_class) for each in accounts)
            limit = self._limit_of(gpu_class, loads.get(gpu_class, Load()), serving)
            most = self._most_slots_of(gpu_class)
            found = capacity.target(
                self._cards, gpu_class, slots, limit, stopped, drained, settled, most
            )
            kept = self._cards.kept.get(gpu_class, 0)
            known = slots if self._knows_slots(gpu_class) else None
            targets[gpu_class] = self.draining.target(gpu_class, found, serving, kept, known)
        return targets

    def _knows_slots(self, gpu_class: GpuClass) -> bool:
        measured = self._measures.of(gpu_class).cycle.tasks >= capacity.FEW
        return self._settings.slots_of(gpu_class) is not None or measured

    def _slots_of(self, gpu_class: GpuClass) -> int:
        settings = self._settings
        return self._measures.slots(gpu_class, settings.slots_of(gpu_class), settings.most_slots)

    def _most_slots_of(self, gpu_class: GpuClass) -> int:
        settings = self._settings
        fixed = settings.slots_of(gpu_class)
        return self._measures.most_slots(gpu_class, fixed, settings.most_slots)

    def _loads(self, classes: Iterable[GpuClass]) -> dict[GpuClass, Load]:
        """How near to their deadlines the tasks of each class come, if each card of the class
        takes its share of them."""
        now = self._ledger.clock()
        of_account = self._classes()
        waiting: dict[GpuClass, list[Outstanding]] = {each: [] for each in classes}
        for task in self._outstanding():
            gpu_class = of_account.get(task.account)
            if gpu_class in waiting:
                waiting[gpu_class].append(task)
        found: dict[GpuClass, Load] = {}
        for gpu_class, tasks in waiting.items():
            cards = max(1, self._cards.kept.get(gpu_class, 0))
            known = [
                (each.seconds, at - now) for each in tasks if (at := each.deadline) is not None
            ]
            names = frozenset(each.task for each in tasks)
            found[gpu_class] = Load(capacity.share_of(known, cards), names)
        return found

    def _limit_of(self, gpu_class: GpuClass, load: Load, serving: int) -> int | None:
        """Cards that may come back count: until it is sure that they don't, nobody is paused for
        what waits for them."""
        now, cards = self._clock(), self._cards.kept.get(gpu_class, 0)
        if now - self._began < self._settings.patience:
            return self._measures.of(gpu_class).limit
        wanted = cards * self._slots_of(gpu_class)
        return self._measures.limit(gpu_class, load, serving, cards, wanted, now)


def sorted_(classes: Iterable[GpuClass]) -> list[GpuClass]:
    return sorted(classes, key=lambda each: (-each.vram, each.name))


def _serves(account: NodeAccount, gpu_class: GpuClass) -> bool:
    return (
        belongs(account) == gpu_class
        and not account.retired
        and account.facts is not None
        and standing.place_of(account.facts.status) is Place.SERVING
    )
