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
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property

import ray
import structlog
from sqlalchemy.exc import SQLAlchemyError

from actors.leasing import Taken, take
from actors.ledger import Ledger
from actors.names import RAY_ADDRESS, REFUSED
from actors.overview import Sight, describe
from actors.patience import Patience
from actors.readers import Readers
from actors.steering import NOT_ACTING
from actors.term import Term
from actors.world import World
from cluster import journal_history
from cluster.api.shared import Shared
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState
from cluster.core.errors import ClusterError, ConfigError, LeaseLost
from cluster.core.types import (
    RayNodeId,
    Timestamp,
)
from cluster.earnings import SECONDS, Earnings, Step, earnings_of, numbers
from cluster.journal import HOST, SqlJournal
from cluster.journal_history import Audited
from cluster.logs import Level
from cluster.lookups import Lookups
from cluster.status import Status
from cluster.steering import ORDERS
from cluster.story import UnknownTask, bundle_of, file_of, story_of

THREADS_GIVE_WAY_SECONDS = 0.001
"""For how long a thread of ours that renders or reads may keep the interpreter from the loop; it is
Python's to ask it, and it does after 5 ms unless it is told."""
BETWEEN_TERMS_SECONDS = 0.5
EARNED_SECONDS = 60.0
"""For how long earnings are as they were."""
MOST_EARNED = 16
"""Answers of that kind that are kept."""


class Coordinator:
    """The plain class behind the actor. `holder` is the same for an actor Ray has restarted.

    Without a world it lives on to be asked why: of what an actor died of, only a text is left.
    """

    def __init__(self, world: World | ConfigError, holder: str) -> None:
        self._found = world
        self._holder = holder
        self._term: Term | None = None
        self._broke = ""
        """What the last term ended of, until the next one is under way."""
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._rendering = asyncio.Lock()
        self._outbox_unread = False
        """Whether that was told of since it was read last."""
        self._earned: dict[tuple[int, Step], Shared[dict[str, object]]] = {}
        """Answers by what was asked, those asked for last at the end."""
        self._readers = Readers()
        self._log = structlog.get_logger("coordinator")

    @property
    def _world(self) -> World:
        """Raises the `ConfigError` for which there is none."""
        if isinstance(self._found, ConfigError):
            raise ConfigError(str(self._found))
        return self._found

    @cached_property
    def _lookups(self) -> Lookups:
        return Lookups(self._world.journal)

    async def run(self) -> None:
        """Serve one term of office after the other until `stop`."""
        patience = Patience(BETWEEN_TERMS_SECONDS)
        try:
            while not self._stopping.is_set():
                taken = await self._acquire()
                if taken is None:
                    await self._pause(self._world.lease_seconds / 3)
                    continue
                self._log.info("acting", epoch=taken.lease.epoch)
                began = self._world.clock()
                broke = await self._serve(taken)
                await self._pause(patience.after(broke, self._world.clock() - began))
        finally:
            self._ended.set()
            self._lookups.close()
            await asyncio.to_thread(self._world.traces.flush)

    async def _acquire(self) -> Taken | None:
        world = self._world
        try:
            return await take(
                world.journal, self._holder, world.clock, world.lease_seconds, self._stopping
            )
        except Exception:  # noqa: BLE001 - the top of a supervised loop
            self._log.exception("journal_away")
            return None

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _serve(self, taken: Taken) -> bool:
        """A term; whether it broke."""
        world, lease, broken = self._world, taken.lease, False
        try:
            ledger = Ledger.load(world.journal, lease, world.clock)
            self._leave_out_strangers(ledger)
            world.journal.set_cursor(lease, RAY_ADDRESS, world.ray_address)
            world.journal.set_cursor(lease, HOST, socket.gethostname())
            async with world.open_network(lambda: ledger.lease) as network:
                self._term = Term(self._world, ledger, network, self, taken.until)
                self._broke = ""
                if self._stopping.is_set():
                    self._term.end()
                await self._term.run()
        except* LeaseLost:
            self._log.warning("lease_lost", epoch=lease.epoch)
            # Whoever has it now may be this actor's own successor: don't pass for it, but wait.
            self._holder = f"{self._holder}'"
        except* Exception as broke:  # noqa: BLE001 - the top of a supervised loop
            # A term that broke is begun again from the journal.
            broken = True
            self._broke = _leaf(broke)
            world.metrics.term_broke()
            self._log.exception("term_broke", epoch=lease.epoch)
        finally:
            self._term = None
        return broken

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
        if not isinstance(self._found, ConfigError):
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
        metrics.network.outbox(self._outbox_states())
        return metrics.render()

    def _outbox_states(self) -> Mapping[RowState, int] | None:
        """None while the journal can't be read: that nobody acts is wanted all the more then."""
        try:
            with self._world.journal.read() as connection:
                found = outbox_rows.states(connection)
        except SQLAlchemyError as error:
            if not self._outbox_unread:
                self._log.warning("outbox_unread", error=type(error).__name__)
            self._outbox_unread = True
            return None
        self._outbox_unread = False
        return found

    async def perform(self, order: Mapping[str, object], who: str) -> dict[str, object]:
        """Have an operator's order carried out: `cluster.steering.Done` as plain JSON values."""
        _ = self._world  # one without says why, rather than that it doesn't act
        found = ORDERS.validate_python(order)
        log = self._log.bind(by=who, order=dict(order))
        if self._term is None:
            # No journal may be written now: this line is all that is left of it.
            log.warning("order_refused", why=NOT_ACTING.text)
            return NOT_ACTING.model_dump(mode="json")
        try:
            done = await self._term.perform(found, who)
        except Exception as error:
            log.error("order_broke", error=f"{type(error).__name__}: {error}")
            raise
        return done.model_dump(mode="json")

    def shown(self, who: str, what: str, task: str) -> None:
        """Somebody is given what is somebody's (`what`) of a task: written down before it is."""
        now = Timestamp(self._world.clock())
        if not self._readers.is_news(who, what, task, now):
            return
        self._log.warning("shown", by=who, what=what, task=task)
        if self._term is not None:
            with contextlib.suppress(LeaseLost):
                self._term.note(Audited(now, who, f"show_{what}", {"task": task}, "shown"))

    def leave(self, node: str | None) -> int:
        """Give a machine that goes away (None: all of them) nothing new; how many of its cards
        still compute. Nothing durable: what comes after it works on."""
        return self._world.pool.leave(None if node is None else RayNodeId(node))

    # --- what the journal tells; raises `TooBusy` when too much is asked ------------------------

    async def story(self, name: str) -> dict[str, object]:
        """`cluster.story.TaskStory`; raises `UnknownTask`."""
        world = self._world
        found = await self._lookups.ask(
            lambda journal: story_of(journal, name, world.explorer, world.artifacts.kept)
        )
        return found.model_dump(mode="json")

    async def file(self, name: str, file: str) -> bytes:
        """A file of a task's result; raises `UnknownTask` for one that isn't kept too."""
        task, ref = await self._lookups.ask(lambda journal: file_of(journal, name, file))
        try:
            ((_, data),) = await self._world.artifacts.get(task, (ref,))
        except ClusterError as error:
            raise UnknownTask(str(error)) from None
        return data

    async def bundle(self, name: str) -> dict[str, object]:
        """A task's story, parameters and failed attempts; raises `UnknownTask`."""
        return await self._lookups.ask(lambda journal: bundle_of(journal, name))

    async def earnings(self, since: float, step: Step) -> dict[str, object]:
        """`cluster.earnings.Earnings`; the same for all who ask within a minute."""
        first, last = numbers(Timestamp(since), Timestamp(self._world.clock()), step)

        async def look() -> dict[str, object]:
            found = await self._lookups.ask(lambda journal: _earnings(journal, first, last, step))
            return found.model_dump(mode="json")

        shared = self._earned.pop((first, step), None)
        if shared is None:
            shared = Shared(look, EARNED_SECONDS, time.monotonic)
        kept = list(self._earned.items())[1 - MOST_EARNED :]
        self._earned = {**dict(kept), (first, step): shared}
        return await shared.get()

    async def audit(self, limit: int) -> list[dict[str, object]]:
        """What operators had done, the newest first: `cluster.steering.ActionView`."""
        return await self._lookups.ask(lambda journal: _audit(journal, limit))

    # --- what can change while it runs ----------------------------------------------------------

    def reload(self) -> tuple[str, ...]:
        """Take over what has changed in the configuration's file; raises `ConfigError`."""
        fresh, changed = self._world.reload()
        self._found = replace(
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
        if isinstance(self._found, ConfigError):
            return f"{REFUSED}{self._found}"
        if self._stopping.is_set() or self._ended.is_set():
            return "ended"
        return f"{self._world.version}+{self._world.config_digest}"

    def _status(self) -> Status:
        world, pool = self._world, self._world.pool
        cards = (*pool.gpus(), *pool.unknown())
        sight = Sight(
            version=world.version,
            config_digest=world.config_digest,
            now=Timestamp(world.clock()),
            treasury=world.treasury,
            chain_id=world.chain_id,
            accounts=world.accounts,
            not_acting=self._broke,
            gpus=tuple((gpu, pool.report(gpu.gpu_id)) for gpu in cards),
            stores=world.stores.reports(),
        )
        term = self._term
        return describe(sight if term is None or not term.holds else term.add_to(sight))


def _earnings(journal: SqlJournal, first: int, last: int, step: Step) -> Earnings:
    classes = {each.address: each.gpu_class for each in journal.assignments()}
    takings = journal.takings(SECONDS[step], first, last)
    return earnings_of(takings, classes, first, last, step)


def _audit(journal: SqlJournal, limit: int) -> list[dict[str, object]]:
    with journal.read() as connection:
        return [asdict(each) for each in journal_history.actions(connection, limit)]


def _leaf(group: BaseException) -> str:
    """The first thing that went wrong, in a line; of a bug not more than its kind."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return str(group) if isinstance(group, ClusterError) else f"{type(group).__name__}, see its log"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class CoordinatorActor(Coordinator):
    """Detached, named `NAME`, pinned to the head. Reads its keys and configuration itself:
    what is an argument, Ray keeps."""

    async def __init__(self, assemble: Callable[[], World]) -> None:  # type: ignore[misc]
        sys.setswitchinterval(THREADS_GIVE_WAY_SECONDS)
        holder = ray.get_runtime_context().get_actor_id()
        try:
            world = assemble()
        except ConfigError as error:
            Coordinator.__init__(self, ConfigError(str(error)), "")
            return
        Coordinator.__init__(self, world, f"coordinator:{holder}")
        self._running = asyncio.get_running_loop().create_task(self.run())
