"""A term of office: from taking the lease to losing it, one loop an account against the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from actors import lag
from actors.bundles import Bundles
from actors.dispatcher import Dispatcher, Outstanding
from actors.drain import Drains
from actors.evidence import Evidence
from actors.fleet import FleetKeeper
from actors.ledger import Ledger
from actors.overview import Sight, totals_of
from actors.reconciler import Reconciler
from actors.safeguards import Safeguards
from actors.steering import Live, Steering
from actors.stores import FETCHED_BYTES, of_class
from actors.world import LiveSettings, RunningNetwork, World
from cluster import journal_history
from cluster.core import declaring
from cluster.core.errors import NetworkUnavailable
from cluster.core.ports import KICKED_OUT, SLASHED, Wakeup
from cluster.core.record import TaskRecord
from cluster.core.types import (
    AccountView,
    Address,
    Commitment,
    GpuClass,
    ModelId,
    TaskStatus,
    Timestamp,
)
from cluster.journal_history import Audited
from cluster.steering import Done, Order

SWEEP_SECONDS = 15.0
"""Between two accounts of the sweep, which looks at one after the other, whatever their number."""
BUSY_LOOK_SECONDS = 10.0
"""How often an account with a task is looked at when nothing wakes it."""
FIRST_LOOKS = 8
"""Of how many accounts at one time, as a term begins."""
POOL_SECONDS = 1.0
STORES_SECONDS = 3.0
RELAY_SECONDS = 10.0
"""So often it is seen whether the relay is to be asked if it is there."""


class Term:
    """From taking the lease to losing it. `held_until` is by this machine's clock."""

    def __init__(
        self,
        world: World,
        ledger: Ledger,
        network: RunningNetwork,
        live: Live,
        held_until: float,
    ) -> None:
        self._world = world
        self._ledger = ledger
        self._network = network
        self._held_until = held_until
        self._end = asyncio.Event()
        self._broken: BaseException | None = None
        self._safeguards = Safeguards(
            self._ledger,
            world.pool,
            world.safeguards,
            world.metrics,
            world.clock,
            world.new_attempt_id,
            self._dispatch,
        )
        self._dispatcher = Dispatcher(
            self._ledger,
            world.pool,
            world.artifacts,
            world.metrics,
            world.new_attempt_id,
            self._settled,
            self._break,
            self._safeguards,
        )
        self._safeguards.attach(self._dispatcher)
        self._reconciler = Reconciler(
            self._ledger,
            self._network,
            world.artifacts,
            self._dispatcher,
            world.policy,
            world.metrics,
            world.clock,
        )
        bundles = Bundles(self._ledger, self._reconciler.turns, world.pool.report, world.clock)
        self._dispatcher.broke = bundles.keep
        self._drains = Drains(self._ledger)
        world.pool.drain(self._drains.covers)
        self._fleet = FleetKeeper(
            self._ledger,
            self._network,
            world.stores,
            self._drains,
            world.accounts,
            world.treasury,
            world.fleet,
            world.pool.gpus,
            self._view_of,
            self._outstanding,
            world.clock,
        )
        ledger.told = self._closed
        ledger.struck = world.metrics.slashed
        assigned = world.journal.assignments()
        world.metrics.belong({each.address: each.gpu_class for each in assigned})
        self._steering = Steering(
            self._ledger,
            world.pool.gpus,
            self._drains,
            self._dispatcher,
            self._safeguards,
            self._fleet,
            world.stores,
            live,
            world.accounts,
            self._settled,
            world.clock,
        )
        self._evidence = Evidence(ledger, world.artifacts, world.clock)
        self._wake = {address: asyncio.Event() for address in world.accounts.values()}
        self._looking = asyncio.Semaphore(FIRST_LOOKS)
        self._views: dict[Address, AccountView] = {}
        self._stale: set[Address] = set()
        """Accounts of which something was heard since they were last looked at."""
        self._invalidated: set[Commitment] = set()
        """Tasks that cost an account its stake: each is told of once, and may be cleared."""
        self._ahead = 0.0
        ledger.clock = self._network_clock
        self._chain_errors: dict[Address, str] = {}
        self._log = structlog.get_logger("coordinator")

    async def run(self) -> None:
        world = self._world
        world.pool.on_change(self._cards_changed)
        await world.pool.refresh()
        try:
            async with asyncio.TaskGroup() as group:
                loops = [
                    self._renew(),
                    self._network.run(),
                    lag.watch(world.metrics.lagged),
                    self._listen(),
                    world.pool.run(POOL_SECONDS),
                    self._fleet.run(),
                    self._tend_stores(),
                    self._watch_relay(),
                    self._safeguards.run(),
                    self._evidence.run(),
                    self._sweep(),
                    *(self._tend(address) for address in world.accounts.values()),
                ]
                tasks = [group.create_task(loop) for loop in loops]
                await self._end.wait()
                for task in tasks:
                    task.cancel()
                if self._broken is not None:
                    raise self._broken
        finally:
            await self._dispatcher.stop()
        world.journal.release(self._ledger.lease)

    def end(self) -> None:
        self._end.set()

    def _closed(self, record: TaskRecord) -> None:
        self._fleet.closed(record)
        self._safeguards.blame()
        self._world.traces.closed(record)

    def reconfigure(self, fresh: LiveSettings) -> None:
        self._reconciler.policy = fresh.policy
        self._fleet.reconfigure(fresh.fleet)
        self._safeguards.reconfigure(fresh.safeguards)

    def add_to(self, sight: Sight) -> Sight:
        """What only the acting coordinator knows."""
        return replace(
            sight,
            epoch=self._ledger.lease.epoch,
            views=self._views,
            assigned=self._assigned(),
            open=tuple(self._ledger.open.values()),
            closed=tuple(self._ledger.closed),
            totals=totals_of(self._ledger.outcomes, self._ledger.paid, len(self._ledger.slashed)),
            turns=self._reconciler.turns,
            chain_error=self._chain_error(),
            slashed=frozenset(self._ledger.slashed),
            canaries=self._safeguards.passed(),
            relay_error=self._reconciler.relay_error,
            endpoints=self._network.endpoints(),
            fleet=self._fleet.view,
            drain=self._steering.drain_status(),
            alerts=(
                *self._network.alerts(),
                *self._safeguards.alerts(),
                *self._fleet.alerts(),
                *self._world.stores.alerts(),
                *self._evidence.alerts(),
            ),
        )

    async def perform(self, order: Order, who: str) -> Done:
        return await self._steering.perform(order, who)

    def note(self, audited: Audited) -> None:
        """Write down what wasn't an order. Raises `LeaseLost`."""
        with self._world.journal.write(self._ledger.lease) as connection:
            journal_history.note_action(connection, audited)

    def _chain_error(self) -> str | None:
        """Why the chain isn't reached. The network knows first: idle accounts look seldom."""
        errors = self._chain_errors
        if (trouble := self._network.trouble()) is not None:
            return trouble
        return next(iter(errors.values())) if len(errors) == len(self._wake) else None

    # --- loops -----------------------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether the lease is still ours, by this machine's clock; one that was frozen, or can't
        renew it, says so before it comes to end the term. No write depends on it."""
        return self._world.clock() < self._held_until

    async def _renew(self) -> None:
        world, ledger = self._world, self._ledger
        while True:
            # With two thirds of it left: it may be old already when a term begins.
            left = self._held_until - world.clock()
            await asyncio.sleep(max(0.0, left - world.lease_seconds * 2 / 3))
            now = Timestamp(world.clock())
            ledger.lease = world.journal.renew(ledger.lease, now, world.lease_seconds)
            self._held_until = now + world.lease_seconds

    async def _watch_relay(self) -> None:
        while True:
            await self._reconciler.ask_relay()
            await asyncio.sleep(RELAY_SECONDS)

    async def _listen(self) -> None:
        while True:
            wakeup = await self._network.next_wakeup()
            self._befell(wakeup)
            if wakeup.models and wakeup.account is not None:
                self._want(wakeup.account, wakeup.models)
            for address, event in self._wake.items():
                if wakeup.account in (None, address):
                    self._stale.add(address)
                    event.set()

    async def _tend(self, account: Address) -> None:
        """Look, act, wait; for ever. A failure to read is waited out with growing patience."""
        patience = 0.5
        while True:
            self._wake[account].clear()
            wait: float | None
            try:
                async with self._looking:
                    wait = await self._turn(account)
                patience = 0.5
                self._chain_errors.pop(account, None)
            except NetworkUnavailable as error:
                self._chain_errors[account] = str(error)
                self._log.warning("look_failed", account=account, error=str(error))
                wait, patience = patience, min(patience * 2, 15.0)
            await self._sleep(account, wait)

    async def _turn(self, account: Address) -> float | None:
        """One look at the account and a turn for each of its tasks; seconds until the next look,
        None when nothing is due."""
        known = [record.commitment for record in self._ledger.of_account(account)]
        heard = {account} & self._stale
        view = await self._network.look(account, known)
        lost = {
            task.commitment
            for task in view.tasks
            if task.selected_node == account and task.status is TaskStatus.END_INVALIDATED
        }
        if lost - self._invalidated:
            # Before the fleet can see that the account has quit.
            self._slashed(account, view.account.gpu_class, view.moment)
            self._invalidated |= lost
        sure = not self._fleet.standings.puzzled(view) or await self._inquired(view)
        self._fleet.standings.looked(view, sure)
        # Only now: nothing is done for what was found and not judged.
        self._views[account] = view
        # What is heard while looking may not be in what was seen.
        self._stale -= heard
        self._ahead = view.now - self._world.clock()
        due = await self._reconciler.turn(view)
        self._dispatch()
        self._world.metrics.turn_ended(Timestamp(self._world.clock()))
        busy = bool(self._ledger.of_account(account))
        # One without a task, and as it should be, waits for what wakes it, be it only the sweep.
        doubtful = self._fleet.standings.of(account).is_doubtful
        longest = BUSY_LOOK_SECONDS if busy or doubtful else None
        return min((each for each in (due, longest) if each is not None), default=None)

    async def _inquired(self, view: AccountView) -> bool:
        """The account isn't as it should be. Whether all is known that the network did to it."""
        account = view.account.address
        since = self._fleet.standings.seen_well(account)
        try:
            for wakeup in await self._network.befell(account, since, view.moment):
                self._befell(wakeup)
        except NetworkUnavailable as error:
            self._log.warning("account_in_doubt", account=account, error=str(error))
            return False
        return True

    def _befell(self, wakeup: Wakeup) -> None:
        """What the network did to an account, whose story may come more than once."""
        account = wakeup.account
        if account is None:
            return
        if wakeup.reason == KICKED_OUT and self._fleet.standings.kicked(account, wakeup.moment):
            self._log.error("kicked_out", account=account)
            self._world.metrics.kicked_out()
        elif wakeup.reason == SLASHED:
            view = self._views.get(account)
            gpu_class = None if view is None else view.account.gpu_class
            self._slashed(account, gpu_class, wakeup.moment)

    def _slashed(self, account: Address, gpu_class: GpuClass | None, moment: int) -> None:
        """The account lost its stake: its task's record may never show it, so it is marked."""
        known = account in self._ledger.slashed
        if self._fleet.slashed(account, gpu_class, moment) and not known:
            self._log.error("slashed", account=account)

    async def _sweep(self) -> None:
        """Have every account looked at in turn: so every event is optional."""
        while True:
            for event in self._wake.values():
                await asyncio.sleep(SWEEP_SECONDS)
                event.set()

    async def _sleep(self, account: Address, seconds: float | None) -> None:
        # Not wait_for: on Python 3.11 it can swallow a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake[account].wait()

    async def _tend_stores(self) -> None:
        """Watch the machines' model stores, and tell the network what has come."""
        try:
            await self._watch_stores()
        finally:
            # Another coordinator tends them now; one that stands by knows nothing of them.
            self._world.stores.forget()

    async def _watch_stores(self) -> None:
        declared: set[tuple[Address, ModelId]] = set()
        while True:
            stores, gpus = self._world.stores, self._world.pool.gpus()
            await stores.refresh({gpu.ray_node for gpu in gpus})
            self._count_store_events()
            here = {kind: stores.here(of_class(gpus, kind)) for kind in {g.gpu_class for g in gpus}}
            quiet = self._fleet.quiet()
            for account, model in declaring.reports(self._views.values(), here, declared, quiet):
                try:
                    await self._network.report_model(account, model)
                except NetworkUnavailable as error:
                    self._log.warning("model_not_reported", model=model, error=str(error))
                else:
                    self._log.info("model_reported", account=account, model=model)
                    declared.add((account, model))
            await asyncio.sleep(STORES_SECONDS)

    def _count_store_events(self) -> None:
        for (event, label), count in self._world.stores.news().items():
            if event == FETCHED_BYTES:
                self._world.metrics.stores.fetched(label, count)
            else:
                self._world.metrics.stores.happened(event, label, count)

    def _want(self, account: Address, models: Sequence[ModelId]) -> None:
        """The network may give the account tasks for these: its class's machines fetch them."""
        view = self._views.get(account)
        if view is not None:
            cards = of_class(self._world.pool.gpus(), view.account.gpu_class)
            self._world.stores.want(cards, models)

    def _view_of(self, address: Address) -> AccountView | None:
        """What may be acted on: nothing that is out of date."""
        return None if address in self._stale else self._views.get(address)

    def _outstanding(self) -> list[Outstanding]:
        return self._dispatcher.outstanding(Timestamp(self._network_clock()))

    def _assigned(self) -> Mapping[int, GpuClass]:
        return {each.index: each.gpu_class for each in self._ledger.assigned()}

    def _network_clock(self) -> float:
        """The network's time, carried on from the last look by the wall clock."""
        return self._world.clock() + self._ahead

    # --- called back -----------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._dispatcher.dispatch(Timestamp(self._network_clock()))

    def _cards_changed(self) -> None:
        self._safeguards.wake()
        self._dispatch()

    def _settled(self, task: Commitment) -> None:
        record = self._ledger.open.get(task)
        if record is not None:
            self._wake[record.account].set()

    def _break(self, error: BaseException) -> None:
        self._broken = error
        self._end.set()
