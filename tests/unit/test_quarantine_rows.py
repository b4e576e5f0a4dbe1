from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection

from cluster import quarantine_rows as rows
from cluster.core.errors import LeaseLost
from cluster.core.ports import Lease
from cluster.core.strikes import CardFault, FaultKind
from cluster.core.types import CardUuid, Commitment, GigaBytes, GpuClass, GpuId, Score, Timestamp
from cluster.inference.canary import Answer, Question, doubted
from cluster.journal import SqlJournal
from cluster.quarantine_rows import Quarantine

A, B = CardUuid("GPU-A"), CardUuid("GPU-B")
X, Y = Score(bytes(range(8))), Score(b"\xff" * 8)
KIND = GpuClass("Card+docker", GigaBytes(8))
TASK, OTHER = Commitment("0x" + "01" * 32), Commitment("0x" + "02" * 32)
FIRST = Quarantine(A, KIND, "its canary differs", Timestamp(5.0))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'journal.db'}"


@pytest.fixture
def journal(url: str) -> Iterator[SqlJournal]:
    opened = SqlJournal(url)
    yield opened
    opened.close()


@pytest.fixture
def lease(journal: SqlJournal) -> Lease:
    lease = journal.acquire("me", Timestamp(0), 10.0)
    assert lease is not None
    return lease


def test_a_quarantine_stands_until_it_is_cleared(
    url: str, journal: SqlJournal, lease: Lease
) -> None:
    second = Quarantine(B, KIND, "another reason", Timestamp(4.0))
    with journal.write(lease) as connection:
        rows.begin(connection, FIRST)
        rows.begin(connection, second)
    again = SqlJournal(url)
    with again.read() as connection:
        assert rows.standing(connection) == (second, FIRST)
    again.close()
    with journal.write(lease) as connection:
        rows.clear(connection, A, Timestamp(6.0))
        assert rows.standing(connection) == (second,)
        assert rows.is_known(connection, A)
        assert not rows.is_known(connection, CardUuid("GPU-C"))


def test_what_a_class_is_held_to_is_forgotten_with_its_answers(
    journal: SqlJournal, lease: Lease
) -> None:
    other = GpuClass("Other+docker", GigaBytes(8))
    keys = [Question(kind, "torch=1", "a/b").key for kind in (KIND, other)]
    answer = Answer(X, Timestamp(1.0), "p1")
    with journal.write(lease) as connection:
        for key in keys:
            rows.expect(connection, key, X, Timestamp(1.0))
            rows.put_answer(connection, key, A, answer)
        assert rows.forget(connection, "nothing") == ()
        assert rows.forget(connection, KIND.name) == (KIND.name,)
        assert [rows.expected(connection, key) for key in keys] == [None, X]
        assert [rows.answers(connection, key) for key in keys] == [{}, {A: answer}]
        assert rows.forget(connection, None) == (other.name,)
        assert rows.expected(connection, keys[1]) is None


def test_a_card_may_come_into_quarantine_again(journal: SqlJournal, lease: Lease) -> None:
    later = replace(FIRST, reason="once more", since=Timestamp(9.0))
    with journal.write(lease) as connection:
        rows.begin(connection, FIRST)
        rows.clear(connection, A, Timestamp(6.0))
        rows.clear(connection, A, Timestamp(7.0))
        rows.begin(connection, later)
        assert rows.standing(connection) == (later,)


def test_answers_by_question_and_card(journal: SqlJournal, lease: Lease) -> None:
    first = Answer(X, Timestamp(1.0), "p1")
    second = Answer(Y, Timestamp(2.0), "p2", 3, True)
    with journal.write(lease) as connection:
        rows.put_answer(connection, "q", A, first)
        rows.put_answer(connection, "q", B, first)
        rows.put_answer(connection, "other", A, first)
        rows.put_answer(connection, "q", A, second)
    with journal.read() as connection:
        assert rows.answers(connection, "q") == {A: second, B: first}
        assert rows.answers(connection, "other") == {A: first}
        assert rows.answers(connection, "nothing") == {}


def test_a_suspected_card_has_all_its_answers_doubted(journal: SqlJournal, lease: Lease) -> None:
    answer = Answer(X, Timestamp(1.0), "p1")
    with journal.write(lease) as connection:
        for question in ("q", "r"):
            rows.put_answer(connection, question, A, answer)
            rows.put_answer(connection, question, B, answer)
        rows.suspect(connection, A)
        for question in ("q", "r"):
            assert rows.answers(connection, question) == {A: doubted(answer), B: answer}


def test_a_cleared_cards_answers_are_forgotten_and_nobody_elses(
    journal: SqlJournal, lease: Lease
) -> None:
    answer = Answer(X, Timestamp(1.0), "p1")
    with journal.write(lease) as connection:
        rows.begin(connection, FIRST)
        for card in (A, B):
            rows.put_answer(connection, "q", card, answer)
        rows.expect(connection, "q", X, Timestamp(2.0))
        rows.clear(connection, A, Timestamp(6.0))
        assert rows.answers(connection, "q") == {B: answer}
        assert rows.expected(connection, "q") == X


def test_what_is_expected(journal: SqlJournal, lease: Lease) -> None:
    with journal.write(lease) as connection:
        assert rows.expected(connection, "q") is None
        rows.expect(connection, "q", X, Timestamp(1.0))
        assert rows.expected(connection, "q") == X
        assert rows.expected(connection, "other") is None


def test_disputed_scores_by_task(journal: SqlJournal, lease: Lease) -> None:
    with journal.write(lease) as connection:
        rows.dispute(connection, TASK, {A: X, B: Y})
        rows.dispute(connection, TASK, {B: X})
        assert rows.disputed(connection, TASK) == {A: X, B: X}
        assert rows.disputed(connection, OTHER) == {}


def test_who_lost_the_lease_writes_none_of_it(journal: SqlJournal, lease: Lease) -> None:
    assert journal.acquire("other", Timestamp(100), 10.0) is not None
    answer = Answer(X, Timestamp(1.0), "p1")
    writes: tuple[Callable[[Connection], None], ...] = (
        lambda connection: rows.begin(connection, FIRST),
        lambda connection: rows.put_answer(connection, "q", A, answer),
        lambda connection: rows.expect(connection, "q", X, Timestamp(1.0)),
        lambda connection: rows.dispute(connection, TASK, {A: X}),
    )
    for write in writes:
        with pytest.raises(LeaseLost), journal.write(lease) as connection:
            write(connection)
    with journal.read() as connection:
        assert rows.standing(connection) == ()
        assert rows.answers(connection, "q") == {}
        assert rows.expected(connection, "q") is None
        assert rows.disputed(connection, TASK) == {}


def test_a_journal_of_before_gets_the_new_tables(url: str, journal: SqlJournal) -> None:
    with journal._transaction() as connection:
        rows.metadata.drop_all(connection)
    after = SqlJournal(url)
    with after.read() as connection:
        assert rows.standing(connection) == ()
        assert rows.faults(connection) == ()
        assert rows.memory_errors(connection) == {}
    after.close()


FAULT = CardFault(
    A, "a1", FaultKind.BAD_RESULT, Timestamp(3.0), GpuId("n-0"), "p1", TASK, counts=False
)


def test_what_failed_on_cards_is_kept_until_it_is_dropped(
    url: str, journal: SqlJournal, lease: Lease
) -> None:
    own = CardFault(B, "x", FaultKind.MEMORY_ERRORS, Timestamp(1.0), GpuId("n-1"), "", counts=True)
    with journal.write(lease) as connection:
        for each in (FAULT, replace(FAULT, cause="a2", at=Timestamp(4.0)), own):
            rows.put_fault(connection, each)
        rows.put_fault(connection, replace(FAULT, counts=True))
        rows.drop_faults(connection, [replace(FAULT, cause="a2")])
    again = SqlJournal(url)
    with again.read() as connection:
        assert rows.faults(connection) == (own, replace(FAULT, counts=True))
    again.close()


def test_a_cleared_cards_faults_are_forgotten_and_nobody_elses(
    journal: SqlJournal, lease: Lease
) -> None:
    other = replace(FAULT, card=B)
    with journal.write(lease) as connection:
        rows.begin(connection, FIRST)
        for each in (FAULT, other):
            rows.put_fault(connection, each)
        rows.clear(connection, A, Timestamp(6.0))
        assert rows.faults(connection) == (other,)


def test_a_released_cards_answers_stay_and_it_is_in_doubt(
    journal: SqlJournal, lease: Lease
) -> None:
    answer = Answer(X, Timestamp(1.0), "p1")
    with journal.write(lease) as connection:
        rows.begin(connection, FIRST)
        rows.put_answer(connection, "q", A, answer)
        rows.release(connection, A, Timestamp(6.0))
        assert rows.standing(connection) == ()
        assert rows.answers(connection, "q") == {A: doubted(answer)}
        assert rows.suspected(connection) == {A}


def test_who_has_contradicted_himself(journal: SqlJournal, lease: Lease) -> None:
    answer = Answer(X, Timestamp(1.0), "p1")
    with journal.write(lease) as connection:
        rows.put_answer(connection, "q", A, answer)
        rows.put_answer(connection, "q", B, replace(answer, wavered=True))
        rows.put_answer(connection, "r", B, answer)
        assert rows.wavering(connection) == {B}


def test_what_a_cards_driver_counted_last(journal: SqlJournal, lease: Lease) -> None:
    with journal.write(lease) as connection:
        for uncorrected in (3, 2**40):
            rows.put_memory_errors(connection, A, uncorrected)
        assert rows.memory_errors(connection) == {A: 2**40}
