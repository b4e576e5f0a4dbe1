"""The one coordinator: holds the lease, looks at the accounts, runs the core against the shells.

A term of office lasts while the lease is held. In it, one loop an account looks at the chain and
gives each of its tasks a turn; wake-ups and due times only say "look now". Everything is rebuilt
from the journal at the start of a term, so ending one (a lost lease, a crash, a bug) costs only
the time to come back.

    acquire lease ─▶ term: renew · watch GPUs · wake-ups · fleet · canaries · a loop each account ─┐
         ▲──────────────────────────────────────────────────────────────────────────────── (lost) ◀┘
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import ray
import structlog

from actors import lag
from actors.bundles import Bundles
from actors.dispatcher import Dispatcher, Outstanding
from actors.drain import Drains
from actors.fleet import FleetKeeper, FleetSettings
from actors.ledger import Ledger
from actors.overview import Sight, describe, totals_of
from actors.pool import RayGpuPool
from actors.reconciler import Reconciler
from actors.safeguards import Safeguards, SafeguardSettings
from actors.steering import NOT_ACTING, Live, Steering
from actors.stores import FETCHED_BYTES, RayStores, of_class
from cluster import journal_history
from cluster.chain import outbox_rows
from cluster.chain.endpoints import EndpointView
from cluster.core import declaring
from cluster.core.errors import ClusterError, ConfigError, LeaseLost, NetworkUnavailable
from cluster.core.lifecycle import Policy
from cluster.core.ports import Artifacts, Lease, Network
from cluster.core.record import TaskRecord
from cluster.core.types import (
    AccountView,
    Address,
    AttemptId,
    Commitment,
    GpuClass,
    ModelId,
    RayNodeId,
    TaskStatus,
    Timestamp,
)
from cluster.earnings import SECONDS, Earnings, Step, earnings_of
from cluster.journal import SqlJournal
from cluster.logs import Level
from cluster.metrics import Metrics
from cluster.status import Status
from cluster.steering import ORDERS, Done, Order
from cluster.story import UnknownTask, bundle_of, file_of, story_of
from cluster.tracing import NoTraces, Traces

NAME = "coordinator"
"""The actor's name in its Ray namespace."""
SWEEP_SECONDS = 15.0
"""Between two accounts of the sweep, which looks at one after the other, whatever their number."""
BUSY_LOOK_SECONDS = 10.0
"""How often an account with a task is looked at when nothing wakes it."""
FIRST_LOOKS = 8
"""Of how many accounts at one time, as a term begins."""
RAY_ADDRESS = "ray_address"
"""The journal's cursor for where the acting coordinator's Ray cluster is."""
KICKED_OUT = "NodeKickedOut"
SLASHED = "NodeSlashed"
BETWEEN_TERMS_SECONDS = 0.5
POOL_SECONDS = 1.0
STORES_SECONDS = 3.0


class RunningNetwork(Network, Protocol):
    """A network with loops of its own (watcher, outbox), which run while a term lasts."""

    async def run(self) -> None: ...

    def endpoints(self) -> tuple[EndpointView, ...]:
        """How each endpoint that the network is reached by does now."""
        ...

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, in words."""
        ...


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What can change while the coordinator runs."""

    policy: Policy
    fleet: FleetSettings
    safeguards: SafeguardSettings
    level: Level


def _nothing_to_reload() -> tuple[LiveSettings, tuple[str, ...]]:
    raise ConfigError("this coordinator's configuration came from no file")


@dataclass(frozen=True, slots=True)
class World:
    """Everything around the coordinator; `cluster.runtime.assemble` makes it."""

    version: str
    config_digest: str
    chain_id: int
    treasury: Address
    accounts: Mapping[int, Address]
    journal: SqlJournal
    artifacts: Artifacts
    pool: RayGpuPool
    stores: RayStores
    open_network: Callable[
        [Callable[[], Lease]], contextlib.AbstractAsyncContextManager[RunningNetwork]
    ]
    metrics: Metrics
    policy: Policy
    fleet: FleetSettings
    lease_seconds: float
    clock: Callable[[], float]
    new_attempt_id: Callable[[], AttemptId]
    safeguards: SafeguardSettings = SafeguardSettings()
    ray_address: str = ""
    explorer: str | None = None
    """A URL with `{hash}` in it, for people."""
    reload: Callable[[], tuple[LiveSettings, tuple[str, ...]]] = _nothing_to_reload
    set_level: Callable[[Level], None] = lambda _level: None
    traces: Traces = NoTraces()


class Coordinator:
    """The plain class behind the actor. `holder` is the same for an actor Ray has restarted."""

    def __init__(self, world: World, holder: str) -> None:
        self._world = world
        self._holder = holder
        self._term: Term | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._rendering = asyncio.Lock()
        self._log = structlog.get_logger("coordinator")

    async def run(self) -> None:
        """Serve one term of office after the other until `stop`."""
        try:
            while not self._stopping.is_set():
                lease = self._acquire()
                if lease is None:
                    await self._pause(self._world.lease_seconds / 3)
                    continue
                self._log.info("acting", epoch=lease.epoch)
                await self._serve(lease)
                await self._pause(BETWEEN_TERMS_SECONDS)
        finally:
            self._ended.set()
            await asyncio.to_thread(self._world.traces.flush)

    def _acquire(self) -> Lease | None:
        world = self._world
        now = Timestamp(world.clock())
        try:
            lease = world.journal.acquire(self._holder, now, world.lease_seconds)
        except Exception:  # noqa: BLE001 - the top of a supervised loop
            self._log.exception("journal_away")
            return None
        if lease is None:
            self._log.info("waiting_for_the_lease")
        return lease

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _serve(self, lease: Lease) -> None:
        world = self._world
        try:
            ledger = Ledger.load(world.journal, lease, world.clock)
            self._leave_out_strangers(ledger)
            world.journal.set_cursor(lease, RAY_ADDRESS, world.ray_address)
            async with world.open_network(lambda: ledger.lease) as network:
                self._term = Term(self._world, ledger, network, self)
                if self._stopping.is_set():
                    self._term.end()
                await self._term.run()
        except* LeaseLost:
            self._log.warning("lease_lost", epoch=lease.epoch)
            # Whoever has it now may be this actor's own successor: don't pass for it, but wait.
            self._holder = f"{self._holder}'"
        except* Exception:  # noqa: BLE001 - the top of a supervised loop
            # A term that broke is begun again from the journal.
            self._log.exception("term_broke", epoch=lease.epoch)
        finally:
            self._term = None

    def _leave_out_strangers(self, ledger: Ledger) -> None:
        """Tasks of accounts that this configuration doesn't tend stay as they are."""
        ours = set(self._world.accounts.values())
        strangers = {task for task, record in ledger.open.items() if record.account not in ours}
        for task in strangers:
            self._log.warning("task_of_an_account_not_tended", task=task)
            del ledger.open[task]

    async def stop(self) -> None:
        """End the term and give the lease back; pauses, quits and unstakes nothing."""
        self._stopping.set()
        if self._term is not None:
            self._term.end()
        await self._ended.wait()

    def status(self) -> dict[str, object]:
        """`cluster.status.Status` as plain JSON values."""
        return self._status().model_dump(mode="json")

    async def metrics_text(self) -> bytes:
        """In a thread: with hundreds of cards it takes tens of milliseconds of the loop's."""
        status = self._status()
        async with self._rendering:
            return await asyncio.to_thread(self._render, status)

    def _render(self, status: Status) -> bytes:
        metrics = self._world.metrics
        metrics.observe(status)
        with self._world.journal.read() as connection:
            metrics.outbox(outbox_rows.states(connection))
        return metrics.render()

    async def perform(self, order: Mapping[str, object], who: str) -> dict[str, object]:
        """Have an operator's order carried out: `cluster.steering.Done` as plain JSON values."""
        found = ORDERS.validate_python(order)
        done = NOT_ACTING if self._term is None else await self._term.perform(found, who)
        return done.model_dump(mode="json")

    def leave(self, node: str | None) -> int:
        """Give a machine that goes away (None: all of them) nothing new; how many of its cards
        still compute. Nothing durable: what comes after it works on."""
        return self._world.pool.leave(None if node is None else RayNodeId(node))

    # --- what the journal tells, read in a thread: it may be much -------------------------------

    async def story(self, name: str) -> dict[str, object]:
        """`cluster.story.TaskStory`; raises `UnknownTask`."""
        world = self._world
        found = await asyncio.to_thread(
            story_of, world.journal, name, world.explorer, world.artifacts.kept
        )
        return found.model_dump(mode="json")

    async def file(self, name: str, file: str) -> bytes:
        """A file of a task's result; raises `UnknownTask` for one that isn't kept too."""
        task, ref = await asyncio.to_thread(file_of, self._world.journal, name, file)
        try:
            ((_, data),) = await self._world.artifacts.get(task, (ref,))
        except ClusterError as error:
            raise UnknownTask(str(error)) from None
        return data

    async def bundle(self, name: str) -> dict[str, object]:
        """A task's story, parameters and failed attempts; raises `UnknownTask`."""
        return await asyncio.to_thread(bundle_of, self._world.journal, name)

    async def earnings(self, since: float, step: Step) -> dict[str, object]:
        found = await asyncio.to_thread(self._earnings, Timestamp(since), step)
        return found.model_dump(mode="json")

    def _earnings(self, since: Timestamp, step: Step) -> Earnings:
        journal, now = self._world.journal, Timestamp(self._world.clock())
        # From the step's beginning on, which may be before `since`.
        begin = Timestamp(since - since % SECONDS[step])
        classes = {each.address: each.gpu_class for each in journal.assignments()}
        return earnings_of(journal.takings(begin), classes, since, now, step)

    async def audit(self, limit: int) -> list[dict[str, object]]:
        """What operators had done, the newest first: `cluster.steering.ActionView`."""
        return await asyncio.to_thread(self._audit, limit)

    def _audit(self, limit: int) -> list[dict[str, object]]:
        with self._world.journal.read() as connection:
            return [asdict(each) for each in journal_history.actions(connection, limit)]

    # --- what can change while it runs ----------------------------------------------------------

    def reload(self) -> tuple[str, ...]:
        """Take over what has changed in the configuration's file; raises `ConfigError`."""
        fresh, changed = self._world.reload()
        self._world = replace(
            self._world, policy=fresh.policy, fleet=fresh.fleet, safeguards=fresh.safeguards
        )
        if self._term is not None:
            self._term.reconfigure(fresh)
        if any(key.startswith("logs.") for key in changed):
            self._world.set_level(fresh.level)
        return changed

    def set_level(self, level: Level) -> None:
        self._world.set_level(level)

    def release(self) -> str:
        """What the supervisor compares with what it wants; one that has ended passes for none."""
        if self._stopping.is_set() or self._ended.is_set():
            return "ended"
        return f"{self._world.version}+{self._world.config_digest}"

    def _status(self) -> Status:
        world, pool = self._world, self._world.pool
        sight = Sight(
            version=world.version,
            config_digest=world.config_digest,
            now=Timestamp(world.clock()),
            treasury=world.treasury,
            chain_id=world.chain_id,
            accounts=world.accounts,
            gpus=tuple((gpu, pool.report(gpu.gpu_id)) for gpu in pool.gpus()),
            stores=world.stores.reports(),
        )
        return describe(sight if self._term is None else self._term.add_to(sight))


class Term:
    """From taking the lease to losing it."""

    def __init__(self, world: World, ledger: Ledger, network: RunningNetwork, live: Live) -> None:
        self._world = world
        self._ledger = ledger
        self._network = network
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
            lambda address: self._views.get(address),
            self._settled,
            world.clock,
        )
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
                    lag.watch(world.metrics),
                    self._listen(),
                    world.pool.run(POOL_SECONDS),
                    self._fleet.run(),
                    self._tend_stores(),
                    self._safeguards.run(),
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
            totals=totals_of(self._ledger.outcomes, self._ledger.paid),
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
            ),
        )

    async def perform(self, order: Order, who: str) -> Done:
        return await self._steering.perform(order, who)

    def _chain_error(self) -> str | None:
        """Why the chain isn't reached; None as long as any account can be read."""
        errors = self._chain_errors
        return next(iter(errors.values())) if len(errors) == len(self._wake) else None

    # --- loops -----------------------------------------------------------------------------------

    async def _renew(self) -> None:
        world, ledger = self._world, self._ledger
        while True:
            await asyncio.sleep(world.lease_seconds / 3)
            now = Timestamp(world.clock())
            ledger.lease = world.journal.renew(ledger.lease, now, world.lease_seconds)

    async def _listen(self) -> None:
        while True:
            wakeup = await self._network.next_wakeup()
            if wakeup.reason == KICKED_OUT:
                self._log.error("kicked_out", account=wakeup.account)
                self._world.metrics.kicked_out()
                if wakeup.account is not None:
                    self._fleet.kicked(wakeup.account)
            elif wakeup.reason == SLASHED and wakeup.account is not None:
                view = self._views.get(wakeup.account)
                self._slashed(wakeup.account, None if view is None else view.account.gpu_class)
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
            self._slashed(account, view.account.gpu_class)
            self._invalidated |= lost
        self._views[account] = view
        if not heard and self._fleet.settled(account, view):
            self._fleet.looked(account, view.account.status)
        # What is heard while looking may not be in what was seen.
        self._stale -= heard
        self._ahead = view.now - self._world.clock()
        due = await self._reconciler.turn(view)
        self._dispatch()
        self._world.metrics.turn_ended(Timestamp(self._world.clock()))
        busy = bool(self._ledger.of_account(account))
        # One without a task waits for what wakes it, be it only the sweep.
        longest = BUSY_LOOK_SECONDS if busy else None
        return min((each for each in (due, longest) if each is not None), default=None)

    def _slashed(self, account: Address, gpu_class: GpuClass | None) -> None:
        """The account lost its stake: its task's record may never show it, so it is marked."""
        if account not in self._ledger.slashed:
            self._log.error("slashed", account=account)
            self._fleet.slashed(account, gpu_class)
        self._ledger.mark_slashed(account)

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
        declared: set[tuple[Address, ModelId]] = set()
        while True:
            stores, gpus = self._world.stores, self._world.pool.gpus()
            await stores.refresh({gpu.ray_node for gpu in gpus})
            self._count_store_events()
            here = {kind: stores.here(of_class(gpus, kind)) for kind in {g.gpu_class for g in gpus}}
            for account, model in declaring.reports(self._views.values(), here, declared):
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
        return {each.index: each.gpu_class for each in self._world.journal.assignments()}

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


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class CoordinatorActor(Coordinator):
    """Detached, named `NAME`, pinned to the head. Reads its keys and configuration itself:
    what is an argument, Ray keeps."""

    async def __init__(self, assemble: Callable[[], World]) -> None:  # type: ignore[misc]
        holder = ray.get_runtime_context().get_actor_id()
        Coordinator.__init__(self, assemble(), f"coordinator:{holder}")
        self._running = asyncio.get_running_loop().create_task(self.run())
