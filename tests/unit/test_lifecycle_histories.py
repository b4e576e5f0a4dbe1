"""Whatever happens to a task, in any order: no answer but one true one, and always an end.

A model of the network in both of its forms and a model shell around the real core play schedules
of moves: facts come late or twice, the shell crashes between any two steps, a write is applied
while its answer is lost, cards fail, the relay is away. The rules are checked after every move.
Then the faults cease, and the history must end closed, and paid when there was time for it.

    move, move, ... each checked        settle: faults cease, time passes        closed
    |-----------------------------------|----------------------------------------|
"""

from __future__ import annotations

import enum
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core import lifecycle
from cluster.core.errors import IllegalMove
from cluster.core.lifecycle import (
    Abort,
    CancelAttempt,
    Close,
    Execute,
    FetchParameters,
    Policy,
    ReportError,
    Situation,
    SubmitScore,
    UploadResult,
    WriteState,
    decide,
)
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    FaultFound,
    Outcome,
    ParametersFetched,
    Progress,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
    apply,
    begin,
    fold,
)
from cluster.core.types import (
    ENDED,
    Address,
    AttemptId,
    Commitment,
    GigaBytes,
    GpuId,
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

ME, OTHER = Address("0xMe"), Address("0xOther")
TASK = Commitment("0x01")
FEE = Wei(1000)
GPUS = (GpuId("g1"), GpuId("g2"), GpuId("g3"))
POLICY = Policy()
TIMEOUT = 180.0
STAGE_TIME = 600.0
SCAN = 5.0
"""How long after a deadline the 3.x network takes to act on it."""
VALIDATED = {TaskStatus.VALIDATED, TaskStatus.GROUP_VALIDATED}
EVIDENCE = {TaskStatus.END_INVALIDATED, TaskStatus.END_GROUP_REFUND}
UNANSWERED = {TaskStatus.STARTED, TaskStatus.PARAMETERS_UPLOADED}


class App(enum.Enum):
    """What the application makes of an answer."""

    SINGLE = TaskStatus.VALIDATED
    GROUP = TaskStatus.GROUP_VALIDATED
    REFUND = TaskStatus.END_GROUP_REFUND
    INVALIDATE = TaskStatus.END_INVALIDATED
    ABORT = TaskStatus.END_ABORTED
    DEAD = None


@dataclass(frozen=True)
class Setup:
    """`chain`: the 2.x form, where a node may abort and writes wait in a mempool; else 3.x.

    `steady`: every attempt gives the same score, as honest cards do. Only then may the journal be
    lost: without it nobody can know what was answered. `hung` and `refused` are faults that never
    cease: cards that don't answer any more, a relay that takes no files.
    """

    chain: bool
    faulty: bool = False
    checked_early: bool = False
    steady: bool = True
    app: App = App.SINGLE
    hung: bool = False
    refused: bool = False


class Crash(Exception):
    """The shell's process is gone."""


class Unreachable(Exception):
    """No answer came; whether the call was applied isn't known."""


class Refused(Exception):
    """The other side says no, or not yet."""


class Answer(enum.Enum):
    """What becomes of a call's answer."""

    COMES = "comes"
    LOST = "lost"
    """The call was applied."""
    NEVER = "never"
    """The call didn't arrive."""


@dataclass
class ModelNetwork:
    setup: Setup
    now: float = 1000.0
    status: TaskStatus = TaskStatus.STARTED
    holder: Address = ME
    gone: bool = False
    since: float = 1000.0
    posted: bool = False
    reachable: bool = True
    refusing: bool = False
    score: Score = Score(b"")
    error: TaskError = TaskError.NONE
    files_taken: bool = False
    payment: Wei = Wei(0)
    pending: dict[Claim, Score | None] = field(default_factory=dict)
    states: dict[Claim, WriteState] = field(default_factory=dict)
    offered: set[tuple[Claim, Score | None]] = field(default_factory=set)
    looks: list[tuple[float, TaskFacts | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.posted = not self.setup.chain
        self.note()

    @property
    def live(self) -> bool:
        return self.status not in ENDED and not self.gone and self.holder == ME

    @property
    def deadline(self) -> float:
        """2.x has one for the whole life, 3.x one for each stage, and the evidence has one too."""
        if self.setup.chain:
            return 1000.0 + TIMEOUT
        return self.since + (TIMEOUT if self.status is TaskStatus.STARTED else STAGE_TIME)

    def note(self) -> None:
        """Every change makes a new moment that can be looked at, now or later."""
        facts = None if self.gone else self._facts()
        self.looks.append((self.now, facts))

    def _facts(self) -> TaskFacts:
        evidence = not self.setup.chain and self.status in EVIDENCE and not self.files_taken
        return TaskFacts(
            TASK,
            self.holder,
            TaskType.SD,
            self.status,
            self._stage(),
            Requirement(GigaBytes(8), "", GigaBytes(0)),
            (),
            FEE,
            self.payment,
            self.score,
            self.error,
            Timestamp(1000.0),
            Timestamp(self.deadline),
            self.setup.chain,
            evidence,
        )

    def _stage(self) -> Stage:
        if self.status in ENDED:
            return Stage.ENDED
        if self.status in VALIDATED:
            return Stage.WANTED
        if self.status not in UNANSWERED:
            return Stage.ANSWERED
        closed = self.setup.chain and self.status is TaskStatus.STARTED
        return Stage.STARTED if closed else Stage.ANSWERABLE

    def become(self, status: TaskStatus) -> None:
        self.status, self.since = status, self.now
        if status in {TaskStatus.END_SUCCESS, TaskStatus.END_GROUP_SUCCESS}:
            self.payment = FEE
        self.note()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        if not self.setup.chain and self.status not in ENDED and self.now >= self.deadline + SCAN:
            self.become(TaskStatus.END_ABORTED)
        self.note()

    def takes(self, claim: Claim) -> bool:
        if not self.live:
            return False
        if claim is Claim.ABORT:
            return self.setup.chain and self.now >= self.deadline
        return self._stage() is Stage.ANSWERABLE

    def _apply(self, claim: Claim, score: Score | None) -> WriteState:
        if not self.takes(claim):
            return WriteState.REFUSED
        if claim is Claim.ABORT:
            self.become(TaskStatus.END_ABORTED)
        elif claim is Claim.ERROR:
            self.error = TaskError.PARAMETERS_VALIDATION_FAILED
            self.become(TaskStatus.ERROR_REPORTED)
        else:
            assert score is not None
            self.score = score
            self.become(TaskStatus.SCORE_READY)
        return WriteState.DONE

    def write(self, claim: Claim, score: Score | None, answer: Answer) -> None:
        """2.x: stored in the outbox before anything else, so no answer of it is ever lost."""
        self._check_write(claim, score)
        if self.setup.chain:
            self.pending[claim], self.states[claim] = score, WriteState.OPEN
            return
        if answer is Answer.NEVER:
            raise Unreachable
        state = self._apply(claim, score)
        if answer is Answer.LOST:
            raise Unreachable
        self.states[claim] = state

    def _check_write(self, claim: Claim, score: Score | None) -> None:
        state = self.states.get(claim)
        assert state is not WriteState.OPEN, "sent again while on its way"
        if claim is Claim.ABORT:
            assert self.setup.chain, "this network takes no abort"
            late = self.deadline + POLICY.abort_margin
            on_its_way = WriteState.OPEN in {self.states.get(c) for c in (Claim.SCORE, Claim.ERROR)}
            answered = self.score != b"" or on_its_way
            assert self.now >= late + (POLICY.answer_grace if answered else 0.0), "aborted early"
            return
        assert state is not WriteState.DONE, "sent again though taken"
        self.offered.add((claim, score))
        assert len(self.offered) == 1, "a second answer"
        assert (claim is Claim.ERROR) is self.setup.faulty, "not the truth about the task"

    def land(self) -> None:
        for claim in list(self.pending):
            self.states[claim] = self._apply(claim, self.pending.pop(claim))

    def post_parameters(self) -> None:
        self.posted = True

    def report_parameters(self) -> None:
        if self.posted and self.live and self.status is TaskStatus.STARTED and self.setup.chain:
            self.become(TaskStatus.PARAMETERS_UPLOADED)

    def judge(self) -> None:
        verdict: TaskStatus | None = self.setup.app.value
        if not self.live or verdict is None:
            return
        if self.status is TaskStatus.ERROR_REPORTED:
            self.become(TaskStatus.END_ABORTED)
        elif self.status is TaskStatus.SCORE_READY:
            self.become(verdict)

    def settle_payment(self) -> None:
        if self.live and self.files_taken and self.status in VALIDATED:
            single = self.status is TaskStatus.VALIDATED
            self.become(TaskStatus.END_SUCCESS if single else TaskStatus.END_GROUP_SUCCESS)

    def app_aborts(self) -> None:
        if self.live and self.setup.chain and self.now >= self.deadline:
            self.become(TaskStatus.END_ABORTED)

    def vanish(self) -> None:
        self.gone = True
        self.note()

    def reassign(self) -> None:
        self.holder = OTHER
        self.note()

    def fetch(self, answer: Answer) -> None:
        if answer is not Answer.COMES or not self.reachable:
            raise Unreachable
        if not self.posted:
            raise Refused

    def upload(self, score: Score, answer: Answer) -> None:
        if answer is Answer.NEVER or not self.reachable:
            raise Unreachable
        ours = self.holder == ME and not self.gone and self.status in VALIDATED | EVIDENCE
        if self.refusing or not ours or score != self.score:
            raise Refused
        self.files_taken = True
        if not self.setup.chain:
            self.settle_payment()
        if answer is Answer.LOST:
            raise Unreachable


Message = ResultStored | AttemptFailed | FaultFound


@dataclass
class World:
    """The network, the cards, and the shell with its durable journal."""

    setup: Setup
    network: ModelNetwork = field(init=False)
    journal: list[tuple[Event, Timestamp]] = field(default_factory=list)
    record: TaskRecord | None = None
    looked: int = 0
    attempts: int = 0
    working: dict[GpuId, AttemptId] = field(default_factory=dict)
    orphans: list[AttemptId] = field(default_factory=list)
    messages: list[tuple[AttemptId, Message]] = field(default_factory=list)
    started_on: dict[AttemptId, GpuId] = field(default_factory=dict)
    crash_at: int | None = None
    answer: Answer = Answer.COMES

    def __post_init__(self) -> None:
        self.network = ModelNetwork(self.setup)

    # --- the shell ------------------------------------------------------------------------------

    def turn(
        self, lag: int = 0, crash_at: int | None = None, answer: Answer = Answer.COMES
    ) -> None:
        """Look (perhaps at an older moment), decide, persist, act, persist what came of it."""
        self.crash_at, self.answer = crash_at, answer
        self.looked = max(self.looked, len(self.network.looks) - 1 - lag)
        now, facts = self.network.looks[self.looked]
        try:
            self._turn(Timestamp(now), facts)
        except Crash:
            self.restart()
        except (Unreachable, Refused):
            pass
        self.crash_at, self.answer = None, Answer.COMES

    def restart(self) -> None:
        """A new process: all it has is the journal."""
        if not self.setup.chain:
            self.network.states.clear()
        self.record = fold(TASK, self.journal) if self.journal else None

    def _turn(self, now: Timestamp, facts: TaskFacts | None) -> None:
        if self.record is None:
            if facts is None or facts.selected_node != ME or facts.status in ENDED:
                return
            self._persist(Seen(ME, facts.task_type, facts.model_ids, facts.fee))
        assert self.record is not None
        self._act(Situation(facts, self.record, now, POLICY, dict(self.network.states)))

    def _persist(self, event: Event) -> None:
        at = Timestamp(self.network.now)
        if isinstance(event, Seen):
            self.record = begin(TASK, event, at)
        else:
            assert self.record is not None
            self.record = apply(self.record, event, at)
        self.journal.append((event, at))
        self._may_crash()

    def _may_crash(self) -> None:
        if self.crash_at is not None:
            self.crash_at -= 1
            if self.crash_at < 0:
                raise Crash

    def _act(self, situation: Situation) -> None:
        record = situation.record
        match decide(situation):
            case FetchParameters():
                self.network.fetch(self.answer)
                self._may_crash()
                self._persist(ParametersFetched("{}"))
            case Execute(avoid):
                self._execute(avoid)
            case CancelAttempt(attempt_id, gpu_id):
                self._cancel(attempt_id, gpu_id)
            case SubmitScore(score):
                self._write(Claim.SCORE, score)
            case ReportError():
                self._write(Claim.ERROR, None)
            case Abort():
                self._write(Claim.ABORT, None)
            case UploadResult():
                assert record.result is not None
                self.network.upload(record.result.score, self.answer)
                self._may_crash()
                self._persist(ResultUploaded())
            case Close(outcome, payment):
                assert not self.network.live, "a live task was closed"
                self._persist(Closed(outcome, payment))

    def _write(self, claim: Claim, score: Score | None) -> None:
        assert self.record is not None
        if not self.record.claimed(claim):
            self._persist(Claimed(claim))
        self.network.write(claim, score, self.answer)
        self._may_crash()

    def _execute(self, avoid: frozenset[GpuId]) -> None:
        if self.setup.faulty and self.setup.checked_early:
            self._persist(FaultFound("no such scheduler"))
            return
        idle = [gpu for gpu in GPUS if gpu not in self.working]
        if not idle:
            return
        gpu = min(idle, key=lambda gpu: (gpu in avoid, gpu))
        self.attempts += 1
        attempt = AttemptId(f"a{self.attempts}")
        self._persist(AttemptStarted(attempt, gpu))
        if self.answer is not Answer.NEVER:
            assert attempt not in self.started_on, "one attempt on two cards"
            self.started_on[attempt] = gpu
            self.working[gpu] = attempt
        self._may_crash()
        if self.answer is not Answer.COMES:
            self._persist(AttemptFailed(attempt, Fault.DEVICE, "no answer"))

    def _cancel(self, attempt: AttemptId, gpu: GpuId) -> None:
        if self.answer is not Answer.NEVER and self.working.get(gpu) == attempt:
            del self.working[gpu]
        self._may_crash()
        fault = Fault.CANCELLED if self.answer is Answer.COMES else Fault.LOST
        self._persist(AttemptFailed(attempt, fault, ""))

    def deliver(self, which: int = 0, again: bool = False) -> None:
        """A card's message arrives: in any order, perhaps twice, perhaps for a dead attempt."""
        if not self.messages:
            return
        index = which % len(self.messages)
        attempt, message = self.messages[index] if again else self.messages.pop(index)
        opened = self.record.open_attempt if self.record is not None else None
        if opened is not None and opened.attempt_id == attempt:
            self._persist(message)

    def watch(self) -> None:
        """The pool doesn't know the open attempt: its card died, or it was never started."""
        opened = self.record.open_attempt if self.record is not None else None
        known = {*self.working.values(), *(attempt for attempt, _ in self.messages)}
        if opened is not None and opened.attempt_id not in known:
            self._persist(AttemptFailed(opened.attempt_id, Fault.LOST, "unknown to the pool"))

    # --- the world's moves ----------------------------------------------------------------------

    def finish(self, which: int = 0) -> None:
        if self.working:
            gpu = sorted(self.working)[which % len(self.working)]
            attempt = self.working.pop(gpu)
            self.messages.append((attempt, self._outcome(attempt)))

    def _outcome(self, attempt: AttemptId) -> Message:
        if self.setup.faulty:
            return FaultFound("found while running")
        score = b"thescore" if self.setup.steady else attempt.encode().rjust(8)
        return ResultStored(attempt, Score(score), ())

    def fail(self, which: int, fault: Fault) -> None:
        if self.working:
            gpu = sorted(self.working)[which % len(self.working)]
            attempt = self.working.pop(gpu)
            self.messages.append((attempt, AttemptFailed(attempt, fault, "")))
            if fault is Fault.LOST:
                self.orphans.append(attempt)

    def orphan_speaks(self) -> None:
        """A card given up as lost comes back with its result."""
        if self.orphans:
            attempt = self.orphans.pop()
            self.messages.append((attempt, self._outcome(attempt)))

    def card_forgets(self) -> None:
        if self.working:
            self.working.popitem()

    def lose_journal(self) -> None:
        if self.setup.steady:
            self.journal.clear()
            self.network.states.clear()
            self.restart()

    def relay(self, reachable: bool, refusing: bool) -> None:
        self.network.reachable, self.network.refusing = reachable, refusing

    def play(self, move: Move) -> None:
        name, *args = move
        before = self.record
        target = self if hasattr(type(self), str(name)) else self.network
        getattr(target, str(name))(*args)
        self.check(before)

    def check(self, before: TaskRecord | None) -> None:
        record = self.record
        if record is None:
            return
        assert record == fold(TASK, self.journal)
        opened = record.open_attempt
        assert sum(opened is not None and a == opened.attempt_id for a in self.working.values()) < 2
        assert not (record.claimed(Claim.SCORE) and record.claimed(Claim.ERROR))
        self.check_attempts(record)
        if before is not None and len(self.journal) > 1 and before.seen_at == record.seen_at:
            assert before.result is None or record.result == before.result, "another result"
            assert before.progress is not Progress.CLOSED or record == before, "closed, yet moved"
        if self.setup.app is not App.INVALIDATE:
            assert self.network.status is not TaskStatus.END_INVALIDATED

    def check_attempts(self, record: TaskRecord) -> None:
        """Never too many, never after one we can't serve, never without the pause between."""
        assert len(record.attempts) <= POLICY.max_attempts
        assert all(a.fault is not Fault.UNSUPPORTED for a in record.attempts[:-1])
        for n, (one, other) in enumerate(itertools.pairwise(record.attempts)):
            assert one.ended_at is not None
            assert other.started_at >= one.ended_at + POLICY.retry_backoff * 2**n


Move = tuple[object, ...]

_ALWAYS_MOVES: tuple[Move, ...] = (
    ("note",),
    *[("turn",)] * 10,
    *[("turn", lag) for lag in (1, 2, 4, 9)],
    *[("turn", 0, crash) for crash in (0, 0, 1, 1, 2, 3)],
    *[("turn", 0, None, answer) for answer in (Answer.LOST, Answer.LOST, Answer.NEVER)],
    *[("turn", lag, crash, Answer.LOST) for lag in (0, 2) for crash in (0, 1)],
    ("restart",),
    *[("deliver", which) for which in (0, 0, 0, 1, 2)],
    ("deliver", 0, True),
    ("deliver", 1, True),
    ("watch",),
    *[("finish", which) for which in (0, 0, 0, 0, 1)],
    *[("fail", 0, fault) for fault in (Fault.MEMORY, Fault.LOST, Fault.MODEL, Fault.DEADLINE)],
    ("orphan_speaks",),
    ("card_forgets",),
    *[("post_parameters",)] * 2,
    *[("report_parameters",)] * 3,
    *[("land",)] * 4,
    *[("judge",)] * 3,
    *[("settle_payment",)] * 2,
    *[("tick", seconds) for seconds in (0.5, 0.5, 1.0, 1.0, 2.0, 3.0, 5.0, 20.0)],
    ("relay", False, False),
    ("relay", True, True),
    *[("relay", True, False)] * 3,
)
_RARE_MOVES: tuple[Move, ...] = (
    ("fail", 0, Fault.UNSUPPORTED),
    *[("lose_journal",)] * 3,
    ("vanish",),
    ("reassign",),
    ("app_aborts",),
    ("tick", 70.0),
    ("tick", 200.0),
)
MOVES = _ALWAYS_MOVES * 3 + _RARE_MOVES


def winnable(world: World) -> bool:
    """From here on, without another fault, there is time and there are attempts for the answer."""
    network, record = world.network, world.record
    attempts = record.attempts if record is not None else ()
    faults = [a.fault for a in attempts]
    faults += [m.fault for _, m in world.messages if isinstance(m, AttemptFailed)]
    return (
        network.live
        and not world.setup.hung
        and not world.setup.refused
        and network.now + 90.0 <= network.deadline
        and len(attempts) < POLICY.max_attempts - 1
        and Fault.UNSUPPORTED not in faults
    )


def settle(world: World) -> None:
    """The faults cease and time passes: everything that can happen does, again and again."""
    network, setup = world.network, world.setup
    had_time = winnable(world)
    world.relay(True, setup.refused)
    network.post_parameters()
    for step in range(120):
        network.report_parameters()
        world.watch()
        if step % 3 == 2 and not setup.hung:
            world.finish()
        while world.messages:
            world.play(("deliver",))
        network.land()
        network.judge()
        network.settle_payment()
        world.play(("turn",))
        if not network.live and (world.record is None or world.record.progress is Progress.CLOSED):
            break
        world.play(("tick", 1.0 if step < 60 else 40.0))
    else:
        raise AssertionError(f"not closed: {world.record} {network.status!r}")
    if had_time:
        _check_reward(world, setup)


def _check_reward(world: World, setup: Setup) -> None:
    if world.record is None:
        return  # the journal was lost, and the task had ended before the next look
    if setup.faulty:
        assert world.network.error is TaskError.PARAMETERS_VALIDATION_FAILED
    else:
        assert world.network.score != b""
    if setup.app in {App.SINGLE, App.GROUP} and not setup.faulty:
        assert world.record.outcome in {Outcome.SUCCESS, Outcome.GROUP_SUCCESS}
        assert world.record.payment == FEE


def play(setup: Setup, schedule: Iterable[Move]) -> World:
    world = World(setup)
    for move in schedule:
        world.play(move)
    settle(world)
    return world


setups = st.builds(
    Setup,
    chain=st.booleans(),
    faulty=st.sampled_from([False, False, True]),
    checked_early=st.booleans(),
    steady=st.booleans(),
    app=st.sampled_from(App),
    hung=st.sampled_from([False, False, True]),
    refused=st.sampled_from([False, False, True]),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(setups, st.lists(st.sampled_from(MOVES), min_size=20, max_size=80))
def test_every_history_is_safe_and_ends(setup: Setup, schedule: list[Move]) -> None:
    play(setup, schedule)


def _schedules(seed: int, count: int) -> Iterator[tuple[Setup, list[Move]]]:
    chance = random.Random(seed)  # noqa: S311
    for _ in range(count):
        setup = Setup(
            chain=chance.random() < 0.5,
            faulty=chance.random() < 0.25,
            checked_early=chance.random() < 0.5,
            steady=chance.random() < 0.5,
            app=chance.choice(list(App)),
            hung=chance.random() < 0.15,
            refused=chance.random() < 0.15,
        )
        yield setup, chance.choices(MOVES, k=chance.randrange(5, 100))


def test_many_histories() -> None:
    """As above, without the cost of shrinking; and they do reach what they are meant to reach."""
    seen: Counter[str] = Counter()
    for setup, schedule in _schedules(seed=1, count=1000):
        world = play(setup, schedule)
        seen[world.network.status.name] += 1
        if world.record is not None:
            seen.update({f"outcome {world.record.outcome}"})
            seen.update({f"fault {a.fault}" for a in world.record.attempts})
            seen.update({f"claim {claim}" for claim, _ in world.record.claims})
    wanted = {f"outcome {outcome}" for outcome in Outcome} | {f"claim {claim}" for claim in Claim}
    wanted |= {f"fault {fault}" for fault in (None, *Fault)}
    assert {name for name in wanted if seen[name] < 10} == set(), seen


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("app", [App.SINGLE, App.GROUP, App.REFUND])
def test_a_quiet_history_is_paid_after_one_attempt(chain: bool, app: App) -> None:
    world = play(Setup(chain, app=app), [])
    assert world.record is not None and len(world.record.attempts) == 1
    assert world.network.now < 1020.0
    assert not world.record.claimed(Claim.ABORT)


@pytest.mark.parametrize("chain", [True, False])
def test_silence_of_the_application_ends_too(chain: bool) -> None:
    world = play(Setup(chain, app=App.DEAD), [])
    assert world.record is not None and world.record.outcome is Outcome.ABORTED
    assert world.record.claimed(Claim.ABORT) is chain


def test_a_lost_journal_is_made_up_for_by_computing_again() -> None:
    answered: list[Move] = [
        ("post_parameters",),
        ("report_parameters",),
        *[("turn",)] * 3,
        ("finish",),
        ("deliver",),
        ("turn",),
        ("land",),
        ("judge",),
        ("lose_journal",),
    ]
    world = play(Setup(chain=True), answered)
    assert world.record is not None and world.record.outcome is Outcome.SUCCESS
    assert not world.record.claimed(Claim.SCORE)


def test_a_score_that_landed_is_not_aborted_by_a_look_at_the_moment_before() -> None:
    world = World(Setup(chain=True))
    computed: list[Move] = [("post_parameters",), ("report_parameters",), *[("turn",)] * 2]
    computed += [("tick", 179.0), ("finish",), ("deliver",), ("turn",), ("tick", 4.0)]
    for move in [*computed, ("land",), ("turn", 1), ("land",)]:
        world.play(move)
    assert world.network.status is TaskStatus.SCORE_READY
    settle(world)
    assert world.record is not None and world.record.outcome is Outcome.SUCCESS


# --- the proof can fail: each of these changes to the table is noticed ---------------------------

Cell = tuple[Stage, Progress]
_ANSWERABLE, _ANSWERED, _WANTED = Stage.ANSWERABLE, Stage.ANSWERED, Stage.WANTED


def _without(cell: Cell, index: int) -> dict[Cell, lifecycle.Cell]:
    rules = lifecycle.TABLE[cell]
    return {cell: (*rules[:index], *rules[index + 1 :])}


def _first(cell: Cell, step: lifecycle.Step) -> dict[Cell, lifecycle.Cell]:
    return {cell: (lifecycle.Rule(lifecycle.ALWAYS, step),)}


MUTANTS: dict[str, dict[Cell, lifecycle.Cell]] = {
    "never fetches": _first((_ANSWERABLE, Progress.NEW), lifecycle.FOR_TIMEOUT),
    "never runs": _first((_ANSWERABLE, Progress.READY), lifecycle.FOR_TIMEOUT),
    "never stops running": _first((_ANSWERABLE, Progress.RUNNING), lifecycle.COMPUTING),
    "always stops running": _first((_ANSWERABLE, Progress.RUNNING), lifecycle.CANCEL),
    "forgets that its score is on its way": _without((_ANSWERABLE, Progress.COMPUTED), 1),
    "forgets that its report is on its way": _without((_ANSWERABLE, Progress.FAULTY), 1),
    "reports instead of answering": _first((_ANSWERABLE, Progress.COMPUTED), lifecycle.REPORT),
    "never reports": _first((_ANSWERABLE, Progress.FAULTY), lifecycle.FOR_TIMEOUT),
    "never aborts what nobody answered": _without((_ANSWERABLE, Progress.READY), 0),
    "aborts what is answered": _first((_ANSWERED, Progress.COMPUTED), lifecycle.ABORT),
    "never aborts what is answered": _without((_ANSWERED, Progress.COMPUTED), 0),
    "aborts what is answered too early": {
        (_ANSWERED, Progress.COMPUTED): (
            lifecycle.Rule(lifecycle.PAST_DEADLINE_ABORTABLE, lifecycle.ABORT),
            lifecycle.Rule(lifecycle.ALWAYS, lifecycle.FOR_VERDICT),
        )
    },
    "aborts where it can't": {
        (_ANSWERABLE, Progress.READY): (
            lifecycle.Rule(lifecycle.PAST_DEADLINE, lifecycle.ABORT),
            *lifecycle.TABLE[_ANSWERABLE, Progress.READY][1:],
        )
    },
    "never uploads": _without((_WANTED, Progress.COMPUTED), 1),
    "never gives up an upload": _without((_WANTED, Progress.COMPUTED), 0)
    | _without((_WANTED, Progress.DELIVERED), 0),
    "never makes files again": _without((_WANTED, Progress.NEW), 1),
    "computes on when the task is over": _first(
        (Stage.ENDED, Progress.RUNNING), lifecycle.COMPUTING
    ),
    "never closes": _first((Stage.ENDED, Progress.DELIVERED), lifecycle.FOR_PAYMENT),
    "closes what lives": _first((_ANSWERED, Progress.COMPUTED), lifecycle.CLOSE),
    "closes twice": _first((Stage.ENDED, Progress.CLOSED), lifecycle.CLOSE),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_table_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "TABLE", {**lifecycle.TABLE, **MUTANTS[name]})
    with pytest.raises((AssertionError, IllegalMove, KeyError)):
        for setup, schedule in _schedules(seed=2, count=1500):
            play(setup, schedule)
