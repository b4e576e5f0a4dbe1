from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from actors.inference import Health, Report
from actors.overview import Sight, describe, task_view, totals_of
from actors.reconciler import Turn
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Outcome,
    ParametersFetched,
    ResultStored,
)
from cluster.core.types import (
    AccountFacts,
    AccountView,
    Address,
    AttemptId,
    Commitment,
    FileRef,
    GpuState,
    NodeStatus,
    Stage,
    TaskStatus,
    Timestamp,
    Wei,
)
from cluster.status import Status
from tests.unit.actor_fakes import (
    ALICE,
    BOB,
    CARD,
    CARD_2,
    GOOD,
    KIND,
    OTHER,
    PROMPT,
    SCORE,
    START,
    TASK,
    facts_of,
    gpu_of,
)
from tests.unit.actor_house import House

TREASURY = Address("0x" + "ee" * 20)
CLOSED_TASK = Commitment("0x" + "03" * 32)
FIRST = AttemptId("a1")
HUGE = 10**30 + 1
FILE = FileRef("0.png", "ab" * 32, 9)

BUSY = Report(
    release="1+abc",
    pid=77,
    health=Health.BUSY,
    gpu_class=KIND,
    problem="",
    attempt=FIRST,
    task=OTHER,
    step=3,
    steps=20,
    finished=4,
    warm=frozenset({"b", "a"}),
    in_host_memory=frozenset(),
    on_disk=frozenset(),
)
IDLE = replace(BUSY, attempt=None, task=None, step=0, steps=0)


def view_of(address: Address, moment: int, task: Commitment | None) -> AccountView:
    facts = AccountFacts(address, NodeStatus.BUSY, KIND, Wei(HUGE), Wei(HUGE + 1), 27, task)
    at = Timestamp(START + moment)
    # Time goes on, also where no block comes.
    return AccountView(moment, Timestamp(at + 400.0), facts, (), at)


def sight_of(house: House) -> Sight:
    """Three tasks: one computed, one running, one closed."""
    started = AttemptStarted(FIRST, CARD_2)
    stored = ResultStored(FIRST, SCORE, (FILE,))
    fetched = ParametersFetched(GOOD)
    house.open(TASK, fetched, started, stored)
    house.clock.now += 7
    house.ledger.append(TASK, Claimed(Claim.SCORE))
    house.open(OTHER, fetched, started)
    house.open(CLOSED_TASK, fetched)
    house.ledger.append(CLOSED_TASK, Closed(Outcome.GROUP_SUCCESS, Wei(HUGE)))
    return Sight(
        version="1.2.3",
        config_digest="abc",
        now=Timestamp(START),
        treasury=TREASURY,
        chain_id=1337,
        accounts={2: BOB, 1: ALICE},
        gpus=((replace(gpu_of(), warm=frozenset({"b", "a"})), BUSY), (gpu_of(CARD_2), IDLE)),
        epoch=3,
        views={ALICE: view_of(ALICE, 12, TASK), BOB: view_of(BOB, 11, None)},
        assigned={1: KIND},
        open=tuple(house.ledger.open.values()),
        closed=tuple(house.ledger.closed),
        totals=totals_of(house.ledger.outcomes, house.ledger.paid),
        turns={TASK: Turn(facts_of(), Stage.ANSWERABLE, "SubmitScore", Timestamp(START))},
    )


def test_a_status_is_json_and_back(tmp_path: Path) -> None:
    status = describe(sight_of(House(tmp_path)))
    text = json.dumps(status.model_dump(mode="json"), allow_nan=False)
    assert Status.model_validate_json(text) == status


def test_nothing_in_it_is_secret(tmp_path: Path) -> None:
    text = json.dumps(describe(sight_of(House(tmp_path))).model_dump(mode="json"))
    for secret in (PROMPT, "acme/tiny", "base_model", SCORE.hex(), FILE.sha256, GOOD[:20]):
        assert secret not in text
    for field in ("parameters", "prompt", "key", "seed", "files", "raw"):
        assert f'"{field}' not in text


def test_it_tells_how_each_task_stands(tmp_path: Path) -> None:
    views = {view.commitment: view for view in describe(sight_of(House(tmp_path))).tasks}
    computed, running, closed = views[TASK], views[OTHER], views[CLOSED_TASK]
    assert (computed.status, computed.stage) == ("ParametersUploaded", "answerable")
    assert (computed.progress, computed.action) == ("computed", "SubmitScore")
    assert (computed.gpu_id, computed.attempts) == (CARD_2, 1)
    assert (computed.seen_at, computed.score_at) == (START, START + 7)
    assert (computed.deadline, computed.account) == (START + 180, ALICE)
    assert (computed.type, computed.fee, computed.outcome) == ("SD", "5", None)
    assert (running.progress, running.gpu_id, running.score_at) == ("running", CARD_2, None)
    assert (closed.status, closed.stage) == ("EndGroupSuccess", "ended")
    assert (closed.outcome, closed.progress) == ("EndGroupSuccess", "closed")
    assert (closed.payment, closed.closed_at, closed.gpu_id) == (str(HUGE), START + 7, None)


def test_an_open_task_that_wasnt_looked_at_yet_isnt_called_ended(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.open(TASK)
    view = task_view(house.ledger.open[TASK], None)
    assert (view.stage, view.status, view.outcome) == ("unknown", None, None)


def test_a_lost_task_has_no_status_on_the_network(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.open(TASK, Closed(Outcome.LOST, Wei(0)))
    view = task_view(house.ledger.closed[0], None)
    assert (view.status, view.stage, view.outcome) == (None, "ended", "Lost")
    turn = Turn(None, Stage.LOST, "close as Lost", Timestamp(START))
    house.open(OTHER)
    view = task_view(house.ledger.open[OTHER], turn)
    assert (view.status, view.stage, view.deadline) == (None, "lost", None)


def test_every_ending_has_the_networks_name(tmp_path: Path) -> None:
    house = House(tmp_path)
    for number, outcome in enumerate(Outcome):
        house.open(Commitment(f"0x{number:064x}"), Closed(outcome, Wei(0)))
    labels = {
        view.outcome: task_view(record, None).status
        for record in house.ledger.closed
        for view in [task_view(record, None)]
    }
    assert labels.pop("Lost") is None
    assert all(outcome == status for outcome, status in labels.items())
    assert set(labels) <= {status.label for status in TaskStatus}


def test_accounts_come_in_order_with_the_newest_block(tmp_path: Path) -> None:
    status = describe(sight_of(House(tmp_path)))
    alice, bob = status.accounts
    assert (alice.index, alice.address, bob.index, bob.address) == (1, ALICE, 2, BOB)
    assert (alice.status, alice.stake, alice.balance) == ("busy", str(HUGE), str(HUGE + 1))
    assert bob.gpu_class == alice.gpu_class is not None  # the network's word, nobody assigned it
    assert (alice.qos, alice.current_task, bob.current_task) == (27, TASK, None)
    assert (status.chain.block, status.chain.block_timestamp) == (12, START + 12)
    assert (status.acting, status.epoch, status.chain.reached) == (True, 3, True)
    assert status.identity.treasury == TREASURY


def test_an_account_that_wasnt_looked_at_is_unknown(tmp_path: Path) -> None:
    status = describe(replace(sight_of(House(tmp_path)), views={}))
    alice, bob = status.accounts
    assert (alice.status, bob.status) == ("unknown", "unknown")
    assert alice.gpu_class is not None
    assert (alice.gpu_class.name, alice.gpu_class.vram) == (KIND.name, KIND.vram)
    assert bob.gpu_class is None
    assert (status.chain.reached, status.chain.block) == (False, None)


def test_a_card_tells_what_it_does(tmp_path: Path) -> None:
    busy, idle = describe(sight_of(House(tmp_path))).gpus
    assert (busy.task, busy.attempt, busy.step, busy.steps) == (OTHER, FIRST, 3, 20)
    assert (busy.tasks_done, busy.warm, busy.state) == (4, ("a", "b"), GpuState.READY)
    assert (idle.gpu_id, idle.task, idle.attempt, idle.step) == (CARD_2, None, None, None)


def test_a_card_that_hasnt_answered_is_there(tmp_path: Path) -> None:
    sight = replace(sight_of(House(tmp_path)), gpus=((gpu_of(CARD, GpuState.STARTING), None),))
    (card,) = describe(sight).gpus
    assert (card.gpu_id, card.state, card.tasks_done) == (CARD, GpuState.STARTING, 0)


def test_troubles_are_named(tmp_path: Path) -> None:
    sight = replace(sight_of(House(tmp_path)), chain_error="no chain", relay_error="no relay")
    status = describe(sight)
    assert status.problems == ("no chain", "no relay")
    assert (status.chain.reached, status.chain.error) == (False, "no chain")
    assert (status.relay.reached, status.relay.error) == (False, "no relay")


def test_who_doesnt_act_still_has_a_status() -> None:
    sight = Sight("1", "abc", Timestamp(START), TREASURY, 1337, {1: ALICE}, ())
    status = describe(sight)
    assert (status.acting, status.epoch, status.tasks) == (False, None, ())
    json.dumps(status.model_dump(mode="json"))


def test_totals_count_what_was_closed() -> None:
    totals = totals_of({Outcome.SUCCESS: 3, Outcome.INVALIDATED: 2}, HUGE)
    assert totals.tasks == {"EndSuccess": 3, "EndInvalidated": 2}
    assert (totals.paid_wei, totals.slashed) == (str(HUGE), 2)
    assert totals_of({}, 0).slashed == 0
