from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from actors import reconciler as reconciler_module
from actors.reconciler import FIRST_PAUSE, LONGEST_PAUSE, POLL_SECONDS
from cluster.core.errors import (
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    IllegalMove,
    LeaseLost,
    NetworkUnavailable,
    ParametersUnreadable,
    RelayError,
    RelayRefused,
    ResultRefused,
)
from cluster.core.lifecycle import WriteState
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    FaultFound,
    Noticed,
    Outcome,
    ParametersFetched,
    Progress,
    ResultStored,
    Seen,
)
from cluster.core.types import (
    AttemptId,
    Commitment,
    GigaBytes,
    GpuClass,
    GpuId,
    Requirement,
    Stage,
    TaskStatus,
    TaskType,
    Timestamp,
    Wei,
)
from tests.unit.actor_fakes import (
    ALICE,
    BOB,
    CARD,
    CARD_2,
    DONE,
    FILES,
    GOOD,
    LOSE,
    OTHER,
    SCORE,
    START,
    TASK,
    facts_of,
    gpu_of,
)
from tests.unit.actor_house import House

FIRST = AttemptId("a1")
INVALID = json.dumps({"base_model": "acme/tiny", "prompt": "", "task_config": {}})
UNSUPPORTED = json.dumps(
    {"base_model": "acme/tiny", "prompt": "x", "task_config": {"image_width": 513}}
)
AWAY = NetworkUnavailable("no answer")
LATE = START + 180 + 2


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def computed(house: House, task: Commitment = TASK) -> tuple[Event, ...]:
    """The history of a task whose result is stored; the files are in the artifacts."""
    files = await house.artifacts.put(task, FILES)
    return (
        ParametersFetched(GOOD),
        AttemptStarted(FIRST, CARD),
        ResultStored(FIRST, SCORE, files),
    )


# --- the whole way --------------------------------------------------------------------------------


async def test_a_task_goes_from_seen_to_paid(house: House) -> None:
    house.network.add(facts_of())
    house.pool.outcomes = [DONE]
    await house.turns(4)
    assert house.network.tasks[TASK].status is TaskStatus.SCORE_READY
    house.network.move(TASK, stage=Stage.WANTED, status=TaskStatus.VALIDATED)
    await house.turns(2)
    assert house.kinds() == [
        "Seen",
        "ParametersFetched",
        "AttemptStarted",
        "ResultStored",
        "Claimed",
        "ResultUploaded",
        "Closed",
    ]
    noticed = [event.stage for event in house.story() if isinstance(event, Noticed)]
    assert noticed == [Stage.ANSWERED, Stage.WANTED]
    assert house.network.uploaded == [FILES]
    assert house.story()[-1] == Closed(Outcome.SUCCESS, Wei(10**18))
    assert house.ledger.open == {}
    assert not (house.path / "artifacts" / TASK).exists()
    assert house.reconciler.turns == {}
    rendered = house.metrics.render()
    assert b'crynux_tasks_total{outcome="EndSuccess",type="SD"} 1.0' in rendered
    assert b'crynux_paid_cnx_total{gpu_name="",vram_gb="0"} 1.0' in rendered


async def test_the_order_is_what_the_task_asks_for(house: House) -> None:
    house.network.add(facts_of())
    await house.turns(2)
    ((gpu, order),) = house.pool.orders
    assert (gpu, order.attempt_id, order.task) == (CARD, FIRST, TASK)
    assert (order.task_type, order.parameters) == (int(TaskType.SD), GOOD)
    assert order.deadline == START + 180


@pytest.mark.parametrize("stage", [Stage.ANSWERED, Stage.WANTED])
async def test_lost_files_are_made_again_for_as_long_as_the_payment_is_waited_for(
    house: House, stage: Stage
) -> None:
    """The answer was in time, so the deadline of answers is no bound to the files."""
    house.network.add(facts_of(stage=stage, status=TaskStatus.VALIDATED, score=SCORE))
    house.clock.now = START + 180 + 1
    await house.turns(2)
    ((_, order),) = house.pool.orders
    assert order.deadline == START + 180 + house.policy.abort_margin + house.policy.answer_grace


async def test_files_without_a_deadline_are_made_without_one(house: House) -> None:
    house.network.add(facts_of(stage=Stage.WANTED, score=SCORE, deadline=None))
    await house.turns(2)
    ((_, order),) = house.pool.orders
    assert order.deadline is None


async def test_the_most_urgent_task_goes_first(house: House) -> None:
    house.network.add(facts_of(TASK))
    house.network.add(facts_of(OTHER, deadline=START + 90))
    await house.turns(2)
    assert [order.task for _, order in house.pool.orders] == [OTHER]


async def test_a_card_too_small_is_not_used(house: House) -> None:
    large = Requirement(GigaBytes(80), "", GigaBytes(0))
    house.network.add(replace(facts_of(), requirement=large))
    await house.turns(3)
    assert house.pool.calls == []
    assert house.dispatcher.waiting() == (TASK,)


# --- stored first ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "claim"),
    [
        ("submit_score", Claim.SCORE),
        ("report_error", Claim.ERROR),
        ("abort", Claim.ABORT),
    ],
)
async def test_a_claim_is_stored_before_the_network_hears_of_it(
    house: House, method: str, claim: Claim
) -> None:
    history: tuple[Event, ...] = {
        "submit_score": await computed(house),
        "report_error": (ParametersFetched(INVALID), FaultFound("no")),
        "abort": (),
    }[method]
    house.open(TASK, *history)
    house.network.add(facts_of())
    if method == "abort":
        house.clock.now = LATE
    stored: list[list[Event]] = []
    house.network.before = lambda called: stored.append(house.story()) if called == method else None
    await house.turn()
    assert len(stored) == 1
    assert stored[0][-1] == Claimed(claim)
    assert house.network.tasks[TASK].stage in (Stage.ANSWERED, Stage.ENDED)


@pytest.mark.parametrize("fault", [AWAY, LOSE])
async def test_a_score_is_claimed_once_however_often_it_is_sent(
    house: House, fault: BaseException | str
) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.faults["submit_score"] = [fault, fault]
    await house.turns(6)
    assert house.kinds().count("Claimed") == 1
    sent = {args for args in house.network.called("submit_score")}
    assert sent == {(TASK, SCORE)}
    assert house.network.tasks[TASK].score == SCORE


async def test_a_write_that_fails_is_tried_again_with_growing_patience(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.faults["submit_score"] = [AWAY] * 8
    waits: list[float | None] = []
    for _ in range(8):
        waits.append(await house.turn())
        house.clock.now += waits[-1] or 0.0
    doubled = [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(8)]
    assert waits == doubled
    assert house.network.called("submit_score") == [(TASK, SCORE)] * 8


async def test_a_pause_holds_however_often_the_task_is_woken(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.faults["submit_score"] = [AWAY]
    await house.turn()
    house.clock.now += 0.2
    assert await house.turn() == pytest.approx(FIRST_PAUSE - 0.2)
    assert len(house.network.called("submit_score")) == 1
    house.clock.now += 0.4
    await house.turn()
    assert len(house.network.called("submit_score")) == 2


async def test_a_clock_that_is_set_back_prolongs_no_pause(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.faults["submit_score"] = [AWAY]
    await house.turn()
    house.clock.now -= 3600
    await house.turn()
    assert len(house.network.called("submit_score")) == 2


async def test_a_sent_write_is_not_pressed_while_the_facts_lag(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    await house.turn()
    house.network.move(TASK, stage=Stage.ANSWERABLE, status=TaskStatus.PARAMETERS_UPLOADED)
    house.network.states[TASK] = {}
    assert await house.turn() == FIRST_PAUSE
    assert len(house.network.called("submit_score")) == 1


async def test_no_answer_is_pressed_while_one_is_on_its_way(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.states[TASK] = {Claim.SCORE: WriteState.OPEN}
    await house.turns(3)
    assert house.network.called("submit_score") == []


# --- parameters -----------------------------------------------------------------------------------


async def test_parameters_that_arent_there_are_polled_for_at_a_steady_pace(house: House) -> None:
    house.network.add(facts_of(), parameters=None)
    waits: list[float | None] = []
    for _ in range(4):
        waits.append(await house.turn())
        house.clock.now += waits[-1] or 0.0
    assert waits == [POLL_SECONDS] * 4
    house.network.parameters[TASK] = GOOD
    assert await house.turn() == 0.0
    assert house.story()[-1] == ParametersFetched(GOOD)


@pytest.mark.parametrize("error", [ParametersUnreadable("another key"), AWAY])
async def test_parameters_that_cant_be_had_are_never_reported(
    house: House, error: ClusterError
) -> None:
    house.network.add(facts_of(abortable=False))
    house.network.faults["fetch_parameters"] = [error] * 100
    await house.turns(30)
    assert house.kinds() == ["Seen"]
    assert house.network.called("report_error") == []


async def test_an_invalid_task_is_reported_once(house: House) -> None:
    house.network.add(facts_of(), INVALID)
    house.network.faults["report_error"] = [AWAY, LOSE]
    await house.turns(8)
    found = house.story()[2]
    assert isinstance(found, FaultFound)
    assert found.reason.startswith("prompt: ")
    assert house.kinds() == ["Seen", "ParametersFetched", "FaultFound", "Claimed"]
    assert house.story()[3] == Claimed(Claim.ERROR)
    assert house.network.tasks[TASK].status is TaskStatus.ERROR_REPORTED
    assert house.pool.calls == []


@pytest.mark.parametrize("late", [False, True])
async def test_what_we_dont_run_is_never_reported(house: House, late: bool) -> None:
    house.network.add(facts_of(), UNSUPPORTED)
    await house.turns(1)
    assert await house.turn() == LONGEST_PAUSE
    await house.turns(1)
    if late:
        house.clock.now = LATE
        await house.turns(3)
    assert house.network.called("report_error") == []
    assert house.network.called("submit_score") == []
    assert house.pool.calls == []
    assert len(house.network.called("abort")) == late
    assert "FaultFound" not in house.kinds()


async def test_a_kind_of_task_we_dont_run_is_never_reported(house: House) -> None:
    house.network.add(facts_of(task_type=TaskType.SD_FT), INVALID)
    await house.turns(4)
    assert house.kinds() == ["Seen", "ParametersFetched"]


async def test_a_language_task_goes_to_a_card(house: House) -> None:
    chat = {"model": "acme/llm", "messages": [{"role": "user", "content": "hello"}]}
    house.network.add(facts_of(task_type=TaskType.LLM), json.dumps(chat))
    await house.turns(2)
    assert house.kinds() == ["Seen", "ParametersFetched", "AttemptStarted"]


async def test_what_a_card_doesnt_run_is_tried_on_no_other(tmp_path: Path) -> None:
    house = House(tmp_path, (gpu_of(), gpu_of(CARD_2)))
    house.open(
        TASK,
        ParametersFetched(GOOD),
        AttemptStarted(FIRST, CARD),
        AttemptFailed(FIRST, Fault.UNSUPPORTED, "a refiner"),
    )
    house.network.add(facts_of())
    await house.turns(4)
    assert house.pool.calls == []
    assert house.network.called("report_error") == []


HOSTILE = (
    "",
    "null",
    "[]",
    "{",
    "[" * 100_000,
    "\x00",
    "\ud800",
    '"\\ud800"',
    '{"a":1e999999999}',
    '{"base_model":"x","prompt":"x","task_config":{"seed":' + "9" * 5000 + "}}",
    '{"base_model":"x","prompt":"x","task_config":{"cfg":NaN}}',
    '{"base_model":"\\ud800","prompt":"x","task_config":{},"unet":"\\u0000"}',
    '{"base_model":"x","prompt":"x","task_config":{},"scheduler":{"method":"\\ud800\\u202e"}}',
    '{"base_model":"../../etc","prompt":"' + "(" * 9000 + '","task_config":{}}',
    '{"base_model":{"name":"x","variant":"y|unet=z"},"prompt":"x","task_config":{"steps":100}}',
)


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_parameters_never_break_a_turn(house: House, text: str) -> None:
    house.network.add(facts_of(), text)
    house.network.add(facts_of(OTHER))
    house.pool.outcomes = [DONE, DONE]
    await house.turns(8)
    assert house.kinds(OTHER)[-1] == "Claimed"
    assert house.failed == []
    # What was stored can be read again by the next coordinator.
    house.begin_term()
    assert house.ledger.open[TASK].parameters == text


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_mutated = st.fixed_dictionaries(
    {"base_model": _json | st.just("x"), "prompt": _json | st.just("x"), "task_config": _json},
    optional={name: _json for name in ("version", "dtype", "scheduler", "lora", "refiner", "vae")},
)


@settings(max_examples=40)
@given(st.text() | _json.map(json.dumps) | _mutated.map(json.dumps))
def test_no_text_breaks_a_turn(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    house = House(tmp_path_factory.mktemp("house"))
    house.network.add(facts_of(), text)
    asyncio.run(house.turns(3))
    assert house.kinds()[:2] == ["Seen", "ParametersFetched"]
    assert house.failed == []
    house.journal.close()


# --- executing ------------------------------------------------------------------------------------


async def test_a_failed_attempt_is_followed_by_one_on_another_card(tmp_path: Path) -> None:
    house = House(tmp_path, (gpu_of(), gpu_of(CARD_2)))
    house.network.add(facts_of())
    house.pool.outcomes = [ClusterError("a broken card"), DONE]
    await house.turns(5)
    assert [gpu for gpu, _ in house.pool.orders] == [CARD, CARD_2]
    assert house.kinds()[-1] == "Claimed"


async def test_a_task_that_runs_out_of_memory_moves_to_a_larger_card(tmp_path: Path) -> None:
    large = GpuId("node-2")
    cards = (gpu_of(), gpu_of(CARD_2), gpu_of(large, kind=GpuClass("Large", GigaBytes(80))))
    house = House(tmp_path, cards)
    house.network.add(facts_of())
    house.pool.outcomes = [DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "8 GB are too few"), DONE]
    await house.turns(5)
    assert [gpu for gpu, _ in house.pool.orders] == [CARD, large]
    assert house.kinds()[-1] == "Claimed"


async def test_attempts_end_with_the_policy_and_then_with_an_abort(house: House) -> None:
    house.network.add(facts_of())
    house.pool.outcomes = [ClusterError("a broken card") for _ in range(10)]
    await house.turns(12)
    assert len(house.pool.orders) == house.policy.max_attempts
    assert house.network.called("report_error") == []
    house.clock.now = LATE
    await house.turns(3)
    assert house.kinds()[-2:] == ["Claimed", "Closed"]
    assert house.story()[-1] == Closed(Outcome.ABORTED, Wei(0))


async def test_past_the_deadline_the_attempt_is_given_up_first(house: House) -> None:
    house.network.add(facts_of())
    await house.turns(2)
    house.clock.now = LATE
    await house.turn()
    assert house.story()[-1] == AttemptFailed(FIRST, Fault.CANCELLED, "given up")
    await house.turns(2)
    assert house.story()[-1] == Closed(Outcome.ABORTED, Wei(0))
    assert house.network.called("submit_score") == []


async def test_an_attempt_of_an_earlier_coordinator_is_followed_once(house: House) -> None:
    house.network.add(facts_of())
    await house.turns(2)
    await house.dispatcher.stop()
    house.begin_term()
    await house.turns(3)
    assert house.pool.called("start") == [(CARD, FIRST), (CARD, FIRST)]
    house.pool.finish(FIRST, DONE)
    await house.calm()
    await house.turns(1)
    assert house.kinds().count("AttemptStarted") == 1
    assert house.network.tasks[TASK].score == SCORE


async def test_a_want_is_forgotten_when_the_task_ends(house: House) -> None:
    house.pool.cards.clear()
    house.network.add(facts_of())
    await house.turns(3)
    assert house.dispatcher.waiting() == (TASK,)
    house.network.move(TASK, stage=Stage.ENDED, status=TaskStatus.END_ABORTED)
    await house.turns(1)
    assert house.dispatcher.waiting() == ()
    house.pool.cards.append(gpu_of())
    house.dispatcher.dispatch(Timestamp(house.clock()))
    await house.calm()
    assert house.pool.calls == []


# --- uploading ------------------------------------------------------------------------------------


async def wanted(house: House) -> None:
    house.open(TASK, *await computed(house), Claimed(Claim.SCORE))
    house.network.add(facts_of(stage=Stage.WANTED, status=TaskStatus.VALIDATED, score=SCORE))


async def test_an_upload_is_tried_again_until_it_is_taken(house: House) -> None:
    await wanted(house)
    house.network.faults["upload_result"] = [AWAY, AWAY]
    await house.turns(4)
    assert len(house.network.called("upload_result")) == 3
    assert house.network.uploaded == [FILES]
    assert house.kinds()[-2:] == ["ResultUploaded", "Closed"]


async def test_an_upload_whose_answer_was_lost_ends_well(house: House) -> None:
    await wanted(house)
    house.network.faults["upload_result"] = [LOSE]
    await house.turns(2)
    assert house.story()[-1] == Closed(Outcome.SUCCESS, Wei(10**18))


async def test_a_refused_result_is_never_scored_again(house: House) -> None:
    await wanted(house)
    house.network.faults["upload_result"] = [ResultRefused("Wrong result files uploaded")] * 100
    await house.turns(12)
    assert len(house.network.called("upload_result")) > 2
    assert house.network.called("submit_score") == []
    assert house.network.called("report_error") == []
    assert house.pool.calls == []
    assert house.kinds().count("ResultStored") == 1


async def test_a_score_that_isnt_ours_gets_no_files(house: House) -> None:
    await wanted(house)
    house.network.move(TASK, score=bytes(8))
    await house.turns(3)
    assert house.network.called("upload_result") == []


async def test_files_that_are_gone_break_nothing(house: House) -> None:
    await wanted(house)
    await house.artifacts.drop(TASK)
    await house.turns(3)
    assert house.kinds()[-1] == "Claimed"
    assert house.network.called("upload_result") == []


# --- whose task, and every task -------------------------------------------------------------------


async def test_a_task_of_another_account_is_ignored(house: House) -> None:
    house.network.add(facts_of(node=BOB))
    view = await house.network.look(ALICE, (TASK,))
    assert [task.commitment for task in view.tasks] == [TASK]
    await house.reconciler.turn(view)
    assert house.ledger.open == {}
    assert house.story() == []


async def test_a_task_that_was_given_to_another_node_is_closed_as_lost(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of(node=BOB))
    await house.turn()
    assert house.story()[-1] == Closed(Outcome.LOST, Wei(0))
    assert house.network.called("submit_score") == []


async def test_a_task_the_network_doesnt_know_is_closed_as_lost(house: House) -> None:
    house.open(TASK)
    await house.turn()
    assert house.story()[-1] == Closed(Outcome.LOST, Wei(0))


async def test_an_ended_task_is_not_opened(house: House) -> None:
    house.network.add(facts_of(stage=Stage.ENDED, status=TaskStatus.END_SUCCESS))
    await house.turns(2)
    assert house.story() == []


async def test_another_accounts_records_are_left_alone(house: House) -> None:
    house.open(TASK, account=BOB)
    assert await house.turn(ALICE) is None
    assert house.kinds() == ["Seen"]


async def test_every_open_task_gets_its_turn_when_anothers_fails(house: House) -> None:
    for task in (TASK, OTHER):
        house.network.add(facts_of(task))
    house.network.faults["fetch_parameters"] = [AWAY]
    assert await house.turn() == 0.0
    assert house.kinds(TASK) == ["Seen"]
    assert house.kinds(OTHER) == ["Seen", "ParametersFetched"]


async def test_a_relay_that_refuses_one_task_is_reached_and_is_counted_so(house: House) -> None:
    house.network.add(facts_of())
    refusal = RelayRefused("relay: task refused: Signer not allowed")
    house.network.faults["fetch_parameters"] = [refusal]
    await house.turn()
    assert house.reconciler.relay_error is None
    assert b'crynux_relay_calls_total{call="parameters",result="refused"} 1.0' in (
        house.metrics.render()
    )


async def test_a_relay_that_is_gone_is_noticed_while_nobody_needs_it(house: House) -> None:
    house.network.faults["ask_relay"] = [RelayError("relay: ConnectError")]
    await house.reconciler.ask_relay()
    assert house.reconciler.relay_error == "relay: ConnectError"
    await house.reconciler.ask_relay()
    assert len(house.network.called("ask_relay")) == 1, "it was asked a moment ago"
    house.clock.now += 60
    await house.reconciler.ask_relay()
    assert house.reconciler.relay_error is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RelayRefused("relay: now refused"), None),
        (NetworkUnavailable("no way there"), "no way there"),
        (RuntimeError("a bug"), "relay: it can't be asked; the log says why"),
    ],
)
async def test_whatever_comes_of_asking_ends_no_term(
    house: House, fault: Exception, words: str | None
) -> None:
    house.network.faults["ask_relay"] = [fault]
    await house.reconciler.ask_relay()
    assert house.reconciler.relay_error == words


async def test_a_relay_that_swallows_what_it_is_asked_is_counted_while_nobody_needs_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler_module, "RELAY_SECONDS", 0.01)
    house.network.gates["ask_relay"] = asyncio.Event()
    await house.reconciler.ask_relay()
    assert house.reconciler.relay_error == "relay: no answer in 0 s"
    assert b'crynux_relay_calls_total{call="now",result="unreachable"} 1.0' in (
        house.metrics.render()
    )


async def test_what_a_task_has_shown_meanwhile_counts_more(house: House) -> None:
    house.network.add(facts_of())
    house.network.faults["ask_relay"] = [RelayError("relay: ReadTimeout")]
    house.network.gates["ask_relay"] = asyncio.Event()
    asking = asyncio.create_task(house.reconciler.ask_relay())
    await asyncio.sleep(0)
    await house.turns(2)
    assert house.network.called("fetch_parameters")
    house.network.gates["ask_relay"].set()
    await asking
    assert house.reconciler.relay_error is None


async def test_a_relay_that_serves_a_task_is_not_asked(house: House) -> None:
    house.network.add(facts_of())
    await house.turns(2)
    assert house.network.called("fetch_parameters")
    await house.reconciler.ask_relay()
    assert not house.network.called("ask_relay")


async def test_a_slow_action_of_one_task_leaves_no_stale_look_at_another(tmp_path: Path) -> None:
    """While TASK's files are uploaded, OTHER is started by the pool's own change of state."""
    house = House(tmp_path, ())
    await wanted(house)
    house.open(OTHER, ParametersFetched(GOOD))
    house.network.add(facts_of(OTHER))
    house.network.faults["upload_result"] = [AWAY]
    await house.turn()  # OTHER is wanted, no card is there
    assert house.dispatcher.waiting() == (OTHER,)
    house.clock.now += 1
    house.network.gates["upload_result"] = asyncio.Event()
    turn = asyncio.create_task(house.turn())
    await house.calm_but_for(1)
    house.pool.cards += [gpu_of(), gpu_of(CARD_2)]
    house.dispatcher.dispatch(Timestamp(house.clock()))
    assert house.kinds(OTHER)[-1] == "AttemptStarted"
    house.network.gates["upload_result"].set()
    await turn
    await house.calm()
    assert house.failed == []
    assert house.kinds(OTHER).count("AttemptStarted") == 1
    assert house.dispatcher.waiting() == ()


async def test_a_lost_lease_stops_the_turn_before_the_network_hears_of_it(house: House) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.journal.acquire("another", Timestamp(START + 100), 15.0)
    with pytest.raises(LeaseLost):
        await house.turn()
    assert house.network.called("submit_score") == []


@pytest.mark.parametrize("bug", [IllegalMove("a bug"), ZeroDivisionError("a bug")])
async def test_a_bug_in_one_tasks_action_stops_no_other_and_is_paced(
    house: House, bug: Exception
) -> None:
    house.open(TASK, *await computed(house))
    house.network.add(facts_of())
    house.network.add(facts_of(OTHER))
    house.network.faults["submit_score"] = [bug, bug]
    waits: list[float] = []
    for _ in range(3):
        await house.turn()
        waits.append(house.reconciler._pauses[TASK].length)
        house.clock.now += waits[-1]
        await house.calm()
    assert waits == [FIRST_PAUSE, FIRST_PAUSE * 2, FIRST_PAUSE * 4]
    assert len(house.network.called("submit_score")) == 3
    assert house.kinds().count("Claimed") == 1
    assert "AttemptStarted" in house.kinds(OTHER)


async def test_what_a_turn_saw_can_be_looked_at(house: House) -> None:
    house.network.add(facts_of())
    await house.turns(3)
    turn = house.reconciler.turns[TASK]
    assert (turn.stage, turn.action, turn.now) == (Stage.ANSWERABLE, "computing", START)
    assert house.ledger.open[TASK].progress is Progress.RUNNING
    assert isinstance(house.story()[0], Seen)


# --- the log --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ("task_invalid", INVALID),
        ("task_unsupported", UNSUPPORTED),
        ("turn_broke", GOOD),
        ("writes_unknown", GOOD),
    ],
)
async def test_each_line_about_a_task_has_its_account(
    house: House, monkeypatch: pytest.MonkeyPatch, event: str, text: str
) -> None:
    def away(_task: Commitment) -> None:
        raise AWAY

    house.network.add(facts_of(), text)
    if event == "turn_broke":
        house.network.faults["fetch_parameters"] = [RuntimeError("a bug")]
    if event == "writes_unknown":
        monkeypatch.setattr(house.network, "writes", away)
    with capture_logs() as lines:
        await house.turns(3)
    line = next(each for each in lines if each["event"] == event)
    assert (line["task"], line["account"]) == (TASK, ALICE)


async def test_an_attempts_lines_have_its_card_too(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_task: Commitment) -> None:
        raise AWAY

    house.network.add(facts_of())
    house.open(TASK, *await computed(house))
    monkeypatch.setattr(house.network, "writes", away)
    with capture_logs() as lines:
        await house.turns(1)
    line = next(each for each in lines if each["event"] == "writes_unknown")
    assert (line["gpu"], line["attempt"]) == (CARD, FIRST)
