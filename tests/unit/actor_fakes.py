"""Fakes for the actors' plain classes: a network and a GPU pool that fail on demand.

Each call pops the next of its method's `faults`: an exception is raised and nothing happens, `LOSE`
applies the call and loses the answer. A method in `gates` waits for its gate first. `before` is
called as a call arrives, so that a test can look at what was stored by then.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.inference import Report
from cluster.chain.endpoints import EndpointView
from cluster.core.errors import AttemptLost, NetworkUnavailable, ParametersNotReady
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Computed, Movement, Order, Wakeup
from cluster.core.record import Claim
from cluster.core.types import (
    AbortReason,
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
    GpuState,
    ModelId,
    NodeStatus,
    RayNodeId,
    Requirement,
    Score,
    Stage,
    TaskError,
    TaskFacts,
    TaskStatus,
    TaskType,
    Timestamp,
    Wei,
)

ALICE, BOB = Address("0x" + "aa" * 20), Address("0x" + "bb" * 20)
TASK, OTHER = Commitment("0x" + "01" * 32), Commitment("0x" + "02" * 32)
CARD, CARD_2 = GpuId("node-0"), GpuId("node-1")
KIND = GpuClass("Card+docker", GigaBytes(8))
SCORE, NO_SCORE = Score(bytes(range(8))), Score(b"")
FILES = (("0.png", b"a picture"),)
DONE = Computed(SCORE, FILES, 1.0)
LOSE = "lose the answer"
START = 1_000.0
PATIENCE = 50.0
"""Seconds that anything is waited for: only what hangs takes so long."""
PROMPT = "a very private prompt"
GOOD = json.dumps({"base_model": "acme/tiny", "prompt": PROMPT, "task_config": {"seed": 7}})


@dataclass
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


def facts_of(
    task: Commitment = TASK,
    stage: Stage = Stage.ANSWERABLE,
    status: TaskStatus = TaskStatus.PARAMETERS_UPLOADED,
    node: Address | None = ALICE,
    score: Score = NO_SCORE,
    task_type: TaskType = TaskType.SD,
    deadline: float | None = START + 180,
    abortable: bool = True,
    payment: int = 0,
) -> TaskFacts:
    return TaskFacts(
        commitment=task,
        selected_node=node,
        task_type=task_type,
        status=status,
        stage=stage,
        requirement=Requirement(GigaBytes(4), "", GigaBytes(0)),
        model_ids=(ModelId("base:acme/tiny"),),
        fee=Wei(5 * 10**18),
        payment=Wei(payment),
        score=score,
        error=TaskError.NONE,
        started_at=Timestamp(START),
        deadline=None if deadline is None else Timestamp(deadline),
        abortable=abortable,
    )


def gpu_of(gpu_id: GpuId = CARD, state: GpuState = GpuState.READY, kind: GpuClass = KIND) -> Gpu:
    return Gpu(gpu_id, RayNodeId("node"), kind, False, state)


class Faulty:
    """What both fakes share: the calls, their faults, gates and the look at what was stored."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.faults: dict[str, list[BaseException | str]] = defaultdict(list)
        self.gates: dict[str, asyncio.Event] = {}
        self.waiting = 0
        self.before: Callable[[str], None] = lambda _: None

    async def arrive(self, method: str, *args: object) -> bool:
        """Raises the fault that is due; True when the answer is to be lost."""
        self.calls.append((method, *args))
        self.before(method)
        if method in self.gates:
            self.waiting += 1
            await self.gates[method].wait()
            self.waiting -= 1
        fault = self.faults[method].pop(0) if self.faults[method] else None
        if isinstance(fault, BaseException):
            raise fault
        return fault == LOSE

    def called(self, method: str) -> list[tuple[object, ...]]:
        return [args for name, *rest in self.calls if name == method for args in [tuple(rest)]]


class FakeNetwork(Faulty):
    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock
        self.tasks: dict[Commitment, TaskFacts] = {}
        self.parameters: dict[Commitment, str] = {}
        self.states: dict[Commitment, dict[Claim, WriteState]] = defaultdict(dict)
        self.wakeups: asyncio.Queue[Wakeup] = asyncio.Queue()
        self.uploaded: list[tuple[tuple[str, bytes], ...]] = []
        self.moments = itertools.count(100)
        self.node_status = NodeStatus.AVAILABLE
        self.holding = Wei(10)
        """What each account has."""
        self.treasury_has = Wei(0)
        self.moving: dict[Address, Movement] = {}
        self.befallen: dict[Address, list[Wakeup]] = defaultdict(list)
        self.plans = 0
        """How often somebody asked what is moving, as every plan of the fleet does."""
        self.unreached: str | None = None

    def endpoints(self) -> tuple[EndpointView, ...]:
        return ()

    def alerts(self) -> tuple[str, ...]:
        return ()

    def trouble(self) -> str | None:
        return self.unreached

    async def ask_relay(self) -> None:
        await self.arrive("ask_relay")

    def add(self, facts: TaskFacts, parameters: str | None = GOOD) -> None:
        self.tasks[facts.commitment] = facts
        if parameters is not None:
            self.parameters[facts.commitment] = parameters

    def move(self, task: Commitment, **changes: object) -> None:
        self.tasks[task] = replace(self.tasks[task], **changes)  # type: ignore[arg-type]

    async def _apply(self, method: str, task: Commitment, *args: object) -> None:
        lost = await self.arrive(method, task, *args)
        claim = {
            "submit_score": Claim.SCORE,
            "report_error": Claim.ERROR,
            "abort": Claim.ABORT,
        }[method]
        self.states[task][claim] = WriteState.DONE
        match method:
            case "submit_score":
                self.move(task, stage=Stage.ANSWERED, status=TaskStatus.SCORE_READY, score=args[0])
            case "report_error":
                self.move(task, stage=Stage.ANSWERED, status=TaskStatus.ERROR_REPORTED)
            case "abort":
                self.move(task, stage=Stage.ENDED, status=TaskStatus.END_ABORTED)
        if lost:
            raise NetworkUnavailable("the answer was lost")

    # --- ports.Network

    async def look(self, account: Address, known: Sequence[Commitment]) -> AccountView:
        await self.arrive("look", account)
        tasks = tuple(
            task
            for task in self.tasks.values()
            if task.selected_node == account or task.commitment in known
        )
        current = next((t.commitment for t in tasks if t.stage is not Stage.ENDED), None)
        facts = AccountFacts(account, self.node_status, KIND, Wei(400), self.holding, 30, current)
        return AccountView(next(self.moments), Timestamp(self.clock()), facts, tasks)

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        await self.arrive("fetch_parameters", account, task)
        if task not in self.parameters:
            raise ParametersNotReady("Task not ready")
        return self.parameters[task]

    async def submit_score(self, account: Address, task: Commitment, score: Score) -> None:
        await self._apply("submit_score", task, score)

    async def report_error(self, account: Address, task: Commitment, error: TaskError) -> None:
        await self._apply("report_error", task, error)

    async def abort(self, account: Address, task: Commitment, reason: AbortReason) -> None:
        await self._apply("abort", task, reason)

    def writes(self, task: Commitment) -> Mapping[Claim, WriteState]:
        return dict(self.states[task])

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        lost = await self.arrive("upload_result", task)
        self.uploaded.append(tuple(files))
        self.move(task, stage=Stage.ENDED, status=TaskStatus.END_SUCCESS, payment=Wei(10**18))
        if lost:
            raise NetworkUnavailable("the answer was lost")

    async def join(
        self, account: Address, gpu_class: GpuClass, stake: Wei, models: Sequence[ModelId]
    ) -> None:
        await self.arrive("join", account)

    async def resume(self, account: Address) -> None:
        await self.arrive("resume", account)

    async def pause(self, account: Address) -> None:
        await self.arrive("pause", account)

    async def quit(self, account: Address) -> None:
        await self.arrive("quit", account)

    async def update_version(self, account: Address) -> None:
        await self.arrive("update_version", account)

    async def report_model(self, account: Address, model: ModelId) -> None:
        await self.arrive("report_model", account, model)

    async def transfer(
        self, sender: Address, recipient: Address, amount: Wei, purpose: str
    ) -> None:
        await self.arrive("transfer", sender, recipient, amount, purpose)

    async def balance(self, account: Address) -> Wei:
        await self.arrive("balance", account)
        return self.treasury_has

    def movements(self) -> Mapping[Address, Movement]:
        self.plans += 1
        return self.moving

    async def next_wakeup(self) -> Wakeup:
        await self.arrive("next_wakeup")
        return await self.wakeups.get()

    async def befell(self, account: Address, since: int | None, until: int) -> tuple[Wakeup, ...]:
        await self.arrive("befell", account)
        return tuple(self.befallen[account])

    async def run(self) -> None:
        await self.arrive("run")
        await asyncio.Event().wait()


class FakePool(Faulty):
    """Attempts stay open until `finish`; a started one can be asked for again, as on a real card.

    An entry in `outcomes` finishes the next attempts as they start.
    """

    def __init__(self, *gpus: Gpu) -> None:
        super().__init__()
        self.cards = list(gpus)
        self.strangers: list[Gpu] = []
        self.outcomes: list[Computed | Exception] = []
        self.attempts: dict[AttemptId, asyncio.Future[Computed]] = {}
        self.orders: list[tuple[GpuId, Order]] = []
        self.changed: Callable[[], None] = lambda: None
        self.reports: dict[GpuId, Report] = {}
        self.quarantined: frozenset[CardUuid] = frozenset()
        self.drained: Callable[[Gpu], bool] = lambda _: False
        self.ended_for_memory: dict[GpuId, str] = {}

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(
            replace(gpu, state=GpuState.QUARANTINED)
            if gpu.uuid in self.quarantined
            else replace(gpu, state=GpuState.DRAINED)
            if self.drained(gpu)
            else gpu
            for gpu in self.cards
        )

    def unknown(self) -> tuple[Gpu, ...]:
        return tuple(self.strangers)

    def report(self, gpu: GpuId) -> Report | None:
        return self.reports.get(gpu)

    def starved(self, gpu: GpuId) -> str:
        return self.ended_for_memory.get(gpu, "")

    def quarantine(self, cards: frozenset[CardUuid]) -> None:
        self.quarantined = cards

    def drain(self, drained: Callable[[Gpu], bool]) -> None:
        self.drained = drained

    def finish(self, attempt: AttemptId, outcome: Computed | Exception) -> None:
        future = self.attempts[attempt]
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    async def start(self, gpu: GpuId, order: Order) -> None:
        lost = await self.arrive("start", gpu, order.attempt_id)
        self.orders.append((gpu, order))
        if order.attempt_id not in self.attempts:
            self.attempts[order.attempt_id] = asyncio.get_running_loop().create_future()
            if self.outcomes:
                self.finish(order.attempt_id, self.outcomes.pop(0))
        if lost:
            raise NetworkUnavailable("the answer was lost")

    async def result(self, gpu: GpuId, attempt: AttemptId) -> Computed:
        await self.arrive("result", gpu, attempt)
        if attempt not in self.attempts:
            raise AttemptLost("not known here")
        computed = await asyncio.shield(self.attempts[attempt])
        uuid = next((each.uuid for each in self.cards if each.gpu_id == gpu), CardUuid(""))
        return replace(computed, card=uuid)

    async def cancel(self, gpu: GpuId, attempt: AttemptId) -> None:
        await self.arrive("cancel", gpu, attempt)

    def prefetch(self, gpu: GpuId, order: Order) -> None:
        self.calls.append(("prefetch", gpu, order.task))

    # --- what the coordinator uses besides

    def on_change(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    async def refresh(self) -> None:
        await self.arrive("refresh")

    async def run(self, interval: float) -> None:
        await self.arrive("run")
        await asyncio.Event().wait()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for at most `PATIENCE`, in small steps."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.001)
