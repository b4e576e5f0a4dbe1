"""What a long life of the journal costs: 1,000,000 closed tasks against 10,000, on one disk.

Two journals (SQLite) are filled in bulk with the tasks of a year of 100 accounts, their events,
transactions and sums. Each is then asked, by the shipped code, what people and a coordinator ask of
it: a task's story from any of its ids, a year's earnings, where the outbox's rows stand, what a
term begins with; and tasks are closed in it. Medians, in milliseconds; the ratios are of the larger
journal to the smaller.

    python -m benchmarks.journal_scale --json
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Table

from actors.ledger import Ledger
from benchmarks.report import Figure, arguments, progress, publish
from cluster import journal_tallies as tallies
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState
from cluster.core.ports import Lease
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Closed,
    Event,
    Outcome,
    ParametersFetched,
    ResultStored,
    Seen,
)
from cluster.core.takings import DAY, HOUR
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    FileRef,
    GpuId,
    Score,
    TaskType,
    Timestamp,
    Wei,
)
from cluster.earnings import earnings_of, numbers
from cluster.journal import SqlJournal
from cluster.journal_events import encode_event
from cluster.journal_tables import (
    MICRO,
    earned_table,
    events_table,
    metadata,
    names_table,
    outbox_table,
    tasks_table,
)
from cluster.story import UnknownTask, find, story_of

SMALL, LARGE = 10_000, 1_000_000
ACCOUNTS, DAYS = 100, 365
END = 20_000 * DAY
"""Unix time; the tasks are of the year before."""
OWN_WRITES = 100
"""Tasks for each write of an account's own."""
PAID = Wei(10**17)
LOOKS, LONG_LOOKS = 100, 7
CHUNK = 20_000
SEED = 20261126
_PARAMETERS = json.dumps({"prompt": "a fox in the snow, " * 12, "base_model": {"name": "a/b"}})
_FILES = (FileRef("0.png", "12" * 32, 400_000),)

Fields = dict[str, Any]


def _digest(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def commitment(number: int) -> Commitment:
    return Commitment("0x" + _digest("task", number))


def attempt(number: int) -> AttemptId:
    return AttemptId(_digest("attempt", number)[:12])


def tx_hash(number: int) -> str:
    return "0x" + _digest("hash", number)


def account(number: int) -> Address:
    return Address("0x" + _digest("account", number % ACCOUNTS)[:40])


def ends_at(tasks: int) -> list[float]:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    return sorted(END - chance.random() * DAYS * DAY for _ in range(tasks))


# --- filling --------------------------------------------------------------------------------------


def life(number: int) -> tuple[Event, ...]:
    """Up to the end of it."""
    return (
        Seen(account(number), TaskType.SD, (), PAID),
        ParametersFetched(_PARAMETERS),
        AttemptStarted(attempt(number), GpuId(f"node-{number % 50}")),
        ResultStored(attempt(number), Score(b"12345678"), _FILES),
        Closed(Outcome.SUCCESS, PAID),
    )


def event_rows(ends: list[float]) -> Iterator[Fields]:
    # Encoded once for each account: they differ in the attempt's id alone.
    lives = [[encode_event(event) for event in life(number)] for number in range(ACCOUNTS)]
    for number, end in enumerate(ends):
        task, like = commitment(number), number % ACCOUNTS
        ids = attempt(like), attempt(number)
        for step, (kind, body) in enumerate(lives[like]):
            at = end - 4.0 + step
            yield {"commitment": task, "at": at, "kind": kind, "body": body.replace(*ids)}


def task_rows(ends: list[float]) -> Iterator[Fields]:
    for number in range(len(ends)):
        last = 5 * (number + 1)
        yield {
            "commitment": commitment(number),
            "last_seq": last,
            "closed_seq": last,
            "account": account(number),
            "outcome": Outcome.SUCCESS.value,
            "payment": str(PAID),
        }


def write_rows(ends: list[float]) -> Iterator[Fields]:
    """A score for each task, and now and then what an account does for itself."""
    for number, end in enumerate(ends):
        task, sender = commitment(number), account(number)
        row = {
            "account": sender,
            "recipient": account(0),
            "data": b"d" * 164,
            "value": "0",
            "state": RowState.FINAL.value,
            "nonce": number // ACCOUNTS,
            "raw": b"r" * 290,
            "sent_at": end,
            "updated_at": end,
            "reason": "",
            "offer": json.dumps({"fee": 1, "tip": None, "gas": 9, "at": end, "replaced": []}),
            "block": number,
            "cost": "1",
        }
        claim = Claim.SCORE.value
        key = f"task:{task}:{claim}"
        yield {**row, "key": key, "task": task, "claim": claim, "tx_hash": tx_hash(number)}
        if number % OWN_WRITES == 0:
            key = f"account:{sender}:fund:{number}"
            yield {**row, "key": key, "task": None, "claim": None, "tx_hash": tx_hash(-number - 1)}


def sum_rows(ends: list[float]) -> Iterator[Fields]:
    for span in (HOUR, DAY):
        counts = Counter((int(end // span), account(n)) for n, end in enumerate(ends))
        for (number, name), tasks in counts.items():
            micro, wei = divmod(tasks * PAID, MICRO)
            paid = {"paid_micro": micro, "paid_wei": wei, "gas_micro": 0, "gas_wei": tasks}
            yield {"span": span, "number": number, "account": name, "tasks": tasks, **paid}


def name_rows(ends: list[float]) -> Iterator[Fields]:
    for number in range(len(ends)):
        yield {"name": attempt(number), "commitment": commitment(number)}


def fill(journal: SqlJournal, lease: Lease, tasks: int) -> None:
    """As that many tasks would have left it."""
    ends = ends_at(tasks)
    indexes = [index for table in metadata.tables.values() for index in table.indexes]
    filled: tuple[tuple[Table, Iterator[Fields]], ...] = (
        (events_table, event_rows(ends)),
        (tasks_table, task_rows(ends)),
        (outbox_table, write_rows(ends)),
        (earned_table, sum_rows(ends)),
        (names_table, name_rows(ends)),
    )
    with journal.write(lease) as connection:
        # Of this connection, which is the only one: keys come in no order.
        connection.exec_driver_sql("PRAGMA cache_size=-600000")
        for index in indexes:
            index.drop(connection)
    for table, rows in filled:
        while chunk := list(itertools.islice(rows, CHUNK)):
            names = ", ".join(chunk[0])
            places = ", ".join("?" * len(chunk[0]))
            statement = f"INSERT INTO {table.name} ({names}) VALUES ({places})"  # noqa: S608
            with journal.write(lease) as connection:
                connection.exec_driver_sql(statement, [tuple(row.values()) for row in chunk])
    with journal.write(lease) as connection:
        for index in indexes:
            index.create(connection)
        outcome = Outcome.SUCCESS.value
        tallies.add(connection, tallies.OUTCOMES, outcome, tasks, Wei(tasks * PAID))
        tallies.add(connection, "outbox", RowState.FINAL.value, tasks + tasks // OWN_WRITES)


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """A journal with so many closed tasks; `reader` is what people ask."""

    journal: SqlJournal
    reader: SqlJournal
    lease: Lease
    tasks: int

    @classmethod
    def of(cls, folder: Path, tasks: int) -> Filled:
        began = time.monotonic()
        journal = SqlJournal(f"sqlite:///{folder / 'journal.db'}")
        lease = journal.acquire("bench", Timestamp(time.time()), 1e6)
        if lease is None:
            raise ValueError("somebody acts there")
        fill(journal, lease, tasks)
        size = (folder / "journal.db").stat().st_size
        progress(f"{tasks} tasks in {size / 1e6:.0f} MB, {time.monotonic() - began:.0f} s")
        return cls(journal, journal.reader(1), lease, tasks)

    def questions(self) -> dict[str, Iterator[Callable[[], object]]]:
        """What is timed, each as often as it comes."""
        reader, tasks = self.reader, self.tasks
        some = random.Random(SEED + 1).sample(range(tasks), LOOKS)  # noqa: S311
        ids: dict[str, Callable[[int], str]] = {
            "commitment": commitment,
            "prefix": lambda number: commitment(number)[:14],
            "attempt": attempt,
            "hash": tx_hash,
        }
        stories = {
            kind: (_story(reader, name(number), commitment(number)) for number in some)
            for kind, name in ids.items()
        }
        return stories | {
            "unknown": (_unknown(reader, _digest("none", number)[:12]) for number in some),
            "earnings_year": itertools.repeat(lambda: year(reader, tasks), LONG_LOOKS),
            "outbox_states": itertools.repeat(lambda: states(reader, tasks), LOOKS),
            "term_start": itertools.repeat(
                lambda: begin_term(self.journal, self.lease, tasks), LONG_LOOKS
            ),
            "movements": itertools.repeat(lambda: movements(self.journal), LONG_LOOKS),
            "close": closings(self.journal, self.lease, tasks),
        }


def compare(small: Filled, large: Filled) -> dict[str, tuple[float, float]]:
    """Milliseconds of the median answer of each. They take turns, so that a slow moment of the
    machine falls on both; the first is for the connection and the pages."""
    found = {}
    of_large = large.questions()
    for name, acts in small.questions().items():
        took = [
            (_seconds(one), _seconds(other))
            for one, other in zip(acts, of_large[name], strict=True)
        ]
        one, other = (1000 * statistics.median(each) for each in zip(*took[1:], strict=True))
        found[name] = one, other
        progress(f"{name}: {one:.3g} ms, {other:.3g} ms")
    return found


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _story(journal: SqlJournal, name: str, task: Commitment) -> Callable[[], object]:
    def look() -> None:
        if story_of(journal, name).commitment != task:
            raise ValueError(f"{name} led elsewhere")

    return look


def _unknown(journal: SqlJournal, name: str) -> Callable[[], object]:
    def look() -> None:
        with suppress(UnknownTask):
            find(journal, name)
            raise ValueError(f"{name} led somewhere")

    return look


def year(journal: SqlJournal, tasks: int) -> None:
    first, last = numbers(Timestamp(END - DAYS * DAY), Timestamp(END), "day")
    found = earnings_of(journal.takings(DAY, first, last), {}, first, last, "day")
    if found.tasks != tasks:
        raise ValueError(f"{found.tasks} tasks were paid")


def states(journal: SqlJournal, tasks: int) -> None:
    with journal.read() as connection:
        found = outbox_rows.states(connection)
    if found[RowState.FINAL] < tasks:
        raise ValueError(f"{found} rows")


def begin_term(journal: SqlJournal, lease: Lease, tasks: int) -> None:
    """What is read before anything is done."""
    ledger = Ledger.load(journal, lease, lambda: float(END))
    if ledger.outcomes.total() < tasks:
        raise ValueError(f"{ledger.outcomes} closed")
    with journal.read() as connection:
        outbox_rows.refused(connection)
        outbox_rows.unresolved(connection)


def movements(journal: SqlJournal) -> None:
    with journal.read() as connection:
        outbox_rows.movements(connection)


def closings(journal: SqlJournal, lease: Lease, tasks: int) -> Iterator[Callable[[], object]]:
    """Each a task's end, after the rest of its life, which isn't timed."""
    for number in range(tasks, tasks + LOOKS):
        *before, closed = life(number)
        for event in before:
            journal.append(lease, commitment(number), event, Timestamp(END))
        yield lambda: journal.append(lease, commitment(number), closed, Timestamp(END))  # noqa: B023


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--large", type=int, default=LARGE, help="tasks of the larger journal")
    parser.add_argument("--folder", type=Path, help="where the journals are made for a while")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        small, large = (
            Filled.of(
                Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.folder))), size
            )
            for size in (SMALL, asked.large)
        )
        found = compare(small, large)
        for each in (small.reader, small.journal, large.reader, large.journal):
            each.close()
    figures: dict[str, Figure] = {"small": SMALL, "large": asked.large}
    for name, (one, other) in found.items():
        figures[f"{name}_ms"] = round(other, 3)
        figures[f"ratio_{name}"] = round(other / one, 3)
    publish("journal_scale", figures, "cpu", asked.json)


if __name__ == "__main__":
    main()
