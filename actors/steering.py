"""What operators have done: carried out by the acting coordinator, and written down.

An order that can't be carried out changes nothing. Each is written to the journal with who asked
for it and what came of it, refusals included.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from actors.dispatcher import Dispatcher
from actors.drain import Drains, Part
from actors.fleet import FleetKeeper
from actors.keeping import DROPPED
from actors.ledger import Ledger
from actors.safeguards import Safeguards
from cluster import journal_history
from cluster.core.errors import ClusterError, ConfigError, ModelUnavailable, TaskInvalid
from cluster.core.record import TaskRecord
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    Gpu,
    GpuId,
    ModelId,
    Timestamp,
)
from cluster.core.wording import counted
from cluster.journal_history import Audited
from cluster.logs import Level
from cluster.models.keeper import Stays
from cluster.models.refs import of_model_id
from cluster.status import DrainPart, DrainStatus
from cluster.steering import (
    ApplyFleet,
    ClearAccount,
    ClearQuarantine,
    Done,
    Drain,
    DropModel,
    EndDrain,
    ForgetCanary,
    Order,
    PreloadModel,
    ReloadConfig,
    RetireAccount,
    SetLogLevel,
)

NO_STORE = "no machine has a model store: none fetches models (models.sources)"
NOT_ACTING = Done(kind="refused", text="the coordinator is not acting now; try again")


class Stores(Protocol):
    def want(self, gpus: tuple[Gpu, ...], models: tuple[ModelId, ...]) -> int:
        """By how many machines."""
        ...

    async def drop(self, model: str) -> Mapping[str, str]:
        """What came of it on each machine, in a word or some."""
        ...


class Live(Protocol):
    """What can change while the coordinator runs."""

    def reload(self) -> tuple[str, ...]:
        """Take over what has changed in the configuration's file: its keys. Raises `ConfigError`,
        having changed nothing."""
        ...

    def set_level(self, level: Level) -> None: ...


class Steering:
    """`settled`: give the task its turn."""

    def __init__(
        self,
        ledger: Ledger,
        gpus: Callable[[], tuple[Gpu, ...]],
        drains: Drains,
        dispatcher: Dispatcher,
        safeguards: Safeguards,
        fleet: FleetKeeper,
        stores: Stores,
        live: Live,
        accounts: Mapping[int, Address],
        settled: Callable[[Commitment], None],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._gpus = gpus
        self._drains = drains
        self._dispatcher = dispatcher
        self._safeguards = safeguards
        self._fleet = fleet
        self._stores = stores
        self._live = live
        self._accounts = accounts
        self._settled = settled
        self._clock = clock
        self._log = structlog.get_logger("steering")

    async def perform(self, order: Order, who: str) -> Done:
        """Carry it out, and write it down. Raises `LeaseLost`."""
        try:
            done = await self._perform(order)
        except ConfigError as error:
            done = Done(kind="refused", text=str(error))
        arguments = order.model_dump(mode="json")
        action = str(arguments.pop("action"))
        self._log.warning("steered", by=who, action=action, arguments=arguments, outcome=done.text)
        noted = Audited(Timestamp(self._clock()), who, action, arguments, done.text)
        with self._ledger.journal.write(self._ledger.lease) as connection:
            journal_history.note_action(connection, noted)
        return done

    async def _perform(self, order: Order) -> Done:  # noqa: C901 - one line for each
        match order:
            case Drain():
                return await self._drain(order)
            case EndDrain():
                return self._end_drain(order)
            case ClearQuarantine(card=card):
                return self._clear_quarantine(card)
            case ForgetCanary(gpu_class=gpu_class):
                return self._forget_canary(gpu_class)
            case RetireAccount(account=account):
                return self._retire_account(account)
            case ClearAccount(account=account):
                return self._clear_account(account)
            case ApplyFleet():
                self._fleet.apply()
                return Done(text="the plan is carried out")
            case PreloadModel(model=model):
                return self._preload(model)
            case DropModel(model=model):
                return await self._drop(model)
            case SetLogLevel(level=level):
                self._live.set_level(level)
                return Done(text=f"the coordinator logs from {level} on")
            case ReloadConfig():
                changed = self._live.reload()
                if not changed:
                    return Done(kind="nothing", text="the configuration is as it was")
                return Done(text=f"taken over: {', '.join(changed)}")

    # --- drains ----------------------------------------------------------------------------------

    async def _drain(self, order: Drain) -> Done:
        name, gpus = order.name, self._gpus()
        meant = _meant(order, gpus)
        fresh = [gpu for gpu in meant if not self._drains.covers(gpu)]
        match order.what:
            case "card" if meant:
                self._drains.add(cards={name: meant})
            case "node" if meant:
                self._drains.add(nodes={name: meant})
            case "everything":
                self._drains.add(everything=True)
            case _:
                return _unknown(order.what, name)
        self._fleet.draining.take_out(fresh)
        if order.now and order.what != "everything":
            await self._move_away()
        what = order.what if order.what == "everything" else f"{order.what} {name}"
        return Done(text=f"{what} is being drained")

    async def _move_away(self) -> None:
        """What would end well where it is stays, unless another card has it done in time."""
        now = Timestamp(self._ledger.clock())
        cards = {record.open_attempt.gpu_id for record in self._on_drained() if record.open_attempt}
        # All at once: of a machine that hangs, each card takes as long as it may.
        found = self._dispatcher.movable(cards, now)
        await asyncio.gather(*(self._give_up(*each) for each in found))

    async def _give_up(self, gpu: GpuId, task: Commitment, attempt: AttemptId) -> None:
        await self._dispatcher.cancel(gpu, task, attempt)
        self._settled(task)

    def _end_drain(self, order: EndDrain) -> Done:
        drains, what, name = self._drains, order.what, order.name
        after = "accounts resume as their cards are there"
        if what == "everything":
            if not drains.any:
                return Done(kind="nothing", text="nothing was drained")
            drains.end()
            return Done(text=f"the drain has ended; {after}")
        meant = _meant(order, self._gpus())
        ended = (drains.end_card if what == "card" else drains.end_node)(name, meant)
        if not (ended or meant):
            return _unknown(what, name)
        self._fleet.draining.put_back(meant)
        left = self._still_drained(meant)
        if not ended:
            text = f"{what} {name} was not drained by itself"
            return (
                Done(kind="refused", text=f"{text}: {left}")
                if left
                else Done(kind="nothing", text=text)
            )
        if left:
            return Done(text=f"the drain of {what} {name} has ended, but {left}")
        return Done(text=f"{what} {name} takes tasks again; {after}")

    def _still_drained(self, meant: Sequence[Gpu]) -> str:
        """Why cards get no task yet, in words; empty where nothing else is drained."""
        drains = self._drains
        covered = [gpu for gpu in meant if drains.covers(gpu)]
        if drains.everything:
            return "everything is drained; resume without a name ends that"
        nodes = sorted({gpu.ray_node for gpu in covered} & drains.nodes.keys())
        if nodes:
            return f"its machine is drained, node {', '.join(nodes)}"
        names = ", ".join(sorted(gpu.gpu_id for gpu in covered))
        return f"drained by themselves are {names}" if covered else ""

    def _on_drained(self) -> list[TaskRecord]:
        """Tasks that are computed on drained cards."""
        drained = {gpu.gpu_id for gpu in self._gpus() if self._drains.covers(gpu)}
        return [
            record
            for record in self._ledger.open.values()
            if record.open_attempt is not None and record.open_attempt.gpu_id in drained
        ]

    def drain_status(self) -> DrainStatus:
        drains, parts = self._drains, self._drains.parts
        if drains.everything:
            left = [f"{len(self._ledger.open)} tasks are open"] if self._ledger.open else []
            left += self._fleet.left_to_drain(None)
        else:
            left = self._left_of([parts])[0] if drains.any else []
        each_left = self._left_of([[part] for part in parts])
        return DrainStatus(
            everything=drains.everything,
            cards=tuple(sorted(drains.cards)),
            nodes=tuple(sorted(drains.nodes)),
            done=drains.any and not left,
            left=tuple(left),
            parts=tuple(
                DrainPart(what=part.what, name=part.name, left=tuple(left))
                for part, left in zip(parts, each_left, strict=True)
            ),
        )

    def _left_of(self, groups: Sequence[Sequence[Part]]) -> list[list[str]]:
        """What is still to be done until each group of what is drained is empty."""
        accounts_of = functools.cache(self._fleet.left_to_drain)
        tasks = Counter(e.open_attempt.gpu_id for e in self._on_drained() if e.open_attempt)
        busy = [gpu for gpu in self._gpus() if gpu.gpu_id in tasks]
        found = []
        for parts in groups:
            there = [gpu for gpu in busy if any(part.covers(gpu) for part in parts)]
            computed = sum(tasks[gpu.gpu_id] for gpu in there)
            left = [f"{computed} tasks are computed there"] if computed else []
            classes = frozenset(each for part in parts for each in part.classes)
            found.append(left + accounts_of(classes))
        return found

    # --- cards, accounts, models -----------------------------------------------------------------

    def _clear_quarantine(self, card: str) -> Done:
        match self._safeguards.clear(card):
            case "unknown":
                return _unknown("card", card)
            case "free":
                return Done(kind="nothing", text=f"{card} is in no quarantine")
            case _:
                after = "it computes the canary before it gets a task"
                return Done(text=f"{card} is out of quarantine; {after}")

    def _forget_canary(self, gpu_class: str | None) -> Done:
        found = self._safeguards.forget_canary(gpu_class)
        if found:
            after = "the cards are asked before they get a task, and it is recorded anew"
            return Done(text=f"forgotten is what {', '.join(found)} answered; {after}")
        if gpu_class is None or gpu_class in {gpu.gpu_class.name for gpu in self._gpus()}:
            return Done(kind="nothing", text="no canary was answered")
        return _unknown("class", gpu_class)

    def _account(self, name: str) -> Address | None:
        ours = {address.lower(): address for address in self._accounts.values()}
        return ours.get(name.lower())

    def _retire_account(self, name: str) -> Done:
        account = self._account(name)
        if account is None:
            return _no_account(name)
        if self._fleet.standings.of(account).held:
            text = f"{account} is held: see why, and crynux-cluster fleet clear {account} first"
            return Done(kind="refused", text=text)
        if not self._fleet.retire(account):
            return Done(kind="nothing", text=f"{account} is retired already")
        after = "finishes what it has, quits, and what it owns goes back to the treasury"
        return Done(text=f"{account} {after}")

    def _clear_account(self, name: str) -> Done:
        account = self._account(name)
        if account is None:
            return _no_account(name)
        cleared, beyond = self._fleet.clear(account), self._fleet.is_beyond(account)
        leaves = f"{account} is beyond identity.accounts, and leaves for that: raise it"
        if cleared == "free":
            text = leaves if beyond else f"nothing stops {account}"
            return Done(kind="refused" if beyond else "nothing", text=text)
        if beyond:
            return Done(text=f"{account} is cleared; but {leaves}")
        after = "it is joined again when its class has a card for it"
        return Done(text=f"{account} is cleared; {after}")

    def _preload(self, model: str) -> Done:
        try:
            of_model_id(model)
        except (ModelUnavailable, TaskInvalid) as error:
            return Done(kind="unknown", text=f"{model}: {error}; expected kind:name[+variant]")
        gpus = self._gpus()
        if not gpus:
            return Done(kind="refused", text="no machine with cards is there")
        machines = self._stores.want(gpus, (ModelId(model),))
        if not machines:
            return Done(kind="refused", text=NO_STORE)
        there = len({gpu.ray_node for gpu in gpus})
        who = counted(machines, "machine")
        who = f"{machines} of {counted(there, 'machine')}" if machines < there else who
        return Done(text=f"{model} is fetched by {who}, behind what tasks need")

    async def _drop(self, model: str) -> Done:
        try:
            found = await self._stores.drop(model)
        except ClusterError as error:
            return Done(kind="refused", text=f"{model}: {error}")
        if not found:
            return Done(kind="refused", text=NO_STORE)
        words = [f"{node[:8]}: {word}" for node, word in sorted(found.items())]
        came = set(found.values())
        if DROPPED in came and came <= {DROPPED, Stays.NOT_FETCHED.value}:
            return Done(text=f"{model}: {'; '.join(words)}")
        partly = "not everywhere: " if DROPPED in came else ""
        return Done(kind="refused", text=f"{model}: {partly}{'; '.join(words)}")


def _meant(order: Drain | EndDrain, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The cards that are named; none where everything is."""
    match order.what:
        case "card" if order.name:
            return [gpu for gpu in gpus if order.name in {gpu.gpu_id, gpu.uuid}]
        case "node":
            return [gpu for gpu in gpus if order.name == gpu.ray_node]
        case _:
            return []


def _no_account(name: str) -> Done:
    text = f"{name} is none of the node accounts; crynux-cluster accounts has them"
    return Done(kind="unknown", text=text)


def _unknown(what: str, name: str) -> Done:
    text = f"no {what} is known as {name}; crynux-cluster status --json shows them"
    return Done(kind="unknown", text=text)
