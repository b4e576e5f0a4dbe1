"""A task that ended and, by what the network says later, did not."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.ledger import Ledger
from cluster.core.errors import IllegalMove
from cluster.core.ports import Lease
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Outcome,
    ParametersFetched,
    Progress,
    ResultStored,
    Seen,
)
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    GpuId,
    Score,
    TaskType,
    Timestamp,
    Wei,
)
from cluster.journal import SqlJournal

TASK = Commitment("0x" + "ab" * 32)
SEEN = Seen(Address("0xMe"), TaskType.SD, (), Wei(5))


@pytest.fixture
def journal(tmp_path: Path) -> SqlJournal:
    return SqlJournal(f"sqlite:///{tmp_path}/journal.db")


def lease_of(journal: SqlJournal) -> Lease:
    lease = journal.acquire("me", Timestamp(0), 60)
    assert lease is not None
    return lease


def scored_and_closed(ledger: Ledger, outcome: Outcome, payment: Wei) -> None:
    attempt = AttemptId("a")
    for event in (
        SEEN,
        ParametersFetched("{}"),
        AttemptStarted(attempt, GpuId("g")),
        ResultStored(attempt, Score(b"12345678"), ()),
        Claimed(Claim.SCORE),
        Closed(outcome, payment),
    ):
        ledger.append(TASK, event)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_done_stays_done(journal: SqlJournal, restarted: bool) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    scored_and_closed(ledger, Outcome.LOST, Wei(0))
    assert not ledger.open
    if restarted:
        ledger = Ledger.load(journal, lease_of(journal), lambda: 2.0)
    record = ledger.append(TASK, SEEN)
    assert record.progress is Progress.COMPUTED
    assert record.outcome is None
    assert ledger.open == {TASK: record}
    with pytest.raises(IllegalMove):
        ledger.append(TASK, Claimed(Claim.SCORE))
    assert [found.commitment for found in journal.open_records()] == [TASK]


def test_the_totals_follow(journal: SqlJournal) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    scored_and_closed(ledger, Outcome.SUCCESS, Wei(7))
    assert (ledger.outcomes[Outcome.SUCCESS], ledger.paid) == (1, 7)
    ledger.append(TASK, SEEN)
    assert (ledger.outcomes[Outcome.SUCCESS], ledger.paid) == (0, 0)
    ledger.append(TASK, Closed(Outcome.ABORTED, Wei(0)))
    again = Ledger.load(journal, lease_of(journal), lambda: 2.0)
    for each in (ledger, again):
        assert (each.outcomes[Outcome.SUCCESS], each.outcomes[Outcome.ABORTED]) == (0, 1)
        assert each.paid == 0
        assert len(each.closed) == 1


def test_a_task_moves_to_another_account_only_unanswered(journal: SqlJournal) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    ledger.append(TASK, SEEN)
    ledger.append(TASK, Closed(Outcome.LOST, Wei(0)))
    other = Seen(Address("0xOther"), TaskType.SD, (), Wei(5))
    assert ledger.append(TASK, other).account == "0xOther"
    answered = Commitment("0x" + "cd" * 32)
    ledger.append(answered, SEEN)
    ledger.append(answered, Claimed(Claim.ABORT))
    ledger.append(answered, Closed(Outcome.LOST, Wei(0)))
    with pytest.raises(IllegalMove, match="answered as 0xMe already"):
        ledger.append(answered, other)


def test_a_slashed_account_is_remembered(journal: SqlJournal) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    assert not ledger.slashed
    scored_and_closed(ledger, Outcome.INVALIDATED, Wei(0))
    again = Ledger.load(journal, lease_of(journal), lambda: 2.0)
    assert ledger.slashed == again.slashed == {SEEN.account}


def test_closed_records_are_kept_without_their_parameters(journal: SqlJournal) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    scored_and_closed(ledger, Outcome.SUCCESS, Wei(1))
    again = Ledger.load(journal, lease_of(journal), lambda: 2.0)
    for each in (ledger, again):
        assert [record.parameters for record in each.closed] == [None]


def test_an_open_task_is_not_seen_twice(journal: SqlJournal) -> None:
    ledger = Ledger.load(journal, lease_of(journal), lambda: 1.0)
    ledger.append(TASK, SEEN)
    with pytest.raises(IllegalMove):
        ledger.append(TASK, SEEN)
