"""`ports.Network` in its on-chain form (protocol.md sections 1 to 3)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import structlog

from cluster.chain.chainline import Pulse
from cluster.chain.clock import ChainClock
from cluster.chain.endpoints import Endpoints, EndpointView
from cluster.chain.heads import Heads
from cluster.chain.node_contract import NodeContract, Version
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import Clock, Told, Untold
from cluster.chain.outbox_rows import REPORT, Intent, OutboxRow, task_intent
from cluster.chain.qos_contract import QosContract
from cluster.chain.rpc import LATEST, Block, Reverted, Rpc
from cluster.chain.task_contract import TaskContract
from cluster.chain.wakeups import Wakeups
from cluster.chain.watcher import CURSOR, REORGANISED, Holders, Watcher
from cluster.core.errors import ChainError, ConfigError, NetworkUnavailable
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease, Movement, Wakeup
from cluster.core.record import Claim
from cluster.core.types import (
    AbortReason,
    AccountFacts,
    AccountView,
    Address,
    Commitment,
    GpuClass,
    ModelId,
    Score,
    TaskError,
    TaskFacts,
    TaskStatus,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal

BELIEVED_SECONDS = 60.0
"""How long a head is held on to that the endpoint no longer reaches."""
HEAD_SECONDS = 3.0
"""No head is taken for the newest for longer."""
LIVE_SECONDS = 15.0
"""Between two looks while new heads are announced."""
STALLED_SECONDS, STALLED_GAPS = 60.0, 10
"""No new block for so long, and so many times as long as usual, is an alert."""
MISSED_HEADS = 3
"""After so many blocks' time without one, heads don't count as coming."""
HOPES, SOON_SECONDS = 4, 0.3
"""How often, and after how long, a head that was announced and isn't there is looked for again."""
UNREACHED_SECONDS = 10.0
"""After so long without the logs the chain counts as not reached."""
AGAIN_SECONDS = 60.0
"""A chain that stays away is logged so often."""
READ_BACK = 1_000
"""Blocks before those that weren't handled when a term began: endpoints leave logs out."""
_ANSWERABLE = frozenset({TaskStatus.STARTED, TaskStatus.PARAMETERS_UPLOADED})
_log = structlog.get_logger(__name__)


class Relay(Protocol):
    async def now(self) -> float: ...

    async def fetch_parameters(self, account: Address, task: Commitment) -> str: ...

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Contracts:
    task: TaskContract
    node: NodeContract
    qos: QosContract

    @classmethod
    def at(cls, rpc: Rpc, task: Address, node: Address, qos: Address) -> Contracts:
        return cls(TaskContract(rpc, task), NodeContract(rpc, node), QosContract(rpc, qos))

    def addresses(self) -> Mapping[str, Address]:
        """By name, as `Rpc.check` wants them."""
        return {"task": self.task.address, "node": self.node.address, "qos": self.qos.address}

    async def check(self, rpc: Rpc, chain_id: int) -> None:
        """Raises `ConfigError` when this is another chain, a contract isn't on it, or what is at
        its address is another contract; `ChainError` when that can't be found out."""
        await rpc.check(chain_id, self.addresses())
        block = (await rpc.head()).number
        stranger = self.node.address  # an account that never joined, as ours at first
        answers = await asyncio.gather(
            self.task.current_task(stranger, block),
            self.node.stake(stranger, block),
            self.qos.score(stranger, block),
            return_exceptions=True,
        )
        for (name, address), answer in zip(self.addresses().items(), answers, strict=True):
            if isinstance(answer, Reverted):
                raise ConfigError(
                    f"the contract at {address} isn't the {name} contract: check its address"
                )
            if isinstance(answer, BaseException):
                raise answer


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Seconds between two reads of the logs, and how many wake-ups wait at most. Without a new
    block for `stalled_after` seconds the chain counts as not reached; None where it makes blocks
    only when there is something to put in them."""

    poll: float = 1.0
    waiting: int = 10_000
    stalled_after: float | None = 300.0


@dataclass(frozen=True, slots=True)
class _Looked:
    """What was read at a block, and of which tasks."""

    block: str
    known: frozenset[Commitment]
    view: AccountView

    def fits(self, block: Block, known: Sequence[Commitment]) -> bool:
        return bool(block.hash) and block.hash == self.block and self.known >= set(known)


class ChainNetwork:
    def __init__(
        self,
        rpc: Rpc,
        contracts: Contracts,
        outbox: Outbox,
        journal: SqlJournal,
        lease: Callable[[], Lease],
        relay: Relay,
        version: Version,
        public_key: Callable[[Address], bytes],
        clock: Clock,
        settings: NetworkSettings | None = None,
        endpoints: Endpoints | None = None,
        heads: Heads | None = None,
        told: Told | None = None,
        accounts: Collection[Address] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`public_key` gives an account's 64 bytes, as `join` takes them. `endpoints` is what `rpc`
        asks, to be watched; `heads` wakes the watcher; `told` hears of what is counted. Of
        `accounts` all is heard from the first block on, of others once they were looked at."""
        self._rpc = rpc
        self._contracts = contracts
        self._outbox = outbox
        self._relay = relay
        self._version = version
        self._public_key = public_key
        self._clock = clock
        self._settings = settings or NetworkSettings()
        self._endpoints = endpoints
        self._heads = heads or Heads()
        self._pulse = Pulse(self._settings.poll)
        self._monotonic = monotonic
        self._failing: tuple[float, str] | None = None
        """Since when the watcher fails, and of what."""
        self._grew: tuple[int, float] | None = None
        """The newest block's number, and when it was first seen."""
        self._deadlines: dict[Commitment, Timestamp] = {}
        self._looked: dict[Address, _Looked] = {}
        self._head_until = Timestamp(0.0)
        """Until when the watcher's head is taken for the newest: its next look."""
        self._chain_clock = ChainClock()
        self._newest = Block(0, Timestamp(0))
        self._newest_at = Timestamp(0)
        self._accounts: set[Address] = set(accounts)
        self._holders = Holders()
        self._cursor: str | None = None
        """The watcher's, to be stored."""
        self._wakeups = Wakeups(
            self._settings.waiting, lambda value: journal.set_cursor(lease(), CURSOR, value)
        )
        self._watcher = Watcher(
            rpc,
            contracts.task.address,
            contracts.node.address,
            lambda: self._accounts,
            self._holders,
            lambda: journal.cursor(CURSOR),
            self._keep_cursor,
        )
        outbox.resolved = self._resolved
        outbox.head = lambda: None if self._watcher.head is None else self._watcher.head.number
        outbox.seconds_left = self._seconds_left
        self._watcher.reorganised = self._reorganised
        self._told = outbox.told = told or Untold()

    # --- facts

    async def look(self, account: Address, known: Sequence[Commitment]) -> AccountView:
        """Read once a block: what is asked for again until there is a new one is what was read."""
        self._accounts.add(account)
        block, now = await self._moment()
        at = block.number
        looked = self._looked.get(account)
        if looked is not None and looked.fits(block, known):
            return replace(looked.view, now=now)
        contracts = self._contracts
        info, stake, balance, qos, current = await asyncio.gather(
            contracts.node.info(account, at),
            contracts.node.stake(account, at),
            self._rpc.balance(account, at),
            contracts.qos.score(account, at),
            contracts.task.current_task(account, at),
        )
        wanted = dict.fromkeys(known if current is None else (*known, current))
        found = await asyncio.gather(
            *(contracts.task.task(task, self._accounts, at) for task in wanted)
        )
        tasks = tuple(facts for facts in found if facts is not None)
        for facts in tasks:
            if facts.selected_node == account:
                self._holders.learn(facts.commitment, account)
            self._learn_deadline(facts)
        facts_of_account = AccountFacts(
            account,
            info.status,
            info.gpu_class,
            stake,
            balance,
            qos,
            current,
            info.models,
            info.version != self._version,
        )
        view = AccountView(at, now, facts_of_account, tasks, block.timestamp)
        if block.hash:
            self._looked[account] = _Looked(block.hash, frozenset(known), view)
        return view

    def _learn_deadline(self, facts: TaskFacts) -> None:
        """Until when an answer is taken, by the network's clock."""
        if facts.deadline is None or facts.status not in _ANSWERABLE:
            self._deadlines.pop(facts.commitment, None)
        else:
            self._deadlines[facts.commitment] = facts.deadline

    def _seconds_left(self, intent: Intent) -> float | None:
        deadline = None if intent.task is None else self._deadlines.get(intent.task)
        if deadline is None or not intent.is_answer:
            return None
        return deadline - self._chain_clock.now(self._clock())

    async def _moment(self) -> tuple[Block, Timestamp]:
        """The block to read at: an endpoint of many machines may answer with an older head than
        before, and a later look must not see less. One that stays behind for long is believed:
        then it was the higher number that was wrong, or that block is gone."""
        head, wall = self._watcher.head, self._clock()
        if head is None or wall >= self._head_until:
            head, wall = await self._rpc.head(), self._clock()
        now = self._chain_clock.observe(head, wall)
        # Also when the clock was set back: it would be held on to for as long.
        held = 0 <= wall - self._newest_at <= BELIEVED_SECONDS
        if head.number >= self._newest.number or not held:
            self._newest, self._newest_at = head, wall
        return self._newest, now

    # --- a task's writes

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        return await self._relay.fetch_parameters(account, task)

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        await self._relay.upload_result(account, task, files)

    async def submit_score(self, account: Address, task: Commitment, score: Score) -> None:
        data = self._contracts.task.submit_score(task, score)
        self._ensure(account, task, Claim.SCORE, data)

    async def report_error(self, account: Address, task: Commitment, error: TaskError) -> None:
        data = self._contracts.task.report_error(task, error)
        self._ensure(account, task, Claim.ERROR, data)

    async def abort(self, account: Address, task: Commitment, reason: AbortReason) -> None:
        data = self._contracts.task.abort(task, reason)
        self._ensure(account, task, Claim.ABORT, data)

    def _ensure(self, account: Address, task: Commitment, claim: Claim, data: bytes) -> None:
        to = self._contracts.task.address
        self._outbox.ensure(task_intent(account, task, claim, to, data))

    def writes(self, task: Commitment) -> Mapping[Claim, WriteState]:
        return self._outbox.writes(task)

    # --- an account's writes

    async def join(
        self, account: Address, gpu_class: GpuClass, stake: Wei, models: Sequence[ModelId]
    ) -> None:
        node = self._contracts.node
        data = node.join(gpu_class, self._version, self._public_key(account), models)
        self._outbox.ensure_verb(account, "join", node.address, data, stake)

    async def resume(self, account: Address) -> None:
        self._verb(account, "resume", self._contracts.node.resume())

    async def pause(self, account: Address) -> None:
        self._verb(account, "pause", self._contracts.node.pause())

    async def quit(self, account: Address) -> None:
        self._verb(account, "quit", self._contracts.node.quit())

    async def update_version(self, account: Address) -> None:
        self._verb(account, "version", self._contracts.node.update_version(self._version))

    async def report_model(self, account: Address, model: ModelId) -> None:
        """Once for each model: what a node has reported it still has after it joins again,
        because `join` names all models."""
        node = self._contracts.node
        self._outbox.ensure_verb(
            account, f"{REPORT}:{model}", node.address, node.report_model(model), once=True
        )

    async def transfer(
        self, sender: Address, recipient: Address, amount: Wei, purpose: str
    ) -> None:
        self._outbox.ensure_verb(sender, f"{purpose}:{recipient}", recipient, b"", amount)

    async def balance(self, account: Address) -> Wei:
        return await self._rpc.balance(account, LATEST)

    def movements(self) -> Mapping[Address, Movement]:
        return self._outbox.movements()

    def _verb(self, account: Address, verb: str, data: bytes) -> None:
        self._outbox.ensure_verb(account, verb, self._contracts.node.address, data)

    def endpoints(self) -> tuple[EndpointView, ...]:
        """How each RPC endpoint does now."""
        return () if self._endpoints is None else self._endpoints.views()

    async def ask_relay(self) -> None:
        """See whether it is there. Raises `RelayError`."""
        await self._relay.now()

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, in words."""
        of_endpoints = () if self._endpoints is None else self._endpoints.alerts()
        after = self._settings.stalled_after
        stalled = None if after is None else self._stalled(min(after, STALLED_SECONDS))
        return (*self._outbox.alerts(), *of_endpoints, *(() if stalled is None else (stalled,)))

    def trouble(self) -> str | None:
        """Why the chain isn't reached, in words; None when it is, or was a moment ago."""
        if self._failing is not None and self._passed(self._failing[0]) >= UNREACHED_SECONDS:
            return self._failing[1]
        after = self._settings.stalled_after
        return None if after is None else self._stalled(after)

    def _stalled(self, least: float) -> str | None:
        """That there was no new block for so long, and far longer than usual."""
        gap = self._pulse.gap or 0.0
        if self._grew is None or self._passed(self._grew[1]) < max(least, STALLED_GAPS * gap):
            return None
        usual = f", usually there is one in {gap:.1f} s" if gap else ""
        return f"no new block for {self._passed(self._grew[1]):.0f} s{usual}"

    def _passed(self, since: float) -> float:
        return self._monotonic() - since

    # --- wake-ups and loops

    async def next_wakeup(self) -> Wakeup:
        return await self._wakeups.take()

    async def befell(self, account: Address, since: int | None, until: int) -> tuple[Wakeup, ...]:
        handled, began = self._wakeups.handled, self._watcher.began
        if handled is None or began is None or handled <= until:
            raise ChainError(f"not all events up to block {until} were read yet")
        first = began - READ_BACK if since is None else since + 1
        return await self._watcher.befell(account, max(first, 0), until)

    def _keep_cursor(self, value: str) -> None:
        self._cursor = value

    def _reorganised(self) -> None:
        self._told.happened("reorganised")
        self._outbox.look_again()

    def _resolved(self, row: OutboxRow) -> None:
        # It may be in a block that the watcher hasn't seen.
        self._head_until = Timestamp(0.0)
        for concerned in (row.intent.account, row.intent.recipient):
            self._looked.pop(concerned, None)
            if concerned in self._accounts:
                self._wakeups.give(Wakeup(concerned, f"outbox: {row.state.value}"))

    async def run(self) -> None:
        """The watcher, the outbox and the endpoints, for ever; ends only by cancellation or, in an
        `ExceptionGroup`, by `LeaseLost` or a bug."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._outbox.run())
            group.create_task(self.watch())
            if self._endpoints is not None:
                group.create_task(self._endpoints.watch())
            group.create_task(self._heads.run())

    async def watch(self) -> NoReturn:
        hoped = 0
        told: float | None = None
        while True:
            pause, before = self._settings.poll, self._number()
            try:
                await self._look_on()
                if self._watcher.is_behind:
                    continue
                pause = self._pause()
            except NetworkUnavailable as error:
                since = self._monotonic() if self._failing is None else self._failing[0]
                self._failing = since, str(error)
                if told is None or self._passed(told) >= AGAIN_SECONDS:
                    told = self._monotonic()
                    _log.warning("watcher_waits", reason=str(error))
            else:
                if told is not None:
                    _log.info("watcher_goes_on", block=self._number())
                told = None
            if self._number() != before:
                hoped = 0
            elif hoped:
                # A head was announced that whoever we asked doesn't have yet.
                pause, hoped = min(pause, SOON_SECONDS), hoped - 1
            if await self._heads.wait(pause):
                hoped = HOPES

    async def _look_on(self) -> None:
        for found in await self._watcher.poll():
            for wakeup in self._meant(found):
                self._wakeups.give(wakeup)
        self._failing = None
        number = self._number()
        if number is not None and (self._grew is None or number > self._grew[0]):
            self._grew = number, self._monotonic()
        if self._watcher.next is not None:
            self._wakeups.reached(self._watcher.next, self._cursor)
            self._cursor = None

    def _meant(self, wakeup: Wakeup) -> Iterable[Wakeup]:
        """Of a reorganisation only those hear who were looked at in a block that isn't any more:
        what is in the blocks in its place names the others."""
        if wakeup.reason != REORGANISED:
            return (wakeup,)
        looked = {a: each.view.moment for a, each in self._looked.items()}
        return tuple(
            Wakeup(account, REORGANISED)
            for account in self._accounts
            if looked.get(account, wakeup.moment) >= wakeup.moment
        )

    def _number(self) -> int | None:
        return None if self._watcher.head is None else self._watcher.head.number

    def _pause(self) -> float:
        """Until about the next block; longer where a head will wake us, as long as heads come."""
        head, now = self._watcher.head, self._clock()
        if head is not None:
            self._pulse.saw(head.number, head.timestamp, now)
        expected = max(MISSED_HEADS * (self._pulse.gap or 0.0), HEAD_SECONDS)
        live = self._heads.is_live and self._heads.heard_within(expected)
        pause = min(LIVE_SECONDS, expected) if live else self._pulse.pause(now)
        self._head_until = Timestamp(now + min(pause, HEAD_SECONDS))
        return pause
