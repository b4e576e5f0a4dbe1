from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from cluster import journal_takings
from cluster.chain import outbox_rows
from cluster.core.errors import ConfigError, IllegalMove, LeaseLost
from cluster.core.ports import Journal, Lease
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
    ResultStored,
    ResultUploaded,
    Seen,
    fold,
)
from cluster.core.takings import DAY, HOUR, Sums, Takings
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    FileRef,
    GigaBytes,
    GpuClass,
    GpuId,
    ModelId,
    Score,
    TaskType,
    Timestamp,
    Wei,
)
from cluster.journal import Assignment, Owner, SqlJournal
from cluster.journal_events import KINDS, decode_event, encode_event
from cluster.journal_tables import metadata
from tests.unit.journal_plans import plans, scanned

TASK = Commitment("0x" + "ab" * 32)
OTHER = Commitment("0x" + "cd" * 32)
SEEN = Seen(Address("0x" + "11" * 20), TaskType.SD, (), Wei(10**18))
STORED = ResultStored(AttemptId("a"), Score(b"12345678"), (FileRef("0.png", "00", 3),))
LIFE: tuple[Event, ...] = (
    SEEN,
    ParametersFetched("{}"),
    AttemptStarted(AttemptId("a"), GpuId("g")),
    STORED,
    Claimed(Claim.SCORE),
    ResultUploaded(),
    Closed(Outcome.SUCCESS, Wei(5)),
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'journal.db'}"


@pytest.fixture
def journal(url: str) -> Iterator[SqlJournal]:
    opened = SqlJournal(url)
    yield opened
    opened.close()


def take(journal: SqlJournal, holder: str = "me", now: float = 0.0) -> Lease:
    lease = journal.acquire(holder, Timestamp(now), 10.0)
    assert lease is not None
    return lease


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_event_comes_back_as_it_was(kind: type[Event]) -> None:
    @given(st.from_type(kind))
    def check(event: Event) -> None:
        assert decode_event(*encode_event(event)) == event

    check()


def test_what_an_older_version_stored_of_a_result_is_read() -> None:
    kind, body = encode_event(STORED)
    older = {k: v for k, v in json.loads(body).items() if k not in {"card", "effort"}}
    assert decode_event(kind, json.dumps(older)) == STORED
    assert STORED.card is None


def test_every_event_has_a_kind() -> None:
    assert set(KINDS.values()) == set(Event.__args__)


def test_it_is_a_journal(journal: SqlJournal) -> None:
    port: Journal = journal
    assert port.open_records() == ()


def test_the_lease_is_exclusive_until_it_expires(journal: SqlJournal) -> None:
    first = take(journal)
    assert journal.acquire("other", Timestamp(9.9), 10.0) is None
    assert journal.renew(first, Timestamp(5.0), 10.0).expires_at == 15.0
    assert journal.acquire("other", Timestamp(14.9), 10.0) is None
    second = take(journal, "other", 15.0)
    assert second.epoch > first.epoch


def test_taking_the_lease_again_makes_a_new_epoch(journal: SqlJournal) -> None:
    first = take(journal)
    assert take(journal).epoch == first.epoch + 1
    with pytest.raises(LeaseLost):
        journal.renew(first, Timestamp(1.0), 10.0)


def test_a_released_lease_is_free_and_its_epoch_spent(journal: SqlJournal) -> None:
    first = take(journal)
    journal.release(first)
    assert take(journal, "other", 0.0).epoch == first.epoch + 1


def test_who_lost_the_lease_writes_nothing(url: str, journal: SqlJournal) -> None:
    old = take(journal)
    journal.append(old, TASK, SEEN, Timestamp(1))
    after = SqlJournal(url)
    new = take(after, "other", 100.0)
    writes: tuple[Callable[[], object], ...] = (
        lambda: journal.append(old, TASK, ParametersFetched("{}"), Timestamp(2)),
        lambda: journal.set_cursor(old, "logs", "5"),
        lambda: journal.release(old),
        lambda: journal.assign(old, Assignment(1, SEEN.account, GpuClass("x", GigaBytes(8)))),
    )
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert journal.cursor("logs") is None
    assert after.story(TASK) == ((SEEN, 1.0),)
    after.append(new, TASK, ParametersFetched("{}"), Timestamp(2))
    after.close()
    assert len(journal.story(TASK)) == 2


def test_a_task_through_its_life(url: str, journal: SqlJournal) -> None:
    lease = take(journal)
    for index, event in enumerate(LIFE):
        journal.append(lease, TASK, event, Timestamp(index))
        history = tuple((each, Timestamp(at)) for at, each in enumerate(LIFE[: index + 1]))
        record = fold(TASK, history)
        again = SqlJournal(url)
        for each in (journal, again):
            assert each.story(TASK) == history
            closed = isinstance(event, Closed)
            assert each.open_records() == (() if closed else (record,))
            kept = replace(record, parameters=None)
            assert each.recent_records(5) == ((kept,) if closed else ())
        again.close()


@pytest.mark.parametrize("cached", [True, False])
def test_what_cannot_be_is_not_stored(url: str, cached: bool) -> None:
    journal = SqlJournal(url)
    lease = take(journal)
    with pytest.raises(IllegalMove):
        journal.append(lease, TASK, LIFE[1], Timestamp(0))
    for event in LIFE[:5]:
        journal.append(lease, TASK, event, Timestamp(1))
    if not cached:
        journal.close()
        journal = SqlJournal(url)
    before = journal.story(TASK)
    for wrong in (SEEN, STORED, Claimed(Claim.SCORE), Claimed(Claim.ERROR), FaultFound("no")):
        with pytest.raises(IllegalMove):
            journal.append(lease, TASK, wrong, Timestamp(2))
    assert journal.story(TASK) == before
    journal.close()


def test_no_error_quotes_the_parameters(journal: SqlJournal) -> None:
    """Whoever logs an error would log a stranger's prompt."""
    lease, private = take(journal), ParametersFetched("a very private prompt")
    with pytest.raises(IllegalMove) as unseen:
        journal.append(lease, TASK, private, Timestamp(0))
    for event in (SEEN, private):
        journal.append(lease, TASK, event, Timestamp(1))
    with pytest.raises(IllegalMove) as twice:
        journal.append(lease, TASK, private, Timestamp(2))
    with pytest.raises(IllegalMove) as folded:
        fold(TASK, [(private, Timestamp(0))])
    with journal.write(lease) as connection:
        connection.execute(text("DROP TABLE task_events"))
    with pytest.raises(DBAPIError) as broken:
        journal.append(lease, OTHER, replace(SEEN, model_ids=(ModelId("private"),)), Timestamp(3))
    for caught in (unseen, twice, folded, broken):
        assert "private" not in str(caught.value)


def test_a_fold_made_by_another_is_not_missed(url: str, journal: SqlJournal) -> None:
    lease = take(journal)
    for event in LIFE[:3]:
        journal.append(lease, TASK, event, Timestamp(1))
    other = SqlJournal(url)
    failed = AttemptFailed(AttemptId("a"), Fault.DEVICE, "gone")
    other.append(lease, TASK, failed, Timestamp(2))
    other.close()
    with pytest.raises(IllegalMove):
        journal.append(lease, TASK, STORED, Timestamp(3))
    assert journal.open_records()[0].attempts[0].fault is Fault.DEVICE


def test_the_newest_closed_come_first(journal: SqlJournal) -> None:
    lease = take(journal)
    tasks = [Commitment(f"0x{index:064x}") for index in range(4)]
    for task in tasks:
        journal.append(lease, task, SEEN, Timestamp(0))
    for task in (tasks[2], tasks[0], tasks[3]):
        journal.append(lease, task, Closed(Outcome.LOST, Wei(0)), Timestamp(1))
    found = [record.commitment for record in journal.recent_records(2)]
    assert found == [tasks[3], tasks[0]]
    assert [record.commitment for record in journal.open_records()] == [tasks[1]]


def test_the_parameters_of_closed_tasks_never_leave_the_database(
    journal: SqlJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take(journal)
    for event in (SEEN, ParametersFetched("a large text"), Closed(Outcome.ABORTED, Wei(0))):
        journal.append(lease, TASK, event, Timestamp(0))
    read: list[str] = []

    def decode(kind: str, body: str) -> Event:
        read.append(body)
        return decode_event(kind, body)

    monkeypatch.setattr("cluster.journal.decode_event", decode)
    (record,) = journal.recent_records(9)
    assert (record.parameters, record.outcome) == (None, Outcome.ABORTED)
    assert len(read) == 3
    assert not any("large" in body for body in read)
    assert journal.story(TASK)[1][0] == ParametersFetched("a large text")


def test_what_came_in_is_added_up_by_the_hour_and_taken_back_with_its_task(
    journal: SqlJournal,
) -> None:
    lease = take(journal)
    live(journal, lease, TASK, 3599.0)
    live(journal, lease, OTHER, 3600.0)
    assert journal.takings(HOUR, 0, 9) == hours({0: Sums(1, Wei(5)), 1: Sums(1, Wei(5))})
    assert journal.takings(HOUR, 1, 9) == hours({1: Sums(1, Wei(5))})
    # A reorganisation takes the first one's end back; it ends again later, for less.
    journal.append(lease, TASK, SEEN, Timestamp(7200.0))
    journal.append(lease, TASK, Closed(Outcome.GROUP_REFUND, Wei(3)), Timestamp(7201.0))
    found = journal.takings(HOUR, 0, 9)
    assert found == hours({0: Sums(), 1: Sums(1, Wei(5)), 2: Sums(1, Wei(3))})
    assert journal.takings(DAY, 0, 9) == hours({0: Sums(2, Wei(8))})
    assert journal.takings(DAY, 1, 9) == Takings({}, {})


def hours(steps: dict[int, Sums]) -> Takings:
    return Takings(steps, {SEEN.account: sum(steps.values(), Sums())})


@given(st.lists(st.tuples(*[st.integers(-(10**28), 10**28)] * 2), min_size=1, max_size=9))
def test_sums_are_to_the_wei_however_large(amounts: list[tuple[int, int]]) -> None:
    engine = create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.begin() as connection:
        for paid, gas in amounts:
            journal_takings.add(connection, Timestamp(1.0), A, 1, Wei(paid), Wei(gas))
        found = journal_takings.between(connection, DAY, 0, 0)
    paid, gas = (sum(column) for column in zip(*amounts, strict=True))
    assert found.steps == {0: Sums(len(amounts), Wei(paid), Wei(gas))}
    engine.dispose()


def test_what_a_term_begins_with_is_found_by_an_index(journal: SqlJournal) -> None:
    live(journal, take(journal), TASK, 3599.0)

    def begin() -> None:
        journal.totals()
        journal.slashed_accounts()
        journal.open_records()
        journal.recent_records(200)
        with journal.read() as connection:
            outbox_rows.states(connection)

    read = [line for line in scanned(plans(journal, begin)) if "cursors" not in line]
    assert read == []


def test_a_years_earnings_are_read_by_the_day_and_no_account_is_scanned(
    journal: SqlJournal,
) -> None:
    live(journal, take(journal), TASK, 3599.0)
    found = plans(journal, lambda: journal.takings(DAY, 0, 400))
    assert not scanned(found)
    assert all("PRIMARY KEY (span=? AND number" in plan[0] for plan in found.values())


def live(journal: SqlJournal, lease: Lease, task: Commitment, at: float) -> None:
    for event in LIFE:
        journal.append(lease, task, event, Timestamp(at))


def test_cursors_and_accounts(journal: SqlJournal) -> None:
    lease = take(journal)
    journal.set_cursor(lease, "logs", "1")
    journal.set_cursor(lease, "logs", "2")
    assert journal.cursor("logs") == "2"
    one = Assignment(1, SEEN.account, GpuClass("A+docker", GigaBytes(24)))
    two = Assignment(2, Address("0x" + "22" * 20), GpuClass("B+docker", GigaBytes(8)))
    for each in (two, one):
        journal.assign(lease, each)
    changed = replace(two, gpu_class=one.gpu_class)
    journal.assign(lease, changed)
    assert journal.assignments() == (one, changed)
    with pytest.raises(IllegalMove):
        journal.assign(lease, replace(one, address=Address("0x" + "33" * 20)))


def test_the_leases_holder_reads_its_accounts_once(
    url: str, journal: SqlJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[SqlJournal] = []
    read = SqlJournal.read

    def counted(self: SqlJournal) -> AbstractContextManager[Connection]:
        reads.append(self)
        return read(self)

    monkeypatch.setattr(SqlJournal, "read", counted)
    lease = take(journal)
    one = Assignment(1, SEEN.account, GpuClass("A+docker", GigaBytes(24)))
    assert journal.assigned(lease) == ()
    journal.assign(lease, one)
    for _ in range(5):
        assert journal.assigned(lease) == (one,)
    assert len(reads) == 2
    # Another held it meanwhile.
    other = SqlJournal(url)
    there = take(other, "other", 100.0)
    changed = replace(one, gpu_class=GpuClass("B+docker", GigaBytes(8)))
    other.assign(there, changed)
    other.close()
    again = take(journal, "me", 200.0)
    assert journal.assigned(again) == (changed,)


def test_sqlite_is_durable_and_open_tasks_are_found_by_index(journal: SqlJournal) -> None:
    with journal.read() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        query = "EXPLAIN QUERY PLAN SELECT commitment FROM tasks WHERE closed_seq IS NULL"
        assert "USING INDEX" in str(connection.execute(text(query)).all())


@pytest.mark.parametrize(
    "url", ["sqlite:////proc/no/such/folder/journal.db", "nonsense", "nosuch://host/db"]
)
def test_a_journal_that_cannot_be_opened_is_the_operators_input(url: str) -> None:
    with pytest.raises(ConfigError):
        SqlJournal(url)


A, B, C, D = (Address("0x" + digit * 40) for digit in "abcd")
OWNER = Owner(1, A, B, C, D)


@pytest.mark.parametrize(
    ("field", "value", "called"),
    [
        ("chain_id", 2, "network.chain_id 1, now it is 2"),
        ("task", Address("0x"), "network.contracts.task 0xaaaa"),
        ("node", Address("0x"), "network.contracts.node 0xbbbb"),
        ("qos", Address("0x"), "network.contracts.qos 0xcccc"),
        ("treasury", Address("0x"), "identity.seed_file's account 0xdddd"),
    ],
)
def test_a_journal_with_anothers_facts_is_refused(
    url: str, journal: SqlJournal, field: str, value: Any, called: str
) -> None:
    journal.bind(OWNER)
    journal.append(take(journal), TASK, SEEN, Timestamp(1))
    again = SqlJournal(url)
    again.bind(OWNER)
    with pytest.raises(ConfigError, match=called) as caught:
        again.bind(replace(OWNER, **{field: value}))
    assert "\n" not in str(caught.value)
    again.bind(OWNER)
    again.close()


def test_an_empty_journal_is_anyones(journal: SqlJournal) -> None:
    """A mistake that was mended before anything happened leaves no trace."""
    journal.bind(OWNER)
    mended = replace(OWNER, chain_id=2)
    journal.bind(mended)
    gpu_class = GpuClass("A+docker", GigaBytes(24))
    journal.assign(take(journal), Assignment(1, SEEN.account, gpu_class))
    with pytest.raises(ConfigError):
        journal.bind(OWNER)
    journal.bind(mended)


def test_a_journal_from_before_journals_were_bound_is_taken(journal: SqlJournal) -> None:
    journal.append(take(journal), TASK, SEEN, Timestamp(1))
    journal.bind(OWNER)
    with pytest.raises(ConfigError):
        journal.bind(replace(OWNER, chain_id=2))


def test_a_journal_of_another_schema_is_refused(url: str, journal: SqlJournal) -> None:
    journal.set_cursor(take(journal), "schema", "0")
    with pytest.raises(ConfigError):
        SqlJournal(url)
