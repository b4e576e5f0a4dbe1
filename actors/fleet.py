"""Keeps the node accounts as the pool needs them: facts and counts in, the plan's actions out.

What to do is decided by the pure core (cluster.core.fleet, capacity, standing); this gathers what
it needs, stores what is expected before it asks the network for it, and asks. Every action may be
repeated, so a crash at any point costs only the time to come back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from actors.dispatcher import Outstanding
from actors.drain import Drains
from actors.draining import Draining
from actors.ledger import Ledger
from actors.measures import Measures
from actors.stores import RayStores, of_class
from cluster.core import capacity, standing
from cluster.core.capacity import Cards, Load, Target
from cluster.core.errors import NetworkUnavailable
from cluster.core.fleet import (
    Assign,
    BringHome,
    FleetAction,
    FleetPolicy,
    Fund,
    Join,
    NodeAccount,
    Pause,
    Plan,
    Quit,
    Resume,
    Sweep,
    TopUp,
    UpdateVersion,
    belongs,
    plan,
    words,
)
from cluster.core.ports import Movement, Network
from cluster.core.record import TaskRecord
from cluster.core.standing import Place, Standing
from cluster.core.types import (
    AccountView,
    Address,
    Gpu,
    GpuClass,
    GpuState,
    ModelId,
    Timestamp,
    Wei,
)
from cluster.journal import STANDING as _STANDING
from cluster.journal import Assignment
from cluster.status import ClassStatus, FleetStatus

FLEET_SECONDS = 2.0
TREASURY_SECONDS = 15.0
"""How long the treasury's balance is believed while nothing of ours changes it."""
MONEY_SECONDS = 60.0
"""Between two looks at it for people's eyes."""
APPLY_SECONDS = 3600.0
"""How long a plan that was to be applied is acted on."""
MOST_MODELS = 16
_RETIRED = "retired:"
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
        self._stores = stores
        self._drains = drains
        self.draining = Draining(drains)
        self._accounts = accounts
        self._treasury = treasury
        self._settings = settings
        self._gpus = gpus
        self._view_of = view_of
        self._outstanding = outstanding
        self._clock = clock
        self._began = clock()
        self._cards = Cards()
        self._measures = Measures(ledger)
        self._seen_well: dict[Address, int] = {}
        """Moments at which accounts were last found as they should be, in this term."""
        self._money: tuple[float, Wei, Movement] | None = None
        self._treasury_had: Wei | None = None
        self._applying = False
        self._apply_until = 0.0
        self._looked_at_money = float("-inf")
        self.view = FleetStatus(automatic=settings.automatic)
        stored = ledger.journal.cursors(_STANDING)
        self._standings = {Address(each): standing.parsed(text) for each, text in stored.items()}
        self._retired = {Address(a) for a, said in ledger.journal.cursors(_RETIRED).items() if said}
        self._log = structlog.get_logger("fleet")

    # --- what happens ----------------------------------------------------------------------------

    def looked(self, view: AccountView, sure: bool = True) -> None:
        """The account was looked at. `sure`: all is known that the network did to it until then."""
        account, gas = view.account.address, self._settings.policy.most_gas
        before, settled = self._standing(account), self.settled(account, view)
        paid, now = self._paid_block(view), self._now()
        after = standing.judged(before, view.account, now, sure, paid, gas, settled)
        self._keep(account, after)
        if settled and not after.is_doubtful:
            self._seen_well[account] = view.moment
        if after.held and not before.held:
            self._log.error("account_held", account=account, reason=after.held)
        elif after.is_doubtful and not before.is_doubtful:
            status = view.account.status.name.lower()
            self._log.warning("account_in_doubt", account=account, status=status)

    def puzzled(self, view: AccountView) -> bool:
        """Whether something happened to the account that nobody has heard of."""
        account, gas = view.account.address, self._settings.policy.most_gas
        before, settled = self._standing(account), self.settled(account, view)
        return standing.is_puzzling(before, view.account, self._paid_block(view), gas, settled)

    def quiet(self) -> frozenset[Address]:
        """Accounts for which nothing is to be sent that can wait."""
        if self._drains.everything:
            return frozenset(self._accounts.values())
        movements = self._network.movements()
        moving = {a for a, each in movements.items() if each.is_open or each.reports}
        odd = {a for a, each in self._standings.items() if each.held or each.is_doubtful}
        return frozenset(moving | odd)

    def seen_well(self, account: Address) -> int | None:
        """When it was last found as it should be, in this term."""
        return self._seen_well.get(account)

    def doubts(self, account: Address) -> bool:
        return self._standing(account).is_doubtful

    def kicked(self, account: Address, moment: int = 0) -> bool:
        """False for a kick that has been counted."""
        before = self._standing(account)
        after = standing.kicked(before, self._now(), moment)
        self._keep(account, after)
        return after != before

    def slashed(self, account: Address, gpu_class: GpuClass | None, moment: int = 0) -> bool:
        """The account lost its stake, as one of this class, if the network says so. False when
        that is an old story."""
        before = self._standing(account)
        after = standing.slashed(before, moment)
        if after is before:
            return False
        index = next((i for i, each in self._accounts.items() if each == account), None)
        if gpu_class is not None and index is not None and account not in self._classes():
            # What is stopped is found by it, for as long as the operator hasn't cleared it.
            assignment = Assignment(index, account, gpu_class)
            self._ledger.journal.assign(self._ledger.lease, assignment)
        self._keep(account, after)
        return True

    def closed(self, record: TaskRecord) -> None:
        """Learn from a task that was paid how long it was on a card and in the network's hands."""
        gpu_class = self._classes().get(record.account)
        if gpu_class is not None:
            self._measures.learn(gpu_class, record)

    # --- what an operator does -------------------------------------------------------------------

    def left_to_drain(self) -> list[str]:
        """What the accounts still have to do until all that is drained is empty."""
        return self.draining.left(self._node_accounts())

    def clear(self, account: Address) -> str:
        """`cleared`, `free` (nothing stops it), or `unknown`."""
        if account not in self._accounts.values():
            return "unknown"
        slashed, retired = account in self._ledger.slashed, account in self._retired
        there = self._standing(account)
        if not (slashed or retired or there.held or there.kicks or there.is_doubtful):
            return "free"
        if retired:
            self._ledger.journal.set_cursor(self._ledger.lease, f"{_RETIRED}{account}", "")
            self._retired.discard(account)
        if slashed:
            self._ledger.clear_slashed(account)
        self._keep(account, standing.cleared(self._standing(account)))
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

    def apply(self) -> None:
        """Act on the plan until nothing is left of it, whatever `automatic` says; not for ever,
        for what is left may never come to be."""
        self._applying = True
        self._apply_until = self._clock() + APPLY_SECONDS

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, one line each."""
        lines = [f"account {account}: {why}" for account, why in self._held().items()]
        lines += [
            f"{gpu_class.name} is stopped, one of its accounts was slashed: find out why, then "
            "crynux-cluster fleet clear"
            for gpu_class in sorted_(self._stopped())
        ]
        now, ours = self._now(), set(self._accounts.values())
        lines += [
            f"account {account}: it isn't as it should be, and not all that the network did to it "
            "could be read; nothing is done for it"
            for account, each in self._standings.items()
            if account in ours and standing.is_unclear(each, now)
        ]
        for account, each in self._standings.items():
            if each.rejoin_at > now and account in ours:
                lines.append(
                    f"account {account} was kicked out {len(each.kicks)} times; it joins again in "
                    f"{each.rejoin_at - now:.0f} s"
                )
        return (*lines, *self.view.lacks)

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
        if self._now() >= self._apply_until:
            self._applying = False
        for action in found.actions:
            if self.draining.outdates(action, begun) or self._waits_for_a_word(action):
                continue
            try:
                await self._apply(action)
            except NetworkUnavailable as error:
                self._log.warning("fleet_action_failed", action=words(action), error=str(error))
        if not found.actions and not self.view.moving:
            self._applying = False
        self.draining.ended_turn(begun)

    def _waits_for_a_word(self, action: FleetAction) -> bool:
        """Whether the operator wants to say when: what spends, or changes who is in the fleet. That
        accounts rest and wake with their cards and drains, and have gas, is never up to that."""
        if self._settings.automatic or self._applying or not isinstance(action, _BY_HAND):
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
        paying = any(isinstance(each, Fund | TopUp) for each in found.actions)
        if paying or self._clock() - self._looked_at_money > MONEY_SECONDS:
            self._looked_at_money = self._clock()
            with contextlib.suppress(NetworkUnavailable):
                await self._balance()
        if paying:
            found = plan(targets, accounts, policy, await self._balance(), now)
        self.view = FleetStatus(
            automatic=self._settings.automatic,
            stake=str(policy.stake),
            treasury=None if self._treasury_had is None else str(self._treasury_had),
            plan=tuple(map(words, found.actions)),
            moving=sum(each.moving for each in accounts),
            lacks=found.lacks,
            limits=found.limits,
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

    async def _balance(self) -> Wei | None:
        """The treasury's, without what it is paying; asked for only when something is to be
        paid."""
        there, now = self._network.movements().get(self._treasury, Movement()), self._clock()
        known = self._money
        if known is None or now - known[0] > TREASURY_SECONDS or known[2] != there:
            self._treasury_had = await self._network.balance(self._treasury)
            known = self._money = (now, self._treasury_had, there)
        return Wei(max(0, known[1] - there.owes))

    # --- facts for the plan ----------------------------------------------------------------------

    def _now(self) -> Timestamp:
        return Timestamp(self._clock())

    def _standing(self, account: Address) -> Standing:
        return self._standings.get(account, Standing())

    def _keep(self, account: Address, new: Standing) -> None:
        if new != self._standings.get(account):
            journal, lease = self._ledger.journal, self._ledger.lease
            journal.set_cursor(lease, f"{_STANDING}{account}", standing.text(new))
            self._standings[account] = new

    def _held(self) -> dict[Address, str]:
        ours = set(self._accounts.values())
        return {a: each.held for a, each in self._standings.items() if each.held and a in ours}

    def _stopped(self) -> frozenset[GpuClass]:
        """Classes that serve nothing until the operator has cleared their slashed accounts: what
        computed wrongly may do so again."""
        classes = self._classes()
        slashed = self._ledger.slashed & set(self._accounts.values())
        return frozenset(classes[account] for account in slashed if account in classes)

    def _node_accounts(self) -> list[NodeAccount]:
        assigned = {each.index: each.gpu_class for each in self._ledger.assigned()}
        movements = self._network.movements()
        return [
            self._node_account(index, address, assigned.get(index), movements.get(address))
            for index, address in self._accounts.items()
        ]

    def _node_account(
        self, index: int, address: Address, assigned: GpuClass | None, movement: Movement | None
    ) -> NodeAccount:
        view = self._view_of(address)
        there = movement or Movement()
        now_standing = self._standing(address)
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

    def settled(self, account: Address, view: AccountView) -> bool:
        """Whether the look shows everything that we have asked for, and heard of."""
        there = self._network.movements().get(account, Movement())
        newest = max(there.block, self._standing(account).told)
        return not there.is_open and view.moment >= newest

    def _paid_block(self, view: AccountView) -> int:
        """The moment of the newest payment to the account; 0 when the look is older."""
        there = self._network.movements().get(view.account.address, Movement())
        return there.paid_block if there.paid_block <= view.moment else 0

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

    # --- acting ----------------------------------------------------------------------------------

    async def _apply(self, action: FleetAction) -> None:
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
                self._expect(account, Place.SERVING)
                models = self._models_on_disk(gpu_class)
                await network.join(account, gpu_class, self._settings.policy.stake, models)
            case Resume():
                self._expect(account, Place.SERVING)
                await network.resume(account)
            case Pause():
                self._expect(account, Place.PAUSED)
                await network.pause(account)
            case UpdateVersion():
                await network.update_version(account)
            case Quit():
                self._expect(account, Place.OUT)
                await network.quit(account)

    async def _pay(self, action: Fund | TopUp | Sweep | BringHome) -> None:
        account, amount, treasury = action.address, action.amount, self._treasury
        if isinstance(action, Fund | TopUp):
            self._owe(account, amount)
            purpose = "fund" if isinstance(action, Fund) else "gas"
            await self._network.transfer(treasury, account, amount, purpose)
            return
        self._keep(account, standing.gave(self._standing(account), amount))
        if isinstance(action, Sweep):
            await self._network.transfer(account, action.recipient, amount, "sweep")
        else:
            await self._network.transfer(account, treasury, amount, "home")

    def _may(self, action: FleetAction) -> bool:
        there = self._standing(action.address)
        if there.held or there.is_doubtful:
            return False  # since the plan was made
        # A join says which models are there, and the first ones are still to come.
        return not isinstance(action, Join) or self._ready_to_join(action.gpu_class)

    def _expect(self, account: Address, place: Place) -> None:
        self._keep(account, standing.asked(self._standing(account), place))

    def _owe(self, account: Address, amount: Wei) -> None:
        self._money = None
        paid = self._network.movements().get(account, Movement()).paid_block
        self._keep(account, standing.owed(self._standing(account), amount, paid))

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


def sorted_(classes: Iterable[GpuClass]) -> list[GpuClass]:
    return sorted(classes, key=lambda each: (-each.vram, each.name))


def _serves(account: NodeAccount, gpu_class: GpuClass) -> bool:
    return (
        belongs(account) == gpu_class
        and not account.retired
        and account.facts is not None
        and standing.place_of(account.facts.status) is Place.SERVING
    )
