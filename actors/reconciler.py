"""One turn of a task: the lifecycle decides, this does.

Every effect is stored before it happens (`Claimed` before a write to the network, `AttemptStarted`
before a GPU hears of it), every method may be repeated, and the next turn is the retry. What paces
the retries (`_pauses`) is the only thing remembered, and losing it costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from actors.dispatcher import Dispatcher
from actors.ledger import Ledger
from actors.relay_sight import RelaySight
from cluster.core.errors import (
    ClusterError,
    IllegalMove,
    LeaseLost,
    NetworkUnavailable,
    ParametersNotReady,
    RelayBroken,
    RelayError,
    RelayRefused,
    ResultRefused,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.lifecycle import (
    Abort,
    Action,
    CancelAttempt,
    Close,
    Execute,
    FetchParameters,
    Policy,
    ReportError,
    Situation,
    SubmitScore,
    UploadResult,
    Wait,
    decide,
    work_until,
)
from cluster.core.matching import Want
from cluster.core.ports import Artifacts, Network, Order
from cluster.core.record import (
    Claim,
    Claimed,
    Closed,
    FaultFound,
    Noticed,
    Outcome,
    ParametersFetched,
    ResultUploaded,
    Seen,
    TaskRecord,
)
from cluster.core.types import (
    AccountView,
    AttemptId,
    Commitment,
    Stage,
    TaskFacts,
    TaskType,
    Timestamp,
    Wei,
    Work,
)
from cluster.inference import parameters as task_parameters
from cluster.metrics import Metrics
from cluster.network_metrics import RelayCall, RelayResult

RELAY_SECONDS = 15.0
"""After so long without an answer the relay is away."""
POLL_SECONDS = 0.5
"""How soon the relay is asked again for parameters that aren't there yet."""
_NOTICED = frozenset({Stage.ANSWERED, Stage.WANTED})
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a task's parameters ask for, worked out once."""

    pipeline: str
    base: str
    work: Work


@dataclass(frozen=True, slots=True)
class Turn:
    """What the last turn of a task saw and decided, for people to look at."""

    facts: TaskFacts | None
    stage: Stage
    action: str
    now: Timestamp


@dataclass(frozen=True, slots=True)
class _Pause:
    action: type[Action]
    until: float
    length: float

    def left(self, action: type[Action], now: float) -> float:
        """Seconds that this action has to wait; not where the clock was set back since."""
        left = self.until - now
        return left if action is self.action and 0 < left < self.length + 1.0 else 0.0


class Reconciler:
    """Runs the lifecycle for the tasks of every account."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        artifacts: Artifacts,
        dispatcher: Dispatcher,
        policy: Policy,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._artifacts = artifacts
        self._dispatcher = dispatcher
        self.policy = policy
        self._metrics = metrics
        self._clock = clock
        self._pauses: dict[Commitment, _Pause] = {}
        self._needs: dict[Commitment, Need | TaskUnsupported] = {}
        self.turns: dict[Commitment, Turn] = {}
        self._relay = RelaySight()
        self._log = structlog.get_logger("tasks")

    async def turn(self, view: AccountView) -> float | None:
        """One action for each open task of the account that was looked at.

        Returns the seconds until the next turn is due, 0 when something was done and the facts
        should be read again at once, None when only a new fact can change anything.
        """
        account = view.account.address
        facts = {task.commitment: task for task in view.tasks}
        self._open_new(view)
        due: list[float] = []
        for task in [record.commitment for record in self._ledger.of_account(account)]:
            # Read anew: while another task's action was awaited, an attempt may have come or gone.
            record = self._ledger.open.get(task)
            if record is None:
                continue
            wait = await self._turn_of(record, facts.get(task), view.now)
            if wait is not None:
                due.append(wait)
        return min(due) if due else None

    def _open_new(self, view: AccountView) -> None:
        account = view.account.address
        for task in view.tasks:
            commitment = task.commitment
            ours = task.selected_node == account and task.stage is not Stage.ENDED
            if not ours or commitment in self._ledger.open:
                continue
            try:
                seen = Seen(account, task.task_type, task.model_ids, task.fee, task.started_at)
                self._ledger.append(commitment, seen)
            except IllegalMove as error:
                # Another account of ours has answered it: there is nothing more to give.
                self._log.warning(
                    "task_left_alone", task=commitment, account=account, error=str(error)
                )
                continue
            self._log.info("task_seen", task=commitment, account=account, type=task.task_type.name)

    async def _turn_of(
        self, record: TaskRecord, facts: TaskFacts | None, now: Timestamp
    ) -> float | None:
        task = record.commitment
        try:
            writes = self._network.writes(task)
        except NetworkUnavailable as error:
            self._log.warning("writes_unknown", **_ids(record), error=str(error))
            return FIRST_PAUSE
        record = self._notice(record, facts)
        situation = Situation(facts, record, now, self.policy, writes)
        action = decide(situation)
        self._note(situation, action)
        if not isinstance(action, Execute):
            self._dispatcher.forget(task)
        pause = self._pauses.get(task)
        left = 0.0 if pause is None else pause.left(type(action), self._clock())
        if left > 0:
            return left
        try:
            wait = await self._do(situation, action)
        except ParametersNotReady as error:
            self._note_relay(task, action, error)
            return self._pause(task, action, POLL_SECONDS)
        except LeaseLost:
            raise
        except ClusterError as error:
            self._log.warning(
                "action_failed", **_ids(record), action=_words(action), error=str(error)
            )
            self._note_relay(task, action, error)
            return self._pause(task, action)
        except Exception:  # noqa: BLE001 - a task's own supervised loop: no task stops another
            self._log.exception("turn_broke", **_ids(record), action=_words(action))
            return self._pause(task, action)
        self._note_relay(task, action, None)
        return wait

    def _notice(self, record: TaskRecord, facts: TaskFacts | None) -> TaskRecord:
        """Store how far the network is with the task, the first time that it is seen."""
        if facts is None or facts.selected_node != record.account:
            return record
        if facts.stage not in _NOTICED or record.noticed_at(facts.stage) is not None:
            return record
        return self._ledger.append(record.commitment, Noticed(facts.stage))

    @property
    def relay_error(self) -> str | None:
        """Why the relay isn't reached."""
        return self._relay.error(self._clock())

    async def ask_relay(self) -> None:
        """Whether it is there, where no task has shown that for a while."""
        if not self._relay.is_quiet(self._clock()):
            return
        calls, failed = self._relay.calls, ""
        try:
            async with asyncio.timeout(RELAY_SECONDS):
                await self._network.ask_relay()
        except RelayRefused:
            pass
        except TimeoutError:
            failed = f"relay: no answer in {RELAY_SECONDS:.0f} s"
            # Who calls waits for longer, and counts nothing that is cut off.
            self._metrics.network.relay_called("now", "unreachable")
        except NetworkUnavailable as error:
            failed = str(error)
        except Exception:  # noqa: BLE001 - no task's turn, and no task stops for it
            failed = "relay: it can't be asked; the log says why"
            self._log.exception("relay_not_asked")
        if calls == self._relay.calls:  # no task has called meanwhile
            self._relay.asked(failed, self._clock())
            if failed:
                self._log.warning("relay_away", error=failed)

    def _note_relay(self, task: Commitment, action: Action, error: ClusterError | None) -> None:
        """Remember how the relay's last call went."""
        if not isinstance(action, FetchParameters | UploadResult):
            return
        self._relay.heard(task, error, self._clock())
        call: RelayCall = "parameters" if isinstance(action, FetchParameters) else "results"
        self._metrics.network.relay_called(call, _relay_result(error))

    async def _do(self, situation: Situation, action: Action) -> float | None:
        record = situation.record
        account, task = record.account, record.commitment
        match action:
            case Wait(_, until):
                return self._wait(situation, until)
            case FetchParameters():
                text = await self._network.fetch_parameters(account, task)
                self._ledger.append(task, ParametersFetched(text))
            case Execute():
                return self._execute(situation, action)
            case CancelAttempt(attempt, gpu):
                await self._dispatcher.cancel(gpu, task, attempt)
            case UploadResult():
                await self._upload(record)
            case Close(outcome, payment):
                await self._close(record, outcome, payment)
            case SubmitScore() | ReportError() | Abort():
                await self._write(situation, action)
                # Whether the network took it shows in the facts; don't press it meanwhile.
                self._pause(task, action)
        return 0.0

    def _wait(self, situation: Situation, until: Timestamp | None) -> float | None:
        record = situation.record
        attempt = record.open_attempt
        if attempt is not None and not self._dispatcher.follows(attempt.attempt_id):
            self._resume(situation)
        return None if until is None else max(0.05, until - situation.now)

    async def _write(self, situation: Situation, action: SubmitScore | ReportError | Abort) -> None:
        record = situation.record
        account, task = record.account, record.commitment
        match action:
            case SubmitScore(score):
                if not record.claimed(Claim.SCORE):
                    self._metrics.score_sent(record.task_type, _slack(situation))
                self._claim(record, Claim.SCORE)
                await self._network.submit_score(account, task, score)
            case ReportError(error):
                self._claim(record, Claim.ERROR)
                await self._network.report_error(account, task, error)
            case Abort(reason):
                self._claim(record, Claim.ABORT)
                await self._network.abort(account, task, reason)

    def _claim(self, record: TaskRecord, claim: Claim) -> None:
        if not record.claimed(claim):
            self._ledger.append(record.commitment, Claimed(claim))
            self._log.info("claimed", **_ids(record), claim=claim.value)

    def _execute(self, situation: Situation, action: Execute) -> float | None:
        record = situation.record
        try:
            want, order, work = self._order(situation, action, AttemptId(""))
        except TaskInvalid as error:
            self._ledger.append(record.commitment, FaultFound(str(error)))
            self._log.warning("task_invalid", **_ids(record), reason=str(error))
            return 0.0
        except TaskUnsupported as error:
            self._log.debug("task_unsupported", **_ids(record), reason=str(error))
            return LONGEST_PAUSE
        self._dispatcher.want(want, order, work)
        return None

    def _resume(self, situation: Situation) -> None:
        """Follow an attempt that an earlier coordinator started."""
        attempt = situation.record.open_attempt
        if attempt is None:
            return
        want, order, work = self._order(situation, Execute(frozenset()), attempt.attempt_id)
        self._log.info("attempt_followed", **_ids(situation.record))
        self._dispatcher.follow(attempt.gpu_id, order, want, work, situation.now)

    def _order(
        self, situation: Situation, action: Execute, attempt: AttemptId
    ) -> tuple[Want, Order, Work]:
        """Raises `TaskInvalid`, `TaskUnsupported` as the parameters' schema says."""
        facts, record = situation.facts, situation.record
        text = record.parameters
        if facts is None or text is None:
            raise ClusterError(f"{record.commitment}: nothing to execute")
        need = self._needs.get(record.commitment)
        if need is None:
            need = self._needs[record.commitment] = _need(record.task_type, text)
        if isinstance(need, TaskUnsupported):
            raise need
        until = work_until(situation)
        want = Want(
            record.commitment,
            facts.requirement,
            need.pipeline,
            need.base,
            until,
            self._dispatcher.seconds_for(need.work, need.pipeline),
            action.avoid,
            action.outgrown,
        )
        order = Order(attempt, record.commitment, int(record.task_type), text, until)
        return want, order, need.work

    async def _upload(self, record: TaskRecord) -> None:
        assert record.result is not None, "the lifecycle uploads computed records"  # noqa: S101
        files = await self._artifacts.get(record.commitment, record.result.files)
        await self._network.upload_result(record.account, record.commitment, files)
        self._ledger.append(record.commitment, ResultUploaded())
        self._log.info("result_uploaded", **_ids(record), files=len(files))

    async def _close(self, record: TaskRecord, outcome: Outcome, payment: Wei) -> None:
        task = record.commitment
        self._metrics.closed(self._ledger.append(task, Closed(outcome, payment)))
        self._pauses.pop(task, None)
        self._needs.pop(task, None)
        self.turns.pop(task, None)
        slashed = outcome is Outcome.INVALIDATED
        log = self._log.error if slashed else self._log.info
        log("task_closed", **_ids(record), outcome=outcome.value, payment=str(payment))
        if outcome not in {Outcome.LOST, Outcome.INVALIDATED}:
            # What the network only seems to have forgotten may be wanted yet; and by what was
            # wrong, its reason is found (actors.evidence).
            await self._artifacts.drop(task)

    def _pause(self, task: Commitment, action: Action, length: float | None = None) -> float:
        """Pace this action: doubling from `FIRST_PAUSE` unless a fixed length is given."""
        last = self._pauses.get(task)
        if length is None:
            again = last is not None and last.action is type(action)
            length = min(last.length * 2, LONGEST_PAUSE) if last and again else FIRST_PAUSE
        self._pauses[task] = _Pause(type(action), self._clock() + length, length)
        return length

    def _note(self, situation: Situation, action: Action) -> None:
        turn = Turn(situation.facts, situation.stage, _words(action), situation.now)
        self.turns[situation.record.commitment] = turn


def _slack(situation: Situation) -> float | None:
    """Seconds left until the network takes no answer any more."""
    facts = situation.facts
    if facts is None or facts.deadline is None:
        return None
    return facts.deadline - situation.now


def _need(task_type: TaskType, text: str) -> Need | TaskUnsupported:
    """What the parameters ask for; raises `TaskInvalid`."""
    try:
        parsed = task_parameters.parse(task_type, text)
    except TaskUnsupported as error:
        return error
    return Need(
        task_parameters.pipeline_key(parsed),
        task_parameters.base_key(parsed),
        task_parameters.work_of(parsed),
    )


def _relay_result(error: ClusterError | None) -> RelayResult:
    match error:
        case None:
            return "ok"
        case ParametersNotReady():
            return "not_ready"
        case ResultRefused() | RelayRefused():
            return "refused"
        case RelayBroken():
            return "error"
        case RelayError():
            return "unreachable"
        case _:
            return "error"


def _words(action: Action) -> str:
    """An action in a line; what it carries is left out but for what a person reads."""
    match action:
        case Wait(why, _):
            return f"wait {why}" if why.startswith(("for", "until")) else why
        case Close(outcome, _):
            return f"close as {outcome.value}"
        case _:
            return type(action).__name__


def _ids(record: TaskRecord) -> dict[str, str]:
    """What a line of the log is found by: the task, and what had to do with it last."""
    found: dict[str, str] = {"task": record.commitment, "account": record.account}
    if record.attempts:
        last = record.attempts[-1]
        found |= {"gpu": last.gpu_id, "attempt": last.attempt_id}
    return found
